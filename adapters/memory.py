"""The queries that a learner has lately seen, how they were voted on, and what they therefore teach."""

from __future__ import annotations

import operator
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from servetune.adapters import consensus
from servetune.adapters.ballots import (
    Ballot,
    Lesson,
    by_question,
    columns_of,
    has_few_answers,
    places_of,
    table_of,
)
from servetune.adapters.views import SAME
from servetune.adapters.worth import Worth, weigh

PSEUDO_COUNT = 1.0  # votes that every one of few answers has beforehand
MIN_ASKED = 4  # images about which a question must have been asked to be judged by itself
KEPT = 0.2  # of an open question's target at most is for answers that its stream does not show
SHOWN = 0.1  # of the commonest answer's wins, below which an open question's stream does not show an answer
POLAR = {"yes", "no"}  # a stream that shows one shows the other: it is what else there is to say
SOME_VOTES, MOST_VOTES = 0.01, 0.7  # shares, for telling wordings of one question by their answers
MIN_BALANCED = 8  # labels, and queries, from which balancing makes sense


@dataclass(slots=True)
class Memory:
    """The last ballots of one adapter line: at most `size`, and at most `max_bytes` of tensors to learn from."""

    size: int = 1024
    max_bytes: int = 1_000_000_000
    temperature: float = 0.5
    _ballots: deque[Ballot] = field(init=False)
    _bytes: int = field(default=0, init=False)
    _worth: Worth | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._ballots = deque()

    def __len__(self) -> int:
        return len(self._ballots)

    def add(self, ballot: Ballot) -> None:
        """Keep a ballot; one of the same query is replaced."""
        self.forget([ballot.query.id])
        self._ballots.append(ballot)
        self._worth = None
        self._bytes += ballot.num_bytes
        while len(self._ballots) > max(1, self.size) or (self._bytes > self.max_bytes and len(self._ballots) > 1):
            self._bytes -= self._ballots.popleft().num_bytes

    def ids(self) -> set[str]:
        """Of the queries remembered."""
        return {ballot.query.id for ballot in self._ballots}

    def forget(self, ids: Iterable[str] | None = None) -> None:
        """Drop the ballots of some queries, or all."""
        gone = self.ids()
        gone &= gone if ids is None else set(ids)
        if not gone:
            return
        self._ballots = deque(b for b in self._ballots if b.query.id not in gone)
        self._bytes = sum(ballot.num_bytes for ballot in self._ballots)
        self._worth = None

    def worth(self) -> Worth:
        """What each view is worth on this stream."""
        if self._worth is None:
            self._worth = weigh(self._ballots)
        return self._worth

    def lessons(self, later_rounds: bool = True) -> list[Lesson]:
        """What every ballot teaches, given all the others, in the order in which they came.

        Without `later_rounds` only the reference votes.
        """
        found: dict[str, Lesson] = {}
        questions = [(ballots, self._pooled(ballots, later_rounds)) for ballots in self._kinds()]
        wordings = _wordings(questions)
        alone = [self._information(*question) for question in questions]
        dependences, shown = _dependences(questions, alone, wordings), _shown(questions, wordings)
        for (ballots, logvotes), dependence, answers in zip(questions, dependences, shown, strict=True):
            lessons = _lessons(ballots, logvotes, dependence, answers, self.temperature)
            one_answer = answers is not None and len(answers) == 1  # it can be given without looking
            if one_answer or not (ballots[0].query.labels or self.worth().tells_more):
                lessons = [replace(lesson, rehearsed=True) for lesson in lessons]
            found |= {lesson.ballot.query.id: lesson for lesson in lessons}
        return _with_priors([found[ballot.query.id] for ballot in self._ballots])

    def dependence(self) -> float | None:
        """How much the votes depend on the image, in nats: information among votes on the same question.

        None where no question was asked about two images. Votes on different questions differ whatever the images
        show, so each question counts for itself, by how often it was asked.
        """
        repeated = [ballots for ballots in self._kinds() if len(ballots) > 1]
        found = [self._information(ballots, self._pooled(ballots)) for ballots in repeated]
        sizes = [len(ballots) for ballots in repeated]
        return sum(map(operator.mul, sizes, found)) / sum(sizes) if repeated else None

    def _information(self, ballots: Sequence[Ballot], logvotes: Tensor) -> float:
        """How much votes on one question depend on the image, in nats.

        Among many labels every look at nothing finds something else: there only what looks say alike counts.
        """
        if has_few_answers(ballots[0].query) or min(len(ballot.votes) for ballot in ballots) < 2:
            return consensus.mutual_information(logvotes)
        return consensus.repeated_information(*(self._half(ballots, half) for half in (0, 1)))

    def _half(self, ballots: Sequence[Ballot], half: int) -> Tensor:
        """(N, L) normalised votes of every other view, in the order of their worth."""
        rows = []
        for ballot in ballots:
            worth = self.worth().weights(ballot.query, [*ballot.votes])
            weights = dict(zip(ballot.votes, worth.tolist(), strict=True))
            views = sorted(weights, key=weights.__getitem__, reverse=True)[half::2]
            shares = torch.tensor([weights[view] for view in views]).clamp(min=1e-9)
            rows.append(shares / shares.sum() @ torch.stack([ballot.votes[view] for view in views]))
        return table_of(ballots, columns_of(ballots), rows).log_softmax(-1)

    def _kinds(self) -> list[list[Ballot]]:
        return by_question(self._ballots)

    def _pooled(self, ballots: Sequence[Ballot], later_rounds: bool = True) -> Tensor:
        """(N, L) normalised votes on one question: mean log-probability over views, weighted by their worth."""
        worth, query = self.worth(), ballots[0].query
        votes = [ballot.votes if later_rounds else ballot.scores for ballot in ballots]
        weights = {views: worth.weights(query, views) for views in map(tuple, votes)}
        rows = [weights[tuple(each)] @ torch.stack(list(each.values())) for each in votes]
        return table_of(ballots, columns_of(ballots), rows).log_softmax(-1)


_Question = tuple[list[Ballot], Tensor]
"""The ballots on one question with their (N, L) log-votes."""


def _shown(questions: Sequence[_Question], wordings: Sequence[list[int]]) -> list[set[str] | None]:
    """The answers of each open question that its stream shows; None where it was asked too seldom, and of labels.

    Over all its wordings, they win at least SHOWN times as many votes as the commonest answer.
    """
    grouped = {number for numbers in wordings for number in numbers}
    alone = [n for n, (ballots, _) in enumerate(questions) if n not in grouped and not ballots[0].query.labels]
    groups = [*wordings, *([number] for number in alone)]
    found: list[set[str] | None] = [None] * len(questions)
    for numbers in groups:
        wins: Counter[str] = Counter()
        for ballots, logvotes in (questions[number] for number in numbers):
            answers = [*columns_of(ballots)]
            wins.update(answers[place] for place in logvotes.argmax(-1).tolist())
        if wins.total() >= MIN_ASKED:
            shown = {answer for answer, won in wins.items() if won >= SHOWN * max(wins.values())}
            if shown & POLAR:
                shown |= POLAR
            for number in numbers:
                found[number] = shown
    return found


def _dependences(
    questions: Sequence[_Question], alone: Sequence[float], wordings: Sequence[list[int]]
) -> list[float | None]:
    """How much votes on each question depend on the image: `alone`, and with those on its other wordings.

    The lower of the two counts, where MIN_ASKED images at least were asked about.
    """
    found = [
        [own] if len(ballots) >= MIN_ASKED else [] for (ballots, _), own in zip(questions, alone, strict=True)
    ]
    for numbers in wordings:
        logvotes = _together([questions[number] for number in numbers])
        if len(logvotes) >= MIN_ASKED:
            dependence = consensus.mutual_information(logvotes)
            for number in numbers:
                found[number].append(dependence)
    return [min(each) if each else None for each in found]


def _together(questions: Sequence[_Question]) -> Tensor:
    """(N, L) log-votes on several questions, over the answers of all."""
    columns = consensus.common_space([tuple(columns_of(ballots)) for ballots, _ in questions])
    tables = []
    for ballots, logvotes in questions:
        table = torch.full((len(ballots), len(columns)), consensus.FLOOR)
        table[:, [columns[answer] for answer in columns_of(ballots)]] = logvotes
        tables.append(table)
    return torch.cat(tables).log_softmax(-1)


def _wordings(questions: Sequence[_Question]) -> list[list[int]]:
    """Numbers of open questions that ask for the same, told by their answers."""
    groups: list[tuple[Counter[str], list[int]]] = []
    for number, (ballots, logvotes) in enumerate(questions):
        if not ballots[0].query.labels:
            votes = zip(columns_of(ballots), logvotes.exp().sum(0).tolist(), strict=True)
            groups.append((Counter(dict(votes)), [number]))
    groups.sort(key=lambda group: -group[0].total())
    for index in reversed(range(len(groups))):  # the rarest joins the most common that covers it
        own, numbers = groups[index]
        host = next((group for group in groups[:index] if _covers(group[0], own)), None)
        if host:
            host[0].update(own)
            host[1].extend(numbers)
            del groups[index]
    return [numbers for _, numbers in groups if len(numbers) > 1]


def _covers(votes: Counter[str], others: Counter[str]) -> bool:
    """Whether most of the other votes are for answers that have some votes here."""
    least = SOME_VOTES * votes.total()
    return sum(share for answer, share in others.items() if votes[answer] >= least) >= MOST_VOTES * others.total()


def _lessons(
    ballots: list[Ballot],
    logvotes: Tensor,
    dependence: float | None,
    answers: set[str] | None,
    temperature: float,
) -> list[Lesson]:
    """The lessons of one kind: the same question about different images; `answers` are those that are shown."""
    columns = columns_of(ballots)
    reference = table_of(ballots, columns, [ballot.scores[SAME] for ballot in ballots])
    closed = bool(ballots[0].query.labels)
    if closed:
        neighbours = consensus.mutual_neighbours(torch.stack([b.embedding for b in ballots]))
        logvotes = ((logvotes + logvotes[neighbours]) / 2).log_softmax(-1)
    if closed and min(len(ballots), len(columns)) >= MIN_BALANCED:
        logvotes = (logvotes - consensus.balance(logvotes)).log_softmax(-1)
    targets = (logvotes / temperature).softmax(-1)
    shown = torch.ones(len(columns), dtype=torch.bool)
    if closed and len(ballots) > 1:  # one query alone says nothing about what the stream shows
        shown[:] = False
        shown[logvotes.argmax(-1)] = True
    elif not closed and answers is not None:
        shown = torch.tensor([answer in answers for answer in columns])
    targets = consensus.keep_unshown(targets, reference.exp(), shown, 1.0 if closed else KEPT)
    divergences = (targets * (targets.clamp(min=1e-9).log() - reference)).sum(-1).tolist()
    lessons = []
    for ballot, vote, target, divergence in zip(ballots, logvotes.exp(), targets, divergences, strict=True):
        own = slice(None) if closed else places_of(ballot, columns)
        shares = target[own] / target[own].sum()
        flat = torch.zeros_like(shares)
        lessons.append(Lesson(ballot, vote[own], shares, flat, shown[own], divergence, dependence))
    return lessons


def _with_priors(lessons: Sequence[Lesson]) -> list[Lesson]:
    """Set what share of all votes among few answers each answer has, whatever the question."""
    shown: defaultdict[str, float] = defaultdict(lambda: PSEUDO_COUNT)
    for lesson in lessons:
        if has_few_answers(lesson.ballot.query):
            for answer, share in zip(lesson.ballot.answers, lesson.target.tolist(), strict=True):
                shown[answer] += share
    return [
        replace(lesson, prior=torch.tensor([shown[a] for a in lesson.ballot.answers]).log())
        if has_few_answers(lesson.ballot.query)
        else lesson
        for lesson in lessons
    ]
