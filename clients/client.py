"""`Client` and `AsyncClient`: the same surface, blocking and asyncio."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any, ParamSpec, Self, TypeVar

import httpx2

from servetune.clients import calls, review
from servetune.clients.drivers import (
    Awaiting,
    Blocking,
    awaiting,
    awaiting_events,
    blocking,
    blocking_events,
    hearing,
)
from servetune.clients.replies import RawResponse, raw_response
from servetune.clients.resources import Adaptation, Adapters, AsyncAdaptation, AsyncAdapters
from servetune.clients.session import Session, is_loopback

P = ParamSpec("P")
T = TypeVar("T")

DEFAULT_BASE_URL = "http://127.0.0.1:8000"


class _Options:
    """What both clients say about their own options."""

    _session: Session

    def with_options(
        self,
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        timeout: float | None = None,
        max_retries: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Self:
        """A client with other options over the same connections; closing either closes both.

        For a single call: `client.with_options(timeout=5, max_retries=0, headers={"X-Shop": "7"}).answer(...)`.
        headers: sent beside those that are sent already. Raises ValueError as the constructor does.
        """
        given = {"api_key": api_key, "admin_key": admin_key, "timeout": timeout, "max_retries": max_retries}
        all_headers = {**self._session.headers, **(headers or {})}
        twin = copy.copy(self)
        twin._session = replace(self._session, headers=all_headers, **_without_none(given))
        return twin

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._session.base_url!r})"


class Client(_Options, Blocking):
    """A servetune server, as seen from a thread. Safe to share between threads; close it or use `with`.

    base_url: by default $SERVETUNE_BASE_URL, else http://127.0.0.1:8000.
    api_key, admin_key: by default $SERVETUNE_API_KEY and $SERVETUNE_ADMIN_KEY; the latter is sent only to
        the routes of `adapters` and `adaptation`, which take no other but for its events and series.
    timeout: seconds to wait for a reply. max_retries: attempts beyond the first, after a broken
        connection, 408, 429, 5xx or while an earlier attempt is in flight.
    headers: sent with every request, such as `traceparent` or what a proxy asks for; those of keys, bodies and
        retries are the client's own.
    transport: how bytes travel: `httpx2.MockTransport` in tests, an `httpx2.HTTPTransport` of one's own.
    Raises ValueError where the address, a key or a header cannot be used.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 2,
        headers: Mapping[str, str] | None = None,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        session = _session(base_url, api_key, admin_key, timeout, max_retries, headers)
        super().__init__(session, httpx2.Client(transport=transport, **_http_options(session)))

    answer = blocking(calls.answer)
    stream = blocking_events(calls.stream)
    recognize = blocking(calls.recognize)
    answer_batch = blocking(calls.answer_batch)
    feedback = blocking(review.feedback)
    info = blocking(calls.info)
    ready = blocking(calls.ready)
    wait_for_version = blocking(calls.wait_for_version)

    def raw(self, method: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> RawResponse[T]:
        """Make a call, and get its result with status, headers and body of the response.

        `client.raw(client.answer, "photo.png", "What is this?").headers`, also with methods of `adapters` and
        `adaptation`. Raises what the method does, and TypeError where that gives an iterator.
        """
        with hearing() as heard:
            return raw_response(method(*args, **kwargs), heard)

    @property
    def adapters(self) -> Adapters:
        """List, inspect, move and export versions (admin key)."""
        return Adapters(self._session, self._http)

    @property
    def adaptation(self) -> Adaptation:
        """Watch, pause and resume learning (admin key)."""
        return Adaptation(self._session, self._http)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class AsyncClient(_Options, Awaiting):
    """A servetune server, as seen from an event loop; close it or use `async with`.

    Takes the arguments of `Client` and has its methods, as coroutines and asynchronous iterators. Images
    are read and shrunk in a thread. `transport` may be an `httpx2.ASGITransport` around the app itself.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 2,
        headers: Mapping[str, str] | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        session = _session(base_url, api_key, admin_key, timeout, max_retries, headers)
        super().__init__(session, httpx2.AsyncClient(transport=transport, **_http_options(session)))

    answer = awaiting(calls.answer)
    stream = awaiting_events(calls.stream)
    recognize = awaiting(calls.recognize)
    answer_batch = awaiting(calls.answer_batch)
    feedback = awaiting(review.feedback)
    info = awaiting(calls.info)
    ready = awaiting(calls.ready)
    wait_for_version = awaiting(calls.wait_for_version)

    async def raw(
        self, method: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> RawResponse[T]:
        """Make a call, and get its result with status, headers and body of the response.

        `client.raw(client.answer, "photo.png", "What is this?").headers`, also with methods of `adapters` and
        `adaptation`. Raises what the method does, and TypeError where that gives an iterator.
        """
        with hearing() as heard:
            made = method(*args, **kwargs)
            return raw_response(await made if inspect.isawaitable(made) else made, heard)

    @property
    def adapters(self) -> AsyncAdapters:
        """List, inspect, move and export versions (admin key)."""
        return AsyncAdapters(self._session, self._http)

    @property
    def adaptation(self) -> AsyncAdaptation:
        """Watch, pause and resume learning (admin key)."""
        return AsyncAdaptation(self._session, self._http)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()


def _session(
    base_url: str | None,
    api_key: str | None,
    admin_key: str | None,
    timeout: float,
    max_retries: int,
    headers: Mapping[str, str] | None,
) -> Session:
    return Session(
        base_url or os.environ.get("SERVETUNE_BASE_URL") or DEFAULT_BASE_URL,
        api_key or os.environ.get("SERVETUNE_API_KEY") or None,
        admin_key or os.environ.get("SERVETUNE_ADMIN_KEY") or None,
        timeout,
        max_retries,
        dict(headers or {}),
    )


def _http_options(session: Session) -> dict[str, Any]:
    # Keys stay with their host: no redirects, and no proxy between this machine and itself.
    return {"follow_redirects": False, "trust_env": not is_loopback(session.base_url)}


def _without_none(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
