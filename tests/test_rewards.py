"""Rewards by hand-computed numbers, and the algebra of the published reward."""

import math

import pytest
import torch

from servetune.adapters.grpo import advantages
from servetune.adapters.rewards import REWARDS, confidence_weight, count_votes
from servetune.adapters.types import Rollouts


def rollouts(counts: dict[str, int]) -> Rollouts:
    num = sum(counts.values())
    weights = torch.tensor([count / num for count in counts.values()])
    tokens = tuple((index,) for index in range(len(counts)))
    return Rollouts(tokens, tuple(counts), weights, torch.zeros(len(counts)), num)


def test_shares_entropy_and_validity() -> None:
    votes = count_votes(rollouts({"dog": 4, "cat": 2, "": 2}))
    assert votes.shares == (0.5, 0.25, 0.0)
    assert votes.valid == 0.75
    assert votes.majority == 0.5
    assert votes.entropy == pytest.approx(-(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3))


def test_silence_has_no_vote_and_no_reward_even_as_the_majority() -> None:
    votes = count_votes(rollouts({"": 30, "dog": 2}))
    for name, reward in REWARDS.items():
        if name not in ("ttrv", "released"):  # r2 is added to every rollout alike
            assert reward(votes)[0] == 0.0, name
    assert votes.majority == 2 / 32


def test_published_reward_by_hand() -> None:
    votes = count_votes(rollouts({"a": 24, "b": 8}))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert REWARDS["ttrv"](votes) == pytest.approx([0.75 - 0.75 * entropy, 0.25 - 0.75 * entropy])
    assert REWARDS["released"](votes) == pytest.approx(
        [0.75 - 0.75 * entropy / math.log(2), 0.25 - 0.75 * entropy / math.log(2)]
    )
    assert REWARDS["majority"](votes) == [1.0, 0.0]


@pytest.mark.parametrize("published", ["ttrv", "released"])
@pytest.mark.parametrize("counts", [{"a": 20, "b": 7, "c": 5}, {"a": 16, "b": 16}, {"a": 9, "b": 3, "": 20}])
@pytest.mark.parametrize("scale", [True, False])
def test_the_published_entropy_term_cancels_in_the_advantage(
    published: str, counts: dict[str, int], scale: bool
) -> None:
    made = rollouts(counts)
    votes = count_votes(made)
    assert votes.entropy > 0.5
    plain, whole = (
        advantages(torch.tensor(REWARDS[name](votes), dtype=torch.float64), made.weights.double(), made.num, scale)
        for name in ("frequency", published)
    )
    torch.testing.assert_close(plain, whole, atol=1e-8, rtol=0)


def test_the_effective_form_depends_on_entropy() -> None:
    torn, sure = (count_votes(rollouts(counts)) for counts in ({"a": 16, "b": 16}, {"a": 30, "b": 2}))
    assert confidence_weight(torn) == pytest.approx(0.25)
    assert 0.25 < confidence_weight(sure) < 1.0
