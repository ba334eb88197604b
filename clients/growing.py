"""An answer that is told while it grows.

It does no I/O: `drivers` sends what `request` makes, and hands it the lines that come.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from uuid import uuid4

import httpx2
from pydantic import BaseModel, ValidationError

from servetune.clients.errors import APIError, status_error
from servetune.clients.session import Call, Session, retry_delay, to_json
from servetune.clients.types import Answer, Delta, Problem

KINDS: dict[str, type[BaseModel]] = {"delta": Delta, "done": Answer, "error": Problem}


@dataclass
class Growing:
    """One question whose answer comes in parts. Asked again only as long as nothing of it was heard."""

    session: Session
    call: Call[Any]
    _kind: str = ""
    _data: list[str] = field(default_factory=list)
    _heard: bool = False
    _is_done: bool = False
    _failures: int = 0

    @cached_property
    def _content(self) -> bytes:
        assert self.call.body
        return to_json(self.call.body)

    @cached_property
    def _call(self) -> Call[Any]:
        return replace(self.call, idempotency_key=self.call.idempotency_key or uuid4().hex)

    def request(self) -> httpx2.Request:
        """The question, under the same idempotency key each time."""
        self._kind, self._data = "", []
        return self.session.request(self._call, content=self._content)

    def heard(self, line: str) -> Delta | Answer | None:
        """What a line completes. Raises APIError where the server could not go on."""
        name, _, value = line.partition(":")
        if name == "event":
            self._kind = value.removeprefix(" ")
        elif name == "data":
            self._data.append(value.removeprefix(" "))
        elif not line and self._data:
            return self._complete()
        return None

    def _complete(self) -> Delta | Answer:
        text, kind = "\n".join(self._data), self._kind
        self._kind, self._data, self._heard = "", [], True
        try:
            found = KINDS[kind].model_validate_json(text)
        except (KeyError, ValidationError) as error:
            raise APIError("the answer does not read: is this a servetune server?") from error
        if isinstance(found, Problem):
            raise status_error(found.status, {}, text.encode())
        self._is_done = isinstance(found, Answer)
        assert isinstance(found, Delta | Answer)
        return found

    def broken(self, reply: httpx2.Response | httpx2.RequestError | None) -> float | None:
        """As `Feed` has it."""
        if self._is_done:
            return None
        error = APIError("the answer broke off") if reply is None else self.session.error(reply)
        delay = retry_delay(error, self._failures)
        self._failures += 1
        if delay is None or self._heard or self._failures > self.session.max_retries:
            raise error
        return delay
