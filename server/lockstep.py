"""The worker without Redis: queries from a list, turn by turn, for evaluations and for `servetune learn`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

from servetune.adapters.policy import Policy
from servetune.adapters.store import AdapterStore
from servetune.adapters.types import Query
from servetune.clients.types import WorkerStatus
from servetune.server.audit import AuditLog
from servetune.server.buffer import Delivery, QueryStream
from servetune.server.settings import Settings
from servetune.server.worker import Worker


class ListStream:
    """A buffer in memory, with a record of what the worker reported. What fails twice is dropped."""

    def __init__(self) -> None:
        self.waiting: list[Delivery] = []
        self.failed = 0
        self.status = WorkerStatus(state="idle")
        self.verdicts: list[dict[str, Any]] = []

    def put(self, queries: Sequence[Query]) -> None:
        self.waiting += [Delivery(query.id, query, 1) for query in queries]

    def take(self, limit: int, block_s: float) -> list[Delivery]:
        taken, self.waiting = self.waiting[:limit], self.waiting[limit:]
        return taken

    def renew(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        return list(deliveries)

    def settle(self, deliveries: Sequence[Delivery], outcome: str) -> int:
        return len(deliveries)

    def release(self, deliveries: Sequence[Delivery], *, failed: bool = False) -> None:
        kept = list(deliveries)
        if failed:
            kept = [replace(each, deliveries=2) for each in deliveries if each.deliveries == 1]
            self.failed += len(deliveries) - len(kept)
        self.waiting = kept + self.waiting

    def report(self, status: WorkerStatus) -> None:
        verdict = status.last_verdict
        if verdict is not None and verdict is not self.status.last_verdict and not verdict["early"]:
            self.verdicts.append(verdict)
        self.status = status


def list_worker(settings: Settings, policy: Policy, store: AdapterStore, stream: ListStream) -> Worker:
    """The production worker on a list, which never waits for more to come."""
    settings = settings.model_copy(update={"flush_s": 0.0})
    audit = AuditLog(settings.path("audit.jsonl"))
    return Worker(settings, policy, store, cast(QueryStream, stream), audit)


def lock_step(worker: Worker, stream: ListStream, batches: Iterable[Sequence[Query]]) -> Iterator[None]:
    """Learn from batch after batch, then from what the memory still holds; stops after every turn.

    A batch is asked for when the one before is done.
    """
    for batch in batches:
        stream.put(batch)
        while stream.waiting:
            worker.turn()
            yield
    while stream.waiting or worker.learner.unfinished:  # a failed turn gives its queries back
        worker.turn()
        yield
