"""The default learner: what is remembered, what it teaches, and when nothing may change."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from servetune.adapters import tree
from servetune.adapters.ballots import Ballot
from servetune.adapters.memory import Memory
from servetune.adapters.policy import Policy
from servetune.adapters.rollouts import cast_ballot, vote_again
from servetune.adapters.step import Learner, LearnerConfig, _adjusted
from servetune.adapters.types import Query
from servetune.adapters.views import SAME, safe_views
from servetune.adapters.worth import LEAD
from tests.conftest import query, stir

LABELS = tuple("abcdefgh")
CONFIG = LearnerConfig(max_tokens=4, learning_rate=1e-2, memory_size=64, agreement=(0, 1), min_valid=0)


def ballot(number: int, shares: dict[str, list[float]], embedding: list[float], measured: bool = True) -> Ballot:
    """A closed ballot over as many labels as there are shares."""
    scores = {view: torch.tensor(row).log() for view, row in shares.items()}
    labels = LABELS[: len(next(iter(shares.values())))]
    asked = Query(f"q{number}", (), "what?", labels)
    return Ballot(asked, labels, ((1,),) * len(labels), scores, {}, torch.tensor(embedding), 1.0, measured)


def guess(right: int, share: float) -> list[float]:
    """Shares of as many answers as there are labels, one of them as given and the others alike."""
    return [share if place == right else (1 - share) / (len(LABELS) - 1) for place in range(len(LABELS))]


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
    worth = memory.worth().among_few
    assert worth["blur"] > 0.3 > worth[SAME] == 0
    for lesson in memory.lessons():
        assert int(lesson.target.argmax()) == int(lesson.ballot.query.id[1:]) % 2


def test_a_view_is_worth_what_it_tells_about_one_question() -> None:
    """Two questions with answers of their own: to tell the questions apart tells nothing about the images."""
    memory = Memory()
    for number in range(32):
        right, kind = number // 2 % 2, number % 2
        apart = [0.02] * 4
        apart[2 * kind + right] = 0.94
        blind = [0.02] * 4
        blind[2 * kind] = 0.94
        one = ballot(number, {SAME: [0.25] * 4, "blur": apart, "sharp": blind}, spread(number))
        memory.add(replace(one, query=replace(one.query, question=f"what {kind}?")))
    worth = memory.worth().among_few
    assert worth["blur"] > worth["sharp"] + 0.5


def test_each_view_is_compared_on_what_was_seen_in_it() -> None:
    memory = Memory()
    for number in range(24):
        views = {SAME: [0.6, 0.4], "blur": [0.9, 0.1] if number % 2 else [0.1, 0.9]}
        if number >= 20:
            views["sharp"] = [0.99, 0.01]
        memory.add(ballot(number, views, spread(number), measured=False))
    assert set(memory.worth().among_few) == {SAME, "blur"}  # four looks are too few
    assert memory.worth().among_many == {}


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


def test_labels_that_views_find_in_nothing_teach_nothing() -> None:
    """A long list of labels and grey images: each look finds something else, and no two of an image agree."""
    memory, labels = Memory(), tuple(f"label {number}" for number in range(24))
    dice = torch.Generator().manual_seed(0)
    for number in range(32):
        looks = torch.randint(0, 24, (4,), generator=dice).tolist()
        rows = {
            view: [0.9 if place == look else 0.1 / 23 for place in range(24)] for view, look in enumerate(looks)
        }
        made = ballot(number, {SAME: [1 / 24] * 24}, spread(number))
        scores = {SAME if view == 0 else f"view {view}": torch.tensor(row).log() for view, row in rows.items()}
        asked = replace(made.query, labels=labels)
        memory.add(replace(made, query=asked, answers=labels, tokens=((1,),) * 24, scores=scores, votes=scores))
    dependence = memory.dependence()
    assert dependence is not None
    assert dependence < 0.1
    assert all(lesson.dependence == pytest.approx(dependence) for lesson in memory.lessons())


def test_a_question_with_one_answer_to_all_images_is_rehearsed(policy: Policy) -> None:
    """Beside one that teaches: what would be learned from it is to answer without looking."""
    learner = Learner(policy, replace(CONFIG, min_information=0.1))
    for number in range(16):
        right = number % 8 if number % 2 else 0
        made = ballot(number, {SAME: guess(right, 0.65), "bright": guess(right, 0.9)}, spread(number))
        question = "what shape?" if number % 2 else "what colour?"
        answers = tuple(f"{question} {label}" for label in LABELS)  # or they are wordings of one question
        asked = replace(made.query, question=question, labels=())
        seen = {SAME: policy.observe(query(number))}
        learner.memory.add(replace(made, query=asked, answers=answers, observations=seen))
    lessons, dependence = learner.memory.lessons(), learner.memory.dependence()
    assert dependence is not None
    assert dependence > 0.1
    useful = learner._useful(lessons, dependence)
    assert len(useful) == 16
    for lesson in useful:
        exercised = learner._exercise(lesson).lesson
        kept = torch.equal(exercised.target, lesson.ballot.scores[SAME].exp())
        assert kept == (lesson.ballot.query.question == "what colour?")
        assert bool(exercised.shown.any()) != kept, "how common its answers are has no part in it"
    alone = [each for each in lessons if each.ballot.query.question == "what colour?"]
    assert learner._useful(alone, dependence) == [], "where nothing teaches there is nothing to rehearse for"


@pytest.mark.parametrize(("view", "labels", "teaches"), [(0.65, (), False), (0.9, (), True), (0.65, LABELS, True)])
def test_open_questions_wait_for_a_view_that_tells_more(
    view: float, labels: tuple[str, ...], teaches: bool
) -> None:
    """Votes over views that tell no more than the image as sent know what the model knows."""
    memory = Memory()
    for number in range(32):
        shares = {SAME: guess(number % 8, 0.65), "bright": guess(number % 8, view)}
        made = ballot(number, shares, spread(number))
        memory.add(replace(made, query=replace(made.query, question="what?", labels=labels)))
    assert memory.worth().tells_more == (view > 0.65)
    assert all(lesson.rehearsed != teaches for lesson in memory.lessons())


def test_a_view_that_is_clearer_by_chance_does_not_tell_more() -> None:
    memory = Memory()
    for number in range(32):
        as_sent, bright = (0.5, 0.9) if number % 2 else (0.87, 0.5)  # clearer in every other one
        shares = {SAME: guess(number // 2 % 8, as_sent), "bright": guess(number // 2 % 8, bright)}
        made = ballot(number, shares, spread(number))
        memory.add(replace(made, query=replace(made.query, question="what?", labels=())))
    assert memory.worth().among_few["bright"] > LEAD
    assert not memory.worth().tells_more


def test_a_label_that_is_far_more_common_than_the_others_stops_nothing() -> None:
    """Half of the queries are one client's, all of one thing: the others are still learned from."""
    memory = Memory()
    for number in range(32):
        row = [0.05] * 8
        row[number % 7 + 1 if number % 2 else 0] = 0.65
        memory.add(ballot(number, {SAME: row}, spread(number)))
        memory.add(ballot(100 + number, {SAME: [0.65] + [0.05] * 7}, spread(100 + number)))
    lessons = memory.lessons()
    assert not any(lesson.rehearsed for lesson in lessons)
    assert all(lesson.dependence == pytest.approx(memory.dependence()) for lesson in lessons)


def test_wordings_of_one_question_are_judged_together() -> None:
    """Asked once in this way and once in that, a question whose answer never changes cannot be told by itself."""
    memory = Memory()

    def ask(number: int, question: str, answers: tuple[str, ...], share: int) -> None:
        row = [0.05] * len(answers)
        row[share] += 1 - sum(row)
        one = ballot(number, {SAME: row}, spread(number))
        memory.add(replace(one, query=replace(one.query, question=question, labels=()), answers=answers))

    for number in range(8):
        ask(number, "what colour?", ("red", "blue"), number % 2)
        ask(8 + number, "what shape?", ("circle", "square"), 0)
    ask(16, "which colour is it?", ("red", "green"), 0)
    ask(17, "which shape is it?", ("circle", "egg"), 0)
    ask(18, "what does it say?", ("stop", "go"), 0)
    found = {lesson.ballot.query.question: lesson.dependence for lesson in memory.lessons()}
    assert found["which colour is it?"] == pytest.approx(0.5, abs=0.1)
    assert found["which shape is it?"] == pytest.approx(0.0, abs=0.1)
    assert found["what shape?"] == pytest.approx(0.0, abs=0.01)
    assert found["what does it say?"] is None, "nothing is like it, and it was asked once"


def test_how_often_answers_are_shown_counts_over_all_questions_among_few_answers() -> None:
    memory = Memory(temperature=1.0)
    for number in range(6):
        one = ballot(number, {SAME: [0.9, 0.1]}, spread(number))
        memory.add(
            replace(one, query=replace(one.query, question=f"wording {number}?", labels=()), answers=("a", "b"))
        )
    many = tuple(f"label {number}" for number in range(20))
    last = ballot(9, {SAME: [0.05] * 8}, spread(9))
    scores = {SAME: torch.full((20,), 0.05).log()}
    memory.add(replace(last, query=replace(last.query, labels=many), answers=many, scores=scores, votes=scores))
    *few, long = (lesson.prior for lesson in memory.lessons())
    for prior in few:
        assert prior.exp().tolist() == pytest.approx([1 + 6 * 0.9, 1 + 6 * 0.1], abs=1e-4)
    assert not long.any()


def test_that_an_answer_is_common_is_not_learned(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the logit-adjusted loss: none between answers whose odds their frequencies account for."""
    learner = Learner(policy, replace(CONFIG, kl_coefficient=0.0))
    one = ballot(0, {SAME: [0.5, 0.5]}, spread(0))
    one.observations[SAME] = policy.observe(query())
    lesson = replace(
        memory_of(one).lessons()[0], target=torch.tensor([0.9, 0.1]), prior=torch.tensor([9.0, 1.0]).log()
    )
    said = torch.tensor([0.03, 0.03]).log().requires_grad_()
    monkeypatch.setattr(policy, "score_each", lambda *_: [said])
    monkeypatch.setattr(learner, "_descend", dict)
    learner._update_lessons([lesson])
    assert said.grad is not None
    assert said.grad.tolist() == pytest.approx([-0.5, -0.5], abs=1e-6)  # both rise together
    said.grad = None
    learner._update_lessons([replace(lesson, prior=torch.zeros(2))])
    assert said.grad.tolist() == pytest.approx([-0.9, -0.1], abs=1e-6)


def test_an_answer_that_is_not_shown_is_no_part_of_the_frequencies() -> None:
    """Its target is the reference's probability, so nothing may be added to it."""
    logprobs, prior = torch.tensor([0.3, 0.1, 0.6]).log(), torch.tensor([9.0, 1.0, 50.0]).log()
    shown = torch.tensor([True, True, False])
    found = torch.where(shown, _adjusted(logprobs, prior, shown), logprobs).exp().tolist()
    assert found == pytest.approx([0.4 * 27 / 28, 0.4 * 1 / 28, 0.6])


def test_answers_that_an_open_question_never_wins_keep_the_probability_of_the_reference() -> None:
    """However it is worded; where it was asked too seldom to tell, every answer is learned from."""
    memory = Memory(temperature=1.0)
    colours = ("red", "blue", "green")

    def ask(number: int, question: str, row: list[float]) -> None:
        views = {SAME: row, "blur": [p**3 / sum(q**3 for q in row) for p in row]}
        one = ballot(number, views, spread(number))
        memory.add(replace(one, query=replace(one.query, question=question, labels=()), answers=colours))

    for number in range(12):
        ask(number, "what colour?", [0.5, 0.2, 0.3] if number % 2 else [0.2, 0.5, 0.3])
    ask(12, "which colour is it?", [0.4, 0.3, 0.3])
    *usual, rare = memory.lessons()
    for lesson in usual:
        assert lesson.shown.tolist() == [True, True, False]
        assert float(lesson.target[2]) == pytest.approx(0.2, abs=1e-5)  # KEPT
        assert float(lesson.target.max()) > 0.5
    assert rare.shown.tolist() == [True, True, False]
    memory.forget(lesson.ballot.query.id for lesson in usual)
    assert memory.lessons()[0].shown.all()


@pytest.mark.parametrize(
    ("answers", "shown"), [(("yes", "no"), [True, True]), (("circle", "square"), [True, False])]
)
def test_a_stream_of_yes_shows_no_as_well(answers: tuple[str, str], shown: list[bool]) -> None:
    """Else `no` would fade where it happens to be wrong, and with it every `no` that is right."""
    memory = Memory(temperature=1.0)
    for number in range(12):
        shares = {SAME: [0.6 + 0.03 * number, 0.4 - 0.03 * number], "bright": [0.99, 0.01]}
        one = ballot(number, shares, spread(number))
        memory.add(replace(one, query=replace(one.query, question="is it?", labels=()), answers=answers))
    for lesson in memory.lessons():
        assert lesson.shown.tolist() == shown
        assert lesson.rehearsed == (sum(shown) == 1)  # a single answer is given without looking


def memory_of(*ballots: Ballot) -> Memory:
    memory = Memory()
    for each in ballots:
        memory.add(each)
    return memory


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
    metrics, taught = learner.step(asked)
    first = mean_divergence(learner)
    while learner.unfinished:
        learner.step([])
    after = learner.policy.weights("candidate")
    assert metrics.groups == len(taught) == 12
    assert all(math.isfinite(value) for value in metrics.values.values())
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert mean_divergence(learner) < first


def test_a_step_tells_how_the_adapter_stood_to_the_votes(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first step it answers as the base does, so what its answers can expect is known."""
    learner = Learner(policy, replace(CONFIG, update_budget=2, rounds=1))
    monkeypatch.setattr(learner, "_view_to_learn", lambda ballot: SAME)
    values = learner.step([query(seed, LABELS) for seed in range(12)])[0].values
    assert learner.steps == 1
    lessons = [each for each in learner.memory.lessons() if not each.ballot.witness]
    answers = [each.ballot.scores[SAME].softmax(-1) for each in lessons]
    rewards = [float((own * each.vote).sum()) for own, each in zip(answers, lessons, strict=True)]
    agrees = [float(own.argmax() == each.vote.argmax()) for own, each in zip(answers, lessons, strict=True)]
    assert values["reward"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-4)
    assert values["prequential"] == pytest.approx(sum(agrees) / len(agrees))
    assert values["kl"] == pytest.approx(0.0, abs=1e-5)
    assert 0 < values["entropy"] <= math.log(len(LABELS))
    learner.step([])
    later = learner.step([])[0].values
    assert "prequential" not in later, "what was learned from is no news"


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
        learner.step([query(seed, LABELS) for seed in range(start, start + 5)])
    while learner.unfinished:
        learner.step([])
    updates = [lesson.ballot.updates for lesson in learner.memory.lessons()]
    assert max(updates) == 3
    assert learner.steps <= math.ceil(20 * 3 / 4) + 4


def test_what_was_learned_votes_in_later_rounds_and_never_on_witnesses(policy: Policy) -> None:
    learner = Learner(policy, replace(CONFIG, update_budget=4, rounds=3, min_information=0))
    for start in range(0, 20, 5):
        learner.step([query(seed, LABELS) for seed in range(start, start + 5)])
    assert all(lesson.ballot.rounds == 1 for lesson in learner.memory.lessons())
    while learner.unfinished:
        learner.step([])
    for lesson in learner.memory.lessons():
        made = lesson.ballot
        assert (made.rounds, made.updates) == ((1, 0) if made.witness else (3, 8))
        same = [torch.equal(made.votes[view], made.scores[view]) for view in made.votes]
        assert all(same) if made.witness else not any(same)


def test_what_a_refused_candidate_voted_is_void(policy: Policy) -> None:
    learner = Learner(policy, replace(CONFIG, update_budget=4, rounds=2, min_information=0))
    zero, moments = learner.state()
    learner.step([query(seed, LABELS) for seed in range(8)])
    while all(lesson.ballot.rounds == 1 for lesson in learner.memory.lessons()):
        learner.step([])
    assert not all(own_votes(learner))
    learner.load(zero, moments)
    assert all(own_votes(learner))


def test_what_an_accepted_candidate_voted_stands_but_not_for_witnesses(policy: Policy) -> None:
    learner = Learner(policy, replace(CONFIG, update_budget=4, rounds=2, min_information=0))
    learner.step([query(seed, LABELS) for seed in range(8)])
    while learner.unfinished:
        learner.step([])
    learner.propose()
    learner.accept()
    learner.load(*learner.state())
    assert not any(own_votes(learner))
    first = {lesson.ballot.query.id: lesson for lesson in learner.memory.lessons(later_rounds=False)}
    heard = learner.witnesses()
    assert heard
    assert all(torch.equal(each.target, first[each.ballot.query.id].target) for each in heard)


def own_votes(learner: Learner) -> list[bool]:
    """For every query that may be learned from, whether the reference alone votes on it."""
    taught = [lesson.ballot for lesson in learner.memory.lessons() if not lesson.ballot.witness]
    return [all(torch.equal(one.votes[view], one.scores[view]) for view in one.votes) for one in taught]


def test_a_failed_update_drops_the_memory(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows which of the remembered queries it was."""
    learner = Learner(policy, replace(CONFIG, min_information=0))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.nan))
    with pytest.raises(FloatingPointError):
        learner.step([query(seed, LABELS) for seed in range(12)])
    assert (len(learner.memory), learner.unfinished) == (0, False)


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
        learner.step([Query(f"q{n}", (blank,), "what is this?", LABELS) for n in range(start, start + 12)])
    dependence = learner.memory.dependence()
    assert dependence is not None
    assert dependence < CONFIG.min_information
    assert (learner.steps, learner.unfinished) == (0, False)
    assert all(torch.equal(before[0][key], learner.state()[0][key]) for key in before[0])


def test_forgotten_queries_are_not_replayed(policy: Policy) -> None:
    learner = Learner(policy, CONFIG)
    learner.step([query(seed, LABELS) for seed in range(6)])
    learner.forget()
    before = learner.steps
    learner.step([])
    assert (learner.steps, learner.unfinished, len(learner.memory)) == (before, False, 0)


def test_open_questions_are_voted_on_too(policy: Policy) -> None:
    learner = Learner(policy, replace(CONFIG, max_tokens=3, num_rollouts=16))
    metrics, _ = learner.step([query(seed) for seed in range(4)])
    assert metrics.groups == 4
    for lesson in learner.memory.lessons():
        assert all(lesson.ballot.answers)
        assert float(lesson.target.sum()) == pytest.approx(1, abs=1e-5)
