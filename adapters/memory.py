"""The queries that a learner has lately seen, how they were voted on, and what they therefore teach."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from servetune.adapters import consensus
from servetune.adapters.policy import Observation
from servetune.adapters.types import Query
from servetune.adapters.views import SAME

MEASURED = 64  # the views are compared on the last so many queries that were looked at in all of them
MIN_MEASURED = 8
MIN_BALANCED = 8  # labels, and queries, from which balancing makes sense


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

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors that are kept to learn from."""
        tensors = (v for one in self.observations.values() for v in _tensors([one.prompt.inputs, one.features]))
        return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a ballot teaches: probabilities over its answers, and how sure the vote was."""

    ballot: Ballot
    target: Tensor  # (M,)
    majority: float
    divergence: float  # KL(vote || reference on the image as it was sent), nats


@dataclass(slots=True)
class Memory:
    """The last ballots of one adapter line: at most `size`, and at most `max_bytes` of tensors to learn from."""

    size: int = 1024
    max_bytes: int = 1_000_000_000
    temperature: float = 0.5
    _ballots: deque[Ballot] = field(init=False)
    _information: dict[str, float] | None = field(default=None, init=False)
    _bytes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._ballots = deque()

    def __len__(self) -> int:
        return len(self._ballots)

    def add(self, ballot: Ballot) -> None:
        """Keep a ballot; one of the same query is replaced."""
        self.forget([ballot.query.id])
        self._ballots.append(ballot)
        self._information = None
        self._bytes += ballot.num_bytes
        while len(self._ballots) > max(1, self.size) or (self._bytes > self.max_bytes and len(self._ballots) > 1):
            self._bytes -= self._ballots.popleft().num_bytes

    def forget(self, ids: Iterable[str] | None = None) -> None:
        """Drop the ballots of some queries, or all."""
        gone = {b.query.id for b in self._ballots}
        gone &= gone if ids is None else set(ids)
        if not gone:
            return
        self._ballots = deque(b for b in self._ballots if b.query.id not in gone)
        self._information = None
        self._bytes = sum(ballot.num_bytes for ballot in self._ballots)

    def information(self) -> dict[str, float]:
        """Mutual information per view, over queries that were looked at in all of them; empty before there are."""
        if self._information is None:
            self._information = self._measure()
        return self._information

    def _measure(self) -> dict[str, float]:
        kinds: dict[tuple[str, ...], list[Ballot]] = {}
        for ballot in self._ballots:
            if ballot.measured:
                kinds.setdefault(tuple(ballot.scores), []).append(ballot)
        measured = max(kinds.values(), key=len, default=[])[-MEASURED:]
        if len(measured) < MIN_MEASURED:
            return {}
        columns = consensus.common_space([ballot.answers for ballot in measured])
        found = {}
        for view in measured[0].scores:
            rows = [_spread(ballot.answers, ballot.scores[view], columns) for ballot in measured]
            found[view] = consensus.mutual_information(torch.stack(rows).log_softmax(-1))
        return found

    def lessons(self) -> list[Lesson]:
        """What every ballot teaches, given all the others."""
        information = self.information()
        kinds: dict[tuple[str, tuple[str, ...]], list[Ballot]] = {}
        for ballot in self._ballots:
            kinds.setdefault((ballot.query.question, ballot.query.labels), []).append(ballot)
        return [lesson for ballots in kinds.values() for lesson in self._lessons(ballots, information)]

    def _lessons(self, ballots: list[Ballot], information: dict[str, float]) -> list[Lesson]:
        """The lessons of one kind: the same question about different images."""
        columns = consensus.common_space([ballot.answers for ballot in ballots])
        votes = [_spread(b.answers, _pool_views(b, information), columns) for b in ballots]
        logvotes = torch.stack(votes).log_softmax(-1)
        closed = bool(ballots[0].query.labels)
        if closed:
            neighbours = consensus.mutual_neighbours(torch.stack([b.embedding for b in ballots]))
            logvotes = ((logvotes + logvotes[neighbours]) / 2).log_softmax(-1)
        if closed and min(len(ballots), len(columns)) >= MIN_BALANCED:
            logvotes = (logvotes - consensus.balance(logvotes)).log_softmax(-1)
        shown = torch.zeros(len(columns), dtype=torch.bool)
        shown[logvotes.argmax(-1)] = True
        lessons = []
        for ballot, row in zip(ballots, logvotes, strict=True):
            own = torch.tensor([columns[answer] for answer in ballot.answers])
            reference = ballot.scores[SAME]
            target = (row[own] / self.temperature).softmax(-1)
            if closed:
                target = consensus.keep_unshown(target, reference.exp(), shown[own])
            divergence = (target * (target.clamp(min=1e-9).log() - reference)).sum()
            lessons.append(Lesson(ballot, target, float(row.exp().max()), float(divergence)))
        return lessons


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _pool_views(ballot: Ballot, information: dict[str, float]) -> Tensor:
    """(M,) the mean log-probability over views, weighted by what each is worth on this stream."""
    known = {view: information[view] for view in ballot.scores if view in information}
    weights = consensus.view_weights(known) if len(known) == len(ballot.scores) else None
    total = torch.zeros(len(ballot.answers))
    for view, scores in ballot.scores.items():
        total += scores * (weights[view] if weights else 1 / len(ballot.scores))
    return total


def _spread(answers: Sequence[str], logprobs: Tensor, columns: dict[str, int]) -> Tensor:
    """(L,) log-probabilities in the common space; answers that the query did not get are very unlikely."""
    row = torch.full((len(columns),), consensus.FLOOR)
    row[torch.tensor([columns[answer] for answer in answers])] = logprobs.clamp(min=consensus.FLOOR)
    return row
