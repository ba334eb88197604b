"""The public routes: questions, health, and what is running. Handlers only translate; the service decides."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from fastapi.sse import format_sse_event
from pydantic import BaseModel

import servetune
from servetune.adapters.versions import version_name
from servetune.clients.types import Answer, BatchItem, BatchReply, Delta, Info
from servetune.server.access import Principal, Require
from servetune.server.bodies import MAX_IMAGES, Asked, parse_batch, parse_question
from servetune.server.description import ASK_BODY, BATCH_BODY, EVENTS, problems
from servetune.server.errors import ServiceError, as_service_error, problem_document
from servetune.server.middleware import VERSION_HEADER
from servetune.server.service import Services
from servetune.server.telling import Ask, Telling, settled

T = TypeVar("T")
LIVE_TIMEOUT_S = 10.0
BUFFER_STATUS_TIMEOUT_S = 1.0
STREAM = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies pass on each event as it comes


async def _services(request: Request) -> Services:  # async: a plain function would be run in a thread
    found: Services = request.app.state.services
    return found


ServicesDep = Annotated[Services, Depends(_services)]
UserDep = Annotated[Principal, Depends(Require("user"))]
OPEN = [Depends(Require("open"))]
USER = [Depends(Require("user"))]


async def asker(caller: UserDep, services: ServicesDep) -> Principal:
    """Who asks a question, within what their key may ask and the server can answer."""
    services.answers.check_room()
    services.quota.admit(caller.id)  # what was refused for want of room is not counted
    return caller


ASK_REPLIES = EVENTS | problems(401, 404, 409, 415, 422, 429, 503)
BATCH_REPLIES = problems(401, 409, 415, 422, 429, 503)
BATCH_AT_ONCE = 8  # questions of one batch: others are to find a place in the queue too

router = APIRouter()


@router.post("/v1/answer", response_model=Answer, responses=ASK_REPLIES, openapi_extra=ASK_BODY)
@router.post("/answer", response_model=Answer, responses=ASK_REPLIES, openapi_extra=ASK_BODY)
async def answer(
    request: Request, services: ServicesDep, caller: Annotated[Principal, Depends(asker)]
) -> Response:
    """Answer a question about an image: recognition with `candidate_labels`, otherwise VQA."""
    asked = await parse_question(request.headers, await request.body())
    ask = partial(
        services.answers.answer, asked.request, asked.images, caller, request.state.request_id, asked.opted_out
    )
    if asked.request.stream:
        return await while_connected(request, _stream(request, ask))
    reply = await while_connected(request, ask())
    headers = {VERSION_HEADER: reply.adapter.version}
    return Response(reply.model_dump_json(), headers=headers, media_type="application/json")


@router.post("/v1/answer/batch", response_model=BatchReply, responses=BATCH_REPLIES, openapi_extra=BATCH_BODY)
async def batch(request: Request, services: ServicesDep, caller: Annotated[Principal, Depends(asker)]) -> Response:
    """Answer several questions, a few at a time; what fails of them is told in its place."""
    asked = await asyncio.to_thread(parse_batch, request.headers, await request.body())
    answers, few = services.answers, asyncio.Semaphore(BATCH_AT_ONCE)

    async def one(place: int, each: Asked) -> BatchItem:
        async with few:
            try:
                if place:  # the first was counted with the request
                    services.quota.admit(caller.id)
                made = answers.answer(each.request, each.images, caller, request.state.request_id, each.opted_out)
                return BatchItem(answer=await made)
            except Exception as error:
                return BatchItem(problem=problem_document(as_service_error(error), request.scope))

    async def all_of_them() -> list[BatchItem]:
        return await asyncio.gather(*(one(place, each) for place, each in enumerate(asked)))

    reply = BatchReply(results=await while_connected(request, all_of_them()))
    return Response(reply.model_dump_json(), media_type="application/json")


async def _stream(request: Request, ask: Ask[Answer]) -> Response:
    telling = Telling(ask)
    events = _events(request, telling, await telling.begin())
    return StreamingResponse(events, headers=STREAM, media_type="text/event-stream")


async def _events(request: Request, telling: Telling[Answer], text: str | None) -> AsyncIterator[bytes]:
    """`delta` with what is new, then `done` with the whole answer, or `error` with a problem document."""
    said = ""
    try:
        while text is not None:
            told = settled(text)
            if told.startswith(said) and told != said:
                yield _event("delta", Delta(text=told[len(said) :]))
                said = told
            text = await telling.next()
        answer = telling.result.answer or ""
        if answer.startswith(said) and answer != said:
            yield _event("delta", Delta(text=answer[len(said) :]))
        yield _event("done", telling.result)
    except Exception as error:  # the status is sent
        yield _event("error", problem_document(as_service_error(error), request.scope))
    finally:
        telling.cancel()


def _event(kind: str, data: BaseModel) -> bytes:
    return format_sse_event(event=kind, data_str=data.model_dump_json())


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ServiceError("client_closed_request")
        return working.result()
    finally:
        leaving.cancel()
        if working.cancel():
            await asyncio.wait({working})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@router.get("/v2/health/live", include_in_schema=False, dependencies=OPEN)
@router.get("/livez", responses=problems(503), dependencies=OPEN)
async def livez(services: ServicesDep) -> dict[str, str]:
    """Do the event loop and the engine's thread respond?"""
    try:
        async with asyncio.timeout(LIVE_TIMEOUT_S):
            await services.lines.first.engine.ping()
    except Exception:  # whatever is wrong with the engine, this process is not alive
        raise ServiceError("engine_unresponsive") from None
    return {"status": "ok"}


@router.get("/v2/health/ready", include_in_schema=False, dependencies=OPEN)
@router.get("/health", include_in_schema=False, dependencies=OPEN)
@router.get("/readyz", responses=problems(503), dependencies=OPEN)
async def readyz(services: ServicesDep) -> dict[str, Any]:
    """Is a verified version loaded? The buffer is only reported: without it answers go on."""
    engine = services.lines.first.engine
    if not engine.ready():
        raise ServiceError("not_ready")
    return {
        "status": "ready",
        "serving": version_name(engine.serving),
        "buffer": {"connected": await _buffer_connected(services)},
    }


async def _buffer_connected(services: Services) -> bool:
    try:
        async with asyncio.timeout(BUFFER_STATUS_TIMEOUT_S):
            return (await services.lines.first.buffer.status()).connected
    except TimeoutError:
        return False


@router.get("/info", responses=problems(401))
async def info(services: ServicesDep, caller: UserDep) -> Info:
    """What is running, which adapter answers the caller, and what is accepted."""
    settings = services.settings
    line = await services.lines.find(caller.adapter or services.lines.first.name)
    engine = line.engine
    return Info(
        version=servetune.__version__,
        model=engine.model_name,
        base_digest=engine.base_digest,
        adapter=line.name,
        serving=version_name(engine.serving),
        engine="transformers",
        device=engine.device,
        dtype=engine.dtype,
        limits={
            "max_body_bytes": settings.max_body_bytes,
            "max_image_pixels": settings.max_image_pixels,
            "max_image_side": settings.max_image_side,
            "decode_side": settings.decode_side,
            "max_images": MAX_IMAGES,
            "queue_size": settings.queue_size,
        },
    )


@router.get("/version", responses=problems(401), dependencies=USER)
async def version() -> dict[str, str]:
    """The version of servetune."""
    return {"version": servetune.__version__}


@router.get("/openapi.json", include_in_schema=False, dependencies=USER)
async def openapi(request: Request) -> JSONResponse:
    """The OpenAPI document of this app."""
    return JSONResponse(request.app.openapi())


@router.get("/docs", include_in_schema=False, dependencies=USER)
async def docs() -> HTMLResponse:
    """The OpenAPI document, made clickable."""
    return get_swagger_ui_html(openapi_url="/openapi.json", title="servetune")
