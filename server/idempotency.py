"""Idempotency-Key: a POST that is sent again gets its first answer again and is not learned from twice.

Answers are kept in memory, so the promise holds per replica and until a restart.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from servetune.server.errors import ServiceError
from servetune.server.middleware import replaying

TTL_S = 24 * 3600.0
MAX_BYTES = 32_000_000
MAX_ENTRIES = 10_000
LARGE = 1_000_000  # bytes of a body that is not hashed on the event loop
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_BOUNDARY = re.compile(r'boundary="?([^";,]+)"?', re.IGNORECASE)


@dataclass
class Reply:
    """A recorded response."""

    start: Message = field(default_factory=dict)
    body: bytes = b""

    def add(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.start = {**message, "headers": list(message["headers"])}
        else:
            self.body += message.get("body", b"")

    @property
    def succeeded(self) -> bool:
        status: int = self.start.get("status", 0)
        return 200 <= status < 300

    async def send_again(self, send: Send) -> None:
        replayed = (b"idempotency-replayed", b"true")
        await send({**self.start, "headers": [*self.start["headers"], replayed]})
        await send({"type": "http.response.body", "body": self.body})


@dataclass
class _Entry:
    fingerprint: bytes
    expires: float
    reply: Reply | None = None  # None while the first request runs


class Replies:
    """A bounded memory of replies, the least recently used forgotten first."""

    def __init__(self, ttl_s: float = TTL_S, max_bytes: int = MAX_BYTES) -> None:
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._bytes = 0

    def begin(self, key: bytes, fingerprint: bytes) -> Reply | None:
        """The reply to give again, or None: the caller is the first and must `finish`.

        Raises:
            ServiceError: `idempotency_mismatch` for another request, `idempotency_in_flight` for a running one.
        """
        entry = self._entries.get(key)
        if entry is not None and entry.reply is not None and entry.expires < time.monotonic():
            self._forget(key)
            entry = None
        if entry is None:
            self._entries[key] = _Entry(fingerprint, time.monotonic() + self._ttl_s)
            return None
        if entry.fingerprint != fingerprint:
            raise ServiceError("idempotency_mismatch", param="Idempotency-Key")
        if entry.reply is None:
            raise ServiceError("idempotency_in_flight", headers={"Retry-After": "1"})
        self._entries.move_to_end(key)
        return entry.reply

    def finish(self, key: bytes, reply: Reply) -> None:
        """Keep a success; forget a failure, so that it may be tried again."""
        if not reply.succeeded:
            self._forget(key)
            return
        self._entries[key].reply = reply
        self._bytes += len(reply.body)
        done = [key for key, entry in self._entries.items() if entry.reply] if self._is_over() else []
        for oldest in done:
            if not self._is_over():
                break
            self._forget(oldest)

    def _is_over(self) -> bool:
        return self._bytes > self._max_bytes or len(self._entries) > MAX_ENTRIES

    def _forget(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        self._bytes -= len(entry.reply.body) if entry.reply else 0


class Idempotency:
    """Honours Idempotency-Key on every POST. Stands behind BodyCap, which has read the body."""

    def __init__(self, app: ASGIApp, replies: Replies | None = None) -> None:
        self.app = app
        self.replies = replies or Replies()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" and scope["method"] == "POST" else Headers()
        if "idempotency-key" not in headers:
            await self.app(scope, receive, send)
            return
        body: bytes = (await receive())["body"]
        slot = _slot(scope["path"], headers)
        if len(body) > LARGE:
            fingerprint = await asyncio.to_thread(_fingerprint, scope, headers, body)
        else:
            fingerprint = _fingerprint(scope, headers, body)
        earlier = self.replies.begin(slot, fingerprint)
        if earlier is not None:
            await earlier.send_again(send)
            return
        reply = Reply()

        async def send_and_keep(message: Message) -> None:
            reply.add(message)
            await send(message)

        try:
            await self.app(scope, replaying(body, receive), send_and_keep)
        finally:
            self.replies.finish(slot, reply)


def _slot(path: str, headers: Headers) -> bytes:
    """Keys of different callers never meet: the caller's credentials are part of the slot."""
    key = headers["idempotency-key"]
    if not _KEY.fullmatch(key):
        rule = "1 to 255 visible ASCII characters"
        raise ServiceError("invalid_request", f"Idempotency-Key: {rule}", param="Idempotency-Key")
    parts = (path, headers.get("authorization", ""), key)
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).digest()


def _fingerprint(scope: Scope, headers: Headers, body: bytes) -> bytes:
    """What makes a request the same; a form's boundary, which clients draw anew, does not count."""
    content_type = headers.get("content-type", "")
    if match := _BOUNDARY.search(content_type):
        boundary = match[1]
        content_type = content_type.replace(boundary, "")
        body = body.replace(boundary.encode("latin-1"), b"")
    options = f"{content_type}\n{headers.get('servetune-adapt')}\n{headers.get('if-match')}\n"
    query: bytes = scope.get("query_string", b"")
    return hashlib.sha256(b"%b%b\n%b" % (options.encode("latin-1", "replace"), query, body)).digest()
