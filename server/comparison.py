"""Two versions of an adapter beside each other: kept queries are answered by both, and a person says who is right.

The queries are those that `review_queries` keeps, of clients who did not opt out. They are answered again one at a
time and only while nobody waits, so that a question waits for one such answer at most. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import base64
import io
import random
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

from servetune.adapters.answers import canonical
from servetune.adapters.paired import gain
from servetune.adapters.types import Query, Sampling
from servetune.adapters.versions import Manifest, version_name
from servetune.clients.types import Change, ChangedAnswer, NextPair, Pair, Review, VersionDiff
from servetune.server.lines import Line
from servetune.server.stage import QueueFull

PATIENCE_S = 5.0  # one request compares for this long, about; who wants more asks again
POLL_S = 0.02
SIDE, SMALL_SIDE = 1024, 256  # pixels of an image to judge by, and of one beside a changed answer
JUDGED = ("only_old", "only_new", "both", "neither")
FACTS = ("parent", "origin", "label", "base_digest", "rank", "target_modules", "step_range", "temperature")


@dataclass(frozen=True, slots=True)
class Versions:
    """The two versions of an adapter that are compared."""

    old: int
    new: int

    @property
    def pair(self) -> str:
        """The name under which their comparison is noted."""
        return f"{version_name(self.old)} {version_name(self.new)}"


class Compared(NamedTuple):
    """What two versions answer to a query; None where one gives no answer."""

    query: Query
    old: str | None
    new: str | None

    @property
    def differs(self) -> bool:
        """Whether the answers mean different things: labels as they are, open ones in their canonical form."""
        if self.query.labels:
            return self.old != self.new
        return canonical(self.old or "") != canonical(self.new or "")


class Comparison:
    """Compares versions of a server's adapters. Every method raises BufferUnavailable."""

    def __init__(self, max_answer_tokens: int) -> None:
        self._sampling = Sampling(max_tokens=max_answer_tokens)
        self._one_at_a_time = asyncio.Lock()

    async def review(self, line: Line, versions: Versions) -> Review:
        """What was found out so far."""
        marks = await line.buffer.review(versions.pair)
        kept = await line.buffer.recent(versions.pair)
        judged = {kind: marks.get(kind, 0) for kind in JUDGED}
        num, different = sum(judged.values()), marks.get("different", 0)
        compared = different + marks.get("same", 0)
        share = low = high = None
        if num:
            share, low, high = gain(judged["only_new"], judged["only_old"], num, different, compared)
        return Review(
            adapter=line.name,
            old=version_name(versions.old),
            new=version_name(versions.new),
            kept=len(kept),
            compared=compared,
            different=different,
            judged=num,
            **judged,
            gain=share,
            low=low,
            high=high,
        )

    async def next_pair(self, line: Line, versions: Versions, skip: str | None) -> NextPair:
        """A kept query that the versions answer differently and nobody has judged, drawn at random; not `skip`.

        Raises QueueFull where others need the model, and what the engine raises.
        """
        marks = await line.buffer.recent(versions.pair)
        unjudged = [id for id, mark in marks.items() if mark == "different" and id != skip]
        unknown = [id for id, mark in marks.items() if not mark]
        left = len(unknown)
        ids = random.sample(unjudged, len(unjudged)) + random.sample(unknown, left)
        async with aclosing(self._answered(line, versions, ids)) as answered:
            async for found in answered:
                query = found.query
                left -= not marks[query.id]
                await line.buffer.mark(query.id, versions.pair, "different" if found.differs else "same")
                if found.differs:
                    return NextPair(pair=await self._blind(line, versions, found), left=left)
        return NextPair(left=left)

    async def judge(self, line: Line, versions: Versions, query_id: str, choice: str) -> bool:
        """Note which answer of a pair is right, anew where it was judged; False where there is no such pair."""
        if choice in ("first", "second"):
            is_new = (choice == "first") == line.buffer.coin(query_id, versions.pair)
            choice = "only_new" if is_new else "only_old"
        return await line.buffer.mark(query_id, versions.pair, choice)

    async def diff(
        self, line: Line, versions: Versions, limit: int, after: str | None, with_images: bool
    ) -> VersionDiff:
        """What lies between two versions, with up to `limit` changed answers, the newest first.

        Raises StoreError, QueueFull where others need the model, and what the engine raises.
        """
        old, new = [await asyncio.to_thread(line.store.manifest, each) for each in (versions.old, versions.new)]
        kept = sorted(await line.buffer.recent(versions.pair), reverse=True)
        ids = [id for id in kept if after is None or id < after]
        changed: list[ChangedAnswer] = []
        last, compared = after, 0
        if limit:
            async with aclosing(self._answered(line, versions, ids)) as answered:
                async for found in answered:
                    last, compared = found.query.id, compared + 1
                    if found.differs:
                        changed.append(await _changed(found, with_images))
                    if len(changed) == limit:
                        break
        is_more = bool(limit) and len(changed) < limit and any(last is None or id < last for id in ids)
        return VersionDiff(
            adapter=line.name,
            old=version_name(versions.old),
            new=version_name(versions.new),
            facts=_differing({name: (_told(old, name), _told(new, name)) for name in FACTS}),
            metrics=_differing(_beside(old.metrics, new.metrics)),
            gate=_differing(_beside(_gate(old), _gate(new))),
            compared=compared,
            answers=changed,
            next_after=last if is_more else None,
        )

    async def _answered(
        self, line: Line, versions: Versions, ids: Sequence[str]
    ) -> AsyncGenerator[Compared, None]:
        """Queries with the answers of both versions, as many as there is time for; what is gone is left out."""
        until = asyncio.get_running_loop().time() + PATIENCE_S
        num = 0
        async with self._turn():
            for query_id in ids:
                query = await line.buffer.recall(query_id)
                if query is None:
                    continue
                answers = []
                for version in (versions.old, versions.new):
                    if not await self._quiet(line, until):
                        if num:
                            return
                        raise QueueFull
                    outcome = await line.engine.answer(query, self._sampling, version_name(version))
                    answers.append(outcome.text)
                yield Compared(query, *answers)
                num += 1

    @asynccontextmanager
    async def _turn(self) -> AsyncGenerator[None, None]:
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._one_at_a_time.acquire()
        except TimeoutError:
            raise QueueFull from None
        try:
            yield
        finally:
            self._one_at_a_time.release()

    async def _quiet(self, line: Line, until: float) -> bool:
        """Wait while anybody waits for the model; False where it is too late."""
        now = asyncio.get_running_loop().time
        while line.engine.waiting and now() < until:
            await asyncio.sleep(POLL_S)
        return now() < until

    async def _blind(self, line: Line, versions: Versions, found: Compared) -> Pair:
        query, answers = found.query, (found.old, found.new)
        first, second = answers[::-1] if line.buffer.coin(query.id, versions.pair) else answers
        images = await asyncio.to_thread(as_uris, query.images, SIDE)
        labels = list(query.labels)
        return Pair(id=query.id, question=query.question, labels=labels, images=images, first=first, second=second)


async def _changed(found: Compared, with_images: bool) -> ChangedAnswer:
    query = found.query
    return ChangedAnswer(
        query_id=query.id,
        question=query.question,
        labels=list(query.labels),
        images=await asyncio.to_thread(as_uris, query.images, SMALL_SIDE) if with_images else [],
        old=found.old,
        new=found.new,
    )


def as_uris(images: Sequence[Image.Image], side: int) -> list[str]:
    """Images as `data:` URIs of JPEG files, none longer than `side` pixels."""
    made = []
    for image in images:
        small, file = image.copy(), io.BytesIO()
        small.thumbnail((side, side))
        small.save(file, "JPEG", quality=90)
        made.append("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode())
    return made


def _told(made: Manifest, fact: str) -> Any:
    value = getattr(made, fact)
    return version_name(value) if fact == "parent" and value is not None else value


def _gate(made: Manifest) -> Mapping[str, Any]:
    found: Mapping[str, Any] = (made.gate or {}).get("metrics", {})
    return found


def _beside(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (old.get(name), new.get(name)) for name in sorted(old.keys() | new.keys())}


def _differing(values: Mapping[str, tuple[Any, Any]]) -> dict[str, Change]:
    return {name: Change(old=old, new=new) for name, (old, new) in values.items() if old != new}
