"""The gate lets a harmless candidate pass and stops each kind of harm, with the reason named."""

from __future__ import annotations

import pytest
import torch

from servetune.adapters.gate import Gate, Limits
from servetune.adapters.policy import Policy
from servetune.adapters.step import Learner, LearnerConfig
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
    views = [view.answer for view in made._views(None, asked, [policy.observe(q) for q in asked])]
    if len(set(views)) < 2:
        pytest.skip("the random base answers alike")
    for seed in range(20):
        stir(policy, "candidate", seed=seed, std=4.0)
        metrics = made.judge().metrics
        if metrics["distinct"] <= 0.5:
            break
    assert not made.judge().accepted


def test_witnesses_that_the_candidate_contradicts_refuse_it(policy: Policy) -> None:
    """Votes on untaught queries: a candidate that finds them less likely than the base does is not served."""
    learner = Learner(policy, LearnerConfig(min_valid=0, agreement=(0, 1), memory_size=256))
    learner.step([query(seed, labels=LABELS) for seed in range(104)])
    witnesses = learner.witnesses()
    assert len(witnesses) == 13
    assert all(lesson.ballot.updates == 0 for lesson in witnesses)
    wide = Limits(max_kl_base=1e9, max_kl_step=1e9, min_valid=0, min_distinct=0, min_unshown=0)
    made = Gate(policy, wide, max_tokens=4)
    policy.load("candidate", policy.zero_weights())
    policy.load("live", policy.zero_weights())
    verdict = made.judge(witnesses)
    assert verdict.accepted
    assert verdict.metrics["witness_base"] == pytest.approx(0, abs=1e-5)
    for seed in range(50):
        stir(policy, "candidate", seed=seed, std=0.6)
        if made.judge(witnesses).metrics["witness_base"] < -0.03:
            break
    verdict = made.judge(witnesses)
    assert not verdict.accepted
    assert any(reason.startswith("witness_base") for reason in verdict.reasons)
    assert made.judge(witnesses[:5]).accepted, "few witnesses are not heard"


@pytest.mark.parametrize(
    ("found", "accepted", "early"),
    [
        ({"witness_base": 0.0}, True, False),
        ({"witness_base": -0.03}, False, True),
        ({"witness_base": -0.06}, False, False),
        ({"witness_base": -0.03, "surer": 0.1}, False, False),
        ({"witness_base": 0.0, "kl_base": 0.3}, False, False),
        ({"witness_base": 0.1, "kl_base": 0.3}, True, False),
        ({"witness_base": 0.1, "kl_base": 0.8}, False, False),
        ({"kl_step": 0.5}, False, False),
    ],
)
def test_what_witnesses_are_needed_for(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, found: dict[str, float], accepted: bool, early: bool
) -> None:
    """Near enough to their votes, or early; and nearer, the more has changed."""
    measured = {"kl_base": 0.1, "kl_step": 0.1, "valid": 1.0, "distinct": 1.0, "unshown": 1.0}
    heard = {"witness_base": 0.0, "witness_live": 0.0, "witness_error": 0.04, "surer": 0.0}
    monkeypatch.setattr(Gate, "_measure", lambda _: measured | found)
    monkeypatch.setattr(Gate, "_hear", lambda *_: {k: found.get(k, v) for k, v in heard.items()})
    verdict = Gate(policy).judge()
    assert (verdict.accepted, verdict.early) == (accepted, early)


def test_a_candidate_of_several_spans_may_have_moved_as_many_times_as_far(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {"kl_base": 0.5, "kl_step": 0.5, "valid": 1.0, "distinct": 1.0, "unshown": 1.0}
    monkeypatch.setattr(Gate, "_measure", lambda _: dict(measured))
    assert [Gate(policy).judge(spans=spans).accepted for spans in (1, 2)] == [False, True]


def test_what_is_live_is_convicted_only_beyond_doubt(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """As bad as 0.06 nats with a standard error of 0.04 refuses a candidate; what is live stays until 0.1."""
    wide = Limits(max_kl_base=1e9, max_kl_step=1e9, min_valid=0, min_distinct=0, min_unshown=0, max_surer=1e9)
    made = Gate(policy, wide, max_tokens=4)
    for distance, stays in ((-0.06, True), (-0.1, False)):
        heard = {"witness_base": distance, "witness_live": 0.0, "witness_error": 0.04, "surer": 0.0}
        monkeypatch.setattr(Gate, "_hear", lambda *_, heard=heard: heard)
        assert not made.judge().accepted
        assert made.judge(convict=True).accepted == stays
