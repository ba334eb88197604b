"""GRPO as pure functions on tensors: group-relative advantages and the clipped, KL-anchored loss.

A group is a weighted set of rollouts: c/N for an answer drawn c times out of N, or the exact probabilities of a
closed set of labels. For N separate answers of weight 1/N these are the published formulas (arXiv 2402.03300,
eqs. 3-4).
"""

from __future__ import annotations

from torch import Tensor

EPSILON = 1e-6


def advantages(
    rewards: Tensor, weights: Tensor, num: int | None = None, scale: bool = True, epsilon: float = EPSILON
) -> Tensor:
    """(r - mean) / (std + epsilon) within one group.

    Args:
        rewards: (M,). weights: (M,), sum 1.
        num: how many answers were drawn; the variance is then the unbiased one, as in the published code.
        scale: divide by the standard deviation. Without it a nearly unanimous group does not push hardest
            (arXiv 2503.20783).
        epsilon: keeps a group of equal rewards finite; TRL has 1e-4.
    """
    centred = rewards - (weights * rewards).sum()
    if not scale:
        return centred
    variance = (weights * centred**2).sum()
    if num is not None and num > 1:
        variance = variance * num / (num - 1)
    return centred / (variance.sqrt() + epsilon)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantage: Tensor,
    weights: Tensor,
    mask: Tensor,
    clip: float = 0.2,
) -> Tensor:
    """Clipped surrogate: minus the weighted mean over rollouts of their summed token terms.

    Args:
        logprobs: (M, T) of the policy, with gradient.
        old_logprobs: (M, T) of the policy that made the rollouts.
        advantage: (M,). weights: (M,), sum 1.
        mask: (M, T), 1 on tokens, or weights of the tokens. Ones sum over tokens; 1 / own length is the published
            mean (TRL's `grpo`), 1 / mean length is `bnpo`, 1 / longest allowed length is `dr_grpo`.
        clip: half width of the trust region of the ratio.
    """
    ratio = (logprobs - old_logprobs).exp()
    gain = (ratio * advantage[:, None]).minimum(ratio.clamp(1 - clip, 1 + clip) * advantage[:, None])
    return -(weights * (gain * mask).sum(-1)).sum()


def kl_penalty(logprobs: Tensor, reference: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """Weighted mean of the k3 estimate of KL(policy || reference): exp(d) - d - 1 with d = ref - policy."""
    difference = reference - logprobs
    return (weights * ((difference.exp() - difference - 1) * mask).sum(-1)).sum()
