"""Watch it learn: stream unlabeled images of a style that the model never saw through the REST API.

A server starts in a temporary home. Each image is asked twice: of `live`, which learns from the question, and of
`base`, which is frozen. The labels stay in this script and only colour the plot. Then: snapshot, reset, and the
proof that the answers are those of the base again.

    python examples/demo.py [--queries 600] [--out demo-out]

Last line of stdout: {"frozen": .., "adapted": .., "versions": .., "queries": ..}, accuracies as fractions 0..1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
from PIL import Image
from rich.progress import track

from servetune import Client

matplotlib.use("Agg")
import matplotlib.pyplot as plt

IMAGES = Path(__file__).parent / "images" / "fluent-emoji-flat"
SIDE = 128
WINDOW = 100
CHECKED = 24


@dataclass
class Record:
    """What happened, query by query."""

    adapted: list[bool] = field(default_factory=list)
    frozen: list[bool] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


def main() -> None:
    options = _arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    files = sorted(IMAGES.glob("*.png"))
    names = [path.stem.replace("-", " ") for path in files]
    pictures = [Image.open(path).convert("RGBA") for path in files]
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as home, _server(Path(home)) as (url, admin_key):
        client = Client(url, admin_key=admin_key)
        record = _stream(client, pictures, names, options, rng)
        checks = [(_view(pictures[i], rng), names) for i in rng.sample(range(len(pictures)), CHECKED)]
        proof = _snapshot_and_reset(client, checks)
    result = {
        "frozen": round(sum(record.frozen) / len(record.frozen), 4),
        "adapted": round(sum(record.adapted) / len(record.adapted), 4),
        "versions": max(record.versions),
        "queries": len(record.adapted),
    }
    _plot(record, options.out / "demo.png")
    (options.out / "demo.json").write_text(json.dumps({**result, **proof, "seed": options.seed}, indent=1))
    print(f"plot and figures: {options.out}")
    print(json.dumps(result))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=600)
    parser.add_argument("--chunk", type=int, default=16, help="queries between two looks at the learner")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    return parser.parse_args()


@contextmanager
def _server(home: Path) -> Iterator[tuple[str, str]]:
    """A server of its own: nothing of the user's is touched."""
    command = [sys.executable, "-m", "servetune", "serve", "--home", str(home), "--port", "0"]
    with (home / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=dict(os.environ))
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "answers at" in line:
                url = line.split("answers at ")[1].split()[0]
                break
        else:
            raise SystemExit((home / "server.log").read_text())
        yield url, (home / "admin.key").read_text().strip()
    finally:
        process.terminate()
        process.wait(60)


def _view(picture: Image.Image, rng: random.Random) -> Image.Image:
    """The drawing on white, each time a little smaller, turned and moved, so that no two queries are the same."""
    side = round(SIDE * rng.uniform(0.8, 1.0))
    turned = picture.resize((side, side)).rotate(rng.uniform(-8, 8), resample=Image.Resampling.BICUBIC)
    ground = Image.new("RGB", (SIDE, SIDE), "white")
    corner = round((SIDE - side) * rng.random()), round((SIDE - side) * rng.random())
    ground.paste(turned, corner, turned)
    return ground


def _stream(
    client: Client, pictures: list[Image.Image], names: list[str], options: argparse.Namespace, rng: random.Random
) -> Record:
    record = Record()
    for number in track(range(options.queries), description="asking and learning"):
        index = rng.randrange(len(pictures))
        view = _view(pictures[index], rng)
        answer = client.recognize(view, names)
        frozen = client.recognize(view, names, adapter="base", adapt=False)
        record.adapted.append(answer.answer == names[index])
        record.frozen.append(frozen.answer == names[index])
        record.versions.append(int(answer.adapter.version[1:]))
        if number % options.chunk == options.chunk - 1:
            _let_it_learn(client)
    return record


def _let_it_learn(client: Client, timeout_s: float = 60) -> None:
    """Wait until what was asked has been learned from and the result is served."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        status = client.adaptation.status()
        if status.buffer.waiting + status.buffer.pending == 0 and status.lag_versions == 0:
            return
        time.sleep(0.05)


def _snapshot_and_reset(client: Client, checks: list[tuple[Image.Image, list[str]]]) -> dict[str, object]:
    """Keep what was learned, go back to the base, and compare the answers bit for bit."""
    client.adaptation.pause()
    kept = client.adapters.snapshot("demo")
    fresh = client.adapters.reset()
    client.wait_for_version(fresh.version)
    same = 0
    for image, names in checks:
        live, base = (client.recognize(image, names, adapter=a, adapt=False) for a in ("live", "base"))
        same += live.candidates == base.candidates
    print(f"snapshot {kept.version}; after reset {same} of {len(checks)} answers are exactly those of the base")
    return {"snapshot": kept.version, "reset": fresh.version, "same_as_base": same, "checked": len(checks)}


def _plot(record: Record, path: Path) -> None:
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 5), height_ratios=(3, 1))
    for name, hits in (("adapting", record.adapted), ("frozen", record.frozen)):
        rolling = [sum(hits[max(0, i - WINDOW + 1) : i + 1]) / min(i + 1, WINDOW) for i in range(len(hits))]
        top.plot(rolling, label=f"{name}: {sum(hits) / len(hits):.3f}")
    top.set_ylabel(f"accuracy, last {WINDOW} queries")
    top.legend(title="each query answered before it is learned")
    bottom.plot(record.versions)
    bottom.set_ylabel("version")
    bottom.set_xlabel("queries")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
