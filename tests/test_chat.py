"""OpenAI's chat completions and models, asked by their own client."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import httpx2
import openai
import pytest
from openai import AsyncOpenAI

from servetune.adapters.family import Family
from servetune.adapters.policy import LoraSpec, Policy
from servetune.server.access import Access
from servetune.server.app import create_app
from servetune.server.audit import AuditLog
from servetune.server.buffer import QueryBuffer
from servetune.server.history import History
from servetune.server.lines import Lines
from servetune.server.model import Stores
from servetune.server.settings import Settings
from servetune.server.stage import SLOTS, QueueFull, Stage
from tests.conftest import noise
from tests.fakes import USER_KEY, FakeBuffer, FakeHistory, World, png, until


def asked(text: str = "what is this?", images: int = 1) -> list[dict[str, Any]]:
    """One user message with pictures."""
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}}] * images
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def client_of(transport: httpx2.AsyncBaseTransport, key: str = "any") -> AsyncOpenAI:
    http = httpx2.AsyncClient(transport=transport, base_url="http://localhost")
    return AsyncOpenAI(base_url="http://localhost/v1", api_key=key, http_client=http, max_retries=0)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, buffer_wait_s=0.02)


@pytest.fixture
def client(world: World) -> AsyncOpenAI:
    return client_of(httpx2.ASGITransport(world.app))


# --- with a fake engine: what is asked, and what comes back --------------------------------------------


async def test_a_completion_is_an_answer(world: World, client: AsyncOpenAI) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *asked("which animal?", images=2)]
    made = await client.chat.completions.create(model="default", messages=messages, seed=7, user="me")  # type: ignore[call-overload]
    assert (made.object, made.model, made.choices[0].message.content) == ("chat.completion", "default", "a thing")
    assert (made.choices[0].finish_reason, made.choices[0].logprobs) == ("stop", None)
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens == 11
    [(query, sampling, choice)] = world.engine.asked
    assert (query.question, len(query.images), choice) == ("Be brief.\nwhich animal?", 2, "live")
    assert (sampling.n, sampling.temperature, sampling.max_tokens, sampling.seed) == (1, 0.0, 256, 7)
    ours = made.model_extra["servetune"]
    assert ours["adapter"]["version"] == "v0002"
    assert ours["adaptation"]["status"] == "queued"
    assert list(world.buffer.kept) == [ours["adaptation"]["query_id"]]


@pytest.mark.parametrize(
    ("model", "choice"),
    [("default", "live"), ("fake", "base"), ("default@v0001", "v0001"), ("default@last-good", "last-good")],
)
async def test_the_model_chooses_the_adapter(world: World, client: AsyncOpenAI, model: str, choice: str) -> None:
    raw = await client.chat.completions.with_raw_response.create(model=model, messages=asked())  # type: ignore[arg-type]
    assert world.engine.asked[0][2] == choice
    assert raw.headers["servetune-adapter-version"] == raw.parse().model_extra["servetune"]["adapter"]["version"]
    assert len(world.buffer.kept) == (choice == "live"), "only what is live is taught by its questions"


async def test_models_are_listed(world: World, client: AsyncOpenAI) -> None:
    listed = [model async for model in client.models.list()]
    names = {model.id for model in listed}
    assert {"fake", "default", "default@live", "default@base", "default@v0000", "default@v0002"} <= names
    by_name = {model.id: model for model in listed}
    assert by_name["default@v0002"].model_extra["parent"] == "default@v0001"
    assert by_name["default"].model_extra == {"root": "default@v0002", "parent": "fake"}
    assert (await client.models.retrieve("default@v0001")).id == "default@v0001"
    with pytest.raises(openai.NotFoundError, match="No such model here: default"):
        await client.models.retrieve("gpt-5")


async def test_labels_make_it_recognition(world: World, client: AsyncOpenAI) -> None:
    made = await client.chat.completions.create(
        model="default",
        messages=asked(),  # type: ignore[arg-type]
        extra_body={"candidate_labels": ["cat", "dog"], "adapt": False},
    )
    assert made.choices[0].message.content == "cat"
    ours = made.model_extra["servetune"]
    assert [row["label"] for row in ours["candidates"]] == ["cat", "dog"]
    assert ours["adaptation"]["reason"] == "adapt_false"


async def test_the_header_opts_out_here_too(world: World, client: AsyncOpenAI) -> None:
    no = {"Servetune-Adapt": "false"}
    made = await client.chat.completions.create(model="default", messages=asked(), extra_headers=no)  # type: ignore[arg-type]
    assert made.model_extra["servetune"]["adaptation"]["reason"] == "adapt_false"
    assert not world.buffer.kept


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"messages": [{"role": "user", "content": "no image"}]}, "messages", "needs an image_url part"),
        ({"messages": [*asked(), {"role": "assistant", "content": "x"}]}, "messages", "one question at a time"),
        ({"messages": [*asked(), *asked()]}, "messages", "one question at a time"),
        (
            {"messages": [{"role": "system", "content": asked()[0]["content"]}, *asked()]},
            "messages",
            "belong into",
        ),
        ({"top_p": 0.5}, "top_p", "greater than or equal to 1"),
        ({"extra_body": {"tools": []}}, "tools", "not permitted"),
        ({"response_format": {"type": "json_object"}}, "response_format", "'text'"),
        ({"n": 65}, "n", "less than or equal to 64"),
        ({"n": 64, "max_tokens": 1024}, None, "at most 8192"),
        ({"extra_body": {"deadline_s": 3}}, None, "'deadline_s' is for"),
    ],
)
async def test_what_cannot_be_done_is_said(
    client: AsyncOpenAI, change: dict[str, Any], param: str | None, says: str
) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match=says) as caught:
        await client.chat.completions.create(**{"model": "default", "messages": asked(), **change})
    error = caught.value.body
    assert isinstance(error, dict)
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")
    assert (error["param"] or "").partition(".")[0] == (param or "")


@pytest.mark.parametrize("stream", [False, True])
async def test_errors_are_those_that_the_client_knows(tmp_path: Path, stream: bool) -> None:
    world = World(tmp_path, user_keys=(USER_KEY,))
    transport = httpx2.ASGITransport(world.app)
    with pytest.raises(openai.AuthenticationError):
        await client_of(transport, "wrong").chat.completions.create(
            model="default",
            messages=asked(),
            stream=stream,  # type: ignore[call-overload]
        )
    client = client_of(transport, USER_KEY)
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="other", messages=asked(), stream=stream)  # type: ignore[call-overload]
    assert missing.value.code == "model_not_found"
    world.engine.error = QueueFull()
    with pytest.raises(openai.InternalServerError) as full:
        await client.chat.completions.create(model="default", messages=asked(), stream=stream)  # type: ignore[call-overload]
    assert (full.value.status_code, full.value.code) == (503, "queue_full")
    assert full.value.response.headers["retry-after"] == "1"


@pytest.mark.parametrize("text", ["a thing", None], ids=["after its first words", "before"])
async def test_who_leaves_a_stream_frees_the_model_and_teaches_nothing(world: World, text: str | None) -> None:
    """As a server speaks to the app: the request, then, once something was sent or asked, the disconnect."""
    world.engine.hold, world.engine.text = asyncio.Event(), text
    body = json.dumps({"model": "default", "messages": asked(), "stream": True}).encode()
    sent: list[dict[str, Any]] = []
    requests = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if requests:
            return requests.pop()
        await until(
            lambda: (
                any(b"a th" in each.get("body", b"") for each in sent) or (bool(world.engine.asked) and not text)
            )
        )
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    path = "/v1/chat/completions"
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": headers}
    more = {"query_string": b"", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1"}
    await world.app(
        {**scope, **more, "scheme": "http", "server": ("localhost", 80), "client": ("::1", 1)}, receive, send
    )
    assert world.engine.cancelled == 1
    await until(lambda: world.buffer.withdrawn == 1)


# --- with the real engine: tokens ----------------------------------------------------------------------


@pytest.fixture
async def tiny_client(tmp_path: Path, tiny: Path) -> AsyncIterator[AsyncOpenAI]:
    """A client of a real engine on a tiny checkpoint; its base always says something."""
    settings = Settings(home=tmp_path, model="tiny")
    policy = Policy(Family.load(str(tiny)), LoraSpec(4, 8), SLOTS)
    audit, buffer = AuditLog(settings.path("audit.jsonl")), cast(QueryBuffer, FakeBuffer())
    lines = Lines(settings, Stage(policy, settings), Stores(settings, policy), buffer)
    app = create_app(settings, lines, Access([], None), audit, cast(History, FakeHistory()))
    async with app.router.lifespan_context(app):
        yield client_of(httpx2.ASGITransport(app))


def pictured(text: str) -> list[dict[str, Any]]:
    file = io.BytesIO()
    noise().save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    image = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


async def test_a_stream_says_what_the_whole_says(tiny_client: AsyncOpenAI) -> None:
    call: dict[str, Any] = {"model": "tiny", "messages": pictured("what is it?"), "max_tokens": 12}
    for more in ({}, {"temperature": 1.0, "seed": 3}, {"stop": "a"}):
        whole = await tiny_client.chat.completions.create(**call, **more)
        stream = await tiny_client.chat.completions.create(
            **call, **more, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
        assert chunks[-1].usage == whole.usage
        assert "a" not in text or "stop" not in more
        if not more:
            assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) > 3, "in pieces"


async def test_several_choices_and_their_tokens(tiny_client: AsyncOpenAI) -> None:
    call: dict[str, Any] = {"model": "tiny", "messages": pictured("what is it?"), "max_tokens": 4, "seed": 1}
    made = await tiny_client.chat.completions.create(**call, n=3, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    for choice in made.choices:
        tokens = choice.logprobs.content
        assert "".join(token.token for token in tokens).strip() == choice.message.content
        for token in tokens:
            assert token.logprob <= 1e-6
            assert len(token.top_logprobs) == 2
            assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
            assert token.logprob <= token.top_logprobs[0].logprob + 1e-5
    greedy = await tiny_client.chat.completions.create(**call, logprobs=True, top_logprobs=1)
    for token in greedy.choices[0].logprobs.content:
        assert token.token == token.top_logprobs[0].token
    streamed = await tiny_client.chat.completions.create(**call, n=3, logprobs=True, stream=True)
    texts = {0: "", 1: "", 2: ""}
    async for chunk in streamed:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert [*texts.values()] == [choice.message.content for choice in made.choices]


async def test_events_are_json_and_end_with_done(tiny_client: AsyncOpenAI) -> None:
    body = {"model": "tiny", "messages": pictured("?"), "max_tokens": 3, "stream": True}
    reply = await tiny_client._client.post("/v1/chat/completions", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    last = json.loads(events[-2])
    assert last["choices"][0]["finish_reason"] in ("stop", "length")
    assert last["servetune"]["adapter"]["version"] == "v0000"
