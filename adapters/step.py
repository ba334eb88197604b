"""One update: queries in, rollouts, votes, advantages, one clipped gradient step on the LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from servetune.adapters import tree
from servetune.adapters.grpo import advantages, kl_penalty, policy_loss
from servetune.adapters.policy import Policy
from servetune.adapters.rewards import REWARDS, confidence_weight
from servetune.adapters.rollouts import Group, roll_out
from servetune.adapters.types import Query, StepMetrics


@dataclass(frozen=True, slots=True)
class LearnerConfig:
    """How to learn. `reward` names one of `rewards.REWARDS`, or `random`, the control.

    `agreement` is the band of the majority's share in which a group teaches anything: below it the query is
    hopeless, above it finished. `exact` uses the whole distribution over a closed set of labels instead of
    drawing from it; `scale` divides advantages by their standard deviation; `confidence` weighs a group by
    how little it is torn; `per_token` averages over an answer's tokens instead of summing them.
    """

    reward: str = "default"
    num_rollouts: int = 32
    max_tokens: int = 32
    learning_rate: float = 1e-3
    kl_coefficient: float = 0.04
    clip: float = 0.2
    max_grad_norm: float = 1.0
    min_valid: float = 0.5
    agreement: tuple[float, float] = (0.1, 0.98)
    exact: bool = True
    scale: bool = False
    confidence: bool = True
    per_token: bool = False

    @classmethod
    def named(cls, learner: str, **chosen: Any) -> LearnerConfig:
        """The default learner, or the published form under another reward.

        The published form draws labels, divides by the standard deviation, averages over tokens, weighs all
        groups alike and learns from every group with a signal (arXiv 2510.06783; `released`: the authors' code).
        """
        if learner == "default":
            return cls(**chosen)
        if learner == "released":
            chosen = {**chosen, "kl_coefficient": 0.001}
        published = cls(
            reward=learner, exact=False, scale=True, confidence=False, per_token=True, agreement=(0.0, 1.0)
        )
        return replace(published, **chosen)


class Learner:
    """Owns the optimizer of one slot of a policy."""

    def __init__(self, policy: Policy, config: LearnerConfig, slot: str = "candidate", seed: int = 0) -> None:
        self.policy = policy
        self.config = config
        self.slot = slot
        self.steps = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._parameters = policy.parameters(slot)
        self._optimizer = torch.optim.AdamW(self._parameters.values(), lr=config.learning_rate, weight_decay=0.0)

    def step(self, queries: Sequence[Query], version: int) -> tuple[StepMetrics, list[Query]]:
        """Learn from a batch.

        Returns:
            the step's metrics and the queries that had a signal; with none the weights are untouched.
        """
        self.policy.use(self.slot)
        groups = [self._roll_out(query, version) for query in queries]
        informative = [group for group in groups if self._teaches(group)]
        values = _describe(groups)
        if informative:
            values |= self._update(informative)
            self.steps += 1
        metrics = StepMetrics(len(groups), len(informative), values)
        return metrics, [group.query for group in informative]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies of the weights and of the optimizer's state, both by flat names."""
        moments = {}
        for key, parameter in self._parameters.items():
            for name, value in self._optimizer.state.get(parameter, {}).items():
                moments[f"{name}:{key}"] = value.detach().clone()
        return self.policy.weights(self.slot), moments

    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Go back to a state; without moments the optimizer starts afresh."""
        self.policy.load(self.slot, weights)
        self._optimizer.state.clear()
        for name, value in moments.items():
            kind, key = name.split(":", 1)
            parameter = self._parameters[key]
            # torch keeps the count of steps on the CPU and the moments beside the weights.
            self._optimizer.state[parameter][kind] = value.clone().to(
                "cpu" if kind == "step" else parameter.device
            )

    def retreat(self, towards: Mapping[str, Tensor]) -> None:
        """Go half of the way back to other weights; the optimizer keeps its state."""
        ours = self.policy.weights(self.slot)
        self.policy.load(self.slot, {key: (value + towards[key].to(value)) / 2 for key, value in ours.items()})

    def _roll_out(self, query: Query, version: int) -> Group:
        config = self.config
        return roll_out(
            self.policy, query, config.num_rollouts, config.max_tokens, self._generator, version, config.exact
        )

    def _teaches(self, group: Group) -> bool:
        """Enough valid answers, agreement within the band, and advantages that are not all zero."""
        low, high = self.config.agreement
        votes = group.votes
        if votes.valid < self.config.min_valid or not low <= votes.majority <= high:
            return False
        return self.config.reward == "random" or len(set(self._rewards(group))) > 1

    def _rewards(self, group: Group) -> list[float]:
        if self.config.reward == "random":
            return torch.rand(len(group.votes.answers), generator=self._generator).tolist()
        return REWARDS[self.config.reward](group.votes)

    def _update(self, groups: list[Group]) -> dict[str, float]:
        self._optimizer.zero_grad(set_to_none=True)
        # One backward per group: only one prompt's graph is alive at a time.
        divergences = [self._accumulate(group, 1 / len(groups)) for group in groups]
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), self.config.max_grad_norm)
        if not torch.isfinite(norm):
            self._optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError("the gradient is not finite")
        self._optimizer.step()
        return {"kl": fmean(divergences), "grad_norm": float(norm)}

    def _accumulate(self, group: Group, share: float) -> float:
        policy, rollouts, config = self.policy, group.rollouts, self.config
        logprobs, mask = tree.score(policy.family, policy.begin(group.observation), rollouts.tokens)
        with policy.reference():
            reference, _ = tree.score(policy.family, policy.begin(group.observation), rollouts.tokens)
        weights = rollouts.weights.to(logprobs.device)
        rewards = torch.tensor(self._rewards(group), device=logprobs.device)
        advantage = advantages(rewards, weights, rollouts.num, config.scale)
        tokens = mask / mask.sum(-1, keepdim=True) if config.per_token else mask.float()
        # On-policy: the rollouts were made by these very weights, so the old policy is this one, detached.
        loss = policy_loss(logprobs, logprobs.detach(), advantage, weights, tokens, config.clip)
        if config.confidence:
            loss = loss * confidence_weight(group.votes)
        divergence = kl_penalty(logprobs, reference, weights, tokens)
        torch.autograd.backward(share * (loss + config.kl_coefficient * divergence))
        return float(divergence.detach())


def _describe(groups: list[Group]) -> dict[str, float]:
    votes = [group.votes for group in groups]
    return {
        "majority": fmean(vote.majority for vote in votes),
        "entropy": fmean(vote.entropy for vote in votes),
        "valid": fmean(vote.valid for vote in votes),
        "distinct": fmean(float(len(vote.by_answer)) for vote in votes),
    }
