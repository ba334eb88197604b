"""Small real objects that stand in for the engine and the buffer, and an app made of them."""

from __future__ import annotations

import asyncio
import base64
import io
import time
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import httpx2
import torch
from fastapi import FastAPI
from PIL import Image

from servetune.adapters.family import PromptTooLong
from servetune.adapters.parcel import Parcel
from servetune.adapters.store import AdapterStore
from servetune.adapters.types import Query, Sampling
from servetune.adapters.versions import Draft, Manifest, StoreError, version_name
from servetune.clients.types import BufferStatus, Event, WorkerStatus
from servetune.server.access import Access
from servetune.server.app import create_app
from servetune.server.audit import AuditLog
from servetune.server.buffer import BufferUnavailable, QueryBuffer, Skipped
from servetune.server.engine import Engine, Outcome, Swap
from servetune.server.history import AT_ONCE, History
from servetune.server.lines import Lines
from servetune.server.model import Stores
from servetune.server.settings import Settings
from servetune.server.stage import Stage

ADMIN_KEY = "sta_operator.0123456789abcdef0123456789abcdef"
USER_KEY = "stu_somebody.fedcba9876543210fedcba9876543210"
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
USER = {"Authorization": f"Bearer {USER_KEY}"}


class FakeEngine:
    """Answers the first label, or "a thing"; `hold` keeps answers back until it is set."""

    model_name, base_digest, device, dtype = "fake", "sha256:base", "cpu", "float32"
    recognition_question = "which one is it?"

    def __init__(self, store: AdapterStore) -> None:
        self.store = store
        self.serving = store.live().version
        self.conduct = store.conduct()
        self.is_ready = True
        self.text: str | None = "a thing"
        self.texts: dict[int, str | None] = {}  # of versions that answer otherwise
        self.error: BaseException | None = None
        self.hold: asyncio.Event | None = None
        self.asked: list[tuple[Query, Sampling, str]] = []
        self.due_in_s: list[float | None] = []
        self.cancelled = 0
        self.life: list[str] = []
        self.forgotten: list[tuple[int, ...]] = []
        self.pace_s = 0.0
        self.waiting = 0
        self.unfit: set[str] = set()  # choices that cannot be loaded
        self.batches: dict[int, int] = {}
        self.on_swap: Callable[[Swap], None] = lambda swap: None

    async def start(self) -> None:
        self.life.append("started")

    def stop(self) -> None:
        self.life.append("stopped")

    def ready(self) -> bool:
        return self.is_ready

    def wait_s(self, ahead: int) -> float:
        return ahead * self.pace_s

    async def ping(self) -> None:
        if self.error:
            raise self.error

    async def refresh(self) -> int:
        before, self.serving = self.serving, self.store.live().version
        self.conduct = self.store.conduct()
        if before != self.serving:
            self.on_swap(Swap(self.serving, before, 0.02))
        return self.serving

    async def forget(self, versions: Collection[int]) -> None:
        self.forgotten.append(tuple(versions))

    async def can_answer(self, choice: str) -> bool:
        try:
            self.store.weights(self.store.resolve(choice))
        except StoreError:
            return False
        return choice not in self.unfit

    async def try_on(self, query: Query) -> None:
        if len(query.question) > 1000:
            raise PromptTooLong("Question and images make too many tokens.")

    async def examine(self, parcel: Parcel) -> Draft:
        self.store.check(parcel)
        return parcel.draft((0.0,))

    def residency(self) -> tuple[list[int], dict[int, int]]:
        return sorted({0, self.serving}), {self.serving: 1}

    async def answer(
        self,
        query: Query,
        sampling: Sampling,
        choice: str,
        deadline: float | None = None,
        listen: Callable[[str], None] | None = None,
    ) -> Outcome:
        self.asked.append((query, sampling, choice))
        self.due_in_s.append(None if deadline is None else deadline - asyncio.get_running_loop().time())
        if self.error:
            raise self.error
        try:
            if listen and self.text:
                listen(self.text[:4])
            if self.hold:
                await self.hold.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        version = self.serving if choice == "live" else self.store.resolve(choice)
        text = query.labels[0] if query.labels else self.texts.get(version, self.text)
        return Outcome(
            text=text,
            confidence=None if text is None else 0.75,
            candidates=[(label, 1 / len(query.labels)) for label in query.labels[: sampling.top_k]],
            finish_reason="unparsed" if text is None else "stop",
            label_mass=None,
            argmax_is_label=None,
            votes=None,
            entropy=None,
            adapter=self.store.name,
            input_tokens=9,
            output_tokens=2,
            version=version,
            alias=None if choice == version_name(version) else choice,
            digest=self.store.manifest(version).digest,
            queue_s=0.0,
            inference_s=0.01,
            views=1 if deadline is None else 4,
        )


class FakeBuffer:
    """Keeps queries in a dict; `refusal` skips, `down` breaks, `delay_s` makes it slow.

    With `reviews` it keeps them for review as well, and takes any mark.
    """

    def __init__(self) -> None:
        self.withdrawn = 0
        self.reviews = False
        self.reviewed: dict[str, Query] = {}
        self.marks: dict[tuple[str, str], str] = {}
        self.said: dict[str, tuple[str, bool]] = {}
        self.kept: dict[str, tuple[Query, str]] = {}
        self.puts = 0
        self.refusal: str | None = None
        self.down = False
        self.broken = False
        self.delay_s = 0.0
        self.unconfirmed = 0
        self.compacted = 0
        self.num_adapters = 0
        self.others: dict[str, FakeBuffer] = {}
        self.worker = WorkerStatus(state="absent")
        self._tasks: set[asyncio.Task[None]] = set()

    async def put(self, query: Query, client: str) -> None:
        self.puts += 1
        task = asyncio.create_task(self._store(query, client))
        self._tasks.add(task)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            self.unconfirmed += 1
            raise

    async def _store(self, query: Query, client: str) -> None:
        if self.broken:
            raise RuntimeError("a defect of the buffer")
        await asyncio.sleep(self.delay_s)
        if self.refusal:
            raise Skipped(self.refusal)
        self.kept[query.id] = (query, client)
        if self.reviews:
            self.reviewed[query.id] = query

    async def withdraw(self, query_id: str) -> bool:
        if self.down:
            raise BufferUnavailable
        was_kept = self.kept.pop(query_id, None) is not None
        self.reviewed.pop(query_id, None)
        self.withdrawn += was_kept
        return was_kept

    async def purge(self) -> int:
        if self.down:
            raise BufferUnavailable
        count = len(self.kept)
        self.kept.clear()
        self.reviewed.clear()
        return count

    async def recent(self, pair: str) -> dict[str, str]:
        if self.down:
            raise BufferUnavailable
        return {id: self.marks.get((id, pair), "") for id in reversed(self.reviewed)}

    async def recall(self, query_id: str) -> Query | None:
        return self.reviewed.get(query_id)

    async def mark(self, query_id: str, pair: str, mark: str) -> bool:
        before = self.marks.get((query_id, pair))
        if query_id not in self.reviewed or (mark in ("same", "different")) != (before is None):
            return False
        self.marks[query_id, pair] = mark
        return True

    async def review(self, pair: str) -> dict[str, int]:
        marks = Counter(mark for (_, of), mark in self.marks.items() if of == pair)
        return dict(marks) | {"different": marks.total() - marks["same"]}

    def coin(self, query_id: str, pair: str) -> bool:
        return zlib.crc32(f"{query_id} {pair}".encode()) % 2 == 1

    async def say(self, answer_id: str, version: str, is_correct: bool, ttl_s: float) -> None:
        if self.down:
            raise BufferUnavailable
        self.said[answer_id] = (version, is_correct)

    async def compact(self) -> None:
        self.compacted += 1

    def of(self, adapter: str) -> FakeBuffer:
        return self.others.setdefault(adapter, FakeBuffer())

    def share_among(self, num_adapters: int) -> None:
        self.num_adapters = num_adapters

    async def keep_compact(self, buffers: object) -> None:
        await asyncio.Event().wait()

    async def status(self) -> BufferStatus:
        said = Counter((version, "correct" if right else "incorrect") for version, right in self.said.values())
        feedback: dict[str, dict[str, int]] = {}
        for (version, kind), count in said.items():
            feedback.setdefault(version, {})[kind] = count
        known: dict[str, Any] = {"ledger": {"acked": self.puts}, "feedback": feedback, "kept": len(self.reviewed)}
        return BufferStatus(connected=not self.down, waiting=len(self.kept), **known)

    async def read_worker(self) -> WorkerStatus:
        return self.worker

    async def close(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)


class FakeHistory:
    """Events in a list; `down` is a Redis that cannot be reached."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.down = False
        self._ended = asyncio.Event()

    def record(self, adapter: str, kind: str, data: Mapping[str, Any]) -> None:
        if not self.down:
            id, now = f"{time.time() * 1000 + 1:.0f}-{len(self.events)}", time.time()
            self.events.append(Event(id=id, time=now, adapter=adapter, kind=kind, data=dict(data)))

    async def read(
        self, adapter: str, *, since: str | None = None, until: str | None = None, limit: int = AT_ONCE
    ) -> list[Event]:
        if self.down:
            raise BufferUnavailable
        found = [event for event in self.events if event.adapter == adapter]
        if since is None:
            return [event for event in found if until is None or place(event.id or "") < place(until)][-limit:]
        return [event for event in found if place(event.id or "") > place(since)][:limit]

    async def newest(self, adapter: str) -> str:
        return (self.events[-1].id if self.events else None) or "0-0"

    async def ended(self, within_s: float) -> bool:
        try:
            async with asyncio.timeout(min(within_s, 0.01)):
                await self._ended.wait()
        except TimeoutError:
            pass
        return self._ended.is_set()

    def end(self) -> None:
        self._ended.set()

    async def close(self) -> None:
        self.end()

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


def place(id: str) -> tuple[int, int]:
    """Where an event with this id stands among the others."""
    milliseconds, _, number = id.partition("-")
    return int(milliseconds), int(number or 0)


ZERO: Any = (
    {"layer.lora_A.weight": torch.zeros(2, 2)},
    {"r": 2, "lora_alpha": 4, "target_modules": "all", "peft_type": "LORA"},
    "sha256:base",
    (0.0,),
)


def make_store(root: Path) -> AdapterStore:
    """A store with the base and two learned versions, v0002 live; or the one that is there."""
    store = AdapterStore(root)
    if store.folder.joinpath("v0002").exists():
        return store
    store.initialise(*ZERO)
    for number in (1, 2):
        made = learn(store, float(number))
        store.promote(made.version)
    return store


def learn(store: AdapterStore, value: float, **chosen: Any) -> Manifest:
    """Publish a version as a worker would, from the query `q_<value>`."""
    weights = {"layer.lora_A.weight": torch.full((2, 2), value)}
    ids = (f"q_{value:.0f}",)
    parent = store.live().version
    draft = Draft(weights=weights, origin="worker", parent=parent, probe=(0.0,), query_ids=ids, **chosen)
    return store.publish(draft)


class FakeStage:
    """Ends."""

    stopped = False

    async def stop(self) -> None:
        self.stopped = True


class FakeStores:
    """Stores whose versions are tiny; the first is made by `make_store`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        return sorted(path.parent.name for path in self.root.glob("*/aliases.json"))

    def foreign(self) -> list[str]:
        return sorted(path.parent.name for path in self.root.glob("*/of-another-base"))

    def at(self, adapter: str) -> AdapterStore:
        return AdapterStore(self.root, adapter)

    def open(self, adapter: str) -> AdapterStore:
        store = self.at(adapter)
        store.initialise(*ZERO)
        return store


class World:
    """An app on fakes, and what it is made of; with a history of one's own where one is given."""

    def __init__(
        self,
        home: Path,
        *,
        user_keys: tuple[str, ...] = (),
        admin: bool = True,
        adapter_keys: Mapping[str, Sequence[str]] | None = None,
        history: History | None = None,
        **chosen: Any,
    ) -> None:
        self.settings = Settings(home=home, **chosen)
        self.store = make_store(home / "store")
        self.engine = FakeEngine(self.store)
        self.engines = {"default": self.engine}
        self.buffer = FakeBuffer()
        self.stage = FakeStage()
        self.audit = AuditLog(home / "audit.jsonl")
        self.access = Access(user_keys, ADMIN_KEY if admin else None, adapter_keys)
        self.history = FakeHistory()
        self.lines = Lines(
            self.settings,
            cast(Stage, self.stage),
            cast(Stores, FakeStores(home / "store")),
            cast(QueryBuffer, self.buffer),
            self._engine,
        )
        told = history or cast(History, self.history)
        self.app: FastAPI = create_app(self.settings, self.lines, self.access, self.audit, told)
        transport = httpx2.ASGITransport(app=self.app)
        self.client = httpx2.AsyncClient(transport=transport, base_url="http://localhost")

    def _engine(self, store: AdapterStore) -> Engine:
        return cast(Engine, self.engines.setdefault(store.name, FakeEngine(store)))

    async def ask(self, **fields: Any) -> httpx2.Response:
        """Ask in JSON about a small picture, unless told otherwise."""
        body = {"image": base64_png(), "question": "what is it?", **fields}
        return await self.client.post("/v1/answer", json={k: v for k, v in body.items() if v is not None})


def png(image: Image.Image | None = None) -> bytes:
    """The bytes of a PNG, by default of a small red picture."""
    return encoded(image or Image.new("RGB", (4, 3), "red"), "PNG")


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    """An image as a file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def base64_png() -> str:
    """The small red picture as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png()).decode()


async def until(condition: Callable[[], bool], timeout_s: float = 2.0) -> None:
    """Wait for something that happens in the background."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)
