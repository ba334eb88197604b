"""From runs to a summary: JSON, a Markdown table and plots."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from servetune.evals.protocol import WINDOW, Run

KEYS = (
    "frozen",
    "prequential",
    "heldout_frozen",
    "heldout_adapted",
    "whole_frozen",
    "whole_adapted",
    "unseen_labels_frozen",
    "unseen_labels_adapted",
    "source_frozen",
    "source_adapted",
    "worst_window",
    "valid_frozen",
    "valid_adapted",
    "ece_frozen",
    "ece_adapted",
)
PARTS = ("yes_no_frozen", "yes_no_adapted", "open_frozen", "open_adapted")  # of held-out open questions
# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond, the normal one.
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10)


def as_record(learner: str, seed: int, files: Run, labels: Run | None) -> dict[str, Any]:
    """What one seed gave: the split by files, and beside it what the split by labels says of unseen labels."""
    figures = dict(files.figures)
    if labels is not None:
        figures |= {k: v for k, v in labels.figures.items() if k.startswith("unseen_labels")}
        figures["worst_window"] = min(figures["worst_window"], labels.figures["worst_window"])
    return {
        "learner": learner,
        "seed": seed,
        "figures": {key: value for key, value in figures.items() if math.isfinite(value)},
        "published": files.published,
        "rejected": dict(files.rejected),
        "cpu_s": round(files.cpu_s + (labels.cpu_s if labels else 0.0), 1),
        "series": files.series,
        "right": [[int(frozen), int(adapted)] for frozen, adapted in files.right],
    }


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds; `worst_window` is the minimum, and null is what was not measured."""
    summary: dict[str, Any] = {}
    for key in (*KEYS, *PARTS):
        values = [record["figures"][key] for record in records if key in record["figures"]]
        best = min(values, default=None) if key == "worst_window" else (fmean(values) if values else None)
        summary[key] = None if best is None else round(best, 4)
    summary["removed"] = _removed(summary)
    summary["published"] = fmean(record["published"] for record in records)
    summary["rejected"] = dict(sum((Counter(record["rejected"]) for record in records), Counter()))
    summary["cpu_s"] = round(sum(record["cpu_s"] for record in records), 1)
    summary["seeds"] = len(records)
    summary["ci95"] = {key: _interval(records, key) for key in (*KEYS, *PARTS)}
    return summary


def _removed(summary: Mapping[str, Any]) -> float | None:
    """Share of the frozen model's errors on held-out files that adaptation removed."""
    frozen, adapted = summary["heldout_frozen"], summary["heldout_adapted"]
    if frozen is None or adapted is None or frozen == 1:
        return None
    return round(float((adapted - frozen) / (1 - frozen)), 4)


def _interval(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Half width of the 95 % interval of the mean over seeds."""
    values = [record["figures"][key] for record in records if key in record["figures"]]
    if len(values) < 2:
        return None
    quantile = T95[len(values) - 2] if len(values) - 2 < len(T95) else 1.96
    return round(float(quantile * stdev(values) / math.sqrt(len(values))), 4)


def write(folder: Path, name: str, options: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
    """`eval.json`, `eval.md` and, where matplotlib is installed, `eval.png`."""
    learners = list(dict.fromkeys(record["learner"] for record in records))
    by_learner = {each: [r for r in records if r["learner"] == each] for each in learners}
    summaries = {each: summarise(found) for each, found in by_learner.items()}
    whole = {"data": name, "options": dict(options), "summary": summaries, "runs": list(records)}
    (folder / "eval.json").write_text(json.dumps(whole, indent=1))
    (folder / "eval.md").write_text(_table(name, summaries))
    _plot(folder / "eval.png", name, by_learner)


def _table(name: str, summaries: Mapping[str, Mapping[str, Any]]) -> str:
    columns = [*KEYS, *PARTS, "removed", "published", "cpu_s"]
    lines = [f"# {name}", "", "Means over seeds, +- half of the 95 % interval; `worst_window` is the minimum.", ""]
    lines += ["| |" + "|".join(summaries) + "|", "|---|" + "---|" * len(summaries)]
    for column in columns:
        cells = [_cell(summary, column) for summary in summaries.values()]
        lines.append(f"|{column}|" + "|".join(cells) + "|")
    rejected = ["; ".join(f"{k}: {v}" for k, v in s["rejected"].items()) or "none" for s in summaries.values()]
    lines.append("|rejected|" + "|".join(rejected) + "|")
    return "\n".join(lines) + "\n"


def _cell(summary: Mapping[str, Any], column: str) -> str:
    value = summary[column]
    if value is None:
        return "not measured"
    half = summary["ci95"].get(column) if column != "worst_window" else None
    return f"{value:g}" + (f" ± {half:g}" if half is not None else "")


def _plot(path: Path, name: str, by_learner: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    try:
        import matplotlib
    except ModuleNotFoundError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    accuracy, votes, movement, gate = axes.flat
    for number, (learner, records) in enumerate(by_learner.items()):
        for record in records:
            first = record is records[0]
            label, colour = (learner if first else None), f"C{number + 1}"
            right = record["right"]
            width = max(1, min(WINDOW // 4, len(right) // 2))
            for column, shade, text in (
                (0, "0.6", "frozen" if first and not number else None),
                (1, colour, label),
            ):
                accuracy.plot(
                    _rolling([pair[column] for pair in right], width), color=shade, label=text, alpha=0.7
                )
            series = record["series"]
            asked = [point["asked"] for point in series]
            for axis, keys in ((votes, ("majority", "entropy")), (movement, ("kl", "gate_kl_base"))):
                for key, style in zip(keys, ("-", "--"), strict=True):
                    values = [point.get(key, math.nan) for point in series]
                    axis.plot(
                        asked, values, style, color=colour, alpha=0.7, label=f"{learner}: {key}" if first else None
                    )
            for key, style in (("gate_distinct", "-"), ("gate_unshown", "--")):
                values = [point.get(key, math.nan) for point in series]
                gate.plot(
                    asked, values, style, color=colour, alpha=0.7, label=f"{learner}: {key}" if first else None
                )
    titles = (
        "accuracy before learning from each query",
        "votes",
        "KL (nats per answer)",
        "gate, relative to base",
    )
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("queries")
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=7)
    figure.suptitle(name)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _rolling(right: Sequence[int], width: int) -> list[float]:
    return [fmean(right[max(0, end - width) : end]) for end in range(1, len(right) + 1)]
