"""An adapter's history on a real Valkey: what is told is there afterwards, and nobody waits for it."""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from servetune.adapters.versions import Alias, Erasure
from servetune.server import history as history_module
from servetune.server.buffer import BufferUnavailable
from servetune.server.history import History, Recorder, act_event
from servetune.server.valkey import EmbeddedValkey
from tests.redis_servers import running


@pytest.fixture
def adapter(request: pytest.FixtureRequest) -> str:
    """A line of one's own for every test."""
    return request.node.name[:60]  # type: ignore[no-any-return]


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[History]:
    history = History.connect(url)
    try:
        yield history
    finally:
        await history.close()


async def test_what_the_worker_tells_is_read_in_order_and_by_adapter(valkey: EmbeddedValkey, adapter: str) -> None:
    recorder = Recorder.connect(valkey.url)
    for number in range(5):
        recorder.record(adapter, "step", {"step": number, "reward": 0.5})
    recorder.close()
    other = Recorder.connect(valkey.url)
    other.record("another", "verdict", {"accepted": True})
    other.close()
    async with opened(valkey.url) as history:
        events = await history.read(adapter)
        assert [event.data["step"] for event in events] == [0, 1, 2, 3, 4]
        assert {(event.adapter, event.kind) for event in events} == {(adapter, "step")}
        assert all(abs(event.time - time.time()) < 60 for event in events)
        assert await history.read(adapter, since=events[2].id) == events[3:]
        assert await history.read(adapter, since="0", limit=2) == events[:2]
        assert await history.read(adapter, limit=2) == events[3:]
        assert await history.read(adapter, until=events[3].id, limit=2) == events[1:3]
        assert await history.newest(adapter) == events[-1].id
        assert await history.newest("nobody") == "0-0"


async def test_it_outlives_whoever_wrote_it(valkey: EmbeddedValkey, adapter: str) -> None:
    async with opened(valkey.url) as first:
        for number in range(20):
            first.record(adapter, "promote", {"number": number})
    async with opened(valkey.url) as second:
        told = [event.data["number"] for event in await second.read(adapter)]
    assert told == list(range(20)), "closing waits for what was told, and the order is that of telling"


async def test_the_oldest_events_go(valkey: EmbeddedValkey, adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "MOST_EVENTS", 100)
    recorder = Recorder.connect(valkey.url)
    for number in range(1000):
        recorder.record(adapter, "step", {"step": number})
    recorder.close()
    async with opened(valkey.url) as history:
        events = await history.read(adapter, limit=2000)
    assert 100 <= len(events) < 400  # Redis drops whole nodes of its tree
    assert events[-1].data["step"] == 999


async def test_what_is_no_event_is_passed_over(valkey: EmbeddedValkey, adapter: str) -> None:
    recorder = Recorder.connect(valkey.url)
    recorder._redis.xadd(history_module._key(adapter), {"kind": "step", "data": "[1, 2"})
    recorder._redis.xadd(history_module._key(adapter), {"other": "field"})
    recorder.record(adapter, "pause", {"by": "operator"})
    recorder.close()
    async with opened(valkey.url) as history:
        assert [event.kind for event in await history.read(adapter)] == ["pause"]


def nowhere() -> str:
    """An address at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"redis://127.0.0.1:{server.getsockname()[1]}/0"


async def test_without_redis_nothing_is_raised_and_nobody_waits(adapter: str) -> None:
    url = nowhere()
    recorder, began = Recorder.connect(url), time.monotonic()
    for _ in range(1000):
        recorder.record(adapter, "step", {})
    recorder.close()
    async with opened(url) as history:
        for _ in range(100):
            history.record(adapter, "swap", {})
        with pytest.raises(BufferUnavailable):
            await history.read(adapter)
        assert int((await history.newest(adapter)).partition("-")[0]) / 1000 == pytest.approx(time.time(), abs=60)
    assert time.monotonic() - began < 5 * history_module.ANSWER_S, (
        "a thousand refused connections would take longer"
    )


async def test_it_goes_on_when_redis_is_back(
    tmp_path: Path, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_module, "RETRY_S", 0.0)
    with running(tmp_path) as valkey:
        recorder, history = Recorder.connect(valkey.url), History.connect(valkey.url)
        recorder.record(adapter, "step", {"step": 1})
    recorder.record(adapter, "step", {"step": 2})  # lost
    with pytest.raises(BufferUnavailable):
        await history.read(adapter)
    with running(tmp_path):
        recorder.record(adapter, "step", {"step": 3})
        assert [event.data["step"] for event in await history.read(adapter)] == [1, 3]
        recorder.close()
        await history.close()


@pytest.mark.parametrize(
    ("act", "details", "result", "told"),
    [
        ("adapter_promoted", {"version": "last-good"}, Alias(3, 9), ("promote", {"version": "v0003"})),
        ("adapter_rolled_back", {"to": "base"}, Alias(0, 9), ("rollback", {"version": "v0000"})),
        ("adaptation_paused", {}, None, ("pause", {})),
        (
            "queries_erased",
            {"num": 3},
            Erasure((4, 5), Alias(3, 9)),
            ("erase", {"version": "v0003", "dropped": ["v0004", "v0005"]}),
        ),
    ],
)
def test_acts_are_told_by_what_they_did(act: str, details: dict, result: object, told: tuple) -> None:  # type: ignore[type-arg]
    kind, data = told
    assert act_event(act, details, result) == (kind, {"by": "operator", **data})


def test_what_changes_no_adapter_is_not_told() -> None:
    assert act_event("adapter_exported", {"version": "v0001"}, b"") is None
    assert act_event("access_refused", {}, None) is None
