"""The learning process with several adapters: whose turn it is, and who waits for a place."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from servetune.adapters.policy import Policy
from servetune.clients.types import WorkerStatus
from servetune.server.audit import AuditLog
from servetune.server.model import Stores, worker_lock
from servetune.server.quiet import CpuBudget, Quiet, Windows
from servetune.server.settings import Settings
from servetune.server.valkey import EmbeddedValkey
from servetune.server.workers import Workers
from tests.conftest import query
from tests.redis_servers import eventually, open_buffer, open_stream

LABELS = tuple("abcdefgh")
BATCH = 4


class Class:
    """The adapters of a home, and who learns for them."""

    def __init__(self, settings: Settings, policy: Policy, url: str) -> None:
        self.settings, self._policy, self._url = settings, policy, url
        self.stores = Stores(settings, policy)
        self.quiet: Quiet | None = None
        self._stop, self._thread = threading.Event(), threading.Thread()
        self.workers: Workers | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._learn)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.ident:
            self._thread.join(30)
        assert not self._thread.is_alive()

    def _learn(self) -> None:
        audit = AuditLog(self.settings.path("audit.jsonl"))
        with open_stream(self.settings, self._url) as stream:
            self.workers = Workers(self.settings, self._policy, self.stores, stream, audit, quiet=self.quiet)
            self.workers.run(self._stop)

    def ask(self, adapter: str, start: int = 0) -> None:
        """A batch of questions to an adapter, which is made where there is none."""
        self.stores.open(adapter)

        async def put() -> None:
            async with open_buffer(self.settings.model_copy(update={"adapter": adapter}), self._url) as buffer:
                for number in range(start, start + BATCH):
                    await buffer.put(query(number, labels=LABELS), "ann")

        asyncio.run(put())

    def heard(self, adapter: str) -> tuple[str, int]:
        """What its buffer says: the worker's state, and how many queries are left."""

        async def look() -> tuple[str, int]:
            async with open_buffer(self.settings.model_copy(update={"adapter": adapter}), self._url) as buffer:
                status = await buffer.status()
                return (await buffer.read_worker()).state, status.waiting + status.pending

        return asyncio.run(look())

    def status(self, adapter: str) -> WorkerStatus:
        """The worker's last heartbeat."""

        async def look() -> WorkerStatus:
            async with open_buffer(self.settings.model_copy(update={"adapter": adapter}), self._url) as buffer:
                return await buffer.read_worker()

        return asyncio.run(look())

    def live(self, adapter: str) -> int:
        return self.stores.at(adapter).live().version


@pytest.fixture
def lesson(
    tmp_path: Path, policy: Policy, valkey: EmbeddedValkey, request: pytest.FixtureRequest
) -> Iterator[Class]:
    settings = Settings(
        home=tmp_path,
        adapter=f"{request.node.name.strip('_')[-40:].replace('[', '-').replace(']', '')}".lower().strip("-_"),
        max_answer_tokens=4,
        queries_per_step=BATCH,
        steps_per_candidate=1,
        flush_s=0.0,
        lease_s=2.0,
        learning_rate=1e-4,
        learner="frequency",
        worker_adapters=2,
    )
    made = Class(settings, policy, valkey.url)
    yield made
    made.stop()


def test_every_adapter_learns_from_its_own_queries(lesson: Class, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five adapters and two places."""
    forgotten: list[int] = []
    monkeypatch.setattr(lesson._policy, "forget_images", lambda: forgotten.append(len(lesson.workers._places)))  # type: ignore[union-attr]
    first = lesson.settings.adapter
    names = [first, *(f"{first}-{each}" for each in "abcd")]
    for place, name in enumerate(names):
        lesson.ask(name, start=BATCH * place)
    lesson.start()
    eventually(lambda: all(lesson.live(name) == 1 for name in names), within_s=60)
    eventually(lambda: all(lesson.heard(name)[1] == 0 for name in names), within_s=10)
    for place, name in enumerate(names):
        store = lesson.stores.at(name)
        assert set(store.manifest(1).query_ids) == {f"q_{BATCH * place + each}" for each in range(BATCH)}
    digests = {lesson.stores.at(name).manifest(1).digest for name in names}
    assert len(digests) == len(names)
    assert all(lesson.heard(name)[0] == "idle" for name in names), "also of those without a place"
    assert len(forgotten) >= 3, "what was seen for an adapter goes with it"


def test_what_another_process_learns_for_is_left_to_it_until_it_ends(lesson: Class) -> None:
    other = f"{lesson.settings.adapter}-x"
    with worker_lock(lesson.settings.model_copy(update={"adapter": other})) as take:
        assert take()
        lesson.ask(other)
        lesson.ask(lesson.settings.adapter, start=BATCH)
        lesson.start()
        eventually(lambda: lesson.live(lesson.settings.adapter) == 1, within_s=60)
        assert lesson.live(other) == 0
    eventually(lambda: lesson.live(other) == 1, within_s=60)


def test_one_that_cannot_be_learned_for_keeps_no_other_from_it(lesson: Class) -> None:
    broken, sound = f"{lesson.settings.adapter}-broken", f"{lesson.settings.adapter}-sound"
    for place, name in enumerate((broken, sound)):
        lesson.ask(name, start=BATCH * place)
    (lesson.stores.at(broken).folder / "v0000" / "manifest.json").write_text("{}")
    lesson.start()
    eventually(lambda: lesson.live(sound) == 1, within_s=60)
    assert lesson.heard(broken)[1] == BATCH, "its queries wait"


def test_a_paused_one_gives_its_place_to_others(lesson: Class) -> None:
    first = lesson.settings.adapter
    paused, later = f"{first}-paused", f"{first}-later"
    lesson.ask(paused)
    lesson.stores.at(paused).set_paused(True)
    lesson.start()
    lesson.ask(later, start=BATCH)
    eventually(lambda: lesson.live(later) == 1, within_s=60)
    assert (lesson.live(paused), lesson.heard(paused)[1]) == (0, BATCH)
    lesson.stores.at(paused).set_paused(False)
    eventually(lambda: lesson.live(paused) == 1, within_s=60)


def test_a_busy_one_gives_its_place_up_in_time(lesson: Class, monkeypatch: pytest.MonkeyPatch) -> None:
    """One place; the first adapter would go on for ever."""
    monkeypatch.setattr("servetune.server.workers.TERM_S", 2.0)
    lesson.settings = lesson.settings.model_copy(
        update={"worker_adapters": 1, "steps_per_candidate": 10**6, "flush_s": 60.0}
    )
    first, other = lesson.settings.adapter, f"{lesson.settings.adapter}-other"

    lesson.ask(first)
    lesson.start()
    eventually(lambda: lesson.workers is not None and list(lesson.workers._places) == [first], within_s=30)
    lesson.ask(first, start=100)
    lesson.stores.open(other)

    async def one() -> None:  # less than a batch: it is held, and nothing is at rest
        async with open_buffer(lesson.settings.model_copy(update={"adapter": first}), lesson._url) as buffer:
            await buffer.put(query(999, labels=LABELS), "ann")

    asyncio.run(one())
    lesson.ask(other, start=200)
    eventually(lambda: lesson.workers is not None and list(lesson.workers._places) == [other], within_s=30)
    assert lesson.heard(first)[1] > 0, "what it had not finished is back"


def test_outside_of_its_window_it_waits_and_says_so(lesson: Class) -> None:
    name, hour = lesson.settings.adapter, 3600.0
    now = 12 * hour
    lesson.quiet = Quiet(Windows.parse("22:00-06:00", ZoneInfo("UTC")), clock=lambda: now)
    lesson.ask(name)
    lesson.start()
    eventually(lambda: lesson.heard(name) == ("waiting", BATCH), 20)
    assert lesson.live(name) == 0
    status = lesson.status(name)
    assert (status.waits_for, status.waits_until) == ("window", 22 * hour)
    assert status.note == "waiting for its window until 22:00"
    lesson.stores.at(name).set_paused(True)
    eventually(lambda: lesson.heard(name)[0] == "paused", 20)
    lesson.stores.at(name).set_paused(False)
    now = 22 * hour
    eventually(lambda: lesson.heard(name) == ("idle", 0), 20)
    assert lesson.live(name) == 1
    assert lesson.status(name).note is None


def test_a_unit_of_work_is_charged_to_its_share(lesson: Class) -> None:
    name, now, used = lesson.settings.adapter, 0.0, 0.0

    def process() -> float:
        nonlocal used
        used += 7.0  # at every look: a unit takes as much
        return used

    budget = CpuBudget(0.1, 1, clock=lambda: now)
    lesson.quiet = Quiet(budget=budget, clock=lambda: now, spent=process)
    lesson.ask(name)
    lesson.start()
    eventually(lambda: lesson.heard(name)[0] == "waiting", 20)
    status = lesson.status(name)
    assert (status.waits_for, status.waits_until) == ("budget", 70.0)
    now = 70.0
    eventually(lambda: lesson.status(name).waits_until == 140.0, 20)
