"""`Client` and `AsyncClient`: the same surface, blocking and asyncio."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from typing import Any, Self

import httpx2

from servetune.clients import calls
from servetune.clients.drivers import Awaiting, Blocking, awaiting, awaiting_events, blocking, blocking_events
from servetune.clients.resources import Adaptation, Adapters, AsyncAdaptation, AsyncAdapters
from servetune.clients.session import Session, is_loopback

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
    ) -> Self:
        """A client with other options over the same connections; closing either closes both."""
        given = {"api_key": api_key, "admin_key": admin_key, "timeout": timeout, "max_retries": max_retries}
        twin = copy.copy(self)
        twin._session = replace(self._session, **_without_none(given))
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
    transport: how bytes travel: `httpx2.MockTransport` in tests, an `httpx2.HTTPTransport` of one's own.
    Raises ValueError where the address or a key cannot be used.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 2,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        session = _session(base_url, api_key, admin_key, timeout, max_retries)
        super().__init__(session, httpx2.Client(transport=transport, **_http_options(session)))

    answer = blocking(calls.answer)
    stream = blocking_events(calls.stream)
    recognize = blocking(calls.recognize)
    answer_batch = blocking(calls.answer_batch)
    info = blocking(calls.info)
    ready = blocking(calls.ready)
    wait_for_version = blocking(calls.wait_for_version)

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
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        session = _session(base_url, api_key, admin_key, timeout, max_retries)
        super().__init__(session, httpx2.AsyncClient(transport=transport, **_http_options(session)))

    answer = awaiting(calls.answer)
    stream = awaiting_events(calls.stream)
    recognize = awaiting(calls.recognize)
    answer_batch = awaiting(calls.answer_batch)
    info = awaiting(calls.info)
    ready = awaiting(calls.ready)
    wait_for_version = awaiting(calls.wait_for_version)

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
    base_url: str | None, api_key: str | None, admin_key: str | None, timeout: float, max_retries: int
) -> Session:
    return Session(
        base_url or os.environ.get("SERVETUNE_BASE_URL") or DEFAULT_BASE_URL,
        api_key or os.environ.get("SERVETUNE_API_KEY") or None,
        admin_key or os.environ.get("SERVETUNE_ADMIN_KEY") or None,
        timeout,
        max_retries,
    )


def _http_options(session: Session) -> dict[str, Any]:
    # Keys stay with their host: no redirects, and no proxy between this machine and itself.
    return {"follow_redirects": False, "trust_env": not is_loopback(session.base_url)}


def _without_none(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
