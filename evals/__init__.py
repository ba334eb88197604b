"""Evaluation of a learner on unlabeled queries, whose labels only the scorer reads; learning before serving."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

if __name__ != "servetune.evals":
    raise ImportError("import servetune.evals, not the evals/ folder")

LEARNERS = ("default", "frequency", "ttrv", "released", "majority", "random", "format-only")
BASELINES = ("frozen", "oracle", "entropy", "self-training")
"""Only for evaluation: no server learns like this."""


@dataclass(frozen=True, slots=True)
class Options:
    """What `servetune eval` was asked for."""

    data: str
    model: str = "nano"
    task: str | None = None
    learner: str = "default"
    compare: tuple[str, ...] = ()
    samples: int | None = None
    order: str = "shuffled"
    split: str = "file"
    seeds: int = 5
    out: Path = Path("eval-out")
    test_on: str | None = None
    source: str | None = None
    fresh: bool = False
    num_options: int | None = None


@dataclass(frozen=True, slots=True)
class PaperOptions:
    """What `servetune eval paper` was asked for; without data sets it is all of them."""

    root: Path
    model: str = "nano"
    datasets: tuple[str, ...] = ()
    samples: tuple[int, ...] = (1, 20, 500)
    learners: tuple[str, ...] = ("default",)
    seeds: int = 1
    out: Path = Path("eval-out")
    fresh: bool = False
