"""What can go wrong, in one table, and its renderings: RFC 9457, and OpenAI's on the routes that are like theirs.

Whatever is raised below becomes a ServiceError here and nowhere else. A problem document never carries the
text of a foreign exception, nor anything that was sent except the name of the field it is about.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from servetune.adapters.family import PromptTooLong, UnusableImage
from servetune.adapters.versions import (
    AliasMoved,
    CorruptVersion,
    ErasedQuery,
    ForeignVersion,
    NameTaken,
    RetiredVersion,
    StoreBusy,
    StoreError,
    UnfitAdapter,
    UnknownVersion,
)
from servetune.clients.types import Problem
from servetune.server.buffer import BufferUnavailable
from servetune.server.stage import QueueFull

PROBLEMS: dict[str, tuple[int, str]] = {
    "invalid_json": (400, "The body is not valid JSON"),
    "invalid_form": (400, "The body is not a valid form"),
    "invalid_content_length": (400, "The Content-Length is not valid"),
    "host_refused": (400, "The Host header is not one of this server"),
    "bad_request": (400, "The request is not valid"),
    "unauthorized": (401, "A key is needed"),
    "forbidden": (403, "The key does not allow this"),
    "origin_refused": (403, "Requests from other web sites are refused"),
    "not_found": (404, "There is nothing at this address"),
    "adapter_not_found": (404, "No such adapter, alias or version"),
    "probes_not_found": (404, "No such probe set"),
    "model_not_found": (404, "No such model"),
    "answer_not_found": (404, "No such answer"),
    "pair_not_found": (404, "No such pair of answers"),
    "method_not_allowed": (405, "The method is not allowed here"),
    "body_timeout": (408, "The body did not arrive in time"),
    "adapter_incompatible": (409, "The adapter or version was made for another base model"),
    "name_taken": (409, "The name is reserved or in use"),
    "alias_moved": (409, "`live` has moved"),
    "query_erased": (409, "It learned from queries that were erased"),
    "version_retired": (409, "The weights of that version are gone"),
    "idempotency_in_flight": (409, "A request with this Idempotency-Key is running"),
    "body_too_large": (413, "The body is too large"),
    "unsupported_media_type": (415, "The content type is not supported"),
    "unsupported_image": (415, "The image is neither JPEG, PNG nor WebP"),
    "invalid_request": (422, "A field is not valid"),
    "invalid_image": (422, "The image cannot be read"),
    "adapter_unfit": (422, "The adapter cannot be used here"),
    "prompt_too_long": (422, "The question and its images are too long"),
    "image_too_large": (422, "The image has too many pixels"),
    "image_url_disabled": (422, "Image addresses are switched off"),
    "image_url_refused": (422, "The image address was refused"),
    "idempotency_mismatch": (422, "The Idempotency-Key was used for another request"),
    "rate_limited": (429, "Too many questions from this key"),
    "client_closed_request": (499, "The client went away"),
    "internal_error": (500, "Something went wrong inside the server"),
    "adapter_corrupt": (500, "A stored version is damaged"),
    "not_ready": (503, "The server is not ready"),
    "engine_unresponsive": (503, "The engine does not respond"),
    "store_busy": (503, "Another process holds the store"),
    "queue_full": (503, "Too many requests are waiting"),
    "deadline_exceeded": (503, "The request took too long"),
    "buffer_unavailable": (503, "The query buffer is not reachable"),
}
"""code -> (status, title)"""

_RETRY = {"Retry-After": "1"}
_BY_STATUS = {
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
}
OPENAI_PATHS = ("/v1/chat/", "/v1/models")
_OPENAI_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_WHERE = {"body", "path", "query", "header"}


class ServiceError(Exception):
    """A refusal or failure with a stable `code` of PROBLEMS, fit to be shown to the client."""

    def __init__(
        self,
        code: str,
        detail: str | None = None,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.code = code
        self.status, self.title = PROBLEMS[code]
        self.detail = detail or f"{self.title}."
        self.param = param
        self.headers = dict(headers or (_RETRY if self.status == 503 else {}))
        super().__init__(f"{code}: {self.detail}")


def invalid_request(errors: Sequence[Mapping[str, Any]]) -> ServiceError:
    """The first of pydantic's errors as a problem: the field and the rule, never the value."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ServiceError("invalid_json")
    param = _param(first["loc"])
    rule = str(first["msg"]).removeprefix("Value error, ")
    more = f" ({len(errors) - 1} more)" if len(errors) > 1 else ""
    return ServiceError("invalid_request", f"{param}: {rule}{more}" if param else rule + more, param=param)


def _param(loc: Sequence[str | int]) -> str | None:
    """`candidate_labels.3` for ("body", "candidate_labels", 3); an unknown field's name is made harmless."""
    if loc and loc[0] in _WHERE:
        loc = loc[1:]
    if not loc:
        return None
    name = re.sub(r"[^A-Za-z0-9_.-]", "?", str(loc[0]))[:64]
    return f"{name}.{loc[1]}" if len(loc) > 1 and isinstance(loc[1], int) else name


def openai_error(error: ServiceError) -> dict[str, str | None]:
    """An error as clients of OpenAI's API know it."""
    kind = _OPENAI_KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"message": error.detail, "type": kind, "param": error.param, "code": error.code}


def as_service_error(error: Exception) -> ServiceError:
    """The one mapping from what the parts below raise; the unforeseen is `internal_error`."""
    match error:
        case ServiceError():
            return error
        case RequestValidationError():
            return invalid_request(error.errors())
        case HTTPException():
            fallback = "bad_request" if error.status_code < 500 else "internal_error"
            return ServiceError(_BY_STATUS.get(error.status_code, fallback), headers=error.headers)
        case UnknownVersion() | AliasMoved() | NameTaken() | ForeignVersion() | RetiredVersion():
            return ServiceError(error.code, str(error))
        case UnfitAdapter() | ErasedQuery():
            return ServiceError(error.code, str(error))
        case StoreBusy():
            return ServiceError("store_busy")
        case CorruptVersion():
            return ServiceError("adapter_corrupt")
        case StoreError():
            return ServiceError("internal_error")
        case UnusableImage():
            return ServiceError("invalid_image", str(error))
        case PromptTooLong():
            return ServiceError("prompt_too_long", str(error))
        case QueueFull():
            return ServiceError("queue_full")
        case TimeoutError():
            return ServiceError("deadline_exceeded")
        case BufferUnavailable():
            return ServiceError("buffer_unavailable")
        case _:
            return ServiceError("internal_error")


def problem(error: ServiceError, scope: Scope) -> Response:
    """The response for an error met while serving `scope`: `application/problem+json`, or OpenAI's object."""
    if scope["path"].startswith(OPENAI_PATHS):
        body = json.dumps({"error": openai_error(error)})
        return Response(body, error.status, error.headers, media_type="application/json")
    document = problem_document(error, scope)
    body = json.dumps(document.model_dump())
    return Response(body, error.status, error.headers, media_type="application/problem+json")


def problem_document(error: ServiceError, scope: Scope) -> Problem:
    """An error met while serving `scope`, in the words of RFC 9457."""
    return Problem(
        type=f"urn:servetune:problem:{error.code}",
        title=error.title,
        status=error.status,
        detail=error.detail,
        instance=quote(scope["path"][:200], errors="replace"),
        code=error.code,
        param=error.param,
        request_id=scope.get("state", {}).get("request_id"),
    )
