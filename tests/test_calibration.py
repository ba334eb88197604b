"""A temperature lets an adapter be as sure as the base, and no surer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from servetune.adapters.calibration import HIGHEST, confidence, expected_accuracy, fit_temperature, tempered


def rows(scale: float, seed: int = 0, num: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list((scale * torch.randn(num, 6, generator=generator)).log_softmax(-1))


def test_confidence_is_the_mean_of_the_highest_probabilities() -> None:
    two = [torch.tensor([0.9, 0.1]).log(), torch.tensor([0.3, 0.7]).log()]
    assert confidence(two) == pytest.approx(0.8)
    assert confidence(two, 1e6) == pytest.approx(0.5, abs=1e-4)


def test_votes_say_how_often_the_likeliest_answers_are_right() -> None:
    ours = [torch.tensor([0.9, 0.1]), torch.tensor([0.3, 0.7])]
    assert expected_accuracy(ours, [torch.tensor([0.6, 0.4]), torch.tensor([0.7, 0.3])]) == pytest.approx(0.45)


def test_a_modest_adapter_is_left_alone() -> None:
    assert fit_temperature(rows(1.0), confidence(rows(2.0))) == 1.0


@given(seed=st.integers(0, 1000), allowed=st.floats(0.3, 0.9))
def test_a_surer_adapter_is_cooled_to_what_is_allowed(seed: int, allowed: float) -> None:
    ours = rows(2.0, seed)
    temperature = fit_temperature(ours, allowed)
    if temperature == 1.0:
        assert confidence(ours) <= allowed
    elif temperature == HIGHEST:
        assert confidence(ours, HIGHEST) >= allowed - 1e-4
    else:
        assert confidence(ours, temperature) == pytest.approx(allowed, abs=1e-4)


def test_what_no_temperature_can_mend_stops_at_the_highest() -> None:
    certain = [torch.tensor([1.0, 0, 0, 0, 0, 0]).mul(60).log_softmax(-1)] * 20
    assert fit_temperature(certain, confidence(rows(0.1))) == HIGHEST


@given(st.floats(0, 1), st.floats(0, 1), st.floats(1, HIGHEST))
def test_a_tempered_answer_is_never_surer_and_keeps_its_rank(one: float, other: float, temperature: float) -> None:
    assert tempered(one, 1.0) == pytest.approx(one)
    assert 0 <= tempered(one, temperature) <= one
    low, high = sorted((one, other))
    assert tempered(low, temperature) <= tempered(high, temperature) + 1e-12


def test_rounding_above_one_is_one() -> None:
    assert tempered(1 + 1e-9, 2.0) == 1.0
