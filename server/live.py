"""The live page at `/`, the events and series that it draws, and `/metrics`.

The page is static and holds no data, so that a browser can load it where keys are needed; all that it shows comes
through the other routes, with the key that its user gives it.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import aclosing
from importlib.resources import files
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import Field, StringConstraints
from pydantic.json_schema import SkipJsonSchema

from servetune.clients.types import AdapterName, Series
from servetune.server.description import problems
from servetune.server.errors import ServiceError
from servetune.server.lines import Line
from servetune.server.routes import OPEN, ServicesDep, UserDep
from servetune.server.watch import Watches

RECONNECT_MS = 1000
MOST_STREAMS = 64
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self' blob: data:",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
)
SAFE = {
    "Content-Security-Policy": "; ".join(POLICY),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
PAGE = {
    file.name: file.read_bytes()
    for file in files("servetune.server").joinpath("page").iterdir()
    if file.name.rpartition(".")[2] in TYPES
}

EXPOSITION = {kind: {"schema": {"type": "string"}} for kind in ("text/plain", "application/openmetrics-text")}

Absent = SkipJsonSchema[None]  # what may be left out; it cannot be sent as null
EventId = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,15}(-[0-9]{1,15})?$")]

router = APIRouter()


async def _watches(request: Request) -> Watches:
    found: Watches = request.app.state.watches
    return found


WatchesDep = Annotated[Watches, Depends(_watches)]


async def _line(
    services: ServicesDep, caller: UserDep, adapter: Annotated[AdapterName | Absent, Query()] = None
) -> Line:
    """The adapter asked for, by default the caller's. Raises ServiceError `adapter_not_found`."""
    own = caller.adapter or services.lines.first.name
    if caller.adapter and adapter not in (None, own):
        raise ServiceError("adapter_not_found", "This server has no adapter of that name.")
    return await services.lines.find(adapter or own)


LineDep = Annotated[Line, Depends(_line)]


async def _place(watches: WatchesDep) -> AsyncIterator[None]:
    """A place among those who follow. Raises ServiceError `queue_full`."""
    if watches.streams >= MOST_STREAMS:
        raise ServiceError("queue_full", "Too many follow the events already.")
    watches.streams += 1
    try:
        yield
    finally:
        watches.streams -= 1


@router.get(
    "/v1/adaptation/events",
    tags=["adaptation"],
    dependencies=[Depends(_place)],
    responses=problems(401, 404, 409, 422, 503),
    response_class=EventSourceResponse,
)
async def events(
    line: LineDep,
    watches: WatchesDep,
    services: ServicesDep,
    since: Annotated[EventId | Absent, Query(description="the id of an event; 0 for all that is kept")] = None,
    status: Annotated[bool, Query(description="also tell how things stand, every two seconds")] = False,
    follow: Annotated[bool, Query(description="go on with what happens; else end after what did")] = True,
    last_event_id: Annotated[EventId | Absent, Header()] = None,
) -> AsyncIterator[ServerSentEvent]:
    """What happens to an adapter, as server-sent events: after `since` or `Last-Event-ID`, or from now on."""
    after = last_event_id or since or await services.history.newest(line.name)
    yield ServerSentEvent(retry=RECONNECT_MS, id=after)  # who is cut off before the first event goes on from here
    async with aclosing(watches.of(line).events(after, status, follow)) as happened:
        async for event in happened:
            yield ServerSentEvent(data=event, event=event.kind, id=event.id)


@router.get("/v1/adaptation/series", tags=["adaptation"], responses=problems(401, 404, 409, 422, 503))
async def series(
    line: LineDep,
    watches: WatchesDep,
    since: Annotated[EventId | Absent, Query(description="the id of an event; by default the newest ones")] = None,
    limit: Annotated[int, Query(ge=1, le=5000, description="events read at most")] = 2000,
) -> Series:
    """An adapter's history as columns for charts, a row for each step, and what else happened meanwhile."""
    return await watches.of(line).series(since, limit)


@router.get(
    "/metrics",
    responses={200: {"content": EXPOSITION}, **problems(401, 403)},
    response_class=Response,
)
async def metrics(watches: WatchesDep, caller: UserDep, accept: Annotated[str, Header()] = "") -> Response:
    """For Prometheus: of all adapters, so not for a key that is for one alone."""
    if caller.adapter:
        raise ServiceError("forbidden", "This key is for one adapter alone.")
    text, content_type = await watches.metrics(accept)
    return Response(text, media_type=content_type)


@router.get(
    "/",
    dependencies=OPEN,
    responses={200: {"content": {"text/html": {"schema": {"type": "string"}}}}, **problems()},
    response_class=Response,
)
async def page(request: Request) -> Response:
    """The live page."""
    return _file("index.html", request)


@router.get("/page/{file}", include_in_schema=False, dependencies=OPEN)
async def part(file: Annotated[str, Field(max_length=64)], request: Request) -> Response:
    """A part of the live page."""
    if file not in PAGE:
        raise ServiceError("not_found")
    return _file(file, request)


def _file(name: str, request: Request) -> Response:
    tag = f'"{hashlib.sha256(PAGE[name]).hexdigest()[:16]}"'
    headers = SAFE | {"ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(PAGE[name], headers=headers, media_type=TYPES[name.rpartition(".")[2]])
