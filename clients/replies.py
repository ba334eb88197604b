"""Reading replies: from a successful response to the type that was promised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from servetune.clients.errors import APIError
from servetune.clients.session import Rows
from servetune.clients.types import Page

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")


@dataclass(frozen=True)
class RawResponse(Generic[T]):
    """What a call gives, and the response that it was read from.

    headers: names in lower case. content: the body as it came, empty where it went to a file.
    retries: attempts beyond the first.
    """

    value: T
    status: int
    headers: Mapping[str, str]
    content: bytes
    retries: int

    @property
    def request_id(self) -> str | None:
        """What the server's log calls the request."""
        return self.headers.get("x-request-id")


def raw_response(value: T, heard: list[httpx2.Response]) -> RawResponse[T]:
    """`value` with the last of the responses. Raises TypeError where nothing was asked yet, as by iterators."""
    if not heard:
        raise TypeError("raw is for calls that give one result; iterate over the others without it")
    last = heard[-1]
    retries = int(last.request.headers["servetune-retry-count"])
    return RawResponse(value, last.status_code, dict(last.headers), _content(last), retries)


def _content(response: httpx2.Response) -> bytes:
    try:
        return response.content
    except httpx2.ResponseNotRead:
        return b""


def reads(model: type[M]) -> Callable[[httpx2.Response], M]:
    """A parser of one `model`; it raises APIError where the reply is something else."""
    return partial(_read, model)


def reads_rows(model: type[M]) -> Callable[[httpx2.Response], Rows[M]]:
    """A parser of a page of them."""
    return partial(_read_rows, model)


def nothing(response: httpx2.Response) -> None:
    """A reply whose arrival is all it says."""


def _read(model: type[M], response: httpx2.Response) -> M:
    try:
        return model.model_validate_json(response.content)
    except ValidationError as error:
        raise _unreadable(model) from error


def _read_rows(model: type[M], response: httpx2.Response) -> Rows[M]:
    page = _read(Page[Any], response)
    try:
        return Rows([model.model_validate(row) for row in page.data], page.next_cursor)
    except ValidationError as error:
        raise _unreadable(model) from error


def _unreadable(model: type[BaseModel]) -> APIError:
    return APIError(f"the reply does not read as {model.__name__}: is this a servetune server?")
