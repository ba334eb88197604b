"""Check what servetune promises, on this machine, with real processes.

    python -m benchmarks.promises [--rows R1 A5 ...] [--short] [--seed 0] [--broken]

Prints a table as it goes. With `--broken` every check is made on a product that is broken on purpose in the way
the check is for (`breaking/`): it must say so. `make soak ROW=R1` is the long form of one row.

Last line of stdout: JSON. `rows` has for each row whether it passed and its figure; `passed`, `failed` and
`skipped` (row: reason). With `--broken` a row passes when its check fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import structlog

from benchmarks.promises import access, artifacts, delivery, inputs, learning, swaps  # noqa: F401  they fill the table
from benchmarks.promises.breaking import MUTATIONS, breaking
from benchmarks.promises.rows import ROWS, Found, Row, Skip, Trial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=[*ROWS], choices=[*ROWS], metavar="ROW")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--broken", action="store_true")
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
        good = found.kept != options.broken
        rows[name] = {"pass": good, "figure": found.figure}
        said = "pass" if good else "FAIL"
        print(f"{name:4}{said}  {row.promise}: {found.figure} ({time.monotonic() - began:.0f} s)", flush=True)
    passed = sum(bool(row["pass"]) for row in rows.values())
    print(json.dumps({"rows": rows, "passed": passed, "failed": len(rows) - passed, "skipped": skipped}))
    sys.exit(passed < len(rows))


def check(row: Row, short: bool, seed: int, broken: bool) -> Found:
    """One row in a folder of its own; a check that raises was not kept."""
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder), short, seed, row.id if broken else "")
        try:
            with breaking(trial.broken):
                return row.check(trial)
        except Skip:
            raise
        except Exception as error:
            return Found(False, f"{type(error).__name__}: {error}"[:300])


if __name__ == "__main__":
    main()
