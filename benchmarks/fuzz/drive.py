"""One target in a process of its own, which may die of it.

    python -m benchmarks.fuzz.drive TARGET RUNS SEED FOLDER WORK [ATHERIS]

With the folder where atheris lies, inputs are made by coverage; without it by plain mutation. What a target raises
is kept by where it was raised, and the run goes on, so that one run tells all. FOLDER gets the first input of each
finding, and `report.json` at the end; WORK is for what the target writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.fuzz.targets import INSTRUMENTED, TARGETS, Broken, Made

MEMORY = 4 * 2**30  # bytes of address space: what asks for more gets a MemoryError
SLOW_S = 20  # for one input
ODD = [
    b"",
    b"\0",
    b"\xff" * 4,
    b"-1",
    b"null",
    b"[]",
    b"{}",
    b"1e999",
    b"9" * 30,
    b'"',
    b"[" * 3000,
    b"\x80\0\0\0",
]


class Harness:
    """Calls a target and keeps what went wrong; ends the process after so many runs."""

    def __init__(self, made: Made, runs: int, folder: Path) -> None:
        self._made = made
        self._left = self._runs = runs
        self._folder = folder
        self._found: Counter[str] = Counter()

    def __call__(self, data: bytes) -> None:
        try:
            self._made.run(data)
        except Exception as error:
            self._keep(error, data)
        self._left -= 1
        if self._left == 0:
            self.report()
            os._exit(0)  # libFuzzer's own end would say that the runs it was promised are missing

    def _keep(self, error: Exception, data: bytes) -> None:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__} in {Path(frame.filename).name} {frame.name}"
        if isinstance(error, Broken):
            place = str(error)
        if place not in self._found:
            (self._folder / f"found-{hashlib.sha256(place.encode()).hexdigest()[:8]}").write_bytes(data)
        self._found[place] += 1

    def report(self) -> None:
        found = {"runs": self._runs - self._left, "findings": dict(self._found)}
        (self._folder / "report.json").write_text(json.dumps(found))


def by_mutation(harness: Harness, seeds: list[bytes], dice: random.Random) -> None:
    """Damage the seeds for ever."""
    while True:
        harness(damaged(dice.choice(seeds), dice, seeds))


def damaged(data: bytes, dice: random.Random, seeds: list[bytes]) -> bytes:
    """Up to eight changes: bits flipped, pieces cut, put in, doubled, or taken from another seed."""
    made = bytearray(data)
    for _ in range(dice.randint(1, 8)):
        place = dice.randrange(len(made) + 1)
        length = dice.choice((1, 2, 4, 16, 200))
        match dice.randrange(6):
            case 0 if made:
                made[place % len(made)] ^= 1 << dice.randrange(8)
            case 1 if made:
                made[place % len(made)] = dice.randrange(256)
            case 2:
                del made[place : place + length]
            case 3:
                made[place : place + dice.choice((0, length))] = dice.choice(ODD)
            case 4:
                made[place:place] = made[place : place + length]
            case 5:
                other = dice.choice(seeds)
                start = dice.randrange(len(other) + 1)
                made[place : place + length] = other[start : start + length]
    return bytes(made)


def by_coverage(harness: Harness, seeds: list[bytes], seed: int, folder: Path, atheris: Any) -> None:
    """Let libFuzzer look for inputs that reach new code."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate(seeds):
        (corpus / str(number)).write_bytes(data)
    options = [
        f"-seed={seed + 1}",
        "-runs=-1",
        f"-timeout={SLOW_S}",
        f"-artifact_prefix={folder}/",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *options, "-max_len=8192", str(corpus)], harness)
    atheris.Fuzz()


def main() -> None:
    name, runs, seed, folder, work, *where = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore", UserWarning)  # what Pillow has to say of damaged files
    if name == "decode":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    if not where:
        made = TARGETS[name](Path(work))
        by_mutation(Harness(made, int(runs), Path(folder)), made.seeds, random.Random(int(seed)))
    sys.path.append(where[0])
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED[name]):
        made = TARGETS[name](Path(work))
    by_coverage(Harness(made, int(runs), Path(folder)), made.seeds, int(seed), Path(folder), atheris)


if __name__ == "__main__":
    main()
