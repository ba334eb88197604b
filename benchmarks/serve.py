"""Serving one checkpoint: servetune against a plain FastAPI + `generate` server and vLLM, over HTTP.

    python -m benchmarks.serve [--models nano mid] [--peers plain vllm] [--clients 1 8 32] [--rounds 3]

Every server has the same checkpoint, the same two threads and the machine to itself; servers take turns, `rounds`
times. Clients ask one short question after the other (at most 5 tokens, greedy) about images that nobody has seen
before. vLLM runs in an environment of its own, which the first call installs.

Last line of stdout: JSON. `throughput_ratio_vllm`, `latency_ratio_vllm`, `throughput_ratio_plain` and
`latency_ratio_plain` are the minimum over models and numbers of clients of ours / theirs in answers per
second, and of theirs / ours in the median seconds of an answer: larger is better for us. `runs` has n,
answers per second, p50 and p99 of each. `failed` counts answers that were no answers.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import torch
from PIL import Image

from benchmarks.models import checkpoint
from benchmarks.servers import Server, running

QUESTION = "what is the answer in this image?"
TOKENS = 5
SIDES = {"nano": 96, "mid": 448}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["nano", "mid"])
    parser.add_argument("--peers", nargs="*", default=["plain", "vllm"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    runs: dict[str, dict[str, float]] = {}
    for model in options.models:
        images = pictures(SIDES.get(model, 448))
        found: dict[tuple[str, int], list[dict[str, float]]] = {}
        for _ in range(options.rounds):
            for name in ("ours", *options.peers):
                with running(name, checkpoint(model), options.threads) as server:
                    asyncio.run(load(server, images, 2, 3.0))  # to warm up
                    for clients in options.clients:
                        one = asyncio.run(load(server, images, clients, options.seconds))
                        found.setdefault((name, clients), []).append(one)
        for (name, clients), several in found.items():
            runs[f"{model} {name} {clients}"] = {
                key: round(statistics.median(one[key] for one in several), 4) for key in several[0]
            }
            print(f"{model} {name} {clients}: {json.dumps(runs[f'{model} {name} {clients}'])}", flush=True)
    print(json.dumps(ratios(runs, options.peers) | {"runs": runs}))


def ratios(runs: dict[str, dict[str, float]], peers: list[str]) -> dict[str, float]:
    """The least favourable of each."""
    found: dict[str, float] = {"failed": sum(run["failed"] for name, run in runs.items() if " ours " in name)}
    for peer in peers:
        pairs = [
            (runs[name.replace(f" {peer} ", " ours ")], run) for name, run in runs.items() if f" {peer} " in name
        ]
        found[f"throughput_ratio_{peer}"] = round(min(a["per_s"] / b["per_s"] for a, b in pairs), 3)
        found[f"latency_ratio_{peer}"] = round(min(b["p50_s"] / a["p50_s"] for a, b in pairs), 3)
    return found


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


async def load(server: Server, images: Iterator[str], clients: int, seconds: float) -> dict[str, float]:
    """Closed loop: every client asks again when it has its answer."""
    times: list[float] = []
    failed = 0
    began = time.perf_counter()
    async with httpx2.AsyncClient(timeout=120, limits=httpx2.Limits(max_connections=clients)) as http:

        async def client() -> None:
            nonlocal failed
            while time.perf_counter() - began < seconds:
                body: Any = server.ask(next(images), QUESTION, TOKENS)
                asked = time.perf_counter()
                reply = await http.post(server.url, json=body)
                times.append(time.perf_counter() - asked)
                failed += reply.status_code != 200

        await asyncio.gather(*(client() for _ in range(clients)))
    spent = time.perf_counter() - began
    times.sort()
    return {
        "n": len(times),
        "per_s": len(times) / spent,
        "p50_s": times[len(times) // 2],
        "p99_s": times[min(len(times) - 1, int(len(times) * 0.99))],
        "failed": failed,
    }


if __name__ == "__main__":
    main()
