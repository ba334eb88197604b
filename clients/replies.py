"""Reading replies: from a successful response to the type that was promised."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from servetune.clients.errors import APIError
from servetune.clients.session import Rows
from servetune.clients.types import Page

M = TypeVar("M", bound=BaseModel)


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
