"""The parsers of bytes from outside, on damaged files: what `python -m benchmarks.fuzz` does, in seconds."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.fuzz.drive import Harness, by_mutation, damaged
from benchmarks.fuzz.targets import TARGETS, Made
from servetune.server import decoders
from servetune.server.decoding import REASONS, Limits, Refused


@pytest.fixture(params=sorted(TARGETS), scope="module")
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return TARGETS[request.param](tmp_path_factory.mktemp(request.param))


def test_what_is_whole_is_read(target: Made) -> None:
    for seed in target.seeds:
        target.run(seed)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_what_is_damaged_is_refused_in_good_order(target: Made, data: st.DataObject) -> None:
    seed = data.draw(st.sampled_from(target.seeds))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what Pillow has to say of damaged files
        target.run(damaged(seed, data.draw(st.randoms(use_true_random=False)), target.seeds))


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=300))
def test_what_nobody_meant_is_refused_in_good_order(target: Made, data: bytes) -> None:
    target.run(data)


WORDS = st.sampled_from(["ok", "16", "0", "-1", "99999", "1e1", "²", "٣", "", *REASONS]) | st.text(max_size=9)


@settings(max_examples=300, deadline=None)
@given(words=st.lists(WORDS, max_size=5))
def test_a_decoder_that_says_anything_is_not_believed(words: list[str]) -> None:
    child = decoders._Child(Limits(decoded_side=32), 100, 1.0)
    child._ask = lambda request: " ".join(words)  # type: ignore[method-assign]
    with contextlib.suppress(Refused):
        assert max(child.decode(b"x").size) <= 32


class Enough(Exception):
    """A run that has no end of its own."""


def fails(data: bytes) -> None:
    if b"x" in data:
        raise ValueError("x")


@pytest.mark.parametrize(("run", "found"), [(fails, 1), (len, 0)])
def test_a_finding_is_kept_with_its_input(
    run: Callable[[bytes], None], found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(code: int) -> None:
        raise Enough

    monkeypatch.setattr("os._exit", leave)
    with pytest.raises(Enough):
        by_mutation(Harness(Made(run, [b"x"]), 200, tmp_path), [b"x"], random.Random(0))
    kept = [path.read_bytes() for path in tmp_path.glob("found-*")]
    assert len(kept) == found
    assert all(b"x" in data for data in kept)
    report = (tmp_path / "report.json").read_text()
    assert '"runs": 200' in report
    assert ("ValueError in test_fuzz.py fails" in report) == bool(found)
