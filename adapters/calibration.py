"""How sure an adapter may sound: one temperature per version, fitted without labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from torch import Tensor

HIGHEST = 4.0  # temperature that is fitted


def confidence(logprobs: Sequence[Tensor], temperature: float = 1.0) -> float:
    """Mean probability of the likeliest answer, of (M,) log-probabilities per query divided by the temperature."""
    return fmean(float((row / temperature).softmax(-1).max()) for row in logprobs)


def tempered(probability: float, temperature: float) -> float:
    """How sure to sound of an answer without known rivals: p^(1/T) against (1 - p)^(1/T), never surer than p.

    Args:
        probability: of the whole answer, 0..1.
        temperature: from 1.
    """
    probability = min(probability, 1.0)  # exp of a sum of logs may be a hair above
    ours, theirs = math.pow(probability, 1 / temperature), math.pow(1 - probability, 1 / temperature)
    return min(probability, ours / (ours + theirs))


def expected_accuracy(logprobs: Sequence[Tensor], votes: Sequence[Tensor]) -> float:
    """Mean vote for the likeliest answer of (M,) log-probabilities per query: accuracy, if votes are honest."""
    return fmean(float(vote[row.argmax()]) for row, vote in zip(logprobs, votes, strict=True))


def fit_temperature(ours: Sequence[Tensor], allowed: float) -> float:
    """The lowest temperature from 1 at which mean confidence is no more than allowed.

    Learning from votes makes a model surer whether it gets better or not.

    Args:
        ours: (M,) log-probabilities per query.
        allowed: mean confidence, 0..1.

    Returns:
        1 to HIGHEST.
    """
    low, high = 1.0, HIGHEST
    if confidence(ours, low) <= allowed:
        return low
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if confidence(ours, middle) > allowed else (low, middle)
    return high
