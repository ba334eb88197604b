"""What stands before the routes, as plain ASGI.

BaseHTTPMiddleware is not used anywhere: behind it a client's disconnect is never seen.
"""

from __future__ import annotations

import asyncio
import re
import time
import traceback
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from servetune.server.errors import ServiceError, as_service_error, problem
from servetune.server.ids import new_id

log = structlog.get_logger("servetune.http")

VERSION_HEADER = "Servetune-Adapter-Version"
BODY_TIMEOUT_S = 30.0
FILE_TIMEOUT_S = 300.0  # of an administrator
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Boundary:
    """Outermost: gives every request an id, turns what is raised into a problem, writes one log line.

    Neither the line nor the traceback of an unforeseen error holds anything that was sent.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        seen: dict[str, str | int | None] = {"status": None, "version": None}

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                seen.update(status=message["status"], version=headers.get(VERSION_HEADER))
            await send(message)

        started = time.perf_counter()
        try:
            await self.app(scope, receive, send_and_note)
        except Exception as error:
            _log_unforeseen(error, request_id)
            if seen["status"] is not None:
                raise  # too late for a problem: the server cuts the connection
            await problem(as_service_error(error), scope)(scope, receive, send_and_note)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            duration = round(time.perf_counter() - started, 4)
            log.info("request", request_id=request_id, route=route, duration_s=duration, **seen)


class LocalOnly:
    """For servers without user keys: refuses other host names (DNS rebinding) and foreign origins.

    Without it, any web page open on this machine could ask questions and so teach the model.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str]) -> None:
        self.app = app
        self.hosts = frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            if _hostname(f"//{headers.get('host', '')}") not in self.hosts:
                raise ServiceError("host_refused")
            if "origin" in headers and _hostname(headers["origin"]) not in self.hosts:
                raise ServiceError("origin_refused")
        await self.app(scope, receive, send)


class BodyCap:
    """Reads the body, counting what arrives, before anything parses it.

    The size promised in Content-Length can only lead to an earlier refusal; chunked bodies are counted alike.
    `file_limit` says of requests that bring a file, and whose sender may, how large they may be instead.
    """

    def __init__(
        self, app: ASGIApp, limit: int, file_limit: Callable[[Scope], int | None] = lambda scope: None
    ) -> None:
        self.app = app
        self.limit = limit
        self.file_limit = file_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        larger = self.file_limit(scope)
        limit = larger or self.limit
        self._check_promise(Headers(scope=scope).get("content-length"), limit)
        try:
            async with asyncio.timeout(FILE_TIMEOUT_S if larger else BODY_TIMEOUT_S):
                body = await self._read(receive, limit)
        except TimeoutError:
            raise ServiceError("body_timeout") from None
        await self.app(scope, replaying(body, receive), send)

    def _check_promise(self, length: str | None, limit: int) -> None:
        if length is None:
            return
        if not (length.isascii() and length.isdigit()):
            raise ServiceError("invalid_content_length")
        if len(length) > 18 or int(length) > limit:
            raise _too_large(limit)

    async def _read(self, receive: Receive, limit: int) -> bytes:
        chunks, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ServiceError("client_closed_request")
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > limit:
                raise _too_large(limit)
            more = message.get("more_body", False)
        return b"".join(chunks)


def _too_large(limit: int) -> ServiceError:
    return ServiceError("body_too_large", f"The body may have at most {limit} bytes.")


def replaying(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body already read, then whatever comes (the disconnect)."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again


def _request_id(sent: str | None) -> str:
    return sent if sent and _REQUEST_ID.fullmatch(sent) else new_id("req")


def _hostname(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def _log_unforeseen(error: Exception, request_id: str) -> None:
    """Type and call sites of an internal error, without its message, which may quote the request."""
    if as_service_error(error).code == "internal_error":
        frames = traceback.extract_tb(error.__traceback__)[-8:]
        at = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        log.error("internal_error", request_id=request_id, error=type(error).__name__, at=at)
