"""May this candidate be served? The gate compares it with the base and with what is live, on recent queries.

It needs no label. It cannot see that an answer is right, but it sees every known way of going wrong: weights
that are not finite, a policy that has moved too far, answers that stop being answers, many questions that get
one answer, and labels that fade although nobody asked about them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
from PIL import Image
from torch import Tensor

from servetune.adapters import growth
from servetune.adapters.answers import canonical
from servetune.adapters.ballots import Lesson
from servetune.adapters.calibration import confidence, expected_accuracy, fit_temperature
from servetune.adapters.policy import Observation, Policy
from servetune.adapters.types import Probe, Query, Verdict
from servetune.adapters.views import SAME

KL_SAMPLES = 8
MIN_WITNESSES = 12
SHORT_LIST = 12  # answers of a witness that are compared
FARTHEST = 8.0  # nats
VOUCHED = 5.0  # nats that a candidate may move for each by which it comes nearer to votes it was not taught
CALMEST = 1.25  # temperature at which a candidate must be as honest as the base


@dataclass(frozen=True, slots=True)
class Limits:
    """What a candidate may change. KL is the mean over the replay, in nats per answer; to the base, what the
    witnesses' votes account for comes on top.

    `min_valid`: valid-answer rate, as a share of the base's. `min_distinct`: number of different answers, as
    a share of the base's. `min_unshown`: probability of labels that the recent stream has not shown, on images
    that show nothing, as a share of the base's. `min_witness`: nats by which a candidate comes nearer to the votes
    on queries that were never learned from, against base and against live; few witnesses are not heard.
    `min_settled`: the same against base, of a candidate that has learned what there is to learn.
    `max_unvouched`: what is left of the KL to the base after VOUCHED times as much as it comes nearer to them.
    `min_probe`: share of the operator's probes by which it may answer fewer of them rightly than live and than the
    base do, beside what chance does to so many.
    `max_surer`: mean confidence on them, at temperature CALMEST, that the votes do not account for.
    """

    max_kl_base: float = 2.0
    max_kl_step: float = 0.3
    min_valid: float = 0.9
    min_distinct: float = 0.6
    min_unshown: float = 0.5
    min_witness: float = -0.05
    min_settled: float = -0.01
    max_unvouched: float = 0.2
    max_surer: float = 0.02
    min_probe: float = -0.02


@dataclass(frozen=True, slots=True)
class _View:
    """How one adapter answers a query: its likeliest answer, how valid, and (L,) label log-probabilities."""

    answer: str
    valid: float
    logprobs: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Replayed:
    """A recent query, without its images, and what never changes about it."""

    query: Query
    observation: Observation
    base: _View


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
    _probes: list[tuple[_Replayed, str]] = field(default_factory=list, init=False)
    _probe_set: int = field(default=0, init=False)
    _shown: deque[str] = field(default_factory=lambda: deque(maxlen=256), init=False)

    def __post_init__(self) -> None:
        self._replay = deque(maxlen=self.window)

    @torch.no_grad()
    def remember(self, queries: Sequence[Query]) -> None:
        """Keep queries for the replay and note which labels the live adapter sees in them."""
        observations = [self.policy.keep(one) for one in self.policy.observe_each(queries)]
        base = self._views(None, queries, observations)
        without_images = [replace(query, images=()) for query in queries]
        self._replay.extend(map(_Replayed, without_images, observations, base))
        closed = [(query, seen) for query, seen in zip(queries, observations, strict=True) if query.labels]
        live = self._views(self.live, [query for query, _ in closed], [seen for _, seen in closed])
        self._shown.extend(view.answer for view in live)

    @torch.no_grad()
    def set_probes(self, probes: Sequence[Probe], version: int) -> None:
        """Judge by these labelled queries as well, from now on; none at all end that."""
        queries = [probe.query for probe in probes]
        observations = [self.policy.keep(one) for one in self.policy.observe_each(queries)] if queries else []
        base = self._views(None, queries, observations)
        without_images = [replace(query, images=()) for query in queries]
        replayed = map(_Replayed, without_images, observations, base)
        self._probes = list(zip(replayed, (probe.answer for probe in probes), strict=True))
        self._probe_set = version

    def forget(self, ids: Collection[str]) -> None:
        """Drop some queries from the replay."""
        gone = set(ids)
        kept = [one for one in self._replay if one.query.id not in gone]
        self._replay.clear()
        self._replay.extend(kept)

    @torch.no_grad()
    def judge(self, witnesses: Sequence[Lesson] = (), convict: bool = False, spans: int = 1) -> Verdict:
        """Compare the candidate with live and base; never raises for a bad candidate, says why instead.

        Args:
            spans: how many candidates could have been judged since live; as many times may it have moved.
            convict: witnesses refuse only what they contradict by a standard error more than is allowed: for what
                is live, of which not to pass on a few witnesses is no proof of harm.
        """
        if not all(torch.isfinite(p).all() for p in self.policy.parameters(self.candidate).values()):
            return Verdict(False, ("weights are not finite",), {})
        metrics, limits = self._measure() | self._hear(witnesses) | self._try_probes(), self.limits
        vouched = max(0.0, metrics.get("witness_base", 0.0))  # what the votes account for is no drift
        doubt = metrics.get("witness_error", 0.0) if convict else 0.0
        if "witness_base" in metrics:
            metrics["unvouched"] = metrics["kl_base"] - VOUCHED * vouched
        bounds = [
            ("kl_base", -math.inf, limits.max_kl_base + vouched),
            ("kl_step", -math.inf, spans * limits.max_kl_step),
            ("valid", limits.min_valid, math.inf),
            ("distinct", limits.min_distinct, math.inf),
            ("unshown", limits.min_unshown, math.inf),
        ]
        if "witness_base" in metrics:
            bounds.append(("witness_live", limits.min_witness - doubt, math.inf))
            lowest = limits.min_witness - doubt if convict else limits.min_settled
            bounds.append(("witness_base", lowest, math.inf))
            bounds.append(("unvouched", -math.inf, limits.max_unvouched + VOUCHED * doubt))
            bounds.append(("surer", -math.inf, limits.max_surer))
        for name in ("probe_live", "probe_base"):
            if name in metrics:
                chance = (2 if convict else 1) * metrics[f"{name}_error"]
                bounds.append((name, limits.min_probe - chance, math.inf))
        # `not low <= value <= high` also catches NaN.
        reasons = {
            name: f"{name} {metrics[name]:.3f} is "
            + (f"below {low:.3g}" if metrics[name] < low else f"above {high:.3g}")
            for name, low, high in bounds
            if not low <= metrics[name] <= high
        }
        early = [*reasons] == ["witness_base"] and metrics["witness_base"] >= limits.min_witness
        return Verdict(not reasons, tuple(reasons.values()), metrics, early)

    @torch.no_grad()
    def nearness(self, witnesses: Sequence[Lesson]) -> float:
        """Minus the mean cross-entropy, in nats, from the witnesses' votes to what the candidate answers."""
        chosen = [_short_list(witness) for witness in witnesses]
        return -float(
            _distances(_targets(witnesses, chosen), self._answers(self.candidate, witnesses, chosen)).mean()
        )

    def _measure(self) -> dict[str, float]:
        queries, observations = [r.query for r in self._replay], [r.observation for r in self._replay]
        ours = self._views(self.candidate, queries, observations)
        live = self._views(self.live, queries, observations)
        base = [one.base for one in self._replay]
        closed = [views for views in zip(ours, base, live, strict=True) if views[0].logprobs is not None]
        moved = [(_divergence(one, of_base), _divergence(one, of_live)) for one, of_base, of_live in closed]
        moved += self._sampled_divergences([r.observation for r in self._replay if not r.query.labels])
        return {
            "kl_base": fmean([of_base for of_base, _ in moved] or [0.0]),
            "kl_step": fmean([of_live for _, of_live in moved] or [0.0]),
            "valid": _share(sum(v.valid for v in ours), sum(v.valid for v in base)),
            "distinct": _share(_num_distinct(ours), _num_distinct(base)),
            "unshown": self._unshown(),
            "replay": float(len(moved)),
        }

    def _hear(self, witnesses: Sequence[Lesson]) -> dict[str, float]:
        """What untaught queries say: how near the candidate comes to their votes, and how sure it may sound."""
        if len(witnesses) < MIN_WITNESSES:
            return {"witnesses": float(len(witnesses))}
        chosen = [_short_list(witness) for witness in witnesses]
        targets = _targets(witnesses, chosen)
        base = [w.ballot.scores[SAME][each] for w, each in zip(witnesses, chosen, strict=True)]
        ours, live = (self._answers(slot, witnesses, chosen) for slot in (self.candidate, self.live))
        votes = [witness.vote[each] for witness, each in zip(witnesses, chosen, strict=True)]
        gain = expected_accuracy(ours, votes) - expected_accuracy(base, votes)
        sure = confidence(base)
        near, of_base, of_live = (_distances(targets, rows) for rows in (ours, base, live))
        nearer = of_base - near
        return {
            "witness_base": float(nearer.mean()),
            "witness_live": float((of_live - near).mean()),
            "witness_error": float(nearer.std()) / math.sqrt(len(witnesses)),
            "witnesses": float(len(witnesses)),
            "temperature": fit_temperature(ours, sure),
            "surer": confidence(ours, CALMEST) - sure - max(0.0, gain),
        }

    def _try_probes(self) -> dict[str, float]:
        """Share of the probes that the candidate answers rightly, and how much more that is than of others."""
        if not self._probes:
            return {}
        queries, observations = (
            [getattr(one, part) for one, _ in self._probes] for part in ("query", "observation")
        )
        ours, live = (
            torch.tensor([_is_right(view, probe) for view, probe in zip(views, self._probes, strict=True)])
            for views in (self._views(slot, queries, observations) for slot in (self.candidate, self.live))
        )
        base = torch.tensor([_is_right(one.base, (one, answer)) for one, answer in self._probes])
        found = {"probes": float(len(self._probes)), "probe_set": float(self._probe_set)}
        found["probe_accuracy"] = float(ours.mean())
        for name, theirs in (("probe_live", live), ("probe_base", base)):
            found[name] = float((ours - theirs).mean())
            found[f"{name}_error"] = float((ours - theirs).std(unbiased=False)) / math.sqrt(len(ours))
        return found

    def _answers(self, slot: str, witnesses: Sequence[Lesson], chosen: Sequence[list[int]]) -> list[Tensor]:
        """Log-probabilities that a slot gives to some answers of each witness."""
        self.policy.use(slot)
        scored = self.policy.score_each(
            [witness.ballot.observations[SAME] for witness in witnesses],
            [[w.ballot.tokens[index] for index in each] for w, each in zip(witnesses, chosen, strict=True)],
        )
        return [logprobs.cpu() for logprobs in scored]

    def _views(
        self, slot: str | None, queries: Sequence[Query], observations: Sequence[Observation]
    ) -> list[_View]:
        """What a slot answers; queries with the same labels are scored together."""
        self.policy.use(slot)
        found: dict[int, _View] = {}
        kinds: dict[tuple[str, ...], list[int]] = {}
        for index, query in enumerate(queries):
            kinds.setdefault(query.labels, []).append(index)
        for labels, places in kinds.items():
            asked = [observations[index] for index in places]
            if not labels:
                found |= zip(places, self._open_views(asked), strict=True)
                continue
            scored = self.policy.likely_labels(asked, labels)
            for index, logprobs in zip(places, scored, strict=True):
                # How much of its free speech the model spends on the labels is its valid-answer rate.
                valid = float(logprobs.exp().sum().clamp(max=1.0))
                found[index] = _View(labels[int(logprobs.argmax())], valid, logprobs.log_softmax(-1))
        return [found[index] for index in range(len(queries))]

    def _open_views(self, observations: Sequence[Observation]) -> list[_View]:
        """The greedy answers of the active adapter."""
        family, prefixes = self.policy.family, self.policy.begin_each(observations)
        views = []
        for (sample,) in growth.sample_each(prefixes, 1, self.max_tokens, temperature=0.0):
            answer = canonical(family.text(sample.tokens)) if sample.finished else ""
            views.append(_View(answer, float(bool(answer))))
        return views

    def _sampled_divergences(self, observations: Sequence[Observation]) -> list[tuple[float, float]]:
        """KL(candidate || base) and KL(candidate || live) by the k3 estimate over the candidate's answers."""
        generator = torch.Generator().manual_seed(self.seed)
        self.policy.use(self.candidate)
        prefixes = self.policy.begin_each(observations)
        drawn = growth.sample_each(prefixes, KL_SAMPLES, self.max_tokens, generator=generator)
        found = []
        for slot in (None, self.live):
            self.policy.use(slot)
            scored = self.policy.score_each(observations, [[s.tokens for s in samples] for samples in drawn])
            found.append(list(map(_estimate, drawn, scored)))
        return list(zip(*found, strict=True))

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
            ours, base = (self._views(slot, [blank], [observation])[0] for slot in (self.candidate, None))
            kept.append(_share(_mass(ours, unshown), _mass(base, unshown)))
        return fmean(kept)


def _is_right(view: _View, probe: tuple[_Replayed, str]) -> float:
    """1 where a view is the operator's answer: that label, or the same answer in canonical form."""
    replayed, answer = probe
    return float(view.answer == (answer if replayed.query.labels else canonical(answer)))


def _targets(witnesses: Sequence[Lesson], chosen: Sequence[list[int]]) -> list[Tensor]:
    """Votes on some answers of each witness, among them."""
    return [w.target[each] / w.target[each].sum() for w, each in zip(witnesses, chosen, strict=True)]


def _short_list(lesson: Lesson) -> list[int]:
    """The answers that are likely in the vote or in the reference."""
    near = lesson.target + lesson.ballot.scores[SAME].exp()
    return near.topk(min(SHORT_LIST, len(near))).indices.tolist()


def _distances(targets: Sequence[Tensor], logprobs: Sequence[Tensor]) -> Tensor:
    """(W,) cross-entropies from votes to answers, in nats; one query counts FARTHEST at most.

    A proper score: being surer than the votes costs as being wrong does.
    """
    pairs = zip(targets, logprobs, strict=True)
    return torch.stack([-(target * row.log_softmax(-1)).sum() for target, row in pairs]).clamp(max=FARTHEST)


def _mass(view: _View, labels: list[int]) -> float:
    return 0.0 if view.logprobs is None else float(view.logprobs[labels].exp().sum())


def _divergence(ours: _View, theirs: _View) -> float:
    """KL over a closed set of labels, exact."""
    if ours.logprobs is None or theirs.logprobs is None:
        raise TypeError("both views must be of a closed set")
    p = ours.logprobs.exp()
    return float(torch.where(p > 0, p * (ours.logprobs - theirs.logprobs), 0.0).sum())


def _estimate(samples: Sequence[growth.Sample], logprobs: Tensor) -> float:
    """Mean over samples of the k3 estimate, from (M,) log-probabilities that another adapter gives to them."""
    terms = zip(samples, logprobs.tolist(), strict=True)
    return sum(s.count * _k3(min(logprob - s.logprob, 20.0)) for s, logprob in terms) / KL_SAMPLES


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
