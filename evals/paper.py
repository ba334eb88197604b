"""`servetune eval paper`: k unlabeled samples, then the whole data set, for the TTRV paper's data sets at hand.

Its figures stand beside what the paper prints, and beside what it does not: the items that were never learned
from, the frozen model in its own chat template, and how often an answer is one of the options.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from servetune.evals import Options, PaperOptions, command, published, report
from servetune.evals.data import BadData, Data
from servetune.evals.datasets import DATASETS, RECOGNITION, load
from servetune.evals.letters import ask_all_by_letter

REFUSALS = command.REFUSALS
NUM_OPTIONS = 4
OURS = ("whole_frozen", "whole_adapted", "heldout_frozen", "heldout_adapted", "valid_frozen", "valid_adapted")
"""What a row keeps of the summary over seeds; held out are the items whose image was never learned from."""
NOTES = """Accuracy in percent, ours as means over seeds. **Whole** counts the samples that were learned from, as
the paper does; **rest** is the questions about images that were never learned from. **Frozen** is the same model,
asked in its own chat template. **Valid**, on the rest, is the probability of answering with one of the options, or
for open questions the share that got an answer. The likeliest option counts, however unlikely: a repaired answer
format is no gain here. `docs/paper.md` says what else differs from the authors' harness.
"""
CAPTURE = "Capture: ours is exact match, the paper's is 1 - sMAPE; do not compare them.\n"


def run(options: PaperOptions) -> dict[str, Any]:
    """Evaluate with a progress bar on stderr. Raises BadData."""
    return command.with_bar(partial(evaluate, options), options.out)


def evaluate(options: PaperOptions, progress: command.Progress) -> dict[str, Any]:
    """Every data set, learner and number of samples; the report so far is written after each.

    A run that an earlier, interrupted call with the same options finished is read from `out`.

    Raises:
        BadData: no data set is there, or one that is cannot be used.
    """
    found, missing = _look(options)
    # All are read before the first is run: a broken one should not show after hours.
    data = {name: _prepared(name, folder, options.out / "images" / name) for name, folder in found.items()}
    model = command.Model.load(options.model)
    rows: list[dict[str, Any]] = []
    for name, each in data.items():
        for learner in dict.fromkeys(options.learners):
            for samples in options.samples:
                asked = Options(
                    data=str(found[name].absolute()),
                    model=options.model,
                    samples=samples,
                    split="whole",
                    out=options.out / name / str(samples),
                    fresh=options.fresh,
                    num_options=NUM_OPTIONS,
                )
                bench = command.Bench(model, asked, each)
                who = f"{name}, {samples} samples, {learner}"
                records = [bench.record(learner, seed, partial(progress, who)) for seed in range(options.seeds)]
                rows.append(_row(name, each, learner, samples, records, options.model))
                _write(options, rows, missing)
    return {"rows": rows, "missing": missing}


def _look(options: PaperOptions) -> tuple[dict[str, Path], dict[str, str]]:
    """The folders of the data sets that are there, and where to get the others."""
    unknown = [name for name in options.datasets if name not in DATASETS]
    if unknown:
        raise BadData(f"{unknown[0]} is none of the data sets: {', '.join(DATASETS)}")
    wanted = dict.fromkeys(options.datasets or DATASETS)
    found = {name: options.root / name for name in wanted if (options.root / name).is_dir()}
    missing = {name: DATASETS[name].source for name in wanted if name not in found}
    if not found:
        raise BadData(
            f"{options.root} holds none of the data sets {', '.join(wanted)}: "
            "put each into a folder of its name; docs/paper.md says where they come from"
        )
    return found, missing


def _prepared(name: str, folder: Path, images: Path) -> Data:
    data = load(name, folder, images)
    if name not in RECOGNITION:
        return data
    return Data(name, ask_all_by_letter(data.items, NUM_OPTIONS))


def _row(
    name: str, data: Data, learner: str, samples: int, records: Sequence[Mapping[str, Any]], model: str
) -> dict[str, Any]:
    """One line of the table. Rates are fractions, those of the paper too; null is what is not known."""
    summary = report.summarise(records)
    printed = published.of(model)
    frozen = printed.frozen.get(name) if printed else None
    adapted = printed.ttrv.get(samples, {}).get(name) if printed else None
    return {
        "dataset": name,
        "learner": learner,
        "samples": samples,
        "items": len(data.items),
        "paper_items": int(published.ITEMS[name]),
        **{key: summary[key] for key in OURS},
        "paper_frozen": None if frozen is None else round(frozen / 100, 4),
        "paper_ttrv": None if adapted is None else round(adapted / 100, 4),
        "published": summary["published"],
        "rejected": summary["rejected"],
        "seeds": summary["seeds"],
        "ci95": {key: summary["ci95"][key] for key in OURS},
    }


def _write(options: PaperOptions, rows: list[dict[str, Any]], missing: dict[str, str]) -> None:
    """`paper.json` and `paper.md`."""
    whole = {"model": options.model, "rows": rows, "missing": missing}
    (options.out / "paper.json").write_text(json.dumps(whole, indent=1))
    heads = [
        *(
            "data set",
            "items (paper)",
            "learner",
            "samples",
            "whole: frozen",
            "adapted",
            "rest: frozen",
            "adapted",
        ),
        *("valid: frozen", "adapted", "paper: frozen", "TTRV"),
    ]
    lines = [f"# The TTRV paper's protocol, {options.model}", "", NOTES]
    lines += [f"|{'|'.join(heads)}|", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [_percent(row[key]) for key in (*OURS, "paper_frozen", "paper_ttrv")]
        items = f"{row['items']} ({row['paper_items']})"
        lines.append(f"|{row['dataset']}|{items}|{row['learner']}|{row['samples']}|{'|'.join(cells)}|")
    if any(row["dataset"] == "capture" for row in rows):
        lines += ["", CAPTURE]
    if missing:
        lines += ["", "Not there, and where to get them:", ""]
        lines += [f"- `{name}`: {source}" for name, source in missing.items()]
    (options.out / "paper.md").write_text("\n".join(lines) + "\n")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"
