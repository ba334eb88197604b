"""Votes on one query: how likely the reference finds each answer in each view, and what is learned from that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from servetune.adapters import consensus
from servetune.adapters.features import tensors
from servetune.adapters.policy import Observation
from servetune.adapters.types import Query

FEW = 16  # answers; more of them are a label set that one image tells little about


@dataclass(slots=True)
class Ballot:
    """One query's answers, how likely the reference finds each in each view, and what learning from it needs."""

    query: Query  # without its images
    answers: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    scores: dict[str, Tensor]  # view -> (M,) log-probabilities over the answers, normalised
    observations: dict[str, Observation]  # the views to learn from
    embedding: Tensor  # (D,) mean vision feature
    valid: float  # share of the rollouts with a valid answer; 1 in a closed set
    measured: bool  # looked at in all views
    witness: bool = False  # votes, but is never learned from: the gate asks it
    updates: int = 0
    rounds: int = 1  # of voting
    votes: dict[str, Tensor] = field(default_factory=dict)  # as scores; in the first round those

    def __post_init__(self) -> None:
        self.votes = self.votes or self.scores

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors that are kept to learn from."""
        kept = ([one.prompt.inputs, one.features] for one in self.observations.values())
        return sum(tensor.nbytes for one in kept for tensor in tensors(one))


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a ballot teaches: the vote as probabilities of its answers, and what is made of it to learn from."""

    ballot: Ballot
    vote: Tensor  # (M,)
    target: Tensor  # (M,), sharpened
    prior: Tensor  # (M,) log of how often the stream shows each answer; alike in a long list of labels
    shown: Tensor  # (M,) bool: whether the stream shows the answer; else its target is the reference's probability
    divergence: float  # KL(target || reference on the image as it was sent), nats
    dependence: float | None  # as `Memory.dependence`, of this question; None if it was asked too seldom to tell
    rehearsed: bool = False  # its votes tell nothing new, so it teaches nothing; it is to be answered as before

    @property
    def majority(self) -> float:
        """Share of the answer with the most votes."""
        return float(self.vote.max())


def has_few_answers(query: Query) -> bool:
    """Whether a query is an open question or offers a short list of labels."""
    return len(query.labels) <= FEW


def by_question(ballots: Iterable[Ballot]) -> list[list[Ballot]]:
    """The ballots, by question and labels."""
    kinds: dict[tuple[str, tuple[str, ...]], list[Ballot]] = {}
    for ballot in ballots:
        kinds.setdefault((ballot.query.question, ballot.query.labels), []).append(ballot)
    return list(kinds.values())


def columns_of(ballots: Sequence[Ballot]) -> dict[str, int]:
    """A column for each answer that any of the ballots has."""
    if len({ballot.answers for ballot in ballots}) == 1:
        return {answer: column for column, answer in enumerate(ballots[0].answers)}
    return consensus.common_space([ballot.answers for ballot in ballots])


def places_of(ballot: Ballot, columns: Mapping[str, int]) -> list[int]:
    """The columns of the answers of one ballot."""
    return [columns[answer] for answer in ballot.answers]


def table_of(ballots: Sequence[Ballot], columns: Mapping[str, int], rows: Sequence[Tensor]) -> Tensor:
    """(N, L) log-probabilities from one row per ballot; answers that a query did not get are very unlikely."""
    table = torch.full((len(rows), len(columns)), consensus.FLOOR)
    if len({ballot.answers for ballot in ballots}) == 1:
        table = torch.stack(list(rows))
    else:
        for index, (ballot, row) in enumerate(zip(ballots, rows, strict=True)):
            table[index, places_of(ballot, columns)] = row
    return table.clamp(min=consensus.FLOOR)
