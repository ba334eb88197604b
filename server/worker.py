"""The adaptation loop, a process of its own: take, roll out, step, gate, publish, promote, settle.

Queries are settled last, when the version that names them is live, so a crash at any point either repeats the
work or finds it done: a version that was published but not promoted is promoted at the next start, and queries
that a version names are not trained again.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import structlog

from servetune.adapters.gate import Gate
from servetune.adapters.policy import Policy
from servetune.adapters.step import Learner, LearnerConfig
from servetune.adapters.store import AdapterStore, Alias, AliasMoved, Draft, version_name
from servetune.adapters.types import StepMetrics, Verdict
from servetune.clients.types import WorkerStatus
from servetune.server.audit import AuditLog
from servetune.server.buffer import Delivery, QueryStream
from servetune.server.settings import Settings

SLOTS = ("candidate", "live")
PAUSE_POLL_S = 0.5

log = structlog.get_logger()


class Worker:
    """Learns for one adapter. `turn` is one round of the loop; `run` repeats it until told to stop."""

    def __init__(
        self, settings: Settings, policy: Policy, store: AdapterStore, stream: QueryStream, audit: AuditLog
    ) -> None:
        self._settings = settings
        self._policy = policy
        self._store = store
        self._stream = stream
        self._audit = audit
        config = LearnerConfig.named(
            settings.learner,
            num_rollouts=settings.num_rollouts,
            max_tokens=settings.max_answer_tokens,
            learning_rate=settings.learning_rate,
            kl_coefficient=settings.kl_coefficient,
        )
        self._learner = Learner(policy, config, seed=settings.seed)
        self._gate = Gate(policy, max_tokens=settings.max_answer_tokens)
        self._held: list[Delivery] = []  # taught the candidate; settled with it
        self._leased: list[Delivery] = []  # everything taken and not settled
        self._first_step = 0
        self._status = WorkerStatus(state="idle")
        self._finish_promotion()
        self._live = self._follow()

    def run(self, stop: threading.Event) -> None:
        """Turn until `stop` is set; then give back what is unfinished."""
        with self._keep_leases():
            while not stop.is_set():
                self.turn()
        self._discard()

    def turn(self) -> None:
        """One batch, and a candidate when there were enough steps or nothing more is waiting."""
        if self._store.paused:
            self._report("paused")
            time.sleep(PAUSE_POLL_S)
            return
        if self._store.live() != self._live:
            self._discard()
            self._live = self._follow()
        batch = self._gather()
        if batch:
            self._report("learning")
            # What came back from a failed delivery runs alone, so that poison takes nobody with it.
            fresh = [delivery for delivery in batch if delivery.deliveries == 1]
            for part in ([fresh] if fresh else []) + [[d] for d in batch if d.deliveries > 1]:
                self._learn(part)
        enough = self._learner.steps - self._first_step >= self._settings.steps_per_candidate
        if self._held and (enough or len(batch) < self._settings.queries_per_step):
            self._conclude()
        self._report("idle")

    # --- learning ------------------------------------------------------------------------------------

    def _gather(self) -> list[Delivery]:
        """A whole batch, or what has come `flush_s` after its first query."""
        limit = self._settings.queries_per_step
        batch = self._take(limit, self._settings.flush_s)
        deadline = time.monotonic() + self._settings.flush_s
        while batch and len(batch) < limit and (left := deadline - time.monotonic()) > 0:
            batch += self._take(limit - len(batch), left)
        return batch

    def _take(self, limit: int, block_s: float) -> list[Delivery]:
        taken = self._stream.take(limit, block_s)
        self._leased += taken
        return taken

    def _learn(self, batch: list[Delivery]) -> None:
        known = self._store.learned_from({d.query.id for d in batch if d.deliveries > 1})
        self._settle([d for d in batch if d.query.id in known], "trained")
        batch = [d for d in batch if d.query.id not in known]
        if not batch:
            return
        try:
            metrics, taught = self._learner.step([d.query for d in batch], self._live.version)
        except Exception as error:  # one bad query must not end learning; its deliveries are counted
            log.error("step_failed", error=type(error).__name__, queries=len(batch))
            self._leased = [d for d in self._leased if d not in batch]
            self._stream.release(batch)
            self._discard()
            return
        self._note_step(metrics)
        ids = {query.id for query in taught}
        self._settle([d for d in batch if d.query.id not in ids], "no_signal")
        self._held += [d for d in batch if d.query.id in ids]
        self._gate.remember([d.query for d in batch])

    def _conclude(self) -> None:
        """Let the gate judge the candidate; publish it, or go back to what is live."""
        verdict = self._gate.judge()
        self._status = self._status.model_copy(update={"last_verdict": verdict.as_dict()})
        if not verdict.accepted:
            log.warning("candidate_rejected", reasons=verdict.reasons)
            self._settle(self._held, "rejected")
            self._discard()
            return
        try:
            self._publish(verdict)
        except AliasMoved:
            # The operator moved `live` meanwhile: their act wins, and the queries go back.
            log.info("candidate_outdated")
            self._discard()
            self._live = self._follow()
            return
        self._settle(self._held, "trained")
        self._held = []
        self._first_step = self._learner.steps

    def _publish(self, verdict: Verdict) -> None:
        weights, moments = self._learner.state()
        self._policy.use(SLOTS[0])
        made = self._store.publish(
            Draft(
                weights=weights,
                optimizer=moments,
                origin="worker",
                parent=self._live.version,
                probe=self._policy.probe(),
                generation=self._live.generation,
                step_range=(self._first_step + 1, self._learner.steps),
                query_ids=tuple(d.query.id for d in self._held),
                metrics=self._status.last_step,
                gate=verdict.as_dict(),
            )
        )
        self._promote(made.version, self._live.generation)
        self._policy.load(SLOTS[1], weights)

    def _promote(self, version: int, generation: int) -> None:
        self._live = self._store.promote(version, expected_generation=generation)
        self._audit.append("adapter_promoted", "worker", None, {"version": version_name(version)})
        log.info("published", version=version_name(version))

    def _finish_promotion(self) -> None:
        """Promote what an earlier worker published and did not live to promote."""
        live, newest = self._store.live(), self._store.manifest(self._store.versions()[-1])
        left = newest.origin == "worker" and newest.parent == live.version and newest.generation == live.generation
        if left and newest.version != live.version:
            self._promote(newest.version, live.generation)

    def _follow(self) -> Alias:
        """Continue from what is live now, with its optimizer where it was kept."""
        live = self._store.live()
        weights = self._store.weights(live.version)
        self._policy.load(SLOTS[1], weights)
        self._learner.load(weights, self._store.optimizer(live.version))
        self._first_step = self._learner.steps
        return live

    def _discard(self) -> None:
        """Forget the candidate and give back the queries that were not settled."""
        self._stream.release(self._leased)
        self._leased, self._held = [], []
        version = self._live.version
        self._learner.load(self._store.weights(version), self._store.optimizer(version))
        self._first_step = self._learner.steps

    # --- book-keeping --------------------------------------------------------------------------------

    def _settle(self, deliveries: Sequence[Delivery], outcome: str) -> None:
        if deliveries:
            self._stream.settle(deliveries, outcome)
            done = {d.query.id for d in deliveries}
            self._leased = [d for d in self._leased if d.query.id not in done]

    def _note_step(self, metrics: StepMetrics) -> None:
        numbers = {**asdict(metrics)["values"], "groups": metrics.groups, "informative": metrics.informative}
        self._status = self._status.model_copy(update={"last_step": numbers, "steps": self._learner.steps})

    def _report(self, state: str) -> None:
        update = {"state": state, "version": version_name(self._live.version)}
        self._status = self._status.model_copy(update=update)
        self._stream.report(self._status)

    @contextmanager
    def _keep_leases(self) -> Iterator[None]:
        """Renew the leases of unsettled queries from a thread of its own: a long step is not a dead one."""
        done = threading.Event()

        def renew() -> None:
            while not done.wait(self._settings.lease_s / 4):
                self._stream.renew(list(self._leased))
                self._stream.report(self._status)

        keeper = threading.Thread(target=renew, name="leases", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            done.set()
            keeper.join()


def yield_to_serving() -> None:
    """Run only on what the server leaves idle (SCHED_IDLE, else nice 19)."""
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except (AttributeError, PermissionError, OSError):
        os.nice(19)
