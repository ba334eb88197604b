"""What Prometheus is told. What happens is counted where it does; how things stand is read when it is asked for.

Knows nothing of HTTP. Labels are bounded: names of this server's adapters, codes, kinds and versions in use, and
never anything that a client chose.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, exposition
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from servetune.clients.types import AdaptationStatus, Event

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BATCHES = (1, 2, 4, 8, 16, 32)
GATES = (
    "finite",
    "kl_base",
    "kl_step",
    "valid",
    "distinct",
    "unshown",
    "witness_live",
    "witness_base",
    "unvouched",
    "surer",
)
LEARNED = {
    "reward_mean": ("reward", "Reward that the adapter's answers could expect in the last step"),
    "majority_ratio": ("majority", "Share of the commonest answer, mean over groups of the last step"),
    "answer_entropy": ("entropy", "Entropy of the votes in nats, mean over groups of the last step"),
    "valid_ratio": ("valid", "Share of valid answers in the last step"),
    "kl_to_base": ("kl", "KL divergence from the base in nats, in the last step"),
    "grad_norm": ("grad_norm", "Norm of the gradient in the last step"),
    "prequential_agreement": ("prequential", "Agreement with the vote on queries not learned from before"),
}
"""Gauges of the last step: metric -> (its name in StepMetrics, help)."""
WINDOW_S = 60.0

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series each, that says when the first began


@dataclass(frozen=True, slots=True)
class Reading:
    """How one adapter stands when it is asked. `batches`: how often so many requests were answered together."""

    status: AdaptationStatus
    digest: str  # of the version served
    created: float | None  # when that was made, in seconds since 1970
    waiting: int
    leases: Mapping[str, int]
    batches: Mapping[int, int]
    staleness: int


class Traffic:
    """Requests answered in the last minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._done: deque[tuple[float, float]] = deque(maxlen=20_000)

    def add(self, seconds: float) -> None:
        """Note an answer that took so long."""
        self._done.append((self._clock(), seconds))

    def summary(self) -> dict[str, float | None]:
        """Answers a second, and the median and the 95th percentile of their seconds; None without any."""
        now = self._clock()
        while self._done and self._done[0][0] < now - WINDOW_S:
            self._done.popleft()
        spent = sorted(seconds for _, seconds in self._done)
        per_s = len(spent) / max(1.0, min(WINDOW_S, now - self._began))
        return {"per_s": per_s, "p50_s": _quantile(spent, 0.5), "p95_s": _quantile(spent, 0.95)}


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.traffic = Traffic()
        self._truth = _Truth()
        self.requests = self._counter("requests", "Questions by what became of them", "task outcome adapter alias")
        self.duration = self._seconds("request_duration", "From the request's head to its answer", "task")
        self.queue_wait = self._seconds("queue_wait", "Waiting for the model", "task")
        self.inference = self._seconds("inference_duration", "Computing by the model", "task")
        self.decode = self._seconds("image_decode", "Reading the images of a request")
        self.image_rejected = self._counter("image_rejected", "Images that were refused", "reason")
        self.skipped = self._counter("buffer_skipped", "Answered queries that were not kept", "adapter reason")
        self.swaps = self._counter("adapter_swaps", "Changes of the served version", "adapter outcome")
        self.swap = self._seconds("adapter_swap", "From noticing a version to serving it", "adapter")
        self.steps = self._counter("train_steps", "Steps of the learner", "adapter outcome")
        self.step = self._seconds("train_step_duration", "One step of the learner", "adapter")
        self.zero_signal = self._counter("groups_zero_signal", "Groups that taught nothing", "adapter")
        self.gate = self._counter(
            "promotion_gate",
            "Verdicts (gate=all) and what spoke against candidates (result=failed)",
            "adapter gate result",
        )
        self.rollbacks = self._counter("rollbacks", "Times that `live` was moved back", "adapter cause")
        self.webhook = self._counter("webhook_deliveries", "Alerts by what became of them", "outcome")
        self.registry.register(self._truth)

    def expose(self, readings: Sequence[Reading], accept: str) -> tuple[bytes, str]:
        """The metrics as text, and its content type, by what the reader accepts."""
        self._truth.readings = readings
        encode, content_type = exposition.choose_encoder(accept)
        return encode(self.registry), content_type

    def hear(self, event: Event) -> None:
        """Count an event of the history that other processes write as well."""
        adapter, data = event.adapter, event.data
        match event.kind:
            case "step":
                self._hear_step(adapter, data)
            case "verdict":
                self.gate.labels(adapter, "all", verdict_result(data)).inc()
                for gate in failed_gates(data.get("reasons", ())):
                    self.gate.labels(adapter, gate, "failed").inc()
            case "rollback":
                self.rollbacks.labels(adapter, "worker" if data.get("by") == "worker" else "operator").inc()

    def _hear_step(self, adapter: str, data: Mapping[str, Any]) -> None:
        if "failed" in data:
            self.steps.labels(adapter, "failed").inc()
            return
        groups, informative = data.get("groups", 0), data.get("informative", 0)
        self.steps.labels(adapter, "learned" if "grad_norm" in data else "no_update").inc()
        self.step.labels(adapter).observe(data.get("seconds", 0.0))
        self.zero_signal.labels(adapter).inc(max(0, groups - informative))

    def begin(self, adapter: str) -> None:
        """An adapter is served: its counters begin at 0, so that the first increase is one."""
        for outcome in ("done", "refused"):
            self.swaps.labels(adapter, outcome)
        for outcome in ("learned", "no_update", "failed"):
            self.steps.labels(adapter, outcome)
        for result in ("accepted", "early", "rejected"):
            self.gate.labels(adapter, "all", result)
        for gate in GATES:
            self.gate.labels(adapter, gate, "failed")
        for cause in ("worker", "operator"):
            self.rollbacks.labels(adapter, cause)
        self.zero_signal.labels(adapter)

    def _counter(self, name: str, about: str, labels: str = "") -> Counter:
        return Counter(f"servetune_{name}", about, labels.split(), registry=self.registry)

    def _seconds(self, name: str, about: str, labels: str = "") -> Histogram:
        return Histogram(
            f"servetune_{name}_seconds", about, labels.split(), registry=self.registry, buckets=SECONDS
        )


def verdict_result(verdict: Mapping[str, Any]) -> str:
    """What the gate decided, in a word."""
    return "accepted" if verdict.get("accepted") else "early" if verdict.get("early") else "rejected"


def failed_gates(reasons: Iterable[str]) -> list[str]:
    """Which parts of the gate some reasons are of."""
    found = (re.match(r"[a-z_]+", reason) for reason in reasons)
    names = ["finite" if match[0] == "weights" else match[0] for match in found if match]
    return [name for name in names if name in GATES]


class _Truth(Collector):
    """Metrics that are read from what they are about, at the moment they are asked for."""

    def __init__(self) -> None:
        self.readings: Sequence[Reading] = ()

    def describe(self) -> Iterable[Metric]:  # else it would be collected when it is registered
        return ()

    def collect(self) -> Iterator[Metric]:
        yield from self._serving()
        yield from self._buffer()
        yield from self._learning()

    def _serving(self) -> Iterator[Metric]:
        for reading in self.readings[:1]:  # all adapters share the model
            queue = GaugeMetricFamily("servetune_queue_depth", "Requests with the model, or waiting for it")
            queue.add_metric([], reading.waiting)
            yield queue
            batches = HistogramMetricFamily("servetune_batch_size", "Requests answered together by the model")
            batches.add_metric([], *_histogram(reading.batches))
            yield batches
        info = GaugeMetricFamily(
            "servetune_adapter_info", "The version served", labels=["adapter", "version", "alias", "digest"]
        )
        leases = GaugeMetricFamily(
            "servetune_adapter_leases", "Leases of a version", labels=["adapter", "version"]
        )
        for reading in self.readings:
            status = reading.status
            alias = "live" if status.serving == status.live else ""
            info.add_metric([status.adapter, status.serving, alias, reading.digest], 1)
            for version, count in reading.leases.items():
                leases.add_metric([status.adapter, version], count)
        yield info
        yield leases
        yield self._gauge(
            "adapter_lag_versions", "Versions between what is served and `live`", lambda r: r.status.lag_versions
        )

    def _buffer(self) -> Iterator[Metric]:
        def gauge(name: str, about: str, read: Callable[[Reading], float]) -> Metric:
            return self._gauge(f"buffer_{name}", about, lambda r: read(r) if r.status.buffer.connected else None)

        yield self._gauge("buffer_up", "Whether Redis answers", lambda r: r.status.buffer.connected)
        yield gauge("entries", "Queries kept", lambda r: r.status.buffer.waiting + r.status.buffer.pending)
        yield gauge("pending", "Queries that the worker holds", lambda r: r.status.buffer.pending)
        yield gauge("bytes", "Size of the sealed queries", lambda r: r.status.buffer.bytes)
        yield gauge(
            "oldest_age_seconds", "How long the oldest query waits", lambda r: r.status.buffer.oldest_age_s
        )
        yield gauge("kept", "Queries kept for review", lambda r: r.status.buffer.kept)
        ledger = CounterMetricFamily(
            "servetune_buffer_queries", "Queries stored, and what became of them", labels=["adapter", "outcome"]
        )
        for reading in self.readings:
            for outcome, count in reading.status.buffer.ledger.items():
                ledger.add_metric([reading.status.adapter, outcome], count)
        yield ledger
        said = CounterMetricFamily(
            "servetune_feedback",
            "Answers that clients called right or wrong",
            labels=["adapter", "version", "kind"],
        )
        for reading in self.readings:
            for version, counts in reading.status.buffer.feedback.items():
                for kind, count in counts:
                    said.add_metric([reading.status.adapter, version, kind], count)
        yield said

    def _learning(self) -> Iterator[Metric]:
        yield self._gauge("worker_up", "Whether a worker reports", lambda r: r.status.worker.state != "absent")
        yield self._gauge("learning_paused", "Whether an operator paused learning", lambda r: r.status.paused)
        yield self._gauge(
            "learning_waiting",
            "Whether learning waits for its window or its share of the processors",
            lambda r: r.status.worker.state == "waiting",
        )
        yield self._gauge(
            "staleness_versions", "Versions between what the worker builds on and `live`", lambda r: r.staleness
        )
        for name, (key, about) in LEARNED.items():
            yield self._gauge(name, about, lambda r, key=key: r.status.worker.last_step.get(key))  # type: ignore[misc]

    def _gauge(self, name: str, about: str, read: Callable[[Reading], float | None]) -> Metric:
        """Of every adapter; one that does not have the number is left out."""
        family = GaugeMetricFamily(f"servetune_{name}", about, labels=["adapter"])
        for reading in self.readings:
            if (value := read(reading)) is not None:
                family.add_metric([reading.status.adapter], float(value))
        return family


def _histogram(counts: Mapping[int, int]) -> tuple[list[tuple[str, float]], float]:
    """Cumulative buckets, and the sum, of how often each size came."""
    buckets = [(str(float(size)), float(sum(n for of, n in counts.items() if of <= size))) for size in BATCHES]
    return [*buckets, ("+Inf", float(sum(counts.values())))], float(sum(of * n for of, n in counts.items()))


def _quantile(ascending: Sequence[float], share: float) -> float | None:
    return ascending[min(len(ascending) - 1, int(share * len(ascending)))] if ascending else None
