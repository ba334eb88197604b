"""What the methods of `client.adapters` and `client.adaptation` do, written once; all with the admin key."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from pydantic import BaseModel

from servetune.clients.exports import check_free, pack, unpack
from servetune.clients.images import encode
from servetune.clients.replies import nothing, reads, reads_rows
from servetune.clients.session import Call, Rows, Session, Steps, Work
from servetune.clients.types import (
    AdaptationStatus,
    AdapterInfo,
    AdapterSettings,
    AuditEntry,
    Erased,
    Mode,
    ProbeSetInfo,
    VersionInfo,
)

M = TypeVar("M", bound=BaseModel)


# --- adapters ----------------------------------------------------------------------------------------


def list_adapters(session: Session) -> Steps[list[AdapterInfo]]:
    """All adapters of the server. Raises APIError."""
    found: list[AdapterInfo] = []
    cursor: str | None = None
    while True:
        page = yield from session.send(_listing("/v1/adapters", AdapterInfo, cursor))
        found += page.items
        cursor = page.next_cursor
        if cursor is None:
            return found


def create(session: Session, name: str, *, idempotency_key: str | None = None) -> Steps[AdapterInfo]:
    """Make an adapter, which answers as the base until it learns. Raises ConflictError, APIError."""
    return session.send(_post("/v1/adapters", AdapterInfo, {"name": name}, idempotency_key))


def get_adapter(session: Session, name: str = "default") -> Steps[AdapterInfo]:
    """An adapter: its aliases, what it wants to serve and what it serves. Raises APIError."""
    return session.send(Call("GET", _route(name), reads(AdapterInfo), admin=True))


def settings(session: Session, name: str = "default") -> Steps[AdapterSettings]:
    """How an adapter behaves: mode, canary share and labels. Raises APIError."""
    return session.send(Call("GET", _route(name, "settings"), reads(AdapterSettings), admin=True))


def configure(
    session: Session,
    name: str = "default",
    *,
    mode: Mode | None = None,
    canary_share: float | None = None,
    labels: Sequence[str] | None = None,
) -> Steps[AdapterSettings]:
    """Change how an adapter behaves; what is not given stays, and no labels at all are `[]`. Raises APIError."""
    body = {"mode": mode, "canary_share": canary_share, "labels": None if labels is None else list(labels)}
    route = _route(name, "settings")
    return session.send(Call("PATCH", route, reads(AdapterSettings), body=lambda: body, admin=True))


def probe_sets(session: Session, name: str = "default") -> Steps[list[ProbeSetInfo]]:
    """The labelled probe sets of an adapter, newest first. Raises APIError."""
    page = yield from session.send(_listing(_route(name, "probes"), ProbeSetInfo, None))
    return page.items


def upload_probes(
    session: Session,
    probes: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    name: str = "default",
    *,
    resize: bool = True,
    idempotency_key: str | None = None,
) -> Steps[ProbeSetInfo]:
    """Give the gate labelled questions to judge by; they are never learned from.

    probes: up to 500 dicts with `image`, `answer`, and `question` or `candidate_labels`, or a JSONL file of them,
    where images are paths from the file's folder. Raises ImageError, ValueError where the file cannot be read as
    that, and APIError.
    """

    def body() -> Mapping[str, Any]:
        return {
            "probes": [{**probe, "image": encode(probe["image"], resize=resize)} for probe in read_probes(probes)]
        }

    return session.send(
        Call(
            "POST",
            _route(name, "probes"),
            reads(ProbeSetInfo),
            body=body,
            admin=True,
            idempotency_key=idempotency_key,
        )
    )


def remove_probes(
    session: Session, version: str, name: str = "default", *, idempotency_key: str | None = None
) -> Steps[list[ProbeSetInfo]]:
    """Erase a probe set ("p0001"); gives those that are left. Raises NotFoundError, APIError."""
    route = _route(name, "probes", version, "remove")
    call = Call("POST", route, reads_rows(ProbeSetInfo), body=dict, admin=True, idempotency_key=idempotency_key)
    page = yield from session.send(call)
    return page.items


def versions(
    session: Session, cursor: str | None, name: str = "default", *, page_size: int | None = None
) -> Steps[Rows[VersionInfo]]:
    """Iterate over all versions of an adapter, fetching pages as they are needed. Raises APIError."""
    return session.send(_listing(_route(name, "versions"), VersionInfo, cursor, page_size))


def get_version(session: Session, version: str | int, name: str = "default") -> Steps[VersionInfo]:
    """A version by number or name: 7 or "v0007". Raises AdapterNotFoundError, APIError."""
    path = _route(name, "versions", version_name(version))
    return session.send(Call("GET", path, reads(VersionInfo), admin=True))


def snapshot(
    session: Session,
    label: str,
    metadata: Mapping[str, str] | None = None,
    name: str = "default",
    *,
    idempotency_key: str | None = None,
) -> Steps[VersionInfo]:
    """Keep what is live as a version of its own, under the alias `label`. Raises APIError."""
    body = {"label": label, "metadata": dict(metadata or {})}
    return session.send(_post(_route(name, "snapshot"), VersionInfo, body, idempotency_key))


def promote(
    session: Session, version: str | int, name: str = "default", *, idempotency_key: str | None = None
) -> Steps[AdapterInfo]:
    """Make an existing version (7, "v0007" or an alias) live. Raises AdapterNotFoundError, APIError."""
    body = {"version": version_name(version)}
    return session.send(_post(_route(name, "promote"), AdapterInfo, body, idempotency_key))


def rollback(
    session: Session,
    to: str | int | None = None,
    name: str = "default",
    *,
    idempotency_key: str | None = None,
) -> Steps[AdapterInfo]:
    """Move live back to `to`, by default to the last good version. Raises APIError."""
    body = {"to": None if to is None else version_name(to)}
    return session.send(_post(_route(name, "rollback"), AdapterInfo, body, idempotency_key))


def pin(
    session: Session, version: str | int, name: str = "default", *, idempotency_key: str | None = None
) -> Steps[VersionInfo]:
    """Keep the weights of a version from retention. Raises ConflictError where they are gone, APIError."""
    return session.send(
        _post(_route(name, "versions", version_name(version), "pin"), VersionInfo, {}, idempotency_key)
    )


def unpin(
    session: Session, version: str | int, name: str = "default", *, idempotency_key: str | None = None
) -> Steps[VersionInfo]:
    """Leave the weights of a version to retention again. Raises AdapterNotFoundError, APIError."""
    return session.send(
        _post(_route(name, "versions", version_name(version), "unpin"), VersionInfo, {}, idempotency_key)
    )


def reset(
    session: Session,
    to: str | int = "base",
    purge_buffer: bool = False,
    name: str = "default",
    *,
    idempotency_key: str | None = None,
) -> Steps[VersionInfo]:
    """Publish the weights of `to` as a new version, made live; `base` unlearns everything.

    purge_buffer: also delete the queries that wait to be learned from. Raises APIError.
    """
    body = {"to": version_name(to), "purge_buffer": purge_buffer}
    return session.send(_post(_route(name, "reset"), VersionInfo, body, idempotency_key))


def export(
    session: Session, version: str | int, path: str | os.PathLike[str], name: str = "default"
) -> Steps[Path]:
    """Download a version as a directory that PEFT and vLLM load; gives the path back.

    Raises FileExistsError where `path` is neither missing nor an empty folder, and APIError.
    """
    target = Path(path)
    check_free(target)
    with tempfile.TemporaryFile() as archive:
        route = _route(name, "versions", version_name(version), "export")
        yield from session.send(Call("GET", route, nothing, admin=True, sink=archive))
        yield Work(partial(unpack, archive, target))
    return target


def import_adapter(
    session: Session,
    path: str | os.PathLike[str],
    name: str = "default",
    *,
    promote: bool = False,
    idempotency_key: str | None = None,
) -> Steps[VersionInfo]:
    """Publish an adapter from elsewhere as a version: a directory that PEFT or `export` made, or a tar of one.

    promote: also make it live. Raises FileNotFoundError where there is no adapter, UnprocessableEntityError where
    it does not fit the server's model, and APIError.
    """
    return session.send(
        Call(
            "POST",
            _route(name, "import"),
            reads(VersionInfo),
            query={"promote": "true" if promote else None},
            admin=True,
            idempotency_key=idempotency_key,
            tar=partial(pack, Path(path)),
        )
    )


# --- adaptation --------------------------------------------------------------------------------------


def status(session: Session, name: str | None = None) -> Steps[AdaptationStatus]:
    """Is it learning, from what, and how far is serving behind? Raises APIError."""
    query = {"adapter": name}
    return session.send(Call("GET", "/v1/adaptation", reads(AdaptationStatus), query=query, admin=True))


def pause(
    session: Session, name: str | None = None, *, idempotency_key: str | None = None
) -> Steps[AdaptationStatus]:
    """Stop learning; answering goes on. Raises APIError."""
    return session.send(_post("/v1/adaptation/pause", AdaptationStatus, {}, idempotency_key, name))


def resume(
    session: Session, name: str | None = None, *, idempotency_key: str | None = None
) -> Steps[AdaptationStatus]:
    """Learn again. Raises APIError."""
    return session.send(_post("/v1/adaptation/resume", AdaptationStatus, {}, idempotency_key, name))


def erase(
    session: Session, query_ids: Sequence[str], name: str | None = None, *, idempotency_key: str | None = None
) -> Steps[Erased]:
    """Erase queries of an adapter wherever they are, with the versions that learned from them. Raises APIError."""
    body = {"query_ids": list(query_ids)}
    return session.send(_post("/v1/adaptation/erase", Erased, body, idempotency_key, name))


def audit(session: Session, cursor: str | None, *, page_size: int | None = None) -> Steps[Rows[AuditEntry]]:
    """Iterate over all administrative acts, fetching pages as they are needed. Raises APIError."""
    return session.send(_listing("/v1/audit", AuditEntry, cursor, page_size))


def read_probes(probes: str | os.PathLike[str] | Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The probes of a JSONL file, with the paths of their images, or those that are given. Raises ValueError."""
    if not isinstance(probes, str | os.PathLike):
        return list(probes)
    file = Path(probes)
    found: list[Mapping[str, Any]] = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            probe = json.loads(line)
            found.append({**probe, "image": file.parent / probe["image"]})
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file}, line {number}: give a JSON object with an image and an answer") from None
    return found


# --- parts -------------------------------------------------------------------------------------------


def version_name(version: str | int) -> str:
    """7 -> "v0007"; a str is a name already."""
    return f"v{version:04d}" if isinstance(version, int) else version


def _post(
    path: str, model: type[M], body: Mapping[str, Any], idempotency_key: str | None, adapter: str | None = None
) -> Call[M]:
    about = {"adapter": adapter}
    return Call(
        "POST", path, reads(model), query=about, body=lambda: body, admin=True, idempotency_key=idempotency_key
    )


def _listing(path: str, model: type[M], cursor: str | None, limit: int | None = None) -> Call[Rows[M]]:
    query = {"cursor": cursor, "limit": limit}
    return Call("GET", path, reads_rows(model), query=query, admin=True)


def _route(name: str, *rest: str) -> str:
    return "/".join(["/v1/adapters", *(quote(part, safe="") for part in (name, *rest))])
