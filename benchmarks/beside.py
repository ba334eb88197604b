"""Does serving feel the learner? The same load with the learner busy and stopped, by turns, on one server.

    python -m benchmarks.beside [--rounds 5] [--seconds 15] [--queries 640]

nano is served with its worker beside it, one thread each. First the worker gets a backlog: unseen drawings to
be recognised among 327 names. Then rounds alternate: in one the worker learns, in the other it is stopped
(SIGSTOP), and either way the server answers short questions about unseen images, first as they come at 60 % of
its capacity (open loop), then from 8 clients that never wait (closed loop). Those questions are not learned
from.

Last line of stdout: JSON. `p50_ratio` and `p99_ratio` are times with the learner busy over times with it
stopped, the median over rounds of the open loop's quantile on either side: a shared machine stops for half a
second now and then, and one such stop is the p99 of its round. `throughput_ratio` is the median over rounds of
the closed loop's. Learning is real: `learner_steps_per_minute` counts its steps while it was busy. `errors` counts
questions without an answer.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import signal
import statistics
import tempfile
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.load import SIDES, Load, closed_loop, open_loop, pictures
from benchmarks.models import checkpoint
from benchmarks.servers import Server, num_steps, processes, running
from servetune.evals import streams

CLIENTS = 8
SHARE = 0.6  # of the capacity
STREAM = "fluent-emoji-flat"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--queries", type=int, default=640)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        # The lease outlives a pause, and nobody is refused: what would be refused could not be compared.
        chosen = {"worker": True, "worker_threads": 1, "lease_s": 3600, "queue_wait_s": 600}
        with running("ours", checkpoint("nano"), 1, Path(home), **chosen) as server:
            print(json.dumps(asyncio.run(measure(server, Path(home), options))))


async def measure(server: Server, home: Path, options: argparse.Namespace) -> dict[str, Any]:
    images = pictures(SIDES["nano"])
    [worker] = processes(server.pid)["worker"]
    os.kill(worker, signal.SIGSTOP)
    await fill(server, options.queries)
    await closed_loop(server, images, 2, 3.0)  # to warm up
    capacity = (await closed_loop(server, images, CLIENTS, options.seconds)).per_s
    opened: dict[bool, list[Load]] = {True: [], False: []}
    ratios, steps, errors = [], 0, 0
    for number in range(options.rounds):
        rates = {}
        for busy in (True, False) if number % 2 else (False, True):
            os.kill(worker, signal.SIGCONT if busy else signal.SIGSTOP)
            before = await num_steps(server, home)
            opened[busy].append(await open_loop(server, images, SHARE * capacity, options.seconds, number))
            closed = await closed_loop(server, images, CLIENTS, options.seconds)
            errors += opened[busy][-1].refused.total() + closed.refused.total()
            rates[busy] = closed.per_s
            steps += busy * (await num_steps(server, home) - before)
        ratios.append(rates[True] / rates[False])
        print(f"round {number + 1}: throughput ratio {ratios[-1]:.3f}, steps so far {steps}", flush=True)
    minutes = 2 * options.seconds * options.rounds / 60
    p50_s, p99_s = (
        {busy: statistics.median(load.quantile(share) for load in loads) for busy, loads in opened.items()}
        for share in (0.5, 0.99)
    )
    return {
        "p50_ratio": round(p50_s[True] / p50_s[False], 3),
        "p99_ratio": round(p99_s[True] / p99_s[False], 3),
        "throughput_ratio": round(statistics.median(ratios), 3),
        "learner_steps_per_minute": round(steps / minutes, 1),
        "errors": errors,
        "capacity_per_s": round(capacity, 1),
        "n": sum(len(load.times) for load in opened[True]),
        "p50_s": {"busy": p50_s[True], "stopped": p50_s[False]},
        "p99_s": {"busy": p99_s[True], "stopped": p99_s[False]},
    }


async def fill(server: Server, queries: int) -> None:
    """Queries to learn from."""
    async with httpx2.AsyncClient(timeout=60) as http:
        for item in streams.load(STREAM).items[:queries]:
            file = io.BytesIO()
            item.picture().save(file, "PNG")
            form = {"candidate_labels": json.dumps(item.labels)}
            reply = await http.post(server.url, files={"image": file.getvalue()}, data=form)
            if reply.json()["adaptation"]["status"] != "queued":
                raise SystemExit(f"a query was not kept: {reply.json()['adaptation']}")


if __name__ == "__main__":
    main()
