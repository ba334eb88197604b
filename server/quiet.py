"""When learning must wait: outside of its windows of the day, and when it has used its share of the processors.

Asked between two units of work; queries wait in the buffer meanwhile. Clocks are passed in.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from datetime import time as Time
from typing import Literal
from zoneinfo import ZoneInfo

MINUTE_S = 60.0
_WINDOW = re.compile(r"([01]\d|2[0-3]):([0-5]\d)\s*-\s*([01]\d|2[0-3]):([0-5]\d)")


@dataclass(frozen=True, slots=True)
class Wait:
    """Why learning waits, and until when, in seconds since 1970; `note` says it to people."""

    reason: Literal["window", "budget"]
    until: float
    note: str


@dataclass(frozen=True, slots=True)
class Windows:
    """Times of the day, from the first to before the last; one that ends before it begins goes over midnight."""

    spans: tuple[tuple[Time, Time], ...]
    zone: ZoneInfo | None = None  # None: as the machine is set

    @classmethod
    def parse(cls, text: str, zone: ZoneInfo | None = None) -> Windows:
        """`22:00-06:00,12:30-13:00`. Raises ValueError."""
        spans = []
        for part in text.split(","):
            found = _WINDOW.fullmatch(part.strip())
            if found is None:
                raise ValueError(f"{part.strip()!r} is not a window: write 22:00-06:00, more of them with commas")
            first, first_minute, last, last_minute = map(int, found.groups())
            span = Time(first, first_minute), Time(last, last_minute)
            if span[0] == span[1]:
                raise ValueError(f"{part.strip()!r} begins when it ends: leave windows out to learn at any time")
            spans.append(span)
        return cls(tuple(spans), zone)

    def closed_until(self, now: float) -> datetime | None:
        """When the next window opens, in the time of the windows; None while one is open."""
        moment = datetime.fromtimestamp(now, self.zone)
        clock = moment.time()
        for begins, ends in self.spans:
            is_within = begins <= clock < ends if begins < ends else clock >= begins or clock < ends
            if is_within:
                return None
        return min(self._next(moment, begins) for begins, _ in self.spans)

    def _next(self, moment: datetime, begins: Time) -> datetime:
        """By the clock on the wall: a night in which it is changed is shorter or longer."""
        day = moment.date() + timedelta(days=moment.time() >= begins)
        opens = datetime.combine(day, begins, self.zone)
        return opens if self.zone else opens.astimezone()


class CpuBudget:
    """A share of some threads over a minute that slides.

    A unit of work counts for a minute after its end, or for as long as it is worth where that is longer: one that
    takes a minute at a share of a tenth is followed by nine of rest.
    """

    def __init__(self, share: float, threads: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = share * threads  # seconds of processors for each second
        self._clock = clock
        self._spent: list[tuple[float, float]] = []  # until when it counts, and seconds of processors

    def spend(self, seconds: float) -> None:
        """A unit of work is done that took so many seconds of processors."""
        if seconds > 0:
            self._spent.append((self._clock() + max(MINUTE_S, seconds / self._rate), seconds))

    def exhausted_s(self) -> float:
        """Seconds until there is something to spend; 0 when there is."""
        now = self._clock()
        self._spent = sorted(each for each in self._spent if each[0] > now)
        over = sum(seconds for _, seconds in self._spent) - self._rate * MINUTE_S
        for until, seconds in self._spent:
            if over < 0:
                break
            over -= seconds
            if over < 0:
                return until - now
        return 0.0


class Quiet:
    """What keeps learning from running now.

    Args:
        clock: seconds since 1970. spent: seconds of processors that this process has used.
    """

    def __init__(
        self,
        windows: Windows | None = None,
        budget: CpuBudget | None = None,
        clock: Callable[[], float] = time.time,
        spent: Callable[[], float] = time.process_time,
    ) -> None:
        self._windows = windows
        self._budget = budget
        self._clock = clock
        self._process = spent
        self._counted = spent()

    def begin(self) -> None:
        """A unit of work begins: what was used before it is not of the budget."""
        self._counted = self._process()

    def end(self) -> None:
        """A unit of work is done."""
        if self._budget:
            self._budget.spend(self._process() - self._counted)

    def wait(self) -> Wait | None:
        """Why learning must wait now; None where it may go on."""
        now = self._clock()
        if self._windows and (opens := self._windows.closed_until(now)):
            return Wait("window", opens.timestamp(), f"waiting for its window until {opens:%H:%M}")
        if self._budget and (rest_s := self._budget.exhausted_s()):
            return Wait("budget", now + rest_s, "waiting: its share of the processors is used up")
        return None
