"""One query looked at several times by one adapter version, and the answer that the looks come to together."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from servetune.adapters import growth, tree
from servetune.adapters.consensus import pool_looks
from servetune.adapters.family import Prefix
from servetune.adapters.policy import Policy
from servetune.adapters.rollouts import distinct_answers
from servetune.adapters.types import Query, Sampling
from servetune.adapters.views import look, safe_views

NUM_ROLLOUTS = 16  # of an open question that asks for one answer
MAX_TOKENS = 8192  # that these may have together
LAST = ("moved again", "another light", "strong contrast", "moved once more")
"""Views that are much like an earlier one: few looks tell more when they differ."""


@dataclass(frozen=True, slots=True)
class Look:
    """What one look found: how likely each answer is, in nats, and what had to be drawn for it."""

    tokens: dict[str, tuple[int, ...]]  # of each answer
    logprobs: Tensor  # (M,)
    num_rollouts: int = 0
    num_tokens: int = 0  # drawn


@dataclass(slots=True)
class Looks:
    """The looks at one query so far, the first of them at the images as they were sent.

    `shares`, where they are known from answering it, are the probabilities of all labels of a closed set in the
    first look, at the `temperature` of the adapter. An open question's answers are the distinct valid ones among
    rollouts of the first look. The looks are pooled at temperature 1 and the result is tempered: how sure the
    adapter may sound is not to change the answer.
    """

    query: Query
    sampling: Sampling
    shares: dict[str, float]
    temperature: float = 1.0
    found: list[Look] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.query.labels:
            shares = torch.tensor([self.shares[label] for label in self.query.labels])
            self.found.append(Look({}, shares.log() * self.temperature))

    @property
    def done(self) -> bool:
        """Whether a further look could change nothing: no view is left, or there is only one answer."""
        if not self.found:
            return False
        return len(self.found[0].logprobs) < 2 or len(self.found) == len(self._views())

    @torch.no_grad()
    def take(self, policy: Policy, stop: threading.Event | None = None) -> Look:
        """Look once more with the active adapter; the result counts once it is added to `found`.

        Raises:
            Stopped: `stop` was set while answers were drawn.
        """
        if not self.found:
            return _draw(policy, self.query, self.sampling, stop)
        view = self._views()[len(self.found)]
        # What is random about a view is the same for every query, so that the same question has the same answer.
        images = tuple(look(view, image, self.query.question, "") for image in self.query.images)
        observation = policy.observe(replace(self.query, images=images))
        if self.query.labels:
            tokens = {label: tuple(policy.family.tokens(label)) for label in self.query.labels}
            return Look(tokens, policy.likely_labels([observation], self.query.labels)[0])
        tokens = self.found[0].tokens
        return Look(tokens, _score(policy, policy.begin(observation), tokens))

    def ranked(self) -> list[tuple[str, float]]:
        """Every answer with its pooled probability, the likeliest first."""
        answers = self.query.labels or tuple(self.found[0].tokens)
        pooled = pool_looks(torch.stack([one.logprobs for one in self.found]))
        shares = (pooled / self.temperature).softmax(-1).tolist()
        return sorted(zip(answers, shares, strict=True), key=lambda pair: -pair[1])

    def _views(self) -> list[str]:
        return sorted(safe_views(self.query.question), key=lambda view: view in LAST)


def _draw(policy: Policy, query: Query, sampling: Sampling, stop: threading.Event | None) -> Look:
    """The commonest valid answers to an open question, in their likeliest spelling, among them the greedy one."""
    family, longest = policy.family, sampling.max_tokens
    prefix = policy.begin(policy.observe(query))
    num, temperature = sampling.n, sampling.temperature
    if num == 1:
        num, temperature = max(2, min(NUM_ROLLOUTS, MAX_TOKENS // longest)), 1.0
    generator = torch.Generator().manual_seed(sampling.seed or 0)
    samples = growth.sample(family, prefix, 1, longest, temperature=0.0, stop=stop)
    samples += growth.sample(family, prefix, num, longest, temperature, generator, stop)
    tokens = {family.text(each): each for each in distinct_answers(family, samples)[0].values()}
    num_tokens = sum(len(sample.tokens) * sample.count for sample in samples)
    return Look(tokens, _score(policy, prefix, tokens) if tokens else torch.zeros(0), num, num_tokens)


def _score(policy: Policy, prefix: Prefix, tokens: dict[str, tuple[int, ...]]) -> Tensor:
    return tree.score(policy.family, prefix, list(tokens.values()))[0].sum(-1).cpu()
