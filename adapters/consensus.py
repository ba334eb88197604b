"""What many looks at many images agree on: votes of one stream, as pure functions of log-probabilities.

A query's votes are pooled three times. Over views: a view counts by how much its answers depend on the image. Over
neighbours: two images that are each other's nearest are taken for the same thing. Over the stream: labels that are
given far more often than others lose, within bounds. Nothing here needs a label or a trained part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

FLOOR = -20.0
SMOOTH = 0.1  # of a look's answer is whatever the stream's answers are


def mutual_information(logprobs: Tensor) -> float:
    """I(image; answer) in nats of answers to N images: H(mean p) - mean H(p), the criterion of RIM (Krause 2010).

    Args:
        logprobs: (N, L), each row normalised.

    Answers that do not depend on the image have none, and neither have answers that are all uncertain.
    """
    shares = logprobs.exp()
    mean = shares.mean(0)
    whole = -(mean * mean.clamp(min=1e-12).log()).sum()
    each = -(shares * logprobs.clamp(min=FLOOR)).sum(-1).mean()
    return float(whole - each)


def repeated_information(first: Tensor, second: Tensor) -> float:
    """What two looks at each of N images say alike about it, in nats: E[log q(y | x) / mean q(y)], y drawn from p.

    p and q are the looks' answers, each in both parts. Only what the image shows can raise it: looks that differ
    by themselves, whatever they look at, say nothing alike. An answer that the other look rules out counts no
    more than SMOOTH allows.

    Args:
        first, second: (N, L) log-probabilities, each row normalised.
    """
    found = 0.0
    for drawn, told in ((first, second), (second, first)):
        shares = told.exp()
        mean = shares.mean(0)
        ratio = ((1 - SMOOTH) * shares / mean.clamp(min=1e-12) + SMOOTH).log()
        found += float((drawn.exp() * ratio).sum(-1).mean()) / 2
    return found


def view_weights(
    information: Mapping[str, float], sharpness: float = 80.0, prior: float = 1.0
) -> dict[str, float]:
    """Weight of each view in the vote, softmax of its mutual information in units of the best view's.

    Args:
        information: nats per view, all measured on the same images.
        sharpness: 0 weighs all views alike.
        prior: nats added to the unit, so that small differences of small figures do not decide.
    """
    unit = max(0.0, *information.values()) + prior
    scaled = torch.tensor([sharpness * value / unit for value in information.values()])
    return dict(zip(information, scaled.softmax(0).tolist(), strict=True))


def pool_looks(logprobs: Tensor, bound: float = 10.0) -> Tensor:
    """(M,) normalised log-probabilities: the mean over looks at one query, weighted by 1 - H / log M.

    A look that cannot tell the answers apart has no say, and no single look can rule an answer out.

    Args:
        logprobs: (V, M) of the same answers in each look; rows need not be normalised.
        bound: nats below certainty to which one look can put an answer.
    """
    rows = logprobs.float().log_softmax(-1).clamp(min=FLOOR)
    entropy = -(rows.exp() * rows).sum(-1)
    weights = (1 - entropy / math.log(max(rows.shape[1], 2))).clamp(min=1e-6)
    bounded = rows.clamp(min=-bound)
    return ((weights[:, None] * bounded).sum(0) / weights.sum()).log_softmax(-1)


def mutual_neighbours(embeddings: Tensor, ratio: float = 0.6) -> Tensor:
    """(N,) for each image the one that shows the same thing, or itself where none is clearly found.

    Two images are neighbours when each is nearest to the other and the second nearest is much farther away (the
    ratio test of Lowe 2004, here on cosine distance).

    Args:
        embeddings: (N, D).
    """
    num = len(embeddings)
    alone = torch.arange(num)
    if num < 3:
        return alone
    centred = torch.nn.functional.normalize(embeddings - embeddings.mean(0), dim=-1)
    distance = 1 - centred @ centred.T
    distance.fill_diagonal_(math.inf)
    nearest, places = distance.topk(2, largest=False)
    found = places[:, 0]
    sure = nearest[:, 0] < ratio * nearest[:, 1]
    sure &= found[found] == alone
    return torch.where(sure, found, alone)


def balance(
    logvotes: Tensor, strength: float = 4.0, pseudo_count: float = 0.5, bound: float = 2.0, rounds: int = 60
) -> Tensor:
    """(L,) offsets in nats to subtract from log-votes, so that no label is given far more often than the others.

    The fixed point of b = strength * log((c(b) + s) / (N / L + s)), clipped to +-bound, where c(b) is the number
    of queries that give a label and s the pseudo-count: that few queries miss a label proves little. The bound
    is what an image's own evidence has to exceed to stay with a label that is too common: a stream of one thing
    is left alone.

    Args:
        logvotes: (N, L), each row normalised.
    """
    num, labels = logvotes.shape
    expected = num / labels + pseudo_count
    offsets = torch.zeros(labels)
    for _ in range(rounds):
        counts = (logvotes - offsets).softmax(-1).sum(0)
        wanted = strength * ((counts + pseudo_count) / expected).log()
        offsets = (offsets + 0.3 * (wanted - offsets)).clamp(-bound, bound)
    return offsets


def keep_unshown(target: Tensor, reference: Tensor, shown: Tensor, most: float = 1.0) -> Tensor:
    """A target that leaves alone what the stream says nothing about.

    Labels that no query of the stream has been given keep the reference's probability; the shown ones share the
    rest as the votes say. Without this, labels that nobody asks about fade.

    Args:
        target, reference: (..., L) probabilities over the labels. shown: (L,) bool.
        most: probability that is kept at most, for all of them together.
    """
    if bool(shown.all()) or not bool(shown.any()):
        return target
    kept = torch.where(shown, 0.0, reference)
    kept = kept * (most / kept.sum(-1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
    voted = torch.where(shown, target, 0.0)
    total = voted.sum(-1, keepdim=True)
    mixed = kept + voted / total.clamp(min=1e-12) * (1 - kept.sum(-1, keepdim=True))
    return torch.where(total > 0, mixed, reference)


def common_space(answers: Sequence[Sequence[str]]) -> dict[str, int]:
    """A column for each answer that occurs in any query."""
    columns: dict[str, int] = {}
    for row in answers:
        for answer in row:
            columns.setdefault(answer, len(columns))
    return columns
