"""Rollouts: what N answers to one query cost, and how that grows with N, with the prompt and with the labels.

    python -m benchmarks.rollout [--models mid nano] [--rounds 5] [--threads 1] [--vllm]

The peer is `generate(num_return_sequences=N)` of transformers on the same model, image and question, with as
many tokens for every answer, in the same process by turns; both sides see an image that they do not know.
Seconds are CPU seconds. With `--vllm`, vLLM is a peer too, in an environment of its own that the first call
installs: 32 answers to one request over HTTP, each image new, the two servers by turns, wall seconds.

Last line of stdout: JSON. `ratio_generate_short` and `ratio_generate_long` (32 answers of 5 and of 32 tokens;
peer / ours), `ratio_vllm_short` and `ratio_vllm_long` (the same against vLLM), `growth` (seconds of N answers of 5
tokens, N = 1..128), `doubling_32_64` (seconds for 64 over those for 32), `step_doubling_32_64` (the same for a
whole learning step), `prompt` (seconds by length of the prompt, 32 answers of 5 tokens), `labels` (seconds of a
whole cold request by number of labels) and `labels_1000_vs_10`; the first model has bare keys, another its name in
front.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import httpx2
import torch
from PIL import Image

from benchmarks.load import SIDES, pictures
from benchmarks.models import checkpoint
from benchmarks.servers import running
from benchmarks.step import QUESTION, SLOT, FullLength, load, picture
from servetune.adapters import growth, search
from servetune.adapters.policy import Policy
from servetune.adapters.step import LearnerConfig
from servetune.adapters.types import Query
from servetune.nano.data import read_labels

NUMBERS = (1, 2, 4, 8, 16, 32, 64, 128)
LABELS = (2, 10, 100, 1000)
TILES = ((448, 448), (896, 448), (1344, 448), (1344, 896), (2240, 896))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mid", "nano"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vllm", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {}
    for model in options.models:
        found = measure(load(model, "float32"), options.rounds)
        if options.vllm:
            found |= asyncio.run(against_vllm(model, options.rounds, options.threads))
        print(f"{model}: {json.dumps(found)}", flush=True)
        prefix = "" if model == options.models[0] else f"{model}_"
        result |= {prefix + key: value for key, value in found.items()}
    print(json.dumps(result))


@torch.no_grad()
def measure(policy: Policy, rounds: int) -> dict[str, Any]:
    """Everything about one model."""
    policy.warm()
    ends, _ = policy.family.end_tokens, policy.family.end_token
    policy.family.end_tokens = frozenset()  # every answer has the full length, on both sides
    policy.use(SLOT)
    image = picture((448, 448))
    found: dict[str, Any] = {}
    for name, length in (("short", 5), ("long", 32)):
        sides = {
            "ours": lambda: draw(policy, image, 32, length),  # noqa: B023  called before the next turn
            "peer": lambda: generate(policy, image, 32, length),  # noqa: B023
        }
        spent = by_turns(sides, rounds)
        found[f"ratio_generate_{name}"] = round(spent["peer"] / spent["ours"], 2)
    curve = by_turns({str(n): lambda n=n: draw(policy, image, n, 5) for n in NUMBERS}, rounds)
    found["growth"] = {name: round(value, 4) for name, value in curve.items()}
    found["doubling_32_64"] = round(curve["64"] / curve["32"], 3)
    steps = by_turns({str(n): stepping(policy, image, n) for n in (32, 64)}, rounds)
    found["step_doubling_32_64"] = round(steps["64"] / steps["32"], 3)
    prompts = {policy.family.prompt([picture(size)], QUESTION).length: picture(size) for size in TILES}
    found["prompt"] = {
        str(length): round(value, 4)
        for length, value in by_turns(
            {length: lambda one=one: draw(policy, one, 32, 5) for length, one in prompts.items()}, rounds
        ).items()
    }
    policy.family.end_tokens = ends
    labels = names(max(LABELS))
    recognise(policy, image, labels)  # so that their tokens are known
    counts = by_turns({str(n): lambda n=n: recognise(policy, image, labels[:n]) for n in LABELS}, rounds)
    found["labels"] = {name: round(value, 4) for name, value in counts.items()}
    found["labels_1000_vs_10"] = round(counts["1000"] / counts["10"], 2)
    return found


def by_turns(sides: dict[Any, Callable[[], object]], rounds: int) -> dict[Any, float]:
    """Median CPU seconds of each, after a round to warm up."""
    spent: dict[Any, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, work in sides.items():
            began = time.process_time()
            work()
            if number:
                spent[name].append(time.process_time() - began)
    return {name: statistics.median(each) for name, each in spent.items()}


def draw(policy: Policy, image: Image.Image, num: int, length: int) -> None:
    """Our rollouts of one new query, from its pixels."""
    prefix = policy.begin(policy.observe(Query("bench", (image,), QUESTION)))
    growth.sample(policy.family, prefix, num, length)


def generate(policy: Policy, image: Image.Image, num: int, length: int) -> None:
    """The peer's."""
    prompt = policy.family.prompt([image], QUESTION)
    policy.family.model.generate(
        **prompt.inputs,
        do_sample=True,
        num_return_sequences=num,
        min_new_tokens=length,
        max_new_tokens=length,
        bad_words_ids=[[token] for token in policy.family.forbidden.tolist()],
        pad_token_id=policy.family.end_token,
    )


def stepping(policy: Policy, image: Image.Image, num: int) -> Callable[[], object]:
    """A whole learning step of so many rollouts."""
    learner = FullLength(
        policy, LearnerConfig.named("ttrv", num_rollouts=num, max_tokens=5, learning_rate=0.0), SLOT
    )

    def step() -> object:
        with torch.enable_grad():
            return learner.step([Query("bench", (image,), QUESTION)])

    return step


def recognise(policy: Policy, image: Image.Image, labels: list[str]) -> None:
    """A cold request among labels, as the server answers it."""
    prefix = policy.begin(policy.observe(Query("bench", (image,), QUESTION)))
    search.search(policy.family, prefix, [policy.family.tokens(label) for label in labels]).softmax(-1)


async def against_vllm(model: str, rounds: int, threads: int) -> dict[str, float]:
    """Median wall seconds of vLLM over ours for 32 answers to a new image, after a round to warm up."""
    images = pictures(SIDES[model])
    spent: dict[tuple[str, int], list[float]] = {}
    with (
        running("ours", checkpoint(model), threads, queue_wait_s=600) as ours,
        running("vllm", checkpoint(model), threads) as theirs,
    ):
        async with httpx2.AsyncClient(timeout=600) as http:
            for number in range(rounds + 1):
                for server, length in itertools.product((ours, theirs), (5, 32)):
                    body = server.ask(next(images), QUESTION, length) | {"n": 32, "temperature": 1.0}
                    began = time.perf_counter()
                    (await http.post(server.url, json=body)).raise_for_status()
                    if number:
                        spent.setdefault((server.name, length), []).append(time.perf_counter() - began)
    median = {key: statistics.median(each) for key, each in spent.items()}
    lengths = {"short": 5, "long": 32}
    return {
        f"ratio_vllm_{name}": round(median["vllm", length] / median["ours", length], 2)
        for name, length in lengths.items()
    }


def names(num: int) -> list[str]:
    """Labels of two words, from nano's list."""

    words = read_labels()
    rng = random.Random(0)
    found: dict[str, None] = dict.fromkeys(rng.sample(words, min(num // 4, len(words))))
    while len(found) < num:
        found[f"{rng.choice(words)} {rng.choice(words)}"] = None
    listed = list(found)
    rng.shuffle(listed)
    return listed


if __name__ == "__main__":
    main()
