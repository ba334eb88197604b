"""Traces: one way from a question to the version that learned from it, and nothing of it where it is off."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from servetune.adapters.policy import Policy
from servetune.adapters.store import AdapterStore
from servetune.adapters.types import Query
from servetune.server import tracing
from servetune.server.audit import AuditLog
from servetune.server.cipher import Cipher
from servetune.server.settings import Settings, resolved
from servetune.server.valkey import EmbeddedValkey
from servetune.server.worker import Worker
from tests.conftest import noise
from tests.fakes import World, base64_png, learn, until
from tests.redis_servers import open_buffer, open_stream

exporting = pytest.importorskip("opentelemetry.sdk.trace.export")
in_memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")

THEIRS = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
UNSAMPLED = THEIRS[:-1] + "0"


class Spans:
    """What was told, by name."""

    def __init__(self) -> None:
        self._exporter = in_memory.InMemorySpanExporter()
        self.processor = exporting.SimpleSpanProcessor(self._exporter)

    def all(self) -> tuple[Any, ...]:
        return tuple(self._exporter.get_finished_spans())

    def one(self, name: str) -> Any:
        [found] = [span for span in self.all() if span.name == name]
        return found


@pytest.fixture
def spans() -> Iterator[Spans]:
    told = Spans()
    tracing.use(told.processor)
    yield told
    tracing.end()


def traceparent(span: Any) -> str:
    found = span.get_span_context()
    return f"00-{found.trace_id:032x}-{found.span_id:016x}-{int(found.trace_flags):02x}"


def linked(span: Any) -> list[str]:
    return [f"00-{each.context.trace_id:032x}-{each.context.span_id:016x}-01" for each in span.links]


async def test_a_question_is_in_the_trace_of_who_asked(spans: Spans, tmp_path: Path) -> None:
    world = World(tmp_path)
    body = {"image": base64_png(), "question": "is this a secret?"}
    reply = await world.client.post("/v1/answer", json=body, headers={"traceparent": THEIRS})
    assert reply.status_code == 200
    request, answer, buffer = (spans.one(name) for name in ("POST /v1/answer", "answer", "buffer"))
    assert f"{request.context.trace_id:032x}" == THEIRS.split("-")[1]
    assert f"{request.parent.span_id:016x}" == THEIRS.split("-")[2]
    assert {answer.parent.span_id, buffer.parent.span_id} == {request.context.span_id}
    [(query, _)] = world.buffer.kept.values()
    assert query.trace == traceparent(buffer)
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/answer",
        "http.response.status_code": 200,
    }
    assert answer.attributes["servetune.version"] == "v0002"
    told = "".join(span.to_json() for span in spans.all())
    assert not any(text in told for text in ("secret", "a thing", "iVBOR", query.id)), "neither asked nor answered"


@pytest.mark.parametrize("sent", [None, "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
async def test_without_a_trace_a_question_begins_one(spans: Spans, tmp_path: Path, sent: str | None) -> None:
    world = World(tmp_path)
    await world.client.get("/livez", headers={"traceparent": sent} if sent else {})
    request = spans.one("GET /livez")
    assert request.parent is None
    assert request.context.trace_id


async def test_who_does_not_want_to_be_traced_is_not(spans: Spans, tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.client.get("/livez", headers={"traceparent": UNSAMPLED})
    assert spans.all() == ()


async def test_what_goes_wrong_is_told_without_its_text(spans: Spans, tmp_path: Path) -> None:
    world = World(tmp_path)
    world.engine.error = RuntimeError("it was asked about a secret")
    world.buffer.broken = True
    assert (await world.ask()).status_code == 500
    await world.buffer.close()
    assert spans.one("POST /v1/answer").status.description == "status 500"
    assert spans.one("answer").status.description == "RuntimeError"
    assert "secret" not in "".join(span.to_json() for span in spans.all())


async def test_logs_name_the_trace_beside_the_request(spans: Spans, tmp_path: Path) -> None:
    lines = io.StringIO()
    structlog.configure(
        processors=[tracing.add_trace_id, structlog.processors.JSONRenderer()],
        logger_factory=structlog.WriteLoggerFactory(file=lines),
    )
    world = World(tmp_path)
    await world.client.get("/livez", headers={"traceparent": THEIRS, "X-Request-ID": "mine"})
    [line] = map(json.loads, lines.getvalue().splitlines())
    assert (line["request_id"], line["trace_id"]) == ("mine", THEIRS.split("-")[1])


def test_a_sealed_query_carries_its_trace_and_one_of_before_has_none() -> None:
    cipher = Cipher(bytes(32))
    query = Query("q_1", (noise(),), "what?", (), THEIRS)
    assert cipher.open("q_1", cipher.seal(query)).trace == THEIRS
    plain = Query("q_1", (noise(),), "what?")
    assert cipher.open("q_1", cipher.seal(plain)).trace is None
    assert cipher.digest(query) == cipher.digest(plain), "the same question twice is a duplicate, traced or not"


async def test_a_step_names_its_questions_and_a_swap_its_step(
    spans: Spans, valkey: EmbeddedValkey, policy: Policy, tmp_path: Path
) -> None:
    settings = Settings(
        home=tmp_path,
        max_answer_tokens=4,
        queries_per_step=4,
        steps_per_candidate=1,
        flush_s=0.0,
        learning_rate=1e-4,
        learner="frequency",
    )
    store = AdapterStore(settings.path("store"))
    policy.use(None)
    store.initialise(policy.zero_weights(), policy.peft_config(), policy.base_digest, policy.probe())
    traces = [f"00-{number:032x}-{number:016x}-01" for number in range(1, 4)]
    async with open_buffer(settings, valkey.url) as buffer:
        for number, trace in enumerate([*traces, None]):
            await buffer.put(Query(f"q_{number}", (noise(number),), "what?", tuple("abcdefgh"), trace), "ann")
    with open_stream(settings, valkey.url) as stream:
        Worker(settings, policy, store, stream, AuditLog(tmp_path / "audit.jsonl")).turn()
    step, gate = spans.one("step"), spans.one("gate")
    assert linked(step) == traces
    assert step.parent is None
    assert gate.parent.span_id == step.context.span_id
    assert gate.attributes["servetune.accepted"] is True
    assert store.manifest(1).metadata == {"traceparent": traceparent(step)}


async def test_a_swap_names_the_step_that_it_came_from(spans: Spans, tmp_path: Path) -> None:
    world = World(tmp_path)
    made = learn(world.store, 7.0, metadata={"traceparent": THEIRS})
    world.store.promote(made.version)
    await world.engine.refresh()
    await until(lambda: bool(spans.all()))
    swap = spans.one("swap")
    assert linked(swap) == [THEIRS]
    assert swap.attributes == {"servetune.adapter": "default", "servetune.version": "v0003"}
    assert round((swap.end_time - swap.start_time) / 1e9, 2) == 0.02


async def test_off_it_keeps_no_trace_of_anything(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert not any(each.cls is tracing.Traced for each in world.app.user_middleware)
    await world.client.post("/v1/answer", json={}, headers={"traceparent": THEIRS})
    await world.ask()
    assert [query.trace for query, _ in world.buffer.kept.values()] == [None]
    entry = tracing.add_trace_id(None, "info", {"event": "x"})
    assert entry == {"event": "x"}


@pytest.mark.parametrize(
    ("env", "chosen", "to"),
    [
        ({}, None, None),
        ({"EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, None, ""),
        ({"EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, None, ""),
        ({}, "http://c:4318/v1/traces", "http://c:4318/v1/traces"),
        ({"SDK_DISABLED": "true"}, "http://c:4318/v1/traces", None),
        ({"EXPORTER_OTLP_ENDPOINT": "http://c:4318", "TRACES_EXPORTER": "none"}, None, None),
    ],
)
def test_it_is_on_where_somebody_says_where_to(
    env: dict[str, str], chosen: str | None, to: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(f"OTEL_{name}", value)
    assert Settings(home=tmp_path, trace_endpoint=chosen).traces_to() == to


def test_a_password_in_its_address_is_not_shown(tmp_path: Path) -> None:
    shown = resolved(home=tmp_path, trace_endpoint="https://me:hidden@collector.test/v1/traces")
    [value] = [each.value for each in shown if each.setting == "trace_endpoint"]
    assert "hidden" not in value
    assert "collector.test" in value


def test_configured_without_the_extra_is_said_and_ends_nothing(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["opentelemetry.sdk"] = sys.modules["opentelemetry.exporter"] = None
from servetune.server import tracing
from servetune.server.settings import Settings
assert not [name for name, module in sys.modules.items() if module and name.startswith("opentelemetry.")]
tracing.begin(Settings(home={str(tmp_path)!r}, trace_endpoint="http://127.0.0.1:1/v1/traces"), "server")
print("on" if tracing.is_on() else "off")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "servetune[otel]"' in done.stdout
    assert done.stdout.splitlines()[-1] == "off"


def test_an_address_that_is_not_there_hinders_nobody(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, trace_endpoint="http://127.0.0.1:1/v1/traces")
    tracing.begin(settings, "server")
    assert tracing.is_on()
    with tracing.span("answer") as span:
        assert span.traceparent
    tracing.end()
    assert not tracing.is_on()
