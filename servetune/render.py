"""How results look: one JSON document, or tables for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from servetune.clients.types import AdapterInfo, Answer, AuditEntry, Change, VersionDiff, VersionInfo
from servetune.evals.findings import Report

COLUMNS: dict[type[BaseModel], tuple[str, ...]] = {
    AdapterInfo: ("name", "live", "serving", "generation", "num_versions", "aliases"),
    VersionInfo: (
        "version",
        "servable",
        "parent",
        "origin",
        "label",
        "created",
        "num_queries",
        "pinned",
        "retired",
        "metrics",
    ),
    AuditEntry: ("timestamp", "event", "actor", "request_id", "details"),
}
MOMENTS = frozenset({"created", "timestamp", "waits_until"})


class Output(StrEnum):
    """Formats of `-o`."""

    table = "table"
    json = "json"


def show(result: Any, output: Output) -> None:
    """Print a result of the SDK: a model, a list of models or a path."""
    if output is Output.json:
        sys.stdout.write(json.dumps(_plain(result), indent=2, ensure_ascii=False) + "\n")
        return
    console = Console()
    if isinstance(result, Answer):
        _show_answer(console, result)
    elif isinstance(result, VersionDiff):
        _show_diff(console, result)
    elif isinstance(result, Report):
        _show_report(console, result)
    elif isinstance(result, BaseModel):
        console.print(_facts(iter(result)))
    elif isinstance(result, dict):
        console.print(_facts(result.items()))
    elif isinstance(result, list):
        console.print(_listing(result) if result else "nothing there yet")
    else:
        console.print(_text(result), soft_wrap=True)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, where that is a terminal; what it yields is told how much of the total is done."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def _plain(result: Any) -> Any:
    if isinstance(result, list):
        return [_plain(item) for item in result]
    if isinstance(result, BaseModel):
        return result.model_dump(mode="json")
    return {"path": str(result)} if isinstance(result, Path) else result


def _show_answer(console: Console, answer: Answer) -> None:
    headline = "no answer" if answer.answer is None else answer.answer
    sure = "" if answer.confidence is None else f"  ({answer.confidence:.1%}, {answer.confidence_source})"
    console.print(_text(headline, "bold") + _text(sure, "dim"))
    if len(answer.candidates) > 1:
        names = [each.label or each.answer or "" for each in answer.candidates]
        shares = [f"{each.score:.1%}" for each in answer.candidates]
        console.print(_table((), zip(names, shares, strict=True)))
    adaptation = answer.adaptation
    looks = "" if adaptation.views is None else f" · {adaptation.views} views"
    kept = "queued" if adaptation.queued else "skipped" if adaptation.queued is False else adaptation.status
    learning = kept + (f": {adaptation.reason}" if adaptation.reason else "")
    note = f"{answer.adapter.name} {answer.adapter.version} · {answer.timings.inference_s:.2f} s{looks}"
    console.print(_text(f"{note} · learning {learning}", "dim"))


def _show_diff(console: Console, diff: VersionDiff) -> None:
    for title, changes in (("manifest", diff.facts), ("step", diff.metrics), ("gate", diff.gate)):
        if changes:
            rows = (
                (name, _value("", each.old), _value("", each.new), _change(each)) for name, each in changes.items()
            )
            console.print(_table((title, diff.old, diff.new, "change"), rows))
            console.print()
    if diff.answers:
        asked = ((each.query_id, each.question, each.old or "-", each.new or "-") for each in diff.answers)
        console.print(_table(("query", "question", diff.old, diff.new), asked))
    console.print(_text(f"{len(diff.answers)} of {diff.compared} kept queries are answered differently", "dim"))


def _change(change: Change) -> str:
    numbers = [each for each in (change.old, change.new) if isinstance(each, int | float)]
    return f"{numbers[1] - numbers[0]:+.4g}" if len(numbers) == 2 else ""


def _show_report(console: Console, report: Report) -> None:
    console.print(_facts((name, value) for name, value in report if name != "problems"))
    for each in report.problems:
        kind = f"no {each.blocks}" if each.blocks else "note"
        console.print(_text(f"\n{kind}: {each.problem}", "bold"))
        console.print(_text(f"  {each.advice}"))
    able = [name for name, can in (("serve", report.can_serve), ("learn", report.can_learn)) if can]
    console.print(_text(f"\nit can {' and '.join(able)}" if able else "\nit cannot serve", "bold"))
    if report.data:
        console.print(_text(f"{report.data.name}: {report.data.verdict}", "bold"))


def _listing(rows: Sequence[BaseModel]) -> Table:
    columns = COLUMNS.get(type(rows[0]), tuple(type(rows[0]).model_fields))
    return _table(columns, ([_value(name, getattr(row, name)) for name in columns] for row in rows))


def _facts(fields: Iterable[tuple[str, Any]]) -> Table:
    """Every field, those of a nested model under `outer.inner`."""
    facts: list[tuple[str, str]] = []
    for name, value in fields:
        if isinstance(value, BaseModel):
            facts += [(f"{name}.{inner}", _value(inner, each)) for inner, each in value]
        else:
            facts.append((name, _value(name, value)))
    return _table((), facts)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(box=None, show_header=bool(columns), pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(_text, row))
    return table


def _value(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in MOMENTS:
        return datetime.fromtimestamp(value).astimezone().isoformat(" ", "seconds")
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value('', each)}" for key, each in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(_value("", each) for each in value) or "-"
    return str(value)


def _text(value: Any, style: str = "") -> Text:
    """Text without markup, and without what a terminal would take for a command: much of it is foreign."""
    return Text("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in str(value)), style)
