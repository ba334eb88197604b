"""The nouns of the learning core: frozen, small, without behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image
from torch import Tensor

BASE = 0
"""Version number of the untouched base model."""


@dataclass(frozen=True, slots=True)
class Query:
    """An unlabeled request: RGB images, the question and, in recognition, the closed set of labels.

    `trace` is the W3C traceparent of its request, where requests are traced.
    """

    id: str
    images: tuple[Image, ...]
    question: str
    labels: tuple[str, ...] = ()
    trace: str | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """A query whose answer the operator knows. Nothing learns from it."""

    query: Query
    answer: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to answer an open question. Temperature 0 is greedy; `top_k` asks for that many alternatives.

    `logprobs`: tell each token's log-probability, and those of so many of the likeliest in its place.
    """

    n: int = 1
    max_tokens: int = 32
    temperature: float = 0.0
    top_k: int = 1
    seed: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Rollouts:
    """The distinct answers to one query as a weighted set.

    An answer drawn c times out of N weighs c/N. In a closed set there is one rollout per label and its weight
    is the label's probability, so that weighted sums are exact expectations over the policy.
    """

    tokens: tuple[tuple[int, ...], ...]  # M sequences, end token included where there was one
    answers: tuple[str, ...]  # canonical; empty where the answer is empty or was cut at the length limit
    weights: Tensor  # (M,) sums to 1
    logprobs: Tensor  # (M,) log-probability of each whole sequence when it was made
    num: int | None  # N answers were drawn; None: the weights are exact


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one step did; every number is a plain float so that it goes into manifests and metrics as is.

    `values` has, as far as the learner knows them, means over groups: `reward` that the adapter's answers can
    expect, `majority` (vote share), `entropy` of the votes in nats, `valid` answers, `kl` to the base in nats,
    `prequential` agreement of the adapter's answer with the vote on queries that it had not learned from yet; and
    `grad_norm`.
    """

    groups: int
    informative: int
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The gate's reasoned judgement of a candidate; `reasons` is empty when it was accepted.

    `early`: what speaks against it is only that it has not yet come near enough to the votes on other queries.
    """

    accepted: bool
    reasons: tuple[str, ...]
    metrics: dict[str, float]
    early: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {
            "accepted": self.accepted,
            "early": self.early,
            "reasons": list(self.reasons),
            "metrics": dict(self.metrics),
        }
