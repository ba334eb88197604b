"""An adapter's history: its events over as many connections as it takes, and its series. It does no I/O.

`drivers` sends what a subscription's `request` makes, hands every line to `heard`, and waits as long as `broken`
says before it asks again for what came after the last event.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import httpx2
from pydantic import ValidationError

from servetune.clients.errors import APIError
from servetune.clients.replies import nothing, reads
from servetune.clients.session import Call, Feed, Session, Steps, retry_delay
from servetune.clients.types import Event, Series

T = TypeVar("T")

SILENCE_S = 60.0  # the server says something every 15 s, if only that it is there


@dataclass
class Subscription:
    """What has been heard, and how to hear more."""

    session: Session
    adapter: str | None
    since: str | None
    status: bool
    follow: bool
    _last: str | None = None  # id of the last event, or of where the server begins
    _id: str | None = None  # of the event that is coming in
    _data: list[str] = field(default_factory=list)
    _failures: int = 0
    _reached: bool = False

    def request(self) -> httpx2.Request:
        """Asks for what comes after the last event."""
        query = {
            "adapter": self.adapter,
            "since": self.since,
            "status": "true" if self.status else None,
            "follow": None if self.follow else "false",
        }
        self._id, self._data = None, []
        request = self.session.request(_call("/v1/adaptation/events", self.session, query, nothing, SILENCE_S))
        if self._last is not None:
            request.headers["Last-Event-ID"] = self._last
        return request

    def heard(self, line: str) -> Event | None:
        """The event that a line completes, if it does."""
        self._reached, self._failures = True, 0
        name, _, value = line.partition(":")
        if name == "data":
            self._data.append(value.removeprefix(" "))
        elif name == "id":
            self._id = value.removeprefix(" ")
        return self._complete() if not line else None

    def _complete(self) -> Event | None:
        text, self._data = "\n".join(self._data), []
        self._last, self._id = self._id or self._last, None
        if not text:
            return None
        try:
            return Event.model_validate_json(text)
        except ValidationError as error:
            raise APIError("an event does not read as Event: is this a servetune server?") from error

    def broken(self, reply: httpx2.Response | httpx2.RequestError | None) -> float | None:
        """Seconds to wait before asking again, after a refusal, a failure or (None) the end; None: that was all.

        Raises APIError where asking again would change nothing or, before anything was heard, has been tried as
        often as the session allows.
        """
        if reply is None and not self.follow:
            return None
        error = APIError("the events ended") if reply is None else self.session.error(reply)
        delay = retry_delay(error, self._failures)
        self._failures += 1
        if delay is None or (not self._reached and self._failures > self.session.max_retries):
            raise error
        return delay


def events(
    session: Session,
    adapter: str | None = None,
    *,
    since: str | None = None,
    status: bool = False,
    follow: bool = True,
) -> Feed[Event]:
    """Iterate over what happens to an adapter: steps, verdicts, versions, swaps and operators' acts.

    since: begin after the event with this id; "0": with all that is kept, None: with what happens from now on.
    status: also tell how things stand, every two seconds.
    follow: go on for ever, through lost connections and restarts of the server; else end after what happened.
    Raises APIError where the server refuses or, at first, cannot be reached.
    """
    return Subscription(session, adapter, since, status, follow)


def series(
    session: Session, adapter: str | None = None, *, since: str | None = None, limit: int | None = None
) -> Steps[Series]:
    """The numbers of an adapter's steps as columns, and what else happened between them.

    since: only what came after the event with this id. limit: events read at most. Raises APIError.
    """
    query = {"adapter": adapter, "since": since, "limit": limit}
    return session.send(_call("/v1/adaptation/series", session, query, reads(Series)))


def _call(
    path: str,
    session: Session,
    query: Mapping[str, str | int | None],
    parse: Callable[[httpx2.Response], T],
    timeout: float | None = None,
) -> Call[T]:
    """A read that either key allows; the user's, where there is one."""
    return Call("GET", path, parse, query=query, admin=session.api_key is None, timeout=timeout)
