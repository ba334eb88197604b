"""Counts questions: `Measured` around the routes sees each and how it ended, `MeasuredAnswers` what was asked.

The two meet in a context variable, so that neither routes nor service know of it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from PIL import Image
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from servetune.clients.types import Adaptation, AnswerRequest, ImageInput
from servetune.server.engine import Outcome
from servetune.server.errors import ServiceError, as_service_error
from servetune.server.images import ImageReader
from servetune.server.lines import chosen
from servetune.server.metrics import Metrics
from servetune.server.service import AnswerService

QUESTIONS = ("/answer", "/v1/answer", "/v1/chat/completions")
IMAGE_PROBLEMS = {
    "unsupported_image",
    "invalid_image",
    "image_too_large",
    "image_url_disabled",
    "image_url_refused",
}
BY_STATUS = {404: "not_found", 405: "method_not_allowed", 422: "invalid_request"}


@dataclass(slots=True)
class Asked:
    """A question on its way. `outcome`: `answered`, `unparsed`, `replayed` or the code of an error."""

    task: str = "unknown"
    adapter: str = "unknown"
    alias: str = "unknown"
    outcome: str | None = None


_asked: ContextVar[Asked] = ContextVar("asked")


class Measured:
    """Counts every question, also those that are refused before anybody reads them."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in QUESTIONS:
            await self.app(scope, receive, send)
            return
        asked, began, status = Asked(), time.perf_counter(), 0
        token = _asked.set(asked)

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        except Exception as error:
            asked.outcome = as_service_error(error).code
            raise
        finally:
            _asked.reset(token)
            self._count(asked, status, time.perf_counter() - began)

    def _count(self, asked: Asked, status: int, seconds: float) -> None:
        asked.outcome = asked.outcome or (BY_STATUS.get(status, "refused") if status >= 400 else "replayed")
        count(self._metrics, asked, seconds)


def count(metrics: Metrics, asked: Asked, seconds: float) -> None:
    """Count a question that took so long."""
    metrics.requests.labels(asked.task, asked.outcome, asked.adapter, asked.alias).inc()
    if asked.outcome in ("answered", "unparsed"):
        metrics.duration.labels(asked.task).observe(seconds)
        metrics.traffic.add(seconds)


class MeasuredAnswers(AnswerService):
    """Answers, and says of each what it was."""

    def __init__(self, metrics: Metrics, *args: Any) -> None:
        super().__init__(*args)
        self._metrics = metrics

    async def ask(self, request: AnswerRequest, *args: Any, **kwargs: Any) -> tuple[Outcome, Adaptation]:
        """Answer one request, as `AnswerService` does."""
        asked, began = _asked.get(None), time.perf_counter()
        if asked is not None:
            return await self._ask(asked, request, *args, **kwargs)
        asked = Asked()  # one of a batch
        try:
            return await self._ask(asked, request, *args, **kwargs)
        finally:
            count(self._metrics, asked, time.perf_counter() - began)

    async def _ask(
        self, asked: Asked, request: AnswerRequest, *args: Any, **kwargs: Any
    ) -> tuple[Outcome, Adaptation]:
        asked.task = "recognition" if request.is_choice else "vqa"
        asked.alias = _kind(chosen(request.adapter, "")[1])
        try:
            outcome, kept = await super().ask(request, *args, **kwargs)
        except Exception as error:
            asked.outcome = as_service_error(error).code
            raise
        asked.alias = _kind(outcome.alias or "") if asked.alias == "live" else asked.alias  # or a canary's
        asked.adapter = outcome.adapter  # known to exist, which one in a request that failed may not be
        asked.outcome = "unparsed" if outcome.finish_reason == "unparsed" else "answered"
        self._metrics.queue_wait.labels(asked.task).observe(max(0.0, outcome.queue_s))
        self._metrics.inference.labels(asked.task).observe(outcome.inference_s)
        if kept.reason:
            self._metrics.skipped.labels(asked.adapter, kept.reason).inc()
        return outcome, kept


class MeasuredImages(ImageReader):
    """Reads images, and says how long it took and what was refused."""

    def __init__(self, metrics: Metrics, *args: Any) -> None:
        super().__init__(*args)
        self._metrics = metrics

    async def read(self, inputs: Sequence[bytes | ImageInput]) -> tuple[Image.Image, ...]:
        """Decode images, as `ImageReader` does."""
        try:
            with self._metrics.decode.time():
                return await super().read(inputs)
        except ServiceError as error:
            if error.code in IMAGE_PROBLEMS:
                self._metrics.image_rejected.labels(error.code).inc()
            raise


def _kind(choice: str) -> str:
    """A choice of a version as a label: aliases of an operator's own are not told apart."""
    if choice in ("live", "base", "last-good", "candidate"):
        return choice
    return "version" if re.fullmatch(r"v\d+", choice) else "other"
