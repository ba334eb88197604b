"""The default learner: what is remembered, what it teaches, and when nothing may change."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from servetune.adapters import tree
from servetune.adapters.memory import Ballot, Memory
from servetune.adapters.policy import Policy
from servetune.adapters.rollouts import cast_ballot, vote_again
from servetune.adapters.step import Learner, LearnerConfig
from servetune.adapters.types import Query
from servetune.adapters.views import SAME, safe_views
from tests.conftest import query, stir

LABELS = tuple("abcdefgh")
CONFIG = LearnerConfig(max_tokens=4, learning_rate=1e-2, memory_size=64, agreement=(0, 1), min_valid=0)


def ballot(number: int, shares: dict[str, list[float]], embedding: list[float], measured: bool = True) -> Ballot:
    """A closed ballot over as many labels as there are shares."""
    scores = {view: torch.tensor(row).log() for view, row in shares.items()}
    labels = LABELS[: len(next(iter(shares.values())))]
    asked = Query(f"q{number}", (), "what?", labels)
    return Ballot(asked, labels, ((1,),) * len(labels), scores, {}, torch.tensor(embedding), 1.0, measured)


def spread(number: int, size: int = 16) -> list[float]:
    """An embedding that resembles no other."""
    return torch.randn(size, generator=torch.Generator().manual_seed(number)).tolist()


def test_views_are_pooled_by_what_they_tell() -> None:
    memory = Memory()
    for number in range(16):
        right = number % 2
        clear = [0.1, 0.1]
        clear[right] = 0.9
        memory.add(ballot(number, {SAME: [0.55, 0.45], "blur": [c / sum(clear) for c in clear]}, spread(number)))
    information = memory.measure()
    assert information["blur"] > 0.3 > information[SAME]
    for lesson in memory.lessons():
        assert int(lesson.target.argmax()) == int(lesson.ballot.query.id[1:]) % 2


def test_the_commonest_label_loses_a_close_vote() -> None:
    memory = Memory()
    for number in range(40):
        row = [0.01] * 8
        row[0], row[1 + number % 7] = 0.5, 0.44
        memory.add(ballot(number, {SAME: row}, spread(number)))
    chosen = [int(lesson.target.argmax()) for lesson in memory.lessons()]
    assert chosen.count(0) < 20


def test_a_label_nobody_was_given_keeps_its_probability() -> None:
    memory = Memory()
    for number in range(12):
        row = [0.02] * 8
        row[number % 4], row[7] = 0.7, 0.18
        memory.add(ballot(number, {SAME: row}, spread(number)))
    for lesson in memory.lessons():
        assert float(lesson.target[7]) == pytest.approx(0.18, abs=1e-3)


def test_a_question_asked_once_teaches_what_its_views_say() -> None:
    memory = Memory()
    memory.add(ballot(0, {SAME: [0.4, 0.6], "moved": [0.9, 0.1]}, spread(0)))
    lesson = memory.lessons()[0]
    assert lesson.target[0] > 0.6
    assert memory.dependence() is None


def test_different_questions_do_not_pass_for_different_images() -> None:
    """Blank pictures, two questions: each has its own answer, whatever the picture shows."""
    memory = Memory()
    for number in range(16):
        one = ballot(number, {SAME: [0.9, 0.1]}, spread(number))
        answers = ("yes", "no") if number % 2 else ("red", "blue")
        asked = replace(one.query, question=" or ".join(answers), labels=())
        memory.add(replace(one, query=asked, answers=answers))
    assert memory.dependence() == pytest.approx(0, abs=1e-6)


def test_a_question_with_one_answer_to_all_images_teaches_nothing(policy: Policy) -> None:
    """Beside one that teaches: what is learned from it is to answer without looking."""
    learner = Learner(policy, replace(CONFIG, min_information=0.1))
    clear = [0.05] * 8
    for number in range(16):
        row = list(clear)
        row[number % 8 if number % 2 else 0] = 0.65
        made = ballot(number, {SAME: row}, spread(number))
        question = "what shape?" if number % 2 else "what colour?"
        learner.memory.add(replace(made, query=replace(made.query, question=question)))
    lessons, dependence = learner.memory.lessons(), learner.memory.dependence()
    assert dependence is not None
    assert dependence > 0.1
    assert {each.ballot.query.question for each in learner._useful(lessons, dependence)} == {"what shape?"}


def test_a_query_is_remembered_once_and_can_be_forgotten() -> None:
    memory = Memory(size=3)
    for number in (0, 1, 1, 2, 3):
        memory.add(ballot(number, {SAME: [0.5, 0.5]}, spread(number)))
    assert [lesson.ballot.query.id for lesson in memory.lessons()] == ["q1", "q2", "q3"]
    memory.forget(["q2"])
    assert len(memory) == 2
    memory.forget()
    assert (len(memory), memory.lessons()) == (0, [])


def test_memory_is_bounded_in_bytes(policy: Policy) -> None:
    made = [cast_ballot(policy, query(seed, LABELS), [SAME], 8, 4, torch.Generator(), False) for seed in range(4)]
    size = next(ballot.num_bytes for ballot in made if ballot)
    memory = Memory(max_bytes=2 * size)
    for ballot in made:
        assert ballot is not None
        memory.add(ballot)
    assert size > 0
    assert [lesson.ballot.query.id for lesson in memory.lessons()] == ["q_2", "q_3"]


def test_the_reference_votes_and_not_the_adapter(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(0)
    asked = query(labels=LABELS)
    before = cast_ballot(policy, asked, safe_views(asked.question), 8, 4, generator, True)
    stir(policy, "candidate", std=0.5)
    policy.use("candidate")
    after = cast_ballot(policy, asked, safe_views(asked.question), 8, 4, generator, True)
    assert before is not None
    assert after is not None
    assert all(torch.equal(before.scores[view], after.scores[view]) for view in before.scores)
    assert policy.active == "candidate"


def test_pixels_are_not_kept(policy: Policy) -> None:
    made = cast_ballot(policy, query(labels=LABELS), [SAME, "moved"], 8, 4, torch.Generator(), False)
    assert made is not None
    assert made.query.images == ()
    assert not any("pixel" in name for one in made.observations.values() for name in one.prompt.inputs)


def test_this_family_is_packed(policy: Policy) -> None:
    """A silent fallback would cost the steps their speed."""
    assert tree.packs(policy.family)


def test_learning_moves_towards_the_vote(policy: Policy) -> None:
    learner = Learner(policy, replace(CONFIG, update_budget=12))
    asked = [query(seed, LABELS) for seed in range(12)]
    before = learner.policy.weights("candidate")
    metrics, taught = learner.step(asked, 0)
    first = mean_divergence(learner)
    while learner.unfinished:
        learner.step([], 0)
    after = learner.policy.weights("candidate")
    assert metrics.groups == len(taught) == 12
    assert all(math.isfinite(value) for value in metrics.values.values())
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert mean_divergence(learner) < first


def mean_divergence(learner: Learner) -> float:
    """Mean KL(vote || candidate) over what is remembered."""
    learner.policy.use("candidate")
    total = 0.0
    lessons = learner.memory.lessons()
    for lesson in lessons:
        ballot = lesson.ballot
        with torch.no_grad():
            scored = learner.policy.score_each([ballot.observations[SAME]], [ballot.tokens])[0].log_softmax(-1)
        total += float((lesson.target * (lesson.target.log() - scored)).sum())
    return total / len(lessons)


def test_no_query_takes_part_in_more_steps_than_its_budget(policy: Policy) -> None:
    learner = Learner(policy, replace(CONFIG, update_budget=3, batch_size=4, rounds=1))
    for start in range(0, 20, 5):
        learner.step([query(seed, LABELS) for seed in range(start, start + 5)], 0)
    while learner.unfinished:
        learner.step([], 0)
    updates = [lesson.ballot.updates for lesson in learner.memory.lessons()]
    assert max(updates) == 3
    assert learner.steps <= math.ceil(20 * 3 / 4) + 4


def test_what_was_learned_votes_in_later_rounds_and_never_on_witnesses(policy: Policy) -> None:
    learner = Learner(policy, replace(CONFIG, update_budget=4, rounds=3, min_information=0))
    for start in range(0, 20, 5):
        learner.step([query(seed, LABELS) for seed in range(start, start + 5)], 0)
    assert all(lesson.ballot.rounds == 1 for lesson in learner.memory.lessons())
    while learner.unfinished:
        learner.step([], 0)
    for lesson in learner.memory.lessons():
        made = lesson.ballot
        assert (made.rounds, made.updates) == ((1, 0) if made.witness else (3, 8))
        same = [torch.equal(made.votes[view], made.scores[view]) for view in made.votes]
        assert all(same) if made.witness else not any(same)


@pytest.mark.parametrize("labels", [LABELS, ()])
def test_adapter_and_reference_have_half_of_a_later_vote_each(policy: Policy, labels: tuple[str, ...]) -> None:
    made = cast_ballot(policy, query(labels=labels), [SAME, "moved"], 256, 6, torch.Generator(), False)
    assert made is not None
    stir(policy, "candidate", std=0.5)
    policy.use("candidate")
    vote_again(policy, made, ["moved"])
    with torch.no_grad():
        ours = policy.score_each([made.observations["moved"]], [made.tokens])[0].log_softmax(-1)
    expected = ((ours + made.scores["moved"]) / 2).softmax(-1)
    assert torch.allclose(made.votes["moved"].exp(), expected, atol=1e-3)


def test_answers_that_do_not_depend_on_the_image_change_nothing(policy: Policy) -> None:
    """A stream of blank pictures has no mutual information between image and answer."""
    learner = Learner(policy, CONFIG)
    blank = Image.new("RGB", (40, 30), "white")
    before = learner.state()
    for start in (0, 12):
        learner.step([Query(f"q{n}", (blank,), "what is this?", LABELS) for n in range(start, start + 12)], 0)
    dependence = learner.memory.dependence()
    assert dependence is not None
    assert dependence < CONFIG.min_information
    assert (learner.steps, learner.unfinished) == (0, False)
    assert all(torch.equal(before[0][key], learner.state()[0][key]) for key in before[0])


def test_forgotten_queries_are_not_replayed(policy: Policy) -> None:
    learner = Learner(policy, CONFIG)
    learner.step([query(seed, LABELS) for seed in range(6)], 0)
    learner.forget()
    before = learner.steps
    learner.step([], 0)
    assert (learner.steps, learner.unfinished, len(learner.memory)) == (before, False, 0)


def test_open_questions_are_voted_on_too(policy: Policy) -> None:
    learner = Learner(policy, replace(CONFIG, max_tokens=3, num_rollouts=16))
    metrics, _ = learner.step([query(seed) for seed in range(4)], 0)
    assert metrics.groups == 4
    for lesson in learner.memory.lessons():
        assert all(lesson.ballot.answers)
        assert float(lesson.target.sum()) == pytest.approx(1, abs=1e-5)
