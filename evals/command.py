"""`servetune eval`: which data, which learners, which seeds; finished runs are kept, so that it can be resumed."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from servetune.adapters.answers import canonical
from servetune.adapters.family import UnsupportedModel
from servetune.evals import Options, protocol, report, streams
from servetune.evals.data import BadData, Data, Item, read, split_files, split_labels
from servetune.server.model import load_policy
from servetune.server.settings import Settings

REFUSALS = (BadData, UnsupportedModel)
LEARNING = (
    "num_rollouts",
    "max_answer_tokens",
    "queries_per_step",
    "steps_per_candidate",
    "learning_rate",
    "kl_coefficient",
    "lora_rank",
    "lora_alpha",
    "lora_targets",
)
"""Settings that change what is learned: a run that was made with others is not resumed."""


def run(options: Options) -> dict[str, Any]:
    """Evaluate with a progress bar on stderr. Raises BadData."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("loading")
        summary = evaluate(
            options, lambda who, done, of: bar.update(task, description=who, completed=done, total=of)
        )
    console.print(f"report: {options.out}")
    return summary


def evaluate(options: Options, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Run every learner on every seed, write the report into `options.out`, and return the learner's summary.

    A run that an earlier, interrupted call with the same options finished is read from `out/runs`.

    Raises:
        BadData: the data, or what an option asks of it, cannot be used.
    """
    data, test = _load(options.data), _load(options.test_on) if options.test_on else None
    data = replace(data, items=_as_task(data.items, options.task))
    if test is not None:
        data = replace(data, source=test.source or data.source)
    if options.source:
        data = replace(data, source=_load(options.source).items)
    elif not data.source and options.model == "nano":
        try:
            data = replace(data, source=(*streams.source_names()[::2], *streams.source_shapes()[::2]))
        except BadData as error:
            print(f"source accuracy is not measured: {error}", file=sys.stderr)
    heldout = _as_task(test.items, options.task) if test else None
    bench = _Bench(options, data, heldout)
    records = []
    for learner in dict.fromkeys((options.learner, *options.compare)):
        for seed in range(options.seeds):
            records.append(bench.record(learner, seed, partial(progress, f"{learner}, seed {seed}")))
            report.write(options.out, data.name, bench.plain, records)
    return report.summarise([record for record in records if record["learner"] == options.learner])


def _load(name: str) -> Data:
    return streams.load(name) if name in streams.STREAMS else read(Path(name))


def _as_task(items: Sequence[Item], task: str | None) -> tuple[Item, ...]:
    """Items asked as open questions, or as a choice among all answers of the data."""
    if task == "vqa":
        return tuple(replace(item, labels=()) for item in items)
    if task == "recognition":
        labels = tuple(sorted({item.truth for item in items if item.truth is not None}))
        return tuple(replace(item, labels=item.labels or labels) for item in items)
    return tuple(items)


def _truths(items: Sequence[Item]) -> dict[str, str]:
    """Answers by query id in the form that is voted on: labels as given, open answers canonical."""
    return {
        item.id: item.truth if item.labels else canonical(item.truth) for item in items if item.truth is not None
    }


class _Bench:
    """One loaded model, the data, and the folder of finished runs."""

    def __init__(self, options: Options, data: Data, heldout: tuple[Item, ...] | None) -> None:
        self._options, self._data, self._heldout = options, data, heldout
        chosen: dict[str, Any] = {"model": options.model}
        self._settings = Settings(**chosen)
        self._policy = load_policy(self._settings, ("candidate", "live"), self._settings.worker_threads)
        question = self._settings.recognition_question or self._policy.family.recognition_question
        self._scorer = protocol.Scorer(self._policy, self._settings.max_answer_tokens, question)
        plain = {name: value for name, value in asdict(options).items() if name not in ("out", "fresh", "seeds")}
        learning = {name: getattr(self._settings, name) for name in LEARNING}
        self.plain = plain | {"compare": list(options.compare), "settings": learning}
        self._runs = options.out / "runs"
        self._runs.mkdir(parents=True, exist_ok=True)

    def record(self, learner: str, seed: int, progress: Callable[[int, int], None]) -> dict[str, Any]:
        """The record of one seed, from disk if it is there."""
        path = self._runs / f"{learner}-{seed}.json"
        same = {name: value for name, value in self.plain.items() if name not in ("learner", "compare")}
        if path.exists() and not self._options.fresh:
            found: dict[str, Any] = json.loads(path.read_text())
            if found["options"] == same:
                return found
        files = self._run(learner, seed, "file", progress) if self._options.split == "file" else None
        labels = self._run(learner, seed, "label", progress) if self._heldout is None else None
        main, beside = (files, labels) if files else (labels, None)
        if main is None:
            raise BadData("--split label splits one data set; it has no meaning with --test-on")
        made = report.as_record(learner, seed, main, beside) | {"options": same}
        path.with_suffix(".new").write_text(json.dumps(made))
        path.with_suffix(".new").replace(path)
        return made

    def _run(self, learner: str, seed: int, kind: str, progress: Callable[[int, int], None]) -> protocol.Run:
        options = self._options
        cut = split_files if kind == "file" else split_labels
        split = cut(self._data, seed, options.samples, options.order == "shuffled")
        if self._heldout is not None:
            split = replace(split, heldout=list(self._heldout))
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done, len(split.learn))

        named = "default" if learner in ("frozen", "oracle") else learner
        return protocol.run(
            self._policy,
            self._settings.model_copy(update={"learner": named, "seed": seed}),
            split,
            self._data.source,
            self._scorer,
            advance,
            learns=learner != "frozen",
            truths=_truths(split.learn) if learner == "oracle" else None,
        )
