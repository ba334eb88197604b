"""The body of a question, as JSON or as a form, as one AnswerRequest and its images."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from servetune.clients.types import AnswerRequest, BatchRequest, ImageInput, ProbesRequest
from servetune.server.errors import ServiceError, invalid_request

MAX_IMAGES = 8
MAX_FIELDS = 1_100  # 1,000 labels and every other field
_AS_JSON = {"candidate_labels", "metadata", "stream"}
_UPLOADED = "data:"  # stands in the request for an image that came as bytes


@dataclass(frozen=True, slots=True)
class Asked:
    """A checked request; `images` are uploads, or texts as sent in JSON. `opted_out`: by a header."""

    request: AnswerRequest
    images: Sequence[bytes | ImageInput]
    opted_out: bool = False


async def parse_question(headers: Headers, body: bytes) -> Asked:
    """Read the body of `POST /answer`; the header `Servetune-Adapt: false` opts out as the field does.

    Any value of that header but a yes is taken for a no.

    Raises:
        ServiceError: `unsupported_media_type`, `invalid_json`, `invalid_form` or `invalid_request`.
    """
    match headers.get("content-type", "").partition(";")[0].strip().lower():
        case "application/json":
            asked = _from_json(body)
        case "multipart/form-data":
            asked = await _from_form(headers, body)
        case _:
            raise ServiceError("unsupported_media_type", "Send application/json or multipart/form-data.")
    refuse_nul(asked.request)
    return replace(asked, opted_out=is_opted_out(headers))


def parse_batch(headers: Headers, body: bytes) -> list[Asked]:
    """Read the body of `POST /v1/answer/batch`, JSON alone. Raises ServiceError as `parse_question` does."""
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ServiceError("unsupported_media_type", "Send application/json.")
    try:
        batch = BatchRequest.model_validate_json(body)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False)) from None
    for request in batch.requests:
        refuse_nul(request)
        if request.stream:
            raise _invalid("stream", "is for single questions")
    opted_out = is_opted_out(headers)
    return [Asked(request, request.images or [request.image or ""], opted_out) for request in batch.requests]


def parse_probes(headers: Headers, body: bytes) -> ProbesRequest:
    """Read the body of a probe set, JSON alone. Raises ServiceError as `parse_question` does."""
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ServiceError("unsupported_media_type", "Send application/json.")
    try:
        return ProbesRequest.model_validate_json(body)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False)) from None


def is_opted_out(headers: Headers) -> bool:
    """Whether the header `Servetune-Adapt` keeps a query from being learned from."""
    return headers.get("servetune-adapt", "true").strip().lower() not in {"true", "1", "yes"}


def _from_json(body: bytes) -> Asked:
    try:
        request = AnswerRequest.model_validate_json(body)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False)) from None
    return Asked(request, request.images or [request.image or ""])


async def _from_form(headers: Headers, body: bytes) -> Asked:
    form = await _read_form(headers, body)
    try:
        images = [await _image(value) for value in form.getlist("image")]
        fields = {name: _field(name, form) for name in form}
    finally:
        await form.close()
    if "image" in fields:
        fields["image" if len(images) == 1 else "images"] = fields.pop("image")
    try:
        return Asked(AnswerRequest.model_validate(fields), images)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False)) from None


async def _read_form(headers: Headers, body: bytes) -> FormData:
    async def chunks() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        parser = MultiPartParser(headers, chunks(), max_files=MAX_IMAGES, max_fields=MAX_FIELDS)
        parser.spool_max_size = len(body) + 1  # uploads never touch the disk
        return await parser.parse()
    except (MultiPartException, ValueError, LookupError):  # also: unknown or broken charset
        raise ServiceError("invalid_form") from None


def _field(name: str, form: FormData) -> Any:
    values = [_UPLOADED if isinstance(value, UploadFile) else value for value in form.getlist(name)]
    if name == "image":
        return values if len(values) > 1 else values[0]
    if any(isinstance(value, UploadFile) for value in form.getlist(name)):
        raise _invalid(name, "must be text, not a file")
    if name == "candidate_labels" and (len(values) > 1 or not values[0].lstrip().startswith("[")):
        return values
    if len(values) > 1:
        raise _invalid(name, "given more than once")
    return _parsed(values[0]) if name in _AS_JSON else values[0]


def _parsed(text: str) -> Any:
    """The JSON value in a text field; anything else is left for validation to refuse."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


async def _image(value: UploadFile | str) -> bytes | str:
    return value if isinstance(value, str) else await value.read()


def _texts(request: AnswerRequest) -> Iterator[tuple[str, str]]:
    yield "question", request.question or ""
    yield from (("candidate_labels", label) for label in request.candidate_labels or ())
    for key, value in (request.metadata or {}).items():
        yield "metadata", key + value


def refuse_nul(request: AnswerRequest) -> None:
    """Raises ServiceError where a text holds a NUL character."""
    for param, text in _texts(request):
        if "\0" in text:
            raise _invalid(param, "must not hold NUL characters")


def _invalid(name: str, rule: str) -> ServiceError:
    return invalid_request([{"type": "value_error", "loc": (name,), "msg": rule}])
