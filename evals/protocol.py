"""One run of the evaluation: the production worker in lock step with a stream, the frozen model beside it.

k queries are answered by what is live, then the worker makes its turns, and so on; at the end it uses up what
budget its memory has left. The worker, its learner, gate and store are the ones that serve; the buffer is a list.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch

from servetune.adapters import growth
from servetune.adapters.answers import canonical
from servetune.adapters.calibration import tempered
from servetune.adapters.policy import Observation, Policy
from servetune.adapters.store import AdapterStore
from servetune.adapters.types import Query
from servetune.evals.data import Item, Split
from servetune.server.lockstep import ListStream, list_worker, lock_step
from servetune.server.settings import Settings

LIVE = "live"
WINDOW = 200
BINS = 10


@dataclass(frozen=True, slots=True)
class Reply:
    """How one item was answered."""

    right: bool
    confidence: float
    valid: float


@dataclass(slots=True)
class Run:
    """What one learner did on one stream with one seed. Rates are fractions."""

    figures: dict[str, float] = field(default_factory=dict)
    published: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    series: list[dict[str, float]] = field(default_factory=list)
    right: list[tuple[bool, bool]] = field(default_factory=list)  # per scored query: frozen, adapted
    cpu_s: float = 0.0


class Scorer:
    """Answers items with one slot of a policy; what the frozen model answers is kept."""

    def __init__(self, policy: Policy, max_tokens: int, default_question: str) -> None:
        self._policy = policy
        self._max_tokens = max_tokens
        self._question = default_question
        self._frozen: dict[Item, Reply] = {}  # by item: two data sets may use the same id

    @torch.no_grad()
    def pairs(
        self,
        items: Sequence[Item],
        temperature: float,
        batch: int = 16,
        progress: Callable[[int], None] = lambda count: None,
    ) -> list[tuple[Reply, Reply]]:
        """What the frozen model and the live adapter (at its temperature) reply to each item, as in a server."""
        found: dict[int, tuple[Reply, Reply]] = {}
        kinds: dict[tuple[str, ...], list[int]] = {}
        for index, item in enumerate(items):
            kinds.setdefault(item.labels, []).append(index)
        for places in kinds.values():
            for start in range(0, len(places), batch):
                part = places[start : start + batch]
                found |= zip(part, self._pairs([items[index] for index in part], temperature), strict=True)
                progress(len(part))
        return [found[index] for index in range(len(items))]

    def _pairs(self, items: list[Item], temperature: float) -> list[tuple[Reply, Reply]]:
        self._policy.use(None)
        seen = self._policy.observe_each([item.query(self._question) for item in items])
        if any(item not in self._frozen for item in items):
            self._frozen |= zip(items, self._replies(None, items, seen, 1.0), strict=True)
        adapted = self._replies(LIVE, items, seen, temperature)
        return [(self._frozen[item], reply) for item, reply in zip(items, adapted, strict=True)]

    def _replies(
        self, slot: str | None, items: list[Item], seen: list[Observation], temperature: float
    ) -> list[Reply]:
        self._policy.use(slot)
        if items[0].labels:
            return self._closed(items, seen, temperature)
        return self._open(items, seen, temperature)

    def _closed(self, items: list[Item], seen: list[Observation], temperature: float) -> list[Reply]:
        """The likeliest label of each."""
        labels = items[0].labels
        logprobs = self._policy.likely_labels(seen, labels)
        shares = (logprobs / temperature).softmax(-1).max(-1)
        mass = logprobs.exp().sum(-1).clamp(max=1.0)
        return [
            Reply(labels[int(best)] == item.truth, float(share), float(valid))
            for item, best, share, valid in zip(items, shares.indices, shares.values, mass, strict=True)
        ]

    def _open(self, items: list[Item], seen: list[Observation], temperature: float) -> list[Reply]:
        """The greedy answer to each."""
        family, prefixes = self._policy.family, self._policy.begin_each(seen)
        replies = []
        drawn = growth.sample_each(prefixes, 1, self._max_tokens, temperature=0.0)
        for item, (sample,) in zip(items, drawn, strict=True):
            answer = canonical(family.text(sample.tokens)) if sample.finished else ""
            right = bool(answer) and answer == canonical(item.truth or "")
            replies.append(Reply(right, tempered(math.exp(sample.logprob), temperature), float(bool(answer))))
        return replies


def run(
    policy: Policy,
    settings: Settings,
    split: Split,
    source: Sequence[Item],
    scorer: Scorer,
    progress: Callable[[int], None] = lambda count: None,
    learns: bool = True,
    truths: Mapping[str, str] | None = None,
) -> Run:
    """Learn from `split.learn` and measure; the policy's slots `candidate` and `live` are overwritten.

    Args:
        progress: is told how many more items have been learned from or measured.
        learns: False measures the frozen model alone.
        truths: answers by query id, for the `oracle` learner alone.
    """
    began = time.process_time()
    made = Run()
    with tempfile.TemporaryDirectory() as home:
        stream = ListStream()
        store = _store(policy, Path(home))
        worker = list_worker(settings.model_copy(update={"home": Path(home)}), policy, store, stream)
        worker.learner.truths = truths or {}

        def asked() -> Iterator[list[Query]]:
            chunk = settings.queries_per_step
            for start in range(0, len(split.learn), chunk):
                items = split.learn[start : start + chunk]
                scored = [item for item in items if item.truth is not None]
                replies = scorer.pairs(scored, _temperature(store))
                made.right += [(frozen.right, adapted.right) for frozen, adapted in replies]
                yield [item.query(policy.family.recognition_question) for item in items] if learns else []
                _note(made, stream, start + len(items))
                progress(len(items))

        for _ in lock_step(worker, stream, asked()):
            if worker.failures:  # unseen, the figures would be those of other data
                raise RuntimeError("a step failed during the evaluation: see the log above")
        worker.finish()
        _note(made, stream, len(split.learn))
        temperature = _temperature(store)
    for verdict in stream.verdicts:
        made.published += verdict["accepted"]
        made.rejected.update(reason.split()[0] for reason in verdict["reasons"])
    _measure(made, split, source, scorer, temperature, progress)
    made.cpu_s = time.process_time() - began
    return made


def _store(policy: Policy, home: Path) -> AdapterStore:
    store = AdapterStore(home / "store")
    policy.use(None)
    store.initialise(policy.zero_weights(), policy.peft_config(), policy.base_digest, policy.probe())
    return store


def _temperature(store: AdapterStore) -> float:
    return store.manifest(store.live().version).temperature


def _note(made: Run, stream: ListStream, asked: int) -> None:
    """One point of the series: the last step's metrics and the last verdict's."""
    status = stream.status
    gate = status.last_verdict["metrics"] if status.last_verdict else {}
    made.series.append({"asked": asked, **status.last_step, **{f"gate_{name}": v for name, v in gate.items()}})


def _measure(
    made: Run,
    split: Split,
    source: Sequence[Item],
    scorer: Scorer,
    temperature: float,
    progress: Callable[[int], None],
) -> None:
    frozen, adapted = ([pair[index] for pair in made.right] for index in (0, 1))
    made.figures |= {"frozen": _share(frozen), "prequential": _share(adapted), "worst_window": _worst(made.right)}
    groups = {"heldout": split.heldout, "learned": split.learned, "unseen_labels": split.unseen, "source": source}
    pairs = {name: scorer.pairs(items, temperature, progress=progress) for name, items in groups.items() if items}
    if split.learned:
        pairs["whole"] = pairs.pop("learned") + pairs.get("heldout", [])
    for name, found in pairs.items():
        for kind, replies in zip(("frozen", "adapted"), zip(*found, strict=True), strict=True):
            made.figures[f"{name}_{kind}"] = _share([reply.right for reply in replies])
            if name == "heldout":
                made.figures[f"valid_{kind}"] = fmean(reply.valid for reply in replies)
                made.figures[f"ece_{kind}"] = calibration_error(replies)
                parts = _by_kind(split.heldout, replies)
                made.figures |= {f"{part}_{kind}": share for part, share in parts.items()}


def _by_kind(items: Sequence[Item], replies: Sequence[Reply]) -> dict[str, float]:
    """Accuracy on yes/no and on open questions apart, where there are both."""
    right: dict[str, list[bool]] = {"yes_no": [], "open": []}
    for item, reply in zip(items, replies, strict=True):
        if not item.labels:
            right["yes_no" if canonical(item.truth or "") in ("yes", "no") else "open"].append(reply.right)
    return {kind: _share(found) for kind, found in right.items()} if all(right.values()) else {}


def calibration_error(replies: Sequence[Reply]) -> float:
    """Expected calibration error over ten bins of confidence (Naeini 2015)."""
    bins: dict[int, list[Reply]] = {}
    for reply in replies:
        bins.setdefault(min(int(reply.confidence * BINS), BINS - 1), []).append(reply)
    gaps = [
        abs(sum(reply.right for reply in found) - sum(reply.confidence for reply in found))
        for found in bins.values()
    ]
    return sum(gaps) / len(replies)


def _worst(right: Sequence[tuple[bool, bool]]) -> float:
    """The minimum over windows of adapted minus frozen accuracy."""
    gains = [int(adapted) - int(frozen) for frozen, adapted in right]
    width = min(WINDOW, len(gains))
    sums = [sum(gains[start : start + width]) for start in range(len(gains) - width + 1)]
    return min(sums) / width if width else 0.0


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right) if right else math.nan
