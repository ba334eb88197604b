"""Every error the SDK raises, and the one table from a reply to its class.

ServetuneError
├── ImageError (also a ValueError)        a local image that cannot be sent
└── APIError
    ├── APIConnectionError                no usable reply
    │   └── APITimeoutError
    └── APIStatusError                    the server said no
        ├── BadRequestError 400 · AuthenticationError 401 · PermissionDeniedError 403
        ├── NotFoundError 404             └── AdapterNotFoundError (code adapter_not_found)
        ├── ConflictError 409 · PayloadTooLargeError 413 · UnsupportedMediaTypeError 415
        ├── UnprocessableEntityError 422 · RateLimitError 429
        └── InternalServerError >= 500    └── QueueFullError (code queue_full)
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus

from pydantic import ValidationError

from servetune.clients.types import Problem


class ServetuneError(Exception):
    """Base of every error of the SDK."""


class ImageError(ServetuneError, ValueError):
    """An image that cannot be read or sent; nothing has left this machine."""


class APIError(ServetuneError):
    """Something went wrong between this client and the server."""


class APIConnectionError(APIError):
    """No usable reply: the server cannot be reached or the connection broke."""


class APITimeoutError(APIConnectionError):
    """No reply, or not the awaited one, in the time given."""


class APIStatusError(APIError):
    """The server refused. `problem` is its RFC 9457 document, None where it sent no such thing.

    `retry_after`: seconds the server asked to wait, if it did.
    """

    def __init__(
        self,
        detail: str,
        status: int,
        problem: Problem | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        # All of it goes into `args`: that is what pickling and copying rebuild an exception from.
        super().__init__(detail, status, problem, request_id, retry_after)
        self.detail = detail
        self.status = status
        self.problem = problem
        self.request_id = request_id
        self.retry_after = retry_after

    @property
    def code(self) -> str | None:
        """The stable snake_case code of the problem."""
        return self.problem.code if self.problem else None

    def __str__(self) -> str:
        request = f", request {self.request_id}" if self.request_id else ""
        return f"{self.detail} [{self.status} {self.code or 'no code'}{request}]"


class BadRequestError(APIStatusError):
    """400: the request cannot be read."""


class AuthenticationError(APIStatusError):
    """401: no key, or an unknown one."""


class PermissionDeniedError(APIStatusError):
    """403: the key is of the wrong kind for this route."""


class NotFoundError(APIStatusError):
    """404."""


class AdapterNotFoundError(NotFoundError):
    """404 `adapter_not_found`: no such adapter, version or alias."""


class ConflictError(APIStatusError):
    """409: the state has moved on, or the same idempotency key is in flight."""


class PayloadTooLargeError(APIStatusError):
    """413: the body or the image is over the server's limits."""


class UnsupportedMediaTypeError(APIStatusError):
    """415: not an image the server decodes."""


class UnprocessableEntityError(APIStatusError):
    """422: a field is wrong; `problem.param` names it."""


class RateLimitError(APIStatusError):
    """429: the caller's own quota is used up."""


class InternalServerError(APIStatusError):
    """500 and above: the server failed or has no capacity."""


class QueueFullError(InternalServerError):
    """503 `queue_full`: too many requests wait for the engine."""


BY_CODE: Mapping[str, type[APIStatusError]] = {
    "adapter_not_found": AdapterNotFoundError,
    "queue_full": QueueFullError,
}
BY_STATUS: Mapping[int, type[APIStatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    413: PayloadTooLargeError,
    415: UnsupportedMediaTypeError,
    422: UnprocessableEntityError,
    429: RateLimitError,
}


def status_error(status: int, headers: Mapping[str, str], body: bytes) -> APIStatusError:
    """The error a reply stands for. `headers` must look names up without regard to case."""
    problem = _problem(body)
    family = BY_STATUS.get(status, InternalServerError if status >= 500 else APIStatusError)
    special = BY_CODE.get(problem.code) if problem else None
    # A code names a subclass of what its status says; a server that mixes them up is taken by its status.
    kind = special if special is not None and issubclass(special, family) else family
    return kind(
        problem.detail if problem else _phrase(status),
        status,
        problem,
        headers.get("x-request-id") or (problem.request_id if problem else None),
        _retry_after(headers.get("retry-after")),
    )


def _problem(body: bytes) -> Problem | None:
    try:
        return Problem.model_validate_json(body)
    except ValidationError:
        return None


def _phrase(status: int) -> str:
    if 300 <= status < 400:
        return "the server redirects, and redirects are not followed (keys stay with their host)"
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "unknown status"


def _retry_after(header: str | None) -> float | None:
    """Seconds, from either form of `Retry-After`; None where there is none or it makes no sense."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        moment = parsedate_to_datetime(header)
    except ValueError:
        return None
    # A date without a zone is GMT by RFC 9110.
    return max(0.0, (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
