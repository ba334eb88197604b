"""Is it helping? What `client.feedback` and the comparing methods of `client.adapters` do, written once."""

from __future__ import annotations

from typing import Literal
from urllib.parse import quote

from servetune.clients.admin import version_name
from servetune.clients.replies import reads
from servetune.clients.session import Call, Session, Steps
from servetune.clients.types import Answer, Feedback, NextPair, Review, VersionDiff


def feedback(
    session: Session,
    answer: Answer | str,
    correct: bool | None = None,
    *,
    right: str | None = None,
    idempotency_key: str | None = None,
) -> Steps[Feedback]:
    """Say whether an answer (or the one with this id) was `correct`, or what the `right` one is.

    Counted by version, and not learned from; the last word on an answer counts. Only the key that asked may,
    within 30 days. Raises ValueError where neither is given, NotFoundError, APIError.
    """
    if correct is None and right is None:
        raise ValueError("say whether it was correct, or what the right answer is")
    id = answer if isinstance(answer, str) else answer.id
    path = f"/v1/answers/{quote(id, safe='')}/feedback"
    body = {"correct": correct, "answer": right}
    return session.send(Call("POST", path, reads(Feedback), body=lambda: body, idempotency_key=idempotency_key))


def review(
    session: Session, old: str | int = "base", new: str | int = "live", name: str = "default"
) -> Steps[Review]:
    """Is version `new` better than `old`, by what was judged so far? Raises AdapterNotFoundError, APIError."""
    return session.send(Call("GET", _route(name, "review"), reads(Review), query=_versions(old, new), admin=True))


def next_pair(
    session: Session,
    old: str | int = "base",
    new: str | int = "live",
    name: str = "default",
    *,
    skip: str | None = None,
) -> Steps[NextPair]:
    """A kept query that both versions answer differently, to be judged without knowing which said what.

    skip: the id of a pair that is being judged. Without a pair, ask again while queries are `left` to compare.
    Raises AdapterNotFoundError, QueueFullError where others need the model, APIError.
    """
    query = _versions(old, new) | {"skip": skip}
    return session.send(Call("GET", _route(name, "review/pair"), reads(NextPair), query=query, admin=True))


def judge(
    session: Session,
    id: str,
    choice: Literal["first", "second", "both", "neither"],
    old: str | int = "base",
    new: str | int = "live",
    name: str = "default",
    *,
    idempotency_key: str | None = None,
) -> Steps[Review]:
    """Say which answer of the pair with this id is right. Raises NotFoundError where it is gone, APIError."""
    body = {"id": id, "choice": choice, **_versions(old, new)}
    path = _route(name, "review/judge")
    return session.send(
        Call("POST", path, reads(Review), body=lambda: body, admin=True, idempotency_key=idempotency_key)
    )


def diff(
    session: Session,
    old: str | int,
    new: str | int = "live",
    name: str = "default",
    *,
    limit: int = 20,
    images: bool = False,
) -> Steps[VersionDiff]:
    """What two versions differ in: manifests, numbers, and up to `limit` answers to kept queries, newest first.

    images: also small images, as `data:` URIs. Raises AdapterNotFoundError, QueueFullError where others need the
    model, APIError.
    """
    found: VersionDiff | None = None
    after: str | None = None
    while True:
        left = limit - len(found.answers) if found else limit
        query = _versions(old, new) | {"limit": left, "after": after, "images": "true" if images else None}
        page = yield from session.send(
            Call("GET", _route(name, "diff"), reads(VersionDiff), query=query, admin=True)
        )
        after = page.next_after
        found = page if found is None else _joined(found, page)
        if after is None:
            return found


def _joined(found: VersionDiff, page: VersionDiff) -> VersionDiff:
    more = {"answers": found.answers + page.answers, "compared": found.compared + page.compared}
    return page.model_copy(update=more)


def _versions(old: str | int, new: str | int) -> dict[str, str | int | None]:
    return {"old": version_name(old), "new": version_name(new)}


def _route(name: str, rest: str) -> str:
    return f"/v1/adapters/{quote(name, safe='')}/{rest}"
