"""The queries that a learner has lately seen, how they were voted on, and what they therefore teach."""

from __future__ import annotations

import operator
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
MIN_ASKED = 4  # images about which a question must have been asked to be judged by itself
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
    rounds: int = 1  # of voting
    votes: dict[str, Tensor] = field(default_factory=dict)  # as scores; in the first round those

    def __post_init__(self) -> None:
        self.votes = self.votes or self.scores

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors that are kept to learn from."""
        tensors = (v for one in self.observations.values() for v in _tensors([one.prompt.inputs, one.features]))
        return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a ballot teaches: the vote as probabilities of its answers, and what is made of it to learn from."""

    ballot: Ballot
    vote: Tensor  # (M,)
    target: Tensor  # (M,), sharpened
    divergence: float  # KL(target || reference on the image as it was sent), nats
    dependence: float | None  # as `Memory.dependence`, of this question; None if it was asked too seldom to tell

    @property
    def majority(self) -> float:
        """Share of the answer with the most votes."""
        return float(self.vote.max())


@dataclass(slots=True)
class Memory:
    """The last ballots of one adapter line: at most `size`, and at most `max_bytes` of tensors to learn from."""

    size: int = 1024
    max_bytes: int = 1_000_000_000
    temperature: float = 0.5
    _ballots: deque[Ballot] = field(init=False)
    _bytes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._ballots = deque()

    def __len__(self) -> int:
        return len(self._ballots)

    def add(self, ballot: Ballot) -> None:
        """Keep a ballot; one of the same query is replaced."""
        self.forget([ballot.query.id])
        self._ballots.append(ballot)
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
        self._bytes = sum(ballot.num_bytes for ballot in self._ballots)

    def measure(self) -> dict[str, float]:
        """What each view is worth: mutual information of images and answers, in nats, over all questions together.

        Taken over queries that were looked at in all views; empty before there are enough.
        """
        kinds: dict[tuple[str, ...], list[Ballot]] = {}
        for ballot in self._ballots:
            if ballot.measured:
                kinds.setdefault(tuple(ballot.scores), []).append(ballot)
        measured = max(kinds.values(), key=len, default=[])[-MEASURED:]
        if len(measured) < MIN_MEASURED:
            return {}
        columns = _columns(measured)
        return {
            view: consensus.mutual_information(
                _table(measured, columns, [ballot.scores[view] for ballot in measured]).log_softmax(-1)
            )
            for view in measured[0].scores
        }

    def lessons(self) -> list[Lesson]:
        """What every ballot teaches, given all the others."""
        information = self.measure()
        return [lesson for ballots in self._kinds() for lesson in self._lessons(ballots, information)]

    def dependence(self) -> float | None:
        """How much the votes depend on the image: mutual information among votes on the same question, in nats.

        None where no question was asked about two images. Votes on different questions differ whatever the images
        show, so each question counts for itself, by how often it was asked.
        """
        information = self.measure()
        repeated = [ballots for ballots in self._kinds() if len(ballots) > 1]
        found = [consensus.mutual_information(_pooled(ballots, information)) for ballots in repeated]
        sizes = [len(ballots) for ballots in repeated]
        return sum(map(operator.mul, sizes, found)) / sum(sizes) if repeated else None

    def _kinds(self) -> Iterable[list[Ballot]]:
        """The ballots, by question and labels."""
        kinds: dict[tuple[str, tuple[str, ...]], list[Ballot]] = {}
        for ballot in self._ballots:
            kinds.setdefault((ballot.query.question, ballot.query.labels), []).append(ballot)
        return kinds.values()

    def _lessons(self, ballots: list[Ballot], information: dict[str, float]) -> list[Lesson]:
        """The lessons of one kind: the same question about different images."""
        columns = _columns(ballots)
        logvotes = _pooled(ballots, information)
        dependence = consensus.mutual_information(logvotes) if len(ballots) >= MIN_ASKED else None
        reference = _table(ballots, columns, [ballot.scores[SAME] for ballot in ballots])
        closed = bool(ballots[0].query.labels)
        if closed:
            neighbours = consensus.mutual_neighbours(torch.stack([b.embedding for b in ballots]))
            logvotes = ((logvotes + logvotes[neighbours]) / 2).log_softmax(-1)
        if closed and min(len(ballots), len(columns)) >= MIN_BALANCED:
            logvotes = (logvotes - consensus.balance(logvotes)).log_softmax(-1)
        targets = (logvotes / self.temperature).softmax(-1)
        if closed and len(ballots) > 1:  # one query alone says nothing about what the stream shows
            shown = torch.zeros(len(columns), dtype=torch.bool)
            shown[logvotes.argmax(-1)] = True
            targets = consensus.keep_unshown(targets, reference.exp(), shown)
        divergences = (targets * (targets.clamp(min=1e-9).log() - reference)).sum(-1).tolist()
        lessons = []
        for ballot, vote, target, divergence in zip(ballots, logvotes.exp(), targets, divergences, strict=True):
            own = slice(None) if closed else _places(ballot, columns)
            lessons.append(Lesson(ballot, vote[own], target[own] / target[own].sum(), divergence, dependence))
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


def _columns(ballots: Sequence[Ballot]) -> dict[str, int]:
    """A column for each answer that any of the ballots has."""
    if len({ballot.answers for ballot in ballots}) == 1:
        return {answer: column for column, answer in enumerate(ballots[0].answers)}
    return consensus.common_space([ballot.answers for ballot in ballots])


def _places(ballot: Ballot, columns: Mapping[str, int]) -> list[int]:
    return [columns[answer] for answer in ballot.answers]


def _table(ballots: Sequence[Ballot], columns: Mapping[str, int], rows: Sequence[Tensor]) -> Tensor:
    """(N, L) log-probabilities from one row per ballot; answers that a query did not get are very unlikely."""
    table = torch.full((len(rows), len(columns)), consensus.FLOOR)
    if len({ballot.answers for ballot in ballots}) == 1:
        table = torch.stack(list(rows))
    else:
        for index, (ballot, row) in enumerate(zip(ballots, rows, strict=True)):
            table[index, _places(ballot, columns)] = row
    return table.clamp(min=consensus.FLOOR)


def _pooled(ballots: Sequence[Ballot], information: Mapping[str, float]) -> Tensor:
    """(N, L) normalised votes: mean log-probability over views, weighted by what each is worth on this stream."""
    kinds = {tuple(ballot.votes) for ballot in ballots}
    weights = {views: torch.tensor(_weights(views, information)) for views in kinds}
    rows = [weights[tuple(b.votes)] @ torch.stack(list(b.votes.values())) for b in ballots]
    return _table(ballots, _columns(ballots), rows).log_softmax(-1)


def _weights(views: Sequence[str], information: Mapping[str, float]) -> list[float]:
    if any(view not in information for view in views):
        return [1 / len(views)] * len(views)
    return list(consensus.view_weights({view: information[view] for view in views}).values())
