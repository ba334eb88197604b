"""`servetune eval`: which data, which learners, which seeds; finished runs are kept, so that it can be resumed."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from servetune.adapters.answers import canonical
from servetune.adapters.family import UnsupportedModel
from servetune.adapters.policy import Policy
from servetune.evals import Options, protocol, report, streams
from servetune.evals.data import BadData, Data, Item, read, split_files, split_labels, split_whole
from servetune.evals.letters import ask_all_by_letter
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
SPLITS = {"file": split_files, "label": split_labels, "whole": split_whole}

Progress = Callable[[str, int, int], None]
"""Is told who is at work, and how many items of how many are done."""


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model, and what answers questions with it."""

    settings: Settings
    policy: Policy
    scorer: protocol.Scorer

    @classmethod
    def load(cls, name: str) -> Model:
        """A model by its name. Raises UnsupportedModel."""
        chosen: dict[str, Any] = {"model": name}
        settings = Settings(**chosen)
        policy = load_policy(settings, ("candidate", "live"), settings.worker_threads)
        question = settings.recognition_question or policy.family.recognition_question
        return cls(settings, policy, protocol.Scorer(policy, settings.max_answer_tokens, question))


def run(options: Options) -> dict[str, Any]:
    """Evaluate with a progress bar on stderr. Raises BadData."""
    return with_bar(partial(evaluate, options), options.out)


def with_bar(work: Callable[[Progress], dict[str, Any]], out: Path) -> dict[str, Any]:
    """Do the work with a progress bar on stderr, and say where the report is."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Bar(*columns, console=console) as bar:
        task = bar.add_task("loading")
        summary = work(lambda who, done, of: bar.update(task, description=who, completed=done, total=of))
    console.print(f"report: {out}")
    return summary


def evaluate(options: Options, progress: Progress) -> dict[str, Any]:
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
    if options.num_options is not None:
        data = _by_letter(data, options.num_options)
        heldout = ask_all_by_letter(heldout, options.num_options) if heldout else None
    bench = Bench(Model.load(options.model), options, data, heldout)
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


def _by_letter(data: Data, num_options: int) -> Data:
    """The data with its labels asked by letter; the source domain stays as the model knows it."""
    items = ask_all_by_letter(data.items, num_options)
    if items == data.items:
        raise BadData("--options asks by letter what has labels to choose from; these are questions as they are")
    return replace(data, items=items, extra=ask_all_by_letter(data.extra, num_options))


class Bench:
    """A model, the data, and the folder of finished runs."""

    def __init__(
        self, model: Model, options: Options, data: Data, heldout: tuple[Item, ...] | None = None
    ) -> None:
        self._model, self._options, self._data, self._heldout = model, options, data, heldout
        plain = {name: value for name, value in asdict(options).items() if name not in ("out", "fresh", "seeds")}
        learning = {name: getattr(model.settings, name) for name in LEARNING}
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
        kind = self._options.split
        if self._heldout is not None and kind != "file":
            raise BadData(f"--split {kind} splits one data set; it has no meaning with --test-on")
        main = self._run(learner, seed, kind, progress)
        with_labels = kind == "file" and self._heldout is None
        beside = self._run(learner, seed, "label", progress) if with_labels else None
        made = report.as_record(learner, seed, main, beside) | {"options": same}
        path.with_suffix(".new").write_text(json.dumps(made))
        path.with_suffix(".new").replace(path)
        return made

    def _run(self, learner: str, seed: int, kind: str, progress: Callable[[int, int], None]) -> protocol.Run:
        options = self._options
        split = SPLITS[kind](self._data, seed, options.samples, options.order == "shuffled")
        if self._heldout is not None:
            split = replace(split, heldout=list(self._heldout))
        done = 0
        groups = split.learn, split.learned, split.heldout, split.unseen, self._data.source
        total = sum(map(len, groups))

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        named = "default" if learner in ("frozen", "oracle") else learner
        return protocol.run(
            self._model.policy,
            self._model.settings.model_copy(update={"learner": named, "seed": seed}),
            split,
            self._data.source,
            self._model.scorer,
            advance,
            learns=learner != "frozen",
            truths=_truths(split.learn) if learner == "oracle" else None,
        )
