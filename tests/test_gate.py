"""The gate lets a harmless candidate pass and stops each kind of harm, with the reason named."""

from __future__ import annotations

import pytest
import torch

from servetune.adapters.gate import Gate, Limits
from servetune.adapters.policy import Policy
from tests.conftest import query, stir

LABELS = ("red", "green cat", "blue dog", "yes", "no")
LOOSE = Limits(max_kl_base=1e9, max_kl_step=1e9, min_valid=0, min_distinct=0, min_unshown=0)


def gate(policy: Policy, limits: Limits) -> Gate:
    made = Gate(policy, limits, max_tokens=4)
    made.remember([query(seed, labels=LABELS) for seed in range(3)])
    return made


def test_an_unchanged_candidate_is_accepted(policy: Policy) -> None:
    verdict = gate(policy, Limits()).judge()
    assert verdict.accepted, verdict.reasons
    assert verdict.metrics["kl_base"] == pytest.approx(0, abs=1e-6)
    assert verdict.metrics["unshown"] == pytest.approx(1, abs=1e-6)


def test_open_questions_are_judged_too(policy: Policy) -> None:
    made = Gate(policy, LOOSE, max_tokens=4)
    made.remember([query(1), query(2)])
    unchanged = made.judge().metrics["kl_base"]
    stir(policy, "candidate", std=1.0)
    assert unchanged == pytest.approx(0, abs=1e-5)
    assert made.judge().metrics["kl_base"] > 0.01


def test_weights_that_are_not_finite_are_refused(policy: Policy) -> None:
    judge = gate(policy, LOOSE)
    with torch.no_grad():
        next(iter(policy.parameters("candidate").values()))[0, 0] = float("nan")
    verdict = judge.judge()
    assert not verdict.accepted
    assert verdict.reasons == ("weights are not finite",)


def test_a_candidate_that_moved_too_far_is_refused(policy: Policy) -> None:
    stir(policy, "candidate", std=2.0)
    verdict = gate(policy, Limits(min_valid=0, min_distinct=0, min_unshown=0)).judge()
    assert not verdict.accepted
    assert any(reason.startswith("kl_") for reason in verdict.reasons)


def test_the_step_is_measured_from_what_is_live(policy: Policy) -> None:
    for slot in ("candidate", "live"):
        stir(policy, slot, std=2.0)
    metrics = gate(policy, LOOSE).judge().metrics
    assert metrics["kl_step"] == pytest.approx(0, abs=1e-6)
    assert metrics["kl_base"] > 0.01


@pytest.mark.parametrize("name", ["valid", "distinct", "unshown"])
def test_each_floor_refuses_by_name(policy: Policy, name: str) -> None:
    limits = Limits(max_kl_base=1e9, max_kl_step=1e9, min_valid=0, min_distinct=0, min_unshown=0)
    impossible = Limits(**{**{f: getattr(limits, f) for f in Limits.__slots__}, f"min_{name}": 1e9})
    stir(policy, "candidate", std=0.5)
    verdict = gate(policy, impossible).judge()
    assert [reason.split()[0] for reason in verdict.reasons] == [name]


def test_one_answer_to_everything_is_a_collapse(policy: Policy) -> None:
    """Sabotage: an adapter found by search that answers all replayed queries alike, where the base does not."""
    made = Gate(policy, Limits(max_kl_base=1e9, max_kl_step=1e9, min_valid=0, min_unshown=0), max_tokens=4)
    asked = [query(seed, labels=LABELS) for seed in range(8)]
    made.remember(asked)
    views = [made._view(None, q, policy.observe(q)).answer for q in asked]
    if len(set(views)) < 2:
        pytest.skip("the random base answers alike")
    for seed in range(20):
        stir(policy, "candidate", seed=seed, std=4.0)
        metrics = made.judge().metrics
        if metrics["distinct"] <= 0.5:
            break
    assert not made.judge().accepted
