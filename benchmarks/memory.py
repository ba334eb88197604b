"""What a worker beside the server, and what adapters, cost in memory.

    python -m benchmarks.memory [--model large] [--adapters 1 50 100 200]

A random model of 1.5 GB (`large`) is served twice, alone and with its worker beside it, which makes real steps on
what the server was asked (in paper mode: votes of random weights are not worth learning, and the default learner
knows). Memory is PSS: pages that several processes map are divided among them. Then `mid` is served from a store
with a growing number of versions, each of which is asked once.

Last line of stdout: JSON. `pss_ratio` is server and worker over the server alone, with all their processes, once
everything is answered and learned, `pss_ratio_at_most` the same of the largest moment on either side;
`libraries_mb` is what a process costs that has imported everything and loaded nothing. `kb_per_adapter` is by how
much the server grows per registered version, by least squares over all but the first number, when all slots are
in use; `disk_kb_per_adapter` is what a version takes in the store.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.load import pictures
from benchmarks.models import checkpoint
from benchmarks.servers import Server, adaptation, num_steps, processes, running
from benchmarks.swap import publish
from servetune.adapters.store import AdapterStore
from servetune.server.model import load_policy, open_store
from servetune.server.settings import Settings
from servetune.server.stage import SLOTS

LABELS = ["cat", "dog", "red", "green", "blue", "yes", "no", "0", "1", "2"]
QUERIES = 4
PATIENCE_S = 600.0
REST_S = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="large")
    parser.add_argument("--adapters", nargs="+", type=int, default=[1, 50, 100, 200])
    options = parser.parse_args()
    sizes = {}
    for worker in (False, True):
        with tempfile.TemporaryDirectory() as home:
            sizes[worker] = asyncio.run(beside(options.model, Path(home), worker))
            print(f"{'with' if worker else 'without'} a worker: {json.dumps(sizes[worker])}", flush=True)
    found: dict[str, Any] = {
        "pss_ratio": ratio(sizes, "rest"),
        "pss_ratio_at_most": ratio(sizes, "most"),
        "libraries_mb": libraries(),
        "alone_mb": sizes[False],
        "beside_mb": sizes[True],
    }
    with tempfile.TemporaryDirectory() as home:
        found |= asyncio.run(adapters(options.adapters, Path(home)))
    print(json.dumps(found))


def ratio(sizes: dict[bool, dict[str, dict[str, float]]], when: str) -> float:
    """With a worker over without."""
    return round(sum(sizes[True][when].values()) / sum(sizes[False][when].values()), 3)


async def beside(model: str, home: Path, worker: bool) -> dict[str, dict[str, float]]:
    """MB of PSS by kind of process: at most, and at rest once all is answered and learned."""
    chosen = {"worker": worker, "worker_threads": 1, "queue_wait_s": 600, "request_timeout_s": 600}
    chosen |= {"learner": "ttrv", "queries_per_step": QUERIES}
    with running("ours", checkpoint(model), 1, home, **chosen) as server:
        await ask(server, QUERIES, adapt=worker)
        sizes, deadline = [pss(server)], time.monotonic() + PATIENCE_S
        while worker and await num_learned(server, home) < QUERIES:
            if time.monotonic() > deadline:
                raise SystemExit(f"the worker did not learn from {QUERIES} queries in {PATIENCE_S:g} s")
            await asyncio.sleep(0.5)
            sizes.append(pss(server))
        if worker and await num_steps(server, home) < 1:
            raise SystemExit("the worker made no step: there is nothing to measure")
        await asyncio.sleep(REST_S)
        return {"rest": pss(server), "most": max(sizes, key=lambda one: sum(one.values()))}


async def num_learned(server: Server, home: Path) -> int:
    """How many queries are settled."""
    found = await adaptation(server, home)
    return sum(found["buffer"]["ledger"][name] for name in ("trained", "no_signal", "rejected"))


def pss(server: Server) -> dict[str, float]:
    return {kind: round(sum(map(pss_kb, pids)) / 1024, 1) for kind, pids in processes(server.pid).items()}


async def ask(server: Server, queries: int, adapt: bool, adapter: str = "live") -> float:
    """Recognition queries about unseen images, one after the other; seconds of the slowest."""
    times = []
    async with httpx2.AsyncClient(timeout=600) as http:
        for _, image in zip(range(queries), pictures(448), strict=False):
            body = {"image": image, "candidate_labels": LABELS, "adapt": adapt, "adapter": adapter}
            began = time.perf_counter()
            (await http.post(server.url, json=body)).raise_for_status()
            times.append(time.perf_counter() - began)
    return max(times)


async def adapters(numbers: list[int], home: Path) -> dict[str, Any]:
    """What registered versions cost a server, from the fewest to the most of them."""
    folder = str(checkpoint("mid"))
    settings = Settings(home=home, model=folder)
    policy = load_policy(settings, SLOTS, 1)
    store = open_store(settings, policy)
    sizes, first = [], []
    # Kept prompts grow with every version that is asked, up to their own limit: they are not what a version costs.
    with running("ours", checkpoint("mid"), 1, home, prompt_cache_bytes=0) as server:
        for before, number in zip([0, *numbers], numbers, strict=False):
            for seed in range(before, number):
                version = publish(policy, store, seed)
                first.append(await ask(server, 1, False, f"v{version:04d}"))
            sizes.append(sum(pss(server).values()))
            print(f"{number} versions: {sizes[-1]:.1f} MB", flush=True)
    slope = statistics.linear_regression(numbers[1:], sizes[1:]).slope if len(numbers) > 2 else None
    return {
        "kb_per_adapter": None if slope is None else round(1024 * slope, 1),
        "disk_kb_per_adapter": round(_disk_kb(store) / (len(store.versions()) or 1), 1),
        "first_answer_p50_s": round(statistics.median(first), 3),
    }


def libraries() -> float:
    """MB of PSS of a process that has imported what a server needs, and loaded no model."""
    code = "import servetune.server.app, servetune.server.model, sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        size = pss_kb(process.pid)
        process.communicate()
    return round(size / 1024, 1)


def pss_kb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def _disk_kb(store: AdapterStore) -> float:
    return sum(path.stat().st_size for path in store.folder.rglob("*") if path.is_file()) / 1024


if __name__ == "__main__":
    main()
