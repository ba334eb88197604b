"""What a view of an image is worth: how much more its answers tell, found without labels on many queries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from servetune.adapters import consensus
from servetune.adapters.ballots import Ballot, by_question, columns_of, has_few_answers, table_of
from servetune.adapters.types import Query
from servetune.adapters.views import SAME

MEASURED = 64  # the views are compared on the last so many queries that were looked at in all of them
MEASURED_FEW = 512  # among few answers: on the last so many queries, each view on those that were looked at in it
MIN_MEASURED = 8
DOUBT = 2.0  # weight of a view's mean entropy among few answers
LEAD = 0.02  # nats, two standard errors below the mean, by which a view must tell more than the image as sent


@dataclass(frozen=True, slots=True)
class Worth:
    """What each view is worth, in nats, among few answers and among many. Empty before there is enough to tell.

    Among many, mutual information of images and answers over all questions together, taken over queries that
    were looked at in all views. Among few, the mutual information on one question, less the mean entropy: how
    often the few answers are given says more about the stream than the view.
    """

    among_few: dict[str, float]
    among_many: dict[str, float]
    tells_more: bool
    """Whether some view tells more about images with few answers than the image as it was sent, beyond chance.

    The votes on open questions are over views alone. Where no view tells more, as where parts of the image are
    hidden, they know what the model knows.
    """

    def of(self, query: Query) -> dict[str, float]:
        """What each view is worth for a query."""
        return self.among_few if has_few_answers(query) else self.among_many

    def weights(self, query: Query, views: Sequence[str]) -> Tensor:
        """(V,) of views in the vote on a query; one that is not yet known is worth what the least is."""
        worth = self.of(query)
        if not worth:
            return torch.full((len(views),), 1 / len(views))
        least = min(worth.values())
        known = {view: worth.get(view, least) for view in views}
        return torch.tensor([*consensus.view_weights(known).values()])


def weigh(ballots: Sequence[Ballot]) -> Worth:
    """The worth of views, from what a stream was voted on."""
    few, many = ([b for b in ballots if has_few_answers(b.query) == kind] for kind in (True, False))
    leads = _leads(few[-MEASURED_FEW:])
    among_few = {view: float(lead.mean()) for view, lead in leads.items()}
    return Worth(among_few, _among_many(many), any(_at_least(lead) >= LEAD for lead in leads.values()))


def _among_many(ballots: Sequence[Ballot]) -> dict[str, float]:
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
    kinds = [kind for kind in by_question(ballots) if len(kind) > 1] or [list(ballots)]
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
    return consensus.mutual_information(table_of(ballots, columns_of(ballots), rows).log_softmax(-1))
