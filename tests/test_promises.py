"""The promises that only a defect can break, in their short form (`python -m benchmarks.promises` has all).

Those that need no server of their own are also seen to fail when what they check is broken on purpose.
"""

from __future__ import annotations

import pytest

from benchmarks.promises.__main__ import check
from benchmarks.promises.breaking import MUTATIONS
from benchmarks.promises.rows import ROWS

QUICK = {"A1", "A5", "A6", "P4", "P7", "P9", "S1", "S2", "S6", "S7"}


# P2's short form is three quarters of a minute of learning; tests/test_gate.py has the gate. I10 installs a tool.
ELSEWHERE = {"P2", "I10"}


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if not row.timed and name not in ELSEWHERE])
def test_a_promise_is_kept(name: str) -> None:
    found = check(ROWS[name], short=True, seed=0, broken=False)
    assert found.kept, found.figure


@pytest.mark.parametrize("name", sorted(QUICK))
def test_a_broken_promise_is_noticed(name: str) -> None:
    found = check(ROWS[name], short=True, seed=0, broken=True)
    assert not found.kept, found.figure
    assert not found.crashed, found.figure


def test_every_promise_can_be_broken() -> None:
    assert ROWS.keys() <= MUTATIONS.keys()
