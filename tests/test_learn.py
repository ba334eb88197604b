"""`servetune learn`: which data it takes, that it is the only worker, and that a server finds what it learned."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from servetune import cli
from servetune.adapters.step import Learner
from servetune.adapters.store import AdapterStore
from servetune.evals import learn
from servetune.evals.data import BadData, read_unlabeled
from servetune.server.engine import Engine
from servetune.server.lockstep import ListStream
from servetune.server.model import load_policy, open_store, worker_lock
from servetune.server.settings import Settings
from servetune.server.stage import SLOTS, Stage
from tests.conftest import query

EXAMPLES = Path(__file__).parents[1] / "examples" / "images" / "fluent-emoji-flat"
NAMES = ("dog", "banana", "castle", "anchor")
LABELS = tuple("abcdefgh")  # none fits, so that every query has a signal
FAST: dict[str, Any] = {
    "learner": "frequency",
    "queries_per_step": 4,
    "steps_per_candidate": 1,
    "learning_rate": 1e-4,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight images side by side."""
    (tmp_path / "data").mkdir()
    for name in NAMES:
        picture = Image.open(EXAMPLES / f"{name}.png").convert("RGB")
        for turn in range(2):
            picture.rotate(20 * turn, fillcolor="white").save(tmp_path / "data" / f"{name} {turn}.png")
    return tmp_path / "data"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def taught(folder: Path, home: Path, budget_s: float | None = None, **chosen: Any) -> dict[str, Any]:
    return learn.run(str(folder), budget_s, labels=LABELS, home=home, **{**FAST, **chosen})


# --- data --------------------------------------------------------------------------------------------


def test_a_folder_without_labels_takes_a_question_or_labels(folder: Path) -> None:
    asked = read_unlabeled(folder, "What is it?").items
    assert {(item.question, item.labels) for item in asked} == {("What is it?", ())}
    chosen = read_unlabeled(folder, labels=("dog", "cat")).items
    assert {(item.question, item.labels) for item in chosen} == {("", ("dog", "cat"))}
    assert len(asked) == len(chosen) == 8


def test_folders_name_the_labels_unless_labels_are_given(folder: Path) -> None:
    for name in ("dog", "castle"):
        (folder / name).mkdir()
        (folder / f"{name} 0.png").rename(folder / name / "0.png")
    named = read_unlabeled(folder, "Which?").items
    assert {(item.question, item.labels, item.truth) for item in named} == {("Which?", ("castle", "dog"), None)}
    given = read_unlabeled(folder, labels=("a", "b")).items
    assert len(given) == 8
    assert {item.labels for item in given} == {("a", "b")}


def test_answers_in_a_file_are_not_looked_at(folder: Path) -> None:
    lines = [
        {"image": "dog 0.png", "question": "What?", "answer": ["no", "text"]},
        {"image": "dog 1.png", "candidate_labels": ["cat", "cow"], "answer": "dog"},
        {"image": "banana 0.png"},
    ]
    (folder / "ask.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = read_unlabeled(folder / "ask.jsonl", "Else?").items
    assert [item.question for item in found] == ["What?", "Else?", "Else?"]
    assert all(item.truth is None for item in found)
    with pytest.raises(BadData, match=r"ask\.jsonl:3: a question is needed"):
        read_unlabeled(folder / "ask.jsonl")


def test_a_photo_is_read_as_a_server_reads_it(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.jpg", exif=exif)
    assert read_unlabeled(tmp_path, "What?").items[0].picture().size == (20, 30)


@pytest.mark.parametrize("labels", [["a"], ["a", "a"], ["", " "]])
def test_labels_are_those_of_a_request(folder: Path, home: Path, labels: list[str]) -> None:
    with pytest.raises(BadData, match="labels"):
        learn.run(str(folder), labels=labels, home=home)


# --- learning ----------------------------------------------------------------------------------------


async def test_a_server_started_afterwards_serves_it(folder: Path, home: Path) -> None:
    (folder / "broken.png").write_bytes(b"no image")
    told = taught(folder, home)
    assert (told["queries"], told["stopped"], told["failed"]) == (8, "data", 0)
    assert [Path(text.split(" is not ")[0]).name for text in told["unreadable"]] == ["broken.png"]
    assert told["published"]
    assert told["live"] == told["published"][-1]
    settings = Settings(home=home)
    policy = load_policy(settings, SLOTS, 1)
    store = open_store(settings, policy)
    engine = Engine(Stage(policy, settings), store, settings)
    await engine.start()
    assert f"v{engine.serving:04d}" == told["live"]
    engine.stop()
    await engine.stage.stop()
    made = store.manifest(engine.serving)
    assert (made.origin, made.parent) == ("worker", engine.serving - 1)
    assert all(name.startswith("q_") and "dog" not in name for name in made.query_ids)
    assert "adapter_promoted" in (home / "audit.jsonl").read_text()


def test_what_is_left_is_judged_when_the_budget_is_over(folder: Path, home: Path) -> None:
    told = taught(folder, home, budget_s=0.001, steps_per_candidate=100)
    assert (told["queries"], told["steps"], told["stopped"]) == (4, 1, "budget")
    assert told["published"] == ["v0001"]


def test_refusals_of_the_gate_are_told(folder: Path, home: Path) -> None:
    told = taught(folder, home, learning_rate=50.0)
    assert (told["published"], told["live"]) == ([], "v0000")
    assert all(reasons for reasons in told["rejected"])
    assert len(told["rejected"]) == 2


def test_an_interruption_keeps_what_was_accepted(
    folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Learner.step

    def interrupted(self: Learner, *given: Any) -> Any:
        if self.steps == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *given)

    monkeypatch.setattr(Learner, "step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    told = taught(folder, home)
    assert told["stopped"] == "interrupted"
    assert told["live"] == "v0002"
    assert AdapterStore(home / "store").versions() == [0, 1, 2]
    assert signal.getsignal(signal.SIGINT) is before


def test_nothing_to_learn_is_said(folder: Path, home: Path) -> None:
    stream = folder / "clear.jsonl"
    line = {"image": "banana 0.png", "candidate_labels": ["banana", "zebra crossing by night"]}
    stream.write_text("\n".join([json.dumps(line)] * 3))
    told = learn.run(str(stream), home=home)
    assert (told["steps"], told["published"], told["stopped"]) == (0, [], "converged")


def test_a_query_that_fails_twice_is_dropped(folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, poison = Learner.step, []

    def fails(self: Learner, queries: Any) -> Any:
        poison[:] = poison or [queries[0].id]
        if any(each.id in poison for each in queries):
            raise RuntimeError("out of memory")
        return step(self, queries)

    monkeypatch.setattr(Learner, "step", fails)
    told = taught(folder, home)
    assert (told["queries"], told["failed"], told["stopped"]) == (8, 1, "data")
    store = AdapterStore(home / "store")
    names = [name for version in store.promoted() for name in store.manifest(version).query_ids]
    assert len(set(names)) == 7
    assert not set(poison) & set(names)


def test_what_is_released_comes_back_first() -> None:
    stream = ListStream()
    stream.put([query(0), query(1)])
    first = stream.take(1, 0.0)
    stream.release(first)
    assert [d.query.id for d in stream.take(2, 0.0)] == ["q_0", "q_1"]


# --- refusals ----------------------------------------------------------------------------------------


def test_a_second_worker_is_refused(folder: Path, home: Path) -> None:
    with worker_lock(Settings(home=home)) as take:
        assert take()
        with pytest.raises(learn.CannotLearn, match="stop its server first"):
            taught(folder, home)
    assert not (home / "store" / "default").exists()


def test_a_server_cannot_learn_meanwhile(folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []

    def look(*given: Any) -> dict[str, Any]:
        with worker_lock(Settings(home=home)) as take:
            held.append(take())
        return {}

    monkeypatch.setattr(learn, "learn", look)
    taught(folder, home)
    assert held == [False]


def test_a_paused_line_is_refused(folder: Path, home: Path) -> None:
    settings = Settings(home=home)
    open_store(settings, load_policy(settings, SLOTS, 1)).set_paused(True)
    with pytest.raises(learn.CannotLearn, match="servetune resume"):
        taught(folder, home)


def test_the_command_prints_json_last_and_refuses_nonsense(folder: Path, home: Path) -> None:
    labels = folder / "labels.txt"
    labels.write_text("\n".join(LABELS))

    def call(*arguments: str) -> Any:
        return CliRunner().invoke(cli.app, ["learn", str(folder), "--home", str(home), *arguments])

    done = call("--labels-file", str(labels), "--budget", "1s", "--seed", "1", "--learner", "frequency")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert told.keys() >= {"queries", "steps", "published", "rejected", "live", "seconds", "stopped"}
    assert f"{told['live']}, {told['steps']} steps" in done.stderr
    assert "8 queries, 8 of them with labels to choose from, such as a, b, c" in done.stderr
    for arguments, complaint in (
        (["--budget", "soon"], "30s, 10m or 1h"),
        (["--budget", ""], "30s, 10m or 1h"),
        (["--labels", "a,b", "--labels-file", str(labels)], "not both"),
        (["--labels-file", "nowhere"], "cannot be read"),
        (["--labels", "a"], "2 to 1000 labels"),
        (["--learner", "magic"], "learner: "),
        ([], "neither questions nor labels: give --question or --labels"),
    ):
        refused = call(*arguments)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert complaint in refused.stderr
