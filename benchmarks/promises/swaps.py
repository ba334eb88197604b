"""S: a swap shows in nothing but the version that an answer names, and nothing of another is ever served."""

from __future__ import annotations

import asyncio
import math
import statistics
import threading
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from hypothesis.strategies import integers

from benchmarks.promises.rows import Found, Trial, promise
from benchmarks.swap import (
    GREEDY,
    check_that_versions_differ,
    grow,
    probes,
    publish,
    same,
    swap,
    swap_and_wait,
    swap_under_load,
    watched,
)
from servetune.adapters.policy import Policy
from servetune.adapters.store import AdapterStore
from servetune.adapters.types import BASE, Sampling
from servetune.adapters.versions import Draft
from servetune.server.engine import Engine, Outcome
from servetune.server.model import load_policy, open_store
from servetune.server.settings import Settings
from servetune.server.stage import SLOTS, Stage

VERSIONS = 4  # more than there are slots
NATS = 0.01  # batches of other sizes round differently
T = TypeVar("T")
Parts = tuple[Engine, Policy, AdapterStore]


@asynccontextmanager
async def engine(trial: Trial, **chosen: object) -> AsyncIterator[Parts]:
    """An engine on nano whose versions are swapped by hand."""
    whole = Settings(home=trial.folder, serve_threads=1, swap_poll_s=3600, **chosen)  # type: ignore[arg-type]
    policy = load_policy(whole, SLOTS, 1)
    store = open_store(whole, policy)
    made = Engine(Stage(policy, whole), store, whole)
    await made.start()
    try:
        yield made, policy, store
    finally:
        made.stop()
        await made.stage.stop()


@promise("S1", "a hot swap is invisible")
def swaps_are_invisible(trial: Trial) -> Found:
    """Eight clients ask fixed probes while `live` moves on and on; then every version is asked once more."""

    async def measure() -> Counter[str]:
        found: Counter[str] = Counter()
        async with engine(trial) as (made, policy, store):
            versions = [publish(policy, store, seed) for seed in range(VERSIONS)]
            expected = {v: [await made.answer(one, GREEDY, f"v{v:04d}") for one in probes()] for v in versions}
            check_that_versions_differ(expected)
            await swap_under_load(made, store, versions, expected, found, trial.times(60, 1000), 8)
            for version, answers in expected.items():  # and afterwards each is still what it was
                for one, before in zip(probes(), answers, strict=True):
                    after = await made.answer(one, GREEDY, f"v{version:04d}")
                    found["right" if same(after, before) else "mixed"] += 1
        return found

    found = asyncio.run(measure())
    good = found["failed"] + found["torn"] + found["mixed"] == 0 and found["right"] > 0
    return Found(
        good, f"{found['failed']} failed, {found['torn']} torn, {found['mixed']} mixed of {found.total()}"
    )


@promise("S2", "a generation has one version")
def one_version_per_generation(trial: Trial) -> Found:
    """Long answers while `live` moves after every few tokens; each is as likely as its version makes it alone."""

    async def measure() -> tuple[int, int, int]:
        mixed = total = swaps = 0
        async with engine(trial) as (made, policy, store):
            policy.family.end_tokens = frozenset()  # nothing ends before it is long enough to be mixed
            versions = [publish(policy, store, seed) for seed in range(VERSIONS)]
            long = Sampling(max_tokens=24)
            asked = [one for one in probes() if not one.labels]
            alone = {v: [_nats(await made.answer(one, long, f"v{v:04d}")) for one in asked] for v in versions}
            for number in range(len(asked)):
                known = sorted(alone[version][number] for version in versions)
                assert all(b - a > 4 * NATS for a, b in pairwise(known)), (
                    "versions answer alike: nothing could be told"
                )
            generations = trial.times(48, 2000)
            while total < generations:
                jobs = [asyncio.create_task(made.answer(one, long, "live")) for one in asked]
                while not all(job.done() for job in jobs):
                    swaps += 1
                    await swap(made, store, versions[swaps % len(versions)])
                for number, job in enumerate(jobs):
                    answer = job.result()
                    known = alone.get(answer.version, [_nats(answer)] * len(asked))  # the base, at the very first
                    mixed += abs(_nats(answer) - known[number]) > NATS
                total += len(jobs)
        return mixed, total, swaps

    mixed, total, swaps = asyncio.run(measure())
    return Found(mixed == 0 and swaps > total / 4, f"{mixed} of {total} mixed, {swaps} swaps")


def _nats(answer: Outcome) -> float:
    """How unlikely a whole answer is; every token's share of it depends on the weights."""
    return -math.log(answer.confidence or 1e-300)


@promise("S3", "swaps cost little", timed=True)
def swaps_cost_little(trial: Trial) -> Found:
    """A version a second against none, by turns; and how long a swap as such holds the engine's thread."""
    rounds, seconds = trial.times(3, 5), 8.0 if trial.short else 10.0

    async def measure() -> tuple[float, float]:
        async with engine(trial) as (made, policy, store):
            versions = [publish(policy, store, seed) for seed in range(VERSIONS)]
            await swap(made, store, versions[0])
            stalls, _ = watched(made)
            ratio = await swap_and_wait(made, store, versions, 8, rounds, seconds)
            return ratio, 1e3 * max(stalls, default=0.0)

    ratio, stall_ms = asyncio.run(measure())
    return Found(ratio <= 1.15 and stall_ms <= 10, f"p99 {ratio:.2f} times, longest stall {stall_ms:.2f} ms")


@promise("S4", "nothing grows with the number of swaps")
def nothing_grows(trial: Trial) -> Found:
    """Memory, open files and resident sets of weights over swap after swap, after some to warm up."""
    warm_up, swaps = trial.times(100, 200), trial.times(200, 1700)

    async def measure() -> tuple[float, int, int]:
        async with engine(trial) as (made, policy, store):
            versions = [publish(policy, store, seed) for seed in range(VERSIONS)]
            await grow(made, store, versions, warm_up)
            files = _open_files()
            # A leak is in all three; once in a while the allocator takes some more for good.
            slope_kb = statistics.median([await grow(made, store, versions, swaps) for _ in range(3)])
            return slope_kb, _open_files() - files, len(made.residency()[0]) - 1

    slope_kb, files, resident = asyncio.run(measure())
    figure = f"{slope_kb:.2f} kB a swap over 3 times {swaps}, {files:+} open files, "
    figure += f"{resident} sets of weights beside the base"
    return Found(slope_kb <= 2 and files <= 0 and resident <= len(SLOTS), figure)


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@promise("S5", "there is no deadlock, and the server serves what the store says")
def no_deadlock(trial: Trial) -> Found:
    """A random operator and random clients (a hypothesis state machine), with a watchdog on every act."""
    examples, length = trial.times(5, 200), 50
    rules = settings(max_examples=examples, stateful_step_count=length, deadline=None, database=None)
    rules = settings(rules, phases=[Phase.generate], suppress_health_check=list(HealthCheck), print_blob=False)
    with Stand.of(trial) as stand:

        @seed(trial.seed)
        class Operating(Operated):
            on = stand

        try:
            run_state_machine_as_test(Operating, settings=rules)
        except Exception:
            if not stand.stuck and not stand.wrong:
                raise
    figure = (
        f"{stand.stuck} watchdog hits, {len(stand.wrong)} disagreements in {stand.steps} steps {stand.wrong[:1]}"
    )
    return Found(not stand.stuck and not stand.wrong and stand.steps >= examples * length / 2, figure)


class Stand:
    """An engine on a loop and a thread of its own, and what its versions must answer."""

    def __init__(self, made: Parts, loop: asyncio.AbstractEventLoop, patience_s: float) -> None:
        self.engine, self._policy, self.store = made
        self._loop, self._patience_s = loop, patience_s
        self._settings = self.engine.stage._settings
        self.stuck = self.steps = 0
        self.wrong: list[str] = []
        self.labels = count()
        versions = [BASE, *(publish(self._policy, self.store, seed) for seed in range(VERSIONS))]
        self.kinds = {version: version for version in versions}  # whose weights a version has
        self.answers = {version: self.do(self.answer(f"v{version:04d}")) for version in versions}
        check_that_versions_differ({version: [answer] for version, answer in self.answers.items()})

    @classmethod
    @contextmanager
    def of(cls, trial: Trial) -> Iterator[Stand]:
        """One for a trial; what is stuck when it ends is left to the process."""
        loop, patience_s = asyncio.new_event_loop(), 5.0 if trial.broken else 30.0
        threading.Thread(target=loop.run_forever, daemon=True).start()
        parts = engine(trial)
        stand = cls(asyncio.run_coroutine_threadsafe(parts.__aenter__(), loop).result(), loop, patience_s)
        try:
            yield stand
        finally:
            with suppress(TimeoutError):
                stand.engine.stop()
                stand.do(stand.engine.stage.stop())
            loop.call_soon_threadsafe(loop.stop)

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Raises TimeoutError, and counts it, where the watchdog bites."""
        return self.end(self.start(work))

    def end(self, future: Future[T]) -> T:
        try:
            return future.result(self._patience_s)
        except TimeoutError:
            self.stuck += 1
            raise

    def expect(self, is_so: bool, text: str) -> None:
        if not is_so:
            self.wrong.append(text)
            raise AssertionError(text)

    async def answer(self, choice: str = "live", num: int = 1) -> Outcome:
        return await self.engine.answer(probes()[0], replace(GREEDY, n=num), choice)

    async def follow(self, version: int) -> None:
        """Until the engine serves it: where all slots are leased, that takes a while."""
        while await self.engine.refresh() != version:
            await asyncio.sleep(0.001)

    async def restart(self) -> None:
        self.engine.stop()
        await self.engine.stage.stop()
        self.engine = Engine(Stage(self._policy, self._settings), self.store, self._settings)
        await self.engine.start()

    def check(self, answer: Outcome) -> None:
        """It is what its version answers, whatever went on meanwhile."""
        expected = self.answers[self.kinds[answer.version]]
        self.expect(same(answer, expected), f"v{answer.version:04d} does not answer as it must")


class Operated(RuleBasedStateMachine):
    """What an operator and clients may do at any time; `live` and `last_good` are the model."""

    on: ClassVar[Stand]

    def __init__(self) -> None:
        super().__init__()
        self.running: list[Future[Outcome]] = []
        self.live, self.last_good = (self.on.store.aliases()[name] for name in ("live", "last-good"))

    @rule(number=integers(0, VERSIONS))
    def swap(self, number: int) -> None:
        self._moved(self.on.store.promote(list(self.on.kinds)[number]).version)

    @rule()
    def roll_back(self) -> None:
        self.live = self.on.store.rollback().version
        self.on.expect(self.live == self.last_good, "rollback goes to another version than the last good one")

    @rule()
    def reset(self) -> None:
        made = self.on.store.reset().version
        self.on.kinds[made] = BASE
        self._moved(made)

    @rule()
    def snapshot(self) -> None:
        made = self.on.store.snapshot(f"kept-{next(self.on.labels)}").version
        self.on.kinds[made] = self.on.kinds[self.live]

    @rule(num=integers(1, 16))
    def answer(self, num: int) -> None:
        made = self.on.do(self.on.answer(num=num))
        self.on.expect(made.version == self.live, "another version answers than is live")
        if num == 1:
            self.on.check(made)

    @rule(clients=integers(1, 4))
    def ask(self, clients: int) -> None:
        self.running += [self.on.start(self.on.answer()) for _ in range(clients)]

    @precondition(lambda self: self.running)
    @rule()
    def cancel(self) -> None:
        self.running.pop().cancel()

    @precondition(lambda self: self.running)
    @rule()
    def wait(self) -> None:
        while self.running:
            self.on.check(self.on.end(self.running.pop()))

    @rule()
    def restart(self) -> None:
        self.on.do(self.on.restart())
        while self.running:  # with an answer or without, everybody hears the end of it
            with suppress(CancelledError, RuntimeError):
                self.on.end(self.running.pop())

    @invariant()
    def they_agree(self) -> None:
        self.on.steps += 1
        aliases = self.on.store.aliases()
        self.on.expect(
            (aliases["live"], aliases["last-good"]) == (self.live, self.last_good), f"aliases {aliases}"
        )
        self.on.do(self.on.follow(self.live))

    def teardown(self) -> None:
        if not self.on.stuck and not self.on.wrong:
            self.wait()

    def _moved(self, version: int) -> None:
        if version != self.live:
            self.live, self.last_good = version, self.live


@promise("S6", "no cache is stale")
def no_cache_is_stale(trial: Trial) -> Found:
    """The same questions on the same images across swaps, against an engine that remembers nothing."""
    rounds = trial.times(4, 20)

    async def measure() -> tuple[int, int]:
        stale = total = 0
        async with engine(trial) as (made, policy, store):
            versions = [publish(policy, store, seed) for seed in range(VERSIONS)]
            cold = {}
            for version in versions:
                forgetful = Settings(home=trial.folder, prompt_cache_bytes=0, swap_poll_s=3600)
                fresh = Engine(Stage(policy, forgetful), store, forgetful)
                await fresh.start()
                for number, one in enumerate(probes()):
                    cold[version, number] = await fresh.answer(one, GREEDY, f"v{version:04d}")
                fresh.stop()
                await fresh.stage.stop()
            check_that_versions_differ({v: [cold[v, n] for n in range(len(probes()))] for v in versions})
            for turn in range(rounds):
                await swap(made, store, versions[turn % len(versions)])
                for number, one in enumerate(probes() * 2):
                    answer = await made.answer(one, GREEDY, "live")
                    stale += not same(answer, cold[answer.version, number % len(probes())])
                    total += 1
        return stale, total

    stale, total = asyncio.run(measure())
    return Found(stale == 0 and total > 0, f"{total - stale} of {total} as from a cold start")


@promise("S7", "a swap really happens")
def a_swap_really_happens(trial: Trial) -> Found:
    """Versions that are not what their maker probed, whole by their digests: none may be served."""

    async def measure() -> list[str]:
        served = []
        async with engine(trial) as (made, policy, store):
            good = publish(policy, store, 1)
            manifest, weights = store.manifest(good), store.weights(good)
            silent = {name: torch.zeros_like(value) for name, value in weights.items()}
            renamed = {name.replace("q_proj", "z_proj"): value for name, value in weights.items()}
            cut = {name: value for number, (name, value) in enumerate(weights.items()) if number % 5}
            for name, changed in {"zeroed": silent, "renamed": renamed, "cut": cut}.items():
                bad = store.publish(Draft(changed, "worker", 0, manifest.probe)).version
                store.promote(bad)
                if await made.refresh() == bad:
                    served.append(name)
            file = store.folder / f"v{good:04d}" / "adapter_model.safetensors"
            whole = file.read_bytes()
            file.write_bytes(whole[: len(whole) // 2])
            aliases = store._read_aliases()  # promote would not move to it
            aliases["aliases"]["live"], aliases["generation"] = good, aliases["generation"] + 1
            store._write_aliases(aliases)
            if await made.refresh() == good:
                served.append("truncated")
            file.write_bytes(whole)
            store.promote(good)
            if await made.refresh() != good:
                served.append("(the whole one is not served)")
            live, base = [await made.answer(probes()[0], GREEDY, choice) for choice in ("live", "base")]
            if same(live, base):
                served.append("(it answers as the base does)")
        return served

    served = asyncio.run(measure())
    return Found(not served, f"{4 - len(served)} of 4 caught {served}")
