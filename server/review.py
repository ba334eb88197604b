"""Is it helping? Feedback of those who asked, and comparisons by an operator. Handlers only translate."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query
from pydantic.json_schema import SkipJsonSchema

from servetune.adapters.versions import version_name
from servetune.clients.types import (
    AdapterChoice,
    Feedback,
    FeedbackRequest,
    JudgeRequest,
    NextPair,
    QueryId,
    Review,
    VersionDiff,
)
from servetune.server.admin import ADMIN, NamedDep, OperatorDep
from servetune.server.comparison import Comparison, Versions
from servetune.server.description import problems
from servetune.server.errors import ServiceError
from servetune.server.lines import Line
from servetune.server.routes import ServicesDep, UserDep

FEEDBACK_S = 30 * 86_400.0  # an answer takes feedback for so long
CHAT = "chatcmpl-"  # before the ids of answers that are given as completions

Absent = SkipJsonSchema[None]

router = APIRouter()
admin_router = APIRouter(
    prefix="/v1/adapters/{name}",
    tags=["admin"],
    dependencies=[ADMIN],
    responses=problems(401, 404, 409, 422, 503),
)


@router.post("/v1/answers/{id}/feedback", responses=problems(401, 404, 409, 422, 503))
async def feedback(
    id: Annotated[str, Path(max_length=128)], body: FeedbackRequest, services: ServicesDep, caller: UserDep
) -> Feedback:
    """Say whether an answer was right, or what the right one is; the last word on each answer counts.

    It is counted by version, and not learned from. Only whoever asked may.
    """
    own = [caller.adapter] if caller.adapter else await services.lines.names()
    receipt = services.receipts.read(id.removeprefix(CHAT), caller.id, own)
    left_s = receipt.created + FEEDBACK_S - time.time() if receipt else 0.0
    if receipt is None or left_s <= 0:
        raise ServiceError("answer_not_found", "This server gave you no such answer in the last 30 days.")
    is_correct = body.correct
    if is_correct is None:
        is_correct = services.receipts.is_answer(receipt, body.answer or "")
    version = version_name(receipt.version)
    line = await services.lines.find(receipt.adapter)
    await line.buffer.say(receipt.id, version, is_correct, left_s)
    return Feedback(id=id, adapter=line.name, version=version, correct=is_correct)


async def _comparison(services: ServicesDep) -> Comparison:
    return services.comparison


async def _versions(line: NamedDep, old: AdapterChoice = "base", new: AdapterChoice = "live") -> Versions:
    """The versions to compare, by number or alias."""
    return await _resolved(line, old, new)


async def _resolved(line: Line, old: str, new: str) -> Versions:
    """Two versions by name. Raises UnknownVersion, and ServiceError `invalid_request` where they are one."""
    resolve = line.store.resolve
    versions = await asyncio.to_thread(lambda: Versions(resolve(old), resolve(new)))
    if versions.old == versions.new:
        name = version_name(versions.old)
        raise ServiceError("invalid_request", f"'old' and 'new' are both {name}: name two versions.", param="new")
    return versions


ComparisonDep = Annotated[Comparison, Depends(_comparison)]
VersionsDep = Annotated[Versions, Depends(_versions)]


@admin_router.get("/review")
async def review(line: NamedDep, versions: VersionsDep, comparison: ComparisonDep) -> Review:
    """Which of two versions is better, by what was compared and judged so far."""
    return await comparison.review(line, versions)


@admin_router.get("/review/pair")
async def next_pair(
    line: NamedDep,
    versions: VersionsDep,
    comparison: ComparisonDep,
    operator: OperatorDep,
    skip: Annotated[QueryId | Absent, Query(description="the pair that is being judged")] = None,
) -> NextPair:
    """A kept query that two versions answer differently, to be judged without knowing which said what."""
    found = await comparison.next_pair(line, versions, skip)
    if found.pair:
        await operator.record(line.name, "queries_shown", {"num": 1})
    return found


@admin_router.post("/review/judge")
async def judge(line: NamedDep, body: JudgeRequest, comparison: ComparisonDep) -> Review:
    """Say which answer of a pair is right."""
    versions = await _resolved(line, body.old, body.new)
    if not await comparison.judge(line, versions, body.id, body.choice):
        raise ServiceError("pair_not_found", "These versions have no such pair, or its query is kept no longer.")
    return await comparison.review(line, versions)


@admin_router.get("/diff")
async def diff(
    line: NamedDep,
    versions: VersionsDep,
    comparison: ComparisonDep,
    operator: OperatorDep,
    limit: Annotated[int, Query(ge=0, le=100, description="changed answers; 0 compares none")] = 20,
    after: Annotated[QueryId | Absent, Query(description="go on with older queries than this one")] = None,
    images: Annotated[bool, Query(description="with small images")] = False,
) -> VersionDiff:
    """What two versions differ in: manifests, numbers, and the answers to kept queries."""
    found = await comparison.diff(line, versions, limit, after, images)
    if found.answers:
        await operator.record(line.name, "queries_shown", {"num": len(found.answers)})
    return found
