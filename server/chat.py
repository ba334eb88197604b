"""OpenAI's chat completions and models, on the same engine, adapters and buffer.

A completion is one question: system messages and one user message with text and images. `model` chooses the
adapter. Queries through this door are learned from under the same rules as any other.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from servetune.adapters.store import AdapterStore
from servetune.adapters.types import BASE
from servetune.adapters.versions import UnknownVersion, version_name
from servetune.clients.types import Answer, AnswerRequest, ImageUrl
from servetune.server.access import Principal
from servetune.server.answering import Choice, Token
from servetune.server.bodies import is_opted_out, refuse_nul
from servetune.server.description import CHAT_BODY, EVENTS, openai_problems
from servetune.server.engine import Outcome
from servetune.server.errors import ServiceError, as_service_error, invalid_request, openai_error
from servetune.server.lines import AT
from servetune.server.middleware import VERSION_HEADER
from servetune.server.routes import STREAM, ServicesDep, UserDep, asker, while_connected
from servetune.server.service import Services
from servetune.server.telling import Telling, settled

MAX_TOKENS = 256  # where a request does not say

router = APIRouter()


class _Sent(BaseModel):
    """What a client sends; what is not known is refused, as OpenAI does."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(_Sent):
    """Words in a message."""

    type: Literal["text"]
    text: str


class Address(_Sent):
    """Where an image is: a `data:` URI, or an address where the server allows those."""

    url: str = Field(max_length=20_000_000)
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(_Sent):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: Address


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Sent):
    """A turn. Only `system` (or `developer`) and one `user` are taken."""

    role: str
    content: str | list[Part]
    name: str | None = None


class StreamOptions(_Sent):
    """What else a stream tells."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ResponseFormat(_Sent):
    """Plain text; `candidate_labels` is for answers from a list."""

    type: Literal["text"]


class ChatRequest(_Sent):
    """OpenAI's request, as far as it concerns one question; `candidate_labels`, `adapt`, `deadline_s` are ours."""

    model: str = Field(max_length=512)
    messages: Annotated[list[Message], Field(min_length=1, max_length=16)]
    max_completion_tokens: int | None = Field(None, ge=1, le=1024)
    max_tokens: int | None = Field(None, ge=1, le=1024)
    n: int | None = Field(None, ge=1, le=64)
    temperature: float | None = Field(
        None, ge=0, le=2, description="0, the likeliest answer; with `n` above 1 it is 1"
    )
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    top_p: float | None = Field(None, ge=1, le=1)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    candidate_labels: list[str] | None = None
    adapt: bool | Literal["now"] = True
    deadline_s: float | None = None
    # About the account and not about the answer: taken, and without effect.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None

    @property
    def stops(self) -> list[str]:
        """Texts before which an answer ends."""
        return [self.stop] if isinstance(self.stop, str) else [text for text in self.stop or () if text]

    @property
    def logprobs_wanted(self) -> int | None:
        """How many of the likeliest tokens are told in each place; None: nothing of the kind."""
        return (self.top_logprobs or 0) if self.logprobs else None


@router.post(
    "/v1/chat/completions",
    responses=EVENTS | openai_problems(401, 404, 409, 415, 422, 429, 503),
    openapi_extra=CHAT_BODY,
)
async def completions(
    request: Request, body: ChatRequest, services: ServicesDep, caller: Annotated[Principal, Depends(asker)]
) -> Response:
    """A chat completion about the images in one user message, by the adapter that `model` names."""
    asked = await question(body, services, caller)
    refuse_nul(asked)
    opted_out = is_opted_out(request.headers)
    exchange = Exchange(body, asked, services, caller, request.state.request_id, opted_out)
    return await while_connected(request, exchange.stream() if body.stream else exchange.whole())


@router.get("/v1/models", responses=openai_problems(401))
async def models(services: ServicesDep, caller: UserDep) -> dict[str, Any]:
    """The base model, the caller's adapter with its aliases and versions, and other adapters, as a model each."""
    return {"object": "list", "data": await _cards(services, caller)}


@router.get("/v1/models/{model:path}", responses=openai_problems(401, 404))
async def model(model: str, services: ServicesDep, caller: UserDep) -> dict[str, Any]:
    """One of the models."""
    for card in await _cards(services, caller):
        if card["id"] == model:
            return card
    raise _no_model(services, caller)


async def _cards(services: Services, caller: Principal) -> list[dict[str, Any]]:
    own = await services.lines.find(_own(services, caller))
    others = [] if caller.adapter else [name for name in await services.lines.names() if name != own.name]
    stores = [services.lines.look(name)[0] for name in others]
    return await asyncio.to_thread(_cards_of, own.store, stores, own.engine.model_name)


def _cards_of(store: AdapterStore, others: Sequence[AdapterStore], base: str) -> list[dict[str, Any]]:
    cards = [_card(store, base, BASE, None, base)]
    cards += [_card(each, each.name, each.live().version, base, base) for each in (store, *others)]
    for alias, number in store.aliases().items():
        cards.append(_card(store, f"{store.name}{AT}{alias}", number, base, base))
    for number in store.versions():
        parent = store.manifest(number).parent
        above = base if parent is None else f"{store.name}{AT}{version_name(parent)}"
        cards.append(_card(store, f"{store.name}{AT}{version_name(number)}", number, above, base))
    return cards


def _card(store: AdapterStore, name: str, version: int, parent: str | None, base: str) -> dict[str, Any]:
    created = int(store.manifest(version).created)
    root = base if parent is None else f"{store.name}{AT}{version_name(version)}"
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "servetune",
        "root": root,
        "parent": parent,
    }


# --- the request -------------------------------------------------------------------------------------


async def question(body: ChatRequest, services: Services, caller: Principal) -> AnswerRequest:
    """The question that a chat asks, in our own words.

    Raises:
        ServiceError: it is more than one question, or something in it is not valid.
    """
    text, images = _content(body.messages)
    several = (body.n or 1) > 1
    temperature = body.temperature if body.temperature is not None else (1.0 if several else 0.0)
    fields: dict[str, Any] = {
        "images": [ImageUrl(url=url) for url in images],
        "question": text or None,
        "candidate_labels": body.candidate_labels,
        "n": body.n or 1,
        "max_tokens": body.max_completion_tokens or body.max_tokens or MAX_TOKENS,
        "temperature": temperature,
        "seed": body.seed,
        "adapter": await _adapter(body.model, services, caller),
        "adapt": body.adapt,
        "deadline_s": body.deadline_s,
    }
    try:
        return AnswerRequest.model_validate(fields)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False)) from None


def _content(messages: Sequence[Message]) -> tuple[str, list[str]]:
    """The words and the images of one question. Raises ServiceError."""
    asked = [message for message in messages if message.role == "user"]
    others = {message.role for message in messages} - {"user", "system", "developer"}
    if len(asked) != 1 or others or messages[-1] is not asked[0]:
        raise _invalid("messages", "one question at a time: send system messages and, last, one user message")
    words, images = [], []
    for message in messages:
        parts = (
            [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        )
        words += [part.text for part in parts if isinstance(part, TextPart)]
        found = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
        if found and message is not asked[0]:
            raise _invalid("messages", "images belong into the user message")
        images += found
    if not images:
        raise _invalid("messages", "the user message needs an image_url part: questions are about images")
    return "\n".join(word for word in map(str.strip, words) if word), images


async def _adapter(model: str, services: Services, caller: Principal) -> str:
    """The adapter and the version that a model's name stands for. Raises ServiceError."""
    own = _own(services, caller)
    if model == services.lines.first.engine.model_name:
        return "base"
    name, _, choice = model.partition(AT)
    if caller.adapter not in (None, name) or name not in await services.lines.names():
        raise _no_model(services, caller)
    try:
        await asyncio.to_thread(services.lines.look(name)[0].resolve, choice or "live")
    except UnknownVersion:
        raise _no_model(services, caller) from None
    return (choice or "live") if name == own else f"{name}{AT}{choice or 'live'}"


def _own(services: Services, caller: Principal) -> str:
    """The adapter of who names none."""
    return caller.adapter or services.lines.first.name


def _no_model(services: Services, caller: Principal) -> ServiceError:
    base = services.lines.first.engine.model_name
    known = f"{_own(services, caller)} (what is live), {base} (the base)"
    detail = f"No such model here: {known}, and what GET /v1/models lists."
    return ServiceError("model_not_found", detail, param="model")


def _invalid(param: str, rule: str) -> ServiceError:
    return invalid_request([{"type": "value_error", "loc": (param,), "msg": rule}])


# --- the reply ---------------------------------------------------------------------------------------


class Exchange:
    """One chat on its way through the service."""

    def __init__(
        self,
        body: ChatRequest,
        request: AnswerRequest,
        services: Services,
        caller: Principal,
        request_id: str,
        opted_out: bool,
    ) -> None:
        self._body = body
        self._request = request
        self._services = services
        self._who = caller, request_id, opted_out

    async def whole(self) -> Response:
        """The completion as one object."""
        outcome, answer = await self._ask()
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": self._cut(each.text), "refusal": None},
                "finish_reason": self._finish(each),
                "logprobs": _logprobs(each.tokens),
            }
            for index, each in enumerate(_choices(outcome))
        ]
        made = {**_head(answer, self._body.model, "chat.completion"), "choices": choices, "usage": _usage(answer)}
        headers = {VERSION_HEADER: answer.adapter.version}
        body = json.dumps({**made, "servetune": _ours(answer)})
        return Response(body, headers=headers, media_type="application/json")

    async def stream(self) -> Response:
        """The completion as server-sent events. What fails before the first of them is an ordinary error."""
        telling = Telling(self._ask, self._can_tell)
        first = await telling.begin()
        return StreamingResponse(self._events(telling, first), headers=STREAM, media_type="text/event-stream")

    @property
    def _can_tell(self) -> bool:
        """Whether an answer can be told while it grows: a single one, without its tokens."""
        return self._request.n == 1 and self._body.logprobs_wanted is None

    async def _ask(self, listen: Any = None) -> tuple[Outcome, Answer]:
        answers, request = self._services.answers, self._request
        wanted = self._body.logprobs_wanted
        outcome, kept = await answers.ask(request, request.images or (), *self._who, wanted, listen)
        return outcome, answers.wire(request, self._who[0], outcome, kept)

    async def _events(self, telling: Telling[tuple[Outcome, Answer]], text: str | None) -> AsyncIterator[str]:
        head = self._chunk_head()
        said = [""] * self._request.n
        try:
            for index in range(self._request.n):
                yield _event(head, [_delta(index, {"role": "assistant", "content": ""})])
            while text is not None:
                told = self._told(text)
                if len(told) > len(said[0]) and told.startswith(said[0]):
                    yield _event(head, [_delta(0, {"content": told[len(said[0]) :]})])
                    said[0] = told
                text = await telling.next()
            outcome, answer = telling.result
            for index, each in enumerate(_choices(outcome)):
                rest = self._cut(each.text).removeprefix(said[index])
                if rest or each.tokens:
                    yield _event(head, [_delta(index, {"content": rest}, logprobs=_logprobs(each.tokens))])
                yield _event(head, [_delta(index, {}, self._finish(each))], servetune=_ours(answer))
            if self._body.stream_options and self._body.stream_options.include_usage:
                yield _event(head, [], usage=_usage(answer))
            yield "data: [DONE]\n\n"
        except Exception as error:  # the status is sent: clients of this API look for an error among the events
            yield f"data: {json.dumps({'error': openai_error(as_service_error(error))})}\n\n"
        finally:
            telling.cancel()

    def _chunk_head(self) -> dict[str, Any]:
        created = int(time.time())
        name = f"chatcmpl-{self._who[1]}"
        return {"id": name, "object": "chat.completion.chunk", "created": created, "model": self._body.model}

    def _told(self, text: str) -> str:
        """What of an unfinished text will not be taken back, as half a character or the start of a stop would."""
        cut = self._cut(text)
        if cut != text:
            return cut
        kept = max((len(stop) - 1 for stop in self._body.stops), default=0)
        return settled(text)[: len(text) - kept]

    def _cut(self, text: str) -> str:
        """The text before the first stop."""
        places = [place for stop in self._body.stops if (place := text.find(stop)) >= 0]
        return text[: min(places)] if places else text

    def _finish(self, choice: Choice) -> str:
        return "stop" if self._cut(choice.text) != choice.text else choice.finish_reason


def _choices(outcome: Outcome) -> Sequence[Choice]:
    """The answers that were asked for; an answer without words is an empty one."""
    finish = "length" if outcome.finish_reason == "length" else "stop"
    return outcome.choices or (Choice(outcome.text or "", finish),)


def _logprobs(tokens: Sequence[Token] | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    content = [
        {**_likelihood(t.text, t.logprob), "top_logprobs": [_likelihood(*each) for each in t.likeliest]}
        for t in tokens
    ]
    return {"content": content, "refusal": None}


def _likelihood(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _head(answer: Answer, model: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{answer.id}", "object": kind, "created": answer.created, "model": model}


def _usage(answer: Answer) -> dict[str, int]:
    usage = answer.usage
    total = usage.input_tokens + usage.output_tokens
    return {"prompt_tokens": usage.input_tokens, "completion_tokens": usage.output_tokens, "total_tokens": total}


def _ours(answer: Answer) -> dict[str, Any]:
    """What OpenAI's objects have no place for."""
    names = {"adapter", "confidence", "confidence_source", "candidates", "adaptation", "diagnostics"}
    return answer.model_dump(mode="json", include=names)


def _delta(
    index: int, delta: dict[str, Any], finish: str | None = None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _event(head: dict[str, Any], choices: list[dict[str, Any]], **more: Any) -> str:
    return f"data: {json.dumps({**head, 'choices': choices, **more})}\n\n"
