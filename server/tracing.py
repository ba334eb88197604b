"""Traces from a question to the version that learned from it: answer, buffer, step, swap.

Off unless it is configured and `servetune[otel]` is installed; then this is the only module that imports
OpenTelemetry, and not before. As with logs, who has something to tell asks the module. A question's trace is that
of its caller where a W3C `traceparent` came with it, and its query carries it through the buffer. A span has
names, numbers and ids of its own, never what was asked or answered.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import servetune
from servetune.server.settings import Settings

EXPORT_S = 5.0  # longest wait for the collector
FLUSH_S = 3.0  # and at the end of the process
MOST_LINKS = 128  # of a span

log = structlog.get_logger(__name__)

_tracing: _Tracing | None = None


class Span:
    """What is going on. Without tracing it takes notes of nothing."""

    traceparent: str | None = None

    def note(self, **attributes: str | int | float | bool) -> None:
        """Attributes, under the prefix `servetune.`."""

    def fail(self, what: str) -> None:
        """It did not go well."""


_NOTHING = Span()


@contextmanager
def span(name: str, links: Iterable[str | None] = (), parent: str | None = None) -> Iterator[Span]:
    """Something that takes a while, and what led to it; `links` and `parent` are traceparents."""
    if _tracing is None:
        yield _NOTHING
        return
    with _tracing.span(name, links, parent) as opened:
        yield opened


def past(name: str, seconds: float, links: Iterable[str | None] = (), **attributes: str | int | float) -> None:
    """Something that ends now, and took so many seconds."""
    if _tracing is not None:
        _tracing.past(name, seconds, links, attributes)


def is_on() -> bool:
    """Whether anybody is told."""
    return _tracing is not None


def add_trace_id(_logger: Any, _method: str, entry: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A processor of logs: the id of the trace that the line belongs to."""
    if _tracing is not None and (trace_id := _tracing.trace_id()):
        entry["trace_id"] = trace_id
    return entry


def begin(settings: Settings, process: str) -> None:
    """Trace this process, where the settings or OTEL_* say where to send it, and the extra is installed."""
    endpoint = settings.traces_to()
    if endpoint is None:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        log.warning("not_traced", missing=error.name, advice='pip install "servetune[otel]"')
        return
    # Without an address of ours the exporter takes the one of OTEL_*.
    exporter = OTLPSpanExporter(endpoint=endpoint or None, timeout=EXPORT_S)
    use(BatchSpanProcessor(exporter), process)


def use(processor: Any, process: str = "server") -> None:
    """Trace from now on, to a span processor of OpenTelemetry."""
    global _tracing
    _tracing = _Tracing(processor, process)


def end() -> None:
    """Trace no more; what is not sent yet is sent, if that does not take long."""
    global _tracing
    ending = _tracing
    _tracing = None
    if ending is not None:
        ending.flush()


class Traced:
    """Outermost: a span around every request, in the trace of who sent it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _tracing is None:
            await self.app(scope, receive, send)
            return
        status = 500

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        sent = Headers(scope=scope).get("traceparent")
        with _tracing.span("request", (), sent, is_request=True) as opened:
            try:
                await self.app(scope, receive, send_and_note)
            finally:
                route = getattr(scope.get("route"), "path", "unmatched")
                opened.rename(f"{scope['method']} {route}")
                opened.set("http.request.method", scope["method"])
                opened.set("http.route", route)
                opened.set("http.response.status_code", status)
                if status >= 500:
                    opened.fail(f"status {status}")


class _Open(Span):
    """A span of OpenTelemetry."""

    def __init__(self, span: Any, error: Any) -> None:
        self._span = span
        self._error = error
        self.traceparent = _traceparent(span.get_span_context())

    def note(self, **attributes: str | int | float | bool) -> None:
        for name, value in attributes.items():
            self.set(f"servetune.{name}", value)

    def set(self, name: str, value: str | int | float | bool) -> None:
        """An attribute under a name of somebody else's."""
        self._span.set_attribute(name, value)

    def rename(self, name: str) -> None:
        """What it is, when that is known."""
        self._span.update_name(name)

    def fail(self, what: str) -> None:
        self._span.set_status(self._error, what)


class _Tracing:
    """OpenTelemetry, as far as it is needed here."""

    def __init__(self, processor: Any, process: str) -> None:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        names = {"service.name": f"servetune-{process}", "service.version": servetune.__version__}
        chosen = OTELResourceDetector().detect()  # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES come first
        self._provider = TracerProvider(resource=Resource.create(names).merge(chosen), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("servetune", servetune.__version__)
        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def span(
        self, name: str, links: Iterable[str | None], parent: str | None, is_request: bool = False
    ) -> Iterator[_Open]:
        with self._tracer.start_as_current_span(
            name,
            context=self._read(parent) if parent or is_request else None,
            kind=self._trace.SpanKind.SERVER if is_request else self._trace.SpanKind.INTERNAL,
            links=self._links(links),
            record_exception=False,  # its text may quote what was sent
            set_status_on_exception=False,
        ) as opened:
            found = _Open(opened, self._trace.StatusCode.ERROR)
            try:
                yield found
            except BaseException as error:
                found.fail(type(error).__name__)
                raise

    def past(
        self, name: str, seconds: float, links: Iterable[str | None], attributes: dict[str, str | int | float]
    ) -> None:
        began = time.time_ns() - round(seconds * 1e9)
        done = self._tracer.start_span(name, links=self._links(links), start_time=began)
        _Open(done, None).note(**attributes)
        done.end()

    def trace_id(self) -> str | None:
        found = self._trace.get_current_span().get_span_context()
        return f"{found.trace_id:032x}" if found.is_valid else None

    def flush(self) -> None:
        self._provider.force_flush(round(FLUSH_S * 1000))

    def _links(self, traceparents: Iterable[str | None]) -> list[Any]:
        contexts = [
            self._trace.get_current_span(self._read(each)).get_span_context()
            for each in dict.fromkeys(traceparents)
            if each
        ]
        return [self._trace.Link(context) for context in contexts if context.is_valid][:MOST_LINKS]

    def _read(self, traceparent: str | None) -> Any:
        """An empty context where it is none."""
        from opentelemetry.context import Context

        return self._propagator.extract({"traceparent": traceparent or ""}, Context())


def _traceparent(context: Any) -> str:
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
