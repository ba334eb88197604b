"""Questions over HTTP: both content types, every refusal, and learning that never harms an answer."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from servetune.adapters.versions import CorruptVersion
from servetune.clients.types import Answer, Problem
from servetune.server import idempotency, middleware, routes
from servetune.server.errors import PROBLEMS
from servetune.server.idempotency import Replies, Reply
from servetune.server.ids import new_id
from servetune.server.service import AnswerService
from servetune.server.stage import QueueFull
from tests.fakes import ADMIN, ADMIN_KEY, USER, USER_KEY, World, base64_png, png, until

PAGED = ("AdapterInfo", "AuditEntry", "ProbeSetInfo", "VersionInfo")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, max_body_bytes=200_000, buffer_wait_s=0.02)


async def send_form(world: World, images: int = 1, **data: Any) -> httpx2.Response:
    files = [("image", ("x.png", png(), "image/png"))] * images
    return await world.client.post("/answer", files=files, data={"question": "what?", **data})


def check_problem(reply: httpx2.Response, status: int, code: str) -> Problem:
    """A well-formed problem document that leaks nothing."""
    assert (reply.status_code, reply.json().get("code")) == (status, code), reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    for leak in ("0x", "Traceback", "/work", "site-packages", ".py", "input_value", "pydantic", ADMIN_KEY):
        assert leak not in reply.text
    problem = Problem.model_validate_json(reply.text)
    assert problem.request_id == reply.headers["x-request-id"]
    assert PROBLEMS[code] == (problem.status, problem.title)
    return problem


# --- answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/answer", "/v1/answer"])
async def test_a_question_is_answered(world: World, path: str) -> None:
    reply = await world.client.post(path, json={"image": base64_png(), "question": "what?", "temperature": 0.5})
    answer = Answer.model_validate_json(reply.text)
    assert (answer.answer, answer.task, answer.confidence_source) == ("a thing", "vqa", "sequence_probability")
    assert (answer.adapter.version, answer.adapter.alias) == ("v0002", "live")
    assert reply.headers["servetune-adapter-version"] == "v0002"
    [(query, sampling, choice)] = world.engine.asked
    assert (query.question, query.labels, choice) == ("what?", (), "live")
    assert (sampling.n, sampling.temperature, sampling.top_k) == (1, 0.5, 1)


async def test_labels_make_it_recognition(world: World) -> None:
    labels = [f"label {n}" for n in range(7)]
    answer = (await world.ask(candidate_labels=labels, question=None)).json()
    assert (answer["task"], answer["answer"]) == ("recognition", "label 0")
    assert answer["confidence_source"] == "label_probability"
    assert [row["label"] for row in answer["candidates"]] == labels[:5]
    assert world.engine.asked[0][0].question == "which one is it?"
    assert (await world.ask(n=3, temperature=1)).json()["confidence_source"] == "vote_share"


async def test_a_form_says_the_same_as_json(world: World) -> None:
    fields = {"top_k": "2", "adapter": "base", "adapt": "false", "stream": "false", "metadata": '{"a":"b"}'}
    reply = await send_form(world, images=2, candidate_labels=["a", "b", "c"], **fields)
    assert reply.status_code == 200, reply.text
    query, sampling, choice = world.engine.asked[0]
    assert (len(query.images), query.labels, sampling.top_k, choice) == (2, ("a", "b", "c"), 2, "base")
    assert (await send_form(world, candidate_labels='["x", "y, z"]')).json()["answer"] == "x"
    text = await world.client.post("/answer", files={"image": (None, base64_png()), "question": (None, "?")})
    assert text.status_code == 200


async def test_an_unparsed_answer_is_null_and_not_learned_from(world: World) -> None:
    world.engine.text = None
    answer = (await world.ask()).json()
    assert (answer["answer"], answer["finish_reason"]) == (None, "unparsed")
    assert answer["adaptation"] == {"status": "skipped", "query_id": None, "reason": "unparsed"}
    await until(lambda: world.buffer.withdrawn == 1)


@pytest.mark.parametrize(("sent", "kept"), [("abc-1.2_3", True), ("a b", False), ("x" * 129, False), ("é", False)])
async def test_a_sane_request_id_is_kept(world: World, sent: str, kept: bool) -> None:
    reply = await world.client.get("/livez", headers={"X-Request-ID": sent.encode()})
    answered = reply.headers["x-request-id"]
    assert (answered == sent) if kept else answered.startswith("req_")


def test_ids_sort_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for milliseconds in range(1_795_000_000_000, 1_795_000_000_100):
        monkeypatch.setattr("time.time_ns", lambda now=milliseconds: now * 1_000_000)
        made.append(new_id("q"))
    assert made == sorted(made)
    assert len(made[0]) == len("q_") + 26


# --- learning ----------------------------------------------------------------------------------------


async def test_a_query_is_queued_under_the_id_that_is_told(world: World) -> None:
    told = (await world.ask()).json()["adaptation"]
    assert told["status"] == "queued"
    assert list(world.buffer.kept) == [told["query_id"]]


@pytest.mark.parametrize(
    ("fields", "headers", "reason"),
    [
        ({"adapt": False}, {}, "adapt_false"),
        ({}, {"Servetune-Adapt": "False"}, "adapt_false"),
        ({"adapter": "base"}, {}, "not_live"),
        ({"adapter": "v0002"}, {}, "not_live"),
        ({"adapter": "last-good"}, {}, "not_live"),
    ],
)
async def test_these_are_never_written(
    world: World, fields: dict[str, Any], headers: dict[str, str], reason: str
) -> None:
    world.client.headers.update(headers)
    adaptation = (await world.ask(**fields)).json()["adaptation"]
    assert adaptation == {"status": "skipped", "query_id": None, "reason": reason}
    assert world.buffer.puts == 0


async def test_an_answer_now_says_what_was_done_and_is_kept_as_any_other(world: World) -> None:
    answer = (await world.ask(adapt="now", deadline_s=2)).json()
    [kept] = world.buffer.kept
    assert answer["adaptation"] == {
        "status": "now",
        "query_id": kept,
        "reason": None,
        "queued": True,
        "views": 4,
        "rollouts": 0,
    }
    assert answer["confidence_source"] == "pooled_probability"
    assert Answer.model_validate(answer).adaptation.views == 4
    assert (await send_form(world, adapt="now", deadline_s="2.5")).json()["adaptation"]["status"] == "now"
    await world.ask()
    assert [due and math.ceil(2 * due) / 2 for due in world.engine.due_in_s] == [2, 2.5, None]


@pytest.mark.parametrize(
    ("fields", "headers", "reason"),
    [({}, {"Servetune-Adapt": "false"}, "adapt_false"), ({"adapter": "base"}, {}, "not_live")],
)
async def test_an_answer_now_needs_no_consent_to_learning(
    world: World, fields: dict[str, Any], headers: dict[str, str], reason: str
) -> None:
    world.client.headers.update(headers)
    adaptation = (await world.ask(adapt="now", **fields)).json()["adaptation"]
    assert (adaptation["status"], adaptation["views"]) == ("now", 4)
    assert (adaptation["queued"], adaptation["reason"]) == (False, reason)
    assert world.buffer.puts == 0


async def test_an_answer_now_is_due_before_the_request_times_out(tmp_path: Path) -> None:
    world = World(tmp_path, request_timeout_s=10.0, now_deadline_s=3.0)
    for deadline_s in (None, 1000):
        await world.ask(adapt="now", deadline_s=deadline_s)
    assert [round(due or 0) for due in world.engine.due_in_s] == [3, 9]


async def test_a_slow_buffer_costs_the_answer_no_more_than_agreed(world: World) -> None:
    world.buffer.delay_s = 0.3
    reply = await asyncio.wait_for(world.ask(), 0.25)
    adaptation = reply.json()["adaptation"]
    assert (reply.status_code, adaptation["status"]) == (200, "skipped")
    assert adaptation["reason"] == "buffer_timeout"
    await until(lambda: list(world.buffer.kept) == [adaptation["query_id"]])  # it went on
    assert world.buffer.unconfirmed == 1


@pytest.mark.parametrize("reason", ["buffer_full", "duplicate", "client_share", "buffer_unavailable"])
async def test_a_refusing_buffer_is_named_in_the_answer(world: World, reason: str) -> None:
    world.buffer.refusal = reason
    reply = await world.ask()
    assert (reply.status_code, reply.json()["adaptation"]["reason"]) == (200, reason)


async def test_a_defect_of_the_buffer_fails_no_answer(world: World) -> None:
    world.buffer.broken = world.buffer.down = True
    reply = await world.ask()
    assert (reply.status_code, reply.json()["adaptation"]["reason"]) == (200, "buffer_unavailable")
    world.engine.text = None  # and neither does a withdrawal that fails
    assert (await world.ask()).status_code == 200
    await answers(world).drain()


@pytest.mark.parametrize("error", [QueueFull(), RuntimeError("boom /etc/passwd 0xdead")])
async def test_what_was_not_answered_is_not_learned_from(world: World, error: Exception) -> None:
    world.engine.error = error
    assert (await world.ask()).status_code >= 500
    await until(lambda: world.buffer.withdrawn == 1)


async def test_a_client_that_leaves_stops_the_engine_and_is_not_learned_from(world: World) -> None:
    world.engine.hold = asyncio.Event()
    gone = asyncio.Event()
    body = json.dumps({"image": base64_png(), "question": "?"}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    sent: list[Any] = []
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"idempotency-key", b"k")]
    scope = {"type": "http", "asgi": {}, "http_version": "1.1", "method": "POST", "path": "/answer"}
    scope |= {"raw_path": b"/answer", "query_string": b"", "headers": headers, "scheme": "http", "root_path": ""}
    request = asyncio.create_task(world.app(scope, receive, send))
    await until(lambda: len(world.buffer.kept) == 1)
    gone.set()
    await request
    assert world.engine.cancelled == 1
    assert sent[0]["status"] == 499
    await until(lambda: world.buffer.withdrawn == 1)


# --- refusals ----------------------------------------------------------------------------------------

BODIES = [
    (b"", 400, "invalid_json"),
    (b"{", 400, "invalid_json"),
    (b"\xff\xfe", 400, "invalid_json"),
    (b'{"question": "\\ud800", "image": "x"}', 400, "invalid_json"),
    (b"[" * 100_000, 400, "invalid_json"),
    (b'{"metadata":' * 10_000 + b"}" * 10_000, 400, "invalid_json"),
    (b"[]", 422, "invalid_request"),
    (b"null", 422, "invalid_request"),
    (b"{}", 422, "invalid_request"),
    (b'{"image": NaN, "question": "?"}', 422, "invalid_request"),
    (b'{"image": "x", "question": "?", "temperature": NaN}', 422, "invalid_request"),
    (b'{"image": "x", "question": "?", "temperature": 1e999}', 422, "invalid_request"),
    (b'{"image": "x", "question": "?", "seed": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
    (b'{"image": "x", "question": "a\\u0000b"}', 422, "invalid_request"),
    (b'{"image": "aGk=", "question": "?", "metadata": {"\\u0000": "b"}}', 422, "invalid_request"),
    (b'{"image": "\\u0000", "question": "?"}', 422, "invalid_image"),
    (b'{"image": "aGk=", "question": "?"}', 415, "unsupported_image"),
]


# --- several questions ---------------------------------------------------------------------------------


async def post_batch(world: World, *requests: dict[str, Any]) -> httpx2.Response:
    body = {"requests": [{"image": base64_png(), "question": "what?", **fields} for fields in requests]}
    return await world.client.post("/v1/answer/batch", json=body)


async def test_each_question_of_a_batch_is_answered_by_itself(world: World) -> None:
    reply = await post_batch(
        world, {"question": "one?"}, {"adapter": "v0099"}, {"candidate_labels": ["a", "b"], "question": None}
    )
    first, missing, third = reply.json()["results"]
    assert (first["answer"]["answer"], first["problem"]) == ("a thing", None)
    assert (missing["answer"], missing["problem"]["code"]) == (None, "adapter_not_found")
    assert third["answer"]["task"] == "recognition"
    assert len(world.buffer.kept) == 2
    told = (await world.client.get("/metrics")).text
    assert 'servetune_requests_total{adapter="default",alias="live",outcome="answered",task="vqa"} 1.0' in told


async def test_a_batch_leaves_room_for_others(world: World) -> None:
    world.engine.hold = asyncio.Event()
    asking = asyncio.create_task(post_batch(world, *[{"question": f"{n}?"} for n in range(20)]))
    await until(lambda: len(world.engine.asked) == routes.BATCH_AT_ONCE)
    await asyncio.sleep(0.02)
    assert len(world.engine.asked) == routes.BATCH_AT_ONCE
    world.engine.hold.set()
    results = (await asking).json()["results"]
    assert all(each["answer"] for each in results)
    assert len(results) == 20


async def test_a_batch_is_checked_as_a_whole_before_it_is_asked(world: World) -> None:
    check_problem(await post_batch(world, {}, {"top_k": 0}), 422, "invalid_request")
    check_problem(await post_batch(world, {}, {"stream": True}), 422, "invalid_request")
    check_problem(await post_batch(world, {}, {"question": "a\0b"}), 422, "invalid_request")
    check_problem(await world.client.post("/v1/answer/batch", json={"requests": []}), 422, "invalid_request")
    check_problem(await world.client.post("/v1/answer/batch", content=b"x"), 415, "unsupported_media_type")
    assert not world.engine.asked


async def test_every_question_of_a_batch_counts(tmp_path: Path) -> None:
    world = World(tmp_path, requests_per_minute=12)  # two at once
    results = (await post_batch(world, {}, {}, {})).json()["results"]
    assert [each["problem"] and each["problem"]["code"] for each in results] == [None, None, "rate_limited"]


# --- an answer that grows ------------------------------------------------------------------------------


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    parts = [part.splitlines() for part in text.split("\n\n") if part]
    return [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in parts]


async def test_an_answer_is_told_while_it_grows(world: World) -> None:
    plain = (await world.ask()).json()
    reply = await world.ask(stream=True)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *deltas, (last, whole) = events(reply.text)
    assert [kind for kind, _ in deltas] == ["delta", "delta"]
    assert "".join(data["text"] for _, data in deltas) == whole["answer"] == "a thing"
    assert last == "done"
    assert whole["adaptation"]["status"] == "queued"
    for one in (plain, whole):
        for name in ("id", "created", "timings", "adaptation"):
            del one[name]
    assert plain == whole


async def test_what_fails_before_the_first_word_is_an_ordinary_problem(world: World) -> None:
    world.engine.text, world.engine.error = None, QueueFull()
    check_problem(await world.ask(stream=True), 503, "queue_full")
    check_problem(await world.ask(stream=True, adapter="v0099"), 503, "queue_full")
    world.engine.error = None
    check_problem(await world.ask(stream=True, adapter="nobody@live"), 404, "adapter_not_found")


async def test_what_fails_later_is_told_among_the_events(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = world.engine.answer

    async def breaks(*args: Any) -> Any:
        args[-1]("a th")
        await asyncio.sleep(0)
        raise TimeoutError

    monkeypatch.setattr(world.engine, "answer", breaks)
    reply = await world.ask(stream=True)
    assert reply.status_code == 200
    (delta, told), (kind, problem) = events(reply.text)
    assert (delta, told["text"], kind, problem["code"]) == ("delta", "a th", "error", "deadline_exceeded")
    assert problem["request_id"] == reply.headers["x-request-id"]
    await until(lambda: world.buffer.withdrawn == 1)  # what was not answered teaches nothing
    monkeypatch.setattr(world.engine, "answer", answer)


async def test_half_a_character_is_not_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = world.engine.answer

    async def grows(query: Any, sampling: Any, choice: str, deadline: Any, listen: Any) -> Any:
        for text in ("a \ufffd", "a \u00e9", "a \u00e9\ufffd", "a thing"):  # the last takes back what was told
            listen(text)
            await asyncio.sleep(0)
        return await answer(query, sampling, choice)

    monkeypatch.setattr(world.engine, "answer", grows)
    told = events((await world.ask(stream=True)).text)
    assert [data["text"] for kind, data in told if kind == "delta"] == ["a ", "\u00e9"]
    assert told[-1][1]["answer"] == "a thing"


@pytest.mark.parametrize(("body", "status", "code"), BODIES)
async def test_broken_bodies_are_refused(world: World, body: bytes, status: int, code: str) -> None:
    reply = await world.client.post("/answer", content=body, headers={"Content-Type": "application/json"})
    check_problem(reply, status, code)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": "canary"}, "n"),
        ({"question": ["canary"]}, "question"),
        ({"candidate_labels": ["a", 1, "canary"]}, "candidate_labels.1"),
        ({"candidate_labels": ["canary"]}, "candidate_labels"),
        ({"candidate_labels": ["canary", "canary"]}, None),
        ({"adapter": "../canary"}, "adapter"),
        ({"image": {"url": 3, "x": "canary"}}, "image"),
        ({"image": None, "images": [{"data": "canary", "media_type": "image/gif"}]}, "images.0"),
        ({"stream": "canary"}, "stream"),
        ({"adapt": "canary"}, "adapt"),
        ({"adapt": None, "deadline_s": "canary"}, "deadline_s"),
        ({"adapt": "now", "deadline_s": 0}, "deadline_s"),
        ({"adapt": True, "deadline_s": 3}, None),
        ({"candidate_label": "canary"}, "candidate_label"),
        ({"<script>\u2028": "canary"}, "?script??"),
        ({"metadata": {"a": {"b": "canary"}}}, "metadata"),
    ],
)
async def test_a_bad_field_is_named_and_its_value_is_not(
    world: World, fields: dict[str, Any], param: str | None
) -> None:
    reply = await world.ask(**fields)
    assert check_problem(reply, 422, "invalid_request").param == param
    assert "canary" not in reply.text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(
    ["question", "candidate_labels", "image", "images", "n", "top_k", "seed", "adapter", "task"]
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(fields=st.dictionaries(NAMES | st.text(max_size=5), VALUES, max_size=4), as_form=st.booleans())
def test_no_body_is_answered_with_a_5xx(world: World, fields: dict[str, Any], as_form: bool) -> None:
    client = TestClient(world.app, base_url="http://localhost")
    if as_form:
        data = {name: repr(value).encode(errors="ignore") for name, value in fields.items() if name != "image"}
        reply = client.post("/answer", files={"image": png()}, data=data)
    else:
        body = {"image": base64_png(), "question": "?", **fields}
        reply = client.post("/answer", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert reply.status_code in {200, 400, 404, 415, 422}, reply.text


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "image/png", ""])
async def test_other_content_types_are_refused(world: World, content_type: str) -> None:
    reply = await world.client.post("/answer", content=b"{}", headers={"Content-Type": content_type})
    check_problem(reply, 415, "unsupported_media_type")


@pytest.mark.parametrize("parameters", ["", "; boundary=", "; boundary=x", "; boundary=x; charset=idna"])
@pytest.mark.parametrize("body", [b"", b"--x", b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n"])
async def test_broken_forms_are_refused(world: World, parameters: str, body: bytes) -> None:
    headers = {"Content-Type": "multipart/form-data" + parameters}
    reply = await world.client.post("/answer", content=body, headers=headers)
    assert reply.status_code in {400, 422}
    check_problem(reply, reply.status_code, reply.json()["code"])


@pytest.mark.parametrize("charset", ["idna", "unicode_escape", "utf-7", "punycode", "base64", "nonsense"])
async def test_strange_charsets_do_no_harm(world: World, charset: str) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="question"\r\n\r\n\\ud800\xff\x80\r\n--x--\r\n'
    headers = {"Content-Type": f"multipart/form-data; boundary=x; charset={charset}"}
    assert (await world.client.post("/answer", content=part, headers=headers)).status_code in {400, 422}


@pytest.mark.parametrize(
    ("data", "images", "status"),
    [
        ({"n": ["1", "2"]}, 1, 422),
        ({"metadata": "[" * 5000}, 1, 422),
        ({"unknown": "x"}, 1, 422),
        ({}, 9, 400),
        ({"candidate_labels": ["x"] * 1200}, 1, 400),
        ({"question": "x" * 5000}, 1, 422),
    ],
)
async def test_forms_have_limits(world: World, data: dict[str, Any], images: int, status: int) -> None:
    assert (await send_form(world, images, **data)).status_code == status


async def test_a_file_is_no_question(world: World) -> None:
    files = {"image": ("a", png()), "question": ("b", b"what?")}
    check_problem(await world.client.post("/answer", files=files), 422, "invalid_request")


async def chunks(size: int) -> AsyncIterator[bytes]:
    for _ in range(size // 1000):
        yield b"x" * 1000


async def test_a_body_is_cut_off_whatever_it_promises(world: World) -> None:
    json_type = {"Content-Type": "application/json"}
    post = world.client.post
    check_problem(await post("/answer", content=b"x" * 200_001, headers=json_type), 413, "body_too_large")
    check_problem(await post("/answer", content=chunks(300_000), headers=json_type), 413, "body_too_large")
    check_problem(await post("/nowhere", content=chunks(300_000)), 413, "body_too_large")
    lying = {**json_type, "Content-Length": "5"}
    check_problem(await post("/answer", content=chunks(300_000), headers=lying), 413, "body_too_large")


@pytest.mark.parametrize("length", ["-1", "", "1e3", "٣", "0x10", "9" * 30])
async def test_a_strange_content_length_is_refused(world: World, length: str) -> None:
    reply = await world.client.post("/answer", content=b"{}", headers={"Content-Length": length.encode()})
    assert reply.status_code in {400, 413}


async def test_a_body_that_trickles_is_given_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def trickle() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(10)

    monkeypatch.setattr(middleware, "BODY_TIMEOUT_S", 0.02)
    check_problem(await world.client.post("/answer", content=trickle()), 408, "body_timeout")


async def test_unknown_addresses_and_methods_are_problems(world: World) -> None:
    check_problem(await world.client.get("/nowhere"), 404, "not_found")
    reply = await world.client.get("/answer")
    check_problem(reply, 405, "method_not_allowed")
    assert reply.headers["allow"] == "POST"
    problem = check_problem(await world.client.get("/%00%ff%0d%0a"), 404, "not_found")
    assert problem.instance == "/%00%EF%BF%BD%0D%0A"


async def test_unknown_adapters_are_not_found(world: World) -> None:
    check_problem(await world.ask(adapter="v0042"), 404, "adapter_not_found")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (QueueFull(), 503, "queue_full"),
        (TimeoutError(), 503, "deadline_exceeded"),
        (CorruptVersion("/secret/path"), 500, "adapter_corrupt"),
        (RuntimeError("File /etc/passwd at 0xdeadbeef: what is it?"), 500, "internal_error"),
        (RecursionError(), 500, "internal_error"),
    ],
)
async def test_failures_of_the_engine(world: World, error: Exception, status: int, code: str) -> None:
    world.engine.error = error
    with structlog.testing.capture_logs() as logged:
        reply = await world.ask()
    problem = check_problem(reply, status, code)
    assert problem.detail == f"{problem.title}."
    assert ("retry-after" in reply.headers) == (status == 503)
    assert "what is it?" not in str(logged)


async def test_who_would_wait_too_long_is_refused_before_the_image_is_decoded(tmp_path: Path) -> None:
    world = World(tmp_path, queue_wait_s=1.0)
    world.engine.hold = asyncio.Event()
    world.engine.pace_s = 0.3
    waiting = [asyncio.create_task(world.ask()) for _ in range(4)]
    await until(lambda: len(world.engine.asked) == 4)
    refused = await world.ask(image="not even an image")
    check_problem(refused, 503, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1
    world.engine.pace_s = 0.2
    check_problem(await world.ask(image="not even an image"), 422, "invalid_image")
    world.engine.hold.set()
    assert [reply.status_code for reply in await asyncio.gather(*waiting)] == [200] * 4


async def test_two_may_wait_however_slow_the_model_is(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.engine.hold, world.engine.pace_s = asyncio.Event(), 100.0
    waiting = [asyncio.create_task(world.ask()) for _ in range(3)]
    await until(lambda: len(world.engine.asked) == 3)
    check_problem(await world.ask(), 503, "queue_full")
    world.engine.hold.set()
    assert [reply.status_code for reply in await asyncio.gather(*waiting)] == [200] * 3


async def test_an_answer_has_a_deadline(tmp_path: Path) -> None:
    world = World(tmp_path, request_timeout_s=1)
    world.engine.hold = asyncio.Event()
    check_problem(await world.ask(), 503, "deadline_exceeded")
    assert world.engine.cancelled == 1
    await until(lambda: world.buffer.withdrawn == 1)


async def test_a_full_server_refuses_before_decoding(tmp_path: Path) -> None:
    world = World(tmp_path, queue_size=2)
    world.engine.hold = asyncio.Event()
    running = [asyncio.create_task(world.ask()) for _ in range(2)]
    await until(lambda: len(world.engine.asked) == 2)
    check_problem(await world.ask(image="not even an image"), 503, "queue_full")
    world.engine.hold.set()
    assert [reply.status_code for reply in await asyncio.gather(*running)] == [200, 200]
    assert (await world.ask()).status_code == 200


# --- idempotency -------------------------------------------------------------------------------------


async def test_a_key_that_asks_too_often_is_told_when_to_ask_again(tmp_path: Path) -> None:
    world = World(tmp_path, user_keys=(USER_KEY,), requests_per_minute=12)  # two at once, then one every 5 s
    asked = {"image": base64_png(), "question": "what?"}

    async def ask(headers: dict[str, str]) -> httpx2.Response:
        return await world.client.post("/answer", json=asked, headers=headers)

    assert [(await ask(USER)).status_code for _ in range(2)] == [200, 200]
    reply = await ask(USER)
    check_problem(reply, 429, "rate_limited")
    assert reply.headers["retry-after"] == "5"
    assert reply.headers["ratelimit-policy"] == '"questions";q=12;w=60'
    assert (await ask(ADMIN)).status_code == 200, "every key has its own"
    assert (await world.client.get("/info", headers=USER)).status_code == 200, "questions alone are counted"
    assert len(world.engine.asked) == 3


@pytest.mark.parametrize("large", [1, 1_000_000])
async def test_the_same_request_is_answered_once(
    world: World, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    monkeypatch.setattr(idempotency, "LARGE", large)
    world.client.headers["Idempotency-Key"] = "one"
    first, again = await world.ask(), await world.ask()
    assert again.content == first.content
    assert again.headers["idempotency-replayed"] == "true"
    assert "idempotency-replayed" not in first.headers
    assert again.headers["servetune-adapter-version"] == "v0002"
    assert len(world.engine.asked) == world.buffer.puts == 1
    check_problem(await world.ask(question="another?"), 422, "idempotency_mismatch")
    check_problem(
        await world.client.post("/v1/answer", headers={"Idempotency-Key": "x y"}), 422, "invalid_request"
    )


async def test_a_key_is_for_what_the_address_says_as_well(world: World) -> None:
    world.client.headers["Idempotency-Key"] = "one"
    body = {"image": base64_png(), "question": "what is this?"}
    assert (await world.client.post("/v1/answer?as=one", json=body)).status_code == 200
    check_problem(await world.client.post("/v1/answer?as=other", json=body), 422, "idempotency_mismatch")


async def test_a_form_sent_again_has_a_new_boundary(world: World) -> None:
    world.client.headers["Idempotency-Key"] = "two"
    first, again = await send_form(world), await send_form(world)
    assert first.request.headers["content-type"] != again.request.headers["content-type"]
    assert again.content == first.content
    check_problem(await send_form(world, n="1"), 422, "idempotency_mismatch")


async def test_a_running_request_is_not_started_twice(world: World) -> None:
    world.client.headers["Idempotency-Key"] = "three"
    world.engine.hold = asyncio.Event()
    running = asyncio.create_task(world.ask())
    await until(lambda: len(world.engine.asked) == 1)
    check_problem(await world.ask(), 409, "idempotency_in_flight")
    world.engine.hold.set()
    assert (await running).status_code == 200


async def test_a_failure_may_be_tried_again(world: World) -> None:
    world.client.headers["Idempotency-Key"] = "four"
    world.engine.error = QueueFull()
    assert (await world.ask()).status_code == 503
    world.engine.error = None
    assert (await world.ask()).status_code == 200


async def test_keys_of_different_callers_never_meet(world: World) -> None:
    world.client.headers["Idempotency-Key"] = "five"
    first = await world.ask()
    world.client.headers.update(ADMIN)
    assert (await world.ask(question="mine")).json()["id"] != first.json()["id"]


def test_replies_are_forgotten_in_time_and_in_bytes() -> None:
    def success(size: int) -> Reply:
        return Reply({"type": "http.response.start", "status": 200, "headers": []}, b"x" * size)

    short = Replies(ttl_s=-1)
    short.begin(b"a", b"1")
    short.finish(b"a", success(1))
    assert short.begin(b"a", b"2") is None
    small = Replies(max_bytes=10)
    for key in (b"a", b"b", b"c"):
        small.begin(key, b"")
        small.finish(key, success(4))
    assert small.begin(b"a", b"") is None
    assert small.begin(b"c", b"") is not None


# --- health, description, logs -----------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/livez", "/v2/health/live"])
async def test_liveness_is_the_engine_thread(world: World, path: str) -> None:
    assert (await world.client.get(path)).status_code == 200
    world.engine.error = RuntimeError("dead")
    check_problem(await world.client.get(path), 503, "engine_unresponsive")


@pytest.mark.parametrize("path", ["/readyz", "/health", "/v2/health/ready"])
async def test_readiness_is_the_engine_and_never_the_buffer(world: World, path: str) -> None:
    world.buffer.down = True
    reply = await world.client.get(path)
    assert (reply.status_code, reply.json()["buffer"]) == (200, {"connected": False})
    world.engine.is_ready = False
    check_problem(await world.client.get(path), 503, "not_ready")
    check_problem(await world.ask(), 503, "not_ready")


async def test_info_and_version(world: World) -> None:
    info = (await world.client.get("/info")).json()
    assert (info["model"], info["serving"], info["limits"]["max_body_bytes"]) == ("fake", "v0002", 200_000)
    assert (await world.client.get("/version")).json() == {"version": info["version"]}


async def test_the_description_is_complete(world: World) -> None:
    document = (await world.client.get("/openapi.json")).json()
    operation = document["paths"]["/v1/answer"]["post"]
    assert set(operation["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert "application/problem+json" in operation["responses"]["422"]["content"]
    text = json.dumps(document)
    for reference in {part.partition('"')[0] for part in text.split('"#/components/schemas/')[1:]}:
        assert reference in document["components"]["schemas"]
    assert document["components"]["schemas"]["AnswerForm"]["properties"]["image"]["type"] == "array"
    assert (await world.client.get("/docs")).status_code == 200


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(path, method, each) for path, item in document["paths"].items() for method, each in item.items()]


@pytest.mark.parametrize("user_keys", [(), (USER_KEY,)])
async def test_the_description_says_where_a_key_is_needed(user_keys: tuple[str, ...], tmp_path: Path) -> None:
    made = World(tmp_path, user_keys=user_keys)
    document = (await made.client.get("/openapi.json", headers=ADMIN)).json()
    secured = {path for path, _, each in operations(document) if each.get("security") == [{"bearer": []}]}
    history = {"/v1/adaptation/events", "/v1/adaptation/series"}
    admin = {path for path in document["paths"] if path.startswith(("/v1/adap", "/v1/audit"))} - history
    assert secured == (document["paths"].keys() - {"/", "/livez", "/readyz"} if user_keys else admin)


async def test_the_description_knows_what_any_address_may_say(world: World) -> None:
    document = (await world.client.get("/openapi.json")).json()
    for path, method, each in operations(document):
        assert {"400", "403", "408", "413", "500"} <= each["responses"].keys(), path
        heads = {one["name"] for one in each.get("parameters", ()) if one["in"] == "header"}
        assert ("Idempotency-Key" in heads) == (method == "post"), path


async def test_the_description_knows_of_no_null_that_cannot_be_sent(world: World) -> None:
    document = (await world.client.get("/openapi.json")).json()
    parameters = [one for _, _, each in operations(document) for one in each.get("parameters", ())]
    assert '"null"' not in json.dumps([*parameters, document["components"]["schemas"]["AnswerForm"]])
    rules = {one["name"]: one["schema"] for one in parameters}
    assert rules["cursor"]["minimum"] == 0
    assert rules["if-match"]["pattern"] == '^"?[0-9]{1,18}"?$'


async def test_the_description_tells_rows_files_and_steps_apart(world: World) -> None:
    document = (await world.client.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    rows = {name: each["properties"]["data"]["items"] for name, each in schemas.items() if name.startswith("Page")}
    assert rows == {f"Page_{name}_": {"$ref": f"#/components/schemas/{name}"} for name in PAGED}
    exported = document["paths"]["/v1/adapters/{name}/versions/{version}/export"]["get"]["responses"]["200"]
    assert exported["content"] == {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}}
    assert "prefixItems" not in json.dumps(document)


@pytest.mark.parametrize("path", ["/answer", "/v1/chat/completions"])
async def test_the_example_of_the_description_is_answered(world: World, path: str) -> None:
    document = (await world.client.get("/openapi.json")).json()
    content = document["paths"][path]["post"]["requestBody"]["content"]
    reply = await world.client.post(path, json=content["application/json"]["example"])
    assert reply.status_code == 200, reply.text


def test_the_lifespan_starts_and_stops_the_engine(world: World) -> None:
    with TestClient(world.app, base_url="http://localhost") as client:
        assert client.get("/readyz").status_code == 200
        assert world.engine.life == ["started"]
    assert world.engine.life == ["started", "stopped"]


async def test_logs_hold_one_line_per_request_and_nothing_that_was_sent(world: World) -> None:
    with structlog.testing.capture_logs() as logged:
        await world.ask(question="canary", metadata={"canary": "canary"})
        await world.ask(question="canary", n="canary")
        await world.client.get("/canary", headers={"Authorization": "Bearer canary"})
    lines = [line for line in logged if line["event"] == "request"]
    assert [line["status"] for line in lines] == [200, 422, 404]
    assert [line["route"] for line in lines] == ["/v1/answer", "/v1/answer", "unmatched"]
    assert lines[0]["version"] == "v0002"
    assert "canary" not in str(logged)


def answers(world: World) -> AnswerService:
    found: AnswerService = world.app.state.services.answers
    return found
