"""The adaptation loop of one adapter: take, roll out, step, gate, publish, promote, settle.

Queries are settled last, when the version that names them is live, so a crash at any point either repeats the
work or finds it done: a version that was published but not promoted is promoted at the next start, and queries
that a version names are not trained again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import structlog

from servetune.adapters.ballots import Lesson
from servetune.adapters.gate import MIN_WITNESSES, Gate
from servetune.adapters.policy import Policy
from servetune.adapters.sharing import release_memory
from servetune.adapters.step import Learner, LearnerConfig
from servetune.adapters.store import AdapterStore
from servetune.adapters.types import BASE, StepMetrics, Verdict
from servetune.adapters.versions import (
    Alias,
    AliasMoved,
    CorruptVersion,
    Draft,
    ErasedQuery,
    StoreError,
    version_name,
)
from servetune.clients.types import WorkerStatus
from servetune.server import tracing
from servetune.server.audit import AuditLog
from servetune.server.buffer import BufferUnavailable, Delivery, QueryStream
from servetune.server.history import Record, silent, version_event
from servetune.server.probes import ProbeSets, probes_name
from servetune.server.quiet import Wait
from servetune.server.settings import Settings

SLOTS = ("candidate", "live")
POLL_S = 0.5  # how often a waiting worker looks whether it should stop or go on
RETREATS = 3
MAX_SPANS = 12  # times `steps_per_candidate` that a candidate may go on learning unserved

log = structlog.get_logger()


def learner_config(settings: Settings) -> LearnerConfig:
    """The learner that the settings name."""
    return LearnerConfig.named(
        settings.learner,
        num_rollouts=settings.num_rollouts,
        max_tokens=settings.max_answer_tokens,
        learning_rate=settings.learning_rate,
        kl_coefficient=settings.kl_coefficient,
        max_bytes=settings.step_bytes,
    )


class Worker:
    """Learns for one adapter. `turn` is one round of the loop.

    Args:
        record: is told of every step, verdict and version.
        slots: of the policy, for the candidate and for what is live; nobody else uses them.
    """

    def __init__(
        self,
        settings: Settings,
        policy: Policy,
        store: AdapterStore,
        stream: QueryStream,
        audit: AuditLog,
        record: Record = silent,
        slots: tuple[str, str] = SLOTS,
    ) -> None:
        self._settings = settings
        self._candidate_slot, self._live_slot = slots
        self._policy = policy
        self._store = store
        self._stream = stream
        self._audit = audit
        self._record = record
        self.learner = Learner(policy, learner_config(settings), self._candidate_slot, settings.seed)
        self._gate = Gate(policy, candidate=slots[0], live=slots[1], max_tokens=settings.max_answer_tokens)
        self._held: list[Delivery] = []  # taught the candidate; settled with it
        self._leased: list[Delivery] = []  # everything taken and not settled
        self._gathered: list[Delivery] = []  # of it, what waits for a whole batch
        self._due = 0.0  # when a batch need not be whole any more
        self.failures = 0  # steps
        self._first_step = 0
        self._judged_step = 0
        self._status = WorkerStatus(state="idle")
        self._trace: str | None = None  # of the last step, where it is traced
        self._adrift = False  # a turn broke off, and the candidate with it
        self._heard: set[str] = set()  # queries that had a say since the last version
        self._named: set[str] = set()  # those of them that an earlier version of this line names
        self._num_erased = self._store.erased()[0]
        self._probe_sets, self._probe_set = ProbeSets(store.folder, settings), 0
        self._head = self._store.head()  # what learning goes on from
        self._follow()

    def turn(self, block_s: float = POLL_S) -> bool:
        """One batch, and a candidate when there were enough steps or there is nothing more to learn.

        Waits so long for a query to come. Returns whether there is more to do at once.
        """
        self._forget_erased()
        self._look_for_probes()
        if not self._may_learn:
            self._report("paused")
            return False
        if self._adrift or self._store.head() != self._head:
            self._give_back()
        batch = self._gather(block_s)
        busy = bool(batch) or self.learner.unfinished
        if batch:
            self._report("learning")
            # What came back from a failed delivery runs alone, so that poison takes nobody with it.
            fresh = [delivery for delivery in batch if delivery.deliveries == 1]
            parts = [[d] for d in batch if d.deliveries > 1] + ([fresh] if fresh else [])
            if not all(self._learn(part) for part in parts):
                return True
        elif self.learner.unfinished:
            self._report("learning")
            if not self._replay():
                return True
        moved = self.learner.steps > self._first_step
        last = max(self._first_step, self._judged_step)
        enough = self.learner.steps - last >= self._settings.steps_per_candidate
        if self._held and not moved and not self.learner.unfinished:
            self._settle(self._held, "no_signal")
            self._held = []
        if moved and (enough or not self.learner.unfinished) and self._may_learn:
            self._conclude()
        if busy and not self.learner.unfinished:
            release_memory()
        self._report("idle")
        return busy

    def wait(self, why: Wait) -> None:
        """In place of a turn: keep what it has, and say what it waits for."""
        self._forget_erased()
        if self._store.paused:
            self._report("paused")
        else:
            self._report("waiting", why)

    @property
    def _may_learn(self) -> bool:
        """Does the operator want it to, now?"""
        return self._store.conduct().learns and not self._store.paused

    def rests(self) -> bool:
        """Is there nothing that would be lost if it ended now?"""
        return not (self._leased or self.learner.unfinished)

    def fail(self, error: Exception) -> None:
        """After a turn that broke off: what was not settled comes back when its lease runs out."""
        log.error("turn_failed", adapter=self._store.name, error=type(error).__name__, detail=str(error))
        if self._status.state != "degraded":  # told once, and not at every try
            self._record("degraded", {"error": type(error).__name__})
        self._status = self._status.model_copy(update={"state": "degraded", "error": str(error)})
        self._leased, self._held, self._gathered, self._adrift = [], [], [], True

    def keep(self) -> None:
        """Renew the leases and the heartbeat; from any thread."""
        with suppress(BufferUnavailable):  # the loop meets it too, and deals with it
            self._stream.renew(list(self._leased))
            self._stream.report(self._status)

    def end(self) -> None:
        """Give back what is unfinished."""
        with suppress(BufferUnavailable):
            self._stream.release(self._leased)

    def finish(self) -> None:
        """Have the gate judge what was learned since the last version: for a worker that will not turn again."""
        if self.learner.steps > self._first_step and self._may_learn:
            self._conclude()
        self._report("idle")

    # --- learning ------------------------------------------------------------------------------------

    def _gather(self, block_s: float) -> list[Delivery]:
        """A whole batch, or what has come `flush_s` after its first query; nothing before."""
        limit, now = self._settings.queries_per_step, time.monotonic()
        wait_s = 0 if self.learner.unfinished else block_s
        taken = self._stream.take(limit - len(self._gathered), wait_s)
        if taken and not self._gathered:
            self._due = now + self._settings.flush_s
        self._leased += taken
        self._gathered += taken
        if len(self._gathered) < limit and time.monotonic() < self._due:
            return []
        batch, self._gathered = self._gathered, []
        return batch

    def _learn(self, batch: list[Delivery]) -> bool:
        """One step. False when it failed; then everything under lease was given back."""
        known = self._store.learned_from({d.query.id for d in batch if d.deliveries > 1})
        self._settle([d for d in batch if d.query.id in known], "trained")
        batch = [d for d in batch if d.query.id not in known]
        if not batch:
            return True
        began = time.perf_counter()
        try:
            with self._traced_step(batch):
                metrics, taught = self.learner.step([d.query for d in batch])
            self._gate.remember([d.query for d in batch])
        except Exception as error:  # one bad query must not end learning; its deliveries are counted
            self._note_failure(error, len(batch))
            self._leased = [d for d in self._leased if d not in batch]
            self._stream.release(batch, failed=True)
            self.learner.forget(d.query.id for d in batch)
            self._give_back()
            return False
        self._note_step(metrics, time.perf_counter() - began)
        ids = {query.id for query in taught}
        self._settle([d for d in batch if d.query.id not in ids], "no_signal")
        self._held += [d for d in batch if d.query.id in ids]
        return True

    def _replay(self) -> bool:
        """Steps on what is remembered. False when one failed; then the candidate is dropped with the memory."""
        began = time.perf_counter()
        try:
            with self._traced_step(()):
                metrics, _ = self.learner.step([])
        except Exception as error:
            self._note_failure(error, 0)
            self._give_back()
            return False
        self._note_step(metrics, time.perf_counter() - began)
        return True

    def _conclude(self) -> None:
        """Let the gate judge the candidate; publish it, or go back to what is live."""
        if self._forget_erased():
            return
        witnesses = self.learner.witnesses()
        with tracing.span("gate", parent=self._trace) as span:
            verdict = self._judge(witnesses)
            span.note(adapter=self._store.name, accepted=verdict.accepted, reasons="; ".join(verdict.reasons))
        self._judged_step = self.learner.steps
        self._status = self._status.model_copy(update={"last_verdict": verdict.as_dict()})
        self._record("verdict", verdict.as_dict() | {"step": self.learner.steps})
        if verdict.early:
            log.info("candidate_waits", adapter=self._store.name, reasons=verdict.reasons)
            self.learner.proceed()
            return
        if not verdict.accepted:
            log.warning("candidate_rejected", adapter=self._store.name, reasons=verdict.reasons)
            self.learner.forget(d.query.id for d in self._held)
            self._settle(self._held, "rejected")
            self._give_back()
            self._review(witnesses)
            return
        if len(self._stream.renew(self._held)) < len(self._held):
            log.info("candidate_withdrawn")  # it learned from a query that was erased or is someone else's now
            self.learner.forget(d.query.id for d in self._held)
            self._give_back()
            return
        try:
            self._publish(verdict)
        except AliasMoved:
            # The operator's act wins: `live` was moved meanwhile, the mode changed, or learning was switched off.
            log.info("candidate_outdated")
            self._give_back()
            return
        except ErasedQuery:
            self._num_erased = 0  # since the turn began
            self._forget_erased()
            return
        self._settle(self._held, "trained")
        self._held = []
        self._first_step = self.learner.steps
        self._reset_when_due()
        self._retain()

    def _judge(self, witnesses: Sequence[Lesson]) -> Verdict:
        """The gate's verdict on the candidate; one that went too far is tried at half its way, repeatedly.

        An early one is left as it is while there is more to learn.
        """
        self._propose(witnesses)
        spans = math.ceil((self.learner.steps - self._first_step) / self._settings.steps_per_candidate)
        verdict = self._gate.judge(witnesses, spans=spans)
        if verdict.early and self.learner.unfinished and spans < MAX_SPANS:
            return verdict
        for _ in range(RETREATS):
            if verdict.accepted or not verdict.metrics:  # without metrics: not finite, and no way leads back
                break
            self.learner.retreat(self._policy.weights(self._live_slot))
            verdict = self._gate.judge(witnesses)
        return replace(verdict, early=False, metrics=verdict.metrics | {"share": self.learner.share})

    def _propose(self, witnesses: Sequence[Lesson]) -> None:
        if len(witnesses) < MIN_WITNESSES:
            self.learner.propose()
        else:
            self.learner.choose_share(witnesses, partial(self._gate.nearness, witnesses))

    def _publish(self, verdict: Verdict) -> None:
        weights, moments = self.learner.state()
        # Whatever was remembered meanwhile had a say, also what was settled without a signal of its own.
        heard = self._heard - self._named
        query_ids = tuple(dict.fromkeys([*(d.query.id for d in self._held), *sorted(heard)]))
        self._policy.use(self._candidate_slot)
        made = self._store.publish(
            Draft(
                weights=weights,
                optimizer=moments,
                origin="worker",
                parent=self._head.version,
                probe=self._policy.probe(),
                temperature=verdict.metrics.get(
                    "temperature", self._store.manifest(self._head.version).temperature
                ),
                generation=self._head.generation,
                step_range=(self._first_step + 1, self.learner.steps),
                query_ids=query_ids,
                metrics=self._status.last_step,
                gate=verdict.as_dict(),
                metadata={"traceparent": self._trace} if self._trace else {},
            )
        )
        self._establish(made.version, self._head)
        self._policy.load(self._live_slot, weights)
        self.learner.accept()
        self._named = self.learner.remembered()
        self._heard.clear()

    def _establish(self, version: int, head: Alias) -> None:
        """Go on from an accepted version: live, or the candidate where the mode has it wait for the operator."""
        self._head = self._store.accept(version, head)
        waits = self._head.generation == head.generation
        act = "adapter_nominated" if waits else "adapter_promoted"
        self._note_act(act, {"version": version_name(version)})
        alias = {"alias": "candidate"} if waits else {}
        self._record("publish", version_event(self._store.manifest(version)) | alias)
        log.info("published", adapter=self._store.name, version=version_name(version), **alias)

    def _review(self, witnesses: Sequence[Lesson]) -> None:
        """After a refusal: does what is live still pass? Images change, and what was learned may not fit them."""
        if self._head.version == BASE:
            return
        self.learner.propose()  # the candidate is what is live
        verdict = self._gate.judge(witnesses, convict=True)
        self.learner.proceed()
        if verdict.accepted:
            return
        if self._head.version != self._store.live().version:
            self._dismiss(verdict)
            return
        target = self._store.aliases()["last-good"]
        if target == self._head.version or not self._still_passes(target, witnesses):
            target = BASE
        with suppress(AliasMoved):  # the operator's act wins
            # The same line goes on, so what is remembered of it stays.
            self._head = self._store.rollback(target, self._head.generation)
            self._named.clear()
            details = {"to": version_name(target), "reasons": list(verdict.reasons)}
            self._note_act("adapter_rolled_back", details)
            self._record("rollback", {"by": "worker", "version": version_name(target), "reasons": verdict.reasons})
            log.warning(
                "rolled_back", adapter=self._store.name, version=version_name(target), reasons=verdict.reasons
            )
        self._follow()

    def _dismiss(self, verdict: Verdict) -> None:
        """Take back a candidate that no longer passes; nobody has promoted it."""
        version = version_name(self._head.version)
        self._store.dismiss(self._head.version)
        self._note_act("candidate_dismissed", {"version": version, "reasons": list(verdict.reasons)})
        self._record("dismiss", {"by": "worker", "version": version, "reasons": verdict.reasons})
        log.warning("candidate_dismissed", adapter=self._store.name, version=version, reasons=verdict.reasons)
        self._named.clear()
        self._follow()

    def _still_passes(self, version: int, witnesses: Sequence[Lesson]) -> bool:
        """Whether a version would pass if it were live; both slots are overwritten."""
        try:
            weights = self._store.weights(version)
        except CorruptVersion:
            return False
        for slot in (self._candidate_slot, self._live_slot):
            self._policy.load(slot, weights)
        return self._gate.judge(witnesses, convict=True).accepted

    def _reset_when_due(self) -> None:
        """Start from the base again after so many queries, where the settings say so.

        Where the mode has what was learned wait for the operator, so does this.
        """
        due = self._settings.reset_after_queries
        if due is None or self._store.num_learned() < due:
            return
        with suppress(AliasMoved):
            made = self._store.restart(self._head)
            self._note_act("adapter_reset", {"version": version_name(made.version)})
            self._record("reset", {"by": "worker", "version": version_name(made.version)})
            log.info("reset", adapter=self._store.name, version=version_name(made.version))
        self._follow()

    def _retain(self) -> None:
        """Delete the weights of versions that nobody would miss; what fails is tried again after the next one."""
        try:
            numbers = self._store.retain(self._settings.retain_recent, self._settings.retain_best)
        except (StoreError, OSError) as error:
            log.warning("retention_failed", adapter=self._store.name, error=type(error).__name__)
            return
        if gone := list(map(version_name, numbers)):
            self._note_act("versions_retired", {"versions": gone})
            self._record("retire", {"by": "worker", "versions": gone})
            log.info("retired", adapter=self._store.name, versions=gone)

    def _finish_promotion(self) -> None:
        """Establish what was published for the present head when a crash or a full disk came between."""
        head, accepted = self._store.head(), set(self._store.accepted())
        for version in reversed(self._store.versions()):
            if version in accepted:
                continue
            made = self._store.manifest(version)
            if made.origin == "worker" and (made.parent, made.generation) == (head.version, head.generation):
                self._establish(version, head)
                return

    def _follow(self) -> None:
        """Continue from the head, with its optimizer where it was kept."""
        with suppress(AliasMoved):  # the operator's act wins
            self._finish_promotion()
        head = self._store.head()
        if head.version != self._head.version:
            self.learner.forget()  # what another line was taught is no part of this one
        self._head = head
        weights = self._store.weights(head.version)
        self._policy.load(self._live_slot, weights)
        gate = self._store.manifest(head.version).gate or {"metrics": {}}
        self.learner.load(weights, self._store.optimizer(head.version), gate["metrics"].get("share"))
        self._heard.clear()
        self._first_step = self.learner.steps

    def _look_for_probes(self) -> None:
        """Let the gate judge by the probe set that counts now; one that cannot be used is as none, and told of."""
        if (newest := self._probe_sets.newest()) == self._probe_set:
            return
        self._probe_set = newest
        try:
            self._gate.set_probes(self._probe_sets.read(newest) if newest else [], newest)
        except Exception as error:  # of another key, damaged, or nothing that this model takes
            log.error("probes_unusable", adapter=self._store.name, error=type(error).__name__)
            self._record("degraded", {"error": type(error).__name__, "probes": probes_name(newest)})
            self._gate.set_probes([], newest)

    def _forget_erased(self) -> bool:
        """Drop the candidate, the memory and the caches of queries erased since the last time, if any were."""
        count, ids = self._store.erased()
        if count == self._num_erased:
            return False
        log.info("erased", queries=count - self._num_erased)
        self._num_erased = count
        self._give_back()
        self.learner.forget(ids)
        self._gate.forget(ids)
        self._policy.forget_images()
        return True

    def _give_back(self) -> None:
        """Drop the candidate and return its queries to the buffer."""
        self._stream.release(self._leased)
        self._leased, self._held, self._gathered, self._adrift = [], [], [], False
        self._follow()

    # --- book-keeping --------------------------------------------------------------------------------

    def _note_act(self, event: str, details: Mapping[str, object]) -> None:
        """Put on record what was done to the adapter."""
        self._audit.append(event, "worker", None, {"adapter": self._store.name, **details})

    def _settle(self, deliveries: Sequence[Delivery], outcome: str) -> None:
        if deliveries:
            self._stream.settle(deliveries, outcome)
            done = {d.query.id for d in deliveries}
            self._leased = [d for d in self._leased if d.query.id not in done]

    @contextmanager
    def _traced_step(self, batch: Sequence[Delivery]) -> Iterator[None]:
        """A step in a trace of its own, which names those of the questions."""
        with tracing.span("step", links=[d.query.trace for d in batch]) as span:
            span.note(adapter=self._store.name, step=self.learner.steps + 1, queries=len(batch))
            self._trace = span.traceparent
            yield

    def _note_failure(self, error: Exception, queries: int) -> None:
        log.error("step_failed", adapter=self._store.name, error=type(error).__name__, queries=queries)
        self.failures += 1
        self._record("step", {"step": self.learner.steps, "groups": queries, "failed": type(error).__name__})

    def _note_step(self, metrics: StepMetrics, seconds: float) -> None:
        self._heard |= self.learner.remembered()
        numbers = {**asdict(metrics)["values"], "groups": metrics.groups, "informative": metrics.informative}
        numbers = {name: value for name, value in numbers.items() if math.isfinite(value)}
        self._status = self._status.model_copy(update={"last_step": numbers, "steps": self.learner.steps})
        self._record("step", {"step": self.learner.steps, "seconds": round(seconds, 4), **numbers})

    def _report(self, state: str, why: Wait | None = None) -> None:
        update: dict[str, Any] = {"state": state, "error": None, "version": version_name(self._head.version)}
        update |= {
            "waits_for": why and why.reason,
            "waits_until": why and why.until,
            "note": why and why.note,
        }
        self._status = self._status.model_copy(update=update)
        self._stream.report(self._status)
