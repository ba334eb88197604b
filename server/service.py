"""Answer first, learn after: the one place that decides the order.

The buffer is written beside the inference and may delay an answer by `buffer_wait_s` at most; nothing that
happens to it can fail an answer. What was opted out, or not answered by `live`, is never written at all.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import structlog
from pydantic import BaseModel

from servetune.adapters.conduct import Conduct
from servetune.adapters.types import Query, Sampling
from servetune.adapters.versions import StoreError, version_name
from servetune.clients.types import (
    Adaptation,
    AdapterRef,
    Answer,
    AnswerRequest,
    Diagnostics,
    ImageInput,
    Result,
    Timings,
    Usage,
)
from servetune.server import tracing
from servetune.server.access import Access, Principal
from servetune.server.audit import AuditLog
from servetune.server.buffer import QueryBuffer, Skipped
from servetune.server.comparison import Comparison
from servetune.server.engine import Engine, Outcome
from servetune.server.errors import ServiceError
from servetune.server.history import History
from servetune.server.ids import new_id
from servetune.server.images import ImageReader
from servetune.server.lines import Line, Lines, chosen
from servetune.server.metrics import Metrics
from servetune.server.quota import Quota
from servetune.server.receipts import Receipts
from servetune.server.settings import Settings
from servetune.server.stage import QueueFull

log = structlog.get_logger("servetune.service")

T = TypeVar("T")
RECOGNITION_TOP_K = 5
CANDIDATE = "candidate"
ALWAYS_ADMITTED = 2  # requests, however slow the model is
SPARE = 0.9  # share of the request's time that looking again may use up


class AnswerService:
    """Turns wire requests into answers, and the queries among them into work for the learner."""

    def __init__(self, settings: Settings, lines: Lines, images: ImageReader, receipts: Receipts) -> None:
        self._settings = settings
        self._lines = lines
        self._engine = lines.first.engine
        self._images = images
        self._receipts = receipts
        self._keeper = Keeper()
        self._admitted_now = 0

    async def answer(
        self,
        request: AnswerRequest,
        images: Sequence[bytes | ImageInput],
        caller: Principal,
        request_id: str,
        opted_out: bool = False,
        listen: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer one request, as `ask` does."""
        asked = await self.ask(request, images, caller, request_id, opted_out, None, listen)
        return self.wire(request, caller, *asked)

    async def ask(
        self,
        request: AnswerRequest,
        images: Sequence[bytes | ImageInput],
        caller: Principal,
        request_id: str,
        opted_out: bool = False,
        logprobs: int | None = None,
        listen: Callable[[str], None] | None = None,
    ) -> tuple[Outcome, Adaptation]:
        """Answer one request. Cancelling it gives up the inference and withdraws the query.

        Who has `opted_out` is answered as the request says, and the query is not kept.

        Args:
            logprobs: as `Sampling` has it. listen: as the engine has it.

        Raises:
            ServiceError: the server is not ready, an image is refused, or the caller has no such adapter.
            QueueFull, UnknownVersion, CorruptVersion: as the engine says.
            TimeoutError: not answered within `request_timeout_s`.
        """
        deadline = self._deadline(request)
        sampling = replace(_sampling(request), logprobs=logprobs)
        with self._admitted():
            async with asyncio.timeout(self._settings.request_timeout_s):
                line, choice = await self._line(request, caller)
                conduct = line.engine.conduct
                request = _with_labels(request, conduct)
                query = self._query(request, await self._images.read(images))
                first = CANDIDATE if choice == "live" and _is_canary(conduct, request, images) else choice
                answering = _answered(line.engine, query, sampling, (first, choice), deadline, listen)
                answering = _traced(answering, line.name)
                if reason := _why_not_kept(request, choice, opted_out, conduct):
                    return await answering, skipped(reason)
                keeping = self._keeper.keep(line.buffer, query, caller.id, request_id)
                try:
                    outcome = await answering
                except BaseException:  # a cancelled or failed question teaches nothing
                    keeping.withdraw()
                    raise
        if outcome.finish_reason == "unparsed":
            keeping.withdraw()
            return outcome, skipped("unparsed")
        return outcome, await keeping.settle(self._settings.buffer_wait_s)

    def start(self) -> None:
        """Be ready for the first request."""
        self._images.start()

    async def read(self, images: Sequence[bytes | ImageInput]) -> tuple[Any, ...]:
        """Images that come with no question, decoded as those of questions are. Raises ServiceError."""
        return await self._images.read(images)

    async def drain(self) -> None:
        """Let running buffer writes end, for a few seconds, and take no more images."""
        await self._keeper.drain()
        self._images.close()

    def check_room(self) -> None:
        """Whether one more may wait: asked before a body is read, so that a full server refuses at little cost.

        Raises:
            ServiceError: the server is not ready.
            QueueFull: as many wait, or for as long, as the settings allow.
        """
        if not self._engine.ready():
            raise ServiceError("not_ready")
        ahead = self._admitted_now
        if ahead >= self._settings.queue_size:
            raise QueueFull
        if ahead > ALWAYS_ADMITTED and self._engine.wait_s(ahead) > self._settings.queue_wait_s:
            raise QueueFull

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        self.check_room()  # others may have come while the body did
        self._admitted_now += 1
        try:
            yield
        finally:
            self._admitted_now -= 1

    async def _line(self, request: AnswerRequest, caller: Principal) -> tuple[Line, str]:
        """Whose adapter answers, and which of its versions."""
        name, choice = chosen(request.adapter, caller.adapter or self._lines.first.name)
        if caller.adapter not in (None, name):  # in the words of one that is not there
            raise ServiceError("adapter_not_found", "This server has no adapter of that name.")
        return await self._lines.find(name), choice

    def _query(self, request: AnswerRequest, images: tuple[Any, ...]) -> Query:
        question = request.question or self._engine.recognition_question
        return Query(new_id("q"), images, question, tuple(request.candidate_labels or ()))

    def _deadline(self, request: AnswerRequest) -> float | None:
        """When an answer with `adapt: now` is due, by the event loop's clock: before the request times out."""
        if request.adapt != "now":
            return None
        wanted = request.deadline_s or self._settings.now_deadline_s
        return asyncio.get_running_loop().time() + min(wanted, SPARE * self._settings.request_timeout_s)

    def wire(self, request: AnswerRequest, caller: Principal, outcome: Outcome, adaptation: Adaptation) -> Answer:
        """What became of a request, in the words of the API."""
        kind = "label" if request.is_choice else "answer"
        fields = {
            "id": self._receipts.write(caller.id, outcome.adapter, outcome.version, outcome.text),
            "created": int(time.time()),
            "model": self._engine.model_name,
            "adapter": _adapter(outcome),
            "task": "recognition" if request.is_choice else "vqa",
            "answer": outcome.text,
            "confidence": outcome.confidence,
            "confidence_source": _confidence_source(request, outcome),
            "candidates": [{kind: text, "score": score} for text, score in outcome.candidates],
            "finish_reason": outcome.finish_reason,
            "diagnostics": _part(Diagnostics, outcome),
            "adaptation": _adaptation(request, outcome, adaptation),
            "usage": _part(Usage, outcome),
            "timings": _part(Timings, outcome),
        }
        return Answer.model_validate(fields)


async def _traced(answering: Awaitable[Outcome], adapter: str) -> Outcome:
    with tracing.span("answer") as span:
        outcome = await answering
        span.note(adapter=adapter, version=version_name(outcome.version), finish_reason=outcome.finish_reason)
        span.note(queue_s=outcome.queue_s, inference_s=outcome.inference_s)
        return outcome


def _adapter(outcome: Outcome) -> AdapterRef:
    version = version_name(outcome.version)
    return AdapterRef(name=outcome.adapter, version=version, alias=outcome.alias, digest=outcome.digest)


def _with_labels(request: AnswerRequest, conduct: Conduct) -> AnswerRequest:
    """A choice without labels is one among those of the adapter. Raises ServiceError where it has none."""
    if not request.is_choice or request.candidate_labels is not None:
        return request
    if not conduct.labels:
        rule = (
            "task 'recognition' needs them: send them, or give the adapter labels (`servetune adapters settings`)"
        )
        raise ServiceError("invalid_request", f"candidate_labels: {rule}", param="candidate_labels")
    return request.model_copy(update={"candidate_labels": list(conduct.labels)})


async def _answered(
    engine: Engine,
    query: Query,
    sampling: Sampling,
    choices: tuple[str, str],
    deadline: float | None,
    listen: Callable[[str], None] | None,
) -> Outcome:
    """The answer of the first choice; of the second where the first is a candidate that cannot answer."""
    first, choice = choices
    if first != choice and await engine.can_answer(first):
        with suppress(StoreError):  # it went in this moment
            return await engine.answer(query, sampling, first, deadline, listen)
    return await engine.answer(query, sampling, choice, deadline, listen)


def _is_canary(conduct: Conduct, request: AnswerRequest, images: Sequence[bytes | ImageInput]) -> bool:
    """Whether the candidate answers: the same question about the same image always falls on the same side."""
    if conduct.mode != "canary":
        return False
    digest = hashlib.blake2b(digest_size=8)
    texts = [request.question or "", *(request.candidate_labels or ())]
    for part in (*texts, *images):
        content = part.model_dump_json() if isinstance(part, BaseModel) else part
        digest.update(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
        digest.update(b"\0")
    return int.from_bytes(digest.digest()) < conduct.canary_share * 2**64


def _why_not_kept(request: AnswerRequest, choice: str, opted_out: bool, conduct: Conduct) -> str | None:
    """Only what `live` answers, or a candidate in its place, is learned from, and only with consent."""
    if opted_out or not request.adapt:
        return "adapt_false"
    if choice != "live":
        return "not_live"
    return None if conduct.learns else "mode_off"


def _part(model: type[Result], outcome: Outcome) -> Result:
    """The fields of an outcome that a part of the answer has under the same names."""
    return model.model_validate({name: getattr(outcome, name) for name in model.model_fields})


def _sampling(request: AnswerRequest) -> Sampling:
    default_top_k = RECOGNITION_TOP_K if request.is_choice else 1
    return Sampling(
        n=request.n,
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_k=request.top_k or default_top_k,
        seed=request.seed,
    )


def _adaptation(request: AnswerRequest, outcome: Outcome, kept: Adaptation) -> Adaptation:
    """What became of the query and, with `adapt: now`, what was done for its own answer."""
    if request.adapt != "now":
        return kept
    done = {"queued": kept.status == "queued", "views": outcome.views, "rollouts": outcome.rollouts}
    return kept.model_copy(update={"status": "now", **done})


def _confidence_source(request: AnswerRequest, outcome: Outcome) -> str:
    if outcome.views > 1:
        return "pooled_probability"
    if request.is_choice:
        return "label_probability"
    return "vote_share" if request.n > 1 else "sequence_probability"


# --- keeping queries beside their answers ------------------------------------------------------------


class Keeper:
    """Writes queries to buffers in tasks of its own, which no request can cancel."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def keep(self, buffer: QueryBuffer, query: Query, client: str, request_id: str) -> Keeping:
        """Begin to write a query."""
        return Keeping(self.spawn(_put(buffer, query, client, request_id)), buffer, query.id, self)

    async def undo(self, put: asyncio.Task[Adaptation], buffer: QueryBuffer, query_id: str) -> None:
        """Take a query back once its write has ended: before, there would be nothing to take."""
        await put
        try:
            await buffer.withdraw(query_id)
        except Exception as error:  # learning never fails an answer
            log.warning("withdraw_failed", query_id=query_id, error=type(error).__name__)

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run to the end, whatever becomes of the request."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def drain(self, timeout_s: float = 5.0) -> None:
        """Wait for what is running; what hangs longer is cancelled."""
        if self._tasks:
            _, hanging = await asyncio.wait(self._tasks, timeout=timeout_s)
            for task in hanging:
                task.cancel()


async def _put(buffer: QueryBuffer, query: Query, client: str, request_id: str) -> Adaptation:
    with tracing.span("buffer") as span:
        try:
            await buffer.put(replace(query, trace=span.traceparent), client)
        except Skipped as refusal:
            span.note(skipped=refusal.reason)
            return skipped(refusal.reason)
        except Exception as error:  # learning never fails an answer
            span.fail(type(error).__name__)
            log.warning("buffer_failed", request_id=request_id, error=type(error).__name__)
            return skipped("buffer_unavailable")
        return Adaptation(status="queued", query_id=query.id)


class Keeping:
    """One query on its way into the buffer."""

    def __init__(self, put: asyncio.Task[Adaptation], buffer: QueryBuffer, query_id: str, keeper: Keeper) -> None:
        self._put = put
        self._buffer = buffer
        self._query_id = query_id
        self._keeper = keeper

    def withdraw(self) -> None:
        """Undo the write, in the background."""
        self._keeper.spawn(self._keeper.undo(self._put, self._buffer, self._query_id))

    async def settle(self, wait_s: float) -> Adaptation:
        """What became of the query, after waiting so long at most.

        On time-out the buffer goes on storing by itself, and counts the query as `unconfirmed`.
        """
        done, _ = await asyncio.wait({self._put}, timeout=wait_s)
        if done:
            return self._put.result()
        self._put.cancel()
        return Adaptation(status="skipped", query_id=self._query_id, reason="buffer_timeout")


def skipped(reason: str) -> Adaptation:
    """A query that was answered but not kept."""
    return Adaptation(status="skipped", reason=reason)


@dataclass(frozen=True)
class Services:
    """What the routes work with; one per app, in `app.state.services`."""

    settings: Settings
    lines: Lines
    access: Access
    audit: AuditLog
    answers: AnswerService
    quota: Quota
    history: History
    metrics: Metrics
    receipts: Receipts
    comparison: Comparison
