"""How much better one of two versions is, from queries that both answered: a difference of paired shares."""

from __future__ import annotations

import math

Z95 = 1.959964  # of the standard normal distribution, both sides
HALVINGS = 60


def gain(wins: int, losses: int, judged: int, different: int, compared: int) -> tuple[float, float, float]:
    """The gain in accuracy over all compared queries, and the ends of its 95 % interval, each in -1..1.

    Both answer `compared - different` queries alike: there the gain is 0. Of the `different` ones, `judged` were
    drawn at random: the new version alone was right in `wins` of them, the old one alone in `losses`. The two
    strata have known shares, so the estimate of the second is scaled by its share, and so is its interval
    (stratified sampling: Cochran, Sampling Techniques, 3rd ed. 1977, chapter 5). It is about these queries: how
    well they stand for others is not in it.

    Raises ValueError where the counts cannot be.
    """
    if not 0 <= wins + losses <= judged <= different <= compared or judged < 1 or min(wins, losses) < 0:
        raise ValueError("counts must not be negative, and judged ones at least 1 and no more than differ")
    share = different / compared
    low, high = difference_interval(wins, losses, judged)
    return share * (wins - losses) / judged, share * low, share * high


def difference_interval(wins: int, losses: int, num: int) -> tuple[float, float]:
    """The 95 % score interval of the difference of two paired shares, of `num` pairs.

    Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample design,
    Statistics in Medicine 17 (1998) 891-908: the differences d with |T(d)| <= z, where
    T(d) = (wins - losses - num d) / sqrt(num (2 q(d) + d (1 - d))) and q(d) is the likeliest share of losses given
    d. It holds for few pairs and for none of one kind, where Wald's interval would have no width.
    """
    seen = (wins - losses) / num
    return _end(wins, losses, num, seen, -1.0), _end(wins, losses, num, seen, 1.0)


def _end(wins: int, losses: int, num: int, inside: float, outside: float) -> float:
    """Between a difference that agrees with the pairs and one that does not, the last that does."""
    for _ in range(HALVINGS):
        middle = (inside + outside) / 2
        if abs(_score(wins, losses, num, middle)) <= Z95:
            inside = middle
        else:
            outside = middle
    return inside


def _score(wins: int, losses: int, num: int, difference: float) -> float:
    d = difference
    # The likelihood's derivative is 0 where 2 num q^2 + b q - losses d (1 - d) = 0.
    b = (2 * num - wins + losses) * d - wins - losses
    q = (math.sqrt(max(0.0, b * b + 8 * num * losses * d * (1 - d))) - b) / (4 * num)
    variance = num * (2 * q + d * (1 - d))
    apart = wins - losses - num * d
    if variance <= 0:
        return 0.0 if apart == 0 else math.copysign(math.inf, apart)
    return apart / math.sqrt(variance)
