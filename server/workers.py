"""The learning process: a worker for each adapter that has queries waiting, by turns on one policy.

An adapter takes a place when queries wait for it, and keeps it until another needs it. It gives it up at rest, or
when its time is over, and then its unfinished queries go back to the buffer. Only one process at a time learns for
an adapter.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog

from servetune.adapters.policy import Policy
from servetune.adapters.store import AdapterStore
from servetune.adapters.versions import StoreError
from servetune.server.audit import AuditLog
from servetune.server.buffer import BufferUnavailable, QueryStream
from servetune.server.history import silent
from servetune.server.model import Stores, worker_lock
from servetune.server.quiet import Quiet
from servetune.server.settings import Settings
from servetune.server.worker import POLL_S, SLOTS, Worker

RETRY_S = 2.0  # after Redis or the disk failed
TERM_S = 300.0  # how long a busy adapter keeps a place that others wait for
BROKEN = (BufferUnavailable, StoreError, OSError, RuntimeError)
"""What may end a turn and not the process; torch raises RuntimeError, out of memory included."""

log = structlog.get_logger()


@dataclass(slots=True)
class _Place:
    """An adapter at work: its worker, and what it gives back when it leaves."""

    worker: Worker
    holding: ExitStack
    since: float
    pauses_until: float = 0.0  # after a turn that failed


class Workers:
    """Learns for the adapters of a home, `worker_adapters` of them at the same time.

    Args:
        record: is told what happens to which adapter, in the words of `history`.
        quiet: says when learning must wait; by default as the settings do.
    """

    def __init__(
        self,
        settings: Settings,
        policy: Policy,
        stores: Stores,
        stream: QueryStream,
        audit: AuditLog,
        record: Callable[[str, str, Mapping[str, Any]], None] | None = None,
        quiet: Quiet | None = None,
    ) -> None:
        self._settings = settings
        self._policy = policy
        self._stores = stores
        self._stream = stream
        self._audit = audit
        self._record = record
        self._quiet = quiet or settings.quiet()
        self._places: dict[str, _Place] = {}
        self._free = [SLOTS]
        self._left: dict[str, float] = {}  # when adapters last gave up a place
        self._waited: set[str] = set()  # adapters that another process learns for
        self._look_at = 0.0

    def run(self, stop: threading.Event) -> None:
        """Learn until `stop` is set; then give back what is unfinished."""
        with self._keep_leases():
            while not stop.is_set():
                began = time.monotonic()
                if not self._round():
                    stop.wait(max(0.0, POLL_S - (time.monotonic() - began)))
        for name in list(self._places):
            self._leave(name)

    def _round(self) -> bool:
        """A turn of everyone. Returns whether there is more to do at once."""
        busy = False
        self._admit()
        # Who is alone may wait for queries in Redis, and so has them at once.
        wait_s = POLL_S if len(self._places) == 1 else 0.0
        for place in list(self._places.values()):
            if time.monotonic() < place.pauses_until:
                continue
            try:
                busy |= self._turn(place.worker, wait_s)
            except BROKEN as error:
                place.worker.fail(error)
                place.pauses_until = time.monotonic() + RETRY_S
        return busy

    def _turn(self, worker: Worker, wait_s: float) -> bool:
        """One unit of work, unless it must wait. Returns whether there is more to do at once."""
        if why := self._quiet.wait():
            worker.wait(why)
            return False
        self._quiet.begin()
        try:
            return worker.turn(wait_s)
        finally:
            self._quiet.end()

    # --- places --------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give places to adapters that want one."""
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + POLL_S
        first = self._settings.adapter
        if first not in self._places and self._has_room:  # whether asked or not: it tells how it fares
            self._try(first)
        try:
            wanting = self._stream.waiting([name for name in self._stores.names() if name not in self._places])
        except BROKEN:  # the workers meet it too, and say so
            self._look_at = time.monotonic() + RETRY_S
            return
        for name in sorted(wanting, key=lambda name: self._left.get(name, 0.0)):
            if _learns(self._stores.at(name)):
                self._try(name)

    @property
    def _has_room(self) -> bool:
        return len(self._places) < self._settings.worker_adapters

    def _make_room(self) -> bool:
        for name, place in sorted(self._places.items(), key=lambda item: item[1].since):
            if place.worker.rests() or time.monotonic() - place.since > TERM_S:
                self._leave(name)
                return True
        return False

    def _try(self, name: str) -> None:
        """Learn for an adapter; one for which that cannot be keeps no other from it."""
        try:
            self._enter(name)
        except BROKEN as error:
            log.error("not_learning", adapter=name, error=type(error).__name__, detail=str(error))
            self._left[name] = time.monotonic()
            self._look_at = time.monotonic() + RETRY_S

    def _enter(self, name: str) -> None:
        """Learn for an adapter, unless another process does or nobody gives up a place."""
        settings = self._settings.model_copy(update={"adapter": name})
        with ExitStack() as holding:
            if not holding.enter_context(worker_lock(settings))():
                self._say_waiting(name)
                return
            store = self._stores.open(name)
            if not (self._has_room or self._make_room()):
                return
            slots = self._free.pop() if self._free else self._new_slots()
            holding.callback(self._free.append, slots)
            stream = self._stream.of(name)
            holding.callback(stream.leave)
            told = partial(self._record, name) if self._record else silent
            worker = Worker(settings, self._policy, store, stream, self._audit, told, slots)
            holding.callback(worker.end)
            self._places[name] = _Place(worker, holding.pop_all(), time.monotonic())
            self._waited.discard(name)

    def _leave(self, name: str) -> None:
        self._left[name] = time.monotonic()
        self._places.pop(name).holding.close()
        self._policy.forget_images()  # nobody is left here who would hear that its queries were erased

    def _new_slots(self) -> tuple[str, str]:
        number = len(self._policy.slots) // len(SLOTS)
        first, second = (f"{slot}{number}" for slot in SLOTS)
        for slot in (first, second):
            self._policy.add(slot)
        return first, second

    def _say_waiting(self, name: str) -> None:
        if name not in self._waited:
            self._waited.add(name)
            log.info("waiting_for_other_worker", adapter=name, home=str(self._settings.home))

    @contextmanager
    def _keep_leases(self) -> Iterator[None]:
        """Renew leases and heartbeats from a thread of its own: a long step is not a dead one."""
        done = threading.Event()

        def renew() -> None:
            while not done.wait(self._settings.lease_s / 4):
                for place in list(self._places.values()):
                    place.worker.keep()
                with suppress(BufferUnavailable):
                    self._stream.beat()

        keeper = threading.Thread(target=renew, name="leases", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            done.set()
            keeper.join()


def _learns(store: AdapterStore) -> bool:
    """Whether an adapter is to learn at all; of a damaged one its worker says what is wrong."""
    try:
        return not store.paused and store.conduct().learns
    except StoreError:
        return True


def yield_to_serving() -> None:
    """Run only on what the server leaves idle (SCHED_IDLE, else nice 19)."""
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except (AttributeError, PermissionError, OSError):
        os.nice(19)
