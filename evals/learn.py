"""`servetune learn`: what a server's worker makes of its buffer, made beforehand of data that are at hand."""

from __future__ import annotations

import hashlib
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import structlog
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from servetune.adapters.family import UnsupportedModel
from servetune.adapters.step import FINISHED
from servetune.adapters.types import Query
from servetune.adapters.versions import StoreError, version_name
from servetune.evals import streams
from servetune.evals.data import BadData, Data, Item, read_unlabeled, unsplit
from servetune.server.lockstep import ListStream, list_worker, lock_step
from servetune.server.model import load_policy, open_store, worker_lock
from servetune.server.settings import Settings
from servetune.server.worker import SLOTS, Worker

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
MAX_LABELS = 1000  # as in a request


class CannotLearn(Exception):
    """Somebody else learns, or nobody may; the message says what to do."""


REFUSALS = (BadData, CannotLearn, StoreError, UnsupportedModel)
Say = Callable[[str, int, int], None]


def run(
    data: str, budget_s: float | None = None, question: str = "", labels: Sequence[str] = (), **flags: Any
) -> dict[str, Any]:
    """Learn into the store of the settings, with a progress bar on stderr. `flags` are fields of Settings.

    Returns:
        what was asked, learned, published and refused, and why it stopped, in plain JSON values.

    Raises:
        BadData: the data, or the labels, cannot be used.
        CannotLearn: a worker holds the adapter line, or the operator has paused learning.
        StoreError, UnsupportedModel: as for a server.
    """
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )
    settings = Settings(**flags)
    items = unsplit(_load(data, question, _checked(labels)), settings.seed)
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with worker_lock(settings) as take, Progress(*columns, console=console) as bar:
        if not take():
            raise CannotLearn(
                f"a worker learns for adapter {settings.adapter!r} in {settings.home}: stop its server first"
            )
        console.print(_described(items), markup=False, highlight=False)
        task = bar.add_task("loading")
        return learn(
            settings,
            items,
            budget_s,
            lambda what, done, of: bar.update(task, description=what, completed=done, total=of),
        )


def learn(settings: Settings, items: Sequence[Item], budget_s: float | None, say: Say) -> dict[str, Any]:
    """As `run`, for the holder of the worker's lock. `say` hears what goes on and how many of all are done."""
    policy = load_policy(settings, SLOTS, settings.worker_threads)
    store = open_store(settings, policy)
    if store.paused:
        raise CannotLearn(f"learning of adapter {settings.adapter!r} is paused: `servetune resume` ends that")
    if not store.conduct().learns:
        raise CannotLearn(
            f"adapter {settings.adapter!r} is off: `servetune adapters settings --mode live` ends that"
        )
    before, stream = set(store.versions()), ListStream()
    worker = list_worker(settings, policy, store, stream)
    feed = _Feed(items, settings, policy.family.recognition_question)

    def tell() -> None:
        live = version_name(store.live().version)
        say(f"{live}, {worker.learner.steps} steps", feed.asked - len(stream.waiting), len(items))

    began = time.monotonic()
    stopped = _turn(worker, stream, feed, budget_s, tell)
    if feed.unreadable and not feed.asked:
        raise BadData(feed.unreadable[0])
    made = [v for v in store.accepted() if v not in before and store.manifest(v).origin == "worker"]
    return {
        "queries": feed.asked - len(stream.waiting),
        "steps": worker.learner.steps,
        "published": [version_name(version) for version in made],
        "rejected": [verdict["reasons"] for verdict in stream.verdicts if not verdict["accepted"]],
        "live": version_name(store.live().version),
        "unreadable": feed.unreadable,
        "failed": stream.failed,
        "seconds": round(time.monotonic() - began, 3),
        "stopped": stopped,
    }


@dataclass(slots=True)
class _Feed:
    """The items as batches of queries, whose images are read when their turn comes."""

    items: Sequence[Item]
    settings: Settings
    question: str
    asked: int = 0
    unreadable: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[list[Query]]:
        size = self.settings.queries_per_step
        for start in range(0, len(self.items), size):
            batch = [query for item in self.items[start : start + size] if (query := self._query(item))]
            self.asked += len(batch)
            yield batch

    def _query(self, item: Item) -> Query | None:
        try:
            query = item.query(self.question)
        except BadData as error:  # one bad file among thousands must not cost the rest
            self.unreadable.append(str(error))
            return None
        # Manifests name their queries and are exported: they must not tell file names, in which truths may be.
        name = hashlib.sha256(f"{self.settings.seed} {item.id}".encode()).hexdigest()[:26]
        return replace(query, id=f"q_{name}")


def _turn(
    worker: Worker, stream: ListStream, feed: _Feed, budget_s: float | None, tell: Callable[[], None]
) -> str:
    """Turn until there is a reason to stop, and return it; the gate has the last word, unless interrupted."""
    stopped, began = "data", time.monotonic()
    deadline = math.inf if budget_s is None else began + budget_s
    with _interruptions() as interrupted:
        for _ in lock_step(worker, stream, feed):
            tell()
            if interrupted.is_set():
                return "interrupted"
            now = time.monotonic()
            if now + (now - began) > deadline:  # another turn like this one would not fit
                stopped = "budget"
                break
            began = now
        worker.finish()
        tell()
    if stopped == "data" and stream.status.last_step.get("divergence", math.inf) < FINISHED:
        return "converged"
    return stopped


@contextmanager
def _interruptions() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C or SIGTERM; the second ends the process, and leaves nothing half-written either."""
    interrupted = threading.Event()
    before = {name: signal.getsignal(name) for name in STOP_SIGNALS}

    def restore() -> None:
        for name, handler in before.items():
            signal.signal(name, handler)

    def note(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        restore()

    for name in before:
        signal.signal(name, note)
    try:
        yield interrupted
    finally:
        restore()


def _load(name: str, question: str, labels: tuple[str, ...]) -> Data:
    if name not in streams.STREAMS:
        found = read_unlabeled(Path(name), question, labels)
        if not any(item.question or item.labels for item in found.items):
            raise BadData(f"{name} has neither questions nor labels: give --question or --labels")
        return found
    if question or labels:
        raise BadData(f"{name} has its own questions and labels: leave --question and --labels out")
    return streams.load(name)


def _described(items: Sequence[Item]) -> str:
    """For the operator to see whether the data were understood."""
    closed = [item for item in items if item.labels]
    example = f", such as {', '.join(closed[0].labels[:3])}" if closed else ""
    return f"{len(items)} queries, {len(closed)} of them with labels to choose from{example}"


def _checked(labels: Sequence[str]) -> tuple[str, ...]:
    """Labels as a request may have them."""
    found = tuple(label.strip() for label in labels if label.strip())
    if len(set(found)) < len(found):
        raise BadData("the labels must be unique")
    if labels and not 2 <= len(found) <= MAX_LABELS:
        raise BadData(f"give 2 to {MAX_LABELS} labels, not {len(found)}")
    return found
