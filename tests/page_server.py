"""The real app on fakes and a real history, as a process of its own: home, port, Redis URL.

What it is told on standard input, a JSON array each line, becomes an event of its history.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from pathlib import Path

import uvicorn

from servetune.clients.types import WorkerStatus
from servetune.server.history import History, Recorder
from servetune.server.main import _Server
from servetune.server.protocol import TimelyProtocol
from tests.fakes import World

VERDICT = {
    "accepted": False,
    "early": False,
    "reasons": ["kl_step 0.412 is above 0.3"],
    "metrics": {"kl_step": 0.412, "kl_base": 0.6, "valid": 1.0},
}


def main(home: str, port: str, redis_url: str) -> None:
    """Serve until told to end."""
    history = History.connect(redis_url)
    world = World(Path(home), history=history)
    world.buffer.worker = WorkerStatus(state="idle", version="v0002", steps=48, last_verdict=VERDICT)
    world.buffer.reviews = True
    world.engine.texts = {0: "a bird", 1: "an old thing"}
    config = uvicorn.Config(world.app, http=TimelyProtocol, port=int(port), log_level="error")
    threading.Thread(target=listen, args=(redis_url,), daemon=True).start()
    asyncio.run(_Server(config, None, history).serve())


def listen(redis_url: str) -> None:
    recorder = Recorder.connect(redis_url)
    for line in sys.stdin:
        recorder.record("default", *json.loads(line))


if __name__ == "__main__":
    main(*sys.argv[1:])
