"""`servetune watch`: how an adapter stands and learns, as it happens, in a terminal."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from servetune.clients.types import Event, Series

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 60  # steps that a line shows
NEWS = 8  # events that are shown
CURVES = {
    "reward": "reward",
    "majority": "vote share",
    "entropy": "entropy",
    "kl": "KL to base",
    "valid": "valid answers",
    "prequential": "agreement before learning",
}
"""Numbers of a step that are drawn, and what they are called."""


class View:
    """What is known of an adapter; `hear` adds to it, and rich shows it."""

    def __init__(self) -> None:
        self._status: Mapping[str, Any] = {}
        self._adapter = ""
        self._curves: dict[str, deque[float]] = {name: deque(maxlen=WIDTH) for name in CURVES}
        self._news: deque[str] = deque(maxlen=NEWS)
        self._steps = 0

    def begin(self, series: Series) -> None:
        """Take in what happened before."""
        self._adapter = series.adapter
        for number in range(len(series.columns.get("time", ()))):
            self._step({name: column[number] for name, column in series.columns.items()})
        for event in series.marks:
            self.hear(event)

    def hear(self, event: Event) -> None:
        """Take in what happens."""
        self._adapter = event.adapter
        if event.kind == "status":
            self._status = event.data
        elif event.kind == "step" and "failed" not in event.data:
            self._step(event.data)
        else:
            self._news.append(told(event))

    def _step(self, numbers: Mapping[str, Any]) -> None:
        self._steps += 1
        for name, curve in self._curves.items():
            if (value := numbers.get(name)) is not None:
                curve.append(float(value))

    def __rich__(self) -> RenderableType:
        """The whole view."""
        return Group(self._head(), self._drawn(), Text("\n".join(self._news) or "nothing has happened yet", "dim"))

    def _head(self) -> Text:
        if not self._status:
            return Text(f"{self._adapter}  connecting…", "dim")
        status, buffer, requests = self._status, self._status["buffer"], self._status["requests"]
        kept = f"{buffer['waiting'] + buffer['pending']} kept" if buffer["connected"] else "buffer unreachable"
        lag = f"  {status['lag_versions']} behind" if status["lag_versions"] else ""
        speed = f"{requests['per_s']:.1f}/s"
        if requests.get("p50_s") is not None:
            speed += f"  p50 {1e3 * requests['p50_s']:.0f} ms  p95 {1e3 * requests['p95_s']:.0f} ms"
        mode = status.get("worker", {}).get("note") or status["mode"]
        facts = f"{status['serving']}{lag}  {mode}  {kept}  {speed}"
        return Text.assemble((self._adapter, "bold"), "  ", facts)

    def _drawn(self) -> Table:
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, curve in self._curves.items():
            if curve:
                table.add_row(CURVES[name], sparkline(curve), f"{curve[-1]:.3g}")
        return table


def sparkline(values: Iterable[float]) -> str:
    """Numbers as a line of bars between the smallest and the largest."""
    known = list(values)
    low, high = min(known), max(known)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in known)


def told(event: Event) -> str:
    """An event as a line."""
    moment = datetime.fromtimestamp(event.time).astimezone().strftime("%H:%M:%S")
    data = event.data
    words: Sequence[object]
    match event.kind:
        case "step":
            what = data.get("failed") or ", ".join(
                f"{name} {data[key]:.3g}" for key, name in CURVES.items() if key in data
            )
            words = ("step", data.get("step", ""), what)
        case "verdict":
            word = "accepted" if data.get("accepted") else "waits" if data.get("early") else "refused"
            words = ("candidate", word, "; ".join(data.get("reasons", ())))
        case "status":
            words = (data.get("serving", ""), data.get("mode", ""))
        case kind:
            details = itertools.chain((data.get("version", ""),), (f"by {data['by']}",) if "by" in data else ())
            words = (kind, *details, *((f"“{data['label']}”",) if "label" in data else ()))
    line = " ".join(str(word) for word in words if word != "")
    return f"{moment}  {''.join(c if c.isprintable() else '?' for c in line)}"
