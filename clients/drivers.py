"""Walking steps: `Blocking` waits in the calling thread, `Awaiting` on the event loop.

`blocking` and `awaiting` turn a function of `calls` into a method of either; `blocking_each` and
`awaiting_each` do so for listings, `blocking_events` and `awaiting_events` for feeds. Name, arguments and
docstring stay those of the function.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing, closing, contextmanager
from contextvars import ContextVar
from typing import Any, Concatenate, ParamSpec, TypeVar

import httpx2

from servetune.clients.session import Feed, Pause, Rows, Session, Step, Steps, Transfer, Work

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_heard: ContextVar[list[httpx2.Response] | None] = ContextVar("heard", default=None)


@contextmanager
def hearing() -> Iterator[list[httpx2.Response]]:
    """A list of the responses that calls made inside of it get, in this thread or task."""
    heard: list[httpx2.Response] = []
    token = _heard.set(heard)
    try:
        yield heard
    finally:
        _heard.reset(token)


def _hear(reply: httpx2.Response | httpx2.RequestError) -> httpx2.Response | httpx2.RequestError:
    heard = _heard.get()
    if heard is not None and isinstance(reply, httpx2.Response):
        heard.append(reply)
    return reply


class Blocking:
    """Owns nothing: it speaks through connections that it is given."""

    def __init__(self, session: Session, http: httpx2.Client) -> None:
        self._session = session
        self._http = http

    def _run(self, steps: Steps[T]) -> T:
        reply: Any = None
        with closing(steps):
            while True:
                try:
                    step = steps.send(reply)
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]
                reply = self._take(step)

    def _take(self, step: Step) -> Any:
        match step:
            case Pause(seconds):
                return time.sleep(seconds)
            case Work(do):
                return do()
            case Transfer():
                return _hear(self._transfer(step))

    def _transfer(self, step: Transfer) -> httpx2.Response | httpx2.RequestError:
        try:
            with closing(self._http.send(step.request, stream=True)) as response:
                if step.sink is None or not response.is_success:
                    response.read()
                    return response
                step.sink.truncate(step.sink.seek(0))  # an attempt before may have left half a body
                for chunk in response.iter_bytes():
                    step.sink.write(chunk)
                return response
        except httpx2.RequestError as error:
            return error


class Awaiting:
    """As `Blocking`, on the event loop."""

    def __init__(self, session: Session, http: httpx2.AsyncClient) -> None:
        self._session = session
        self._http = http

    async def _run(self, steps: Steps[T]) -> T:
        reply: Any = None
        with closing(steps):
            while True:
                try:
                    step = steps.send(reply)
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]
                reply = await self._take(step)

    async def _take(self, step: Step) -> Any:
        match step:
            case Pause(seconds):
                return await asyncio.sleep(seconds)
            case Work(do):
                return await asyncio.to_thread(do)
            case Transfer():
                return _hear(await self._transfer(step))

    async def _transfer(self, step: Transfer) -> httpx2.Response | httpx2.RequestError:
        try:
            response = await self._http.send(step.request, stream=True)
            try:
                if step.sink is None or not response.is_success:
                    await response.aread()
                    return response
                step.sink.truncate(step.sink.seek(0))
                async for chunk in response.aiter_bytes():
                    step.sink.write(chunk)
                return response
            finally:
                await response.aclose()
        except httpx2.RequestError as error:
            return error


def blocking(flow: Callable[Concatenate[Session, P], Steps[T]]) -> Callable[Concatenate[Blocking, P], T]:
    """A method that takes all steps and returns what they lead to."""

    def method(self: Blocking, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(flow(self._session, *args, **kwargs))

    return _presented(method, flow, "{}")


def awaiting(
    flow: Callable[Concatenate[Session, P], Steps[T]],
) -> Callable[Concatenate[Awaiting, P], Coroutine[Any, Any, T]]:
    """The coroutine function of the same."""

    async def method(self: Awaiting, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._run(flow(self._session, *args, **kwargs))

    return _presented(method, flow, "{}")


def blocking_each(
    page: Callable[Concatenate[Session, str | None, P], Steps[Rows[T]]],
) -> Callable[Concatenate[Blocking, P], Iterator[T]]:
    """A method that iterates over a listing, page after page."""

    def method(self: Blocking, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        rows = self._run(page(self._session, None, *args, **kwargs))
        yield from rows.items
        while rows.next_cursor is not None:
            rows = self._run(page(self._session, rows.next_cursor, *args, **kwargs))
            yield from rows.items

    return _presented(method, page, "Iterator[{}]")


def awaiting_each(
    page: Callable[Concatenate[Session, str | None, P], Steps[Rows[T]]],
) -> Callable[Concatenate[Awaiting, P], AsyncIterator[T]]:
    """The asynchronous iterator of the same."""

    async def method(self: Awaiting, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        rows = await self._run(page(self._session, None, *args, **kwargs))
        for item in rows.items:
            yield item
        while rows.next_cursor is not None:
            rows = await self._run(page(self._session, rows.next_cursor, *args, **kwargs))
            for item in rows.items:
                yield item

    return _presented(method, page, "AsyncIterator[{}]")


def blocking_events(
    subscribe: Callable[Concatenate[Session, P], Feed[T]],
) -> Callable[Concatenate[Blocking, P], Iterator[T]]:
    """A method that iterates over events as they come."""

    def method(self: Blocking, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        subscription = subscribe(self._session, *args, **kwargs)
        while True:
            reply: httpx2.Response | httpx2.RequestError | None = None
            try:
                with closing(self._http.send(subscription.request(), stream=True)) as response:
                    if response.is_success:
                        for line in response.iter_lines():
                            if event := subscription.heard(line):
                                yield event
                    else:
                        response.read()
                        reply = response
            except httpx2.RequestError as error:
                reply = error
            if (pause := subscription.broken(reply)) is None:
                return
            time.sleep(pause)

    return _presented(method, subscribe, "Iterator[{}]")


def awaiting_events(
    subscribe: Callable[Concatenate[Session, P], Feed[T]],
) -> Callable[Concatenate[Awaiting, P], AsyncIterator[T]]:
    """The asynchronous iterator of the same."""

    async def method(self: Awaiting, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        subscription = subscribe(self._session, *args, **kwargs)
        while True:
            reply: httpx2.Response | httpx2.RequestError | None = None
            try:
                request = await asyncio.to_thread(subscription.request)  # it may have images to read
                async with aclosing(await self._http.send(request, stream=True)) as response:
                    if response.is_success:
                        async for line in response.aiter_lines():
                            if event := subscription.heard(line):
                                yield event
                    else:
                        await response.aread()
                        reply = response
            except httpx2.RequestError as error:
                reply = error
            if (pause := subscription.broken(reply)) is None:
                return
            await asyncio.sleep(pause)

    return _presented(method, subscribe, "AsyncIterator[{}]")


def _presented(method: F, flow: Callable[..., Any], returns: str) -> F:
    """Let `help` and editors see the method a user calls: `self`, no cursor, the result itself."""
    functools.update_wrapper(method, flow)
    signature = inspect.signature(flow)
    result = str(signature.return_annotation)
    for wrapping in ("Steps[", "Rows[", "Feed["):
        if result.startswith(wrapping):
            result = result.removeprefix(wrapping).removesuffix("]")
    first, *rest = signature.parameters.values()
    parameters = [first.replace(name="self", annotation=inspect.Parameter.empty)]
    parameters += [parameter for parameter in rest if parameter.name != "cursor"]
    method.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=parameters, return_annotation=returns.format(result)
    )
    return method
