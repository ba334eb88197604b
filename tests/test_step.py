"""One step: what teaches, what is skipped, and that no signal means no change."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from servetune.adapters.family import Family
from servetune.adapters.policy import LoraSpec, Policy
from servetune.adapters.rewards import count_votes
from servetune.adapters.rollouts import roll_out
from servetune.adapters.step import Learner, LearnerConfig
from servetune.adapters.types import Rollouts
from tests.conftest import query, stir

LABELS = ("red", "green cat", "blue dog")
OPEN = LearnerConfig.named("frequency", agreement=(0, 1), min_valid=0, max_tokens=4, learning_rate=1e-2)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_label_rollouts_are_the_exact_distribution(policy: Policy) -> None:
    group = roll_out(policy, query(labels=LABELS), 32, 4, generator())
    assert group.rollouts.answers == LABELS
    assert group.rollouts.num is None
    assert float(group.rollouts.weights.sum()) == pytest.approx(1.0)
    torch.testing.assert_close(group.rollouts.weights, group.rollouts.logprobs.softmax(-1))


def test_drawn_labels_converge_to_the_exact_distribution(policy: Policy) -> None:
    exact = roll_out(policy, query(labels=LABELS), 1, 4, generator())
    drawn = roll_out(policy, query(labels=LABELS), 20_000, 4, generator(), exact=False)
    shares = dict(zip(drawn.rollouts.answers, drawn.rollouts.weights.tolist(), strict=True))
    for label, weight in zip(LABELS, exact.rollouts.weights.tolist(), strict=True):
        assert shares.get(label, 0.0) == pytest.approx(weight, abs=0.015)


def test_cut_answers_are_invalid(policy: Policy) -> None:
    group = roll_out(policy, query(), 16, 2, generator())
    ended = {tokens[-1] in policy.family.end_tokens for tokens in group.rollouts.tokens}
    assert ended == {False} or group.votes.valid < 1
    for tokens, answer in zip(group.rollouts.tokens, group.rollouts.answers, strict=True):
        assert answer == "" or tokens[-1] in policy.family.end_tokens


def test_a_step_raises_the_probability_of_the_majority(policy: Policy) -> None:
    stir(policy, "candidate", std=0.05)
    learner = Learner(policy, OPEN)
    asked = query(labels=tuple("abcdefgh"))
    before = roll_out(policy, asked, 32, 4, generator()).votes.majority
    assert before < 0.9
    for _ in range(5):
        metrics, taught = learner.step([asked])
    policy.use("candidate")
    after = roll_out(policy, asked, 32, 4, generator()).votes.majority
    assert taught == [asked]
    assert metrics.informative == 1
    assert after > before
    assert learner.steps == 5


@pytest.mark.parametrize(
    "config",
    [LearnerConfig.named("frequency", agreement=(1.1, 1.2)), LearnerConfig.named("frequency", min_valid=1.1)],
)
def test_no_signal_no_change(policy: Policy, config: LearnerConfig) -> None:
    learner = Learner(policy, config)
    before = learner.state()
    metrics, taught = learner.step([query(), query(1, labels=LABELS)])
    after = learner.state()
    assert (metrics.informative, taught, learner.steps) == (0, [], 0)
    assert after[1] == before[1] == {}
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])


def test_state_and_load_are_inverse(policy: Policy) -> None:
    learner = Learner(policy, OPEN)
    learner.step([query(labels=LABELS)])
    kept = learner.state()
    learner.step([query(1, labels=LABELS)])
    changed = learner.state()
    learner.load(*kept)
    again = learner.state()
    assert any(not torch.equal(kept[0][key], changed[0][key]) for key in kept[0])
    for ours, theirs in zip(kept, again, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_reference_is_never_moved(policy: Policy) -> None:
    with policy.reference():
        before = policy.probe()
    Learner(policy, OPEN).step([query(labels=LABELS)])
    with policy.reference():
        assert policy.probe() == before


@pytest.mark.parametrize(
    "learner",
    ["default", "frequency", "ttrv", "released", "majority", "random", "format-only", "entropy", "self-training"],
)
def test_every_learner_runs(policy: Policy, learner: str) -> None:
    config = LearnerConfig.named(learner, num_rollouts=8, max_tokens=3, learning_rate=1e-3)
    metrics, _ = Learner(policy, config).step([query(), query(1, labels=LABELS)])
    assert metrics.groups == 2
    assert all(math.isfinite(value) for value in metrics.values.values())


def test_the_published_form_is_the_published_form() -> None:
    config = LearnerConfig.named("ttrv")
    assert (config.exact, config.scale, config.confidence, config.per_token) == (False, True, False, True)
    assert (config.num_rollouts, config.kl_coefficient, config.agreement) == (32, 0.04, (0.0, 1.0))
    assert LearnerConfig.named("released").kl_coefficient == 0.001


def test_a_retreat_goes_half_of_the_way_back(policy: Policy) -> None:
    stir(policy, "candidate", std=0.05)
    learner = Learner(policy, OPEN)
    start, far = policy.zero_weights(), policy.weights("candidate")
    learner.retreat(start)
    for key, value in policy.weights("candidate").items():
        torch.testing.assert_close(value, (start[key] + far[key]) / 2)


def test_a_share_of_the_learned_change_is_published_and_steps_go_on_from_all_of_it(policy: Policy) -> None:
    policy.load("candidate", policy.zero_weights())
    learner = Learner(policy, replace(OPEN, share=0.5, average=0.0))
    for _ in range(3):
        learner.step([query(labels=tuple("abcdefgh"))])
    ahead = policy.weights("candidate")
    learner.propose()
    published, moments = learner.state()
    for key, value in changes(published).items():
        torch.testing.assert_close(value, 0.5 * changes(ahead)[key])
    learner.accept()
    assert_same(policy.weights("candidate"), ahead)
    stir(policy, "candidate", std=0.1)
    learner.load(published, moments)
    assert_same(policy.weights("candidate"), ahead)
    learner.propose()
    assert_same(policy.weights("candidate"), published)


@pytest.mark.parametrize(
    ("labels", "best", "start", "chosen"),
    [
        ("many", 0.3, 0.7, [0.7, 0.5, 0.3, 0.3]),  # one neighbour at a time
        ("many", 1.0, 0.7, [0.7, 1.0, 1.0]),
        ("few", 1.0, 0.7, [0.7, 0.7]),
        ("few", 0.5, 0.7, [0.7, 0.5, 0.5]),
    ],
)
def test_the_share_that_witnesses_like_best_is_published(
    policy: Policy, labels: str, best: float, start: float, chosen: list[float]
) -> None:
    policy.load("candidate", policy.zero_weights())
    learner = Learner(policy, LearnerConfig(min_valid=0, share=start), seed=0)
    names = LABELS if labels == "few" else tuple(f"red {word}" for word in "abcdefghijklmnopqrst")
    learner.step([query(seed, labels=names) for seed in range(8)])
    stir(policy, "candidate", std=0.05)
    learner._average = ahead = policy.weights("candidate")
    witnesses = learner.witnesses()
    assert witnesses

    def nearness() -> float:
        lora_b = next(key for key in ahead if "lora_B" in key)
        share = float((policy.weights("candidate")[lora_b] / ahead[lora_b]).mean())
        return -abs(share - best)

    found = [learner.share]
    for _ in chosen[1:]:
        learner.choose_share(witnesses, nearness)
        found.append(learner.share)
        for key, value in changes(policy.weights("candidate")).items():
            torch.testing.assert_close(value, learner.share * changes(ahead)[key])
        learner.proceed()
        assert_same(policy.weights("candidate"), ahead)
    assert found == chosen


def changes(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What an adapter adds to each matrix of the base, without LoRA's scale."""
    return {key: weights[key.replace("lora_A", "lora_B")] @ a for key, a in weights.items() if "lora_A" in key}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key])


def test_a_retreat_from_a_share_keeps_the_share(policy: Policy) -> None:
    stir(policy, "candidate", std=0.05)
    learner = Learner(policy, replace(OPEN, share=0.5))
    learner.propose()
    far = policy.weights("candidate")
    learner.retreat(policy.zero_weights())
    half = policy.weights("candidate")
    learner.accept()
    learner.propose()
    assert_same(policy.weights("candidate"), half)
    assert any(not torch.equal(half[key], value) for key, value in far.items())


def gradient(policy: Policy) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in policy.parameters("candidate").values() if p.grad is not None])
    for parameter in policy.parameters("candidate").values():
        parameter.grad = None
    return found


@pytest.fixture(params=["idefics3", "gemma3", "qwen3_5"])
def any_policy(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Policy:
    """Of a family whose answers share their prompt, and of those that copy it."""
    made = Policy(Family.load(str(checkpoints[request.param])), LoraSpec(4, 8), ("candidate", "live"))
    for slot in made.slots:
        made.load(slot, made.zero_weights())
    return made


@pytest.mark.parametrize("labels", [(), LABELS])
def test_a_gradient_in_chunks_is_the_whole_one(any_policy: Policy, labels: tuple[str, ...]) -> None:
    """Rollouts that do not fit into memory together go back to the prompt one chunk after the other."""
    policy = any_policy
    stir(policy, "candidate", std=0.05)
    learner = Learner(policy, replace(OPEN, num_rollouts=16))
    policy.use("candidate")
    group = learner._roll_out(query(labels=labels))
    whole = learner._accumulate(group).divergence, gradient(policy)
    learner._max_tokens = 3
    assert len(list(learner._chunks(group.rollouts.tokens, 0))) > 1
    group = replace(group, prefix=policy.begin(group.observation))
    chunked = learner._accumulate(group).divergence, gradient(policy)
    assert chunked[0] == pytest.approx(whole[0], abs=1e-5)
    assert (chunked[1] - whole[1]).norm() / whole[1].norm() < 1e-5


@pytest.mark.parametrize("num", [8, 64])
def test_what_a_backward_pass_keeps_is_bounded(any_policy: Policy, num: int) -> None:
    """Bytes of tensors that autograd saved, against the limit and against what they would be without."""
    policy = any_policy
    stir(policy, "candidate", std=0.05)
    longest = 24
    tokens = [tuple(torch.randint(260, 300, (longest,)).tolist()) for _ in range(num)]
    learner = Learner(policy, replace(OPEN, max_bytes=2_000_000))
    policy.use("candidate")
    made = learner._roll_out(query())
    rollouts = Rollouts(tuple(tokens), ("a",) * num, torch.full((num,), 1 / num), torch.zeros(num), num)
    group = replace(made, rollouts=rollouts, votes=count_votes(rollouts))

    def peak() -> int:
        alive, most = 0, 0
        whole = torch.autograd.backward
        sizes: dict[int, int] = {}

        def save(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal alive, most
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in sizes:
                sizes[storage.data_ptr()] = storage.nbytes()
                alive += storage.nbytes()
                most = max(most, alive)
            return tensor

        def freed(*args: object) -> None:
            nonlocal alive
            whole(*args)  # type: ignore[arg-type]
            alive = 0
            sizes.clear()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.autograd, "backward", freed)
            with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
                learner._accumulate(replace(group, prefix=policy.begin(group.observation)))
        return most

    weights = sum(p.numel() * p.element_size() for p in policy.family.model.parameters())
    bounded = peak() - weights
    assert bounded < 2 * learner.config.max_bytes
    learner._max_tokens = 10**9
    if num == 64:
        assert peak() - weights > 2 * bounded
