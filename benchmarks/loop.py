"""Is the event loop ever held? Large images and long lists of labels, with the loop watching itself.

    python -m benchmarks.loop [--rounds 8] [--clients 12]

nano is served in asyncio's debug mode, which writes down every callback that holds the loop for over 100 ms. In
each round the clients ask at once: a third send a PNG of 1,500 x 1,500 pixels (6.8 MB) as a form, a third the same
in JSON, a third 900 labels.

Last line of stdout: JSON. `blocks_over_100ms` counts the callbacks while requests were served, `longest_ms` is the
longest of them; `failed` counts questions without an answer.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import re

import httpx2
from PIL import Image

from benchmarks.models import checkpoint
from benchmarks.servers import Server, running

LABELS = [f"label {number}" for number in range(900)]
HELD = re.compile(r"took (\d+\.\d+) seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--clients", type=int, default=12)
    options = parser.parse_args()
    with running(
        "ours", checkpoint("nano"), 1, environment={"PYTHONASYNCIODEBUG": "1"}, queue_wait_s=600
    ) as server:
        before = len(held_s(server))  # starting holds the loop, and nobody waits yet
        statuses = [asyncio.run(ask_at_once(server, options.clients)) for _ in range(options.rounds)]
        held = held_s(server)[before:]
    figures = {
        "blocks_over_100ms": len(held),
        "longest_ms": round(1e3 * max(held, default=0.0)),
        "failed": sum(status != 200 for each in statuses for status in each),
        "n": options.rounds * options.clients,
    }
    print(json.dumps(figures))


def held_s(server: Server) -> list[float]:
    """Seconds of each callback that held the loop for long."""
    return [float(found) for found in HELD.findall(server.log.read_text())]


async def ask_at_once(server: Server, clients: int) -> list[int]:
    """Statuses of questions of all three kinds."""
    large, small = picture(1500), picture(96)
    asked = [
        {"files": {"image": large}, "data": {"question": "what is it?"}},
        {"json": {"image": as_uri(large), "question": "what is it?"}},
        {"json": {"image": as_uri(small), "candidate_labels": LABELS}},
    ]
    async with httpx2.AsyncClient(timeout=300) as http:
        replies = [http.post(server.url, **asked[number % len(asked)]) for number in range(clients)]
        return [reply.status_code for reply in await asyncio.gather(*replies)]


def picture(side: int) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((side, side), 80).convert("RGB").save(file, "PNG", compress_level=0)
    return file.getvalue()


def as_uri(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


if __name__ == "__main__":
    main()
