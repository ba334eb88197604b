"""Load for the benchmarks of serving: unseen pictures, closed and open loops, and what came of them.

The client shares the processors with the server that it measures, so it is a light one (aiohttp: a fifth of what a
request costs with httpx2).
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import aiohttp
import torch
from PIL import Image

from benchmarks.servers import Server

QUESTION = "what is the answer in this image?"
TOKENS = 5
PAUSE_S = 0.05  # of a client that was refused
AHEAD = 64  # questions made before they are asked
JSON = {"Content-Type": "application/json"}
SIDES = {"nano": 96, "mid": 448}
"""Sides of the pictures that a model is asked about, in pixels."""


@dataclass(slots=True)
class Load:
    """Seconds that each answer took, until when the last came, and how often and how fast another status came."""

    times: list[float] = field(default_factory=list)
    spent_s: float = 0.0
    refused: Counter[int] = field(default_factory=Counter)
    refused_times: list[float] = field(default_factory=list)

    @property
    def per_s(self) -> float:
        return len(self.times) / self.spent_s

    def quantile(self, share: float) -> float:
        """Seconds that this share of the answers took at most."""
        return quantile(self.times, share)

    def summary(self) -> dict[str, float]:
        """n, answers per second, p50 and p99 in seconds, and what was no answer."""
        return {
            "n": len(self.times),
            "per_s": self.per_s,
            "p50_s": self.quantile(0.5),
            "p99_s": self.quantile(0.99),
            "failed": self.refused.total(),
        }


def quantile(times: Sequence[float], share: float) -> float:
    """The value that this share of some values is at most; 0 where there are none."""
    ranked = sorted(times)
    return ranked[min(len(ranked) - 1, int(len(ranked) * share))] if ranked else 0.0


def pictures(side: int) -> Iterator[str]:
    """Data URIs of noise, no two alike."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8)
    for number in itertools.count():
        pixels = base.roll(number + 1, 0)
        pixels[0, 0] = torch.tensor([number % 256, number // 256 % 256, 7], dtype=torch.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(file, "PNG", compress_level=0)
        yield f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


async def closed_loop(server: Server, images: Iterator[str], clients: int, seconds: float) -> Load:
    """Every client asks again when it has its answer, or a moment after it was refused."""
    made = Load()
    with _ahead(_body(server, image) for image in images) as bodies:
        began = time.perf_counter()

        async def client(http: aiohttp.ClientSession) -> None:
            while time.perf_counter() - began < seconds:
                if not await _ask(server, http, next(bodies), made):
                    await asyncio.sleep(PAUSE_S)

        async with _http(clients) as http:
            await asyncio.gather(*(client(http) for _ in range(clients)))
        made.spent_s = time.perf_counter() - began
    return made


async def open_loop(server: Server, images: Iterator[str], per_s: float, seconds: float, seed: int = 0) -> Load:
    """Questions come at random times (a Poisson process), whether or not earlier ones were answered.

    An answer's time counts from when its question was due, so a sender that lags hides nothing.
    """
    made, rng = Load(), random.Random(seed)
    with _ahead(_body(server, image) for image in images) as bodies:
        began = due = time.perf_counter()
        async with _http(4096) as http, asyncio.TaskGroup() as asking:
            while (due := due + rng.expovariate(per_s)) - began < seconds:
                body = next(bodies)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                asking.create_task(_ask(server, http, body, made, due))
    made.spent_s = max(seconds, time.perf_counter() - began)
    return made


@contextmanager
def _ahead(bodies: Iterator[bytes]) -> Iterator[Iterator[bytes]]:
    """The same, made by a thread before they are needed: all clients of a batch may want the next at once."""
    made: queue.Queue[bytes] = queue.Queue(AHEAD)
    done = threading.Event()

    def make() -> None:
        for body in bodies:
            while not done.is_set():
                try:
                    made.put(body, timeout=0.1)
                    break
                except queue.Full:
                    pass
            if done.is_set():
                return

    maker = threading.Thread(target=make, daemon=True)
    maker.start()
    try:
        yield iter(made.get, None)
    finally:
        done.set()
        maker.join()


def _http(connections: int) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=connections)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(300))


def _body(server: Server, image: str) -> bytes:
    return json.dumps(server.ask(image, QUESTION, TOKENS)).encode()


async def _ask(
    server: Server, http: aiohttp.ClientSession, body: bytes, made: Load, asked: float | None = None
) -> bool:
    """Whether there was an answer."""
    asked = time.perf_counter() if asked is None else asked
    try:
        async with http.post(server.url, data=body, headers=JSON) as reply:
            await reply.read()
            status = reply.status
    except (aiohttp.ClientError, TimeoutError):
        status = 0
    spent = time.perf_counter() - asked
    if status == 200:
        made.times.append(spent)
    else:
        made.refused[status] += 1
        made.refused_times.append(spent)
    return status == 200
