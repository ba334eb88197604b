"""Four times as many questions as can be answered: is the server as useful as ever, and who waits how long?

    python -m benchmarks.overload [--model mid] [--seconds 60] [--times 4] [--queue-wait S]

Open-loop load of short questions about unseen images, at 0.8 times the capacity and then at `times` it. Capacity
is the most that clients get, be they as many as the model answers in one batch, each of which asks again when it
has its answer, or four times as many questions as that makes.

Last line of stdout: JSON. `goodput_ratio` is answers per second under overload over capacity; `admitted_p99_ratio`
is the p99 of those answers over that at 0.8 times the capacity, each counted from when its question was due;
`only_429_503` is 1 if whoever got no answer got one of these two statuses, 99 % of them within `refused_p99_s`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

from benchmarks.load import SIDES, closed_loop, open_loop, pictures, quantile
from benchmarks.models import checkpoint
from benchmarks.servers import Server, resident_mb, running

CLIENTS = 32
CALM = 0.8  # of the capacity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mid")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--times", type=float, default=4.0)
    parser.add_argument("--queue-wait", type=float, help="seconds; the server's own default where not given")
    parser.add_argument("--clients", type=int, default=CLIENTS, help="that never wait, to know the capacity")
    parser.add_argument("--threads", type=int, default=1, help="of the server; clients need a processor too")
    options = parser.parse_args()
    settings = {} if options.queue_wait is None else {"queue_wait_s": options.queue_wait}
    with running("ours", checkpoint(options.model), options.threads, **settings) as server:
        print(json.dumps(asyncio.run(measure(server, options))))


async def measure(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    images = pictures(SIDES.get(options.model, 448))
    await closed_loop(server, images, 2, 3.0)  # to warm up
    capacity = (await closed_loop(server, images, options.clients, options.seconds / 3)).per_s
    # Clients that wait for each other leave gaps; a server that is never without work shows what it can do.
    capacity = max(capacity, (await open_loop(server, images, 4 * capacity, options.seconds / 3)).per_s)
    calm = await open_loop(server, images, CALM * capacity, options.seconds)
    print(f"capacity {capacity:.1f}/s; at {CALM} of it: {json.dumps(calm.summary())}", flush=True)
    before_mb = resident_mb(server.pid)
    full = await open_loop(server, images, options.times * capacity, options.seconds, seed=1)
    print(f"at {options.times:g} times it: {json.dumps(full.summary())}, {dict(full.refused)}", flush=True)
    return {
        "goodput_ratio": round(full.per_s / capacity, 3),
        "admitted_p99_ratio": round(full.quantile(0.99) / calm.quantile(0.99), 3),
        "only_429_503": int(full.refused.keys() <= {429, 503}),
        "capacity_per_s": round(capacity, 2),
        "answered": len(full.times),
        "refused": full.refused.total(),
        "refused_when_calm": calm.refused.total(),
        "refused_p99_s": round(quantile(full.refused_times, 0.99), 3),
        "grown_mb": round(resident_mb(server.pid) - before_mb, 1),
        "p99_s": {"calm": round(calm.quantile(0.99), 3), "overload": round(full.quantile(0.99), 3)},
    }


if __name__ == "__main__":
    main()
