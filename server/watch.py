"""What one server shows of itself: how its adapter stands, what happens to it, and what is counted of that.

Knows nothing of HTTP; `live.py` has the routes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

from servetune.adapters.versions import StoreError, version_name
from servetune.clients.types import AdaptationStatus, Event, Series
from servetune.server import tracing
from servetune.server.admin import adaptation_status
from servetune.server.buffer import BufferUnavailable
from servetune.server.engine import Swap
from servetune.server.history import AT_ONCE
from servetune.server.lines import Line
from servetune.server.metrics import Reading
from servetune.server.service import Services

POLL_S = 0.5  # how often those who follow look for news
STATUS_S = 2.0  # how often they are told how things stand
FRESH_S = 1.0  # for this long a reading is not taken again


class Watches:
    """The views of a server's adapters that are in use. `streams` counts those who follow events."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._own: dict[str, Watch] = {}
        self.streams = 0
        services.lines.on_open(self._begin)

    def of(self, line: Line) -> Watch:
        """The view of one adapter."""
        return self._own[line.name]

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        """The metrics as text and its content type, with all that happened until now."""
        readings = []
        for watch in list(self._own.values()):
            await watch.count()
            with suppress(StoreError):  # a damaged adapter is left out, and the others are told
                readings.append(await watch.reading())
        return self._services.metrics.expose(readings, accept)

    def _begin(self, line: Line) -> None:
        self._services.metrics.begin(line.name)
        self._own[line.name] = Watch(self._services, line)


class Watch:
    """The view of one adapter."""

    def __init__(self, services: Services, line: Line) -> None:
        self._services = services
        self._line = line
        self._counted = f"{time.time() * 1000:.0f}-0"  # up to this event; counters begin with the adapter's use
        self._counting = asyncio.Lock()
        self._reading: tuple[float, Reading] | None = None
        self._taking = asyncio.Lock()
        line.engine.on_swap = self._note_swap

    async def events(self, since: str, status: bool, follow: bool) -> AsyncGenerator[Event, None]:
        """What happened after the event with id `since` and, to who follows, what happens from then on.

        Ends when the server begins to end. While Redis is down nothing comes, and nothing is missed.
        """
        history, due = self._services.history, 0.0
        while True:
            if status and time.monotonic() >= due:
                yield await self.status()
                due = time.monotonic() + STATUS_S
            events: list[Event] = []
            with suppress(BufferUnavailable):
                events = await history.read(self._line.name, since=since)
            for event in events:
                yield event
                since = event.id or since
            if len(events) == AT_ONCE:
                continue
            if not follow or await history.ended(POLL_S):
                return

    async def series(self, since: str | None, limit: int) -> Series:
        """The numbers of the steps after the event with id `since`, or of the newest events, as columns.

        Raises BufferUnavailable.
        """
        events = await self._stretch(since, limit)
        steps = [event for event in events if event.kind == "step" and "failed" not in event.data]
        names = dict.fromkeys(name for event in steps for name, value in event.data.items() if _is_number(value))
        columns: dict[str, list[float | None]] = {"time": [event.time for event in steps]}
        columns |= {name: [event.data.get(name) for event in steps] for name in names}
        marks = [event for event in events if event.kind != "step"]
        last = events[-1].id if events else since
        return Series(adapter=self._line.name, columns=columns, marks=marks, last_event_id=last)

    async def _stretch(self, since: str | None, limit: int) -> list[Event]:
        """Events in portions: who asks questions is served in between."""
        adapter, read = self._line.name, self._services.history.read
        events: list[Event] = []
        while len(events) < limit:
            wanted = min(AT_ONCE, limit - len(events))
            if since is None:
                found = await read(adapter, until=events[0].id if events else None, limit=wanted)
                events = found + events
            else:
                found = await read(adapter, since=events[-1].id if events else since, limit=wanted)
                events += found
            if len(found) < wanted:
                break
        return events

    async def status(self) -> Event:
        """How things stand now; an event without an id, since it is not kept."""
        reading = await self.reading()
        status, settings = reading.status, self._services.settings
        worker, buffer = status.worker, status.buffer.model_dump()
        data = {
            "mode": mode(status),
            "learner": settings.learner,
            "serving": status.serving,
            "created": reading.created,
            "live": status.live,
            "lag_versions": status.lag_versions,
            "worker": {
                "state": worker.state,
                "version": worker.version,
                "steps": worker.steps,
                "waits_until": worker.waits_until,
                "note": worker.note,
            },
            "last_verdict": worker.last_verdict,
            "buffer": buffer | {"capacity": settings.buffer_queries},
            "requests": self._services.metrics.traffic.summary() | {"waiting": reading.waiting},
        }
        return Event(time=time.time(), adapter=status.adapter, kind="status", data=data)

    async def reading(self) -> Reading:
        """How the adapter stands now, or stood a moment ago."""
        async with self._taking:
            if self._reading is None or time.monotonic() - self._reading[0] > FRESH_S:
                self._reading = (time.monotonic(), await self._read())
            return self._reading[1]

    async def _read(self) -> Reading:
        store, engine = self._line.store, self._line.engine
        status = await adaptation_status(self._line)
        digest, created = "", None
        with suppress(StoreError):  # erased a moment ago
            made = await asyncio.to_thread(store.manifest, engine.serving)
            digest, created = made.digest, made.created
        return Reading(
            status=status,
            digest=digest,
            created=created,
            waiting=engine.waiting,
            leases={version_name(version): count for version, count in engine.residency()[1].items()},
            batches=engine.batches,
            staleness=await asyncio.to_thread(self._staleness, status),
        )

    def _staleness(self, status: AdaptationStatus) -> int:
        """Versions between what the worker builds on and what is live."""
        if status.worker.version is None:
            return 0
        low, high = sorted(int(name.removeprefix("v")) for name in (status.worker.version, status.live))
        return sum(low < number <= high for number in self._line.store.versions())

    async def count(self) -> None:
        """Count what happened since it was last counted, as far as Redis can be asked."""
        services = self._services
        async with self._counting:
            with suppress(BufferUnavailable):
                while events := await services.history.read(self._line.name, since=self._counted):
                    for event in events:
                        services.metrics.hear(event)
                        self._counted = event.id or self._counted

    def _note_swap(self, swap: Swap) -> None:
        services, adapter = self._services, self._line.name
        services.metrics.swaps.labels(adapter, "refused" if swap.refused else "done").inc()
        services.metrics.swap.labels(adapter).observe(swap.seconds)
        if tracing.is_on():
            asyncio.get_running_loop().run_in_executor(None, self._trace_swap, swap)
        told: dict[str, Any] = {
            "version": version_name(swap.version),
            "previous": version_name(swap.previous),
            "seconds": round(swap.seconds, 4),
        }
        services.history.record(adapter, "swap", told | ({"refused": swap.refused} if swap.refused else {}))

    def _trace_swap(self, swap: Swap) -> None:
        """Name the step that the version came from; its manifest does."""
        learned: str | None = None
        with suppress(StoreError):
            learned = self._line.store.manifest(swap.version).metadata.get("traceparent")
        refused = {"refused": swap.refused} if swap.refused else {}
        version = version_name(swap.version)
        tracing.past("swap", swap.seconds, [learned], adapter=self._line.name, version=version, **refused)


def mode(status: AdaptationStatus) -> str:
    """Whether it learns, in a word."""
    if not status.buffer.connected or status.worker.state == "degraded":
        return "degraded"
    if status.paused or status.mode == "off":
        return "paused" if status.paused else "off"
    return status.worker.state if status.worker.state in ("absent", "waiting") else "learning"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
