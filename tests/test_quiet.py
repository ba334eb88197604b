"""When learning waits, on clocks of the tests' own."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from pydantic import ValidationError

from servetune.server.quiet import MINUTE_S, CpuBudget, Quiet, Windows
from servetune.server.settings import Settings

BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str, zone: ZoneInfo = BERLIN) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=zone).timestamp()


@pytest.mark.parametrize(
    ("now", "opens"),
    [
        ("2026-11-27T21:59:59", "2026-11-27T22:00"),
        ("2026-11-27T22:00:00", None),
        ("2026-11-28T00:30:00", None),
        ("2026-11-28T05:59:59", None),
        ("2026-11-28T06:00:00", "2026-11-28T12:30"),
        ("2026-11-28T12:45:00", None),
        ("2026-11-28T13:00:00", "2026-11-28T22:00"),
    ],
)
def test_windows_go_over_midnight_and_may_be_several(now: str, opens: str | None) -> None:
    windows = Windows.parse("22:00-06:00, 12:30-13:00", BERLIN)
    found = windows.closed_until(at(now))
    assert found == (opens and datetime.fromisoformat(opens).replace(tzinfo=BERLIN))


def test_after_the_last_window_of_a_day_comes_the_first_of_the_next() -> None:
    found = Windows.parse("02:00-03:00", BERLIN).closed_until(at("2026-12-31T03:00"))
    assert found == datetime(2027, 1, 1, 2, tzinfo=BERLIN)


def test_a_window_is_by_the_clock_on_the_wall() -> None:
    windows = Windows.parse("04:00-05:00", BERLIN)
    now = at("2026-03-28T23:00")  # the clock goes forward in this night
    opens = windows.closed_until(now)
    assert opens is not None
    assert opens.timestamp() - now == 4 * 3600
    assert Windows.parse("04:00-05:00", ZoneInfo("UTC")).closed_until(at("2026-03-29T06:30")) is None


def test_without_a_zone_it_is_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime(2026, 11, 28, 12, 0).astimezone()
    opens = Windows.parse("13:00-14:00").closed_until(now.timestamp())
    assert opens is not None
    assert opens.timestamp() - now.timestamp() == 3600


@pytest.mark.parametrize("text", ["", "22-6", "22:00", "24:00-06:00", "22:00-22:00", "22:00-06:00,", "ten-noon"])
def test_what_is_no_window_is_said(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValidationError, match=r"write 22:00-06:00|leave windows out"):
        Settings(home=tmp_path, learn_windows=text)


@pytest.mark.parametrize("name", ["Mars/Base", "../etc/passwd", "/etc/localtime"])
def test_what_is_no_time_zone_is_said(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValidationError, match="no time zone has that name"):
        Settings(home=tmp_path, learn_timezone=name)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_budget_is_a_share_of_a_sliding_minute() -> None:
    clock = Clock()
    budget = CpuBudget(0.25, threads=2, clock=clock)  # 30 s of processors in a minute
    budget.spend(20)
    assert budget.exhausted_s() == 0
    clock.now = 10
    budget.spend(10)
    assert budget.exhausted_s() == 50, "until the first 20 s are a minute ago"
    clock.now = 59.9
    assert budget.exhausted_s() == pytest.approx(0.1)
    clock.now = MINUTE_S
    assert budget.exhausted_s() == 0
    budget.spend(25)
    assert budget.exhausted_s() == 10


def test_a_unit_of_work_above_the_share_of_a_minute_is_paid_for() -> None:
    clock = Clock()
    budget = CpuBudget(0.1, threads=1, clock=clock)
    budget.spend(60)
    assert budget.exhausted_s() == 600


@pytest.mark.parametrize("unit_s", [0.5, 3.0, 40.0])
def test_in_the_long_run_no_more_than_the_share_is_used(unit_s: float) -> None:
    clock, used = Clock(), 0.0
    budget = CpuBudget(0.2, threads=1, clock=clock)
    while clock.now < 36_000:
        if rest_s := budget.exhausted_s():
            clock.now += rest_s
            continue
        clock.now += unit_s
        budget.spend(unit_s)
        used += unit_s
    assert 0.8 * 0.2 < used / clock.now <= 0.2 * 1.05


def test_the_window_is_told_before_the_budget_and_neither_is_no_wait() -> None:
    clock, used = Clock(), [0.0]
    clock.now = at("2026-11-28T12:00")
    budget = CpuBudget(0.5, 1, clock)
    quiet = Quiet(Windows.parse("22:00-06:00", BERLIN), budget, clock, lambda: used[0])
    quiet.begin()
    used[0] = 45.0
    quiet.end()
    found = quiet.wait()
    assert found is not None
    assert (found.reason, found.until) == ("window", at("2026-11-28T22:00"))
    clock.now = at("2026-11-28T22:00")
    assert quiet.wait() is None, "the budget is that of hours ago"
    quiet.begin()
    used[0] = 90.0
    quiet.end()
    found = quiet.wait()
    assert found is not None
    assert (found.reason, found.until - clock.now) == ("budget", 90)
    assert Quiet().wait() is None


def test_settings_without_either_never_wait(tmp_path: Path) -> None:
    assert Settings(home=tmp_path).quiet().wait() is None
    hours = Settings(home=tmp_path, learn_windows="00:00-12:00,12:00-00:00", learn_timezone="Asia/Tokyo")
    assert hours.quiet().wait() is None
