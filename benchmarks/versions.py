"""Queries of several versions, answered together or version by version.

    python -m benchmarks.versions [--rounds 8]

Questions on distinct images wait for two versions of nano by turns, as where some are asked of `live` and some of
a candidate. Batches are made as in the server, with rows of both versions in one pass, and as they were
before that, a batch for each version. One thread; both sides by turns in each round.

Last line of stdout: JSON. `mixed_ratio_N` is the CPU time of answering N waiting questions version by version over
that of answering them together (median over rounds); `different` counts answers that are not the same.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from statistics import median

import torch

from benchmarks.models import checkpoint
from servetune.adapters.family import Family
from servetune.adapters.policy import LoraSpec, Policy
from servetune.adapters.types import Query, Sampling
from servetune.evals import streams
from servetune.server.answering import Answering, Job, Resident

VERSIONS = Resident(1, "first", "first"), Resident(2, "second", "second")
WAITING = (2, 4, 8, 16, 32)
CHANGE = 2e-3  # standard deviation of an adapter's B


class Apart(Policy):
    """A policy whose batches have one version each."""

    mixes = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    apart, together = map(policy, (Apart, Policy))
    queries = iter([item.query("") for item in streams.load("easy-vqa-noise").items[::4]] * options.rounds)
    figures, different = {}, 0
    for num in WAITING:
        spent: list[tuple[float, float]] = []
        for _ in range(options.rounds):
            asked = [next(queries) for _ in range(num)]
            (one_s, one), (other_s, other) = (answered(made, asked) for made in (apart, together))
            spent.append((one_s, other_s))
            different += sum(map(str.__ne__, one, other))
        apart_s, together_s = (median(side) for side in zip(*spent, strict=True))
        figures[f"mixed_ratio_{num}"] = round(apart_s / together_s, 3)
        print(
            f"{num} waiting: {1e3 * apart_s / num:.1f} ms an answer by version, {1e3 * together_s / num:.1f} mixed"
        )
    print(json.dumps({**figures, "different": different, "n": options.rounds * sum(WAITING)}))


def policy(kind: Callable[..., Policy]) -> Policy:
    """nano with two versions in slots, no answer cached."""
    slots = tuple(version.slot or "" for version in VERSIONS)
    made = kind(Family.load(str(checkpoint("nano"))), LoraSpec(), slots, cache_bytes=0)
    for seed, slot in enumerate(slots):
        weights, generator = made.zero_weights(), torch.Generator().manual_seed(seed)
        for name, value in weights.items():
            if ".lora_B." in name:
                value.normal_(std=CHANGE, generator=generator)
        made.load(slot, weights)
    made.warm()
    return made


def answered(made: Policy, asked: list[Query]) -> tuple[float, list[str]]:
    """CPU seconds of this process, and the answers; versions by turns."""
    answering = Answering(made)
    jobs = [
        Job(query, Sampling(), VERSIONS[number % 2], threading.Event(), Future())
        for number, query in enumerate(asked)
    ]
    for job in jobs:
        answering.add(job)
    began = time.process_time()
    while not all(job.found.done() for job in jobs):
        answering.turn()
    spent_s = time.process_time() - began
    return spent_s, [job.found.result().text or "" for job in jobs]


if __name__ == "__main__":
    main()
