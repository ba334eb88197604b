"""Tells the operator's own address what needs a person: a rollback, collapse, drift, a worker in trouble.

Follows the histories of all adapters from where the last process stopped, so that neither learning nor answers
know of it. One replica sends at a time. An alert is sent at least once, under an id that never changes; what is
not taken after some tries is given up, counted, and left in the history.

The form is that of Standard Webhooks (standardwebhooks.com). An alert has names, numbers and reasons of the gate,
never a question, an image, an answer or a key.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx2
import structlog

from servetune.clients.types import Event
from servetune.server.buffer import BufferUnavailable
from servetune.server.history import Bookmark, History
from servetune.server.metrics import Metrics, failed_gates, verdict_result
from servetune.server.settings import Settings

COLLAPSE = frozenset({"distinct", "valid", "unshown"})
DRIFT = frozenset({"kl_base", "unvouched", "surer"})
"""Parts of the gate; the alert rules in deploy/prometheus name the same."""

TOLD = ("by", "version", "reasons", "error", "exit_code", "adapters", "base_digest", "probes")
"""What an alert takes over from its event."""

POLL_S = 2.0
LEASE_S = 60.0  # longer than one try and the pause after it
ANSWER_S = 10.0  # longest wait for the address, from the first byte sent to the last one read
PAUSES_S = (1.0, 4.0, 16.0, 30.0)  # between the tries
QUIET_S = 3600.0  # the same of the same adapter is not told again within this time, but for rollbacks
SECRET_PREFIX = "whsec_"  # pragma: allowlist secret

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that a person should look at. `time` is in seconds since 1970."""

    id: str
    kind: str
    adapter: str
    time: float
    data: Mapping[str, Any] = field(default_factory=dict)

    def body(self) -> bytes:
        """What is sent."""
        when = datetime.fromtimestamp(self.time, UTC).isoformat(timespec="milliseconds")
        return json.dumps(
            {"type": f"servetune.{self.kind}", "timestamp": when, "data": {"adapter": self.adapter, **self.data}}
        ).encode()


def alerts(event: Event) -> list[Alert]:
    """What an event of the history should alert to; mostly nothing."""
    kinds: list[str] = []
    match event.kind:
        case "rollback" | "degraded" | "base_mismatch":
            kinds = [event.kind]
        case "verdict" if verdict_result(event.data) == "rejected":
            failed = set(failed_gates(event.data.get("reasons", ())))
            kinds = [kind for kind, gates in (("collapse", COLLAPSE), ("drift", DRIFT)) if failed & gates]
    told = {name: event.data[name] for name in TOLD if name in event.data}
    return [Alert(f"{event.adapter}:{event.id}:{kind}", kind, event.adapter, event.time, told) for kind in kinds]


class Webhook:
    """The operator's address. Without a secret nothing is signed.

    Args:
        transport, sleep, clock: for tests.
    """

    def __init__(
        self,
        url: str,
        secret: str | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._url = url
        self._key = _key(secret) if secret else None
        self._client = httpx2.AsyncClient(
            transport=transport,
            timeout=ANSWER_S,
            follow_redirects=False,
            trust_env=False,
            limits=httpx2.Limits(max_keepalive_connections=0),
        )
        self._sleep = sleep
        self._clock = clock

    @classmethod
    def from_settings(cls, settings: Settings) -> Webhook | None:
        """The address that the settings name, if they do."""
        if settings.webhook_url is None:
            return None
        secret = settings.webhook_secret
        return cls(settings.webhook_url.get_secret_value(), secret.get_secret_value() if secret else None)

    async def deliver(self, alert: Alert, may: Callable[[], Awaitable[bool]]) -> bool | None:
        """Send an alert until it is taken: any answer from 200 to 299.

        Returns:
            False when it was given up, None when this process may no longer send: `may` is asked before each try.
        """
        for pause_s in (*PAUSES_S, None):
            if not await may():
                return None
            if (failure := await self.post(alert)) is None:
                return True
            log.warning("webhook_failed", alert=alert.id, failure=failure, again_in_s=pause_s)
            if pause_s is not None:
                await self._sleep(pause_s)
        return False

    async def post(self, alert: Alert) -> str | None:
        """One try; what was wrong with it, in words that tell nothing of the address."""
        body = alert.body()
        headers = self._headers(alert, body)
        try:
            async with (
                asyncio.timeout(ANSWER_S),
                # Its answer is not read: it may be without an end.
                self._client.stream("POST", self._url, content=body, headers=headers) as reply,
            ):
                return None if reply.is_success else f"status {reply.status_code}"
        except TimeoutError:
            return "timeout"
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            return type(error).__name__

    async def close(self) -> None:
        """Send nothing more."""
        await self._client.aclose()

    def _headers(self, alert: Alert, body: bytes) -> dict[str, str]:
        moment = f"{self._clock():.0f}"
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "servetune",
            "webhook-id": alert.id,
            "webhook-timestamp": moment,
        }
        if self._key:
            headers["webhook-signature"] = signature(self._key, alert.id, moment, body)
        return headers


class Messenger:
    """Reads the histories of all adapters, and has a webhook deliver what they alert to."""

    def __init__(
        self,
        history: History,
        webhook: Webhook,
        names: Callable[[], Awaitable[list[str]]],
        metrics: Metrics,
    ) -> None:
        self._history = history
        self._webhook = webhook
        self._names = names
        self._metrics = metrics
        self._bookmark: Bookmark = history.bookmark("webhook", LEASE_S)

    async def begin(self) -> None:
        """What happens from now on is news, also where nobody ever followed."""
        with suppress(BufferUnavailable):
            for name in await self._names():
                await self._bookmark.place(name)

    async def run(self) -> None:
        """Follow until cancelled."""
        try:
            while True:
                try:
                    await self.round()
                except BufferUnavailable:  # the events wait there
                    pass
                except Exception as error:  # an alert is not worth a server
                    log.error("webhook_broken", error=type(error).__name__)
                await asyncio.sleep(POLL_S)
        finally:
            with suppress(BufferUnavailable):
                await self._bookmark.leave()
            await self._webhook.close()

    async def round(self) -> None:
        """Tell what has happened since the last time, where no other process does. Raises BufferUnavailable."""
        for name in await self._names():
            if not await self._bookmark.mine():
                return
            await self._tell(name)

    async def _tell(self, adapter: str) -> None:
        since = await self._bookmark.place(adapter)
        for event in await self._history.read(adapter, since=since):
            for alert in alerts(event):
                if not await self._due(alert, event):
                    continue
                taken = await self._webhook.deliver(alert, self._bookmark.mine)
                if taken is None:
                    return
                self._metrics.webhook.labels("delivered" if taken else "given_up").inc()
            if not await self._bookmark.move(adapter, event.id or since):
                return

    async def _due(self, alert: Alert, event: Event) -> bool:
        if alert.kind == "rollback":
            return True
        return await self._bookmark.first(alert.adapter, alert.kind, event.id or "", QUIET_S)


def tell_now(settings: Settings, kind: str, data: Mapping[str, Any]) -> None:
    """Tell of something that keeps a process from starting, in one try. Never raises."""
    webhook = Webhook.from_settings(settings)
    if webhook is None:
        return
    key = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
    alert = Alert(f"{settings.adapter}:{key}:{kind}", kind, settings.adapter, time.time(), data)
    asyncio.run(_try_once(webhook, alert))


async def _try_once(webhook: Webhook, alert: Alert) -> None:
    if failure := await webhook.post(alert):
        log.warning("webhook_failed", alert=alert.id, failure=failure, again_in_s=None)
    await webhook.close()


def signature(key: bytes, id: str, moment: str, body: bytes) -> str:
    """Of an alert, as Standard Webhooks has it."""
    digest = hmac.new(key, b".".join((id.encode(), moment.encode(), body)), hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def _key(secret: str) -> bytes:
    """The bytes of a secret: base64 behind `whsec_`, else the text as it is."""
    if secret.startswith(SECRET_PREFIX):
        with suppress(binascii.Error):
            return base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    return secret.encode()
