"""The default learner on every built-in stream: how much it gains, and whether it ever harms.

`python -m benchmarks.streams [STREAM ...] [--seeds 5] [--jobs 2] [--out .cache/streams]` runs `servetune eval` on
each stream in processes of one thread each, first for two seeds, and shows a table of what is finished.
One seed of all streams takes about 60 CPU minutes; an interrupted call goes on where it was. Corrupted easy-VQA is
measured on the half of its images that development never saw. Another learner can be measured in the same way:
`--learner majority`.

Last line of stdout: JSON. `removed_recognition` and `removed_vqa` are means over streams of the share of held-out
errors that adaptation removed. `worst_mean` and `worst_bound` are the lowest mean over seeds, and the lowest
one-sided 95 % bound of a mean, of adapted minus frozen accuracy over all streams and over held-out files, unseen
labels and source domain; `worst_run` is the lowest single one. `harmed` names what is below -0.02 in the bound or
below -0.05 in a run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

RECOGNITION = ("fluent-emoji-flat", "openmoji", "streamline-emojis")
VQA = tuple(f"easy-vqa-{kind}-final" for kind in ("noise", "contrast", "blur", "occlusion"))
OTHERS = ("mixed", "drifting", "hostile-wrong", "hostile-attacker", "hostile-blank")
KINDS = ("heldout", "unseen_labels", "source")
FIRST = 2  # seeds of every stream are run before the others, so that there is a table to look at
MEAN_MAY_FALL, RUN_MAY_FALL = 0.02, 0.05
# One-sided 95 % quantiles of Student's t by degrees of freedom.
T95 = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83)


def evaluate(stream: str, seeds: int, learner: str, out: Path) -> None:
    """One stream; the seeds that an earlier call finished are read from disk."""
    script = Path(sys.executable).with_name("servetune")
    threads = dict.fromkeys(("OMP_NUM_THREADS", "SERVETUNE_WORKER_THREADS", "SERVETUNE_SERVE_THREADS"), "1")
    threads["SERVETUNE_FEATURE_CACHE_BYTES"] = str(2**30)  # every seed sees the same pictures
    chosen = ["--seeds", str(seeds), "--learner", learner, "--out", str(out / stream)]
    command = [str(script), "eval", stream, *chosen]
    done = subprocess.run(command, text=True, capture_output=True, env=os.environ | threads)
    if done.returncode:
        raise SystemExit(f"{stream} failed:\n{done.stderr[-2000:]}")


def runs(stream: str, learner: str, out: Path, seeds: int) -> list[dict[str, Any]]:
    """The records of a stream's finished runs."""
    paths = [out / stream / "runs" / f"{learner}-{seed}.json" for seed in range(seeds)]
    return [json.loads(path.read_text()) for path in paths]


def changes(records: Sequence[Mapping[str, Any]], kind: str) -> list[float]:
    """Adapted minus frozen accuracy of each seed, where it was measured."""
    figures = [record["figures"] for record in records]
    return [f[f"{kind}_adapted"] - f[f"{kind}_frozen"] for f in figures if f"{kind}_adapted" in f]


def lower_bound(values: Sequence[float]) -> float:
    """One-sided 95 % bound of the mean; of a single value, itself."""
    if len(values) < 2:
        return values[0]
    return fmean(values) - T95[min(len(values) - 2, len(T95) - 1)] * stdev(values) / math.sqrt(len(values))


def removed(records: Sequence[Mapping[str, Any]]) -> float:
    """Share of the errors on held-out files that adaptation removed."""
    frozen, adapted = (fmean(r["figures"][f"heldout_{kind}"] for r in records) for kind in ("frozen", "adapted"))
    return (adapted - frozen) / (1 - frozen)


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Markdown: means over seeds, frozen -> adapted."""
    lines = [
        "| stream | seeds | held out | removed | unseen labels | source | worst window | calibration error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for stream, records in found.items():
        cells = [_pair(records, kind) for kind in (*KINDS, "ece")]
        worst = min(record["figures"]["worst_window"] for record in records)
        row = [
            stream,
            str(len(records)),
            cells[0],
            f"{removed(records):.2f}",
            *cells[1:3],
            f"{worst:.3f}",
            cells[3],
        ]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _pair(records: Sequence[Mapping[str, Any]], kind: str) -> str:
    values = [[r["figures"].get(f"{kind}_{half}") for r in records] for half in ("frozen", "adapted")]
    known = [[value for value in half if value is not None] for half in values]
    return " -> ".join(f"{fmean(half):.3f}" for half in known) if all(known) else "not measured"


def summarise(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The figures of the last line."""
    parts = {(stream, kind): changes(records, kind) for stream, records in found.items() for kind in KINDS}
    parts = {key: values for key, values in parts.items() if values}
    means, bounds = ({key: rule(values) for key, values in parts.items()} for rule in (fmean, lower_bound))
    lowest = {key: min(values) for key, values in parts.items()}
    harmed = [key for key in parts if bounds[key] < -MEAN_MAY_FALL or lowest[key] < -RUN_MAY_FALL]
    return {
        "removed_recognition": _mean(removed(found[name]) for name in RECOGNITION if name in found),
        "removed_vqa": _mean(removed(found[name]) for name in VQA if name in found),
        "worst_mean": round(min(means.values()), 4),
        "worst_bound": round(min(bounds.values()), 4),
        "worst_run": round(min(lowest.values()), 4),
        "harmed": [" ".join(key) for key in harmed],
        "cpu_s": round(sum(record["cpu_s"] for records in found.values() for record in records)),
        "seeds": min(map(len, found.values())),
    }


def _mean(values: Iterable[float]) -> float | None:
    given = list(values)
    return round(fmean(given), 4) if given else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stream", nargs="*", default=[*VQA, *RECOGNITION, *OTHERS])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)))
    parser.add_argument("--learner", default="default")
    parser.add_argument("--out", type=Path, default=Path(".cache/streams"))
    options = parser.parse_args()
    for seeds in sorted({min(FIRST, options.seeds), options.seeds}):
        with ThreadPoolExecutor(options.jobs) as pool:
            list(
                pool.map(partial(evaluate, seeds=seeds, learner=options.learner, out=options.out), options.stream)
            )
        found = {name: runs(name, options.learner, options.out, seeds) for name in options.stream}
        print(f"{table(found)}\n", flush=True)
    print(json.dumps(summarise(found)))


if __name__ == "__main__":
    main()
