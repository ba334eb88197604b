"""What a user writes with the SDK. Type checkers read it beside the wheel (test_package.py); it is never run."""

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from servetune import AsyncClient, Client
from servetune.clients import Answer, APIStatusError, Delta, Event, QueueFullError, RawResponse, VersionInfo


def images() -> Iterator[Answer]:
    with Client("http://127.0.0.1:8000", api_key="k", timeout=5.0, headers={"traceparent": "00-1"}) as client:
        picture = Image.new("RGB", (4000, 10))
        yield client.answer("photo.png", "What is this?")
        yield client.answer(Path("photo.png"), "What is this?", temperature=0.5, n=4)
        yield client.answer("https://example.org/photo.png", "What is this?", adapt=False)
        yield client.answer(b"...", "What is this?", adapt="now", deadline_s=1.0)
        yield client.answer(io.BytesIO(b"..."), "What is this?")
        yield client.answer(picture, "What is this?", resize=True)
        yield client.answer(np.zeros((8, 8, 3), np.uint8), "What is this?")
        yield client.recognize([picture, "photo.png"], ["airplane", "rocket"], top_k=1)
        with open("photo.png", "rb") as file:
            yield client.answer(file, "What is this?")


def numbers(client: Client) -> float:
    answer = client.answer("photo.png", "What is this?")
    text: str | None = answer.answer
    version: str = answer.adapter.version
    parts: list[str] = [part.text for part in client.stream("a.png", "?") if isinstance(part, Delta)]
    both: list[Answer | APIStatusError] = client.answer_batch([{"image": "a.png", "question": "?"}])
    once: RawResponse[Answer] = client.raw(client.answer, "a.png", "What is this?", timeout=2.0)
    kept: VersionInfo = client.with_options(max_retries=0).adapters.snapshot("kept", {"by": "me"})
    for event in client.adaptation.events(follow=False):
        said: Event = event
        print(said.kind, text, version, parts, both, once.request_id)
    for each in client.adapters.versions():
        print(each.version, client.wait_for_version(each.version))
    try:
        client.adapters.promote(kept.version)
    except QueueFullError as error:
        return error.retry_after or 0.0
    return once.value.confidence or 0.0


async def later() -> str | None:
    async with AsyncClient(max_retries=0) as client:
        async for part in client.stream("photo.png", "What is this?"):
            if isinstance(part, Answer):
                return part.answer
        raw = await client.raw(client.adapters.get, "default")
        rows = [row async for row in client.adapters.versions()]
        answer = await client.answer("photo.png", "What is this?")
        return answer.answer or raw.value.live or rows[0].version


if __name__ == "__main__":
    print(asyncio.run(later()))
