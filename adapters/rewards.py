"""Label-free rewards of one group: pure functions of what its rollouts answered and how much each weighs.

`vote` is the share of the group's weight that gave the same canonical answer, p(y) in TTRV (arXiv 2510.06783,
eq. 3). An answer that is empty or was cut at the length limit is invalid: it has no vote and reward 0, so that
silence can never become the majority.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from servetune.adapters.types import Rollouts

DIVERSITY = 0.75
"""alpha of TTRV (arXiv 2510.06783, section 6), used for all its data sets."""


@dataclass(frozen=True, slots=True)
class Votes:
    """How a group voted: per rollout its canonical answer (empty if invalid) and that answer's share."""

    answers: tuple[str, ...]
    shares: tuple[float, ...]
    valid: float  # share of the weight with a valid answer
    by_answer: dict[str, float]

    @property
    def majority(self) -> float:
        """Share of the commonest valid answer."""
        return max(self.by_answer.values(), default=0.0)

    @property
    def entropy(self) -> float:
        """Shannon entropy in nats of the valid answers' distribution."""
        total = sum(self.by_answer.values())
        return -sum(p / total * math.log(p / total) for p in self.by_answer.values() if p > 0)

    @property
    def normalised_entropy(self) -> float:
        """Entropy over that of a uniform choice among the answers given; 0 for one answer."""
        return self.entropy / math.log(len(self.by_answer)) if len(self.by_answer) > 1 else 0.0


def count_votes(rollouts: Rollouts) -> Votes:
    """Add up the weights of equal answers."""
    by_answer: dict[str, float] = defaultdict(float)
    for answer, weight in zip(rollouts.answers, rollouts.weights.tolist(), strict=True):
        if answer:
            by_answer[answer] += weight
    shares = tuple(by_answer[answer] if answer else 0.0 for answer in rollouts.answers)
    return Votes(rollouts.answers, shares, sum(by_answer.values()), dict(by_answer))


def frequency(votes: Votes) -> list[float]:
    """r1 of TTRV (eq. 4): the share of the group that gave the same answer."""
    return list(votes.shares)


def ttrv(votes: Votes) -> list[float]:
    """R = r1 + alpha * r2 with r2 = -H(P) in nats (eqs. 5-7).

    r2 is one number per group, so it cancels in the group-relative advantage: this gives the gradient of
    `frequency`. It is here because it is the published algorithm.
    """
    return [share - DIVERSITY * votes.entropy for share in votes.shares]


def released(votes: Votes) -> list[float]:
    """The authors' code: H divided by log M, the number of distinct answers."""
    return [share - DIVERSITY * votes.normalised_entropy for share in votes.shares]


def majority(votes: Votes) -> list[float]:
    """1 for the commonest valid answer, else 0 (TTRL, arXiv 2504.16084)."""
    top = votes.majority
    return [
        float(bool(answer) and share == top) for answer, share in zip(votes.answers, votes.shares, strict=True)
    ]


def valid_only(votes: Votes) -> list[float]:
    """1 for any valid answer: the control that separates format repair from learning."""
    return [float(bool(answer)) for answer in votes.answers]


def log_share(votes: Votes) -> list[float]:
    """log p(y): raising its mean lowers the entropy of the answers (TENT, arXiv 2006.10726, for a policy)."""
    return [math.log(share) if share > 0 else 0.0 for share in votes.shares]


REWARDS: dict[str, Callable[[Votes], list[float]]] = {
    "frequency": frequency,
    "ttrv": ttrv,
    "released": released,
    "majority": majority,
    "format-only": valid_only,
    "entropy": log_share,
    "self-training": majority,
}


def confidence_weight(votes: Votes) -> float:
    """Weight of a group in the `frequency` learner, 1 - alpha * H / log M.

    Entropy multiplies the whole group's advantages instead of being added to its rewards, so that a group
    that is torn between answers moves the weights less: TTRV's second reward in a form that does not cancel.
    """
    return 1.0 - DIVERSITY * votes.normalised_entropy
