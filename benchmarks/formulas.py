"""GRPO as TRL writes it, in float64, and random groups to compare ours with it.

It repeats every answer as often as it was drawn, as published code does; ours has each distinct answer once,
with a weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from servetune.adapters import grpo

AGGREGATIONS = ("grpo", "bnpo", "dr_grpo", "luspo")  # TRL's names; luspo sums over tokens
TRL_EPSILON = 1e-4
LONGEST = 8


@dataclass
class Case:
    """A random group: M distinct answers of at most T tokens, how often each was drawn, and three policies."""

    counts: list[int]
    rewards: Tensor  # (M,)
    new: Tensor  # (M, T)
    old: Tensor
    reference: Tensor
    mask: Tensor  # (M, T) 1 on tokens
    beta: float

    def to(self, dtype: torch.dtype) -> Case:
        """The same group in another precision."""
        tensors = {name: value.to(dtype) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    @property
    def rows(self) -> Tensor:
        """For every drawn answer the row of the distinct one."""
        return torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))

    @property
    def weights(self) -> Tensor:
        return torch.tensor(self.counts).to(self.new) / sum(self.counts)

    def tokens(self, aggregation: str) -> Tensor:
        """Our weights of tokens for one of TRL's ways to aggregate."""
        lengths = self.mask.sum(-1)
        per_token = {
            "grpo": 1 / lengths[:, None],
            "bnpo": 1 / (self.weights * lengths).sum(),
            "dr_grpo": torch.tensor(1 / LONGEST).to(self.new),
            "luspo": torch.tensor(1.0).to(self.new),
        }
        return self.mask * per_token[aggregation]


def make_case(seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    distinct, longest = integer(1, 9), integer(1, LONGEST)
    counts = [integer(1, 9) for _ in range(distinct)]
    if sum(counts) == 1:  # a group of one has no deviation
        counts = [2]
    new = -normal(distinct, longest).abs() * 2
    lengths = torch.tensor([integer(1, longest + 1) for _ in range(distinct)])
    mask = torch.arange(longest) < lengths[:, None]
    if seed % 3 == 0:  # holes too, as where a tool spoke
        mask &= torch.rand(mask.shape, generator=generator) > 0.3
        mask[:, 0] = True
    return Case(
        counts=counts,
        rewards=torch.full((distinct,), 0.3).double() if seed % 7 == 0 else normal(distinct),
        new=new,
        old=new.clone() if seed % 5 == 0 else new + 0.3 * normal(distinct, longest),
        reference=new + 0.5 * normal(distinct, longest),
        mask=mask.double(),
        beta=0.0 if seed % 2 else float(normal(1).abs()),
    )


def trl_advantages(rewards: Tensor, scale: bool, epsilon: float) -> Tensor:
    centred = rewards - rewards.mean()
    return centred / (rewards.std() + epsilon) if scale else centred


def trl_loss(
    new: Tensor, old: Tensor, reference: Tensor, mask: Tensor, advantage: Tensor, beta: float, aggregation: str
) -> Tensor:
    """What `GRPOTrainer._compute_loss` documents, for drawn answers one per row."""
    ratio = torch.exp(new - old)
    kl = torch.exp(reference - new) - (reference - new) - 1
    clipped = torch.clamp(ratio, 1 - 0.2, 1 + 0.2)
    each = beta * kl - torch.min(ratio * advantage[:, None], clipped * advantage[:, None])
    if aggregation == "grpo":
        return ((each * mask).sum(-1) / mask.sum(-1)).mean()
    if aggregation == "bnpo":
        return (each * mask).sum() / mask.sum()
    if aggregation == "dr_grpo":
        return (each * mask).sum() / (len(each) * LONGEST)
    return (each * mask).sum(-1).mean()


def theirs(case: Case, scale: bool, aggregation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages of the drawn answers, loss and its gradient by the log-probabilities of the distinct ones."""
    rows, new = case.rows, case.new.clone().requires_grad_()
    advantage = trl_advantages(case.rewards[rows], scale, TRL_EPSILON)
    drawn = (each[rows] for each in (new, case.old, case.reference, case.mask))
    loss = trl_loss(*drawn, advantage, case.beta, aggregation)
    return advantage, loss.detach(), torch.autograd.grad(loss, new)[0]


def ours(case: Case, scale: bool, aggregation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages, loss and its gradient by the (M, T) log-probabilities of the distinct answers."""
    new = case.new.clone().requires_grad_()
    weights, tokens = case.weights, case.tokens(aggregation)
    advantage = grpo.advantages(case.rewards, weights, sum(case.counts), scale, TRL_EPSILON)
    loss = grpo.policy_loss(new, case.old, advantage, weights, tokens)
    loss = loss + case.beta * grpo.kl_penalty(new, case.reference, weights, tokens)
    return advantage, loss.detach(), torch.autograd.grad(loss, new)[0]


def kinds(case: Case, advantage: Tensor) -> set[str]:
    """What a case shows, so that the test can tell that it has met everything."""
    ratio = (case.new - case.old).exp()
    up, down = (advantage[:, None] > 1e-6) & (case.mask > 0), (advantage[:, None] < -1e-6) & (case.mask > 0)
    shown = {
        "above, better": bool((up & (ratio > 1.2)).any()),
        "above, worse": bool((down & (ratio > 1.2)).any()),
        "below, better": bool((up & (ratio < 0.8)).any()),
        "below, worse": bool((down & (ratio < 0.8)).any()),
        "on policy": torch.equal(case.new, case.old),
        "no variance": float(advantage.abs().max()) < 1e-6,
        "repeated": max(case.counts) > 1,
        "padded": bool((case.mask == 0).any()),
        "one answer": len(case.counts) == 1,
        "kl": case.beta > 0,
        "no kl": case.beta == 0,
    }
    return {name for name, is_shown in shown.items() if is_shown}
