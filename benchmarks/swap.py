"""Swapping versions under load: is anything lost, torn or mixed, who waits for it, and does memory grow?

    python -m benchmarks.swap [--swaps 1000] [--more 5000] [--clients 8] [--model nano]

Eight clients ask the engine of a server about fixed probes (recognition and open questions) while `live` moves
among four versions as fast as it can: more than there are slots, so that every swap reads, verifies, loads and
probes one. What each version answers to each probe was written down before, with nothing else running.

Last line of stdout: JSON. `failed` answers raised an error; `mixed` ones are those of another version than they
say they are, `torn` ones are no version's. `max_stall_ms` is the longest time that a swap held the engine's
thread, or a request for a version that is loaded already; `max_load_ms` is what loading one took beside the
answers. `p99_ratio` is the p99 of answers about new pictures while versions are swapped once a second against
none, the median of three interleaved rounds each (a version in a second is many times what a learner makes).
`rss_slope_kb_per_swap` is by least squares over the second half of the last `more` swaps without clients.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import structlog
import torch
from PIL import Image

from benchmarks.models import checkpoint
from servetune.adapters.policy import Policy
from servetune.adapters.store import AdapterStore
from servetune.adapters.types import Query, Sampling
from servetune.adapters.versions import Draft
from servetune.server.engine import Engine, Outcome
from servetune.server.model import load_policy, open_store
from servetune.server.settings import Settings
from servetune.server.stage import SLOTS, Stage

NUM_VERSIONS = 4
LABELS = ("cat", "dog", "house", "airplane")
GREEDY = Sampling(max_tokens=4, top_k=4)
TOLERANCE = 5e-4  # batches of other sizes round differently; versions differ by far more, which is checked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--more", type=int, default=5000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--model", default="nano")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    with tempfile.TemporaryDirectory() as home:
        print(json.dumps(asyncio.run(measure(options, Path(home)))))


async def measure(options: argparse.Namespace, home: Path) -> dict[str, float]:
    name = options.model if options.model == "nano" else str(checkpoint(options.model))
    settings = Settings(home=home, model=name, swap_poll_s=3600)
    policy = load_policy(settings, SLOTS, settings.serve_threads)
    store = open_store(settings, policy)
    versions = [publish(policy, store, seed) for seed in range(NUM_VERSIONS)]
    engine = Engine(Stage(policy, settings), store, settings)
    stalls, loads = watched(engine)
    await engine.start()
    expected = {v: [await engine.answer(one, GREEDY, f"v{v:04d}") for one in probes()] for v in versions}
    check_that_versions_differ(expected)
    found: Counter[str] = Counter()
    stalls.clear()
    await swap_under_load(engine, store, versions, expected, found, options.swaps, options.clients)
    stalled, loaded = max(stalls, default=0.0), max(loads)
    ratio = await swap_and_wait(engine, store, versions, options.clients)
    slope = await grow(engine, store, versions, options.more)
    engine.stop()
    await engine.stage.stop()
    return {
        "failed": found["failed"],
        "torn": found["torn"],
        "mixed": found["mixed"],
        "max_stall_ms": round(1e3 * stalled, 3),
        "max_load_ms": round(1e3 * loaded, 1),
        "p99_ratio": round(ratio, 3),
        "rss_slope_kb_per_swap": round(slope, 3),
        "answers": found.total(),
        "swaps": options.swaps,
    }


def publish(policy: Policy, store: AdapterStore, seed: int) -> int:
    """A version with random weights."""
    weights = policy.zero_weights()
    generator = torch.Generator().manual_seed(seed)
    for key, value in weights.items():
        if ".lora_B." in key:
            value.normal_(std=0.05, generator=generator)
    policy.load(SLOTS[0], weights)
    policy.use(SLOTS[0])
    return store.publish(Draft(weights, "worker", 0, policy.probe())).version


def watched(engine: Engine) -> tuple[list[float], list[float]]:
    """Seconds that swaps hold the engine or a request for a loaded version, and what loading took."""
    stalls: list[float] = []
    loads: list[float] = []

    def timed(work: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return work(*args)
            finally:
                times.append(time.perf_counter() - began)

        return run

    load = engine.stage.load

    async def load_watched(store: AdapterStore, version: int) -> Any:
        known, began = (store.name, version) in engine.stage._resident, time.perf_counter()
        made = await load(store, version)
        if known:
            stalls.append(time.perf_counter() - began)
        return made

    engine.stage.load = load_watched  # type: ignore[method-assign]
    submit = engine.stage._thread.submit

    def submit_watched(work: Any, *args: Any) -> Any:
        if work == engine.stage.answering.turn:  # answers; anything else is not
            return submit(work, *args)
        return submit(timed(work, stalls), *args)

    engine.stage._thread.submit = submit_watched  # type: ignore[method-assign]
    engine.stage._load = timed(engine.stage._load, loads)  # type: ignore[method-assign]
    return stalls, loads


def probes() -> list[Query]:
    ramp = Image.linear_gradient("L").resize((96, 96))
    pictures = [ramp.rotate(90 * turn).convert("RGB") for turn in range(4)]
    closed = [Query(f"c{i}", (one,), "what is this?", LABELS) for i, one in enumerate(pictures)]
    return closed + [Query(f"o{i}", (one,), "what is this?") for i, one in enumerate(pictures)]


def same(one: Outcome, other: Outcome) -> bool:
    ours, theirs = dict(one.candidates), dict(other.candidates)
    return ours.keys() == theirs.keys() and all(abs(ours[key] - theirs[key]) <= TOLERANCE for key in ours)


def check_that_versions_differ(expected: dict[int, list[Outcome]]) -> None:
    for version, answers in expected.items():
        for other, others in expected.items():
            if version < other and any(map(same, answers, others)):
                raise SystemExit(f"versions {version} and {other} answer a probe alike: nothing could be told")


async def swap_under_load(
    engine: Engine,
    store: AdapterStore,
    versions: list[int],
    expected: dict[int, list[Outcome]],
    found: Counter[str],
    swaps: int,
    clients: int,
) -> None:
    done = asyncio.Event()
    asked = probes()

    async def client(number: int) -> None:
        turn = number
        while not done.is_set():
            place = turn % len(asked)
            turn += 1
            try:
                answer = await engine.answer(asked[place], GREEDY, "live")
            except Exception:
                found["failed"] += 1
                continue
            if same(answer, expected[answer.version][place]):
                found["right"] += 1
            elif any(same(answer, answers[place]) for answers in expected.values()):
                found["mixed"] += 1
            else:
                found["torn"] += 1

    await swap(engine, store, versions[-1])
    working = [asyncio.create_task(client(number)) for number in range(clients)]
    for turn in range(swaps):
        await swap(engine, store, versions[turn % len(versions)])
    done.set()
    await asyncio.gather(*working)


async def swap(engine: Engine, store: AdapterStore, version: int) -> None:
    """Let `live` name a version, and wait until it is served: where all slots are leased, that takes a while."""
    await asyncio.to_thread(store.promote, version)
    while await engine.refresh() != version:
        await asyncio.sleep(0.001)


async def swap_and_wait(
    engine: Engine, store: AdapterStore, versions: list[int], clients: int, rounds: int = 3, seconds: float = 5.0
) -> float:
    """p99 of answers about new pictures while a version a second is swapped, over that with none.

    Medians over interleaved rounds. The same pictures again would be answered from the cache, but for the first
    time after each swap.
    """
    p99s: dict[bool, list[float]] = {False: [], True: []}
    new = unseen()
    for turn in range(2 * rounds):
        swapping = bool(turn % 2)
        until, times = time.perf_counter() + seconds, list[float]()

        async def client(until: float, times: list[float]) -> None:
            while (began := time.perf_counter()) < until:
                await engine.answer(next(new), GREEDY, "live")
                times.append(time.perf_counter() - began)

        working = [asyncio.create_task(client(until, times)) for _ in range(clients)]
        number = turn
        while swapping and time.perf_counter() < until - 1:
            await asyncio.sleep(1)
            number += 1
            await swap(engine, store, versions[number % len(versions)])
        await asyncio.gather(*working)
        p99s[swapping].append(quantile(times))
    return statistics.median(p99s[True]) / statistics.median(p99s[False])


def unseen() -> Iterator[Query]:
    """Questions of both kinds about pictures of noise, no two alike."""
    rng = random.Random(0)
    for number in itertools.count():
        picture = Image.frombytes("RGB", (96, 96), rng.randbytes(96 * 96 * 3))
        yield Query(f"n{number}", (picture,), "what is this?", LABELS if number % 2 else ())


def quantile(times: list[float], share: float = 0.99) -> float:
    return sorted(times)[int(len(times) * share)]


async def grow(engine: Engine, store: AdapterStore, versions: list[int], swaps: int) -> float:
    """kB of resident memory that a swap leaves behind."""
    sizes = []
    for turn in range(swaps):
        await swap(engine, store, versions[turn % len(versions)])
        sizes.append(resident_kb())
    half = sizes[len(sizes) // 2 :]
    return statistics.linear_regression(range(len(half)), half).slope


def resident_kb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024


if __name__ == "__main__":
    main()
