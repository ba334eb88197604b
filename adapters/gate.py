"""May this candidate be served? The gate compares it with the base and with what is live, on recent queries.

It needs no label. It cannot see that an answer is right, but it sees every known way of going wrong: weights
that are not finite, a policy that has moved too far, answers that stop being answers, many questions that get
one answer, and labels that fade although nobody asked about them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from PIL import Image
from torch import Tensor

from servetune.adapters import tree
from servetune.adapters.answers import canonical
from servetune.adapters.policy import Observation, Policy
from servetune.adapters.types import Query, Verdict

KL_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class Limits:
    """What a candidate may change. KL is the mean over the replay, in nats per answer.

    `min_valid`: valid-answer rate, as a share of the base's. `min_distinct`: number of different answers, as
    a share of the base's. `min_unshown`: probability of labels that the recent stream has not shown, on images
    that show nothing, as a share of the base's.
    """

    max_kl_base: float = 1.0
    max_kl_step: float = 0.3
    min_valid: float = 0.9
    min_distinct: float = 0.6
    min_unshown: float = 0.5


@dataclass(frozen=True, slots=True)
class _View:
    """How one adapter answers a query: its likeliest answer, how valid, and (L,) label log-probabilities."""

    answer: str
    valid: float
    logprobs: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Replayed:
    """A recent query with what never changes about it."""

    query: Query
    observation: Observation
    base: _View


@dataclass(frozen=True, slots=True)
class _Comparison:
    """One replayed query: base and candidate beside each other, and how far the candidate has moved."""

    base: _View
    candidate: _View
    kl_base: float
    kl_step: float


@dataclass(slots=True)
class Gate:
    """Judges the `candidate` slot of a policy against the `live` slot and the base.

    `remember` feeds it recent queries; the last `window` of them are the replay.
    """

    policy: Policy
    limits: Limits = field(default_factory=Limits)
    candidate: str = "candidate"
    live: str = "live"
    window: int = 16
    max_tokens: int = 32
    seed: int = 0
    _replay: deque[_Replayed] = field(init=False)
    _shown: deque[str] = field(default_factory=lambda: deque(maxlen=256), init=False)

    def __post_init__(self) -> None:
        self._replay = deque(maxlen=self.window)

    @torch.no_grad()
    def remember(self, queries: Sequence[Query]) -> None:
        """Keep queries for the replay and note which labels the live adapter sees in them."""
        for query in queries:
            observation = self.policy.observe(query)
            self._replay.append(_Replayed(query, observation, self._view(None, query, observation)))
            if query.labels:
                self._shown.append(self._view(self.live, query, observation).answer)

    @torch.no_grad()
    def judge(self) -> Verdict:
        """Compare the candidate with live and base; never raises for a bad candidate, says why instead."""
        if not all(torch.isfinite(p).all() for p in self.policy.parameters(self.candidate).values()):
            return Verdict(False, ("weights are not finite",), {})
        metrics, limits = self._measure(), self.limits
        bounds = [
            ("kl_base", -math.inf, limits.max_kl_base),
            ("kl_step", -math.inf, limits.max_kl_step),
            ("valid", limits.min_valid, math.inf),
            ("distinct", limits.min_distinct, math.inf),
            ("unshown", limits.min_unshown, math.inf),
        ]
        # `not low <= value <= high` also catches NaN.
        reasons = tuple(
            f"{name} {metrics[name]:.3f} is " + (f"below {low:g}" if metrics[name] < low else f"above {high:g}")
            for name, low, high in bounds
            if not low <= metrics[name] <= high
        )
        return Verdict(not reasons, reasons, metrics)

    def _measure(self) -> dict[str, float]:
        found = [self._compare(one) for one in self._replay]
        base = [one.base for one in found]
        candidate = [one.candidate for one in found]
        return {
            "kl_base": fmean([one.kl_base for one in found] or [0.0]),
            "kl_step": fmean([one.kl_step for one in found] or [0.0]),
            "valid": _share(sum(v.valid for v in candidate), sum(v.valid for v in base)),
            "distinct": _share(_num_distinct(candidate), _num_distinct(base)),
            "unshown": self._unshown(),
            "replay": float(len(found)),
        }

    def _compare(self, one: _Replayed) -> _Comparison:
        candidate = self._view(self.candidate, one.query, one.observation)
        if candidate.logprobs is None:
            kl_base, kl_step = self._sampled_divergences(one.observation)
        else:
            live = self._view(self.live, one.query, one.observation)
            kl_base, kl_step = (_divergence(candidate, other) for other in (one.base, live))
        return _Comparison(one.base, candidate, kl_base, kl_step)

    def _view(self, slot: str | None, query: Query, observation: Observation) -> _View:
        self.policy.use(slot)
        prefix = self.policy.begin(observation)
        if not query.labels:
            sample = tree.sample(self.policy.family, prefix, 1, self.max_tokens, temperature=0.0)[0]
            answer = canonical(self.policy.family.text(sample.tokens)) if sample.finished else ""
            return _View(answer, float(bool(answer)))
        logprobs = self.policy.label_logprobs(prefix, query.labels)
        # How much of its free speech the model spends on the labels is its valid-answer rate.
        valid = float(logprobs.exp().sum().clamp(max=1.0))
        return _View(query.labels[int(logprobs.argmax())], valid, logprobs.log_softmax(-1))

    def _sampled_divergences(self, observation: Observation) -> tuple[float, float]:
        """KL(candidate || base) and KL(candidate || live) by the k3 estimate over the candidate's answers."""
        family, generator = self.policy.family, torch.Generator().manual_seed(self.seed)
        self.policy.use(self.candidate)
        prefix = self.policy.begin(observation)
        samples = tree.sample(family, prefix, KL_SAMPLES, self.max_tokens, generator=generator)
        totals = []
        for slot in (None, self.live):
            self.policy.use(slot)
            scored, _ = tree.score(family, self.policy.begin(observation), [s.tokens for s in samples])
            terms = zip(samples, scored.sum(-1).tolist(), strict=True)
            totals.append(sum(s.count * _k3(min(logprob - s.logprob, 20.0)) for s, logprob in terms) / KL_SAMPLES)
        return totals[0], totals[1]

    def _unshown(self) -> float:
        """Share kept of the probability that images of nothing give to labels not recently seen."""
        closed = [one.query for one in self._replay if one.query.labels]
        if not closed:
            return 1.0
        query = closed[-1]
        unshown = [i for i, label in enumerate(query.labels) if label not in self._shown]
        if not unshown:
            return 1.0
        kept = []
        for image in _images_of_nothing():
            blank = Query("blank", (image,), query.question, query.labels)
            observation = self.policy.observe(blank)
            ours, base = (self._mass(slot, blank, observation, unshown) for slot in (self.candidate, None))
            kept.append(_share(ours, base))
        return fmean(kept)

    def _mass(self, slot: str | None, query: Query, observation: Observation, labels: list[int]) -> float:
        logprobs = self._view(slot, query, observation).logprobs
        return 0.0 if logprobs is None else float(logprobs[labels].exp().sum())


def _divergence(ours: _View, theirs: _View) -> float:
    """KL over a closed set of labels, exact."""
    if ours.logprobs is None or theirs.logprobs is None:
        raise TypeError("both views must be of a closed set")
    p = ours.logprobs.exp()
    return float(torch.where(p > 0, p * (ours.logprobs - theirs.logprobs), 0.0).sum())


def _k3(difference: float) -> float:
    return math.exp(difference) - difference - 1


def _num_distinct(views: list[_View]) -> int:
    return len({view.answer for view in views if view.answer})


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 1.0


def _images_of_nothing() -> list[Image.Image]:
    """White, grey and noise: what the model answers to them is its prior (arXiv 2102.09690)."""
    noise = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return [
        Image.new("RGB", (64, 64), "white"),
        Image.new("RGB", (64, 64), (127, 127, 127)),
        Image.fromarray(noise.numpy()),
    ]
