"""From a query to a group: what the policy answers, how it votes, and what it saw."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from servetune.adapters import tree
from servetune.adapters.answers import canonical
from servetune.adapters.family import Prefix
from servetune.adapters.policy import Observation, Policy
from servetune.adapters.rewards import Votes, count_votes
from servetune.adapters.types import Query, Rollouts


@dataclass(frozen=True, slots=True)
class Group:
    """The rollouts of one query with their votes, and the observation they share."""

    query: Query
    observation: Observation
    rollouts: Rollouts
    votes: Votes


@torch.no_grad()
def roll_out(
    policy: Policy,
    query: Query,
    num: int,
    max_tokens: int,
    generator: torch.Generator,
    version: int,
    exact: bool = True,
) -> Group:
    """Answer a query `num` times at temperature 1 with the active adapter.

    A closed set of labels is not sampled: one scoring pass gives every label's probability, and the label set
    itself becomes the group. With `exact=False` labels are drawn from those probabilities, as published.
    """
    observation = policy.observe(query)
    prefix = policy.begin(observation)
    if query.labels:
        rollouts = _labels(policy, prefix, query, num, generator, version, exact)
    else:
        samples = tree.sample(policy.family, prefix, num, max_tokens, generator=generator)
        rollouts = _sampled(policy, samples, num, version)
    return Group(query, observation, rollouts, count_votes(rollouts))


def _sampled(policy: Policy, samples: list[tree.Sample], num: int, version: int) -> Rollouts:
    return Rollouts(
        tokens=tuple(sample.tokens for sample in samples),
        answers=tuple(canonical(policy.family.text(s.tokens)) if s.finished else "" for s in samples),
        weights=torch.tensor([sample.count / num for sample in samples]),
        logprobs=torch.tensor([sample.logprob for sample in samples]),
        num=num,
        version=version,
    )


def _labels(
    policy: Policy,
    prefix: Prefix,
    query: Query,
    num: int,
    generator: torch.Generator,
    version: int,
    exact: bool,
) -> Rollouts:
    logprobs = policy.label_logprobs(prefix, query.labels).cpu()
    weights = logprobs.softmax(-1)
    chosen = list(range(len(query.labels)))
    if not exact:
        drawn = Counter(torch.multinomial(weights, num, replacement=True, generator=generator).tolist())
        chosen = sorted(drawn)
        weights = torch.tensor([drawn[index] / num for index in chosen])
    return Rollouts(
        tokens=tuple(policy.family.tokens(query.labels[index]) for index in chosen),
        answers=tuple(query.labels[index] for index in chosen),
        weights=weights,
        logprobs=logprobs[chosen],
        num=None if exact else num,
        version=version,
    )
