"""How often a caller may ask: exactly the rate in the long run, a few at once, each caller for themselves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servetune.server.errors import ServiceError
from servetune.server.quota import BURST_S, Quota


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def admitted(quota: Quota, caller: str = "a") -> bool:
    try:
        quota.admit(caller)
    except ServiceError:
        return False
    return True


def test_ten_seconds_worth_at_once_then_the_rate() -> None:
    clock = Clock()
    quota = Quota(60, clock)
    assert sum(admitted(quota) for _ in range(50)) == 10
    clock.now += 1
    assert [admitted(quota), admitted(quota)] == [True, False]
    assert admitted(quota, "b")
    clock.now += 1000
    assert sum(admitted(quota) for _ in range(50)) == 10


def test_a_refusal_says_when_and_keeps_its_word() -> None:
    clock = Clock()
    quota = Quota(3, clock)
    assert admitted(quota)
    with pytest.raises(ServiceError) as caught:
        quota.admit("a")
    assert caught.value.status == 429
    assert caught.value.headers["Retry-After"] == "20"
    clock.now += 20
    assert admitted(quota)


def test_without_a_limit_nobody_is_refused() -> None:
    assert all(admitted(Quota(None)) for _ in range(1000))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 600), st.lists(st.floats(0, 5), min_size=1, max_size=200))
def test_never_more_than_the_rate_and_the_burst(per_minute: int, pauses: list[float]) -> None:
    clock = Clock()
    quota, passed = Quota(per_minute, clock), 0
    for pause in pauses:
        clock.now += pause
        passed += admitted(quota)
    allowed = per_minute / 60 * (sum(pauses) + BURST_S)
    assert passed <= max(1.0, allowed) + 1
