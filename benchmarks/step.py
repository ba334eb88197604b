"""One GRPO step on one query: the token tree against what trainers do with transformers.

The peer samples with `generate(num_return_sequences=N)`, then forwards N copies of prompt and completion for the
policy, again for the reference, and goes back through all of them (the shape of TRL's GRPOTrainer step, without
its data loading). Both sides: same model, image, question, N, completion length, LoRA, rewards, KL and optimizer.
One thread, interleaved rounds, CPU seconds of the process; the gradients are compared on the same completions.

    python -m benchmarks.step [--model nano] [--rounds 5] [--num 32]

Keys: ratio_short, ratio_long (5 and 32 tokens; peer / ours, larger is better), grad_rel_diff, logp_max_diff.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from servetune.adapters import tree
from servetune.adapters.family import Family
from servetune.adapters.grpo import advantages, kl_penalty, policy_loss
from servetune.adapters.policy import LoraSpec, Policy
from servetune.adapters.types import Query
from servetune.nano import WEIGHTS

BETA = 0.04
SLOT = "candidate"


def main() -> None:
    options = _arguments()
    torch.set_num_threads(1)
    source = str(WEIGHTS) if options.model == "nano" else options.model
    policy = Policy(Family.load(source), LoraSpec(), (SLOT,))
    generator = torch.Generator().manual_seed(0)
    weights = policy.zero_weights()
    for key, value in weights.items():
        if ".lora_B." in key:  # otherwise policy and reference would be the same
            value.normal_(std=0.02, generator=generator)
    policy.load(SLOT, weights)
    query = Query("bench", (_picture(),), "what is the answer in this image?")
    result: dict[str, object] = {"model": Path(options.model).name, "num": options.num}
    for name, length in (("short", 5), ("long", 32)):
        result |= _compare(policy, query, options, name, length)
    result |= _exactness(policy, query, options.num)
    print(json.dumps(result))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num", type=int, default=32)
    return parser.parse_args()


def _picture() -> Image.Image:
    noise = torch.randint(0, 256, (96, 96, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def _compare(
    policy: Policy, query: Query, options: argparse.Namespace, name: str, length: int
) -> dict[str, object]:
    sides: dict[str, Callable[[], None]] = {
        "ours": lambda: _our_step(policy, query, options.num, length),
        "peer": lambda: _peer_step(policy, query, options.num, length),
    }
    spent: dict[str, list[float]] = {side: [] for side in sides}
    for round_number in range(options.rounds + 1):
        for side, step in sides.items():
            began = time.process_time()
            step()
            if round_number:  # the first warms up
                spent[side].append(time.process_time() - began)
    ratios = [peer / ours for ours, peer in zip(spent["ours"], spent["peer"], strict=True)]
    print(f"{name}: ours {statistics.median(spent['ours']):.3f} s, peer {statistics.median(spent['peer']):.3f} s")
    return {
        f"ratio_{name}": round(statistics.median(ratios), 2),
        f"cpu_s_{name}": round(statistics.median(spent["ours"]), 4),
        f"peer_cpu_s_{name}": round(statistics.median(spent["peer"]), 4),
    }


def _rewards(num: int) -> Tensor:
    return torch.rand(num, generator=torch.Generator().manual_seed(1))


def _loss(logprobs: Tensor, reference: Tensor, weights: Tensor) -> Tensor:
    mask = torch.full_like(logprobs, 1 / logprobs.shape[1])
    advantage = advantages(_rewards(len(logprobs)), weights, len(logprobs))
    return policy_loss(logprobs, logprobs.detach(), advantage, weights, mask) + BETA * kl_penalty(
        logprobs, reference, weights, mask
    )


def _finish(policy: Policy, loss: Tensor) -> None:
    parameters = list(policy.parameters(SLOT).values())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    torch.optim.AdamW(parameters, lr=0.0).step()
    for parameter in parameters:
        parameter.grad = None


def _our_step(policy: Policy, query: Query, num: int, length: int) -> None:
    family, ends = policy.family, policy.family.end_tokens
    family.end_tokens = frozenset()  # every completion has the full length, on both sides
    observation = policy.observe(query)
    with torch.no_grad():
        samples = tree.sample(family, policy.begin(observation), num, length)
    family.end_tokens = ends
    tokens = [sample.tokens for sample in samples]
    weights = torch.tensor([sample.count / num for sample in samples])
    logprobs, _ = tree.score(family, policy.begin(observation), tokens)
    with policy.reference():
        reference, _ = tree.score(family, policy.begin(observation), tokens)
    _finish(policy, _loss(logprobs, reference, weights))


def _peer_step(policy: Policy, query: Query, num: int, length: int) -> None:
    family = policy.family
    prompt = policy.family.prompt(query.images, query.question)
    with torch.no_grad():
        whole = family.model.generate(
            **prompt.inputs,
            do_sample=True,
            num_return_sequences=num,
            min_new_tokens=length,
            max_new_tokens=length,
            bad_words_ids=[[token] for token in family.forbidden.tolist()],
            pad_token_id=family.end_token,
        )
    completions = whole[:, prompt.length :]
    logprobs = _peer_logprobs(policy, prompt.inputs, completions)
    with policy.reference():
        reference = _peer_logprobs(policy, prompt.inputs, completions)
    _finish(policy, _loss(logprobs, reference, torch.full((num,), 1 / num)))


def _peer_logprobs(policy: Policy, prompt: dict[str, Tensor], completions: Tensor) -> Tensor:
    """N copies of everything, as a batch."""
    num, length = completions.shape
    inputs = {name: value.repeat_interleave(num, 0) for name, value in prompt.items()}
    inputs["input_ids"] = torch.cat([inputs["input_ids"], completions], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        kinds = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(num, length)], 1)
    logits = policy.family.model(**inputs, use_cache=False, logits_to_keep=length + 1).logits[:, :-1].float()
    logits = logits.index_fill(-1, policy.family.forbidden, float("-inf"))
    return logits.log_softmax(-1).gather(-1, completions[..., None])[..., 0]


def _exactness(policy: Policy, query: Query, num: int) -> dict[str, object]:
    """Both ways on the same completions: largest log-probability and relative gradient difference."""
    family = policy.family
    observation = policy.observe(query)
    vocabulary = family.model.config.get_text_config().vocab_size
    drawn = torch.randint(0, vocabulary, (num, 8), generator=torch.Generator().manual_seed(2))
    drawn[torch.isin(drawn, family.forbidden)] = family.end_token
    advantage = torch.randn(num, 1, generator=torch.Generator().manual_seed(3))
    found = []
    for side in ("ours", "peer"):
        if side == "ours":
            logprobs, _ = tree.score(family, policy.begin(observation), drawn.tolist())
        else:
            logprobs = _peer_logprobs(policy, family.prompt(query.images, query.question).inputs, drawn)
        (logprobs * advantage).mean().backward()
        parameters = policy.parameters(SLOT).values()
        gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        for parameter in parameters:
            parameter.grad = None
        found.append((logprobs.detach(), gradient))
    (ours, our_gradient), (theirs, their_gradient) = found
    return {
        "grad_rel_diff": float((our_gradient - their_gradient).norm() / their_gradient.norm()),
        "logp_max_diff": float((ours - theirs).abs().max()),
    }


if __name__ == "__main__":
    main()
