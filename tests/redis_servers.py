"""Real servers for the buffer's tests: the embedded Valkey and Debian's redis-server."""

from __future__ import annotations

import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from PIL import Image

from servetune.adapters.types import Query
from servetune.server.buffer import QueryBuffer, QueryStream
from servetune.server.settings import Settings
from servetune.server.valkey import EmbeddedValkey, find_binary

SERVERS = ("valkey", "redis-server")


def binary(name: str) -> Path:
    """The server called `name`; skips the test where it is not installed."""
    if name == "valkey":
        return find_binary()
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not on PATH")
    return Path(path)


@contextmanager
def running(home: Path, name: str = "valkey") -> Iterator[EmbeddedValkey]:
    """A server of the embedded kind, from either program."""
    server = EmbeddedValkey.start(home, 10_000_000, binary(name))
    try:
        yield server
    finally:
        server.stop()


@asynccontextmanager
async def open_buffer(settings: Settings, url: str) -> AsyncIterator[QueryBuffer]:
    buffer = QueryBuffer.connect(settings, url)
    try:
        yield buffer
    finally:
        await buffer.close()


@contextmanager
def open_stream(settings: Settings, url: str, consumer: str = "worker") -> Iterator[QueryStream]:
    stream = QueryStream.connect(settings, url, consumer)
    try:
        yield stream
    finally:
        stream.close()


def make_query(number: int, question: str = "what is this?", side: int = 8) -> Query:
    """A query unlike any other: the number is in its pixels."""
    image = Image.new("RGB", (side, side), (number % 256, number // 256 % 256, number // 65536))
    return Query(f"q_{number}", (image,), question)


def eventually(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
