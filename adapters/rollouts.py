"""From a query to a group of rollouts, or to a ballot: what is answered, how likely, and what was seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from servetune.adapters import growth, tree
from servetune.adapters.answers import canonical
from servetune.adapters.ballots import Ballot
from servetune.adapters.family import Family, Prefix, image_tokens
from servetune.adapters.policy import Observation, Policy
from servetune.adapters.rewards import Votes, count_votes
from servetune.adapters.types import Query, Rollouts
from servetune.adapters.views import SAME, look

MAX_ANSWERS = 16
"""Answers of an open question that are voted on."""


@dataclass(frozen=True, slots=True)
class Group:
    """The rollouts of one query with their votes, and the forwarded prompt they share."""

    query: Query
    observation: Observation
    prefix: Prefix
    rollouts: Rollouts
    votes: Votes


def roll_out(
    policy: Policy,
    query: Query,
    num: int,
    max_tokens: int,
    generator: torch.Generator,
    exact: bool = True,
) -> Group:
    """Answer a query `num` times at temperature 1 with the active adapter.

    A closed set of labels is not sampled: one scoring pass gives every label's probability, and the label set
    itself becomes the group. With `exact=False` labels are drawn from those probabilities, as published. Unless
    under no_grad, the prefix can be trained through; the rollouts cannot.
    """
    observation = policy.observe(query)
    prefix = policy.begin(observation)
    with torch.no_grad():
        if query.labels:
            rollouts = _labels(policy, prefix, query, num, generator, exact)
        else:
            samples = growth.sample(policy.family, prefix, num, max_tokens, generator=generator)
            rollouts = _sampled(policy, samples, num)
    return Group(query, observation, prefix, rollouts, count_votes(rollouts))


@torch.no_grad()
def cast_ballot(
    policy: Policy,
    query: Query,
    views: Sequence[str],
    num: int,
    max_tokens: int,
    generator: torch.Generator,
    measured: bool,
) -> Ballot | None:
    """Let the reference answer a query in several views.

    The answers are the labels of a closed set, else the distinct valid answers among `num` rollouts, drawn in all
    views together. The reference then scores every answer in every view. It votes, and not the adapter, so that
    what was learned yesterday is no evidence for itself.

    Returns:
        the ballot; None where there was no valid answer.
    """
    with policy.reference():
        looks = {
            name: tuple(look(name, image, query.question, query.id) for image in query.images) for name in views
        }
        observations = policy.observe_each([replace(query, images=images) for images in looks.values()])
        if query.labels:
            answers, valid = query.labels, 1.0
            logprobs = policy.likely_labels(observations, answers)  # (V, L)
            tokens = tuple(policy.family.tokens(label) for label in answers)
        else:
            prefixes = policy.begin_each(observations)
            drawn = growth.sample_each(prefixes, max(2, num // len(looks)), max_tokens, generator=generator)
            found, valid = distinct_answers(policy.family, chain.from_iterable(drawn))
            if not found:
                return None
            answers, tokens = tuple(found), tuple(found.values())
            logprobs = torch.stack(tree.score_each(prefixes, [tokens] * len(looks))).cpu()
    return Ballot(
        query=replace(query, images=()),  # what is learned from are the observations; pictures are big and private
        answers=answers,
        tokens=tokens,
        scores=dict(zip(views, logprobs.log_softmax(-1), strict=True)),
        observations={name: policy.keep(one) for name, one in zip(looks, observations, strict=True)},
        embedding=image_tokens(observations[views.index(SAME)].features).float().mean(0).cpu(),
        valid=valid,
        measured=measured,
    )


@torch.no_grad()
def vote_again(policy: Policy, ballot: Ballot, views: Sequence[str]) -> None:
    """Another round for a ballot, in some views: the active adapter counts half, the reference the other half."""
    observations = [ballot.observations[view] for view in views]
    if ballot.query.labels:
        scored = policy.likely_labels(observations, ballot.answers)
    else:
        scored = torch.stack(policy.score_each(observations, [ballot.tokens] * len(observations))).cpu()
    mixed = (torch.stack([ballot.scores[view] for view in views]) + scored.log_softmax(-1)) / 2
    ballot.votes = dict(zip(views, mixed.log_softmax(-1), strict=True))
    ballot.rounds += 1


def distinct_answers(family: Family, samples: Iterable[growth.Sample]) -> tuple[dict[str, tuple[int, ...]], float]:
    """The commonest valid answers with the tokens of their likeliest spelling, and the share of valid samples."""
    counts: Counter[str] = Counter()
    spelling: dict[str, growth.Sample] = {}
    for sample in samples:
        answer = canonical(family.text(sample.tokens)) if sample.finished else ""
        counts[answer] += sample.count
        if answer not in spelling or sample.logprob > spelling[answer].logprob:
            spelling[answer] = sample
    total = counts.total()
    valid = 1 - counts.pop("", 0) / total
    return {answer: spelling[answer].tokens for answer, _ in counts.most_common(MAX_ANSWERS)}, valid


def _sampled(policy: Policy, samples: list[growth.Sample], num: int) -> Rollouts:
    return Rollouts(
        tokens=tuple(sample.tokens for sample in samples),
        answers=tuple(canonical(policy.family.text(s.tokens)) if s.finished else "" for s in samples),
        weights=torch.tensor([sample.count / num for sample in samples]),
        logprobs=torch.tensor([sample.logprob for sample in samples]),
        num=num,
    )


def _labels(
    policy: Policy,
    prefix: Prefix,
    query: Query,
    num: int,
    generator: torch.Generator,
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
    )
