"""I9: parsers of bytes from outside survive fuzzing (`benchmarks/fuzz`)."""

from __future__ import annotations

import subprocess

from benchmarks.fuzz.__main__ import fuzz
from benchmarks.fuzz.targets import TARGETS
from benchmarks.promises.rows import Found, Skip, Trial, promise


@promise("I9", "parsers survive fuzzing")
def parsers_survive(trial: Trial) -> Found:
    """Images, files of a store and exports; the short form, which is in the test suite, needs no atheris."""
    runs, found = trial.times(3000, 1_000_000), {}
    for name in TARGETS:
        try:
            found[name] = fuzz(name, runs, trial.seed, trial.folder / name, by_coverage=not trial.short)
        except subprocess.CalledProcessError:
            raise Skip("atheris cannot be installed") from None
    findings = [f"{name}: {what}" for name, each in found.items() for what in each["findings"]]
    whole = all(each["runs"] == runs for each in found.values())
    num = sum(each["runs"] for each in found.values())
    return Found(not findings and whole, f"{len(findings)} findings in {num} runs {findings[:3]}")
