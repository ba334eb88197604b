"""The same code on a GPU gives what it gives on the CPU; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from servetune.adapters import growth, search, tree
from servetune.adapters.family import Family
from servetune.adapters.gate import Gate
from servetune.adapters.policy import LoraSpec, Policy
from servetune.adapters.step import Learner, LearnerConfig
from tests.checkpoints import FAMILIES
from tests.conftest import query, stir

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LABELS = ("red", "red cat", "red dog", "blue", "green cat", "a", "yes", "no")
SEQUENCES = [(260, 261, 270, 300), (260, 261, 265, 300), (260, 300), (280,)]
SLOTS = ("candidate", "live")


def made(folder: Path, device: str, dtype: torch.dtype = torch.float32) -> Policy:
    policy = Policy(Family.load(str(folder), device, dtype), LoraSpec(4, 8), SLOTS)
    for seed, slot in enumerate(SLOTS):
        stir(policy, slot, seed, std=0.3)
    return policy


@pytest.fixture(params=sorted(FAMILIES))
def pair(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> tuple[Policy, Policy]:
    """The same family on both."""
    folder = checkpoints[request.param]
    return made(folder, "cpu"), made(folder, "cuda")


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours.cpu(), theirs.cpu(), atol=2e-3, rtol=2e-3)


def test_answers_and_scores_are_those_of_the_cpu(pair: tuple[Policy, Policy]) -> None:
    found = []
    for policy in pair:
        policy.use("candidate")
        seen = policy.observe_each([query(seed, question="is it red? " * (1 + seed)) for seed in range(3)])
        with torch.no_grad():
            prefixes = policy.begin_each(seen)
            answers = growth.sample_each(prefixes, 1, 6, temperature=0.0)
            scored = tree.score_each(prefixes, [SEQUENCES] * 3)
            long = search.search_each(policy.family, policy.begin(seen[0]), [SEQUENCES])
            mixed = growth.sample_each(
                policy.begin_each(seen, slots=("live", None, "candidate")), 1, 6, temperature=0.0
            )
        labels = policy.likely_labels(seen, LABELS)
        said = [[sample.tokens for sample in samples] for samples in (*answers, *mixed)]
        found.append((said, [*scored, *long, labels]))
    (cpu_said, cpu_scores), (gpu_said, gpu_scores) = found
    assert gpu_said == cpu_said
    for ours, theirs in zip(gpu_scores, cpu_scores, strict=True):
        close(ours, theirs)


def test_gradients_are_those_of_the_cpu(pair: tuple[Policy, Policy]) -> None:
    gradients = []
    for policy in pair:
        policy.use("candidate")
        logprobs, mask = tree.score(policy.family, policy.begin(policy.observe(query())), SEQUENCES)
        (logprobs * mask).sum().backward()
        parameters = policy.parameters("candidate").values()
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in parameters if p.grad is not None]))
    ours, theirs = gradients
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learner", ["default", "ttrv"])
def test_steps_and_verdicts(checkpoints: dict[str, Path], learner: str, dtype: torch.dtype) -> None:
    policy = made(checkpoints["internvl"], "cuda", dtype)
    config = LearnerConfig.named(learner, num_rollouts=8, max_tokens=4, min_valid=0.0)
    made_learner = Learner(policy, config, seed=1)
    gate = Gate(policy, max_tokens=4)
    batch = [query(seed, LABELS if seed % 2 else ()) for seed in range(6)]
    for _ in range(2):
        metrics, _ = made_learner.step(batch)
    gate.remember(batch)
    assert metrics.groups == len(batch)
    assert all(torch.isfinite(p).all() for p in policy.parameters("candidate").values())
    made_learner.propose()
    verdict = gate.judge(made_learner.witnesses())
    assert {"kl_base", "valid", "distinct", "unshown"} <= verdict.metrics.keys()
    weights, moments = made_learner.state()
    made_learner.load(weights, moments)
    made_learner.step(batch)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_is_packed_in_float32_is_packed_in_bfloat16(checkpoints: dict[str, Path], family: str) -> None:
    folder = checkpoints[family]
    wide, narrow = (made(folder, "cuda", dtype).family for dtype in (torch.float32, torch.bfloat16))
    assert tree.packs(narrow) == tree.packs(wide)
    assert narrow._sees_together == wide._sees_together
