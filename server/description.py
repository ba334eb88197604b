"""What FastAPI cannot infer of the OpenAPI document: both bodies of a question, problems, keys, sendings-again.

Clients are generated from it, so what it says must be what the server does; row I10 of the promises compares them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from pydantic.json_schema import models_json_schema

from servetune.clients.types import AnswerRequest, BatchRequest, ProbesRequest, Problem
from servetune.server.bodies import MAX_IMAGES

_REFERENCE = "#/components/schemas/{model}"
_EVERYWHERE = (400, 403, 408, 413, 500)  # what stands before the routes refuses, and what nobody foresaw
_KEY_HEADER: dict[str, Any] = {
    "name": "Idempotency-Key",
    "in": "header",
    "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
    "description": "Sent again with the same body, the first answer is given again.",
}
# An image of one pixel: short enough to read, and whoever sends it as it stands is answered.
_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
_EXAMPLE = {"image": _PIXEL, "question": "What is this?", "adapt": False}
_CHAT_EXAMPLE: dict[str, Any] = {
    "model": "default",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_PIXEL}"}},
            ],
        }
    ],
    "adapt": False,
}
_ADAPT_HEADER: dict[str, Any] = {
    "name": "Servetune-Adapt",
    "in": "header",
    "schema": {"type": "string"},
    "description": "`false` keeps the query from being learned from; `adapt: now` still looks again.",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries for refusals: these, and those that any address may give."""
    content = {"application/problem+json": {"schema": {"$ref": _REFERENCE.format(model="Problem")}}}
    entry = {"description": "Refused, see `code`", "content": content}
    return dict.fromkeys(sorted({*_EVERYWHERE, *statuses}), entry)


def openai_problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """As `problems`, on the routes that speak as OpenAI's."""
    names = ("message", "type", "param", "code")
    error = {"type": "object", "properties": {name: {"type": ["string", "null"]} for name in names}}
    schema = {"type": "object", "properties": {"error": error}, "required": ["error"]}
    entry = {"description": "Refused, see `code`", "content": {"application/json": {"schema": schema}}}
    return dict.fromkeys(sorted({*_EVERYWHERE, *statuses}), entry)


ASK_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": _REFERENCE.format(model="AnswerRequest")},
                "example": _EXAMPLE,
            },
            "multipart/form-data": {"schema": {"$ref": _REFERENCE.format(model="AnswerForm")}},
        },
    },
    "parameters": [_ADAPT_HEADER],
}
BATCH_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": _REFERENCE.format(model="BatchRequest")},
                "example": {"requests": [_EXAMPLE, _EXAMPLE]},
            }
        },
    },
    "parameters": [_ADAPT_HEADER],
}
PROBES_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": _REFERENCE.format(model="ProbesRequest")}}},
    }
}
CHAT_BODY: dict[str, Any] = {
    "requestBody": {"content": {"application/json": {"example": _CHAT_EXAMPLE}}},
    "parameters": [_ADAPT_HEADER],
}
EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


def complete(document: dict[str, Any], keyed: Collection[str]) -> None:
    """Add what is missing to the document; `keyed` are the paths that need a key."""
    components = document.setdefault("components", {})
    components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    _, models = models_json_schema(
        [
            (AnswerRequest, "validation"),
            (BatchRequest, "validation"),
            (ProbesRequest, "validation"),
            (Problem, "serialization"),
        ],
        ref_template=_REFERENCE,
    )
    schemas = components.setdefault("schemas", {})
    schemas |= models["$defs"]
    schemas["AnswerForm"] = _form_schema(schemas["AnswerRequest"])
    for path, method, operation in _operations(document):
        if path in keyed:
            operation["security"] = [{"bearer": []}]
        if method == "post":
            operation.setdefault("parameters", []).append(_KEY_HEADER)


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield path, method, operation


def _form_schema(request: dict[str, Any]) -> dict[str, Any]:
    """AnswerRequest as a form: `image` is repeated, and a file; nothing can be null."""
    fields = {name: _not_null(field) for name, field in request["properties"].items() if name != "images"}
    file = {"type": "string", "format": "binary"}
    fields["image"] = {"type": "array", "items": file, "minItems": 1, "maxItems": MAX_IMAGES}
    return {"type": "object", "properties": fields, "required": ["image"], "additionalProperties": False}


def _not_null(field: dict[str, Any]) -> dict[str, Any]:
    kinds = [kind for kind in field.get("anyOf", ()) if kind != {"type": "null"}]
    rest = {name: value for name, value in field.items() if name != "anyOf" and value is not None}
    return rest | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds} if kinds else {})
