"""The queries that a learner has lately seen, how they were voted on, and what they therefore teach."""

from __future__ import annotations

import math
import operator
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from servetune.adapters import consensus
from servetune.adapters.features import tensors
from servetune.adapters.policy import Observation
from servetune.adapters.types import Query
from servetune.adapters.views import SAME

MEASURED = 64  # the views are compared on the last so many queries that were looked at in all of them
MEASURED_FEW = 512  # among few answers: on the last so many queries, each view on those that were looked at in it
MIN_MEASURED = 8
FEW = 16  # answers; more of them are a label set that one image tells little about
PSEUDO_COUNT = 1.0  # votes that every one of few answers has beforehand
DOUBT = 2.0  # weight of a view's mean entropy among few answers
LEAD = 0.02  # nats, two standard errors below the mean, by which a view must tell more than the image as sent
MIN_ASKED = 4  # images about which a question must have been asked to be judged by itself
KEPT = 0.2  # of an open question's target at most is for answers that its stream does not show
SHOWN = 0.1  # of the commonest answer's wins, below which an open question's stream does not show an answer
POLAR = {"yes", "no"}  # a stream that shows one shows the other: it is what else there is to say
SOME_VOTES, MOST_VOTES = 0.01, 0.7  # shares, for telling wordings of one question by their answers
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


@dataclass(slots=True)
class Memory:
    """The last ballots of one adapter line: at most `size`, and at most `max_bytes` of tensors to learn from."""

    size: int = 1024
    max_bytes: int = 1_000_000_000
    temperature: float = 0.5
    _ballots: deque[Ballot] = field(init=False)
    _bytes: int = field(default=0, init=False)
    _worth: dict[bool, dict[str, float]] | None = field(default=None, init=False)
    _tell_more: bool = field(default=False, init=False)

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

    def worth(self) -> dict[bool, dict[str, float]]:
        """What each view is worth, in nats, among few answers (True) and among many.

        Among many, mutual information of images and answers over all questions together, taken over queries that
        were looked at in all views. Among few, the mutual information on one question, less the mean entropy: how
        often the few answers are given says more about the stream than the view. Empty before there is enough.
        """
        if self._worth is None:
            few, many = ([b for b in self._ballots if has_few_answers(b.query) == kind] for kind in (True, False))
            leads = _leads(few[-MEASURED_FEW:])
            among_few = {view: float(lead.mean()) for view, lead in leads.items()}
            self._worth = {True: among_few, False: _worth_among_many(many)}
            self._tell_more = any(_at_least(lead) >= LEAD for lead in leads.values())
        return self._worth

    def views_tell_more(self) -> bool:
        """Whether some view tells more about images with few answers than the image as it was sent, beyond chance.

        The votes on open questions are over views alone. Where no view tells more, as where parts of the image are
        hidden, they know what the model knows.
        """
        self.worth()
        return self._tell_more

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
            if one_answer or not (ballots[0].query.labels or self.views_tell_more()):
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
        worth = self.worth()[has_few_answers(ballots[0].query)]
        rows = []
        for ballot in ballots:
            weights = dict(zip(ballot.votes, _weights([*ballot.votes], worth), strict=True))
            views = sorted(weights, key=weights.__getitem__, reverse=True)[half::2]
            shares = torch.tensor([weights[view] for view in views]).clamp(min=1e-9)
            rows.append(shares / shares.sum() @ torch.stack([ballot.votes[view] for view in views]))
        return _table(ballots, _columns(ballots), rows).log_softmax(-1)

    def _kinds(self) -> list[list[Ballot]]:
        return _by_question(self._ballots)

    def _pooled(self, ballots: Sequence[Ballot], later_rounds: bool = True) -> Tensor:
        """(N, L) normalised votes on one question: mean log-probability over views, weighted by their worth."""
        worth = self.worth()[has_few_answers(ballots[0].query)]
        votes = [ballot.votes if later_rounds else ballot.scores for ballot in ballots]
        weights = {views: torch.tensor(_weights(views, worth)) for views in map(tuple, votes)}
        rows = [weights[tuple(each)] @ torch.stack(list(each.values())) for each in votes]
        return _table(ballots, _columns(ballots), rows).log_softmax(-1)


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
            answers = [*_columns(ballots)]
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
    columns = consensus.common_space([tuple(_columns(ballots)) for ballots, _ in questions])
    tables = []
    for ballots, logvotes in questions:
        table = torch.full((len(ballots), len(columns)), consensus.FLOOR)
        table[:, [columns[answer] for answer in _columns(ballots)]] = logvotes
        tables.append(table)
    return torch.cat(tables).log_softmax(-1)


def _wordings(questions: Sequence[_Question]) -> list[list[int]]:
    """Numbers of open questions that ask for the same, told by their answers."""
    groups: list[tuple[Counter[str], list[int]]] = []
    for number, (ballots, logvotes) in enumerate(questions):
        if not ballots[0].query.labels:
            votes = zip(_columns(ballots), logvotes.exp().sum(0).tolist(), strict=True)
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
    columns = _columns(ballots)
    reference = _table(ballots, columns, [ballot.scores[SAME] for ballot in ballots])
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
        own = slice(None) if closed else _places(ballot, columns)
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


def has_few_answers(query: Query) -> bool:
    """Whether a query is an open question or offers a short list of labels."""
    return len(query.labels) <= FEW


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


def _worth_among_many(ballots: Sequence[Ballot]) -> dict[str, float]:
    kinds: dict[tuple[str, ...], list[Ballot]] = {}
    for ballot in ballots:
        if ballot.measured:
            kinds.setdefault(tuple(ballot.scores), []).append(ballot)
    measured = max(kinds.values(), key=len, default=[])[-MEASURED:]
    if len(measured) < MIN_MEASURED:
        return {}
    return {view: _information_in(measured, view) for view in measured[0].scores}


def _leads(ballots: Sequence[Ballot]) -> dict[str, Tensor]:
    """By how many nats each view is clearer than the image as sent, on each query looked at in that view."""
    found = {}
    for view in dict.fromkeys(view for ballot in ballots for view in ballot.scores):
        seen = [ballot for ballot in ballots if view in ballot.scores]
        if len(seen) >= MIN_MEASURED:
            found[view], as_sent = _clarity(seen, (view, SAME))
            found[view] -= as_sent
    return found


def _clarity(ballots: Sequence[Ballot], views: Sequence[str]) -> list[Tensor]:
    """(N,) in each view: what each query adds to the mutual information, less DOUBT times its answers' entropy.

    The information is that on one question, KL(p || mean p) in nats. Queries on a question that was asked once are
    left out where others were asked again.
    """
    kinds = [kind for kind in _by_question(ballots) if len(kind) > 1] or [list(ballots)]
    cells: dict[tuple[int, str], int] = {}  # of one question's answers
    places = [
        cells.setdefault((number, answer), len(cells))
        for number, kind in enumerate(kinds)
        for ballot in kind
        for answer in ballot.answers
    ]
    place, asked = torch.tensor(places), torch.tensor([float(len(kinds[number])) for number, _ in cells])
    repeated = [ballot for kind in kinds for ballot in kind]
    owner = torch.arange(len(repeated)).repeat_interleave(torch.tensor([len(b.answers) for b in repeated]))
    found = []
    for view in views:
        shares = torch.cat([ballot.scores[view] for ballot in repeated]).exp()
        means = torch.zeros(len(cells)).index_add_(0, place, shares) / asked
        terms = (1 + DOUBT) * torch.special.xlogy(shares, shares) - torch.special.xlogy(shares, means[place])
        found.append(torch.zeros(len(repeated)).index_add_(0, owner, terms))
    return found


def _at_least(values: Tensor) -> float:
    """Two standard errors below the mean; of one value, nothing is known."""
    return float(values.mean() - 2 * values.std() / math.sqrt(len(values))) if len(values) > 1 else -math.inf


def _information_in(ballots: Sequence[Ballot], view: str) -> float:
    rows = [ballot.scores[view] for ballot in ballots]
    return consensus.mutual_information(_table(ballots, _columns(ballots), rows).log_softmax(-1))


def _by_question(ballots: Iterable[Ballot]) -> list[list[Ballot]]:
    """The ballots, by question and labels."""
    kinds: dict[tuple[str, tuple[str, ...]], list[Ballot]] = {}
    for ballot in ballots:
        kinds.setdefault((ballot.query.question, ballot.query.labels), []).append(ballot)
    return list(kinds.values())


def _weights(views: Sequence[str], worth: Mapping[str, float]) -> list[float]:
    """Of each view in the vote; one that is not yet known is worth what the least is."""
    if not worth:
        return [1 / len(views)] * len(views)
    least = min(worth.values())
    return list(consensus.view_weights({view: worth.get(view, least) for view in views}).values())
