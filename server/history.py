"""What became of an adapter, as events that outlive the processes: steps, verdicts, versions, swaps and acts.

Kept in Redis, one capped stream per adapter: history, not queries, so the oldest may go. Written as well as can
be: who tells of something hardly waits for it, and does not hear that it failed. An event has numbers and names,
never a question, an image or a key. `Recorder` is the worker's end, `History` the API's.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import redis
import redis.asyncio
import redis.asyncio.retry
import redis.retry
import structlog
from redis.backoff import NoBackoff
from redis.exceptions import LockError, RedisError

from servetune.adapters.versions import Alias, Erasure, Manifest, version_name
from servetune.clients.types import Event
from servetune.server import connections
from servetune.server.buffer import BufferUnavailable

MOST_EVENTS = 20_000  # of one adapter, about; a step takes some 400 bytes
AT_ONCE = 500  # events to read together, so that nobody else waits long
ANSWER_S = 1.0  # longest wait for Redis
RETRY_S = 2.0  # while it is down, nothing is tried for this long
CONNECTIONS = 4
START = "0-0"  # before every event
TIMEOUTS = {"socket_timeout": ANSWER_S, "socket_connect_timeout": ANSWER_S}

Record = Callable[[str, Mapping[str, Any]], None]
"""Tells of one event: its kind and what belongs to it."""

log = structlog.get_logger(__name__)


class Patience:
    """Leaves a Redis that is down alone for a while, and says once that it is."""

    def __init__(self) -> None:
        self._again = 0.0
        self._down = False

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Around one command. Raises BufferUnavailable."""
        if time.monotonic() < self._again:
            raise BufferUnavailable("Redis was down a moment ago")
        try:
            yield
        except LockError:  # Redis is there, and says no
            raise
        except (RedisError, OSError) as error:
            self._again = time.monotonic() + RETRY_S
            if not self._down:
                log.warning("history_unavailable", error=type(error).__name__)
            self._down = True
            raise BufferUnavailable(type(error).__name__) from error
        self._down = False


class Recorder:
    """Writes histories from a thread, while Redis is there."""

    def __init__(self, client: redis.Redis) -> None:
        self._redis = client
        self._patience = Patience()

    @classmethod
    def connect(cls, redis_url: str) -> Recorder:
        """A recorder on the Redis at `redis_url`, which need not be up."""
        again = redis.retry.Retry(NoBackoff(), 1)  # a connection that nobody used for long may be gone
        pool = connections.pool(redis_url, max_connections=CONNECTIONS, timeout=ANSWER_S, retry=again, **TIMEOUTS)
        return cls(redis.Redis.from_pool(pool))

    def record(self, adapter: str, kind: str, data: Mapping[str, Any]) -> None:
        """Tell of an event. Never raises."""
        with suppress(BufferUnavailable), self._patience.asked():
            self._redis.xadd(_key(adapter), _fields(kind, data), maxlen=MOST_EVENTS)

    def close(self) -> None:
        """Disconnect."""
        self._redis.close()


class History:
    """Reads the histories of this server's adapters, and tells what the API knows of: swaps and acts."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._redis = client
        self._patience = Patience()
        self._in_order = asyncio.Lock()
        self._telling: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()

    @classmethod
    def connect(cls, redis_url: str) -> History:
        """The histories in the Redis at `redis_url`, which need not be up."""
        again = redis.asyncio.retry.Retry(NoBackoff(), 1)
        pool = connections.async_pool(
            redis_url, max_connections=CONNECTIONS, timeout=ANSWER_S, retry=again, **TIMEOUTS
        )
        return cls(redis.asyncio.Redis.from_pool(pool))

    def record(self, adapter: str, kind: str, data: Mapping[str, Any]) -> None:
        """Tell of an event in the background, after those told before. Never raises."""
        task = asyncio.create_task(self._record(adapter, kind, data))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def read(
        self, adapter: str, *, since: str | None = None, until: str | None = None, limit: int = AT_ONCE
    ) -> list[Event]:
        """The events next after the one with id `since`, or the last before `until` or at all; oldest first.

        Raises BufferUnavailable.
        """
        key = _key(adapter)
        if since is None:
            newest = "+" if until is None else f"({until}"
            rows = (await self._ask(self._redis.xrevrange, key, max=newest, count=limit))[::-1]
        else:
            rows = await self._ask(self._redis.xrange, key, min=f"({since}", count=limit)
        return [event for row in rows if (event := _event(adapter, *row))]

    async def newest(self, adapter: str) -> str:
        """The id of the newest event, or one before any that is still to come."""
        try:
            events = await self.read(adapter, limit=1)
        except BufferUnavailable:
            return f"{time.time() * 1000:.0f}-0"
        return events[-1].id or START if events else START

    def bookmark(self, reader: str, lease_s: float) -> Bookmark:
        """Where a reader is who reads every event once."""
        return Bookmark(self._redis, self._ask, reader, lease_s)

    async def ended(self, within_s: float) -> bool:
        """Whether the server begins to end, after waiting so long at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._ended.wait()
        return self._ended.is_set()

    def end(self) -> None:
        """Let everyone who follows go: the server is about to end."""
        self._ended.set()

    async def close(self) -> None:
        """Write what was told, then disconnect."""
        self.end()
        await asyncio.gather(*self._telling)
        await self._redis.aclose()

    async def _record(self, adapter: str, kind: str, data: Mapping[str, Any]) -> None:
        async with self._in_order:
            with suppress(BufferUnavailable):
                await self._ask(self._redis.xadd, _key(adapter), _fields(kind, data), maxlen=MOST_EVENTS)

    async def _ask(self, command: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with self._patience.asked():
            return await command(*args, **options)


class Bookmark:
    """How far a reader is in every history, for processes of which one at a time reads as it.

    Kept in Redis, so that the next one goes on where the last one stopped. Every method raises BufferUnavailable.
    """

    def __init__(
        self, client: redis.asyncio.Redis, ask: Callable[..., Awaitable[Any]], reader: str, lease_s: float
    ) -> None:
        self._redis = client
        self._ask = ask
        self._reader = reader
        self._held = False
        self._turn = client.lock(f"servetune:{reader}:turn", timeout=lease_s, blocking=False, thread_local=False)

    async def mine(self) -> bool:
        """Be the one that reads, or stay so, for another lease; False where another process is."""
        try:
            self._held = self._held and bool(await self._ask(self._turn.reacquire))
        except LockError:  # it ran out, and somebody else may have it
            self._held = False
        self._held = self._held or bool(await self._ask(self._turn.acquire))
        return self._held

    async def place(self, adapter: str) -> str:
        """The event after which to read; at the first time the newest, since what was is not news."""
        if (found := await self._ask(self._redis.get, self._key(adapter))) is None:
            newest = await self._ask(self._redis.xrevrange, _key(adapter), count=1)
            start = newest[0][0] if newest else START
            await self._ask(self._redis.set, self._key(adapter), start, nx=True)
            found = await self._ask(self._redis.get, self._key(adapter))
        return found.decode() if found else START

    async def move(self, adapter: str, id: str) -> bool:
        """Be done with an event; False where it is no longer this process that reads."""
        if not await self.mine():
            return False
        await self._ask(self._redis.set, self._key(adapter), id)
        return True

    async def first(self, adapter: str, what: str, id: str, within_s: float) -> bool:
        """Whether an event is the first of its sort within a time, however often that is asked of it."""
        key = f"{self._key(adapter)}:{what}"
        if await self._ask(self._redis.set, key, id, nx=True, px=round(within_s * 1000)):
            return True
        return bool(await self._ask(self._redis.get, key) == id.encode())

    async def leave(self) -> None:
        """Let another process read."""
        if self._held:
            self._held = False
            with suppress(LockError):
                await self._ask(self._turn.release)

    def _key(self, adapter: str) -> str:
        return f"servetune:{{{adapter}}}:place:{self._reader}"


ACTS = {
    "adapter_snapshot": "snapshot",
    "adapter_promoted": "promote",
    "adapter_rolled_back": "rollback",
    "adapter_reset": "reset",
    "adaptation_paused": "pause",
    "adaptation_resumed": "resume",
    "queries_erased": "erase",
    "adapter_imported": "import",
    "adapter_settings": "settings",
    "probes_uploaded": "probes",
    "probes_removed": "probes",
    "adapter_pinned": "pin",
    "adapter_unpinned": "unpin",
}
"""Entries of the audit trail that are part of an adapter's history, and what they are called there."""


def act_event(act: str, details: Mapping[str, Any], result: object) -> tuple[str, dict[str, Any]] | None:
    """What the history says of an operator's act that led to `result`; None where it is not told there."""
    if act not in ACTS:
        return None
    told: dict[str, Any] = {"by": "operator"}
    if isinstance(result, Erasure):
        told |= {"dropped": [version_name(number) for number in result.dropped]}
        result = result.live
    if isinstance(result, Manifest | Alias):
        told["version"] = version_name(result.version)
    return ACTS[act], told | {
        name: details[name] for name in ("label", "mode", "canary_share", "num_probes") if name in details
    }


def version_event(made: Manifest) -> dict[str, Any]:
    """What the history says of a version that the worker published."""
    return {
        "version": version_name(made.version),
        "parent": None if made.parent is None else version_name(made.parent),
        "step_range": made.step_range,
        "num_queries": len(made.query_ids),
        "metrics": made.metrics,
        "gate": (made.gate or {}).get("metrics", {}),
    }


def silent(kind: str, data: Mapping[str, Any]) -> None:
    """A record of nothing, for a worker whose history nobody will read."""


def _key(adapter: str) -> str:
    return f"servetune:{{{adapter}}}:history"


def _fields(kind: str, data: Mapping[str, Any]) -> dict[Any, Any]:
    return {"kind": kind, "data": json.dumps(data)}


def _event(adapter: str, entry: bytes, fields: Mapping[bytes, bytes]) -> Event | None:
    """None for an entry that is none of ours."""
    try:
        id, kind, data = entry.decode(), fields[b"kind"].decode(), json.loads(fields[b"data"])
        return Event(id=id, time=int(id.partition("-")[0]) / 1000, adapter=adapter, kind=kind, data=data)
    except (KeyError, ValueError):
        return None
