"""One GRPO step: servetune's learner against TRL's GRPOTrainer, on the same checkpoint, image and question.

    python -m benchmarks.step [--models mid nano] [--cases long short paper bf16] [--threads 1] [--rounds 3]

Cases: `long` is 32 rollouts of 32 tokens, `short` 32 of 5, `paper` 32 of 5 after a prompt of 11 tiles (2,900
tokens; TRL accumulates over 4 batches of 8 then, it needs 40 GB otherwise), `bf16` is `long` in bfloat16 on
both sides. `mid` is described in `benchmarks/models.py`; nano takes `long` and `short`. TRL runs in an
environment of its own, which the first call installs. Every side is a process of its own; ours runs before
and after each peer's step. A step is everything from images and question to moved weights: processor, vision,
rollouts, rewards, reference, policy, backward, optimizer. All completions have the full length, LoRA sits on
the same layers with the same rank, KL coefficient 0.04, no image is known from before. Seconds are CPU
seconds of the process (wall seconds beside). With `--device cuda` they are wall seconds, the peer makes four
steps too, of which the first does not count, and memory is the GPU's; `--models 2b --cases bf16 paper_bf16` is a
model of real size.

Last line of stdout: JSON. Ratios are peer / ours, larger is better: `ratio_fp32_long`, `ratio_fp32_short`,
`ratio_paper_shape`, `ratio_bf16_long` (mid, first number of threads; others with a prefix or suffix) and
`peak_rss_ratio` (long). `grad_rel_diff` and `logp_max_diff` compare our gradient and log-probabilities with
those of N copies of prompt and image in one plain batch. `flop_utilisation` is the useful arithmetic of our
long step over what a float32 matrix product of 2048 x 2048 reaches in the same process and time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks import envs
from benchmarks.models import checkpoint
from servetune.adapters import tree
from servetune.adapters.family import Family, image_tokens
from servetune.adapters.policy import LoraSpec, Policy
from servetune.adapters.rollouts import Group
from servetune.adapters.step import Learner, LearnerConfig
from servetune.adapters.types import Query

QUESTION = "what is the answer in this image?"
NUM = 32
SLOT = "candidate"
PEER = Path(__file__).parent / "peers" / "trl_step.py"
CASES: dict[str, dict[str, Any]] = {
    "long": {"tokens": 32, "size": (448, 448), "dtype": "float32", "accumulate": 1},
    "short": {"tokens": 5, "size": (448, 448), "dtype": "float32", "accumulate": 1},
    "paper": {"tokens": 5, "size": (2240, 896), "dtype": "float32", "accumulate": 4},
    "bf16": {"tokens": 32, "size": (448, 448), "dtype": "bfloat16", "accumulate": 1},
    "paper_bf16": {"tokens": 5, "size": (2240, 896), "dtype": "bfloat16", "accumulate": 16},
}
KEYS = {
    "long": "ratio_fp32_long",
    "short": "ratio_fp32_short",
    "paper": "ratio_paper_shape",
    "bf16": "ratio_bf16_long",
    "paper_bf16": "ratio_bf16_paper_shape",
}


class FullLength(Learner):
    """The published learner, where every answer counts although none comes to an end."""

    def _teaches(self, group: Group) -> bool:
        return True

    def _rewards(self, group: Group) -> list[float]:
        texts = [self.policy.family.text(tokens) for tokens in group.rollouts.tokens]
        return [(t.count("a") - 0.1 * sum(c.isdigit() for c in t)) / (len(t) + 1) for t in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mid", "nano"])
    parser.add_argument("--cases", nargs="+", default=[*CASES][:4], choices=[*CASES])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        chosen = options.models[0], options.cases[0], options.threads[0], options.rounds, options.device
        print(json.dumps(run_ours(*chosen)))
        return
    result: dict[str, Any] = {}
    for model in options.models:
        for case in options.cases:
            if model == "nano" and case not in ("long", "short"):
                continue
            for threads in options.threads:
                prefix = "" if model == options.models[0] else f"{model}_"
                suffix = "" if threads == options.threads[0] else f"_{threads}_threads"
                found = compare(model, case, threads, options.rounds, options.device)
                print(f"{model} {case}, {threads} threads: {json.dumps(found)}", flush=True)
                result[prefix + KEYS[case] + suffix] = found["ratio"]
                for side in ("ours", "peer"):
                    for clock in ("cpu_s", "wall_s"):
                        result[f"{prefix}{case}_{side}_{clock}{suffix}"] = found[side][clock]
                if case == options.cases[0] and not prefix + suffix:
                    result["peak_rss_ratio"] = round(found["peer"]["peak_rss"] / found["ours"]["peak_rss"], 2)
                if case == "long" and options.device == "cpu" and not prefix + suffix:
                    result["flop_utilisation"] = found["ours"]["flop_utilisation"]
    result |= exactness(options.models[0], options.device)
    print(json.dumps(result))


def compare(model: str, case: str, threads: int, rounds: int, device: str) -> dict[str, Any]:
    """One peer step (on a GPU the median of three) between two calls of ours, each of `rounds` steps."""
    ours = [_call_ours(model, case, threads, rounds, device)]
    peer = _call_peer(model, case, threads, device)
    ours.append(_call_ours(model, case, threads, rounds, device))
    both = {key: round(statistics.fmean(one[key] for one in ours), 4) for key in ours[0]}
    clock = "cpu_s" if device == "cpu" else "wall_s"
    return {"ratio": round(peer[clock] / both[clock], 2), "ours": both, "peer": peer}


def _call_ours(model: str, case: str, threads: int, rounds: int, device: str) -> dict[str, float]:
    chosen = ["--models", model, "--cases", case, "--threads", str(threads), "--rounds", str(rounds)]
    command = [sys.executable, "-m", "benchmarks.step", "--ours", "--device", device, *chosen]
    return _json_lines(command, threads)[-1]


def _call_peer(model: str, case: str, threads: int, device: str) -> dict[str, float]:
    what = CASES[case]
    image = Path(".cache/models") / f"noise-{what['size'][0]}x{what['size'][1]}.png"
    picture(what["size"]).save(image)
    chosen = {
        "model": checkpoint(model),
        "image": image,
        "question": QUESTION,
        "tokens": what["tokens"],
        "num": NUM,
        "accumulate": what["accumulate"],
        "dtype": what["dtype"],
        "threads": threads,
        "device": device,
        "steps": 1 if device == "cpu" else 4,
    }
    flags = [text for name, value in chosen.items() for text in (f"--{name}", str(value))]
    steps = _json_lines([str(envs.python("trl")), str(PEER), *flags], threads)
    counted = steps[1:] or steps
    return {key: statistics.median(step[key] for step in counted) for key in counted[0]}


def _json_lines(command: list[str], threads: int) -> list[dict[str, float]]:
    done = subprocess.run(
        command, text=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)}
    )
    lines = [line for line in done.stdout.replace("\r", "\n").splitlines() if '{"' in line]
    if done.returncode or not lines:
        raise SystemExit(f"{command} failed:\n{done.stderr[-3000:]}")
    return [json.loads(line[line.index('{"') : line.rindex("}") + 1]) for line in lines]


def picture(size: tuple[int, int]) -> Image.Image:
    """Noise, the same for both sides."""
    generator = torch.Generator().manual_seed(0)
    return Image.fromarray(
        torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8).numpy()
    )


# --- our side ----------------------------------------------------------------------------------------


def load(model: str, dtype: str, device: str = "cpu") -> Policy:
    """A policy whose adapter differs from its reference, without a memory of images."""
    family = Family.load(str(checkpoint(model)), device, getattr(torch, dtype))
    policy = Policy(family, LoraSpec(), (SLOT,), 0)
    weights = policy.zero_weights()
    generator = torch.Generator().manual_seed(0)
    for key, value in weights.items():
        if ".lora_B." in key:
            value.normal_(std=0.02, generator=generator)
    policy.load(SLOT, weights)
    return policy


def run_ours(model: str, case: str, threads: int, rounds: int, device: str) -> dict[str, float]:
    """Medians over the steps after the first."""
    torch.set_num_threads(threads)
    what = CASES[case]
    policy = load(model, what["dtype"], device)
    policy.family.end_tokens = frozenset()
    learner = FullLength(policy, LearnerConfig.named("ttrv", num_rollouts=NUM, max_tokens=what["tokens"]), SLOT)
    query = Query("bench", (picture(what["size"]),), QUESTION)
    spent = []
    for _ in range(rounds + 1):
        began = time.process_time(), time.perf_counter()
        learner.step([query])
        if device != "cpu":
            torch.cuda.synchronize()
        spent.append((time.process_time() - began[0], time.perf_counter() - began[1]))
    cpu, wall = (statistics.median(clock) for clock in zip(*spent[1:], strict=True))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = resident if device == "cpu" else torch.cuda.max_memory_allocated()
    made = {"cpu_s": cpu, "wall_s": wall, "peak_rss": peak}
    if case == "long" and device == "cpu":
        made["flop_utilisation"] = useful_flops(policy, query, what["tokens"]) / cpu / gemm_rate()
    return made


def gemm_rate(size: int = 2048, times: int = 5) -> float:
    """Floating-point operations per CPU second of a square float32 matrix product."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    left @ right
    began = time.process_time()
    for _ in range(times):
        left @ right
    return times * 2 * size**3 / (time.process_time() - began)


def useful_flops(policy: Policy, query: Query, length: int) -> float:
    """Arithmetic that one step cannot do without: each image, prompt and completion token once per phase.

    A linear layer of n weights takes 2n a token; causal attention between a query and k keys takes 4 k d, d
    being the heads' width together. Phases: vision once; prompt for policy and reference; completions (all N)
    for sampling, policy and reference; and back through prompt and completions, where the frozen weights have
    no gradient of their own, so that it costs what the way forward does.
    """
    family = policy.family
    observation = policy.observe(query)
    text = family.model.config.get_text_config()
    width, layers, prompt = int(text.hidden_size), int(text.num_hidden_layers), observation.prompt.length
    decoder = sum(p.numel() for n, p in family.model.get_decoder().named_parameters() if _is_linear(n))
    head = family.model.get_output_embeddings().weight.numel()
    fed = NUM * (length - 1)
    completions = 2 * (decoder + head) * fed + 4 * width * layers * fed * (prompt + length / 2)
    prompts = 2 * decoder * prompt + 4 * width * layers * prompt * prompt / 2
    vision = family.model.config.vision_config
    patches = (_side(vision.image_size) // _side(vision.patch_size)) ** 2
    tower = sum(p.numel() for n, p in family.model.named_parameters() if "vision" in n and _is_linear(n))
    tiles = max(1, len(image_tokens(observation.features)) // 256)
    seeing = tiles * (
        2 * tower * patches + 4 * int(vision.hidden_size) * int(vision.num_hidden_layers) * patches**2
    )
    return seeing + 3 * prompts + 4 * completions


def _side(size: int | list[int]) -> int:
    return size if isinstance(size, int) else int(size[0])


def _is_linear(name: str) -> bool:
    return name.endswith("weight") and "norm" not in name and "embed" not in name and "lora" not in name


# --- the same gradient -------------------------------------------------------------------------------


def exactness(model: str, device: str, num: int = NUM, length: int = 8) -> dict[str, float]:
    """Tree and N plain copies on the same completions: relative gradient and largest difference."""
    policy = load(model, "float32", device)
    policy.use(SLOT)
    family, query = policy.family, Query("bench", (picture((448, 448)),), QUESTION)
    vocabulary = family.model.config.get_text_config().vocab_size
    drawn = torch.randint(0, vocabulary, (num, length), generator=torch.Generator().manual_seed(2))
    drawn[torch.isin(drawn, family.forbidden)] = family.end_token
    advantage = torch.randn(num, 1, generator=torch.Generator().manual_seed(3)).to(family.device)
    found = []
    for plain in (False, True):
        if plain:
            logprobs = _copied_logprobs(policy, query, drawn)
        else:
            rows = [tuple(row) for row in drawn.tolist()]
            logprobs, _ = tree.score(family, policy.begin(policy.observe(query)), rows)
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


def _copied_logprobs(policy: Policy, query: Query, completions: Tensor) -> Tensor:
    num, length = completions.shape
    prompt = policy.family.prompt(query.images, query.question).inputs
    inputs = {name: value.repeat_interleave(num, 0) for name, value in prompt.items()}
    completions = completions.to(policy.family.device)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], completions], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    logits = policy.family.model(**inputs, use_cache=False, logits_to_keep=length + 1).logits[:, :-1].float()
    logits = tree.allowed(policy.family, logits)
    return logits.log_softmax(-1).gather(-1, completions[..., None])[..., 0]


if __name__ == "__main__":
    main()
