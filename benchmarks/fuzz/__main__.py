"""Fuzz what parses bytes from outside: images, what lies in a store, exported adapters.

    python -m benchmarks.fuzz [--runs N] [--target decode|manifest|export ...] [--engine atheris|plain] [--seed 0]

Each target runs in a process of its own. atheris, which is installed into an environment of its own, looks for
inputs that reach new code; `plain` damages good files and needs nothing. Inputs that show something are kept below
.cache/fuzz. Last line of stdout: JSON, for each target `runs` and `findings`: what was raised, where, how often.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import envs
from benchmarks.fuzz.targets import TARGETS

KEPT = Path(".cache/fuzz")
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a million small files need not reach a disk
SLOWEST = 50  # runs in a second, at the least; more time is not given


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100_000, help="of each target")
    parser.add_argument("--target", nargs="+", default=[*TARGETS], choices=[*TARGETS])
    parser.add_argument("--engine", default="atheris", choices=["atheris", "plain"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = {}
    for name in options.target:
        print(f"{name}: {options.runs} runs", file=sys.stderr)
        found[name] = fuzz(name, options.runs, options.seed, KEPT / name, options.engine == "atheris")
    print(json.dumps(found))
    sys.exit(any(each["findings"] for each in found.values()))


def fuzz(name: str, runs: int, seed: int, folder: Path, by_coverage: bool) -> dict[str, Any]:
    """Run a target. Raises CalledProcessError where atheris cannot be installed."""
    where = [str(_atheris())] if by_coverage else []
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "benchmarks.fuzz.drive", name, str(runs), str(seed), str(folder)]
    with (folder / "log").open("w") as log, tempfile.TemporaryDirectory(dir=MEMORY) as work:
        command += [work, *where]
        try:
            code = subprocess.run(command, stdout=log, stderr=log, timeout=60 + runs / SLOWEST).returncode
        except subprocess.TimeoutExpired:
            code = -1
    report = folder / "report.json"
    if not report.exists():  # it died, or hung; libFuzzer leaves the input behind
        return {"runs": 0, "findings": {f"the process ended with {code}, see its log": 1}}
    found: dict[str, Any] = json.loads(report.read_bytes())
    return found


def _atheris() -> Path:
    """The folder that atheris lies in. Its environment is of this Python, whose packages the targets need."""
    interpreter = envs.python("atheris")
    (site,) = (interpreter.parent.parent / "lib").glob("python3*/site-packages")
    return site.absolute()


if __name__ == "__main__":
    main()
