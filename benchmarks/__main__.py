"""Run every benchmark of minutes and write benchmarks/RESULTS.md: `python -m benchmarks`.

`benchmarks.streams` takes hours and is run by its own name.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
LONG = {"streams"}
SHARED = {"envs", "load", "models", "servers"}


def main() -> None:
    scripts = sorted({path.stem for path in HERE.glob("[!_]*.py")} - LONG - SHARED)
    sections = [_header()]
    for name in scripts:
        print(f"== {name}", flush=True)
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], text=True, stdout=subprocess.PIPE)
        print(done.stdout, end="", flush=True)
        if done.returncode:
            raise SystemExit(f"{name} failed with {done.returncode}")
        sections.append(_section(name, json.loads(done.stdout.splitlines()[-1])))
    (HERE / "RESULTS.md").write_text("\n".join(sections))


def _header() -> str:
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "servetune"))
    return (
        f"# Benchmark results\n\nWritten by `make bench` on {made}; {platform.machine()}, "
        f"Python {platform.python_version()}, {versions}.\n"
    )


def _section(name: str, figures: dict[str, object]) -> str:
    rows = "\n".join(f"| {key} | {value} |" for key, value in figures.items())
    return f"## {name}\n\n| key | value |\n|---|---|\n{rows}\n"


if __name__ == "__main__":
    main()
