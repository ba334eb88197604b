"""Serving one checkpoint: servetune against a plain FastAPI + `generate` server, `transformers serve` and vLLM.

    python -m benchmarks.serve [--models nano mid] [--peers plain transformers vllm] [--clients 1 8 32]

Every server has the same checkpoint, the same two threads and the machine to itself; servers take turns,
`rounds` times. Clients ask one short question after the other over HTTP (at most 5 tokens, greedy) about unseen
images. `transformers serve` and vLLM run in environments of their own, which the first call installs. None of
the servers refuses anybody: ours is told to let requests wait.

Last line of stdout: JSON. `throughput_ratio_PEER` and `latency_ratio_PEER` are the minimum over models and numbers
of clients of ours / theirs in answers per second, and of theirs / ours in the median seconds of an answer: larger
is better for us; `ratios` has each. `runs` has n, answers per second, p50 and p99. `failed` counts answers of ours
that were no answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from typing import Any

from benchmarks.load import SIDES, closed_loop, pictures
from benchmarks.models import checkpoint
from benchmarks.servers import running

CANNOT = {("mid", "transformers")}
"""`transformers serve` wants torchvision for InternVL, and there is no build of it for CPUs in the registry."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["nano", "mid"])
    parser.add_argument("--peers", nargs="*", default=["plain", "transformers", "vllm"])
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
                if (model, name) in CANNOT:
                    continue
                patient = {"queue_wait_s": 600} if name == "ours" else {}
                with running(name, checkpoint(model), options.threads, **patient) as server:
                    asyncio.run(closed_loop(server, images, 2, 3.0))  # to warm up
                    for clients in options.clients:
                        one = asyncio.run(closed_loop(server, images, clients, options.seconds))
                        found.setdefault((name, clients), []).append(one.summary())
        for (name, clients), several in found.items():
            runs[f"{model} {name} {clients}"] = {
                key: round(statistics.median(one[key] for one in several), 4) for key in several[0]
            }
            print(f"{model} {name} {clients}: {json.dumps(runs[f'{model} {name} {clients}'])}", flush=True)
    print(json.dumps(ratios(runs, options.peers) | {"runs": runs}))


def ratios(runs: dict[str, dict[str, float]], peers: list[str]) -> dict[str, Any]:
    """Of each peer, model and number of clients, and the least favourable of each."""
    found: dict[str, Any] = {"failed": sum(run["failed"] for name, run in runs.items() if " ours " in name)}
    each: dict[str, dict[str, float]] = {}
    for name, run in runs.items():
        model, peer, clients = name.split()
        if peer in peers:
            ours = runs[f"{model} ours {clients}"]
            each[name] = {
                "throughput": round(ours["per_s"] / run["per_s"], 3),
                "latency": round(run["p50_s"] / ours["p50_s"], 3),
            }
    for peer in peers:
        pairs = [pair for name, pair in each.items() if f" {peer} " in name]
        for kind in ("throughput", "latency") if pairs else ():
            found[f"{kind}_ratio_{peer}"] = min(pair[kind] for pair in pairs)
    return found | {"ratios": each}


if __name__ == "__main__":
    main()
