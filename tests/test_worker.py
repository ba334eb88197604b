"""The adaptation loop on a real Valkey: what it publishes, and that nothing is lost however it is stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from servetune.adapters.gate import Gate
from servetune.adapters.policy import Policy
from servetune.adapters.store import WEIGHTS, AdapterStore
from servetune.adapters.types import Verdict
from servetune.adapters.versions import version_name
from servetune.server.audit import AuditLog
from servetune.server.buffer import LEDGER, OUTCOMES, BufferUnavailable, QueryStream
from servetune.server.history import Record, silent
from servetune.server.model import Stores
from servetune.server.settings import Settings
from servetune.server.valkey import EmbeddedValkey
from servetune.server.worker import Worker
from servetune.server.workers import Workers
from tests.conftest import query
from tests.redis_servers import eventually, open_buffer, open_stream, running

LABELS = tuple("abcdefgh")
LEASE_S = 1.1
BATCH = 4


class Killed(BaseException):
    """Stands for kill -9: nothing in the worker handles it."""


def die(*_: Any, **__: Any) -> Any:
    raise Killed


@pytest.fixture
def settings(tmp_path: Path, request: pytest.FixtureRequest) -> Settings:
    return Settings(
        home=tmp_path,
        adapter="".join(c if c.isalnum() else "-" for c in request.node.name)[:63].strip("-"),
        max_answer_tokens=4,
        queries_per_step=BATCH,
        steps_per_candidate=1,
        flush_s=0.0,
        lease_s=LEASE_S,
        learning_rate=1e-4,
        learner="frequency",  # it learns from any picture, where the default one asks for information
    )


@pytest.fixture
def store(settings: Settings, policy: Policy) -> AdapterStore:
    made = AdapterStore(settings.path("store"), settings.adapter)
    policy.use(None)
    made.initialise(policy.zero_weights(), policy.peft_config(), policy.base_digest, policy.probe())
    return made


@contextmanager
def at_work(
    settings: Settings, policy: Policy, store: AdapterStore, url: str, record: Record = silent
) -> Iterator[Worker]:
    with open_stream(settings, url) as stream:
        yield Worker(settings, policy, store, stream, AuditLog(settings.path("audit.jsonl")), record)


@contextmanager
def learning(settings: Settings, policy: Policy, url: str) -> Iterator[threading.Thread]:
    """The learning process, as a thread."""
    stop, audit = threading.Event(), AuditLog(settings.path("audit.jsonl"))
    with open_stream(settings, url) as stream:
        workers = Workers(settings, policy, Stores(settings, policy), stream, audit)
        working = threading.Thread(target=workers.run, args=(stop,))
        working.start()
        try:
            yield working
        finally:
            stop.set()
            working.join(20)


async def ask(settings: Settings, url: str, count: int = BATCH, start: int = 0) -> None:
    async with open_buffer(settings, url) as buffer:
        for number in range(start, start + count):
            await buffer.put(query(number, labels=LABELS), "ann")


async def ledger(settings: Settings, url: str) -> dict[str, int]:
    """Where the queries are: the ledger's non-zero columns, and what is left, after checking the balance."""
    async with open_buffer(settings, url) as buffer:
        status = await buffer.status()
    left = status.waiting + status.pending
    gone = sum(status.ledger[name] for name in (*OUTCOMES, "dead", "expired", "withdrawn"))
    assert status.ledger["acked"] == gone + left
    found = {name: status.ledger[name] for name in LEDGER if name != "acked"} | {"left": left}
    return {name: count for name, count in found.items() if count}


@dataclass(frozen=True)
class Site:
    """A worker's surroundings."""

    settings: Settings
    policy: Policy
    store: AdapterStore
    url: str

    def at_work(self, record: Record = silent, **chosen: Any) -> AbstractContextManager[Worker]:
        settings = self.settings.model_copy(update=chosen)
        return at_work(settings, self.policy, self.store, self.url, record)

    async def ask(self, start: int = 0) -> None:
        await ask(self.settings, self.url, start=start)

    async def ledger(self) -> dict[str, int]:
        return await ledger(self.settings, self.url)


@pytest.fixture
def site(settings: Settings, policy: Policy, store: AdapterStore, valkey: EmbeddedValkey) -> Site:
    return Site(settings, policy, store, valkey.url)


async def test_a_turn_learns_publishes_and_settles(
    settings: Settings, policy: Policy, store: AdapterStore, valkey: EmbeddedValkey
) -> None:
    await ask(settings, valkey.url)
    with at_work(settings, policy, store, valkey.url) as worker:
        worker.turn()
    made = store.manifest(store.live().version)
    assert (made.version, made.parent, made.origin) == (1, 0, "worker")
    assert sorted(made.query_ids) == ["q_0", "q_1", "q_2", "q_3"]
    assert made.gate is not None
    assert made.gate["accepted"]
    assert await ledger(settings, valkey.url) == {"trained": BATCH}
    async with open_buffer(settings, valkey.url) as buffer:
        heard = await buffer.read_worker()
    assert (heard.state, heard.version, heard.steps) == ("idle", "v0001", 1)
    assert made.metrics["informative"] == BATCH


async def test_weights_that_nobody_would_miss_are_deleted(
    settings: Settings, policy: Policy, store: AdapterStore, valkey: EmbeddedValkey
) -> None:
    told: list[str] = []
    few = settings.model_copy(update={"retain_recent": 1, "retain_best": 0})
    with at_work(few, policy, store, valkey.url, lambda kind, data: told.append(kind)) as worker:
        for start in range(0, 4 * BATCH, BATCH):
            await ask(settings, valkey.url, start=start)
            worker.turn()
    assert (store.live().version, store.retired()) == (4, [1, 2])
    assert told.count("retire") == 2
    entries = AuditLog(settings.path("audit.jsonl")).page()[0]
    retired = [entry.details["versions"] for entry in entries if entry.event == "versions_retired"]
    assert retired == [["v0002"], ["v0001"]]
    assert await ledger(settings, valkey.url) == {"trained": 4 * BATCH}


async def test_it_tells_what_it_does_and_nothing_that_was_asked(
    settings: Settings,
    policy: Policy,
    store: AdapterStore,
    valkey: EmbeddedValkey,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[tuple[str, dict[str, Any]]] = []
    await ask(settings, valkey.url, 2 * BATCH)
    with at_work(settings, policy, store, valkey.url, lambda *event: told.append(event)) as worker:  # type: ignore[arg-type]
        worker.turn()
        (_, step), (_, verdict), (_, version) = told
        assert [kind for kind, _ in told] == ["step", "verdict", "publish"]
        assert (step["step"], step["groups"], step["informative"]) == (1, BATCH, BATCH)
        assert step["seconds"] > 0
        assert {"reward", "majority", "entropy", "valid", "kl", "grad_norm"} <= step.keys()
        assert verdict == store.manifest(1).gate | {"step": 1}  # type: ignore[operator]
        assert (version["version"], version["parent"], version["num_queries"]) == ("v0001", "v0000", BATCH)
        assert not re.search("q_|what is this|hue", json.dumps(told)), "no query, by id or by what it asks"
        told.clear()
        monkeypatch.setattr(Gate, "judge", lambda *_, **__: Verdict(False, ("worse 1 is above 0",), {}))
        worker.turn()
    assert [kind for kind, _ in told] == ["step", "verdict", "rollback"]
    assert told[1][1]["reasons"] == ["worse 1 is above 0"]
    assert told[2][1] == {"by": "worker", "version": "v0000", "reasons": ("worse 1 is above 0",)}


async def test_it_tells_of_a_step_that_failed(
    settings: Settings,
    policy: Policy,
    store: AdapterStore,
    valkey: EmbeddedValkey,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[Any] = []
    await ask(settings, valkey.url)
    with at_work(settings, policy, store, valkey.url, lambda *event: told.append(event)) as worker:

        def fail(queries: object) -> None:
            raise RuntimeError("the question was: what is this?")

        monkeypatch.setattr(worker.learner, "step", fail)
        worker.turn()
    assert told == [("step", {"step": 0, "groups": BATCH, "failed": "RuntimeError"})]


async def test_versions_follow_each_other(
    settings: Settings, policy: Policy, store: AdapterStore, valkey: EmbeddedValkey
) -> None:
    await ask(settings, valkey.url, 2 * BATCH)
    with at_work(settings, policy, store, valkey.url) as worker:
        worker.turn()
        worker.turn()
    assert store.live().version == 2
    assert store.manifest(2).parent == 1
    assert store.manifest(2).step_range == (2, 2)


async def test_a_refused_candidate_leaves_everything_as_it_was(
    settings: Settings, policy: Policy, store: AdapterStore, valkey: EmbeddedValkey
) -> None:
    await ask(settings, valkey.url)
    wild = settings.model_copy(update={"learning_rate": 50.0})
    with at_work(wild, policy, store, valkey.url) as worker:
        worker.turn()
    assert store.versions() == [0]
    assert await ledger(settings, valkey.url) == {"rejected": BATCH}
    for value in policy.parameters("candidate").values():
        assert value.isfinite().all()
    policy.use("candidate")
    moved = policy.probe()
    policy.use(None)
    assert moved == pytest.approx(policy.probe(), abs=1e-5)


@pytest.mark.parametrize(
    ("verdicts", "live"),
    [([False, True], 2), ([False, False, True], 1), ([False, False, False], 0)],
    ids=["live", "last-good", "neither"],
)
async def test_what_no_longer_passes_is_rolled_back(
    settings: Settings,
    policy: Policy,
    store: AdapterStore,
    valkey: EmbeddedValkey,
    monkeypatch: pytest.MonkeyPatch,
    verdicts: list[bool],
    live: int,
) -> None:
    """Verdicts on the third candidate, on what is live, and on last-good."""
    await ask(settings, valkey.url, 3 * BATCH)
    with at_work(settings, policy, store, valkey.url) as worker:
        worker.turn()
        worker.turn()
        assert (store.live().version, store.aliases()["last-good"]) == (2, 1)
        judged = []

        def judge(self: Gate, *_: Any, convict: bool = False, **__: Any) -> Verdict:
            assert convict == bool(judged), "only what was live gets the benefit of the doubt"
            judged.append((self.policy.weights("candidate"), self.policy.weights("live")))
            passed = verdicts[len(judged) - 1]
            return Verdict(passed, () if passed else ("worse 1 is above 0",), {})

        monkeypatch.setattr(Gate, "judge", judge)
        forgotten = []
        monkeypatch.setattr(worker.learner, "forget", lambda ids=None: forgotten.append(ids))
        worker.turn()
        assert None not in forgotten, "its own rollback stays on the same line"
    assert (store.live().version, store.aliases()["last-good"]) == (live, min(live, 1))
    assert len(judged) == len(verdicts)
    for version, slots in zip((2, 1), judged[1:], strict=False):
        for weights in slots:  # as if it were live
            assert all(torch.equal(weights[key], value) for key, value in store.weights(version).items())
    events = [entry.event for entry in AuditLog(settings.path("audit.jsonl")).page()[0]]
    assert events.count("adapter_rolled_back") == (live != 2)


async def test_a_damaged_last_good_is_not_gone_back_to(
    settings: Settings,
    policy: Policy,
    store: AdapterStore,
    valkey: EmbeddedValkey,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await ask(settings, valkey.url, 3 * BATCH)
    with at_work(settings, policy, store, valkey.url) as worker:
        worker.turn()
        worker.turn()
        (store.folder / version_name(1) / WEIGHTS).write_bytes(b"damaged")
        monkeypatch.setattr(Gate, "judge", lambda *_, **__: Verdict(False, ("worse 1 is above 0",), {}))
        worker.turn()
    assert (store.live().version, store.aliases()["last-good"]) == (0, 0)


async def test_a_version_says_which_share_it_is_and_a_new_worker_goes_on_from_all_of_it(
    settings: Settings, policy: Policy, store: AdapterStore, valkey: EmbeddedValkey
) -> None:
    await ask(settings, valkey.url)
    with at_work(settings, policy, store, valkey.url) as worker:
        worker.learner.share = 0.5
        worker.turn()
    gate = store.manifest(1).gate
    assert gate is not None
    assert gate["metrics"]["share"] == 0.5
    with at_work(settings, policy, store, valkey.url) as again:
        assert again.learner.share == 0.5
    for key, value in store.weights(1).items():
        torch.testing.assert_close(policy.weights("candidate")[key], value * (2 if ".lora_B." in key else 1))


async def test_an_early_candidate_goes_on_learning_unserved(
    settings: Settings,
    policy: Policy,
    store: AdapterStore,
    valkey: EmbeddedValkey,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While there is more to learn; then the gate's word counts, and what was learned meanwhile is published."""
    await ask(settings, valkey.url, 3 * BATCH)
    verdicts = [Verdict(False, ("not near enough",), {"early": 1.0}, early=True)] * 3
    spans: list[int] = []

    def judge(self: Gate, *_: Any, **named: Any) -> Verdict:
        spans.append(named.get("spans", 1))
        return verdicts.pop() if verdicts else Verdict(True, (), {})

    monkeypatch.setattr(Gate, "judge", judge)
    with at_work(settings, policy, store, valkey.url) as worker:
        worker.learner._unfinished = True
        for turn in range(2):
            worker.turn()
            assert store.versions() == [0]
            assert worker.learner.steps == turn + 1
        assert await ledger(settings, valkey.url) == {"left": 3 * BATCH}
        ahead = policy.weights("candidate")
        worker.learner._unfinished = False
        worker.turn()
    assert spans == [1, 2, 3, 1], "the third is tried at half its way, as any that is refused for good"
    made = store.manifest(store.live().version)
    assert (made.version, made.step_range, len(made.query_ids)) == (1, (1, 3), 3 * BATCH)
    assert await ledger(settings, valkey.url) == {"trained": 3 * BATCH}
    assert any(not torch.equal(ahead[key], value) for key, value in store.weights(1).items())


async def test_an_early_candidate_waits_no_longer_than_its_time(
    settings: Settings,
    policy: Policy,
    store: AdapterStore,
    valkey: EmbeddedValkey,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await ask(settings, valkey.url, 2 * BATCH)
    early = Verdict(False, ("not near enough",), {"early": 1.0}, early=True)
    monkeypatch.setattr(Gate, "judge", lambda *_, **__: early)
    monkeypatch.setattr("servetune.server.worker.MAX_SPANS", 2)
    with at_work(settings, policy, store, valkey.url) as worker:
        worker.learner._unfinished = True
        worker.turn()
        assert await ledger(settings, valkey.url) == {"left": 2 * BATCH}
        worker.turn()
    assert await ledger(settings, valkey.url) == {"rejected": 2 * BATCH}


async def test_an_unheard_candidate_keeps_the_temperature_of_what_it_came_from(
    settings: Settings,
    policy: Policy,
    store: AdapterStore,
    valkey: EmbeddedValkey,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await ask(settings, valkey.url, 2 * BATCH)
    with at_work(settings, policy, store, valkey.url) as worker:
        for metrics in ({"temperature": 1.1}, {}):
            monkeypatch.setattr(Gate, "judge", lambda *_, metrics=metrics, **__: Verdict(True, (), metrics))
            worker.turn()
    assert [store.manifest(version).temperature for version in (1, 2)] == [1.1, 1.1]


async def test_a_lost_connection_costs_no_memory_and_an_operators_act_does(
    settings: Settings,
    policy: Policy,
    store: AdapterStore,
    valkey: EmbeddedValkey,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual = settings.model_copy(update={"learner": "default", "steps_per_candidate": 100})
    await ask(settings, valkey.url)
    with at_work(usual, policy, store, valkey.url) as worker:
        worker.turn()
        assert len(worker.learner.memory) == BATCH

        def lost(*_: Any) -> Any:
            monkeypatch.undo()
            raise BufferUnavailable("gone")

        monkeypatch.setattr(QueryStream, "take", lost)
        with pytest.raises(BufferUnavailable) as gone:
            worker.turn()
        worker.fail(gone.value)
        worker.turn()
        assert len(worker.learner.memory) == BATCH
        store.reset()
        worker.turn()
        assert len(worker.learner.memory) == 0


async def test_a_reset_is_due_after_so_many_queries(
    settings: Settings, policy: Policy, store: AdapterStore, valkey: EmbeddedValkey
) -> None:
    await ask(settings, valkey.url, 4 * BATCH)
    tired = settings.model_copy(update={"reset_after_queries": 2 * BATCH})
    with at_work(tired, policy, store, valkey.url) as worker:
        for _ in range(4):
            worker.turn()
    origins = [store.manifest(version).origin for version in store.versions()]
    assert origins == ["base", "worker", "worker", "reset", "worker", "worker", "reset"]
    assert store.num_learned() == 0
    store.reset(to=2)
    assert store.num_learned() == 2 * BATCH
    assert await ledger(settings, valkey.url) == {"trained": 4 * BATCH}


async def test_what_the_operator_does_meanwhile_wins(
    settings: Settings,
    policy: Policy,
    store: AdapterStore,
    valkey: EmbeddedValkey,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await ask(settings, valkey.url)
    with at_work(settings, policy, store, valkey.url) as worker:
        publish = AdapterStore.publish

        def reset_before(self: AdapterStore, draft: Any) -> Any:
            monkeypatch.undo()
            store.reset()
            return publish(self, draft)

        monkeypatch.setattr(AdapterStore, "publish", reset_before)
        worker.turn()
        assert store.manifest(store.live().version).origin == "reset"
        assert await ledger(settings, valkey.url) == {"left": BATCH}
        worker.turn()
    assert await ledger(settings, valkey.url) == {"trained": BATCH}
    assert store.manifest(store.live().version).origin == "worker"


@pytest.mark.parametrize("moment", ["accept", "settle"])
async def test_killed_after_publishing_the_queries_are_not_learned_twice(
    settings: Settings,
    policy: Policy,
    store: AdapterStore,
    valkey: EmbeddedValkey,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    settings = settings.model_copy(update={"adapter": f"killed-{moment}"})
    store = AdapterStore(settings.path("store"), settings.adapter)
    store.initialise(policy.zero_weights(), policy.peft_config(), policy.base_digest, policy.probe())
    await ask(settings, valkey.url)
    owner = AdapterStore if moment == "accept" else QueryStream
    with at_work(settings, policy, store, valkey.url) as worker:
        monkeypatch.setattr(owner, moment, die)
        with pytest.raises(Killed):
            worker.turn()
        monkeypatch.undo()
    assert store.versions() == [0, 1]
    with at_work(settings, policy, store, valkey.url) as successor:
        assert store.live().version == 1
        time.sleep(LEASE_S * 1.1)
        successor.turn()
    assert store.versions() == [0, 1]
    assert await ledger(settings, valkey.url) == {"trained": BATCH}


async def test_killed_before_publishing_the_queries_are_learned_by_the_next_worker(
    settings: Settings,
    policy: Policy,
    store: AdapterStore,
    valkey: EmbeddedValkey,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await ask(settings, valkey.url)
    with at_work(settings, policy, store, valkey.url) as worker:
        monkeypatch.setattr(Gate, "judge", die)
        with pytest.raises(Killed):
            worker.turn()
        monkeypatch.undo()
    time.sleep(LEASE_S * 1.1)
    with at_work(settings, policy, store, valkey.url) as successor:
        successor.turn()
    assert await ledger(settings, valkey.url) == {"trained": BATCH}
    assert sorted(store.manifest(store.live().version).query_ids) == ["q_0", "q_1", "q_2", "q_3"]


async def test_one_bad_query_is_set_aside_and_the_others_are_learned(
    settings: Settings,
    policy: Policy,
    store: AdapterStore,
    valkey: EmbeddedValkey,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = settings.model_copy(update={"max_deliveries": 3})
    await ask(settings, valkey.url)
    with at_work(settings, policy, store, valkey.url) as worker:
        step = worker.learner.step

        def choke(queries: Any) -> Any:
            if any(one.id == "q_2" for one in queries):
                raise RuntimeError("this image breaks the model")
            return step(queries)

        monkeypatch.setattr(worker.learner, "step", choke)
        for _ in range(8):
            worker.turn()
    assert await ledger(settings, valkey.url) == {"trained": BATCH - 1, "dead": 1}


async def test_a_query_withdrawn_while_it_is_learned_is_not_published(
    settings: Settings,
    policy: Policy,
    store: AdapterStore,
    valkey: EmbeddedValkey,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await ask(settings, valkey.url)
    async with open_buffer(settings, valkey.url) as buffer:
        with at_work(settings, policy, store, valkey.url) as worker:
            judge = Gate.judge
            reached, go_on = threading.Event(), threading.Event()

            def wait(gate: Gate, *_: Any, **__: Any) -> Any:
                reached.set()
                assert go_on.wait(10)
                return judge(gate)

            monkeypatch.setattr(Gate, "judge", wait)
            turning = threading.Thread(target=worker.turn)
            turning.start()
            assert reached.wait(10)
            assert await buffer.withdraw("q_1")
            go_on.set()
            turning.join()
            assert store.versions() == [0]
            worker.turn()
    assert sorted(store.manifest(1).query_ids) == ["q_0", "q_2", "q_3"]
    assert await ledger(settings, valkey.url) == {"trained": BATCH - 1, "withdrawn": 1}


async def test_an_erased_query_is_forgotten_and_what_learned_from_it_goes(
    settings: Settings, policy: Policy, store: AdapterStore, valkey: EmbeddedValkey
) -> None:
    settings = settings.model_copy(update={"learner": "default"})
    await ask(settings, valkey.url, 2 * BATCH)
    with at_work(settings, policy, store, valkey.url) as worker:
        worker.learner.config = replace(
            worker.learner.config, min_information=-10, agreement=(0, 1), min_valid=0, rounds=1
        )
        while not (store.live().version >= 2 and not worker.learner.unfinished):
            worker.turn()
        named = [set(store.manifest(version).query_ids) for version in store.versions()]
        assert set.union(*named) == {f"q_{number}" for number in range(2 * BATCH)}
        assert sum(map(len, named)) == 2 * BATCH, "each in the version that first heard of it, witnesses too"
        assert worker.learner.remembered() == {f"q_{number}" for number in range(2 * BATCH)}
        first = next(version for version in store.versions() if "q_1" in store.manifest(version).query_ids)
        gone = store.erase(["q_1"])
        assert gone.dropped[0] == first
        assert gone.live.version == first - 1
        worker.turn()
        assert "q_1" not in worker.learner.remembered()
        assert not worker._policy._seen._values
        assert store.live() == gone.live


async def test_paused_it_forgets_what_is_erased_all_the_same(
    settings: Settings, policy: Policy, store: AdapterStore, valkey: EmbeddedValkey
) -> None:
    await ask(settings, valkey.url)
    with at_work(settings.model_copy(update={"learner": "default"}), policy, store, valkey.url) as worker:
        worker.turn()
        assert "q_0" in worker.learner.remembered()
        store.set_paused(True)
        store.erase(["q_0"])
        worker.turn()
        assert "q_0" not in worker.learner.remembered()


async def test_what_left_the_memory_is_named_all_the_same(
    settings: Settings, policy: Policy, store: AdapterStore, valkey: EmbeddedValkey
) -> None:
    """A memory smaller than what one version learns from: the version names all that had a say."""
    settings = settings.model_copy(update={"learner": "default", "steps_per_candidate": 100})
    await ask(settings, valkey.url, 3 * BATCH)
    with at_work(settings, policy, store, valkey.url) as worker:
        worker.learner.config = replace(
            worker.learner.config, min_information=-10, agreement=(0, 1), min_valid=0, rounds=1
        )
        worker.learner.memory.size = BATCH
        while not store.versions()[-1]:
            worker.turn()
            worker._held.clear()  # as if settled without a signal
        assert set(store.manifest(1).query_ids) == {f"q_{number}" for number in range(3 * BATCH)}


async def test_a_query_that_is_erased_while_it_is_learned_is_not_published(
    settings: Settings,
    policy: Policy,
    store: AdapterStore,
    valkey: EmbeddedValkey,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Erased after the worker looked whether anything was: the store itself refuses."""
    await ask(settings, valkey.url)
    judge = Gate.judge

    def erase_and_judge(self: Gate, *args: Any, **named: Any) -> Verdict:
        store.erase(["q_0"])
        return judge(self, *args, **named)

    with at_work(settings, policy, store, valkey.url) as worker:
        monkeypatch.setattr(Gate, "judge", erase_and_judge)
        worker.turn()
    assert (store.versions(), store.live().version) == ([0], 0)
    assert await ledger(settings, valkey.url) == {"left": BATCH}


async def test_paused_it_takes_nothing(
    settings: Settings, policy: Policy, store: AdapterStore, valkey: EmbeddedValkey
) -> None:
    await ask(settings, valkey.url)
    store.set_paused(True)
    with at_work(settings, policy, store, valkey.url) as worker:
        worker.turn()
        assert await ledger(settings, valkey.url) == {"left": BATCH}
        store.set_paused(False)
        worker.turn()
    assert await ledger(settings, valkey.url) == {"trained": BATCH}


async def test_unanimous_queries_change_nothing(
    settings: Settings,
    policy: Policy,
    store: AdapterStore,
    valkey: EmbeddedValkey,
) -> None:
    async with open_buffer(settings, valkey.url) as buffer:
        for number in range(BATCH):
            await buffer.put(query(number, labels=("red",)), "ann")  # one label: nothing to agree on
    with at_work(settings, policy, store, valkey.url) as worker:
        worker.turn()
    assert store.versions() == [0]
    assert await ledger(settings, valkey.url) == {"no_signal": BATCH}


async def test_it_outlives_its_redis_and_stops_when_told(
    settings: Settings, policy: Policy, store: AdapterStore, tmp_path: Path
) -> None:
    with running(tmp_path / "own") as server:
        with learning(settings, policy, server.url) as working:
            assert server.pid
            os.kill(server.pid, signal.SIGKILL)
            async with open_buffer(settings, server.url) as buffer:
                for number in range(BATCH):
                    while True:
                        try:
                            await buffer.put(query(number, labels=LABELS), "ann")
                            break
                        except Exception:  # until the server is back
                            time.sleep(0.1)
            asked = {f"q_{number}" for number in range(BATCH)}
            eventually(lambda: store.learned_from(asked) == asked, within_s=30)
        assert not working.is_alive()
        assert await ledger(settings, server.url) == {"trained": BATCH}


async def test_a_failing_replay_drops_the_memory_and_loses_nothing(
    settings: Settings,
    policy: Policy,
    store: AdapterStore,
    valkey: EmbeddedValkey,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await ask(settings, valkey.url, 16)
    usual = settings.model_copy(update={"learner": "default", "queries_per_step": 16, "steps_per_candidate": 99})
    with at_work(usual, policy, store, valkey.url) as worker:
        monkeypatch.setattr(
            worker.learner, "config", replace(worker.learner.config, min_information=-1.0, agreement=(0, 1))
        )
        worker.turn()
        assert worker.learner.unfinished
        assert worker.learner.steps > 0

        def fail(*_: Any) -> Any:
            raise FloatingPointError("the gradient is not finite")

        monkeypatch.setattr(worker.learner, "_update_lessons", fail)
        worker.turn()
        assert (worker.failures, len(worker.learner.memory), worker.learner.unfinished) == (1, 0, False)
        assert all(torch.equal(value, store.weights(0)[key]) for key, value in policy.weights("candidate").items())
    assert await ledger(settings, valkey.url) == {"left": 16}


async def test_a_full_disk_between_publishing_and_promoting_is_made_good(
    settings: Settings,
    policy: Policy,
    store: AdapterStore,
    valkey: EmbeddedValkey,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await ask(settings, valkey.url)

    def no_space(*_: Any, **__: Any) -> Any:
        monkeypatch.undo()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(AdapterStore, "accept", no_space)
    with learning(settings, policy, valkey.url):
        asked = {f"q_{number}" for number in range(BATCH)}
        eventually(lambda: store.learned_from(asked) == asked, within_s=30)
        eventually(lambda: store.live().version == 1, within_s=30)
        time.sleep(LEASE_S)
    assert store.live().version == 1
    assert store.versions() == [0, 1]


async def test_only_what_was_live_counts_as_learned(
    settings: Settings,
    policy: Policy,
    store: AdapterStore,
    valkey: EmbeddedValkey,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed after publishing, and the operator resets before the next worker comes: learn again."""
    await ask(settings, valkey.url)
    with at_work(settings, policy, store, valkey.url) as worker:
        monkeypatch.setattr(AdapterStore, "accept", die)
        with pytest.raises(Killed):
            worker.turn()
        monkeypatch.undo()
    store.reset()
    time.sleep(LEASE_S * 1.1)
    with at_work(settings, policy, store, valkey.url) as successor:
        successor.turn()
    made = store.manifest(store.live().version)
    assert (made.origin, len(made.query_ids)) == ("worker", BATCH)
    assert store.promoted() == [0, 2, 3]
    assert await ledger(settings, valkey.url) == {"trained": BATCH}


async def test_labels_that_spell_tokens_do_not_stop_learning(
    settings: Settings, policy: Policy, store: AdapterStore, valkey: EmbeddedValkey
) -> None:
    async with open_buffer(settings, valkey.url) as buffer:
        await buffer.put(query(99, labels=("<image>", "cat", "a")), "mallory")
    await ask(settings, valkey.url)
    with at_work(settings, policy, store, valkey.url) as worker:
        worker.turn()
        worker.turn()
    assert "rejected" not in await ledger(settings, valkey.url)
    assert store.live().version >= 1
