"""What a point of accuracy costs: learning without labels, with labels, and looking eight times at every image.

`python -m benchmarks.learning [STREAM] [--seed 0]` splits a built-in stream by files and measures on the held-out
half, in one run on one machine:

- the default learner in the production worker, gate and store, as `servetune eval` runs it;
- supervised LoRA, the ceiling: the same adapter, optimizer, rate and batch, true answers as targets, no gate;
- the frozen model answering every question from eight views (`adapters.looks`).

Gains are fractions of the held-out questions. CPU seconds are this process's; those of learning leave scoring out.
Last line of stdout: JSON. `break_even` is the number of answers after which learning has cost less than eight
views each.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence

import torch

from servetune.adapters.answers import canonical
from servetune.adapters.looks import Looks
from servetune.adapters.policy import Policy
from servetune.adapters.step import LearnerConfig
from servetune.adapters.types import Sampling
from servetune.evals import protocol, streams
from servetune.evals.command import Model
from servetune.evals.data import Item, split_files

VIEWS = 8
EPOCHS = 6


def learn(model: Model, stream: str, seed: int) -> dict[str, float]:
    """The default learner: the figures of its evaluation, and CPU seconds without those of the scorer."""
    data = streams.load(stream)
    split = split_files(data, seed, None, True)
    settings = model.settings.model_copy(update={"seed": seed})
    runs = [
        protocol.run(model.policy, settings, split, (), model.scorer, learns=learns)
        for learns in (False, False, True)  # what the frozen model answers is scored in the first alone
    ]
    frozen, gained = runs[1].figures["heldout_frozen"], runs[2].figures["heldout_adapted"]
    return {"frozen": frozen, "gain": gained - frozen, "cpu_s": runs[2].cpu_s - runs[1].cpu_s}


def supervise(model: Model, items: Sequence[Item], heldout: Sequence[Item], seed: int) -> tuple[float, float]:
    """Accuracy and CPU seconds of LoRA on the true answers."""
    policy, config, rng = model.policy, LearnerConfig(), random.Random(seed)
    policy.load(protocol.LIVE, policy.zero_weights())
    policy.use(protocol.LIVE)
    began = time.process_time()
    parameters = policy.parameters(protocol.LIVE).values()
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    taught = [item for item in items if item.truth is not None]
    seen = {
        item.id: policy.keep(policy.observe(item.query(policy.family.recognition_question))) for item in taught
    }
    for _ in range(EPOCHS):
        rng.shuffle(taught)
        for start in range(0, len(taught), config.batch_size):
            batch = taught[start : start + config.batch_size]
            truths = [item.truth or "" for item in batch]
            answers = [[policy.family.tokens(truth)] for truth in truths]
            loss = -torch.stack(policy.score_each([seen[item.id] for item in batch], answers)).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
    spent = time.process_time() - began
    replies = [adapted for _, adapted in model.scorer.pairs(heldout, 1.0)]
    return sum(reply.right for reply in replies) / len(replies), spent


def look_once(model: Model, items: Sequence[Item]) -> float:
    """CPU seconds of one plain answer."""
    model.policy.load(protocol.LIVE, model.policy.zero_weights())
    model.scorer.pairs(items, 1.0)  # what the frozen model answers is kept, so that only one pass is left to time
    began = time.process_time()
    model.scorer.pairs(items, 1.0)
    return (time.process_time() - began) / len(items)


@torch.no_grad()
def look_often(policy: Policy, items: Sequence[Item], views: int, max_tokens: int) -> tuple[float, float]:
    """Accuracy of the frozen model from so many views, and CPU seconds of one answer."""
    policy.use(None)
    right, began = 0, time.process_time()
    for item in items:
        query = item.query(policy.family.recognition_question)
        shares = dict.fromkeys(query.labels, 1.0)
        if query.labels:
            found = policy.likely_labels([policy.observe(query)], query.labels)[0]
            shares = dict(zip(query.labels, found.exp().tolist(), strict=True))
        looks = Looks(query, Sampling(max_tokens=max_tokens), shares)
        while len(looks.found) < views and not looks.done:
            looks.found.append(looks.take(policy))
        answer = looks.ranked()[0][0] if len(looks.found[0].logprobs) else ""
        right += answer == item.truth if query.labels else canonical(answer) == canonical(item.truth or "")
    return right / len(items), (time.process_time() - began) / len(items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stream", nargs="?", default="fluent-emoji-flat", choices=sorted(streams.STREAMS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = Model.load("nano")
    split = split_files(streams.load(options.stream), options.seed, None, True)
    ours = learn(model, options.stream, options.seed)
    print("learned without labels", ours, flush=True)
    ceiling, ceiling_s = supervise(model, split.learn, split.heldout, options.seed)
    print("learned with labels", ceiling, ceiling_s, flush=True)
    max_tokens = model.settings.max_answer_tokens
    plain_s = look_once(model, split.heldout)
    often, often_s = look_often(model.policy, split.heldout, VIEWS, max_tokens)
    result = {
        "stream": options.stream,
        "queries": len(split.learn),
        "frozen": ours["frozen"],
        "gain": ours["gain"],
        "cpu_s": ours["cpu_s"],
        "points_per_cpu_minute": 6000 * ours["gain"] / ours["cpu_s"],
        "labels_gain": ceiling - ours["frozen"],
        "labels_cpu_s": ceiling_s,
        "labels_points_per_cpu_minute": 6000 * (ceiling - ours["frozen"]) / ceiling_s,
        "share_of_ceiling": ours["gain"] / (ceiling - ours["frozen"]),
        "views_gain": often - ours["frozen"],
        "views_cpu_s_per_answer": often_s,
        "plain_cpu_s_per_answer": plain_s,
        "break_even": ours["cpu_s"] / (often_s - plain_s),
    }
    print(
        json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()})
    )


if __name__ == "__main__":
    main()
