"""Advantages and loss against the published formulas, written out a second time (benchmarks/formulas.py)."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.formulas import (
    AGGREGATIONS,
    LONGEST,
    TRL_EPSILON,
    kinds,
    make_case,
    ours,
    theirs,
    trl_advantages,
    trl_loss,
)
from servetune.adapters import tree
from servetune.adapters.grpo import EPSILON, advantages, kl_penalty, policy_loss
from servetune.adapters.policy import Policy
from servetune.adapters.rewards import REWARDS, count_votes
from servetune.adapters.step import Learner, LearnerConfig
from servetune.adapters.types import Rollouts
from tests.conftest import query, stir


def test_a_constant_added_to_a_group_changes_no_advantage() -> None:
    rewards, weights = torch.tensor([0.1, 0.7, 0.2]), torch.full((3,), 1 / 3)
    torch.testing.assert_close(advantages(rewards + 0.75, weights, 3), advantages(rewards, weights, 3))


def test_merged_rollouts_have_the_advantages_of_separate_ones() -> None:
    separate = torch.tensor([1.0] * 5 + [0.0] * 3, dtype=torch.float64)
    ours = advantages(torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([5 / 8, 3 / 8]).double(), num=8)
    theirs = (separate - separate.mean()) / (separate.std() + 1e-6)
    torch.testing.assert_close(ours, theirs[[0, 5]])


def test_equal_rewards_give_no_advantage() -> None:
    assert not advantages(torch.full((4,), 0.3), torch.full((4,), 0.25), 4).abs().gt(1e-3).any()


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(2, 9), length=st.integers(1, 6), beta=st.floats(0, 1))
def test_loss_and_gradient_are_those_of_the_formula(seed: int, rows: int, length: int, beta: float) -> None:
    torch.manual_seed(seed)
    new, old, ref = (torch.randn(rows, length, dtype=torch.float64) for _ in range(3))
    mask = (torch.rand(rows, length) > 0.3).double()
    advantage = torch.randn(rows, dtype=torch.float64)
    weights = torch.full((rows,), 1 / rows, dtype=torch.float64)
    ours, theirs = new.clone().requires_grad_(), new.clone().requires_grad_()

    loss = policy_loss(ours, old, advantage, weights, mask) + beta * kl_penalty(ours, ref, weights, mask)
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(rows):
        for t in range(length):
            ratio = torch.exp(theirs[i, t] - old[i, t])
            surrogate = torch.min(ratio * advantage[i], torch.clamp(ratio, 0.8, 1.2) * advantage[i])
            k3 = torch.exp(ref[i, t] - theirs[i, t]) - (ref[i, t] - theirs[i, t]) - 1
            expected = expected + mask[i, t] * (beta * k3 - surrogate) / rows
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-8, rtol=1e-10)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-8, rtol=1e-10)


def test_exact_weights_give_the_gradient_of_the_expected_reward() -> None:
    """With weights p and no scaling, the loss's gradient is minus that of the sum of p(y) r(y)."""
    scores = torch.randn(5, dtype=torch.float64)
    rewards = torch.rand(5, dtype=torch.float64)
    direct = scores.clone().requires_grad_()
    (direct.softmax(0) @ rewards).backward()
    ours = scores.clone().requires_grad_()
    logprobs = ours.log_softmax(0)
    weights = logprobs.detach().exp()
    advantage = advantages(rewards, weights, scale=False)
    policy_loss(
        logprobs[:, None], logprobs[:, None].detach(), advantage, weights, torch.ones(5, 1, dtype=torch.float64)
    ).backward()
    assert direct.grad is not None
    torch.testing.assert_close(ours.grad, -direct.grad)


# --- by hand -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "values", "deviations", "squares"),
    [
        ("frequency", (5 / 8, 2 / 8, 0), (0.171875, -0.203125, -0.453125), 0.435546875),
        ("majority", (1, 0, 0), (0.375, -0.625, -0.625), 1.875),
        ("format-only", (1, 1, 0), (0.125, 0.125, -0.875), 0.875),
    ],
)
def test_rewards_and_advantages_by_hand(
    reward: str, values: tuple[float, ...], deviations: tuple[float, ...], squares: float
) -> None:
    """Eight answers: five say a, two say b, one says nothing. The sum of squared deviations is over all eight."""
    weights = torch.tensor([5, 2, 1]).double() / 8
    votes = count_votes(Rollouts(((1,), (2,), (3,)), ("a", "b", ""), weights, torch.zeros(3), 8))
    assert REWARDS[reward](votes) == list(values)
    rewards = torch.tensor(REWARDS[reward](votes), dtype=torch.float64)
    expected = torch.tensor(deviations, dtype=torch.float64)
    std = math.sqrt(squares / 7)
    torch.testing.assert_close(advantages(rewards, weights, 8), expected / (std + 1e-6), atol=1e-12, rtol=0)
    torch.testing.assert_close(
        advantages(rewards, weights, 8, epsilon=0.5), expected / (std + 0.5), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(advantages(rewards, weights, 8, scale=False), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "slope"),
    [
        (1.0, 2.0, 2.0, 2.0),
        (1.5, 2.0, 2.4, 0.0),  # gone far enough
        (0.5, 2.0, 1.0, 1.0),  # the wrong way: not clipped
        (0.5, -2.0, -1.6, 0.0),
        (1.5, -2.0, -3.0, -3.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_the_clipped_objective_by_hand(ratio: float, advantage: float, gain: float, slope: float) -> None:
    """`slope` is the derivative by the log-probability: ratio * advantage where nothing is clipped."""
    one = torch.ones(1, dtype=torch.float64)
    logprobs = torch.tensor([[math.log(ratio) - 3]], dtype=torch.float64, requires_grad=True)
    loss = policy_loss(logprobs, -3 * one[None], advantage * one, one, one[None])
    loss.backward()
    assert logprobs.grad is not None
    assert (-float(loss.detach()), -float(logprobs.grad)) == pytest.approx((gain, slope), abs=1e-12)


def test_the_kl_term_by_hand() -> None:
    """Weights 3/4 and 1/4; the reference twice and half as likely: 2 - ln 2 - 1 and 1/2 + ln 2 - 1."""
    logprobs = torch.tensor([[-1.0, -9.0], [-1.0, -2.0]], dtype=torch.float64)
    shift = math.log(2)
    reference = logprobs + torch.tensor([[shift, 5.0], [-shift, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    weights = torch.tensor([0.75, 0.25], dtype=torch.float64)
    expected = 0.75 * (1 - shift) + 0.25 * (shift - 0.5)
    assert float(kl_penalty(logprobs, reference, weights, mask)) == pytest.approx(expected, abs=1e-12)
    assert float(kl_penalty(logprobs, logprobs, weights, mask)) == 0


# --- against TRL's formulas --------------------------------------------------------------------------


def assert_exact(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("scale", [True, False])
def test_weighted_answers_are_trl_on_repeated_ones(aggregation: str, scale: bool) -> None:
    met: dict[str, int] = defaultdict(int)
    for seed in range(150):
        case = make_case(seed)
        advantage, loss, gradient = theirs(case, scale, aggregation)
        our_advantage, our_loss, our_gradient = ours(case, scale, aggregation)
        assert_exact(our_advantage[case.rows], advantage)
        assert_exact(our_loss, loss)
        assert_exact(our_gradient, gradient)
        for name in kinds(case, our_advantage):
            met[name] += 1
    assert len(met) == 11, sorted(met)
    assert min(met.values()) >= 5, met


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_trl_itself_agrees_where_it_is_installed(aggregation: str) -> None:
    """Its own `_compute_loss`, on a trainer of which only what the loss reads is there."""
    trainer = pytest.importorskip("trl").GRPOTrainer
    for seed in range(0, 150, 5):
        case, rows = make_case(seed), make_case(seed).rows
        new = case.new.clone().requires_grad_()
        stand_in = trl_stand_in(new[rows], case.beta, aggregation)
        ids = torch.zeros_like(case.mask[rows], dtype=torch.long)
        inputs = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": ids[:, :1],
            "completion_ids": ids,
            "completion_mask": case.mask[rows],
            "advantages": trl_advantages(case.rewards[rows], True, TRL_EPSILON),
            "old_per_token_logps": case.old[rows],
            "ref_per_token_logps": case.reference[rows],
        }
        loss = trainer._compute_loss(stand_in, None, inputs)
        _, our_loss, our_gradient = ours(case, True, aggregation)
        assert_exact(our_loss, loss)
        assert_exact(our_gradient, torch.autograd.grad(loss, new)[0])


def trl_stand_in(logprobs: Tensor, beta: float, aggregation: str) -> Any:
    settings = SimpleNamespace(delta=None, use_bias_correction_kl=False)
    same = SimpleNamespace(gather=lambda value: value, reduce=lambda value, reduction: value)
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        accelerator=same,
        args=settings,
        aux_loss_enabled=False,
        beta=beta,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        epsilon_high=0.2,
        epsilon_low=0.2,
        importance_sampling_level="token",
        loss_type=aggregation,
        max_completion_length=LONGEST,
        _metrics={"train": defaultdict(list)},
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
    )


# --- the step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("per_token", "aggregation"), [(True, "grpo"), (False, "luspo")])
@pytest.mark.parametrize("labels", [(), tuple("abcdefgh")])
def test_a_step_of_the_paper_is_trl_on_repeated_answers(
    policy: Policy, labels: tuple[str, ...], per_token: bool, aggregation: str
) -> None:
    """Sampling, rewards, advantages, loss and LoRA gradient together; fp32, as the model is."""
    stir(policy, "candidate")
    config = LearnerConfig.named("ttrv", num_rollouts=12, max_tokens=4, per_token=per_token)
    learner = Learner(policy, config)
    policy.use("candidate")
    group = learner._roll_out(query(labels=labels))
    learner._accumulate(group)
    found = {key: value.grad for key, value in policy.parameters("candidate").items()}
    for parameter in policy.parameters("candidate").values():
        parameter.grad = None

    votes, tokens = group.votes, group.rollouts.tokens
    counts = (group.rollouts.weights * 12).round().long()
    rows = torch.arange(len(tokens)).repeat_interleave(counts)
    assert len(rows) == 12
    assert len(tokens) > 1
    shares = torch.tensor([votes.by_answer.get(answer, 0.0) for answer in votes.answers])[rows]
    valid = [p / votes.valid for p in votes.by_answer.values()]
    rewards = shares + 0.75 * sum(p * math.log(p) for p in valid)
    repeated = [tokens[row] for row in rows.tolist()]
    logprobs, mask = tree.score(policy.family, policy.begin(group.observation), repeated)
    with policy.reference():
        reference, _ = tree.score(policy.family, policy.begin(group.observation), repeated)
    advantage = trl_advantages(rewards, True, EPSILON)
    trl_loss(logprobs, logprobs.detach(), reference, mask.float(), advantage, 0.04, aggregation).backward()
    for key, parameter in policy.parameters("candidate").items():
        torch.testing.assert_close(found[key], parameter.grad, atol=1e-5, rtol=1e-4)
    assert max(float(value.abs().max()) for value in found.values() if value is not None) > 1e-3
