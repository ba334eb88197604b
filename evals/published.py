"""What the TTRV paper prints (arXiv 2510.06783v2, Tables 1, 2, 6, 7, 8 and 9), in percent, for comparison."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from servetune.evals.datasets import DATASETS, RECOGNITION, VQA

Row = dict[str, float]


@dataclass(frozen=True, slots=True)
class Published:
    """One model's accuracy by data set: untouched, and after TTRV by the number of samples."""

    frozen: Row
    ttrv: dict[int, Row]


def _row(names: Iterable[str], figures: str) -> Row:
    return dict(zip(names, map(float, figures.split()), strict=True))


ITEMS = _row(
    DATASETS,
    "49032 9772 28506 35350 7467 25250 5640 4500 1631 490 3881 1576 765 817 7575 2704",
)
"""Table 8: images above 1000x1000 pixels were left out."""
# No number of samples is printed for the question data sets; the paper's main tables are said to use 20.
MODELS = {
    "internvl3-2b": Published(
        _row(RECOGNITION, "56.00 67.43 66.01 62.19 67.92 67.19 37.24 72.28")
        | _row(VQA, "44.10 58.26 24.99 17.04 63.47 60.27 71.92 39.68"),
        {
            20: _row(RECOGNITION, "98.31 98.25 96.89 94.74 96.31 95.60 89.73 90.06")
            | _row(VQA, "48.51 66.11 48.85 11.06 64.29 78.64 72.00 67.75"),
            500: _row(RECOGNITION, "98.89 98.95 97.85 95.54 96.38 96.20 89.99 93.67"),
        },
    ),
    "internvl2.5-4b": Published(
        _row(RECOGNITION, "93.26 83.07 79.53 65.51 90.67 80.92 47.33 23.44")
        | _row(VQA, "51.69 65.49 57.37 85.27 65.25 80.03 74.33 51.55"),
        {
            1: _row(("mathvista", "seed-bench", "imagenet-a", "imagenet-r"), "66.11 58.87 95.28 85.00"),
            20: _row(RECOGNITION, "97.11 95.66 88.21 92.01 96.00 94.49 81.98 13.30")
            | _row(VQA, "53.02 66.94 61.14 85.79 66.00 85.99 75.22 61.09"),
        },
    ),
    "internvl3-8b": Published(
        _row(RECOGNITION, "79.47 62.58 59.32 54.48 57.03 78.32 59.11 83.62")
        | _row(VQA, "34.56 38.84 32.12 49.02 19.01 59.50 55.81 30.95"),
        {
            20: _row(RECOGNITION, "91.43 85.27 63.51 53.79 81.43 87.13 77.92 89.19")
            | _row(VQA, "42.15 50.41 59.16 78.77 26.57 80.68 68.26 53.92"),
            500: _row(RECOGNITION, "99.31 97.24 96.88 95.03 96.86 97.20 89.37 93.82"),
        },
    ),
    "qwen2.5-vl-3b": Published(
        _row(("mathverse", "mathvista", "capture", "resisc45"), "45.33 67.35 71.33 90.08"),
        {20: _row(("mathverse", "mathvista", "capture", "resisc45"), "48.71 71.48 75.25 92.71")},
    ),
}


def of(model: str) -> Published | None:
    """The paper's figures for a checkpoint, a hub id or a folder, by its name."""
    name = model.rstrip("/").rpartition("/")[2].lower().replace("_", ".")
    return next((found for key, found in MODELS.items() if name.startswith(key)), None)
