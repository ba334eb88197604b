"""What each method of the clients does, written once. See `drivers` for how the steps are walked."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import httpx2
from pydantic import BaseModel, ValidationError

from servetune.clients.errors import APIConnectionError, APIError, APITimeoutError, InternalServerError
from servetune.clients.exports import check_free, unpack
from servetune.clients.images import ImageSource, encode
from servetune.clients.session import Call, Pause, Rows, Session, Steps, Work
from servetune.clients.types import (
    AdaptationStatus,
    AdapterInfo,
    Answer,
    AuditEntry,
    Info,
    Page,
    VersionInfo,
)

M = TypeVar("M", bound=BaseModel)


# --- questions ---------------------------------------------------------------------------------------


def answer(
    session: Session,
    image: ImageSource | Sequence[ImageSource],
    question: str,
    *,
    n: int | None = None,
    temperature: float | None = None,
    max_tokens: int | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    adapter: str | None = None,
    adapt: bool = True,
    metadata: Mapping[str, str] | None = None,
    resize: bool = True,
    timeout: float | None = None,
    idempotency_key: str | None = None,
) -> Steps[Answer]:
    """Ask an open question about an image (or up to 8, as a list).

    n: answers to sample and vote over; needs a `temperature` above 0.
    adapter: `live` (the default), another alias, `base` or a version such as `v0007`.
    adapt: may the server keep this query, and learn from it?
    resize: shrink a picture of more than 2048 pixels a side before sending, where Pillow is installed.
    timeout: seconds to wait for the reply, each attempt anew.
    What is None is left to the server. Raises ImageError before anything is sent, and APIError.
    """
    fields = {
        "question": question,
        "n": n,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "top_k": top_k,
        "seed": seed,
        "adapter": adapter,
        "adapt": adapt,
        "metadata": metadata and dict(metadata),
    }
    return session.send(_ask(image, resize, fields, timeout, idempotency_key))


def recognize(
    session: Session,
    image: ImageSource | Sequence[ImageSource],
    labels: Sequence[str],
    *,
    question: str | None = None,
    top_k: int | None = None,
    adapter: str | None = None,
    adapt: bool = True,
    metadata: Mapping[str, str] | None = None,
    resize: bool = True,
    timeout: float | None = None,
    idempotency_key: str | None = None,
) -> Steps[Answer]:
    """Choose one of 2 to 1000 unique labels; `candidates` has the likeliest `top_k` with probabilities.

    question: asked instead of the server's default one. The other arguments are those of `answer`.
    Raises ImageError before anything is sent, and APIError.
    """
    if isinstance(labels, str):
        raise TypeError("labels must be a list of str, not one str")
    fields = {
        "candidate_labels": list(labels),
        "question": question,
        "top_k": top_k,
        "adapter": adapter,
        "adapt": adapt,
        "metadata": metadata and dict(metadata),
    }
    return session.send(_ask(image, resize, fields, timeout, idempotency_key))


def info(session: Session) -> Steps[Info]:
    """What is running: model, device, limits, version being served. Raises APIError."""
    return session.send(Call("GET", "/info", _reads(Info)))


def ready(session: Session) -> Steps[bool]:
    """Can the server answer now? False also where it cannot be reached; asks once, never retries."""
    try:
        yield from session.send(Call("GET", "/readyz", _nothing, max_retries=0))
    except (APIConnectionError, InternalServerError):
        return False
    return True


def wait_for_version(
    session: Session, minimum: str | int, timeout_s: float = 60.0, *, poll_s: float = 0.25
) -> Steps[str]:
    """Wait until answers come from version `minimum` (7 or "v0007") or a later one, and name it.

    Raises APITimeoutError after `timeout_s` seconds, ValueError where `minimum` is no version, APIError.
    """
    goal = _number(minimum)
    deadline = time.monotonic() + timeout_s
    while True:
        serving = yield from _serving(session)
        if _number(serving) >= goal:
            return serving
        if time.monotonic() >= deadline:
            raise APITimeoutError(f"still serving {serving}, not {_name(goal)}, after {timeout_s:g} s")
        yield Pause(poll_s)


# --- adapters ----------------------------------------------------------------------------------------


def list_adapters(session: Session) -> Steps[list[AdapterInfo]]:
    """All adapters of the server. Raises APIError."""
    found: list[AdapterInfo] = []
    cursor: str | None = None
    while True:
        page = yield from session.send(_page("/v1/adapters", AdapterInfo, cursor))
        found += page.items
        cursor = page.next_cursor
        if cursor is None:
            return found


def get_adapter(session: Session, name: str = "default") -> Steps[AdapterInfo]:
    """An adapter: its aliases, what it wants to serve and what it serves. Raises APIError."""
    return session.send(Call("GET", _path(name), _reads(AdapterInfo), admin=True))


def versions(
    session: Session, cursor: str | None, name: str = "default", *, page_size: int | None = None
) -> Steps[Rows[VersionInfo]]:
    """Iterate over all versions of an adapter, fetching pages as they are needed. Raises APIError."""
    return session.send(_page(_path(name, "versions"), VersionInfo, cursor, page_size))


def get_version(session: Session, version: str | int, name: str = "default") -> Steps[VersionInfo]:
    """A version by number or name: 7 or "v0007". Raises AdapterNotFoundError, APIError."""
    path = _path(name, "versions", _name(version))
    return session.send(Call("GET", path, _reads(VersionInfo), admin=True))


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
    return session.send(_post(_path(name, "snapshot"), VersionInfo, body, idempotency_key))


def promote(
    session: Session, version: str | int, name: str = "default", *, idempotency_key: str | None = None
) -> Steps[AdapterInfo]:
    """Make an existing version (7, "v0007" or an alias) live. Raises AdapterNotFoundError, APIError."""
    body = {"version": _name(version)}
    return session.send(_post(_path(name, "promote"), AdapterInfo, body, idempotency_key))


def rollback(
    session: Session,
    to: str | int | None = None,
    name: str = "default",
    *,
    idempotency_key: str | None = None,
) -> Steps[AdapterInfo]:
    """Move live back to `to`, by default to the last good version. Raises APIError."""
    body = {"to": None if to is None else _name(to)}
    return session.send(_post(_path(name, "rollback"), AdapterInfo, body, idempotency_key))


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
    body = {"to": _name(to), "purge_buffer": purge_buffer}
    return session.send(_post(_path(name, "reset"), VersionInfo, body, idempotency_key))


def export(
    session: Session, version: str | int, path: str | os.PathLike[str], name: str = "default"
) -> Steps[Path]:
    """Download a version as a directory that PEFT and vLLM load; gives the path back.

    Raises FileExistsError where `path` is neither missing nor an empty folder, and APIError.
    """
    target = Path(path)
    check_free(target)
    with tempfile.TemporaryFile() as archive:
        route = _path(name, "versions", _name(version), "export")
        yield from session.send(Call("GET", route, _nothing, admin=True, sink=archive))
        yield Work(partial(unpack, archive, target))
    return target


# --- adaptation --------------------------------------------------------------------------------------


def status(session: Session) -> Steps[AdaptationStatus]:
    """Is it learning, from what, and how far is serving behind? Raises APIError."""
    return session.send(Call("GET", "/v1/adaptation", _reads(AdaptationStatus), admin=True))


def pause(session: Session, *, idempotency_key: str | None = None) -> Steps[AdaptationStatus]:
    """Stop learning; answering goes on. Raises APIError."""
    return session.send(_post("/v1/adaptation/pause", AdaptationStatus, {}, idempotency_key))


def resume(session: Session, *, idempotency_key: str | None = None) -> Steps[AdaptationStatus]:
    """Learn again. Raises APIError."""
    return session.send(_post("/v1/adaptation/resume", AdaptationStatus, {}, idempotency_key))


def audit(session: Session, cursor: str | None, *, page_size: int | None = None) -> Steps[Rows[AuditEntry]]:
    """Iterate over all administrative acts, fetching pages as they are needed. Raises APIError."""
    return session.send(_page("/v1/audit", AuditEntry, cursor, page_size))


# --- parts -------------------------------------------------------------------------------------------


def _ask(
    image: ImageSource | Sequence[ImageSource],
    resize: bool,
    fields: Mapping[str, Any],
    timeout: float | None,
    idempotency_key: str | None,
) -> Call[Answer]:
    def body() -> Mapping[str, Any]:
        if isinstance(image, list | tuple):
            return {"images": [encode(each, resize=resize) for each in image], **fields}
        return {"image": encode(image, resize=resize), **fields}  # type: ignore[arg-type]

    return Call("POST", "/v1/answer", _reads(Answer), body=body, timeout=timeout, idempotency_key=idempotency_key)


def _post(path: str, model: type[M], body: Mapping[str, Any], idempotency_key: str | None) -> Call[M]:
    return Call("POST", path, _reads(model), body=lambda: body, admin=True, idempotency_key=idempotency_key)


def _page(path: str, model: type[M], cursor: str | None, limit: int | None = None) -> Call[Rows[M]]:
    def rows(response: httpx2.Response) -> Rows[M]:
        page = _validated(Page, response)
        try:
            return Rows([model.model_validate(row) for row in page.data], page.next_cursor)
        except ValidationError as error:
            raise _unreadable(model) from error

    return Call("GET", path, rows, query={"cursor": cursor, "limit": limit}, admin=True)


def _path(name: str, *rest: str) -> str:
    return "/".join(["/v1/adapters", *(quote(part, safe="") for part in (name, *rest))])


def _reads(model: type[M]) -> Callable[[httpx2.Response], M]:
    return partial(_validated, model)


def _validated(model: type[M], response: httpx2.Response) -> M:
    try:
        return model.model_validate_json(response.content)
    except ValidationError as error:
        raise _unreadable(model) from error


def _unreadable(model: type[BaseModel]) -> APIError:
    return APIError(f"the reply does not read as {model.__name__}: is this a servetune server?")


def _nothing(response: httpx2.Response) -> None:
    """A reply whose arrival is all it says."""


def _serving(session: Session) -> Steps[str]:
    about = yield from info(session)
    if about.serving is not None:
        return about.serving
    return (yield from status(session)).serving


def _name(version: str | int) -> str:
    return f"v{version:04d}" if isinstance(version, int) else version


def _number(version: str | int) -> int:
    if version == "base":
        return 0
    match = re.fullmatch(r"v?(\d+)", str(version))
    if match is None:
        raise ValueError(f"{version!r} is no version: give a number such as 7, or 'v0007'")
    return int(match[1])
