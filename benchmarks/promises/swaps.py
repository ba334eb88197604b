"""S: a swap shows in nothing but the version that an answer names, and nothing of another is ever served."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import torch

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
from servetune.adapters.types import Sampling
from servetune.adapters.versions import Draft
from servetune.server.engine import SLOTS, Engine, Outcome
from servetune.server.model import load_policy, open_store
from servetune.server.settings import Settings

VERSIONS = 4  # more than there are slots
NATS = 0.01  # batches of other sizes round differently
Parts = tuple[Engine, Policy, AdapterStore]


@asynccontextmanager
async def engine(trial: Trial, **settings: object) -> AsyncIterator[Parts]:
    """An engine on nano whose versions are swapped by hand."""
    chosen = Settings(home=trial.folder, serve_threads=1, swap_poll_s=3600, **settings)  # type: ignore[arg-type]
    policy = load_policy(chosen, SLOTS, 1)
    store = open_store(chosen, policy)
    made = Engine(policy, store, chosen)
    await made.start()
    try:
        yield made, policy, store
    finally:
        await made.stop()


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
    rounds, seconds = trial.times(2, 5), 4.0 if trial.short else 10.0

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
    warm_up, swaps = trial.times(100, 200), trial.times(500, 5000)

    async def measure() -> tuple[float, int, int]:
        async with engine(trial) as (made, policy, store):
            versions = [publish(policy, store, seed) for seed in range(VERSIONS)]
            await grow(made, store, versions, warm_up)
            files = _open_files()
            slope_kb = await grow(made, store, versions, swaps)
            return slope_kb, _open_files() - files, len(made.residency()[0]) - 1

    slope_kb, files, resident = asyncio.run(measure())
    figure = (
        f"{slope_kb:.2f} kB a swap over {swaps}, {files:+} open files, {resident} sets of weights beside the base"
    )
    return Found(slope_kb <= 2 and files <= 0 and resident <= len(SLOTS), figure)


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


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
                fresh = Engine(policy, store, Settings(home=trial.folder, prompt_cache_bytes=0, swap_poll_s=3600))
                await fresh.start()
                for number, one in enumerate(probes()):
                    cold[version, number] = await fresh.answer(one, GREEDY, f"v{version:04d}")
                await fresh.stop()
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
