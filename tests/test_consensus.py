"""Votes over views, neighbours and the stream: the figures by hand, and what must never happen."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from servetune.adapters import consensus


def confident(answers: list[int], labels: int, share: float = 0.9) -> torch.Tensor:
    """(N, L) log-probabilities that give each query one answer with this share."""
    rows = torch.full((len(answers), labels), (1 - share) / (labels - 1))
    rows[torch.arange(len(answers)), torch.tensor(answers)] = share
    return rows.log()


def test_information_is_entropy_of_the_mean_less_mean_entropy() -> None:
    logprobs = torch.tensor([[0.8, 0.2], [0.3, 0.7]]).log()
    mean = -(0.55 * math.log(0.55) + 0.45 * math.log(0.45))
    each = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2) + 0.3 * math.log(0.3) + 0.7 * math.log(0.7)) / 2
    assert consensus.mutual_information(logprobs) == pytest.approx(mean - each, abs=1e-6)


def test_only_what_both_looks_say_counts_as_repeated() -> None:
    first = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    second = torch.tensor([[0.6, 0.4], [0.2, 0.8]])

    def told(drawn: torch.Tensor, other: torch.Tensor) -> float:
        """By hand: a tenth of each answer is whatever the stream's answers are."""
        mean = [(other[0, y] + other[1, y]) / 2 for y in (0, 1)]
        terms = [drawn[i, y] * math.log(0.9 * other[i, y] / mean[y] + 0.1) for i in (0, 1) for y in (0, 1)]
        return float(sum(terms)) / 2

    found = consensus.repeated_information(first.log(), second.log())
    assert found == pytest.approx((told(first, second) + told(second, first)) / 2, abs=1e-6)


def test_looks_that_find_something_else_in_nothing_repeat_nothing() -> None:
    rng = torch.Generator().manual_seed(0)
    first, second = (confident(torch.randint(0, 20, (64,), generator=rng).tolist(), 20) for _ in range(2))
    assert consensus.mutual_information(((first + second) / 2).log_softmax(-1)) > 0.3
    assert consensus.repeated_information(first, second) < 0
    assert consensus.repeated_information(first, first) > 1.5
    assert consensus.repeated_information(*[confident([3] * 64, 20)] * 2) == pytest.approx(0, abs=1e-6)


def test_answers_that_ignore_the_image_carry_no_information() -> None:
    assert consensus.mutual_information(confident([1] * 20, 4)) == pytest.approx(0, abs=1e-6)
    assert consensus.mutual_information(torch.full((20, 4), 0.25).log()) == pytest.approx(0, abs=1e-6)
    assert consensus.mutual_information(confident([0, 1, 2, 3] * 5, 4)) > 0.8


def test_the_more_informative_view_weighs_more() -> None:
    weights = consensus.view_weights({"same": 0.5, "blur": 1.0, "sharp": 0.1})
    assert weights["blur"] > weights["same"] > weights["sharp"]
    assert sum(weights.values()) == pytest.approx(1)
    assert set(consensus.view_weights({"a": 1.0, "b": 2.0}, sharpness=0).values()) == {0.5}


def test_neighbours_are_mutual_and_clear() -> None:
    generator = torch.Generator().manual_seed(0)
    things = torch.randn(10, 16, generator=generator)
    twice = torch.cat([things, things + 0.05 * torch.randn(10, 16, generator=generator)])
    found = consensus.mutual_neighbours(twice)
    assert found.tolist() == [*range(10, 20), *range(10)]
    assert consensus.mutual_neighbours(things[:2]).tolist() == [0, 1]


def test_nobody_is_pooled_with_strangers() -> None:
    strangers = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    alone = (consensus.mutual_neighbours(strangers) == torch.arange(40)).float().mean()
    assert alone > 0.9


def test_a_label_given_too_often_is_held_back_within_bounds() -> None:
    answers = [0] * 30 + list(range(1, 11))
    logvotes = confident(answers, 11, share=0.6)
    offsets = consensus.balance(logvotes)
    assert offsets[0] == offsets.max() > 1
    assert offsets.abs().max() <= 2
    before, after = logvotes.exp().mean(0), (logvotes - offsets).softmax(-1).mean(0)
    assert after[0] < before[0]


def test_a_stream_of_one_sure_thing_is_left_alone() -> None:
    logvotes = confident([3] * 50, 20, share=0.99)
    assert (logvotes - consensus.balance(logvotes)).argmax(-1).tolist() == [3] * 50


def test_labels_that_few_queries_could_not_have_shown_are_not_favoured() -> None:
    assert consensus.balance(confident([0, 1], 100))[2:].abs().max() < 0.1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_unshown_answers_keep_the_references_probability(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 8))
    weights = st.lists(st.floats(0.01, 1), min_size=size, max_size=size)
    target, reference = (torch.tensor(data.draw(weights)) for _ in range(2))
    target, reference = target / target.sum(), reference / reference.sum()
    shown = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    kept = consensus.keep_unshown(target, reference, shown)
    assert float(kept.sum()) == pytest.approx(1, abs=1e-5)
    if bool(shown.any()) and not bool(shown.all()):
        torch.testing.assert_close(kept[~shown], reference[~shown])
        ratio = kept[shown] / target[shown]
        torch.testing.assert_close(ratio, ratio[0].expand_as(ratio), rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(kept, target)


def test_looks_count_by_how_sure_they_are() -> None:
    unsure, sure = torch.tensor([0.51, 0.49]).log(), torch.tensor([0.05, 0.95]).log()
    pooled = consensus.pool_looks(torch.stack([unsure, unsure, unsure, sure])).exp()
    assert pooled.sum() == pytest.approx(1.0)
    assert pooled[1] > 0.9


def test_no_single_look_rules_an_answer_out() -> None:
    for_it = torch.tensor([0.0, -30.0])
    against = torch.tensor([-1000.0, 0.0])
    assert consensus.pool_looks(torch.stack([for_it, for_it, against])).argmax() == 0
    assert consensus.pool_looks(torch.full((3, 4), -5.0)).exp().tolist() == pytest.approx([0.25] * 4)
    assert consensus.pool_looks(torch.zeros(2, 1)).tolist() == [0.0]
