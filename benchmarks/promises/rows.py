"""The table of promises: an id, what is promised, and the check that says whether it is kept."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class Skip(Exception):
    """This machine lacks what the check needs; the text says what."""


@dataclass(frozen=True, slots=True)
class Trial:
    """How a check is to be made."""

    folder: Path  # empty, its own
    short: bool = True
    seed: int = 0
    broken: str = ""  # the row whose mutation is in force

    @property
    def dice(self) -> random.Random:
        return random.Random(self.seed)

    def times(self, short: int, long: int) -> int:
        """How often something is done, in the short form and in the long one."""
        return short if self.short else long


@dataclass(frozen=True, slots=True)
class Found:
    """Whether a promise was kept, and the figure that says so."""

    kept: bool
    figure: str
    crashed: bool = False  # the check itself came to no end: that says nothing about the promise


@dataclass(frozen=True, slots=True)
class Row:
    """One promise.

    `timed` says that the check asserts a time or a ratio, which the neighbours of a machine can spoil.
    """

    id: str
    promise: str
    check: Callable[[Trial], Found]
    timed: bool


ROWS: dict[str, Row] = {}


def promise(name: str, text: str, timed: bool = False) -> Callable[[Callable[[Trial], Found]], Callable]:  # type: ignore[type-arg]
    """Enter a check into the table."""

    def enter(check: Callable[[Trial], Found]) -> Callable[[Trial], Found]:
        ROWS[name] = Row(name, text, check, timed)
        return check

    return enter
