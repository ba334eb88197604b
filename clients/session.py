"""One exchange with the server: request, retries, errors. It does no I/O but yields the steps to take.

That is what lets the blocking and the asyncio client share every line: each only walks the steps.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any, BinaryIO, Generic, Literal, NamedTuple, Protocol, TypeAlias, TypeVar
from uuid import uuid4

import httpx2

from servetune.clients.errors import (
    APIConnectionError,
    APIError,
    APIStatusError,
    APITimeoutError,
    status_error,
)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

CONNECT_TIMEOUT_S = 5.0
FIRST_DELAY_S, MAX_DELAY_S = 0.5, 8.0
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_OUR_HEADERS = {
    "authorization": "give api_key or admin_key",
    "idempotency-key": "give idempotency_key with the call",
    "content-type": "bodies are JSON",
    "content-length": "bodies have the length they have",
    "host": "base_url names it",
    "servetune-retry-count": "it counts attempts",
}
MAX_RETRY_AFTER_S = 120.0  # a server that asks for more has better be asked later, by the caller


@dataclass(frozen=True)
class Transfer:
    """Send the request; answers with the response, read, or with the httpx2 error. A body goes to `sink`."""

    request: httpx2.Request
    sink: BinaryIO | None = None


@dataclass(frozen=True)
class Pause:
    """Wait; answers with None."""

    seconds: float


@dataclass(frozen=True)
class Work:
    """Call a function that may take a while, off the event loop; answers with its result."""

    do: Callable[[], Any]


Step: TypeAlias = Transfer | Pause | Work
Steps: TypeAlias = Generator[Step, Any, T]


@dataclass(frozen=True)
class Call(Generic[T]):
    """One logical call. `body` is made once, then sent in each attempt; None as a value means "left out".

    `tar` is sent as it is, instead of a body.
    """

    method: Literal["GET", "POST", "PATCH"]
    path: str
    parse: Callable[[httpx2.Response], T]
    body: Callable[[], Mapping[str, Any]] | None = None
    query: Mapping[str, str | int | None] = field(default_factory=dict)
    admin: bool = False
    timeout: float | None = None
    max_retries: int | None = None
    idempotency_key: str | None = None
    sink: BinaryIO | None = None
    tar: Callable[[], bytes] | None = None


class Feed(Protocol[T_co]):
    """Something that the server tells line by line, over as many connections as it takes."""

    def request(self) -> httpx2.Request:
        """Asks for it, or for what is still to come."""

    def heard(self, line: str) -> T_co | None:
        """What a line completes, if it does. Raises APIError."""

    def broken(self, reply: httpx2.Response | httpx2.RequestError | None) -> float | None:
        """Seconds to wait before asking again, after a refusal, a failure or (None) the end; None: that was all.

        Raises APIError where asking again would change nothing.
        """


class Rows(NamedTuple, Generic[T]):
    """One page of a listing, parsed; `next_cursor` is None on the last."""

    items: list[T]
    next_cursor: str | None


@dataclass(frozen=True)
class Session:
    """Where the server is and how it is spoken to. Timeouts are in seconds."""

    base_url: str
    api_key: str | None = field(repr=False)
    admin_key: str | None = field(repr=False)
    timeout: float
    max_retries: int
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        try:
            url = httpx2.URL(self.base_url)
        except httpx2.InvalidURL as error:
            raise ValueError(f"base_url cannot be read: {error}") from error
        if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query or url.fragment:
            raise ValueError("base_url must be http(s)://host[:port][/path] and carry no credentials")
        for name in ("api_key", "admin_key"):
            # Checked here because httpx2 would quote an unsendable header, and so the key, in its error.
            key = getattr(self, name)
            if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
                raise ValueError(f"{name} must be printable ASCII without spaces around it")
        for name, value in self.headers.items():
            if name.lower() in _OUR_HEADERS:
                raise ValueError(f"the header {name} is the client's own: {_OUR_HEADERS[name.lower()]}")
            if not (_TOKEN.fullmatch(name) and value.isascii() and value.isprintable()):
                raise ValueError(f"the header {name!r} cannot be sent: names and values are printable ASCII")

    def send(self, call: Call[T]) -> Steps[T]:
        """Send a call until it succeeds or retrying is pointless. Raises APIError."""
        content = None
        if make := call.tar or (call.body and partial(to_json, call.body)):
            content = yield Work(make)
        headers = self._headers(call)
        retries = self.max_retries if call.max_retries is None else call.max_retries
        for attempt in itertools.count():
            headers["Servetune-Retry-Count"] = str(attempt)
            reply = yield Transfer(self.request(call, headers, content), call.sink)
            if isinstance(reply, httpx2.Response) and reply.is_success:
                return call.parse(reply)
            error = self.error(reply)
            delay = retry_delay(error, attempt)
            if delay is None or attempt >= retries:
                raise error
            yield Pause(delay)
        raise AssertionError("unreachable")

    def request(
        self, call: Call[Any], headers: Mapping[str, str] | None = None, content: bytes | None = None
    ) -> httpx2.Request:
        """One attempt at a call."""
        timeout = httpx2.Timeout(self.timeout if call.timeout is None else call.timeout, connect=CONNECT_TIMEOUT_S)
        return httpx2.Request(
            call.method,
            self.base_url.rstrip("/") + call.path,
            params={name: value for name, value in call.query.items() if value is not None},
            headers=self._headers(call) if headers is None else headers,
            content=content,
            extensions={"timeout": timeout.as_dict()},
        )

    def error(self, reply: httpx2.Response | httpx2.RequestError) -> APIError:
        """What became of an attempt that failed, as one of our errors."""
        if isinstance(reply, httpx2.Response):
            return status_error(reply.status_code, reply.headers, reply.content)
        kind = APITimeoutError if isinstance(reply, httpx2.TimeoutException) else APIConnectionError
        what = "no reply in time from" if kind is APITimeoutError else "cannot reach"
        error = kind(f"{what} {self.base_url}: {reply or type(reply).__name__}")
        error.__cause__ = reply
        return error

    def _headers(self, call: Call[Any]) -> dict[str, str]:
        ours = {"User-Agent": f"servetune-python/{version('servetune')}", "Accept": "*/*"}
        replaced = {name.lower() for name in self.headers}
        headers = {name: value for name, value in ours.items() if name.lower() not in replaced}
        headers.update(self.headers)
        key = self.admin_key if call.admin else self.api_key
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        if call.body is not None:
            headers["Content-Type"] = "application/json"
        if call.tar is not None:
            headers["Content-Type"] = "application/x-tar"
        if call.method == "POST":
            headers["Idempotency-Key"] = call.idempotency_key or uuid4().hex
        return headers


def is_loopback(base_url: str) -> bool:
    """Does the address name this machine?"""
    try:
        return httpx2.URL(base_url).host in ("127.0.0.1", "::1", "localhost")
    except httpx2.InvalidURL:
        return False


def retry_delay(error: APIError, attempt: int) -> float | None:
    """Seconds to wait before attempt `attempt + 2`; None where trying again would change nothing."""
    if isinstance(error, APIStatusError):
        if not _is_transient(error):
            return None
        if error.retry_after is not None:
            return error.retry_after if error.retry_after <= MAX_RETRY_AFTER_S else None
    delay = min(MAX_DELAY_S, FIRST_DELAY_S * 2.0**attempt)
    return delay * random.uniform(0.75, 1.0)  # so that clients turned away together do not return together


def _is_transient(error: APIStatusError) -> bool:
    in_flight = error.status == 409 and error.code == "idempotency_in_flight"
    too_hard = error.code == "deadline_exceeded"  # it would take as long again
    return in_flight or error.status in (408, 429) or (error.status >= 500 and not too_hard)


def to_json(body: Callable[[], Mapping[str, Any]]) -> bytes:
    given = {name: value for name, value in body().items() if value is not None}
    return json.dumps(given, allow_nan=False, separators=(",", ":")).encode()
