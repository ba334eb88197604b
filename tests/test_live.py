"""Events, series and metrics through the real app: who may read them, what they say, and how a stream ends."""

from __future__ import annotations

import asyncio
import json
import math
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from servetune.clients import Client, Event
from servetune.clients.types import Series, WorkerStatus
from servetune.server import live, watch
from servetune.server.metrics import GATES, LEARNED, Traffic
from tests.fakes import ADMIN, ADMIN_KEY, USER, USER_KEY, World, learn, until
from tests.redis_servers import eventually, running

ROOT = Path(__file__).parents[1]
STEP = {
    "step": 1,
    "seconds": 0.2,
    "groups": 16,
    "informative": 12,
    "reward": 0.5,
    "majority": 0.8,
    "grad_norm": 1.5,
}
ACCEPTED = {"accepted": True, "early": False, "reasons": [], "metrics": {"kl_step": 0.1}}
REFUSED = {"accepted": False, "early": False, "reasons": ["kl_step 0.412 is above 0.3", "valid 0.1 is below 0.9"]}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def tell(world: World, kind: str, **data: Any) -> None:
    world.history.record("default", kind, data)


async def told(world: World, **asked: Any) -> list[Event]:
    """What happened so far, as the events have it."""
    headers = {"Last-Event-ID": asked.pop("last")} if "last" in asked else {}
    query = {"since": "0", "follow": "false", **asked}
    reply = await world.client.get("/v1/adaptation/events", params=query, headers=headers)
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    blocks = [
        dict(line.split(": ", 1) for line in block.split("\n")) for block in reply.text.strip().split("\n\n")
    ]
    events = [(block, Event.model_validate_json(block["data"])) for block in blocks if "data" in block]
    for block, event in events:
        assert (block["event"], block.get("id")) == (event.kind, event.id)
    return [event for _, event in events]


# --- events ------------------------------------------------------------------------------------------


async def test_acts_and_the_swaps_they_cause_are_events(world: World) -> None:
    world.client.headers.update(ADMIN)
    adapter = "/v1/adapters/default"
    await world.client.post(f"{adapter}/snapshot", json={"label": "kept"})
    await world.client.post(f"{adapter}/promote", json={"version": "v0001"})
    await world.client.post(f"{adapter}/rollback", json={"to": "base"})
    await world.client.post(f"{adapter}/reset", json={})
    await world.client.post("/v1/adaptation/pause")
    await world.client.post("/v1/adaptation/resume")
    await world.client.post(f"{adapter}/promote", json={"version": "v0042"})  # refused, so it did not happen
    events = await told(world)
    assert [(event.kind, event.data.get("version")) for event in events] == [
        ("snapshot", "v0003"),
        ("promote", "v0001"),
        ("swap", "v0001"),
        ("rollback", "v0000"),
        ("swap", "v0000"),
        ("reset", "v0004"),
        ("swap", "v0004"),
        ("pause", None),
        ("resume", None),
    ]
    assert events[2].data == {"version": "v0001", "previous": "v0002", "seconds": 0.02}
    text = json.dumps([event.model_dump() for event in events])
    assert "sta_" not in text, "who the operator was is for the audit trail"


async def test_a_stream_goes_on_after_the_event_it_is_told(world: World) -> None:
    for number in range(3):
        tell(world, "step", step=number)
    first, second, third = await told(world)
    assert await told(world, last=second.id) == [third]
    assert await told(world, since=first.id) == [second, third]
    assert await told(world, since=first.id, last=second.id) == [third], "the header is the later word"
    reply = await world.client.get("/v1/adaptation/events", params={"follow": "false"})
    assert reply.text == f"id: {third.id}\nretry: 1000\n\n", "by default what happens from now on"


async def test_how_things_stand_is_told_on_request_and_without_an_id(world: World) -> None:
    world.buffer.worker = WorkerStatus(state="idle", version="v0001", steps=7, last_verdict=ACCEPTED)
    assert (await world.ask()).status_code == 200
    [status] = await told(world, status="true")
    assert (status.kind, status.id) == ("status", None)
    data = status.data
    assert (data["mode"], data["serving"], data["lag_versions"]) == ("learning", "v0002", 0)
    assert data["worker"] == {
        "state": "idle",
        "version": "v0001",
        "steps": 7,
        "waits_until": None,
        "note": None,
    }
    assert data["last_verdict"] == ACCEPTED
    assert data["buffer"]["waiting"] == 1
    assert data["requests"]["per_s"] > 0
    assert data["requests"]["p95_s"] >= data["requests"]["p50_s"] > 0


@pytest.mark.parametrize(
    ("state", "paused", "down", "mode"),
    [
        ("learning", False, False, "learning"),
        ("idle", False, False, "learning"),
        ("paused", True, False, "paused"),
        ("absent", True, False, "paused"),
        ("absent", False, False, "absent"),
        ("degraded", False, False, "degraded"),
        ("idle", False, True, "degraded"),
    ],
)
async def test_the_mode_is_one_word(world: World, state: str, paused: bool, down: bool, mode: str) -> None:
    world.buffer.worker = WorkerStatus.model_validate({"state": state})
    world.store.set_paused(paused)
    world.buffer.down = down
    [status] = await told(world, status="true")
    assert status.data["mode"] == mode


@pytest.mark.parametrize("query", ["adapter=other", "since=yesterday", "since=1-2-3", "limit=0", "limit=5001"])
async def test_what_cannot_be_asked_is_refused(world: World, query: str) -> None:
    reply = await world.client.get(f"/v1/adaptation/series?{query}")
    assert reply.status_code == (404 if "adapter" in query else 422)
    reply = await world.client.get(f"/v1/adaptation/events?{query}&follow=false")
    assert reply.status_code == (404 if "adapter" in query else 200 if "limit" in query else 422)


async def test_no_more_follow_than_there_are_places(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MOST_STREAMS", 0)
    reply = await world.client.get("/v1/adaptation/events?follow=false")
    assert (reply.status_code, reply.json()["code"]) == (503, "queue_full")
    assert world.app.state.watches.streams == 0


async def test_a_redis_that_is_down_ends_no_stream(world: World) -> None:
    tell(world, "pause", by="operator")
    world.history.down = True
    assert await told(world) == []
    world.history.down = False
    assert len(await told(world)) == 1


# --- series ------------------------------------------------------------------------------------------


async def test_steps_are_columns_of_one_length(world: World) -> None:
    tell(world, "step", **STEP)
    tell(world, "verdict", **ACCEPTED)
    tell(world, "step", step=2, groups=0, informative=0, failed="RuntimeError")
    tell(world, "step", step=3, groups=4, informative=0, entropy=0.3)
    series = Series.model_validate_json((await world.client.get("/v1/adaptation/series")).text)
    assert series.columns["step"] == [1, 3]
    assert series.columns["reward"] == [0.5, None]
    assert series.columns["entropy"] == [None, 0.3]
    assert {len(column) for column in series.columns.values()} == {2}
    assert [mark.kind for mark in series.marks] == ["verdict"]
    assert series.last_event_id == world.history.events[-1].id
    later = (await world.client.get(f"/v1/adaptation/series?since={series.last_event_id}")).json()
    assert (later["marks"], later["columns"], later["last_event_id"]) == ([], {"time": []}, series.last_event_id)
    one = (await world.client.get("/v1/adaptation/series?limit=1&adapter=default")).json()
    assert one["columns"]["step"] == [3]


@pytest.mark.parametrize("since", ["", "&since=0"])
async def test_long_series_are_read_in_portions_and_are_whole(world: World, since: str) -> None:
    for number in range(1, 1301):
        tell(world, "step", step=number)
    for limit in (1100, 1300, 5000):
        found = (await world.client.get(f"/v1/adaptation/series?limit={limit}{since}")).json()
        kept = min(limit, 1300)
        first = 1 if since else 1301 - kept
        assert found["columns"]["step"] == list(range(first, first + kept))


async def test_what_is_no_number_is_null(world: World) -> None:
    tell(world, "step", **STEP | {"reward": math.nan})
    tell(world, "verdict", **REFUSED | {"metrics": {"kl_base": math.inf}})
    for path in ("series", "events?since=0&follow=false"):
        text = (await world.client.get(f"/v1/adaptation/{path}")).text
        assert not re.search("NaN|Infinity", text), "no JSON that a browser reads"
        assert "null" in text


async def test_series_need_redis(world: World) -> None:
    world.history.down = True
    reply = await world.client.get("/v1/adaptation/series")
    assert (reply.status_code, reply.json()["code"]) == (503, "buffer_unavailable")


# --- a stream that goes on, in a process of its own ----------------------------------------------------


@contextmanager
def serving(home: Path, port: int, redis_url: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.page_server", str(home), str(port), redis_url]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, text=True)
    try:
        eventually(lambda: answers(port), within_s=60)
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdin
        process.stdin.close()


def answers(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/readyz", timeout=2).status_code == 200
    except httpx2.HTTPError:
        return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_a_stream_outlives_kill_9_and_ends_at_shutdown(tmp_path: Path) -> None:
    """One iterator of the SDK over two lives of a server: nothing is missed, nothing comes twice."""
    heard: list[Event] = []
    port = free_port()

    def follow() -> None:
        for event in client.adaptation.events(since="0"):
            heard.append(event)
            if event.data.get("number") == 5:
                return

    with running(tmp_path / "valkey") as valkey, Client(f"http://127.0.0.1:{port}") as client:
        with serving(tmp_path / "home", port, valkey.url) as process:
            tell_process(process, *range(3))
            listener = threading.Thread(target=follow, daemon=True)
            listener.start()
            eventually(lambda: len(heard) == 3)
            process.kill()
            process.wait()
        with serving(tmp_path / "home", port, valkey.url) as process:
            tell_process(process, *range(3, 6))
            listener.join(20)
            assert [event.data["number"] for event in heard] == [0, 1, 2, 3, 4, 5]
            url = f"http://127.0.0.1:{port}/v1/adaptation/events"
            with httpx2.stream("GET", url, params={"status": "true"}, timeout=20) as response:
                lines = response.iter_lines()
                assert next(line for line in lines if line.startswith("data:"))
                process.send_signal(signal.SIGTERM)
                began = time.monotonic()
                for _ in lines:
                    pass  # the end, and no broken connection
            assert process.wait(20) == 0
            assert time.monotonic() - began < 10, "who follows must not be waited for"


def tell_process(process: subprocess.Popen[str], *numbers: int) -> None:
    assert process.stdin
    for number in numbers:
        process.stdin.write(json.dumps(["step", {"number": number}]) + "\n")
    process.stdin.flush()


async def test_who_leaves_gives_the_place_back(world: World) -> None:
    """The app itself, told that its client has gone."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "path": "/v1/adaptation/events",
        "raw_path": b"/v1/adaptation/events",
        "root_path": "",
        "scheme": "http",
        "query_string": b"status=true",
        "headers": [(b"host", b"localhost")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    sent: list[dict[str, Any]] = []
    messages = iter([{"type": "http.request", "body": b"", "more_body": False}])
    gone = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if (message := next(messages, None)) is not None:
            return message
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if b"data:" in message.get("body", b""):
            assert world.app.state.watches.streams == 1
            gone.set()

    async with asyncio.timeout(10):
        await world.app(scope, receive, send)
    assert world.app.state.watches.streams == 0
    assert sent[0]["status"] == 200


# --- metrics -----------------------------------------------------------------------------------------


async def figures(world: World) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """The exposition, parsed."""
    reply = await world.client.get("/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(reply.text):
        for sample in family.samples:
            found[sample.name, frozenset(sample.labels.items())] = sample.value
    return found


def figure(found: dict[Any, float], name: str, **labels: str) -> float:
    """The one sample of that name that has these labels."""
    [value] = [
        v for (n, own), v in found.items() if n == f"servetune_{name}" and labels.items() <= dict(own).items()
    ]
    return value


async def test_a_worker_that_waits_says_for_what(world: World) -> None:
    assert figure(await figures(world), "learning_waiting") == 0
    note = "waiting for its window until 22:00"
    world.buffer.worker = WorkerStatus(state="waiting", waits_for="window", waits_until=5e9, note=note)
    world.app.state.watches.of(world.lines.first)._reading = None  # not that of a moment ago
    [status] = await told(world, status="true")
    assert (status.data["mode"], status.data["worker"]["note"]) == ("waiting", note)
    assert status.data["worker"]["waits_until"] == 5e9
    assert figure(await figures(world), "learning_waiting") == 1
    assert figure(await figures(world), "worker_up") == 1


async def test_questions_are_counted_by_what_became_of_them(world: World) -> None:
    await world.ask()
    await world.ask(candidate_labels=["a", "b"], adapter="base")
    await world.ask(adapter="v0001", adapt=False)
    await world.ask(question=None)
    await world.ask(image="data:image/png;base64,AAAA")
    world.engine.text = None
    await world.ask()
    await until(lambda: world.buffer.withdrawn == 1)  # what was not parsed
    found = await figures(world)
    total = {"adapter": "default"}
    assert figure(found, "requests_total", task="vqa", outcome="answered", alias="live", **total) == 1
    assert figure(found, "requests_total", task="recognition", outcome="answered", alias="base", **total) == 1
    assert figure(found, "requests_total", task="vqa", outcome="answered", alias="version", **total) == 1
    assert figure(found, "requests_total", task="vqa", outcome="unparsed", alias="live", **total) == 1
    assert figure(found, "requests_total", outcome="invalid_request") == 1
    assert figure(found, "requests_total", outcome="unsupported_image") == 1
    assert figure(found, "image_rejected_total", reason="unsupported_image") == 1
    assert figure(found, "buffer_skipped_total", reason="not_live") == 1
    assert figure(found, "buffer_skipped_total", reason="unparsed") == 1
    assert figure(found, "request_duration_seconds_count", task="vqa") == 3
    assert figure(found, "inference_duration_seconds_sum", task="recognition") == pytest.approx(0.01)
    assert figure(found, "image_decode_seconds_count") == 5
    assert figure(found, "buffer_entries") == 1


async def test_an_answer_given_again_is_a_replay(world: World) -> None:
    for _ in "ab":
        await world.client.post(
            "/answer", json={"image": PIXEL, "question": "?"}, headers={"Idempotency-Key": "k"}
        )
    found = await figures(world)
    assert figure(found, "requests_total", outcome="answered") == 1
    assert figure(found, "requests_total", outcome="replayed") == 1


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="


async def test_refusals_before_the_routes_are_counted(tmp_path: Path) -> None:
    world = World(tmp_path, user_keys=(USER_KEY,), requests_per_minute=1, host="0.0.0.0")
    await world.ask()
    world.client.headers.update(USER)
    await world.ask()
    while (await world.ask()).status_code != 429:
        pass
    found = await figures(world)
    assert figure(found, "requests_total", outcome="unauthorized", task="unknown") == 1
    assert figure(found, "requests_total", outcome="rate_limited") == 1


async def test_the_learner_is_counted_from_the_history(world: World) -> None:
    before = await figures(world)
    assert figure(before, "train_steps_total", outcome="learned") == 0, "so that the first increase is one"
    assert figure(before, "rollbacks_total", cause="worker") == 0
    tell(world, "step", **STEP)
    tell(world, "step", step=1, groups=4, informative=0)
    tell(world, "step", step=1, groups=4, failed="RuntimeError")
    tell(world, "verdict", **ACCEPTED)
    tell(world, "verdict", **REFUSED)
    tell(world, "verdict", **ACCEPTED | {"accepted": False, "early": True})
    tell(world, "rollback", by="worker", version="v0001")
    tell(world, "rollback", by="operator", version="v0001")
    for _ in "ab":  # each event once, however often one asks
        found = await figures(world)
        assert figure(found, "train_steps_total", outcome="learned") == 1
        assert figure(found, "train_steps_total", outcome="no_update") == 1
        assert figure(found, "train_steps_total", outcome="failed") == 1
        assert figure(found, "train_step_duration_seconds_sum") == pytest.approx(0.2)
        assert figure(found, "groups_zero_signal_total") == 8
        assert figure(found, "promotion_gate_total", gate="all", result="accepted") == 1
        assert figure(found, "promotion_gate_total", gate="all", result="early") == 1
        assert figure(found, "promotion_gate_total", gate="all", result="rejected") == 1
        assert figure(found, "promotion_gate_total", gate="kl_step", result="failed") == 1
        assert figure(found, "promotion_gate_total", gate="valid", result="failed") == 1
        assert figure(found, "promotion_gate_total", gate="kl_base", result="failed") == 0
        assert figure(found, "rollbacks_total", cause="worker") == 1
        assert figure(found, "rollbacks_total", cause="operator") == 1


async def test_gauges_are_the_truth_of_the_moment(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "FRESH_S", -1.0)
    world.buffer.worker = WorkerStatus(
        state="idle", version="v0001", last_step={"reward": 0.5, "majority": 0.8, "kl": 0.03, "entropy": 0.4}
    )
    world.engine.waiting, world.engine.batches = 3, {1: 5, 7: 2}
    found = await figures(world)
    assert figure(found, "queue_depth") == 3
    assert figure(found, "batch_size_count") == 7
    assert figure(found, "batch_size_sum") == 19
    assert figure(found, "batch_size_bucket", le="4.0") == 5
    assert figure(found, "reward_mean") == 0.5
    assert figure(found, "majority_ratio") == 0.8
    assert figure(found, "kl_to_base") == 0.03
    assert figure(found, "staleness_versions") == 1
    assert figure(found, "worker_up") == figure(found, "buffer_up") == 1
    assert figure(found, "adapter_leases", version="v0002") == 1
    assert figure(found, "adapter_info", version="v0002", alias="live") == 1
    world.store.promote(learn(world.store, 3.0).version)  # the engine has not noticed yet
    world.buffer.down, world.buffer.worker = True, WorkerStatus(state="absent")
    world.store.set_paused(True)
    found = await figures(world)
    assert figure(found, "adapter_lag_versions") == 1
    assert figure(found, "adapter_info", version="v0002", alias="") == 1
    assert figure(found, "worker_up") == figure(found, "buffer_up") == 0
    assert figure(found, "learning_paused") == 1
    assert not [name for name, _ in found if name == "servetune_buffer_entries"], "nobody knows"
    await world.engine.refresh()
    found = await figures(world)
    assert figure(found, "adapter_swaps_total", outcome="done") == 1
    assert figure(found, "adapter_swap_seconds_sum") == pytest.approx(0.02)


async def test_no_label_is_a_clients_choice(world: World) -> None:
    word = "canary7f3a"
    await world.ask(adapter=word, question=word)
    await world.ask(candidate_labels=[word, f"{word} 2"], metadata={word: word})
    await world.client.get(f"/{word}")
    assert word not in (await world.client.get("/metrics", headers={"X-Request-ID": word})).text


async def test_metrics_come_as_openmetrics_too(world: World) -> None:
    reply = await world.client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert reply.headers["content-type"].startswith("application/openmetrics-text")
    assert reply.text.endswith("# EOF\n")


def test_traffic_is_that_of_the_last_minute() -> None:
    now = 0.0
    traffic = Traffic(lambda: now)
    assert traffic.summary() == {"per_s": 0.0, "p50_s": None, "p95_s": None}
    now = 10.0
    for hundredths in range(1, 101):
        traffic.add(hundredths / 100)
    assert traffic.summary() == {"per_s": 10.0, "p50_s": 0.51, "p95_s": 0.96}
    now = 69.0
    traffic.add(5.0)
    now = 75.0
    assert traffic.summary() == {"per_s": 1 / 60, "p50_s": 5.0, "p95_s": 5.0}


async def test_dashboard_and_alerts_name_metrics_that_exist(world: World) -> None:
    await world.ask()
    tell(world, "step", **STEP)
    world.buffer.worker = WorkerStatus(state="idle", last_step={key: 0.5 for key, _ in LEARNED.values()})
    await world.engine.refresh()
    known = {name for name, _ in await figures(world)} | CAUSED
    rules = (ROOT / "deploy/prometheus/servetune.rules.yml").read_text()
    dashboard = (ROOT / "deploy/grafana/servetune.json").read_text()
    for text in (rules, dashboard):
        named = set(re.findall(r"\bservetune_[a-z0-9_]+", text))
        assert named
        assert named <= known, sorted(named - known)
    gates = {gate for found in re.findall(r'gate=~?"([a-z_|]+)"', rules + dashboard) for gate in found.split("|")}
    assert gates <= {*GATES, "all"}
    for alert in ("Rollback", "Collapse", "Drift", "LearnerSilent", "BufferUnavailable"):
        assert f"alert: Servetune{alert}\n" in rules


CAUSED = {
    "servetune_adapter_swap_seconds_bucket",
    "servetune_buffer_skipped_total",
    "servetune_image_rejected_total",
}
"""What has a label that only an event sets; the other tests cause each."""


def test_the_dashboard_is_one_that_grafana_reads() -> None:
    board = json.loads((ROOT / "deploy/grafana/servetune.json").read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids)) > 10
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert panel["type"] == "row" or all(target["expr"] for target in panel["targets"])


async def test_docs_list_every_metric(world: World) -> None:
    text = (ROOT / "docs/operations.md").read_text()
    for family in text_string_to_metric_families((await world.client.get("/metrics")).text):
        assert family.name in text, family.name


# --- the page's files ----------------------------------------------------------------------------------


async def test_the_page_comes_with_a_strict_policy_and_from_here_alone(world: World) -> None:
    reply = await world.client.get("/")
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    for name, content in live.PAGE.items():
        part = await world.client.get(f"/page/{name}")
        assert part.content == content
        assert part.headers["x-content-type-options"] == "nosniff"
        if not name.startswith("uPlot"):
            assert not re.search(rb"(src|href|from|import|fetch)\W{1,3}https?:", content), name
            assert b"innerHTML" not in content
    again = await world.client.get("/", headers={"If-None-Match": reply.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("file", ["nothing.js", "..%2Fapp.py", "%2e%2e/live.py", "x" * 100])
async def test_nothing_else_is_a_part_of_it(world: World, file: str) -> None:
    assert (await world.client.get(f"/page/{file}")).status_code in (404, 422)


async def test_with_keys_the_page_is_open_and_what_it_shows_is_not(tmp_path: Path) -> None:
    world = World(tmp_path, user_keys=(USER_KEY,), host="0.0.0.0")
    assert (await world.client.get("/")).status_code == 200
    for path in ("/v1/adaptation/series", "/v1/adaptation/events?follow=false", "/metrics"):
        assert (await world.client.get(path)).status_code == 401
        for key in (USER_KEY, ADMIN_KEY):
            reply = await world.client.get(path, headers={"Authorization": f"Bearer {key}"})
            assert reply.status_code == 200
