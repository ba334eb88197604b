"""The SDK against fake servers: what it sends, what it retries, what it raises, what it keeps to itself."""

import asyncio
import base64
import copy
import inspect
import io
import itertools
import json
import pickle
import subprocess
import sys
import tarfile
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace

import httpx2
import numpy as np
import pytest
from PIL import Image

from servetune import clients
from servetune.clients import AsyncClient, Client, drivers, errors, images
from servetune.clients.resources import Adaptation, Adapters, AsyncAdaptation, AsyncAdapters
from servetune.clients.session import retry_delay

ANSWER = {
    "id": "ans_1",
    "created": 1,
    "model": "nano",
    "adapter": {"name": "default", "version": "v0007", "alias": "live", "digest": "sha256:0"},
    "task": "vqa",
    "answer": "red",
    "confidence": 0.5,
    "confidence_source": "sequence_probability",
    "candidates": [{"answer": "red", "score": 0.5}],
    "finish_reason": "stop",
    "diagnostics": {},
    "adaptation": {"status": "queued", "query_id": "q_1"},
    "usage": {"input_tokens": 9, "output_tokens": 1},
    "timings": {"queue_s": 0.0, "inference_s": 0.1},
}
VERSION = {
    "version": "v0001",
    "created": 1.0,
    "origin": "worker",
    "digest": "d",
    "base_digest": "b",
    "rank": 8,
    "target_modules": ["q_proj"],
}
ADAPTER = {
    "name": "default",
    "aliases": {"live": "v0001"},
    "live": "v0001",
    "serving": "v0001",
    "generation": 1,
    "num_versions": 2,
    "resident": [],
    "leases": {},
}
SETTINGS = {"mode": "canary", "canary_share": 0.1, "labels": []}
ERASED = {"withdrawn": 0, "dropped": ["v0007"], "live": "v0006", "serving": "v0006"}
STATUS = {
    "adapter": "default",
    "paused": False,
    "live": "v0002",
    "serving": "v0002",
    "lag_versions": 0,
    "buffer": {"connected": True},
    "worker": {"state": "idle"},
}
INFO = {
    **dict.fromkeys(("version", "model", "base_digest", "adapter", "engine", "device", "dtype"), "x"),
    "limits": {},
}


def problem(status, code, detail="no", **headers):
    body = {"type": f"/problems/{code}", "title": "t", "status": status, "detail": detail, "code": code}
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx2.Response(status, json=body, headers=headers)


class Server:
    """Gives its replies in turn, the last one for ever, and remembers the requests."""

    def __init__(self, *replies):
        self.replies = list(replies)
        self.requests = []

    def __call__(self, request):
        self.requests.append(request)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, Exception):
            raise reply
        # A fresh copy: a response can be read only once.
        return httpx2.Response(reply.status_code, headers=reply.headers, content=reply.content)

    @property
    def body(self):
        return json.loads(self.requests[-1].content)

    @property
    def keys(self):
        return [request.headers["idempotency-key"] for request in self.requests]


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """No environment, and no waiting: pauses are written down instead."""
    for name in ("BASE_URL", "API_KEY", "ADMIN_KEY"):
        monkeypatch.delenv(f"SERVETUNE_{name}", raising=False)
    taken = []

    async def pause(seconds):
        taken.append(seconds)

    # What the drivers see, not the modules themselves: the app under test goes on sleeping.
    monkeypatch.setattr(drivers, "time", SimpleNamespace(sleep=taken.append))
    monkeypatch.setattr(drivers, "asyncio", SimpleNamespace(sleep=pause, to_thread=asyncio.to_thread))
    return taken


@pytest.fixture(params=["sync", "async"])
def ask(request):
    """ask(server, do, **options): what `do(client)` gives, from either client."""

    async def in_loop(do, **options):
        async with AsyncClient(**options) as client:
            result = do(client)
            return [item async for item in result] if hasattr(result, "__aiter__") else await result

    def in_thread(do, **options):
        with Client(**options) as client:
            result = do(client)
            return list(result) if inspect.isgenerator(result) else result

    def run(server, do, **options):
        options["transport"] = httpx2.MockTransport(server)
        return asyncio.run(in_loop(do, **options)) if request.param == "async" else in_thread(do, **options)

    return run


def ok(body):
    return httpx2.Response(200, json=body)


def what(client):
    return client.answer(b"\xff\xd8\xff", "what?", resize=False)


# --- what is sent ------------------------------------------------------------------------------------


def test_an_answer_is_typed_and_only_what_was_given_is_sent(ask):
    server = Server(ok(ANSWER))
    result = ask(server, lambda c: c.answer(png(), "colour?", temperature=0.0, adapter="base", adapt=False))
    assert (result.answer, result.adapter.version) == ("red", "v0007")
    assert str(server.requests[0].url) == "http://127.0.0.1:8000/v1/answer"
    assert server.body.pop("image")["media_type"] == "image/png"
    assert {k: v for k, v in server.body.items() if k != "image"} == {
        "question": "colour?",
        "temperature": 0.0,
        "adapter": "base",
        "adapt": False,
    }


def test_an_answer_now_is_asked_for_with_its_deadline(ask):
    done = {"status": "now", "query_id": "q_1", "queued": True, "views": 5, "rollouts": 16}
    server = Server(ok({**ANSWER, "confidence_source": "pooled_probability", "adaptation": done}))
    result = ask(server, lambda c: c.answer(png(), "colour?", adapt="now", deadline_s=2.0))
    assert (server.body["adapt"], server.body["deadline_s"]) == ("now", 2.0)
    assert (result.adaptation.status, result.adaptation.queued, result.adaptation.views) == ("now", True, 5)
    ask(server, lambda c: c.recognize(png(), ["a", "b"], adapt="now"))
    assert server.body["adapt"] == "now"
    assert "deadline_s" not in server.body


def test_recognition_sends_its_labels_and_no_question_by_itself(ask):
    server = Server(ok({**ANSWER, "task": "recognition"}))
    ask(server, lambda c: c.recognize([png(), "https://example.org/b.png"], ("cat", "dog"), top_k=2))
    assert server.body["candidate_labels"] == ["cat", "dog"]
    assert server.body["images"][1] == {"url": "https://example.org/b.png"}
    assert "question" not in server.body
    assert "image" not in server.body
    with pytest.raises(TypeError, match="list of str"):
        ask(server, lambda c: c.recognize(png(), "cat"))


def test_each_route_gets_its_own_key(ask):
    server = Server(ok(INFO), ok(STATUS))
    options = {"api_key": "user-key", "admin_key": "admin-key"}  # pragma: allowlist secret
    ask(server, lambda c: c.info(), **options)
    ask(server, lambda c: c.adaptation.status(), **options)
    sent = [request.headers["authorization"] for request in server.requests]
    assert sent == ["Bearer user-key", "Bearer admin-key"]


def test_without_a_key_none_is_sent_and_the_admin_key_is_no_user_key(ask):
    server = Server(ok(INFO))
    ask(server, lambda c: c.info(), admin_key="admin-key")
    assert "authorization" not in server.requests[0].headers


def test_the_environment_names_server_and_keys(monkeypatch, ask):
    monkeypatch.setenv("SERVETUNE_BASE_URL", "https://box.example:9000/tune/")
    monkeypatch.setenv("SERVETUNE_API_KEY", "from-env")
    server = Server(ok(INFO))
    ask(server, lambda c: c.info())
    assert str(server.requests[0].url) == "https://box.example:9000/tune/info"
    assert server.requests[0].headers["authorization"] == "Bearer from-env"


@pytest.mark.parametrize(
    ("do", "method", "path", "body", "reply"),
    [
        (lambda c: c.adapters.get("a b"), "GET", "/v1/adapters/a%20b", None, ADAPTER),
        (lambda c: c.adapters.version(7), "GET", "/v1/adapters/default/versions/v0007", None, VERSION),
        (
            lambda c: c.adapters.snapshot("keep", {"by": "me"}, "x"),
            "POST",
            "/v1/adapters/x/snapshot",
            {"label": "keep", "metadata": {"by": "me"}},
            VERSION,
        ),
        (
            lambda c: c.adapters.promote(3),
            "POST",
            "/v1/adapters/default/promote",
            {"version": "v0003"},
            ADAPTER,
        ),
        (lambda c: c.adapters.rollback(), "POST", "/v1/adapters/default/rollback", {}, ADAPTER),
        (
            lambda c: c.adapters.reset(purge_buffer=True),
            "POST",
            "/v1/adapters/default/reset",
            {"to": "base", "purge_buffer": True},
            VERSION,
        ),
        (lambda c: c.adapters.settings(), "GET", "/v1/adapters/default/settings", None, SETTINGS),
        (
            lambda c: c.adapters.configure("x", mode="canary", labels=[]),
            "PATCH",
            "/v1/adapters/x/settings",
            {"mode": "canary", "labels": []},
            SETTINGS,
        ),
        (lambda c: c.adapters.pin(7), "POST", "/v1/adapters/default/versions/v0007/pin", {}, VERSION),
        (lambda c: c.adapters.unpin("a"), "POST", "/v1/adapters/default/versions/a/unpin", {}, VERSION),
        (lambda c: c.adaptation.pause(), "POST", "/v1/adaptation/pause", {}, STATUS),
        (lambda c: c.adaptation.erase(["q_1"]), "POST", "/v1/adaptation/erase", {"query_ids": ["q_1"]}, ERASED),
        (lambda c: c.adaptation.resume(), "POST", "/v1/adaptation/resume", {}, STATUS),
    ],
)
def test_admin_calls(ask, do, method, path, body, reply):
    server = Server(ok(reply))
    result = ask(server, do)
    [request] = server.requests
    assert (request.method, request.url.raw_path.decode()) == (method, path)
    assert (json.loads(request.content) if body is not None else None) == body
    told = result.model_dump(exclude_unset=True)
    assert told == SETTINGS or told.items() >= {"version": "v0001"}.items() or result.live


def test_listings_go_through_all_pages(ask):
    pages = [
        ok({"data": [VERSION], "next_cursor": "c1"}),
        ok({"data": [{**VERSION, "version": "v0002"}], "next_cursor": None}),
    ]
    server = Server(*pages)
    found = ask(server, lambda c: c.adapters.versions(page_size=1))
    assert [each.version for each in found] == ["v0001", "v0002"]
    assert [str(r.url.query, "ascii") for r in server.requests] == ["limit=1", "cursor=c1&limit=1"]
    adapters = Server(ok({"data": [ADAPTER], "next_cursor": "c"}), ok({"data": [ADAPTER]}))
    assert len(ask(adapters, lambda c: c.adapters.list())) == 2
    entry = {"timestamp": 1.0, "event": "adapter_promoted", "actor": "admin"}
    assert ask(Server(ok({"data": [entry]})), lambda c: c.adaptation.audit())[0].event == "adapter_promoted"


def test_ready_is_a_plain_yes_or_no_asked_once(ask, pauses):
    assert ask(Server(httpx2.Response(200)), lambda c: c.ready()) is True
    assert ask(Server(problem(503, "not_ready")), lambda c: c.ready()) is False
    assert ask(Server(httpx2.ConnectError("refused")), lambda c: c.ready()) is False
    assert pauses == []


def test_waiting_for_a_version_polls_what_is_served(ask, pauses):
    server = Server(ok({**INFO, "serving": "v0006"}), ok({**INFO, "serving": "v0008"}))
    assert ask(server, lambda c: c.wait_for_version("v0007")) == "v0008"
    assert pauses == [0.25]
    with pytest.raises(clients.APITimeoutError, match="still serving v0008, not v0009"):
        ask(server, lambda c: c.wait_for_version(9, timeout_s=0))
    with pytest.raises(ValueError, match="no version"):
        ask(server, lambda c: c.wait_for_version("latest"))


def test_waiting_asks_the_adaptation_status_where_info_is_silent(ask):
    assert ask(Server(ok(INFO), ok(STATUS)), lambda c: c.wait_for_version(2)) == "v0002"


# --- retries -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [
        httpx2.ConnectError("refused"),
        httpx2.ReadTimeout("slow"),
        problem(408, "timeout"),
        problem(409, "idempotency_in_flight"),
        problem(429, "quota"),
        problem(500, "internal_error"),
        problem(503, "queue_full"),
    ],
    ids=str,
)
def test_what_may_pass_is_tried_again_under_one_idempotency_key(ask, pauses, failure):
    server = Server(failure, failure, ok(ANSWER))
    assert ask(server, what).answer == "red"
    assert len(set(server.keys)) == 1
    assert len({request.content for request in server.requests}) == 1
    assert [request.headers["servetune-retry-count"] for request in server.requests] == ["0", "1", "2"]
    assert 0.375 <= pauses[0] <= 0.5
    assert 0.75 <= pauses[1] <= 1.0


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 415, 422, 307])
def test_what_will_not_pass_is_not(ask, pauses, status):
    server = Server(problem(status, "some_code"))
    with pytest.raises(clients.APIStatusError):
        ask(server, what)
    assert len(server.requests) == 1
    assert pauses == []


def test_the_last_error_is_raised_when_retries_run_out(ask):
    server = Server(problem(503, "queue_full", x_request_id="req_9"))
    with pytest.raises(clients.QueueFullError) as caught:
        ask(server, what, max_retries=1)
    assert len(server.requests) == 2
    assert (caught.value.code, caught.value.request_id) == ("queue_full", "req_9")


def test_two_calls_are_two_logical_posts_and_a_key_can_be_given(ask):
    server = Server(ok(ANSWER))
    ask(server, what)
    ask(server, what)
    ask(server, lambda c: c.answer(png(), "q", idempotency_key="mine"))
    assert len(set(server.keys)) == 3
    assert server.keys[2] == "mine"


def test_the_server_says_how_long_to_wait(ask, pauses):
    ask(Server(problem(429, "quota", retry_after="7"), ok(ANSWER)), what)
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    ask(Server(problem(503, "queue_full", retry_after=soon), ok(ANSWER)), what)
    assert pauses[0] == 7
    assert 50 < pauses[1] <= 60


def test_a_wait_of_more_than_two_minutes_is_left_to_the_caller(ask, pauses):
    with pytest.raises(clients.RateLimitError) as caught:
        ask(Server(problem(429, "quota", retry_after="121")), what)
    assert caught.value.retry_after == 121
    assert pauses == []


def test_the_backoff_doubles_up_to_eight_seconds():
    delays = [retry_delay(errors.APIConnectionError("x"), attempt) for attempt in range(7)]
    bounds = [0.5, 1, 2, 4, 8, 8, 8]
    assert all(0.75 * bound <= delay <= bound for delay, bound in zip(delays, bounds, strict=True))


# --- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "invalid_json", clients.BadRequestError),
        (401, "unauthorized", clients.AuthenticationError),
        (403, "forbidden", clients.PermissionDeniedError),
        (404, "not_found", clients.NotFoundError),
        (404, "adapter_not_found", clients.AdapterNotFoundError),
        (409, "alias_moved", clients.ConflictError),
        (413, "body_too_large", clients.PayloadTooLargeError),
        (415, "unsupported_image", clients.UnsupportedMediaTypeError),
        (422, "invalid_request", clients.UnprocessableEntityError),
        (429, "quota", clients.RateLimitError),
        (500, "internal_error", clients.InternalServerError),
        (503, "queue_full", clients.QueueFullError),
        (418, "teapot", clients.APIStatusError),
        (400, "queue_full", clients.BadRequestError),  # the status decides where the two disagree
    ],
)
def test_each_reply_has_its_class_and_survives_pickling(status, code, kind):
    reply = problem(status, code, "because", x_request_id="req_1", retry_after="3")
    error = errors.status_error(reply.status_code, reply.headers, reply.content)
    assert type(error) is kind
    assert str(error) == f"because [{status} {code}, request req_1]"
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is kind
        assert (twin.status, twin.code, twin.request_id, twin.retry_after) == (status, code, "req_1", 3.0)
        assert twin.problem == error.problem


@pytest.mark.parametrize("body", [b"", b"<h1>Bad Gateway</h1>", b"\xff\xfe", b"[]", b'{"detail": "x"}'])
def test_a_reply_that_is_no_problem_document_is_still_an_error(body):
    error = errors.status_error(502, httpx2.Headers({"retry-after": "soon"}), body)
    assert isinstance(error, clients.InternalServerError)
    assert (error.problem, error.code, error.retry_after) == (None, None, None)
    assert str(error) == "Bad Gateway [502 no code]"


def test_a_success_that_is_not_ours_is_explained(ask):
    with pytest.raises(clients.APIError, match="does not read as Info: is this a servetune server"):
        ask(Server(httpx2.Response(200, content=b"<html>")), lambda c: c.info())


def test_connection_errors_name_the_server_and_pickle(ask):
    with pytest.raises(clients.APIConnectionError, match=r"cannot reach http://box:1: refused") as caught:
        ask(Server(httpx2.ConnectError("refused")), lambda c: c.info(), base_url="http://box:1", max_retries=0)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(clients.APITimeoutError):
        ask(Server(httpx2.ReadTimeout("")), lambda c: c.info(), max_retries=0)


def test_keys_appear_in_no_text_of_ours(ask):
    client = Client(api_key="s3cret-user", admin_key="s3cret-admin")
    assert "s3cret" not in repr(client) + repr(client._session) + repr(client.with_options(timeout=1))
    client.close()
    for failure in (httpx2.ConnectError("refused"), problem(401, "unauthorized")):
        with pytest.raises(clients.APIError) as caught:
            ask(Server(failure), lambda c: c.info(), api_key="s3cret-user", max_retries=0)
        assert "s3cret" not in str(caught.value) + repr(caught.value) + repr(caught.value.__cause__)


@pytest.mark.parametrize("key", ["s3cret\n", "s3crét", "s3cret\x00", " s3cret"])
def test_a_key_no_header_can_carry_is_refused_without_quoting_it(key):
    with pytest.raises(ValueError, match="api_key must be printable") as caught:
        Client(api_key=key)
    assert "s3cr" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["box:8000", "ftp://box", "http://me:" + "pw@box", "http://", "http://box?x=1", "http://box:port"]
)
def test_an_address_that_cannot_be_used_is_refused(url):
    with pytest.raises(ValueError, match="base_url"):
        Client(url)


def test_a_redirect_is_an_error_and_no_key_follows_it(ask):
    server = Server(httpx2.Response(307, headers={"location": "https://evil.example/info"}))
    with pytest.raises(clients.APIStatusError, match="redirects are not followed"):
        ask(server, lambda c: c.info(), api_key="k")
    assert [request.url.host for request in server.requests] == ["127.0.0.1"]


# --- images ------------------------------------------------------------------------------------------


def picture(side=4, mode="RGB"):
    return Image.new(mode, (side, 3))


def png(side=4, form="PNG"):
    buffer = io.BytesIO()
    picture(side).save(buffer, form)
    return buffer.getvalue()


def opened(wire):
    return Image.open(io.BytesIO(base64.b64decode(wire["data"])))


def test_small_files_are_sent_as_they_are_however_they_are_given(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png())
    with path.open("rb") as file:
        given = [str(path), path, png(), bytearray(png()), io.BytesIO(png()), file]
        sent = [images.encode(image) for image in given]
    assert all(wire == {"data": base64.b64encode(png()).decode(), "media_type": "image/png"} for wire in sent)


def test_addresses_are_passed_on():
    for url in ("https://example.org/a.png", "HTTPS://example.org/a", "data:image/png;base64,aGk="):
        assert images.encode(url) == {"url": url}


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F"])
def test_any_mode_of_pillow_arrives(mode):
    assert opened(images.encode(picture(mode=mode))).size == (4, 3)


def test_arrays_arrive_pixel_by_pixel():
    array = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert np.array_equal(np.asarray(opened(images.encode(array))), array)
    assert opened(images.encode(array[:, ::2, 0])).mode == "L"
    for wrong in (array.astype(float), array[0, 0], np.zeros((2, 2, 2), np.uint8), np.zeros((0, 2), np.uint8)):
        with pytest.raises(clients.ImageError, match="must be uint8"):
            images.encode(wrong)


def test_large_pictures_are_shrunk_and_the_original_is_left_alone():
    large = picture(4000)
    assert opened(images.encode(large)).size == (2048, 2)
    assert large.size == (4000, 3)
    assert opened(images.encode(png(4000, "JPEG"))).size == (2048, 2)
    assert opened(images.encode(large, resize=False)).size == (4000, 3)
    assert opened(images.encode(png(4000), resize=False)).size == (4000, 3)


def test_a_large_opaque_picture_goes_as_jpeg_since_png_may_be_too_much():
    assert images.encode(Image.new("RGB", (1200, 1200)))["media_type"] == "image/jpeg"
    assert images.encode(Image.new("RGBA", (1200, 1200)))["media_type"] == "image/png"


def test_a_photo_is_turned_upright_before_its_orientation_is_lost():
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    picture(4000).save(buffer, "JPEG", exif=exif)
    assert opened(images.encode(buffer.getvalue())).size == (2, 2048)


def test_other_formats_are_translated():
    assert images.encode(png(form="BMP"))["media_type"] == "image/png"
    assert images.encode(png(form="GIF"), resize=False)["media_type"] == "image/png"
    assert images.encode(png(form="WEBP"))["media_type"] == "image/webp"


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("no-such.png", "'no-such.png' is no existing file; a str may be a path, an https:// URL or a data: URI"),
        ("http://example.org/a.png", "is no existing file"),
        ("A" * 5_000_000, r"AAA\.\.\.' is no existing file"),
        (Path("no-such.png"), "cannot read 'no-such.png': No such file"),
        (Path("."), "Is a directory"),
        (b"", "is empty"),
        (b"text", "no image that Pillow can read"),
        (b"\xff\xd8\xff broken", "no image that Pillow can read"),
        (io.StringIO("x"), "binary mode"),
        (7, "cannot send a int"),
    ],
    ids=str,
)
def test_a_bad_image_is_explained_and_never_sent(image, reason):
    with pytest.raises(clients.ImageError, match=reason) as caught:
        images.encode(image)
    assert isinstance(caught.value, ValueError)
    assert len(str(caught.value)) < 300


def test_image_errors_come_before_the_server_is_asked(ask):
    server = Server(ok(ANSWER))
    with pytest.raises(clients.ImageError):
        ask(server, lambda c: c.answer("missing.png", "q"))
    assert server.requests == []


def test_without_pillow_known_formats_still_go(monkeypatch):
    data = png(4000)
    for name in ("PIL", "PIL.Image"):
        monkeypatch.setitem(sys.modules, name, None)
    assert base64.b64decode(images.encode(data)["data"]) == data
    with pytest.raises(clients.ImageError, match="install pillow"):
        images.encode(b"BM...")
    with pytest.raises(clients.ImageError, match="pip install pillow"):
        images.encode(np.zeros((2, 2), np.uint8))


# --- export ------------------------------------------------------------------------------------------


def tar(pax_headers=None, **files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.pax_headers = pax_headers or {}
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


FILES = {"v0002/adapter_config.json": b"{}", "v0002/adapter_model.safetensors": b"weights"}


@pytest.mark.parametrize("files", [FILES, {Path(name).name: data for name, data in FILES.items()}])
def test_an_export_becomes_a_peft_directory(ask, tmp_path, files):
    server = Server(problem(503, "not_ready"), httpx2.Response(200, content=tar(**files)))
    target = ask(server, lambda c: c.adapters.export(2, tmp_path / "out"), admin_key="a")
    assert server.requests[-1].url.path == "/v1/adapters/default/versions/v0002/export"
    assert sorted(path.name for path in target.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (target / "adapter_model.safetensors").read_bytes() == b"weights"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    "content",
    [
        tar(**FILES, **{"../escaped": b"x"}),
        tar(**FILES, **{"v0002/link": "/etc"}),
        tar(**FILES, **{"v0002/link": "../../escaped"}),
        tar(**{"v0002/other.txt": b"x"}),
        tar(**FILES)[:700],
        tar(**FILES)[:1024],
        b"not a tar",
        tar({"GNU.sparse.map": "0,4", "GNU.sparse.size": "5000000"}, **FILES),
        tar({"path": "v0002/a\0b"}, **FILES),
        tar({"path": "v0002"}, **FILES),
        tar(**FILES, **{"v0002/adapter_config.json/more": b"x"}),
        tar(**FILES, v0002=b"x"),
        tar(**FILES, **{"a/" * 50 + "b": b"x"}),
        tar(**FILES, **{"v0002/" + "x" * 300: b"x"}),
        tar(**FILES, **{"v0002/\udcff": b"x"}),
        tar({"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, **FILES),
        tar({"GNU.sparse.map": "0,x", "GNU.sparse.size": "none"}, **FILES),
    ],
    ids=[
        "traversal",
        "absolute link",
        "outward link",
        "no adapter",
        "cut short",
        "cut between files",
        "no tar",
        "holes",
        "NUL in a name",
        "one name for two",
        "a file as a folder",
        "a folder as a file",
        "deep",
        "long name",
        "name in no script",
        "sparse without a map",
        "holes without numbers",
    ],
)
def test_a_bad_archive_leaves_nothing_behind(ask, tmp_path, content):
    home = tmp_path / "home"
    with pytest.raises(clients.APIError, match="the server sent"):
        ask(Server(httpx2.Response(200, content=content)), lambda c: c.adapters.export(2, home / "out"))
    assert list(home.iterdir()) == []
    assert list(tmp_path.iterdir()) == [home]


def test_an_export_overwrites_nothing(ask, tmp_path):
    (tmp_path / "mine").write_text("x")
    server = Server(httpx2.Response(200, content=tar(**FILES)))
    with pytest.raises(FileExistsError):
        ask(server, lambda c: c.adapters.export(2, tmp_path))
    assert server.requests == []


# --- history -----------------------------------------------------------------------------------------


def stream(*numbers):
    """A reply that tells of steps."""
    content = ": hello\nid: 0-0\nretry: 1000\n\n" if numbers else ""
    for n in numbers:
        content += f'event: step\ndata: {{"id":"{n}-0","time":1.0,\ndata: "adapter":"default","kind":"step",'
        content += f'"data":{{"n":{n}}}}}\nid: {n}-0\n\n'
    return httpx2.Response(200, content=content, headers={"content-type": "text/event-stream"})


def heard(ask, server, count, **options):
    """The first events of a client, sync or not."""

    def collect(client):
        if isinstance(client, Client):
            return list(itertools.islice(client.adaptation.events(**options), count))

        async def gather():
            found = []
            events = client.adaptation.events(**options)
            async for event in events:
                found.append(event)
                if len(found) == count:
                    break
            await events.aclose()
            return found

        return gather()

    return [event.data["n"] for event in ask(server, collect)]


def test_events_go_on_after_the_last_one_heard(ask, pauses):
    server = Server(
        stream(1, 2), httpx2.ReadError("cut"), problem(503, "not_ready"), stream(), stream(3), stream(4)
    )
    assert heard(ask, server, 4, since="0", adapter="default") == [1, 2, 3, 4]
    assert [last(request) for request in server.requests] == [None, "2-0", "2-0", "2-0", "2-0", "3-0"]
    assert {str(request.url.query) for request in server.requests} == {str(b"adapter=default&since=0")}
    assert len(pauses) == 5
    assert pauses[0] < 1, "what was heard makes it hopeful again"


def test_an_event_that_was_cut_off_is_asked_for_again(ask, pauses):
    server = Server(httpx2.Response(200, content=CUT), stream(2))
    assert heard(ask, server, 2) == [1, 2]
    assert [last(request) for request in server.requests] == [None, "1-0"]


def test_who_is_cut_off_before_the_first_event_misses_none(ask, pauses):
    server = Server(httpx2.Response(200, content=b"id: 7-0\nretry: 1000\n\n"), stream(8))
    assert heard(ask, server, 1) == [8]
    assert [last(request) for request in server.requests] == [None, "7-0"]


def last(request):
    return request.headers.get("last-event-id")


CUT = b'data: {"time":1.0,"adapter":"a","kind":"step","data":{"n":1}}\nid: 1-0\n\ndata: {"time":1}\nid: 2-0\n'


def test_what_happened_so_far_has_an_end(ask, pauses):
    server = Server(stream(1, 2))
    assert heard(ask, server, 9, since="0", follow=False) == [1, 2]
    assert dict(server.requests[0].url.params) == {"since": "0", "follow": "false"}
    assert len(server.requests) == 1


@pytest.mark.parametrize(("status", "tries"), [(401, 1), (404, 1), (503, 3)])
def test_events_that_cannot_be_had_are_an_error(ask, pauses, status, tries):
    server = Server(problem(status, "no"))
    with pytest.raises(clients.APIStatusError):
        heard(ask, server, 1)
    assert len(server.requests) == tries


def test_events_that_cannot_be_read_are_an_error(ask, pauses):
    with pytest.raises(clients.APIError, match="does not read"):
        heard(ask, Server(httpx2.Response(200, content=b"data: [1]\n\n")), 1)


def test_the_history_is_read_with_the_users_key_or_the_only_one_there_is(ask):
    reply = ok({"adapter": "default", "columns": {"time": [1.0], "reward": [None]}, "marks": []})
    for keys, sent in (
        ({"api_key": "u", "admin_key": "a"}, "u"),
        ({"admin_key": "a"}, "a"),
        ({"api_key": "u"}, "u"),
    ):
        server = Server(reply)
        found = ask(server, lambda c: c.adaptation.series(limit=5), **keys)
        assert found.columns["reward"] == [None]
        assert server.requests[0].headers["authorization"] == f"Bearer {sent}"
        assert dict(server.requests[0].url.params) == {"limit": "5"}


# --- an answer that grows ------------------------------------------------------------------------------


def told(*parts, cut=False):
    """Server-sent events of an answer; a dict that has an `answer` is the whole one."""
    lines = []
    for part in parts:
        kind = "delta" if isinstance(part, str) else "done" if "answer" in part else "error"
        data = {"text": part} if isinstance(part, str) else part
        lines.append(f"event: {kind}\ndata: {json.dumps(data)}\n\n")
    content = "".join(lines)
    return httpx2.Response(200, content=(content[:-9] if cut else content).encode())


def grown(ask, server, **options):
    def collect(client):
        if isinstance(client, Client):
            return list(client.stream(b"\xff\xd8\xff", "what?", resize=False, **options))

        async def gather():
            return [part async for part in client.stream(b"\xff\xd8\xff", "what?", resize=False, **options)]

        return gather()

    return ask(server, collect)


def test_an_answer_comes_in_parts_and_then_whole(ask):
    server = Server(told("r", "ed", ANSWER))
    *parts, answer = grown(ask, server, max_tokens=4, adapt=False)
    assert [part.text for part in parts] == ["r", "ed"]
    assert (answer.answer, answer.adapter.version) == ("red", "v0007")
    body = json.loads(server.requests[0].content)
    assert (body["stream"], body["max_tokens"], body["adapt"]) == (True, 4, False)


def test_it_is_asked_again_only_while_nothing_was_heard(ask, pauses):
    server = Server(problem(503, "queue_full"), httpx2.ReadError("cut"), told("red", ANSWER))
    assert grown(ask, server)[-1].answer == "red"
    assert len({request.headers["idempotency-key"] for request in server.requests}) == 1
    assert len({request.content for request in server.requests}) == 1
    server = Server(told("r", ANSWER, cut=True))
    with pytest.raises(clients.APIError, match="broke off"):
        grown(ask, server)
    assert len(server.requests) == 1


def test_what_goes_wrong_on_the_way_is_an_error(ask):
    late = problem(503, "deadline_exceeded").json()
    with pytest.raises(clients.InternalServerError) as error:
        grown(ask, Server(told("r", late)))
    assert error.value.code == "deadline_exceeded"
    with pytest.raises(clients.NotFoundError):
        grown(ask, Server(problem(404, "not_found")))
    with pytest.raises(clients.APIError, match="does not read"):
        grown(ask, Server(httpx2.Response(200, content=b"event: delta\ndata: 1\n\n")))


# --- several questions ---------------------------------------------------------------------------------


def test_a_batch_has_an_answer_or_an_error_for_each(ask):
    late = problem(503, "queue_full").json()
    server = Server(ok({"results": [{"answer": ANSWER}, {"problem": late}]}))
    image = b"\xff\xd8\xff"
    questions = [{"image": image, "question": "what?", "max_tokens": 3}, {"image": image, "labels": ("a", "b")}]
    answer, error = ask(server, lambda c: c.answer_batch(questions, resize=False))
    assert answer.answer == "red"
    assert isinstance(error, clients.QueueFullError)
    first, second = json.loads(server.requests[0].content)["requests"]
    assert (first["question"], first["max_tokens"], second["candidate_labels"]) == ("what?", 3, ["a", "b"])
    with pytest.raises(clients.APIError, match="neither"):
        ask(Server(ok({"results": [{}]})), lambda c: c.answer_batch(questions, resize=False))


# --- surface -----------------------------------------------------------------------------------------


def public(kind):
    return {name: getattr(kind, name) for name in dir(kind) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("sync", "other"), [(Client, AsyncClient), (Adapters, AsyncAdapters), (Adaptation, AsyncAdaptation)]
)
def test_both_clients_have_one_surface(sync, other):
    assert public(sync).keys() == public(other).keys()
    for name, method in public(sync).items():
        twin = public(other)[name]
        if isinstance(method, property):
            continue
        mine, its = inspect.signature(method), inspect.signature(twin)
        if name == "raw":  # takes a method of its own client
            assert list(mine.parameters) == list(its.parameters)
        else:
            assert list(mine.parameters.values()) == list(its.parameters.values()), name
        assert str(its.return_annotation).removeprefix("Async") == str(mine.return_annotation), name
        assert method.__doc__ == twin.__doc__, name
        assert inspect.iscoroutinefunction(twin) or inspect.isasyncgenfunction(twin) or name == "with_options"
    options, its = inspect.signature(sync).parameters, inspect.signature(other).parameters
    assert {k: v.default for k, v in options.items()} == {k: v.default for k, v in its.items()}


def test_signatures_and_help_are_those_a_user_sees():
    signature = inspect.signature(Client.answer)
    assert list(signature.parameters)[:3] == ["self", "image", "question"]
    assert signature.return_annotation == "Answer"
    assert list(inspect.signature(AsyncClient().adapters.versions).parameters) == ["name", "page_size"]
    assert "sample and vote over" in Client.answer.__doc__


def test_all_names_exist_and_all_errors_are_exported():
    assert sorted(clients.__all__, key=str.lower) == sorted(set(clients.__all__), key=str.lower)
    assert all(hasattr(clients, name) for name in clients.__all__)
    kinds = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, errors.ServetuneError)}
    assert kinds <= set(clients.__all__)


def test_options_are_changed_on_a_copy_over_the_same_connections():
    server = Server(problem(500, "internal_error"))
    with Client(transport=httpx2.MockTransport(server)) as client:
        patient = client.with_options(max_retries=0, timeout=3, api_key="k")
        with pytest.raises(clients.InternalServerError):
            patient.info()
        assert len(server.requests) == 1
        assert server.requests[0].extensions["timeout"] == {"connect": 5.0, "read": 3, "write": 3, "pool": 3}
        with pytest.raises(clients.InternalServerError):
            client.info()
        assert "authorization" not in server.requests[-1].headers


def test_headers_go_with_every_request_of_a_client_and_of_its_twins(ask):
    server = Server(ok(INFO), ok(ADAPTER))
    one = {"traceparent": "00-1", "User-Agent": "shop/7"}
    ask(server, lambda c: c.with_options(headers={"X-Till": "3"}).info(), headers=one)
    sent = server.requests[0].headers
    assert (sent["traceparent"], sent["x-till"], sent.get_list("user-agent")) == ("00-1", "3", ["shop/7"])
    ask(server, lambda c: c.adapters.get(), headers=one)
    assert "x-till" not in server.requests[-1].headers
    assert server.requests[-1].headers["traceparent"] == "00-1"


def test_feeds_carry_the_headers_too(ask):
    server = Server(stream(1))
    ask(server, lambda c: c.adaptation.events(follow=False), headers={"traceparent": "00-1"})
    assert server.requests[0].headers["traceparent"] == "00-1"


@pytest.mark.parametrize(
    "header",
    [
        {"authorization": "Bearer secret"},
        {"Idempotency-Key": "k"},
        {"Host": "elsewhere"},
        {"a b": "c"},
        {"a": "secret\r\nb: c"},
        {"a": "sécret"},
    ],
)
def test_a_header_that_is_not_the_users_is_refused_without_quoting_it(header):
    for make in (lambda: Client(headers=header), lambda: Client().with_options(headers=header)):
        with pytest.raises(ValueError, match="header") as caught:
            make()
        assert "cret" not in str(caught.value)


def test_a_raw_response_has_what_came_beside_the_result(ask, pauses):
    reply = ok(ANSWER)
    reply.headers["x-request-id"] = "req_9"
    server = Server(problem(503, "queue_full"), reply)
    raw = ask(server, lambda c: c.raw(c.answer, png(), "colour?", adapt=False))
    assert (raw.value.answer, raw.status, raw.request_id, raw.retries) == ("red", 200, "req_9", 1)
    assert json.loads(raw.content)["id"] == raw.value.id
    assert server.body["adapt"] is False
    assert pickle.loads(pickle.dumps(raw)) == raw
    again = ask(Server(ok(ADAPTER)), lambda c: c.raw(c.adapters.promote, 3))
    assert (again.value.live, again.retries) == ("v0001", 0)


def test_a_raw_call_fails_as_the_call_does_and_hears_nothing_of_others(ask):
    with pytest.raises(clients.AdapterNotFoundError):
        ask(Server(problem(404, "adapter_not_found")), lambda c: c.raw(c.adapters.get, "x"))
    with pytest.raises(TypeError, match="one result"):
        ask(Server(ok(ANSWER)), lambda c: c.raw(c.stream, png(), "colour?"))


async def test_raw_calls_at_the_same_time_have_a_response_each():
    def reply(request):
        return httpx2.Response(200, json={**ANSWER, "answer": json.loads(request.content)["question"]})

    async with AsyncClient(transport=httpx2.MockTransport(reply)) as client:
        asked = [f"q{number}" for number in range(8)]
        raws = await asyncio.gather(*(client.raw(client.answer, png(), question) for question in asked))
    assert [json.loads(raw.content)["answer"] for raw in raws] == asked


async def test_an_app_can_be_spoken_to_without_a_socket():
    async def app(scope, receive, send):
        assert scope["path"] == "/info"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(INFO).encode()})

    async with AsyncClient(transport=httpx2.ASGITransport(app)) as client:
        assert (await client.info()).model == "x"


def test_importing_the_sdk_pulls_in_nothing_heavy():
    code = "import servetune, sys; servetune.Client; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "fastapi", "transformers", "peft", "PIL", "numpy", "redis", "servetune.server"}
    assert heavy.isdisjoint(run.stdout.split())
    light = subprocess.run(
        [sys.executable, "-c", "import servetune, sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {"httpx2", "pydantic"}.isdisjoint(light.stdout.split())


# --- the server itself -------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path):
    """The real app on fakes."""
    from tests import fakes

    return fakes.World(tmp_path / "home", user_keys=(fakes.USER_KEY,))


@pytest.fixture
def server_client(world):
    """A client of it with both keys."""
    from tests import fakes

    return AsyncClient(
        "http://localhost",
        api_key=fakes.USER_KEY,
        admin_key=fakes.ADMIN_KEY,
        max_retries=0,
        transport=httpx2.ASGITransport(world.app),
    )


async def test_questions_to_the_real_app(server_client):
    async with server_client as client:
        assert await client.ready()
        assert (await client.answer(picture(), "what?")).answer == "a thing"
        chosen = await client.recognize(picture(3000), ["cat", "dog"], adapter="v0001", metadata={"k": "v"})
        assert (chosen.answer, chosen.adapter.version, chosen.task) == ("cat", "v0001", "recognition")
        once = await client.answer(png(), "again?", idempotency_key="same")
        assert (await client.answer(png(), "again?", idempotency_key="same")).id == once.id
        with pytest.raises(clients.UnprocessableEntityError) as caught:
            await client.answer(picture(), "what?", n=4)
        assert caught.value.code == "invalid_request"
        assert caught.value.request_id
        with pytest.raises(clients.AdapterNotFoundError):
            await client.answer(picture(), "what?", adapter="v0099")


async def test_is_it_helping_in_the_real_app(server_client, world):
    world.buffer.reviews = True
    world.engine.texts[0] = "a bird"
    async with server_client as client:
        line = client.adapters
        answer = await client.answer(picture(), "what?")
        said = await client.feedback(answer, right="the bird")
        assert (said.version, said.correct) == ("v0002", False)
        assert (await client.feedback(answer.id, True)).correct
        with pytest.raises(clients.NotFoundError):
            await client.feedback("ans_1", True)
        with pytest.raises(ValueError, match="right answer"):
            await client.feedback(answer)
        found = (await line.next_pair(0, 2)).pair
        assert {found.first, found.second} == {"a thing", "a bird"}
        report = await line.judge(found.id, "first" if found.first == "a thing" else "second", 0, 2)
        assert (report.only_new, report.gain) == (1, 1.0)
        assert (await line.review()) == report
        assert (await line.next_pair(skip=found.id)).pair is None
        changed = await line.diff(0, 2, images=True)
        assert [(each.old, each.new, len(each.images)) for each in changed.answers] == [("a bird", "a thing", 1)]


def test_a_diff_is_read_to_its_end(ask):
    def page(number, next_after):
        answers = [{"query_id": f"q_{number}", "question": "?", "old": "a", "new": "b"}]
        told = {"adapter": "default", "old": "v0001", "new": "v0002", "facts": {}, "metrics": {}, "gate": {}}
        return ok({**told, "compared": 3, "answers": answers, "next_after": next_after})

    server = Server(page(2, "q_2"), page(1, None))
    found = ask(server, lambda c: c.adapters.diff(1, 2, limit=5))
    assert ([each.query_id for each in found.answers], found.compared) == (["q_2", "q_1"], 6)
    asked = [dict(request.url.params) for request in server.requests]
    assert asked == [
        {"old": "v0001", "new": "v0002", "limit": "5"},
        {"old": "v0001", "new": "v0002", "limit": "4", "after": "q_2"},
    ]


async def test_the_whole_life_of_an_adapter_in_the_real_app(server_client, tmp_path):
    async with server_client as client:
        line = client.adapters
        assert [each.name for each in await line.list()] == ["default"]
        assert (await line.snapshot("keep-1", {"by": "me"})).label == "keep-1"
        assert (await client.answer(picture(), "what?", adapter="keep-1")).adapter.alias == "keep-1"
        assert (await line.promote(1)).live == "v0001"
        assert await client.wait_for_version(1) == "v0001"
        assert (await line.rollback("keep-1")).live == (await line.version("keep-1")).version
        made = await line.reset(purge_buffer=True)
        assert (made.origin, (await line.get()).live) == ("reset", made.version)
        found = [each.version async for each in line.versions(page_size=2)]
        assert sorted(found) == sorted(set(found))
        assert len(found) == (await line.get()).num_versions
        folder = await line.export(2, tmp_path / "out")
        assert (folder / "adapter_model.safetensors").stat().st_size > 0
        assert (await client.adaptation.pause()).paused
        assert not (await client.adaptation.resume()).paused
        events = [entry.event async for entry in client.adaptation.audit(page_size=3)]
        assert len(events) >= 7
        with pytest.raises(clients.PermissionDeniedError):
            await client.with_options(
                admin_key="stu_somebody.fedcba9876543210fedcba9876543210"
            ).adaptation.status()
