"""Check what servetune promises, on this machine, with real processes.

    python -m benchmarks.promises [--rows R1 A5 ...] [--short] [--seed 0] [--broken] [--write FILE]

Prints a table as it goes. With `--broken` every check is made on a product that is broken on purpose in the way
the check is for (`breaking/`): it must say so. `make soak ROW=R1` is the long form of one row. `--write` makes the
table of docs/promises.md.

Last line of stdout: JSON. `rows` has for each row whether it passed and its figure; `passed`, `failed` and
`skipped` (row: reason). With `--broken` a row passes when its check fails, and does not merely crash.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from benchmarks.promises import (  # noqa: F401  they fill the table
    access,
    artifacts,
    availability,
    clients,
    contract,
    delivery,
    fuzzing,
    inputs,
    learning,
    serving,
    swaps,
)
from benchmarks.promises.breaking import MUTATIONS, breaking
from benchmarks.promises.rows import ROWS, Found, Row, Skip, Trial

TEXT = """# What servetune promises

Written by `python -m benchmarks.promises` on {day}, {form} form, seed {seed}: real processes, a real Valkey,
real kill -9. Every check has a way to break the product that it must notice (`--broken`). The test suite runs
those that only a defect can break; those that assert a time or a ratio (timed), and I10, which installs a tool,
run by this command alone.
`make soak ROW=R1` is the long form of a row.

| | promise | kept | figure |
|---|---|---|---|
{rows}

## Not promised

No loss across a failover of Redis or the loss of the disk; answers equal to the bit across devices or sizes of a
batch; safety against whoever operates the server; that what the model says is harmless; protection from poisoning
where clients share an adapter, beyond what the gate stops.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=[*ROWS], choices=[*ROWS], metavar="ROW")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--broken", action="store_true")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    rows, skipped = {}, {}
    print(f"seed {options.seed}, {'short' if options.short else 'long'} form", flush=True)
    for name in options.rows:
        row = ROWS[name]
        if options.broken and name not in MUTATIONS:
            skipped[name] = "nothing is broken on purpose for it"
            continue
        began = time.monotonic()
        try:
            found = check(row, options.short, options.seed, options.broken)
        except Skip as why:
            skipped[name] = str(why)
            print(f"{name}  skipped: {why}", flush=True)
            continue
        good = found.kept != options.broken and not found.crashed
        rows[name] = {"pass": good, "figure": found.figure}
        said = "pass" if good else "FAIL"
        print(f"{name:4}{said}  {row.promise}: {found.figure} ({time.monotonic() - began:.0f} s)", flush=True)
    if options.write:
        options.write.write_text(page(rows, skipped, options.short, options.seed))
    passed = sum(bool(row["pass"]) for row in rows.values())
    print(json.dumps({"rows": rows, "passed": passed, "failed": len(rows) - passed, "skipped": skipped}))
    sys.exit(passed < len(rows))


def page(rows: dict[str, dict[str, Any]], skipped: dict[str, str], short: bool, seed: int) -> str:
    """docs/promises.md of a run."""
    lines = []
    for name, row in ROWS.items():
        kept, figure = _cells(rows[name]) if name in rows else ("not checked", skipped.get(name, ""))
        lines.append(f"| {name} | {row.promise}{' (timed)' if row.timed else ''} | {kept} | {figure} |")
    day, form = f"{datetime.now(UTC):%Y-%m-%d}", "short" if short else "long"
    return TEXT.format(day=day, form=form, seed=seed, rows="\n".join(lines))


def _cells(found: dict[str, Any]) -> tuple[str, str]:
    return "yes" if found["pass"] else "**no**", str(found["figure"]).replace("|", "/").replace("\n", " ")


def check(row: Row, short: bool, seed: int, broken: bool) -> Found:
    """One row in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder), short, seed, row.id if broken else "")
        try:
            with breaking(trial.broken):
                return row.check(trial)
        except Skip:
            raise
        except Exception as error:
            return Found(False, f"{type(error).__name__}: {error}"[:300], crashed=True)


if __name__ == "__main__":
    main()
