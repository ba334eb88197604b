"""The operator's check: what is found out, what it is taken for, and how the command ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from servetune import cli
from servetune.adapters.family import Family
from servetune.evals import doctor
from servetune.evals.data import BadData, read, read_unlabeled
from servetune.evals.diagnosis import SENTENCES, diagnose, judge
from servetune.evals.findings import Outlook, Report
from servetune.server.model import load_policy
from servetune.server.settings import Settings
from servetune.server.valkey import ValkeyError
from tests.conftest import noise

EXAMPLES = Path(__file__).parents[1] / "examples" / "images" / "fluent-emoji-flat"
NAMES = ("dog", "banana", "castle", "anchor", "airplane", "alien")


def small(home: Path, **chosen: Any) -> Settings:
    return Settings(home=home, serve_threads=1, worker_threads=1, queries_per_step=3, num_rollouts=8, **chosen)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six labels with two files each."""
    root = tmp_path_factory.mktemp("images")
    for name in NAMES:
        (root / name).mkdir()
        picture = Image.open(EXAMPLES / f"{name}.png").convert("RGB")
        for turn in range(2):
            picture.rotate(4 * turn, fillcolor="white").save(root / name / f"{turn}.png")
    return root


@pytest.fixture(scope="module")
def healthy(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """nano, with data."""
    return doctor.examine(small(tmp_path_factory.mktemp("home")), str(folder))


@pytest.fixture(scope="module")
def sick(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A random checkpoint, asked open questions about pictures without a label."""
    flat = tmp_path_factory.mktemp("flat")
    for seed in range(3):
        noise(seed).save(flat / f"{seed}.png")
    return doctor.examine(small(tmp_path_factory.mktemp("home"), model=str(tiny), max_answer_tokens=8), str(flat))


def problems(report: Report, **chosen: Any) -> str:
    """What is wrong with a report of which some facts are changed: `section__fact=value`."""
    changed = report
    for name, value in chosen.items():
        section, _, fact = name.partition("__")
        facts = getattr(changed, section).model_copy(update={fact: value})
        changed = changed.model_copy(update={section: facts})
    return "\n".join(f"{each.blocks}: {each.problem}" for each in diagnose(changed, Settings()))


# --- what is found -----------------------------------------------------------------------------------


def test_nano_is_healthy(healthy: Report) -> None:
    assert (healthy.can_serve, healthy.can_learn) == (True, True)
    assert healthy.model.family == "idefics3"
    assert healthy.model.base_digest.startswith("sha256:")
    assert healthy.template.model_dump() == {
        "file": "chat_template.jinja",
        "native": True,
        "replies": True,
        "stops": True,
    }
    assert healthy.answers.rollouts == 9 * doctor.ROLLOUTS
    assert healthy.answers.valid > 0.9
    assert healthy.answers.yes_or_no > 0.5
    assert {"red", "blue"} <= set(healthy.answers.examples)
    assert [each.blocks for each in healthy.problems] == [None], "it was never taught letters of options"
    assert "lettered options" in healthy.problems[0].problem


def test_the_adapter_and_the_memory_are_counted(healthy: Report) -> None:
    adapter, memory = healthy.adapter, healthy.memory
    assert (adapter.part, adapter.rank, adapter.vision, adapter.projector) == ("language", 8, 0, 0)
    assert adapter.modules == adapter.language == 28
    assert adapter.share == pytest.approx(adapter.parameters / healthy.model.parameters)
    assert memory.weights_mb == pytest.approx(4 * healthy.model.parameters / 1e6, rel=0.01)
    assert memory.longest_cache_mb is not None
    assert 0 < memory.cache_mb < memory.longest_cache_mb
    assert memory.needed_mb == pytest.approx(2 * memory.weights_mb + memory.cache_mb + memory.step_mb)
    assert 0 < healthy.speed.answer_s < healthy.speed.step_s


@pytest.mark.parametrize("part", ["vision", "all"])
def test_adapters_outside_the_language_model_are_told_apart(tiny: Path, tmp_path: Path, part: Any) -> None:
    policy = load_policy(small(tmp_path, model=str(tiny), lora_targets=part), (doctor.SLOT,), 1)
    facts = doctor._adapter_facts(policy)
    assert facts.modules == facts.language + facts.vision + facts.projector
    assert (facts.language > 0) == (part == "all")
    assert facts.vision == 12
    assert facts.projector == 1


def test_data_is_weighed_as_the_default_learner_votes(healthy: Report) -> None:
    assert healthy.data is not None
    assert (healthy.data.asked, healthy.data.valid) == (12, 1.0)
    assert healthy.data.information is not None
    assert healthy.data.information > 0.5
    assert healthy.data.entropy > 0
    assert healthy.data.outlook in ("promising", "surer")
    assert healthy.data.verdict.startswith(SENTENCES[healthy.data.outlook].partition("{")[0])


def test_a_model_that_says_nothing_can_serve_and_not_learn(sick: Report) -> None:
    assert (sick.can_serve, sick.can_learn) == (True, False)
    assert sick.answers.valid < 0.5
    blocking = [each.problem for each in sick.problems if each.blocks == "learning"]
    assert any("come to an end" in each for each in blocking)
    assert sick.data is not None
    assert (sick.data.asked, sick.data.outlook) == (3, "unparsable")
    assert any("cannot be parsed" in each for each in blocking)


@pytest.mark.parametrize("learner", ["default", "frequency"])
def test_the_step_is_a_real_one_and_leaves_nothing(tiny: Path, tmp_path: Path, learner: Any) -> None:
    settings = small(tmp_path, model=str(tiny), max_answer_tokens=4, learner=learner)
    policy = load_policy(settings, (doctor.SLOT,), 1)
    seconds, megabytes, batch, estimated = doctor._try_step(policy, settings, 0.001)
    assert (batch, estimated) == (3, False)
    assert seconds > 0
    assert megabytes >= 0
    zero = policy.zero_weights()
    assert all(torch.equal(zero[key], value) for key, value in policy.weights(doctor.SLOT).items())
    *_, scaled_up = doctor._try_step(policy, settings, doctor.STEP_S)
    assert scaled_up


@pytest.mark.parametrize("name", ["gemma3", "qwen3_5"])
def test_a_model_that_copies_its_prompts_is_examined(
    checkpoints: dict[str, Path], tmp_path: Path, name: str
) -> None:
    settings = small(tmp_path, model=str(checkpoints[name]), max_answer_tokens=4)
    report = doctor.examine(settings, None)
    assert report.memory.cache_mb > 0
    assert report.speed.answer_s > 0


# --- templates ---------------------------------------------------------------------------------------


@pytest.fixture
def family(tiny: Path) -> Family:
    return Family.load(str(tiny))


def test_a_template_that_is_not_the_checkpoints_is_seen(family: Family) -> None:
    family.template = family.template.replace("assistant\n", "assistant:\n")
    found = doctor.check_template(family)
    assert (found.file, found.native, found.replies, found.stops) == (None, False, True, True)


def test_a_template_without_a_turn_for_the_answer_is_seen(family: Family) -> None:
    family.template = family.template.partition("{% if add_generation_prompt")[0]
    assert not doctor.check_template(family).replies


def test_a_turn_that_ends_without_ending_generation_is_seen(family: Family) -> None:
    family.template = family.template.replace("<|im_end|>", "<|im_start|>")
    assert not doctor.check_template(family).stops


def test_a_processor_that_cannot_render_is_no_proof(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AttributeError("video_processor")

    monkeypatch.setattr(family.processor, "apply_chat_template", fail)
    assert doctor.check_template(family).native is None


# --- what it means -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("votes", "valid", "information", "divergence", "changed", "clearer", "outlook"),
    [
        (64, 0.3, 2.0, 1.0, 0.5, True, "unparsable"),
        (7, 1.0, 2.0, 1.0, 0.5, True, "too few"),
        (64, 1.0, 0.05, 1.0, 0.5, True, "blind"),
        (64, 1.0, 2.0, 0.01, 0.0, False, "settled"),
        (64, 1.0, 2.0, 0.30, 0.25, False, "unclear"),
        (64, 1.0, 2.0, 0.30, 0.0, True, "surer"),
        (64, 1.0, 2.0, 0.30, 0.25, True, "promising"),
        (64, 1.0, None, 0.30, 0.25, None, "promising"),
    ],
)
def test_the_outlook_follows_the_rules_of_the_learner(
    votes: int,
    valid: float,
    information: float | None,
    divergence: float,
    changed: float,
    clearer: bool | None,
    outlook: Outlook,
) -> None:
    assert judge(votes, valid, information, divergence, changed, clearer) == outlook
    assert "{" not in SENTENCES[outlook].format(valid=valid, changed=changed)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"template__native": False}, "None: the prompt is not what"),
        ({"template__replies": False}, "None: the prompt does not end"),
        ({"template__stops": False}, "None: what ends an answer"),
        ({"template__file": None}, "None: the chat template is none"),
        ({"answers__valid": 0.7}, "None: only 70% of the answers"),
        ({"answers__valid": 0.2}, "learning: only 20% of the answers"),
        ({"answers__yes_or_no": 0.2}, "None: only 20% of the answers to a yes-or-no"),
        ({"machine__redis": None}, "serving: there is no Valkey"),
        ({"memory__free_mb": 10.0}, "serving: server and worker need"),
        ({"speed__answer_s": 90.0}, "serving: an answer takes 90 s"),
        ({"machine__worker_threads": 1000}, "None: server and worker use 1001 threads"),
        ({"machine__idle_gpu": True}, "None: it runs on the CPU"),
        ({"data__outlook": "blind"}, "learning: on images"),
    ],
)
def test_each_problem_is_named_with_what_it_keeps_from_working(
    healthy: Report, change: dict[str, Any], problem: str
) -> None:
    assert problem not in problems(healthy)
    assert problem in problems(healthy, **change)


def test_where_there_is_nothing_to_gain_nothing_is_wrong(healthy: Report) -> None:
    assert problems(healthy, data__outlook="settled") == problems(healthy)


def test_a_machine_without_valkey_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise ValkeyError("none")

    monkeypatch.setattr(doctor, "find_binary", missing)
    assert doctor._redis(Settings()) is None
    assert doctor._redis(Settings(redis_url="redis://:secret@box")) == "your own, not contacted"


# --- data without answers ----------------------------------------------------------------------------


def test_answers_are_neither_needed_nor_read(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    image = str(folder / "dog" / "0.png")
    records = [
        {"image": image, "question": "What is it?"},
        {"image": image, "question": "What is it?", "answer": "dog"},
        {"image": image, "candidate_labels": ["dog", "cat"], "answer": "a mistake"},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    assert [item.truth for item in read_unlabeled(path).items] == [None] * 3
    with pytest.raises(BadData, match=r"asked\.jsonl:1: answer: Field required"):
        read(path)
    assert {item.truth for item in read_unlabeled(folder).items} == {None}


def test_a_folder_of_bare_images_is_asked_openly(folder: Path) -> None:
    found = read_unlabeled(folder / "dog").items
    assert [(item.file, item.labels, item.truth) for item in found] == [("0.png", (), None), ("1.png", (), None)]


# --- the command -------------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["doctor", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.mark.parametrize(("name", "code"), [("healthy", 0), ("sick", 1)])
def test_the_exit_code_says_whether_to_go_live(
    name: str, code: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    report: Report = request.getfixturevalue(name)
    monkeypatch.setattr(doctor, "run", lambda model, data, device: report)
    told = run("-o", "json")
    assert told.exit_code == code
    assert Report.model_validate(json.loads(told.stdout)) == report
    assert json.loads(told.stdout)["can_learn"] == (code == 0)
    read_by_people = run()
    assert read_by_people.exit_code == code
    assert report.data is not None
    for text in ("template.native", report.data.verdict, *(each.advice for each in report.problems)):
        assert text in read_by_people.stdout
    assert ("it can serve and learn" in read_by_people.stdout) == (code == 0)
    assert ("no learning: " in read_by_people.stdout) == (code == 1)


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["/missing/model"], 1, "cannot load /missing/model: there is no such folder"),
        (["--data", "missing"], 2, "neither a folder, nor a JSONL file"),
        (["--device", "cuda:9"], 2, "there is no cuda:9 here"),
        (["-o", "xml"], 2, "xml"),
    ],
)
def test_what_cannot_be_examined_is_one_line(arguments: list[str], code: int, complaint: str) -> None:
    if "cuda:9" in arguments and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    result = run(*arguments)
    assert result.exit_code == code
    assert complaint in result.stderr
    assert result.stdout == ""
