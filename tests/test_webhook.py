"""The webhook on a real Valkey and real local servers: what is told, once, and that nobody waits for it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import structlog
from pydantic import ValidationError

from servetune.clients.types import Event
from servetune.server import history as history_module
from servetune.server import webhook as webhook_module
from servetune.server.history import History, Recorder
from servetune.server.metrics import GATES, Metrics
from servetune.server.settings import Settings, resolved
from servetune.server.valkey import EmbeddedValkey
from servetune.server.webhook import COLLAPSE, DRIFT, PAUSES_S, Alert, Messenger, Webhook, alerts, tell_now
from tests.fakes import World, until
from tests.redis_servers import running

SECRET = "whsec_" + base64.b64encode(b"between the two of us").decode()  # pragma: allowlist secret
ALERT = Alert("a:1-0:rollback", "rollback", "a", 1.5, {"version": "v0001"})


@pytest.fixture
def adapter(request: pytest.FixtureRequest) -> str:
    """A line of one's own for every test."""
    return request.node.name[:60]  # type: ignore[no-any-return]


class Address:
    """A local HTTP server that answers as it is told, and keeps what it was sent."""

    def __init__(self) -> None:
        self.answers: list[str] = []  # status lines, in order; then 204; "hang" says nothing at all
        self.heard: list[tuple[dict[str, str], bytes]] = []
        self.came = 0
        self.url = ""
        self.tasks: list[asyncio.Task[None]] = []

    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.heard]

    def kinds(self) -> list[str]:
        return [json.loads(body)["type"].removeprefix("servetune.") for _, body in self.heard]

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.came += 1
        task = asyncio.current_task()
        assert task
        self.tasks.append(task)
        try:
            await self._answer(reader, writer)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        pairs = (line.split(": ", 1) for line in head[1:] if line)
        headers = {name.lower(): value for name, value in pairs}
        body = await reader.readexactly(int(headers["content-length"]))
        line = self.answers.pop(0) if self.answers else "204 No Content"
        if line == "hang":
            await reader.read()  # until the other side gives up
        else:
            if line.startswith("2"):
                self.heard.append((headers, body))
            writer.write(f"HTTP/1.1 {line}\r\nContent-Length: 0\r\nLocation: {self.url}\r\n\r\n".encode())
            await writer.drain()


@asynccontextmanager
async def listening() -> AsyncIterator[Address]:
    address = Address()
    server = await asyncio.start_server(address.answer, "127.0.0.1", 0)
    address.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook/of-a-secret-name"
    async with server:
        yield address
        await asyncio.gather(*address.tasks, return_exceptions=True)


class Rests:
    """Stands for sleeping."""

    def __init__(self) -> None:
        self.taken: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.taken.append(seconds)


async def always() -> bool:
    return True


@asynccontextmanager
async def messenger(
    url: str, address: Address, adapter: str, rests: Rests | None = None
) -> AsyncIterator[tuple[Messenger, Metrics]]:
    async def names() -> list[str]:
        return [adapter]

    history, metrics = History.connect(url), Metrics()
    try:
        webhook = Webhook(address.url, SECRET, sleep=rests or Rests())
        yield Messenger(history, webhook, names, metrics), metrics
    finally:
        await history.close()


def outcomes(metrics: Metrics) -> dict[str, float]:
    samples = [sample for family in metrics.webhook.collect() for sample in family.samples]
    return {sample.labels["outcome"]: sample.value for sample in samples}


def tell(url: str, adapter: str, *events: tuple[str, dict[str, Any]]) -> None:
    recorder = Recorder.connect(url)
    for kind, data in events:
        recorder.record(adapter, kind, data)
    recorder.close()


def rejected(*reasons: str) -> tuple[str, dict[str, Any]]:
    return "verdict", {"accepted": False, "early": False, "reasons": list(reasons), "metrics": {}}


ROLLBACK = ("rollback", {"by": "worker", "version": "v0001", "reasons": ["kl_base 2 is above 1"]})


# --- what is an alert --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "data", "told"),
    [
        (*ROLLBACK, ["rollback"]),
        ("rollback", {"by": "operator", "version": "v0001"}, ["rollback"]),
        (*rejected("distinct 0.1 is below 0.5"), ["collapse"]),
        (*rejected("kl_base 2 is above 1"), ["drift"]),
        (*rejected("valid 0.1 is below 0.5", "surer 2 is above 1"), ["collapse", "drift"]),
        (*rejected("kl_step 2 is above 1"), []),
        ("verdict", {"accepted": False, "early": True, "reasons": ["valid 0.1 is below 0.5"]}, []),
        ("verdict", {"accepted": True, "reasons": []}, []),
        ("degraded", {"error": "OSError"}, ["degraded"]),
        ("base_mismatch", {"adapters": ["b"]}, ["base_mismatch"]),
        ("step", {"reward": 0.1}, []),
        ("snapshot", {"label": "the operator's own words"}, []),
    ],
)
def test_what_needs_a_person(kind: str, data: dict[str, Any], told: list[str]) -> None:
    found = alerts(Event(id="7-0", time=7.0, adapter="a", kind=kind, data=data))
    assert [alert.kind for alert in found] == told
    assert [alert.id for alert in found] == [f"a:7-0:{kind}" for kind in told]


def test_an_alert_has_no_more_than_is_named() -> None:
    data = {**ROLLBACK[1], "question": "what is it?", "metrics": {"kl": 1.0}, "label": "secret"}
    [alert] = alerts(Event(id="7-0", time=7.0, adapter="a", kind="rollback", data=data))
    assert json.loads(alert.body()) == {
        "type": "servetune.rollback",
        "timestamp": "1970-01-01T00:00:07.000+00:00",
        "data": {"adapter": "a", **ROLLBACK[1]},
    }


def test_the_gates_of_the_alerts_are_those_of_the_rules() -> None:
    rules = Path(__file__).parents[1].joinpath("deploy/prometheus/servetune.rules.yml").read_text()
    for gates in (COLLAPSE, DRIFT):
        assert gates <= set(GATES)
        assert any(set(named.split("|")) == gates for named in rules.split('"') if "|" in named)


# --- one alert ---------------------------------------------------------------------------------------


async def test_it_is_signed_as_standard_webhooks_has_it() -> None:
    async with listening() as address:
        assert await Webhook(address.url, SECRET, clock=lambda: 1_700_000_000.2).deliver(ALERT, always)
        [(headers, body)] = address.heard
        assert (headers["webhook-id"], headers["webhook-timestamp"]) == (ALERT.id, "1700000000")
        signed = f"{ALERT.id}.1700000000.".encode() + body
        digest = hmac.new(b"between the two of us", signed, hashlib.sha256).digest()
        assert headers["webhook-signature"] == f"v1,{base64.b64encode(digest).decode()}"
        assert headers["content-type"] == "application/json"
        await Webhook(address.url).deliver(ALERT, always)
        assert "webhook-signature" not in address.heard[1][0]


async def test_it_tries_again_under_the_same_id_and_then_gives_up() -> None:
    async with listening() as address:
        rests = Rests()
        address.answers = ["500 No", "429 Slower"]
        assert await Webhook(address.url, sleep=rests).deliver(ALERT, always) is True
        assert (rests.taken, address.ids()) == ([*PAUSES_S[:2]], [ALERT.id])
        rests.taken.clear()
        address.answers, address.came = ["503 No"] * 99, 0
        assert await Webhook(address.url, sleep=rests).deliver(ALERT, always) is False
        assert (rests.taken, address.came) == ([*PAUSES_S], len(PAUSES_S) + 1)


async def test_a_redirect_is_a_failure_and_not_followed() -> None:
    async with listening() as elsewhere, listening() as address:
        address.answers = ["307 There"] * 99
        address.url, own = elsewhere.url, address.url
        assert await Webhook(own, sleep=Rests()).deliver(ALERT, always) is False
        assert elsewhere.came == 0


async def test_an_address_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook_module, "ANSWER_S", 0.5)
    async with listening() as address:
        address.answers = ["hang"]
        rests = Rests()
        assert await Webhook(address.url, sleep=rests).deliver(ALERT, always) is True
        assert rests.taken


async def test_nobody_there_is_a_failure_and_no_log_has_the_address() -> None:
    async with listening() as address:
        gone = address.url
    with structlog.testing.capture_logs() as logs:
        assert await Webhook(gone, SECRET, sleep=Rests()).deliver(ALERT, always) is False
    assert len(logs) == len(PAUSES_S) + 1
    assert "of-a-secret-name" not in str(logs)
    assert SECRET not in str(logs)


# --- following ---------------------------------------------------------------------------------------


async def test_what_was_before_is_no_news_and_what_comes_is_told_once(
    valkey: EmbeddedValkey, adapter: str
) -> None:
    tell(valkey.url, adapter, ROLLBACK)
    async with listening() as address, messenger(valkey.url, address, adapter) as (one, metrics):
        await one.round()
        assert address.heard == []
        tell(valkey.url, adapter, ROLLBACK, ("step", {"reward": 0.5}), ROLLBACK)
        await one.round()
        await one.round()
        assert address.kinds() == ["rollback", "rollback"]
        assert len(set(address.ids())) == 2
        assert outcomes(metrics)["delivered"] == 2
        assert json.loads(address.heard[0][1])["data"]["adapter"] == adapter
        await one._bookmark.leave()


async def test_what_happens_at_the_first_start_is_news(valkey: EmbeddedValkey, adapter: str) -> None:
    async with listening() as address, messenger(valkey.url, address, adapter) as (first, _):
        tell(valkey.url, adapter, ROLLBACK)
        await first.begin()
        tell(valkey.url, adapter, ("base_mismatch", {"adapters": ["b"]}))
        await first.begin()
        await first.round()
        assert address.kinds() == ["base_mismatch"]
        await first._bookmark.leave()


async def test_the_same_trouble_is_told_once_an_hour(
    valkey: EmbeddedValkey, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with listening() as address, messenger(valkey.url, address, adapter) as (one, _):
        await one.round()
        collapse, drift = rejected("valid 0.1 is below 0.5"), rejected("kl_base 2 is above 1")
        tell(valkey.url, adapter, collapse, collapse, drift, collapse, ROLLBACK, ROLLBACK)
        await one.round()
        assert address.kinds() == ["collapse", "drift", "rollback", "rollback"]
        await one._bookmark.leave()


async def test_of_two_replicas_one_tells_and_the_other_takes_over(valkey: EmbeddedValkey, adapter: str) -> None:
    async with (
        listening() as address,
        messenger(valkey.url, address, adapter) as (one, _),
        messenger(valkey.url, address, adapter) as (two, _),
    ):
        await one.round()
        tell(valkey.url, adapter, ROLLBACK)
        await asyncio.gather(two.round(), one.round())
        assert len(address.heard) == 1
        tell(valkey.url, adapter, ROLLBACK)
        await two.round()
        assert len(address.heard) == 1, "it is not its turn"
        await one._bookmark.leave()
        await two.round()
        await one.round()
        assert len(address.heard) == 2
        await two._bookmark.leave()


async def test_who_lost_its_turn_while_sending_moves_nothing(valkey: EmbeddedValkey, adapter: str) -> None:
    async with (
        listening() as address,
        messenger(valkey.url, address, adapter) as (two, _),
    ):

        class Taken(Rests):
            async def __call__(self, seconds: float) -> None:
                """Its lease runs out, and the other takes over."""
                await one._history._redis.delete("servetune:webhook:turn")
                await two.round()

        async with messenger(valkey.url, address, adapter, Taken()) as (one, metrics):
            await one.round()
            tell(valkey.url, adapter, ROLLBACK)
            address.answers = ["500 No"]
            await one.round()
            assert (len(address.heard), outcomes(metrics)) == (1, {})
        await two.round()
        assert len(address.heard) == 1
        await two._bookmark.leave()


async def test_a_crash_between_sending_and_noting_it_sends_the_same_id(
    valkey: EmbeddedValkey, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with listening() as address, messenger(valkey.url, address, adapter) as (one, _):
        await one.round()
        tell(valkey.url, adapter, rejected("valid 0.1 is below 0.5"))

        async def crash(*_: Any) -> bool:
            raise ZeroDivisionError

        with monkeypatch.context() as broken:
            broken.setattr(one._bookmark, "move", crash)
            with pytest.raises(ZeroDivisionError):
                await one.round()
        await one._bookmark.leave()
        async with messenger(valkey.url, address, adapter) as (two, _):
            await two.round()
            assert len(address.heard) == 2
            assert len(set(address.ids())) == 1
            await two._bookmark.leave()


async def test_what_is_given_up_is_counted_and_the_next_is_told(valkey: EmbeddedValkey, adapter: str) -> None:
    async with listening() as address, messenger(valkey.url, address, adapter) as (one, metrics):
        await one.round()
        tell(valkey.url, adapter, ROLLBACK, ROLLBACK)
        address.answers = ["500 No"] * (len(PAUSES_S) + 1)
        await one.round()
        assert outcomes(metrics) == {"given_up": 1, "delivered": 1}
        await one._bookmark.leave()


async def test_a_redis_that_is_down_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "RETRY_S", 0.0)
    monkeypatch.setattr(webhook_module, "POLL_S", 0.01)
    async with listening() as address:
        with running(tmp_path) as server:
            url = server.url
        async with messenger(url, address, "a") as (one, _):
            following = asyncio.create_task(one.run())
            await asyncio.sleep(0.05)
            assert not following.done()
            following.cancel()
            await asyncio.wait({following})
            assert following.cancelled()


async def test_a_server_tells_and_answers_while_the_address_hangs(
    valkey: EmbeddedValkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook_module, "POLL_S", 0.01)
    async with listening() as address:
        address.answers = ["hang"]
        world = World(tmp_path, history=History.connect(valkey.url), webhook_url=address.url)
        async with world.app.router.lifespan_context(world.app):
            services = world.app.state.services
            place = f"servetune:{{{world.store.name}}}:place:webhook"
            while not await services.history._redis.exists(place):  # it follows from now on
                await asyncio.sleep(0.005)
            tell(valkey.url, world.store.name, ROLLBACK)
            await until(lambda: address.came == 1)
            assert (await world.ask()).status_code == 200
        assert address.heard == []


# --- settings ----------------------------------------------------------------------------------------


def test_address_and_secret_are_never_shown(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, webhook_url="https://hooks.test/of-a-secret-name", webhook_secret=SECRET)  # type: ignore[arg-type]
    shown = resolved(home=tmp_path, webhook_url="https://hooks.test/of-a-secret-name", webhook_secret=SECRET)
    values = {each.setting: each.value for each in shown}
    assert (values["webhook_url"], values["webhook_secret"]) == (True, True)
    for text in (repr(settings), str(shown), str(settings.without_secrets())):
        assert "of-a-secret-name" not in text
        assert SECRET not in text


@pytest.mark.parametrize("url", ["ftp://here/", "hooks.test/x", "https://", "https://a b/"])
def test_an_address_is_one_of_the_web(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValidationError, match="begins with https"):
        Settings(home=tmp_path, webhook_url=url)  # type: ignore[arg-type]


async def test_what_keeps_a_process_from_starting_is_told_at_once(tmp_path: Path) -> None:
    async with listening() as address:
        settings = Settings(home=tmp_path, webhook_url=address.url)  # type: ignore[arg-type]
        for _ in range(2):
            await asyncio.to_thread(tell_now, settings, "base_mismatch", {"adapters": ["default"]})
        assert address.kinds() == ["base_mismatch"] * 2
        assert len(set(address.ids())) == 1, "it is the same at every start"
    await asyncio.to_thread(tell_now, settings, "base_mismatch", {"adapters": ["default"]})
