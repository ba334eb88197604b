"""Does the gate stop what is broken and let pass what is healthy? `python -m benchmarks.gate [--num 100]`

Healthy candidates come from the default learner on a stream of drawings that nano never saw, one per batch.
Sabotaged ones start from the same live adapter, a fifth each: trained to give one answer, trained on permuted
answers, one round at a hundred times the learning rate, noise added to the weights, a value that is not finite.

Last line of stdout: {"sabotaged": n, "stopped": n, "healthy": n, "refused": n, "missed": {...}}.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
import torch
from PIL import Image

from servetune.adapters.gate import Gate
from servetune.adapters.policy import Policy
from servetune.adapters.step import Learner, LearnerConfig
from servetune.adapters.types import Query
from servetune.server.model import load_policy
from servetune.server.settings import Settings

IMAGES = Path(__file__).parents[1] / "examples" / "images" / "fluent-emoji-flat"
BATCH = 16
LABELS = 100


class Stream:
    """Endless views of a hundred drawings, with all their names as labels."""

    def __init__(self, question: str, seed: int) -> None:
        self._rng = random.Random(seed)
        files = self._rng.sample(sorted(IMAGES.glob("*.png")), LABELS)
        self._images = [Image.open(path).convert("RGB") for path in files]
        self._labels = tuple(path.stem.replace("-", " ") for path in files)
        self._question = question
        self._count = 0

    def batch(self) -> list[Query]:
        """The next queries."""
        return [self._query() for _ in range(BATCH)]

    def _query(self) -> Query:
        self._count += 1
        image = self._rng.choice(self._images)
        image = image.rotate(self._rng.uniform(-12, 12), Image.Resampling.BICUBIC, fillcolor="white")
        return Query(f"q{self._count}", (image,), self._question, self._labels)


def train_towards(
    policy: Policy, queries: list[Query], wanted: Callable[[int], int], rate: float, steps: int
) -> None:
    """Plain gradient steps that make the candidate answer each query with a label of our choice."""
    policy.use("candidate")
    parameters = list(policy.parameters("candidate").values())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    observations = [policy.observe(query) for query in queries]
    tokens = [policy.family.tokens(label) for label in queries[0].labels]
    for _ in range(steps):
        picks = [[wanted(i), *random.Random(i).sample(range(len(tokens)), 7)] for i in range(len(queries))]
        scored = policy.score_each(observations, [[tokens[p] for p in each] for each in picks])
        loss = -torch.stack([logprobs.log_softmax(-1)[0] for logprobs in scored]).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def collapse(policy: Policy, queries: list[Query], rng: random.Random, learner: Learner) -> None:
    """One answer to everything."""
    label = rng.randrange(LABELS)
    train_towards(policy, queries, lambda index: label, rate=5e-3, steps=12)


def permute(policy: Policy, queries: list[Query], rng: random.Random, learner: Learner) -> None:
    """Each image gets a label that has nothing to do with it."""
    shuffled = rng.sample(range(LABELS), len(queries))
    train_towards(policy, queries, lambda index: shuffled[index], rate=5e-3, steps=12)


def add_noise(policy: Policy, queries: list[Query], rng: random.Random, learner: Learner) -> None:
    """Weights moved at random."""
    generator = torch.Generator().manual_seed(rng.getrandbits(31))
    with torch.no_grad():
        for parameter in policy.parameters("candidate").values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * rng.choice([0.1, 0.2, 0.4]))


def break_one(policy: Policy, queries: list[Query], rng: random.Random, learner: Learner) -> None:
    """One value that is not finite."""
    parameter = rng.choice(list(policy.parameters("candidate").values()))
    with torch.no_grad():
        parameter.view(-1)[rng.randrange(parameter.numel())] = rng.choice([float("nan"), float("inf")])


def rush(policy: Policy, queries: list[Query], rng: random.Random, learner: Learner) -> None:
    """One round of learning at a hundred times the rate."""
    rate = 100 * LearnerConfig().learning_rate
    hasty = Learner(policy, LearnerConfig(learning_rate=rate, average=0.0), seed=rng.getrandbits(16))
    for lesson in learner.memory.lessons():
        hasty.memory.add(replace(lesson.ballot, updates=0))
    hasty.forget([])
    hasty.step([])
    if not hasty.steps:
        raise RuntimeError("nothing to learn from: this would be no sabotage")


SABOTAGE = {
    "collapse": collapse,
    "permuted": permute,
    "rate x 100": rush,
    "noise": add_noise,
    "not finite": break_one,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=100, help="candidates of each sort")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    print(json.dumps(drill(options.num, options.seed)))


def drill(num: int, seed: int) -> dict[str, Any]:
    """As many candidates of either sort, judged; what became of each is printed."""
    settings = Settings()
    policy = load_policy(settings, ("candidate", "live"), settings.worker_threads)
    stream = Stream(policy.family.recognition_question, seed)
    learner, gate = Learner(policy, LearnerConfig(), seed=seed), Gate(policy)
    policy.load("live", policy.zero_weights())
    learner.load(policy.zero_weights(), {})
    rng, kinds = random.Random(seed), list(SABOTAGE)
    stopped: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for number in range(num):
        queries = stream.batch()
        learner.step(queries)
        gate.remember(queries)
        witnesses = learner.witnesses()
        learner.propose()
        verdict = gate.judge(witnesses)
        refused.update(reason.split()[0] for reason in verdict.reasons)
        refused["candidates"] += not verdict.accepted
        kept = policy.weights("candidate") if verdict.accepted else policy.weights("live")
        kind = kinds[number % len(kinds)]
        policy.load("candidate", policy.weights("live"))
        SABOTAGE[kind](policy, queries, rng, learner)
        sabotaged = gate.judge(witnesses)
        (missed if sabotaged.accepted else stopped)[kind] += 1
        policy.load("live", kept)
        policy.load("candidate", kept)
        if verdict.accepted:
            learner.proceed()
        else:
            learner.load(kept, {})
        print(number, "healthy", verdict.accepted, verdict.reasons, kind, sabotaged.reasons, flush=True)
    return {
        "sabotaged": num,
        "stopped": stopped.total(),
        "healthy": num,
        "refused": refused["candidates"],
        "missed": dict(missed),
        "refused_for": {reason: count for reason, count in refused.items() if reason != "candidates"},
    }


if __name__ == "__main__":
    main()
