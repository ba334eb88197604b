"""Wiring: everything is made elsewhere and passed in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.types import Scope

import servetune
from servetune.server import admin, chat, live, review, routes, tracing
from servetune.server.access import Access, Require
from servetune.server.audit import AuditLog
from servetune.server.buffer import QueryBuffer
from servetune.server.cipher import Cipher, load_key
from servetune.server.comparison import Comparison
from servetune.server.description import complete
from servetune.server.errors import ServiceError, as_service_error, problem
from servetune.server.history import History
from servetune.server.idempotency import Idempotency
from servetune.server.lines import Lines
from servetune.server.measuring import Measured, MeasuredAnswers, MeasuredImages
from servetune.server.metrics import Metrics
from servetune.server.middleware import BodyCap, Boundary, LocalOnly
from servetune.server.quota import Quota
from servetune.server.receipts import Receipts
from servetune.server.service import Services
from servetune.server.settings import Settings
from servetune.server.tracing import Traced
from servetune.server.watch import Watches
from servetune.server.webhook import Messenger, Webhook

log = structlog.get_logger(__name__)


class UndeclaredScope(RuntimeError):
    """A route does not say who may use it."""


def create_app(
    settings: Settings,
    lines: Lines,
    access: Access,
    audit: AuditLog,
    history: History,
) -> FastAPI:
    """The HTTP application. Its lifespan starts and stops the adapters, and closes the history.

    Raises:
        UndeclaredScope: some route declares no scope; nothing is served by accident.
    """
    metrics = Metrics()
    receipts = Receipts(Cipher(load_key(settings)))
    answers = MeasuredAnswers(metrics, settings, lines, MeasuredImages(metrics, settings), receipts)
    app = FastAPI(
        title="servetune",
        version=servetune.__version__,
        description="Answers questions about images, and learns from the questions.",
        middleware=_middleware(settings, access, metrics),
        lifespan=_lifespan,
        exception_handlers={HTTPException: _render, RequestValidationError: _render},
        openapi_url=None,  # served by our own routes, behind the same keys as the rest
    )
    quota = Quota(settings.requests_per_minute)
    comparison = Comparison(settings.max_answer_tokens)
    app.state.services = Services(
        settings, lines, access, audit, answers, quota, history, metrics, receipts, comparison
    )
    app.state.watches = Watches(app.state.services)
    app.include_router(routes.router)
    app.include_router(live.router)
    app.include_router(chat.router)
    app.include_router(review.router)
    if access.has_admin_key:
        app.include_router(admin.router)
        app.include_router(review.admin_router)
    for path, scopes in declared_scopes(app):
        if len(scopes) != 1:
            raise UndeclaredScope(f"{path} declares {sorted(scopes) or 'no scope'}")
    _describe(app, access)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    services.answers.start()
    lines = services.lines
    await lines.start()
    own_redis = services.settings.redis_url is None
    buffers = partial(_buffers, lines)
    compacting = asyncio.create_task(lines.first.buffer.keep_compact(buffers)) if own_redis else None
    if messenger := _messenger(services):
        await messenger.begin()
    await _tell_of_foreign(services)
    telling = asyncio.create_task(messenger.run()) if messenger else None
    yield
    if telling:
        telling.cancel()
        await asyncio.wait({telling})  # it lets another replica send
    if compacting:
        compacting.cancel()
    await services.answers.drain()
    await services.history.close()
    await lines.stop()


async def _tell_of_foreign(services: Services) -> None:
    """Adapters that were made for another base are not served; somebody should know."""
    if foreign := await services.lines.foreign():
        log.warning("adapters_of_another_base", adapters=foreign, advice="servetune adapters rebase NAME")
        services.history.record(services.lines.first.name, "base_mismatch", {"adapters": foreign})


def _messenger(services: Services) -> Messenger | None:
    webhook = Webhook.from_settings(services.settings)
    if webhook is None:
        return None
    return Messenger(services.history, webhook, services.lines.names, services.metrics)


def _buffers(lines: Lines) -> list[QueryBuffer]:
    return [line.buffer for line in lines.in_use()]


def _middleware(settings: Settings, access: Access, metrics: Metrics) -> list[Middleware]:
    """Outermost first."""
    hosts = {"localhost", "127.0.0.1", "::1", settings.host.strip("[]").lower()}
    return [
        *([Middleware(Traced)] if tracing.is_on() else []),
        Middleware(Boundary),
        Middleware(Measured, metrics=metrics),
        *([] if access.has_user_keys else [Middleware(LocalOnly, hosts=hosts)]),
        Middleware(BodyCap, limit=settings.max_body_bytes, file_limit=partial(_file_limit, settings, access)),
        Middleware(Idempotency),
    ]


def _file_limit(settings: Settings, access: Access, scope: Scope) -> int | None:
    """How large the file of a request may be; None where it brings none, or its sender may not send one."""
    if not admin.TAKES_FILE.fullmatch(scope["path"]):
        return None
    try:
        access.authorize(Headers(scope=scope).get("authorization"), "admin")
    except ServiceError:  # the route refuses it too, and by then has not read much
        return None
    return settings.max_import_bytes


async def _render(request: Request, error: Exception) -> Response:
    return problem(as_service_error(error), request.scope)


def declared_scopes(app: FastAPI) -> list[tuple[str, set[str]]]:
    """Every route's path, and what scopes it declares."""
    found = []
    for route in iter_route_contexts(app.routes):
        dependant = getattr(route, "dependant", None)
        found.append((str(route.path), _scopes(dependant) if dependant else set()))
    return found


def _scopes(dependant: Any) -> set[str]:
    scopes = {dependant.call.scope} if isinstance(dependant.call, Require) else set()
    return scopes.union(*(_scopes(inner) for inner in dependant.dependencies))


def _describe(app: FastAPI, access: Access) -> None:
    """Complete the OpenAPI document when it is first asked for."""
    generate = app.openapi
    needing = {"user", "admin"} if access.has_user_keys else {"admin"}

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            keyed = {path.replace(":path}", "}") for path, scopes in declared_scopes(app) if scopes & needing}
            complete(generate(), keyed)
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]
