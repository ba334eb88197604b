"""What the methods of the clients do, written once. See `drivers` for how the steps are walked."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from servetune.clients.admin import status, version_name
from servetune.clients.errors import (
    APIConnectionError,
    APIError,
    APIStatusError,
    APITimeoutError,
    InternalServerError,
    status_error,
)
from servetune.clients.growing import Growing
from servetune.clients.images import ImageSource, encode
from servetune.clients.replies import nothing, reads
from servetune.clients.session import Call, Feed, Pause, Session, Steps
from servetune.clients.types import Answer, BatchItem, BatchReply, Delta, Info


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
    adapt: bool | Literal["now"] = True,
    deadline_s: float | None = None,
    metadata: Mapping[str, str] | None = None,
    resize: bool = True,
    timeout: float | None = None,
    idempotency_key: str | None = None,
) -> Steps[Answer]:
    """Ask an open question about an image (or up to 8, as a list).

    n: answers to sample and vote over; needs a `temperature` above 0.
    adapter: `live` (the default), another alias, `base` or a version such as `v0007`.
    adapt: may the server keep this query, and learn from it? "now": also pool further views into this answer.
    deadline_s: with `adapt="now"`, seconds to do so in; by default as the server says.
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
        "deadline_s": deadline_s,
        "metadata": metadata and dict(metadata),
    }
    return session.send(_ask(image, resize, fields, timeout, idempotency_key))


def stream(
    session: Session,
    image: ImageSource | Sequence[ImageSource],
    question: str,
    *,
    temperature: float | None = None,
    max_tokens: int | None = None,
    seed: int | None = None,
    adapter: str | None = None,
    adapt: bool = True,
    metadata: Mapping[str, str] | None = None,
    resize: bool = True,
    timeout: float | None = None,
    idempotency_key: str | None = None,
) -> Feed[Delta | Answer]:
    """Ask an open question, and iterate over the answer while it grows: a `Delta` at a time, at last the `Answer`.

    timeout: seconds to wait for the next part. The other arguments are those of `answer`. Asked again after a
    failure only where nothing was heard. Raises ImageError before anything is sent, and APIError.
    """
    fields = {
        "question": question,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "seed": seed,
        "adapter": adapter,
        "adapt": adapt,
        "metadata": metadata and dict(metadata),
        "stream": True,
    }
    return Growing(session, _ask(image, resize, fields, timeout, idempotency_key))


def recognize(
    session: Session,
    image: ImageSource | Sequence[ImageSource],
    labels: Sequence[str] | None = None,
    *,
    question: str | None = None,
    top_k: int | None = None,
    adapter: str | None = None,
    adapt: bool | Literal["now"] = True,
    deadline_s: float | None = None,
    metadata: Mapping[str, str] | None = None,
    resize: bool = True,
    timeout: float | None = None,
    idempotency_key: str | None = None,
) -> Steps[Answer]:
    """Choose one of 2 to 1000 unique labels; `candidates` has the likeliest `top_k` with probabilities.

    labels: by default those of the adapter's settings.
    question: asked instead of the server's default one. The other arguments are those of `answer`.
    Raises ImageError before anything is sent, and APIError.
    """
    if isinstance(labels, str):
        raise TypeError("labels must be a list of str, not one str")
    fields = {
        "candidate_labels": None if labels is None else list(labels),
        "task": "recognition" if labels is None else None,
        "question": question,
        "top_k": top_k,
        "adapter": adapter,
        "adapt": adapt,
        "deadline_s": deadline_s,
        "metadata": metadata and dict(metadata),
    }
    return session.send(_ask(image, resize, fields, timeout, idempotency_key))


def answer_batch(
    session: Session,
    questions: Sequence[Mapping[str, Any]],
    *,
    resize: bool = True,
    timeout: float | None = None,
    idempotency_key: str | None = None,
) -> Steps[list[Answer | APIStatusError]]:
    """Ask up to 256 questions in one request; each is answered by itself.

    questions: for each, by name, the arguments of `answer` or, with `labels`, of `recognize`.
    Gives the answers in their order; in place of one that failed, the error, which is not raised.
    Raises ImageError before anything is sent, and APIError where the whole request fails.
    """

    def body() -> Mapping[str, Any]:
        return {"requests": [_fields(each, resize) for each in questions]}

    call = Call(
        "POST",
        "/v1/answer/batch",
        reads(BatchReply),
        body=body,
        timeout=timeout,
        idempotency_key=idempotency_key,
    )
    reply = yield from session.send(call)
    return [each.answer or _failed(each) for each in reply.results]


def _fields(question: Mapping[str, Any], resize: bool) -> dict[str, Any]:
    """A question as it is sent."""
    fields = {name: value for name, value in question.items() if name not in ("image", "labels")}
    if "labels" in question:
        fields["candidate_labels"] = list(question["labels"])
    image = question.get("image")
    if isinstance(image, list | tuple):
        return {"images": [encode(each, resize=resize) for each in image], **fields}
    return {"image": encode(image, resize=resize), **fields}  # type: ignore[arg-type]


def _failed(item: BatchItem) -> APIStatusError:
    if item.problem is None:
        raise APIError("the reply has neither an answer nor a problem: is this a servetune server?")
    return status_error(item.problem.status, {}, item.problem.model_dump_json().encode())


def info(session: Session) -> Steps[Info]:
    """What is running: model, device, limits, version being served. Raises APIError."""
    return session.send(Call("GET", "/info", reads(Info)))


def ready(session: Session) -> Steps[bool]:
    """Can the server answer now? False also where it cannot be reached; asks once, never retries."""
    try:
        yield from session.send(Call("GET", "/readyz", nothing, max_retries=0))
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
            raise APITimeoutError(f"still serving {serving}, not {version_name(goal)}, after {timeout_s:g} s")
        yield Pause(poll_s)


def _ask(
    image: ImageSource | Sequence[ImageSource],
    resize: bool,
    fields: Mapping[str, Any],
    timeout: float | None,
    idempotency_key: str | None,
) -> Call[Answer]:
    def body() -> Mapping[str, Any]:
        return _fields({"image": image, **fields}, resize)

    return Call("POST", "/v1/answer", reads(Answer), body=body, timeout=timeout, idempotency_key=idempotency_key)


def _serving(session: Session) -> Steps[str]:
    about = yield from info(session)
    if about.serving is not None:
        return about.serving
    return (yield from status(session)).serving


def _number(version: str | int) -> int:
    if version == "base":
        return 0
    match = re.fullmatch(r"v?(\d+)", str(version))
    if match is None:
        raise ValueError(f"{version!r} is no version: give a number such as 7, or 'v0007'")
    return int(match[1])
