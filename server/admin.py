"""The operator's routes: versions, aliases, learning. Mounted only when an admin key exists.

Every act runs in a thread (the store syncs to disk), is audited whether done or refused, and is followed by a
refresh of the engine, so that the reply is true for this process.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Header, Request
from fastapi import Query as QueryField
from fastapi.responses import StreamingResponse
from pydantic import Field, StringConstraints
from pydantic.json_schema import SkipJsonSchema

from servetune.adapters.conduct import Conduct
from servetune.adapters.parcel import unpack
from servetune.adapters.store import AdapterStore
from servetune.adapters.types import BASE, Probe, Query
from servetune.adapters.versions import Alias, Manifest, StoreError, version_name
from servetune.clients.types import (
    AdaptationStatus,
    AdapterChoice,
    AdapterInfo,
    AdapterSettings,
    AuditEntry,
    CreateRequest,
    Erased,
    EraseRequest,
    Page,
    ProbeSetInfo,
    PromoteRequest,
    ResetRequest,
    RollbackRequest,
    SettingsRequest,
    SnapshotRequest,
    VersionInfo,
)
from servetune.server.access import Principal, Require
from servetune.server.bodies import parse_probes
from servetune.server.description import PROBES_BODY, problems
from servetune.server.engine import Engine
from servetune.server.errors import ServiceError, as_service_error
from servetune.server.history import act_event
from servetune.server.lines import Line
from servetune.server.probes import ProbeSet, ProbeSets, UnknownProbes, probes_name
from servetune.server.routes import ServicesDep
from servetune.server.service import Services

MOST_PROBED = 100_000_000  # pixels of a probe set: gate and server have all of its images in memory
PROBES_TOO_LARGE = (
    f"The images of a set have {MOST_PROBED // 10**6} megapixels at most together: send smaller ones."
)

T = TypeVar("T")
ADMIN = Depends(Require("admin"))

router = APIRouter(
    prefix="/v1",
    tags=["admin"],
    dependencies=[ADMIN],
    responses=problems(401, 404, 409, 422, 503),
)


class Tar(StreamingResponse):
    """Files, one after another."""

    media_type = "application/x-tar"


TAKES_FILE = re.compile(r"/v1/adapters/[^/]+/(import|probes)")
"""Paths of the routes whose bodies are files."""
TAR: dict[str, Any] = {"content": {Tar.media_type: {"schema": {"type": "string", "format": "binary"}}}}

TAR_BODY: dict[str, Any] = {"requestBody": {"required": True, **TAR}}


@dataclass(frozen=True, slots=True)
class Operator:
    """One administrator's request: does what is asked, and puts it on record."""

    name: str
    request_id: str
    services: Services

    async def act(self, line: Line, event: str, details: dict[str, Any], change: Awaitable[T]) -> T:
        """Make a change to an adapter, audit how it went, then serve what its `live` names now.

        Raises what `change` raises.
        """
        try:
            result = await change
        except Exception as error:
            await self.record(line.name, event, {**details, "refused": as_service_error(error).code})
            raise
        made = {"made": version_name(result.version)} if isinstance(result, Manifest) else {}
        await self.record(line.name, event, {**details, **made})
        if told := act_event(event, details, result):
            self.services.history.record(line.name, *told)
        await line.engine.refresh()
        return result

    async def record(self, adapter: str, event: str, details: dict[str, Any]) -> None:
        """Put on record what was done to an adapter."""
        details = {"adapter": adapter, **details}
        await asyncio.to_thread(self.services.audit.append, event, self.name, self.request_id, details)


Absent = SkipJsonSchema[None]  # what may be left out of an address or a head; it cannot be sent as null
Limit = Annotated[int, QueryField(ge=1, le=200)]
ProbesName = Annotated[str, StringConstraints(pattern=r"^p[0-9]{4,9}$")]
Generation = Annotated[str, StringConstraints(pattern=r'^"?[0-9]{1,18}"?$')]


async def _named(name: str, services: ServicesDep) -> Line:
    """The adapter in the path. Raises ServiceError `adapter_not_found`."""
    return await services.lines.find(name)


async def _meant(
    services: ServicesDep,
    adapter: Annotated[
        AdapterChoice | Absent, QueryField(description="by default the one that the server names")
    ] = None,
) -> Line:
    """The adapter that a request is about. Raises ServiceError `adapter_not_found`."""
    return await services.lines.find(adapter or services.lines.first.name)


async def _operator(request: Request, caller: Annotated[Principal, ADMIN], services: ServicesDep) -> Operator:
    return Operator(caller.id, request.state.request_id, services)


NamedDep = Annotated[Line, Depends(_named)]
MeantDep = Annotated[Line, Depends(_meant)]
OperatorDep = Annotated[Operator, Depends(_operator)]


# --- reading -----------------------------------------------------------------------------------------


@router.get("/adapters")
async def list_adapters(
    services: ServicesDep, cursor: AdapterChoice | Absent = None, limit: Limit = 50
) -> Page[AdapterInfo]:
    """The adapters of this server by name; `cursor` is the last one already seen."""
    names = [name for name in await services.lines.names() if cursor is None or name > cursor]
    page = [await asyncio.to_thread(_adapter_info, *services.lines.look(name)) for name in names[:limit]]
    return Page(data=page, next_cursor=names[limit - 1] if len(names) > limit else None)


@router.post("/adapters", status_code=201)
async def create_adapter(body: CreateRequest, services: ServicesDep, operator: OperatorDep) -> AdapterInfo:
    """A new adapter, which answers as the base does until it has learned from questions of its own."""
    try:
        line = await services.lines.create(body.name)
    except StoreError as error:
        await operator.record(body.name, "adapter_created", {"refused": as_service_error(error).code})
        raise
    await operator.record(body.name, "adapter_created", {})
    return await _info(line)


@router.get("/adapters/{name}")
async def get_adapter(line: NamedDep) -> AdapterInfo:
    """Its aliases, the version wanted live and the one this process serves."""
    return await _info(line)


@router.get("/adapters/{name}/settings")
async def get_settings(line: NamedDep) -> AdapterSettings:
    """How it behaves: its mode, the share that a candidate answers, and the labels of recognition."""
    return _settings(await asyncio.to_thread(line.store.conduct))


@router.patch("/adapters/{name}/settings")
async def change_settings(line: NamedDep, body: SettingsRequest, operator: OperatorDep) -> AdapterSettings:
    """Change how it behaves. Every server follows within seconds, and the worker with its next step."""
    changes = body.model_dump(exclude_none=True)
    told = {**changes, **({"labels": len(changes["labels"])} if "labels" in changes else {})}
    if "labels" in changes:
        changes["labels"] = tuple(changes["labels"])
    change = asyncio.to_thread(lambda: line.store.change(**changes))
    return _settings(await operator.act(line, "adapter_settings", told, change))


@router.get("/adapters/{name}/probes")
async def list_probes(line: NamedDep, services: ServicesDep) -> Page[ProbeSetInfo]:
    """Its labelled probe sets, newest first; the newest is what the gate judges by."""
    sets = ProbeSets(line.store.folder, services.settings)
    found = await asyncio.to_thread(sets.all)
    return Page(data=[_probe_set(each, found[0].version) for each in found])


@router.post(
    "/adapters/{name}/probes", status_code=201, openapi_extra=PROBES_BODY, responses=problems(413, 415, 422)
)
async def upload_probes(
    line: NamedDep, request: Request, services: ServicesDep, operator: OperatorDep
) -> ProbeSetInfo:
    """Labelled questions for the gate alone, sealed as stored queries are; they are never learned from."""
    asked = await asyncio.to_thread(parse_probes, request.headers, await request.body())
    probes: list[Probe] = []
    num_pixels = 0
    for number, item in enumerate(asked.probes):
        question = item.question or line.engine.recognition_question
        try:
            images = await services.answers.read([item.image])
            num_pixels += sum(image.width * image.height for image in images)
            if num_pixels > MOST_PROBED:
                raise ServiceError("image_too_large", PROBES_TOO_LARGE)
            query = Query("probe", images, question, tuple(item.candidate_labels or ()))
            await line.engine.try_on(query)
        except Exception as error:
            refusal = as_service_error(error)
            refusal.param = f"probes.{number}"
            raise refusal from error
        probes.append(Probe(query, item.answer))
    sets = ProbeSets(line.store.folder, services.settings)
    change = asyncio.to_thread(sets.upload, probes)
    made = await operator.act(line, "probes_uploaded", {"num_probes": len(probes)}, change)
    return _probe_set(made, made.version)


@router.post("/adapters/{name}/probes/{version}/remove")
async def remove_probes(
    line: NamedDep, version: ProbesName, services: ServicesDep, operator: OperatorDep
) -> Page[ProbeSetInfo]:
    """Erase a probe set; the newest that is left counts."""
    sets = ProbeSets(line.store.folder, services.settings)

    async def change() -> None:
        try:
            await asyncio.to_thread(sets.remove, int(version[1:]))
        except UnknownProbes:
            raise ServiceError("probes_not_found") from None

    await operator.act(line, "probes_removed", {"probes": version}, change())
    return await list_probes(line, services)


@router.get("/adapters/{name}/versions")
async def list_versions(
    line: NamedDep, cursor: AdapterChoice | Absent = None, limit: Limit = 50
) -> Page[VersionInfo]:
    """Its versions, newest first; `cursor` is the last version already seen."""
    return await asyncio.to_thread(_version_page, line.store, cursor, limit)


@router.get("/adapters/{name}/versions/{version}")
async def get_version(line: NamedDep, version: AdapterChoice) -> VersionInfo:
    """One version, by number or alias."""
    store = line.store
    return await asyncio.to_thread(lambda: _version_info(store, store.manifest(store.resolve(version))))


@router.get("/adapters/{name}/versions/{version}/export", response_class=Tar, responses={200: TAR})
async def export(line: NamedDep, version: AdapterChoice, operator: OperatorDep) -> Tar:
    """The PEFT directory of a version, as a tar."""
    number = await asyncio.to_thread(line.store.resolve, version)
    pieces = line.store.export(number)
    reading = asyncio.to_thread(next, pieces)
    first = await operator.act(line, "adapter_exported", {"version": version_name(number)}, reading)

    def tar() -> Any:
        yield first  # read before the answer began, so that a damaged version is still a problem document
        yield from pieces

    name = f"{line.name}-{version_name(number)}.tar"
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Tar(tar(), headers=headers)


@router.get("/adaptation")
async def get_adaptation(line: MeantDep) -> AdaptationStatus:
    """Is it learning, from what, and how far is serving behind?"""
    return await adaptation_status(line)


@router.get("/audit")
async def read_audit(
    services: ServicesDep, cursor: Annotated[int, Field(ge=0)] | Absent = None, limit: Limit = 50
) -> Page[AuditEntry]:
    """Administrative acts, newest first."""
    entries, following = await asyncio.to_thread(services.audit.page, cursor, limit)
    return Page(data=entries, next_cursor=None if following is None else str(following))


# --- acting ------------------------------------------------------------------------------------------


@router.post("/adapters/{name}/snapshot", status_code=201)
async def snapshot(line: NamedDep, body: SnapshotRequest, operator: OperatorDep) -> VersionInfo:
    """Keep the live weights as a version of its own, under the alias `label`."""
    change = asyncio.to_thread(line.store.snapshot, body.label, dict(body.metadata))
    return _version_info(line.store, await operator.act(line, "adapter_snapshot", {"label": body.label}, change))


@router.post("/adapters/{name}/promote")
async def promote(
    line: NamedDep,
    body: PromoteRequest,
    operator: OperatorDep,
    if_match: Annotated[Generation | Absent, Header()] = None,
) -> AdapterInfo:
    """Make a version live. With `If-Match`, only while the adapter's `generation` is the one given."""
    expected = None if if_match is None else int(if_match.strip('"'))
    store = line.store
    change = asyncio.to_thread(lambda: store.promote(store.resolve(body.version), expected))
    await operator.act(line, "adapter_promoted", {"version": body.version}, change)
    return await _info(line)


@router.post("/adapters/{name}/rollback")
async def rollback(line: NamedDep, body: RollbackRequest, operator: OperatorDep) -> AdapterInfo:
    """Move `live` back to a version, by default to `last-good`."""
    store, to = line.store, body.to or "last-good"
    change = asyncio.to_thread(lambda: store.rollback(store.resolve(to)))
    await operator.act(line, "adapter_rolled_back", {"to": to}, change)
    return await _info(line)


@router.post("/adapters/{name}/reset")
async def reset(line: NamedDep, body: ResetRequest, operator: OperatorDep) -> VersionInfo:
    """Publish the weights of `to` as a new version and make it live; `base` unlearns everything."""
    store, buffer = line.store, line.buffer

    async def change() -> Manifest:
        if body.purge_buffer and not (await buffer.status()).connected:
            raise ServiceError("buffer_unavailable")  # before anything moves: the caller will try again
        return await asyncio.to_thread(lambda: store.reset(store.resolve(body.to)))

    made = await operator.act(line, "adapter_reset", body.model_dump(), change())
    if body.purge_buffer:  # after the reset: what is learned meanwhile is no longer wanted
        await operator.act(line, "buffer_purged", {}, buffer.purge())
    return _version_info(store, made)


@router.post("/adapters/{name}/import", status_code=201, openapi_extra=TAR_BODY, responses=problems(413, 415, 422))
async def import_adapter(
    line: NamedDep, request: Request, operator: OperatorDep, promote: bool = False
) -> VersionInfo:
    """Publish an adapter from elsewhere as a version of its own: a tar of a PEFT directory, such as an export.

    It is checked and must answer the probe, and is not live until it is promoted, or with `promote`.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != Tar.media_type:
        raise ServiceError("unsupported_media_type", f"Send {Tar.media_type}: a tar of the adapter's directory.")
    archive, store = await request.body(), line.store

    async def change() -> Manifest:
        draft = await line.engine.examine(await asyncio.to_thread(unpack, archive))
        return await asyncio.to_thread(store.publish, draft)

    made = await operator.act(line, "adapter_imported", {"bytes": len(archive)}, change())
    if promote:
        moving = asyncio.to_thread(store.promote, made.version)
        await operator.act(line, "adapter_promoted", {"version": version_name(made.version)}, moving)
    return _version_info(store, made)


@router.post("/adapters/{name}/versions/{version}/pin")
async def pin(line: NamedDep, version: AdapterChoice, operator: OperatorDep) -> VersionInfo:
    """Keep the weights of a version, whatever retention would do with them."""
    return await _set_pinned(line, version, operator, "adapter_pinned", line.store.pin)


@router.post("/adapters/{name}/versions/{version}/unpin")
async def unpin(line: NamedDep, version: AdapterChoice, operator: OperatorDep) -> VersionInfo:
    """Leave the weights of a version to retention again."""
    return await _set_pinned(line, version, operator, "adapter_unpinned", line.store.unpin)


@router.post("/adaptation/pause")
async def pause(line: MeantDep, operator: OperatorDep) -> AdaptationStatus:
    """Stop learning; answering goes on."""
    return await _set_paused(line, operator, "adaptation_paused", True)


@router.post("/adaptation/resume")
async def resume(line: MeantDep, operator: OperatorDep) -> AdaptationStatus:
    """Learn again."""
    return await _set_paused(line, operator, "adaptation_resumed", False)


@router.post("/adaptation/erase")
async def erase(line: MeantDep, body: EraseRequest, operator: OperatorDep) -> Erased:
    """Erase queries wherever they are: in the buffer, in memory, and in versions that learned from them.

    Those versions are dropped with all that came from them; `live` goes back to the nearest one that stays.
    """
    buffer, engine = line.buffer, line.engine
    if not (await buffer.status()).connected:
        raise ServiceError("buffer_unavailable")  # before anything is gone: the caller will try again
    withdrawn = 0
    for query_id in body.query_ids:
        withdrawn += await buffer.withdraw(query_id)
    erasing = asyncio.to_thread(line.store.erase, body.query_ids)
    gone = await operator.act(line, "queries_erased", {"num": len(body.query_ids)}, erasing)
    await engine.forget(gone.dropped)
    await buffer.compact()
    return Erased(
        withdrawn=withdrawn,
        dropped=[version_name(number) for number in gone.dropped],
        live=version_name(gone.live.version),
        serving=version_name(engine.serving),
    )


async def _set_paused(line: Line, operator: Operator, event: str, paused: bool) -> AdaptationStatus:
    await operator.act(line, event, {}, asyncio.to_thread(line.store.set_paused, paused))
    return await adaptation_status(line)


async def _set_pinned(
    line: Line, version: str, operator: Operator, event: str, change: Callable[[int], Alias]
) -> VersionInfo:
    store = line.store
    setting = asyncio.to_thread(lambda: change(store.resolve(version)))
    set_to = await operator.act(line, event, {"version": version}, setting)
    return await asyncio.to_thread(lambda: _version_info(store, store.manifest(set_to.version)))


# --- store to wire -----------------------------------------------------------------------------------


def _probe_set(made: ProbeSet, active: int) -> ProbeSetInfo:
    return ProbeSetInfo(
        version=probes_name(made.version),
        created=made.created,
        num_probes=made.num_probes,
        active=made.version == active,
    )


def _settings(conduct: Conduct) -> AdapterSettings:
    return AdapterSettings(mode=conduct.mode, canary_share=conduct.canary_share, labels=list(conduct.labels))


async def _info(line: Line) -> AdapterInfo:
    return await asyncio.to_thread(_adapter_info, line.store, line.engine)


def _adapter_info(store: AdapterStore, engine: Engine | None) -> AdapterInfo:
    """Of an adapter without an engine, what it will serve when somebody asks it."""
    live, aliases, versions = store.live(), store.aliases(), store.versions()
    resident, leases = engine.residency() if engine else ([BASE], {})
    return AdapterInfo(
        name=store.name,
        aliases={alias: version_name(number) for alias, number in aliases.items()},
        live=version_name(live.version),
        serving=version_name(engine.serving if engine else live.version),
        generation=live.generation,
        num_versions=len(versions),
        resident=[version_name(number) for number in resident],
        leases={version_name(number): count for number, count in leases.items()},
        mode=store.conduct().mode,
    )


async def adaptation_status(line: Line) -> AdaptationStatus:
    """Is it learning, from what, and how far is serving behind?"""
    store, serving = line.store, line.engine.serving
    live, versions, paused, conduct = await asyncio.to_thread(
        lambda: (store.live(), store.versions(), store.paused, store.conduct())
    )
    low, high = sorted((serving, live.version))
    return AdaptationStatus(
        adapter=store.name,
        paused=paused,
        live=version_name(live.version),
        serving=version_name(serving),
        lag_versions=sum(low < number <= high for number in versions),
        buffer=await line.buffer.status(),
        worker=await line.buffer.read_worker(),
        mode=conduct.mode,
    )


def _version_page(store: AdapterStore, cursor: str | None, limit: int) -> Page[VersionInfo]:
    numbers = store.versions()[::-1]
    if cursor is not None:
        seen = store.resolve(cursor)
        numbers = [number for number in numbers if number < seen]
    page = numbers[:limit]
    following = version_name(page[-1]) if len(numbers) > limit else None
    return Page(data=[_version_info(store, store.manifest(number)) for number in page], next_cursor=following)


def _version_info(store: AdapterStore, made: Manifest) -> VersionInfo:
    return VersionInfo(
        version=version_name(made.version),
        servable=made.fit == store.manifest(BASE).fit,
        parent=None if made.parent is None else version_name(made.parent),
        created=made.created,
        origin=made.origin,
        label=made.label,
        digest=made.digest,
        base_digest=made.base_digest,
        rank=made.rank,
        target_modules=made.target_modules,
        step_range=made.step_range,
        num_queries=len(made.query_ids),
        temperature=made.temperature,
        metrics=made.metrics,
        gate=made.gate,
        metadata=made.metadata,
        pinned=made.version in store.pinned(),
        retired=made.version in store.retired(),
    )
