"""Advantages and loss against the published formulas, written out here a second time in float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from servetune.adapters.grpo import advantages, kl_penalty, policy_loss


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
