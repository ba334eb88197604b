"""`servetune bench`: what a running server answers in a second, as one of its clients sees it."""

from __future__ import annotations

import asyncio
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence

from pydantic import BaseModel

from servetune.clients import Answer, APIConnectionError, APIStatusError, AsyncClient

SIDE = 96  # of a picture of ours, in pixels


class Figures(BaseModel):
    """What was measured. Times are in milliseconds, from a question's sending to its answer."""

    questions: int
    answered: int
    failed: dict[str, int]
    seconds: float
    per_s: float
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    model_p50_ms: float | None
    versions: dict[str, int]


async def measure(
    client: AsyncClient,
    pictures: Sequence[str | bytes],
    question: str | None,
    labels: Sequence[str],
    questions: int,
    at_once: int,
    listen: Callable[[int], None] = lambda done: None,
) -> Figures:
    """Ask so many questions, `at_once` of them at any time, of which the server keeps none.

    One more is asked before, and not counted: it raises what is wrong with all of them.

    Args:
        pictures: are taken in turn; without any each question has one of its own.
        listen: is told how many were answered or failed.
    """
    answers: list[tuple[float, Answer]] = []
    failed: Counter[str] = Counter()
    left = iter(range(questions))

    async def ask(number: int) -> Answer:
        image = pictures[number % len(pictures)] if pictures else picture(number)
        if labels:
            return await client.recognize(image, list(labels), question=question, adapt=False)
        return await client.answer(image, question or "What is this?", adapt=False)

    async def go_on() -> None:
        for number in left:
            began = time.perf_counter()
            try:
                answer = await ask(number)
                answers.append((time.perf_counter() - began, answer))
            except APIStatusError as error:
                failed[error.problem.code if error.problem else str(error.status)] += 1
            except APIConnectionError:
                failed["no_connection"] += 1
            listen(len(answers) + failed.total())

    await ask(questions)
    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(min(at_once, questions)):
            group.create_task(go_on())
    return _figures(questions, answers, failed, time.perf_counter() - began)


def picture(number: int) -> bytes:
    """A PNG unlike those of other numbers, so that nothing that was kept of one answers another."""
    color = zlib.crc32(number.to_bytes(8, "big")).to_bytes(4, "big")
    rows = b"".join(
        b"\0" + b"".join(bytes(((x * 2) ^ color[0], (y * 2) ^ color[1], color[2])) for x in range(SIDE))
        for y in range(SIDE)
    )
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def _figures(
    questions: int, answers: Sequence[tuple[float, Answer]], failed: Counter[str], seconds: float
) -> Figures:
    spent = sorted(spent_s for spent_s, _ in answers)
    computed = sorted(answer.timings.inference_s for _, answer in answers)
    names = (f"{answer.adapter.name}@{answer.adapter.version}" for _, answer in answers)
    return Figures(
        questions=questions,
        answered=len(answers),
        failed=dict(failed),
        seconds=round(seconds, 3),
        per_s=round(len(answers) / seconds, 2) if seconds else 0.0,
        p50_ms=_ms(spent, 0.5),
        p95_ms=_ms(spent, 0.95),
        p99_ms=_ms(spent, 0.99),
        model_p50_ms=_ms(computed, 0.5),
        versions=dict(Counter(names)),
    )


def _ms(ascending: Sequence[float], share: float) -> float | None:
    return round(1e3 * ascending[min(len(ascending) - 1, int(share * len(ascending)))], 2) if ascending else None
