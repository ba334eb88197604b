"""Answers carry the version that made them; swaps fall between generations; bad versions are never served."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from servetune.adapters import growth
from servetune.adapters.calibration import tempered
from servetune.adapters.family import Family, UnusableImage
from servetune.adapters.growth import Sample, Stopped
from servetune.adapters.looks import NUM_ROLLOUTS, Look, Looks
from servetune.adapters.policy import LoraSpec, Policy
from servetune.adapters.store import AdapterStore
from servetune.adapters.types import Query, Sampling
from servetune.adapters.versions import Draft, RetiredVersion, UnknownVersion, version_name
from servetune.adapters.views import safe_views
from servetune.server.answering import LET_OTHERS_IN, Answering, Resident
from servetune.server.engine import Engine, Outcome, Swap
from servetune.server.model import _dtype
from servetune.server.settings import Settings
from servetune.server.stage import SLOTS, QueueFull, Stage, fewest_threads
from tests.conftest import query

LABELS = ("red", "green cat", "blue dog")


@pytest.fixture
def policy(tiny: Path) -> Policy:
    return Policy(Family.load(str(tiny)), LoraSpec(4, 8), SLOTS)


@pytest.fixture
def store(policy: Policy, tmp_path: Path) -> AdapterStore:
    made = AdapterStore(tmp_path / "store")
    policy.use(None)
    made.initialise(policy.zero_weights(), policy.peft_config(), "sha256:base", policy.probe())
    return made


@pytest.fixture
async def engine(policy: Policy, store: AdapterStore, tmp_path: Path) -> AsyncIterator[Engine]:
    made = engine_on(policy, store, Settings(home=tmp_path, swap_poll_s=0.02, queue_size=4))
    await made.start()
    yield made
    made.stop()
    await made.stage.stop()


def engine_on(policy: Policy, store: AdapterStore, settings: Settings) -> Engine:
    return Engine(Stage(policy, settings), store, settings)


def publish(
    policy: Policy,
    store: AdapterStore,
    seed: int,
    probe: tuple[float, ...] | None = None,
    temperature: float = 1.0,
) -> int:
    """A version whose probe was made by a second policy, as the worker does."""
    maker = Policy(Family.load(policy.family.source), LoraSpec(4, 8), ("candidate",))
    weights = maker.zero_weights()
    generator = torch.Generator().manual_seed(seed)
    for key, value in weights.items():
        if ".lora_B." in key:
            value.normal_(std=0.5, generator=generator)
    maker.load("candidate", weights)
    draft = Draft(weights, "worker", 0, probe or maker.probe(), temperature=temperature)
    return store.publish(draft).version


async def test_retention_spares_what_is_loaded(engine: Engine, policy: Policy, store: AdapterStore) -> None:
    """A version with a slot can be leased at any time; one without is refused once its weights are gone."""
    numbers = [publish(policy, store, seed) for seed in range(3)]
    await engine.answer(query(labels=LABELS), Sampling(), version_name(numbers[0]))
    assert store.retain(recent=1, best=0) == [numbers[1]]
    assert (await engine.answer(query(labels=LABELS), Sampling(), version_name(numbers[0]))).version == numbers[0]
    with pytest.raises(RetiredVersion):
        await engine.answer(query(labels=LABELS), Sampling(), version_name(numbers[1]))
    await engine.forget([numbers[0]])
    assert store.retain(recent=1, best=0) == [numbers[0]]


def count_turns(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many are answered together, turn by turn, from now on."""
    turns: list[int] = []
    answer = Answering._answer

    def counted(self: Answering, jobs: list[Any], began: float) -> None:
        turns.append(len(jobs))
        answer(self, jobs, began)

    monkeypatch.setattr(Answering, "_answer", counted)
    return turns


def scores(outcome: Outcome) -> dict[str, float]:
    return dict(outcome.candidates)


async def test_recognition_gives_probabilities_over_the_labels(engine: Engine) -> None:
    outcome = await engine.answer(query(labels=LABELS), Sampling(top_k=5), "live")
    assert sum(scores(outcome).values()) == pytest.approx(1.0)
    assert outcome.text == outcome.candidates[0][0]
    assert outcome.confidence == outcome.candidates[0][1]
    assert 0 <= (outcome.label_mass or 0) <= 1
    assert (outcome.version, outcome.alias) == (0, "live")
    best = await engine.answer(query(labels=LABELS), Sampling(top_k=1), "base")
    assert len(best.candidates) == 1


async def test_the_same_question_is_not_fed_again_and_a_swap_serves_nothing_stale(
    engine: Engine, policy: Policy, store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed = 0
    prefill = policy.family.prefill

    def count(*args: Any) -> Any:
        nonlocal fed
        fed += 1
        return prefill(*args)

    monkeypatch.setattr(policy.family, "prefill", count)
    asked = [query(3, labels=LABELS), query(3)]
    before = [await engine.answer(one, Sampling(max_tokens=4), "live") for one in asked * 2]
    assert fed == 1
    assert [one.candidates for one in before[:2]] == [one.candidates for one in before[2:]]
    store.promote(publish(policy, store, 7))
    await engine.refresh()
    fed = 0
    after = await engine.answer(asked[0], Sampling(max_tokens=4), "live")
    assert fed == 1
    fresh = engine_on(policy, store, Settings(home=tmp_path, swap_poll_s=0.02, prompt_cache_bytes=0))
    await fresh.start()
    assert (await fresh.answer(asked[0], Sampling(max_tokens=4), "live")).candidates == after.candidates
    assert after.candidates != before[0].candidates
    fresh.stop()
    await fresh.stage.stop()


async def test_nobody_waits_for_another_version_to_be_loaded(
    engine: Engine, policy: Policy, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = publish(policy, store, 1), publish(policy, store, 2)
    before = await engine.answer(query(labels=LABELS), Sampling(), version_name(one))
    go, load = threading.Event(), engine.stage._load
    monkeypatch.setattr(engine.stage, "_load", lambda *args: go.wait(10) and load(*args))
    loading = asyncio.create_task(engine.answer(query(labels=LABELS), Sampling(), version_name(other)))
    while not engine.stage._loading.locked():
        await asyncio.sleep(0)
    for choice in (version_name(one), "base"):
        answer = await asyncio.wait_for(engine.answer(query(labels=LABELS), Sampling(), choice), 5)
        assert answer.candidates == before.candidates or choice == "base"
    assert not loading.done()
    go.set()
    assert (await loading).version == other


async def test_votes_are_counted_in_canonical_form_and_shown_as_written(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"Three dogs.": 3, "3 dogs": 4, "The cat": 5}
    encode = engine.stage.policy.family.tokens
    drawn = [Sample(encode(text), -1.0, count, True) for text, count in said.items()]
    monkeypatch.setattr(growth, "sample", lambda *_, **__: drawn)
    voted = await engine.answer(query(), Sampling(n=12, temperature=1.0), "live")
    assert voted.text == "3 dogs"
    assert voted.votes == {"3 dogs": pytest.approx(7 / 12), "The cat": pytest.approx(5 / 12)}


@pytest.mark.parametrize("asked", [query(labels=LABELS), query()])
async def test_a_version_sounds_as_sure_as_its_temperature_lets_it(
    engine: Engine, policy: Policy, store: AdapterStore, asked: Query
) -> None:
    plain, calm = publish(policy, store, 1), publish(policy, store, 1, temperature=3.0)
    sampling = Sampling(max_tokens=4, top_k=3)
    one = await engine.answer(asked, sampling, version_name(plain))
    other = await engine.answer(asked, sampling, version_name(calm))
    assert one.text == other.text
    if asked.labels:
        assert (other.confidence or 1) < (one.confidence or 0)
        looked = await engine.answer(asked, sampling, version_name(plain), soon())
        calmer = await engine.answer(asked, sampling, version_name(calm), soon())
        assert calmer.views == looked.views > 1
        assert (calmer.confidence or 1) < (looked.confidence or 0)
    else:
        assert other.confidence == pytest.approx(tempered(one.confidence or 0, 3.0))


async def test_open_answers(engine: Engine) -> None:
    greedy = await engine.answer(query(), Sampling(max_tokens=4), "live")
    again = await engine.answer(query(), Sampling(max_tokens=4, top_k=3), "live")
    assert greedy.text == again.text
    assert len(again.candidates) <= 3
    seeded = [
        await engine.answer(query(), Sampling(max_tokens=4, temperature=1, seed=5), "live") for _ in range(2)
    ]
    assert seeded[0].text == seeded[1].text
    voted = await engine.answer(query(), Sampling(n=16, max_tokens=3, temperature=1.0, seed=1), "live")
    assert voted.votes is not None
    assert voted.confidence == pytest.approx(max(voted.votes.values()))


async def test_a_promoted_version_is_swapped_in_and_stamped(
    engine: Engine, policy: Policy, store: AdapterStore
) -> None:
    swaps: list[Swap] = []
    engine.on_swap = swaps.append
    before = await engine.answer(query(labels=LABELS), Sampling(top_k=3), "live")
    version = publish(policy, store, seed=1)
    store.promote(version)
    async with asyncio.timeout(10):
        while engine.serving != version:
            await asyncio.sleep(0.01)
    await asyncio.gather(engine.refresh(), engine.refresh())
    assert [(swap.version, swap.previous, swap.refused) for swap in swaps] == [(version, 0, None)]
    assert swaps[0].seconds > 0
    after = await engine.answer(query(labels=LABELS), Sampling(top_k=3), "live")
    base = await engine.answer(query(labels=LABELS), Sampling(top_k=3), "base")
    assert after.version == version
    assert after.digest == store.manifest(version).digest
    assert scores(after) != scores(before)
    assert scores(base) == scores(before)


async def test_swaps_tear_nothing(engine: Engine, policy: Policy, store: AdapterStore) -> None:
    """Every answer under a storm of swaps is exactly the one of the version that it names."""
    versions = [publish(policy, store, seed) for seed in range(5)]
    asked = query(labels=LABELS)
    expected = {}
    for version in [0, *versions]:
        choice = "base" if version == 0 else f"v{version:04d}"
        expected[version] = scores(await engine.answer(asked, Sampling(top_k=3), choice))

    async def swap() -> None:
        for turn in range(40):
            store.promote(versions[turn % len(versions)])
            await engine.refresh()
            await asyncio.sleep(0)

    async def ask() -> list[Outcome]:
        return [await engine.answer(asked, Sampling(top_k=3), "live") for _ in range(60)]

    _, *asked_by = await asyncio.gather(swap(), ask(), ask())
    outcomes = [outcome for outcomes in asked_by for outcome in outcomes]
    assert len({outcome.version for outcome in outcomes}) > 1
    for outcome in outcomes:
        # Answered in a batch or alone, sums are added up in another order.
        assert scores(outcome) == pytest.approx(expected[outcome.version], abs=1e-5)
    resident, leases = engine.residency()
    assert len(resident) <= 1 + len(SLOTS)
    assert leases == {}


async def test_a_version_with_the_wrong_probe_is_not_served(
    engine: Engine, policy: Policy, store: AdapterStore
) -> None:
    swaps: list[Swap] = []
    engine.on_swap = swaps.append
    version = publish(policy, store, seed=1, probe=tuple([9.0] * 32))
    store.promote(version)
    assert await engine.refresh() == 0
    assert [(swap.version, swap.previous, swap.refused) for swap in swaps] == [(version, 0, "CorruptVersion")]
    assert (await engine.answer(query(labels=LABELS), Sampling(), "live")).version == 0


async def test_flipped_bits_are_not_served(engine: Engine, policy: Policy, store: AdapterStore) -> None:
    version = publish(policy, store, seed=1)
    store.promote(version)
    path = store.folder / f"v{version:04d}" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert await engine.refresh() == 0


async def test_a_version_that_cannot_answer_is_found_out_once(
    engine: Engine, policy: Policy, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not there, not what it says, no memory for it, no slot: each is a no, and no request fails by it."""
    assert not await engine.can_answer("candidate")
    good, bad, heavy = (
        publish(policy, store, 1),
        publish(policy, store, 2, probe=(9.0,) * 32),
        publish(policy, store, 3),
    )
    assert await engine.can_answer(version_name(good))
    loads: list[int] = []
    load = engine.stage.load

    async def counted(store: AdapterStore, version: int) -> Resident:
        loads.append(version)
        if version == heavy:
            raise RuntimeError("out of memory")
        return await load(store, version)

    monkeypatch.setattr(engine.stage, "load", counted)
    for version in (bad, heavy):
        assert [await engine.can_answer(version_name(version)) for _ in range(3)] == [False] * 3
    assert loads == [bad, heavy], "tried once each"

    async def full(store: AdapterStore, version: int) -> Resident:
        raise QueueFull

    monkeypatch.setattr(engine.stage, "load", full)
    assert not await engine.can_answer(version_name(good))
    monkeypatch.undo()
    assert await engine.can_answer(version_name(good)), "a slot may be free the next time"


async def test_unknown_versions_and_a_full_queue(engine: Engine) -> None:
    with pytest.raises(UnknownVersion):
        await engine.answer(query(), Sampling(), "v0042")
    calls = [engine.answer(query(), Sampling(max_tokens=2), "live") for _ in range(12)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert any(isinstance(result, QueueFull) for result in results)
    assert any(isinstance(result, Outcome) for result in results)
    assert engine.residency()[1] == {}


async def test_a_cancelled_caller_leaves_no_lease(engine: Engine) -> None:
    task = asyncio.create_task(engine.answer(query(), Sampling(max_tokens=4), "live"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await engine.ping()
    await asyncio.sleep(0.05)
    assert engine.residency()[1] == {}
    assert (await engine.answer(query(), Sampling(max_tokens=2), "live")).version == 0


async def test_a_generation_that_nobody_waits_for_ends(engine: Engine) -> None:
    endless = Sampling(n=1, max_tokens=1024, temperature=0.0, top_k=200, seed=0)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(engine.answer(query(), endless, "base"), 0.3)
    async with asyncio.timeout(10):
        await engine.ping()  # the thread is free again


async def test_stopping_does_not_wait_for_a_long_generation(engine: Engine) -> None:
    endless = Sampling(n=1, max_tokens=1024, temperature=0.0, top_k=200, seed=0)
    asking = asyncio.create_task(engine.answer(query(), endless, "base"))
    await asyncio.sleep(0.2)
    async with asyncio.timeout(10):
        engine.stop()
        await engine.stage.stop()
    with pytest.raises(Stopped):
        await asking


async def test_more_candidates_than_tokens_are_no_error(engine: Engine) -> None:
    outcome = await engine.answer(
        query(), Sampling(n=1, max_tokens=1, temperature=0.0, top_k=1000, seed=0), "base"
    )
    assert outcome.candidates


async def test_the_engine_knows_how_long_a_queue_takes(engine: Engine) -> None:
    assert engine.wait_s(7) == 0
    answers = [await engine.answer(query(n), Sampling(max_tokens=3), "live") for n in range(8)]
    times = sorted(one.inference_s for one in answers)
    assert 0.5 * times[0] <= engine.wait_s(1) <= 2 * times[-1]
    assert engine.wait_s(7) == pytest.approx(7 * engine.wait_s(1))


def test_the_pace_of_late_counts_most(policy: Policy) -> None:
    answering = Answering(policy)
    answering._note(4.0, 2)
    assert answering.pace_s == 2.0
    for _ in range(50):
        answering._note(1.0, 4)
    assert answering.pace_s == pytest.approx(0.25, rel=1e-6)


async def test_scores_do_not_depend_on_the_temperature_that_was_drawn_at(engine: Engine) -> None:
    cold = Sampling(n=1, max_tokens=3, temperature=0.0, top_k=1, seed=0)
    cool = Sampling(n=1, max_tokens=3, temperature=0.01, top_k=1, seed=0)
    one, other = [await engine.answer(query(), sampling, "base") for sampling in (cold, cool)]
    assert one.text == other.text
    assert one.confidence == pytest.approx(other.confidence)


async def test_nothing_about_a_new_version_ends_the_watch(
    engine: Engine, policy: Policy, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(engine.stage, "_load", run_out)
    store.promote(publish(policy, store, 1))
    await asyncio.sleep(0.2)
    assert engine.ready()
    assert (await engine.answer(query(), Sampling(), "live")).version == 0
    monkeypatch.undo()
    store.promote(publish(policy, store, 2))
    async with asyncio.timeout(10):
        while engine.serving != 2:
            await asyncio.sleep(0.02)


# --- looking again, with a deadline ------------------------------------------------------------------


def soon(seconds: float = 60.0) -> float:
    return asyncio.get_running_loop().time() + seconds


async def test_all_views_of_a_choice_are_pooled(engine: Engine) -> None:
    plain = await engine.answer(query(labels=LABELS), Sampling(top_k=3), "live")
    looked = await engine.answer(query(labels=LABELS), Sampling(top_k=2), "live", soon())
    again = await engine.answer(query(labels=LABELS), Sampling(top_k=2), "live", soon())
    assert (looked.views, looked.rollouts, plain.views) == (len(safe_views("what is this?")), 0, 1)
    assert len(looked.candidates) == 2
    assert (looked.text, looked.confidence) == looked.candidates[0]
    assert scores(looked) == pytest.approx(scores(again)), "the same question has the same answer"
    assert looked.confidence != plain.confidence
    assert (looked.label_mass, looked.alias) == (plain.label_mass, "live")


async def test_answers_to_an_open_question_are_drawn_and_pooled(engine: Engine) -> None:
    looked = await engine.answer(query(2), Sampling(max_tokens=40, top_k=3), "live", soon())
    assert looked.rollouts == NUM_ROLLOUTS
    assert looked.views > 1
    assert looked.finish_reason == "stop"
    assert looked.candidates[0] == (looked.text, looked.confidence)
    voted = await engine.answer(query(), Sampling(n=9, max_tokens=2, temperature=1.0, seed=1), "live", soon())
    assert voted.rollouts == 9
    assert voted.votes


@pytest.mark.parametrize("asked", [query(labels=LABELS), query()])
async def test_a_deadline_that_is_too_short_gives_the_plain_answer(engine: Engine, asked: Query) -> None:
    plain = await engine.answer(asked, Sampling(max_tokens=3, top_k=2), "live")
    hurried = await engine.answer(asked, Sampling(max_tokens=3, top_k=2), "live", soon(-1))
    assert (hurried.text, hurried.candidates, hurried.views) == (plain.text, plain.candidates, 1)
    assert (hurried.confidence, hurried.rollouts, hurried.output_tokens) == (
        plain.confidence,
        0,
        plain.output_tokens,
    )


async def test_a_look_that_would_end_too_late_is_not_begun(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every look takes 10 s of a clock that only looks move."""
    clock = [0.0]
    take = Looks.take

    def slow(self: Looks, *given: Any) -> Look:
        clock[0] += 10.0
        return take(self, *given)

    monkeypatch.setattr(Looks, "take", slow)
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: clock[0])
    looked = await engine.answer(query(labels=LABELS), Sampling(), "live", 25.0)
    monkeypatch.undo()
    assert looked.views == 3
    assert clock == [20.0]


async def test_a_look_that_waits_too_long_is_given_up(engine: Engine) -> None:
    free = threading.Event()
    first = asyncio.create_task(engine.answer(query(labels=LABELS), Sampling(), "live", soon(0.5)))
    while not engine.residency()[1]:
        await asyncio.sleep(0)
    blocked = engine.stage._thread.submit(free.wait, 30.0)
    try:
        assert (await asyncio.wait_for(first, 20)).views < len(safe_views("what is this?"))
    finally:
        free.set()
    await asyncio.wrap_future(blocked)
    await engine.ping()
    await asyncio.sleep(0.05)
    assert engine.residency()[1] == {}


async def test_others_are_answered_between_two_looks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    take, choose = Looks.take, Answering._choose

    def looking(self: Looks, *given: Any) -> Look:
        order.append("look")
        return take(self, *given)

    def answering(self: Engine, *given: Any) -> Any:
        order.append("answer")
        return choose(self, *given)

    monkeypatch.setattr(Looks, "take", looking)
    monkeypatch.setattr(Answering, "_choose", answering)
    greedy = asyncio.create_task(engine.answer(query(labels=LABELS), Sampling(), "live", soon()))
    for number in range(5):
        await engine.answer(query(number, labels=LABELS), Sampling(), "live")
    assert not greedy.done()
    assert max(len(run) for run in " ".join(order).split("answer")) <= len(" look look ")
    assert (await greedy).views > 2


async def test_a_failing_look_leaves_the_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError

    plain = await engine.answer(query(labels=LABELS), Sampling(), "live")
    monkeypatch.setattr(Looks, "take", fail)
    failed = await engine.answer(query(labels=LABELS), Sampling(), "live", soon())
    assert (failed.text, failed.views) == (plain.text, 1)


async def test_a_full_queue_ends_the_looking(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    full = engine.stage._settings.model_copy(update={"queue_size": 0})
    take = Looks.take

    def then_full(self: Looks, *given: Any) -> Look:
        monkeypatch.setattr(engine.stage, "_settings", full)
        return take(self, *given)

    monkeypatch.setattr(Looks, "take", then_full)
    assert (await engine.answer(query(labels=LABELS), Sampling(), "live", soon())).views == 2


async def test_live_is_the_same_to_the_bit_afterwards(engine: Engine, policy: Policy, store: AdapterStore) -> None:
    store.promote(publish(policy, store, seed=1))
    version = await engine.refresh()
    before = {slot: policy.weights(slot) for slot in SLOTS}
    plain = await engine.answer(query(labels=LABELS), Sampling(top_k=3), "live")
    looked = await engine.answer(query(labels=LABELS), Sampling(top_k=3), "live", soon())
    base = await engine.answer(query(labels=LABELS), Sampling(top_k=3), "base", soon())
    assert (looked.version, base.version) == (version, 0)
    assert scores(looked) != scores(base)
    assert scores(await engine.answer(query(labels=LABELS), Sampling(top_k=3), "live")) == scores(plain)
    for slot, weights in before.items():
        assert all(torch.equal(weights[key], value) for key, value in policy.weights(slot).items())
    assert store.live().version == version
    assert engine.residency()[1] == {}


@pytest.mark.parametrize(
    ("model", "device", "amx", "dtype", "expected"),
    [
        ("nano", "cpu", True, "auto", "float32"),
        ("a/b", "cpu", True, "auto", "bfloat16"),
        ("a/b", "cpu", False, "auto", "float32"),
        ("a/b", "cuda:0", False, "auto", "bfloat16"),
        ("nano", "cpu", False, "bfloat16", "bfloat16"),
    ],
)
def test_the_dtype_is_what_the_hardware_is_faster_in(
    monkeypatch: pytest.MonkeyPatch, model: str, device: str, amx: bool, dtype: str, expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    chosen = Settings.model_validate({"model": model, "dtype": dtype})
    assert _dtype(chosen, device) == expected


# --- many at once ------------------------------------------------------------------------------------


@pytest.fixture
async def roomy(policy: Policy, store: AdapterStore, tmp_path: Path) -> AsyncIterator[Engine]:
    made = engine_on(policy, store, Settings(home=tmp_path, swap_poll_s=60, queue_size=256))
    await made.start()
    yield made
    made.stop()
    await made.stage.stop()


@contextmanager
def held(engine: Engine) -> Iterator[None]:
    """The engine's thread does nothing meanwhile, so that requests gather."""
    free = threading.Event()
    engine.stage._thread.submit(free.wait)
    try:
        yield
    finally:
        free.set()


def plain(outcome: Outcome) -> tuple[object, ...]:
    return outcome.text, outcome.finish_reason, outcome.version, outcome.input_tokens, outcome.output_tokens


async def test_what_waits_is_answered_together_and_as_if_alone(
    roomy: Engine, policy: Policy, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Questions, choices, votes and two versions, all at once."""
    version = version_name(publish(policy, store, 1))
    many = tuple(f"{one} {two}" for one in ("red", "green", "blue", "yes", "no") for two in LABELS * 7)[:30]
    asked = [
        (query(seed, labels, question), sampling, choice)
        for seed, (labels, question, sampling) in enumerate(
            [
                ((), "what is this?", Sampling(max_tokens=6)),
                ((), "is it a cat or a dog?", Sampling(max_tokens=3)),
                (LABELS, "what is this?", Sampling(top_k=3)),
                (tuple(dict.fromkeys(many)), "which one?", Sampling(top_k=2)),
                ((), "what is this?", Sampling(n=8, max_tokens=3, temperature=1.0, seed=3)),
                ((), "what is this?", Sampling(max_tokens=4, top_k=3)),
            ]
            * 2
        )
        for choice in ("live", version)
    ]
    alone = [await roomy.answer(*each) for each in asked]
    turns = count_turns(monkeypatch)
    before = roomy.batches
    with held(roomy):
        waiting = [asyncio.create_task(roomy.answer(*each)) for each in asked]
        await asyncio.sleep(0.2)
        assert roomy.waiting == 24
    together = await asyncio.gather(*waiting)
    assert turns == [24], "one turn for both versions"
    assert (before, roomy.batches) == ({1: 24}, {1: 24, 24: 1})
    for one, other in zip(alone, together, strict=True):
        assert plain(one) == plain(other)
        assert scores(one) == pytest.approx(scores(other), abs=1e-4)


async def test_an_image_that_the_model_refuses_fails_alone(roomy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = roomy.stage.policy.family.prompt

    def refuse(images: Any, question: str) -> Any:
        if question == "bad":
            raise UnusableImage("too thin")
        return prompt(images, question)

    monkeypatch.setattr(roomy.stage.policy.family, "prompt", refuse)
    with held(roomy):
        waiting = [
            asyncio.create_task(roomy.answer(query(seed, question=question), Sampling(max_tokens=2), "live"))
            for seed, question in enumerate(("what?", "bad", "which?"))
        ]
        await asyncio.sleep(0.1)
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(each) for each in found] == [Outcome, UnusableImage, Outcome]
    assert roomy.residency()[1] == {}


async def test_a_short_question_does_not_wait_for_a_long_answer(
    roomy: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes while an answer grows is answered in between."""
    monkeypatch.setattr(roomy.stage.policy.family, "end_tokens", frozenset())
    grown = threading.Event()
    drop = growth.Shoots.feed

    def feed(self: growth.Shoots, branches: Any) -> Any:
        grown.set()
        return drop(self, branches)

    monkeypatch.setattr(growth.Shoots, "feed", feed)
    long = asyncio.create_task(roomy.answer(query(0), Sampling(max_tokens=600), "live"))
    assert await asyncio.to_thread(grown.wait, 20)
    short = await roomy.answer(query(1), Sampling(max_tokens=LET_OTHERS_IN // 2), "live")
    assert not long.done()
    assert short.output_tokens == LET_OTHERS_IN // 2
    assert (await long).output_tokens == 600


async def test_who_leaves_a_batch_frees_its_place(roomy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roomy.stage.policy.family, "end_tokens", frozenset())
    with held(roomy):
        endless = asyncio.create_task(roomy.answer(query(0), Sampling(max_tokens=3000), "live"))
        short = asyncio.create_task(roomy.answer(query(1), Sampling(max_tokens=40), "live"))
        await asyncio.sleep(0.1)
    await asyncio.sleep(0.05)
    endless.cancel()
    assert (await short).output_tokens == 40
    async with asyncio.timeout(10):
        await roomy.ping()
    await asyncio.sleep(0.05)
    assert roomy.residency()[1] == {}


async def test_who_waits_when_the_engine_stops_is_told(roomy: Engine) -> None:
    with held(roomy):
        waiting = asyncio.create_task(roomy.answer(query(), Sampling(), "live"))
        await asyncio.sleep(0.1)
        stopping = asyncio.create_task(roomy.stage.stop())
        await asyncio.sleep(0.1)
    await stopping
    with pytest.raises((asyncio.CancelledError, Stopped)):
        await waiting


async def test_a_model_that_stands_still_holds_up_neither_erasing_nor_the_end(
    policy: Policy, store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_on(policy, store, Settings(home=tmp_path, request_timeout_s=0.05))
    await engine.start()
    goes_on, stands, forgotten = threading.Event(), threading.Event(), threading.Event()

    def stand_still() -> None:
        stands.set()
        goes_on.wait()

    monkeypatch.setattr("servetune.server.stage.STOP_S", 0.05)
    monkeypatch.setattr(policy, "forget_images", forgotten.set)
    engine.stage._thread.submit(stand_still)
    try:
        with pytest.raises(TimeoutError):
            await engine.forget([])
        goes_on.set()
        assert await asyncio.to_thread(forgotten.wait, 10), "late, but forgotten"
        goes_on.clear()
        stands.clear()
        engine.stage._thread.submit(stand_still)
        await asyncio.to_thread(stands.wait, 10)
        engine.stop()
        await engine.stage.stop()
        assert engine.stage.stands_still
    finally:
        goes_on.set()


def test_more_threads_are_used_only_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds by number of threads: two are worth it, four and eight hardly are."""
    took_s = {1: 1.0, 2: 0.6, 4: 0.55, 8: 0.5, 16: 0.2}
    chosen = {"threads": 0}
    tried = []

    def fastest_s(work: object, threads: int) -> float:
        tried.append(threads)
        return took_s[threads]

    monkeypatch.setattr(torch, "set_num_threads", lambda number: chosen.update(threads=number))
    monkeypatch.setattr("servetune.server.stage._fastest_s", fastest_s)
    assert [fewest_threads(lambda: None, most) for most in (1, 2, 4, 8)] == [1, 2, 2, 2]
    assert chosen == {"threads": 2}
    tried.clear()
    assert fewest_threads(lambda: None, 16) == 16
    assert tried == [16, 8], "fewer are not even tried"
