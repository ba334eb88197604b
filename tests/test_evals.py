"""The evaluation: what is read, how it is split, that nothing leaks, and that a run repeats itself exactly."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from servetune.evals import Options, command, protocol, report, streams
from servetune.evals.data import BadData, Data, Item, read, split_files, split_labels
from servetune.evals.protocol import Reply, Run, calibration_error

EXAMPLES = Path(__file__).parents[1] / "examples" / "images" / "fluent-emoji-flat"
NAMES = ("dog", "banana", "castle", "anchor")


@pytest.fixture(autouse=True)
def no_source(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The source domain of nano takes npm and time; the tests name a small one where they want it."""
    if "artwork" not in request.fixturenames:
        monkeypatch.setattr(streams, "source_names", lambda: ())
        monkeypatch.setattr(streams, "source_shapes", lambda final=False: ())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four labels with four files each."""
    for name in NAMES:
        (tmp_path / "data" / name).mkdir(parents=True)
        picture = Image.open(EXAMPLES / f"{name}.png").convert("RGB")
        for turn in range(4):
            picture.rotate(4 * turn, fillcolor="white").save(tmp_path / "data" / name / f"{turn}.png")
    return tmp_path / "data"


def lines(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def options(data: Path, out: Path, **chosen: Any) -> Options:
    return Options(**{"data": str(data), "out": out, "seeds": 1, "model": "nano", **chosen})


def quiet(who: str, done: int, of: int) -> None:
    """No progress bar."""


def items(labels: int, files: int) -> tuple[Item, ...]:
    names = tuple(f"label {n}" for n in range(labels))
    return tuple(
        Item(f"{name}/{n}", f"{name}/{n}", lambda: Image.new("RGB", (8, 8)), "", name, names)
        for name in names
        for n in range(files)
    )


# --- reading -----------------------------------------------------------------------------------------


def test_a_folder_of_folders_is_recognition(folder: Path) -> None:
    found = read(folder).items
    assert len(found) == 16
    assert {item.labels for item in found} == {tuple(sorted(NAMES))}
    assert Counter(item.truth for item in found) == dict.fromkeys(NAMES, 4)
    query = found[0].query("what is it?")
    assert (query.question, query.images[0].mode) == ("what is it?", "RGB")


def test_jsonl_is_read_relative_to_itself(folder: Path) -> None:
    path = lines(
        folder / "ask.jsonl",
        {"image": "dog/0.png", "question": "What is it?", "answer": "dog"},
        {"image": "dog/1.png", "answer": "dog", "candidate_labels": ["dog", "cat"]},
    )
    found = read(path).items
    assert [(item.question, item.truth, item.labels) for item in found] == [
        ("What is it?", "dog", ()),
        ("", "dog", ("dog", "cat")),
    ]


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"image": "dog/0.png", "question": "?"}, "answer"),
        ({"image": "dog/9.png", "question": "?", "answer": "dog"}, "no image dog/9.png"),
        ({"image": "dog/0.png", "answer": "dog"}, "question is needed"),
        ({"image": "dog/0.png", "answer": "dog", "candidate_labels": ["a", "b"]}, "not one of"),
        ({"image": "dog/0.png", "answer": "dog", "candidate_labels": ["dog", "dog"]}, "names a label twice"),
    ],
)
def test_a_bad_line_is_named(folder: Path, record: dict[str, Any], complaint: str) -> None:
    good = {"image": "dog/0.png", "question": "?", "answer": "dog"}
    with pytest.raises(BadData, match=complaint) as raised:
        read(lines(folder / "bad.jsonl", good, record))
    assert "bad.jsonl:2" in str(raised.value)


def test_what_is_no_data_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(BadData, match="neither a folder"):
        read(tmp_path / "missing")
    with pytest.raises(BadData, match="nor a JSONL file in UTF-8"):
        read(folder / "dog" / "0.png")
    with pytest.raises(BadData, match="at least two labels"):
        read(folder / "dog")
    (folder / "empty").mkdir()
    with pytest.raises(BadData, match="holds no image"):
        read(folder)


def test_what_the_frozen_model_answers_is_kept_by_item_and_not_by_name() -> None:
    """Two data sets may name their files alike."""
    model = command.Model.load("nano")
    model.policy.load("live", model.policy.zero_weights())
    castle, banana = (Image.open(EXAMPLES / f"{name}.png").convert("RGB") for name in ("castle", "banana"))
    shown = [
        Item("0.png", "0.png", lambda picture=picture: picture, "", "castle", NAMES)
        for picture in (castle, banana)
    ]
    replies = [model.scorer.pairs([item], 1.0)[0] for item in shown]
    assert [(frozen.right, adapted.right) for frozen, adapted in replies] == [(True, True), (False, False)]


def test_a_broken_image_is_named(folder: Path) -> None:
    (folder / "dog" / "0.png").write_bytes(b"no image")
    broken = next(item for item in read(folder).items if item.file == "dog/0.png")
    with pytest.raises(BadData, match=r"0\.png is not an image"):
        broken.query("?")


# --- splits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_half_of_the_files_of_each_label_are_held_out(seed: int) -> None:
    data = Data("made", items(6, 4))
    split = split_files(data, seed, None, True)
    assert {item.file for item in split.learn}.isdisjoint(item.file for item in split.heldout)
    assert set(Counter(item.truth for item in split.learn).values()) == {2}
    assert split == split_files(data, seed, None, True)


@pytest.mark.parametrize("seed", range(5))
def test_half_of_the_labels_are_never_learned_from(seed: int) -> None:
    split = split_labels(Data("made", items(7, 4)), seed, None, True)
    unseen = {item.truth for item in split.unseen}
    assert len(unseen) == 3
    assert unseen.isdisjoint(item.truth for item in [*split.learn, *split.heldout])
    assert unseen <= set(split.learn[0].labels), "they stay among the candidates"


def test_a_file_with_several_questions_is_on_one_side() -> None:
    asked = [
        Item(f"{n}", f"f{n // 3}", lambda: Image.new("RGB", (8, 8)), f"q{n % 3}?", f"a{n % 3}") for n in range(30)
    ]
    split = split_files(Data("vqa", tuple(asked)), 0, None, True)
    assert {item.file for item in split.learn}.isdisjoint(item.file for item in split.heldout)


def test_order_and_number_of_samples() -> None:
    data = Data("made", items(6, 4))
    given = split_files(data, 0, None, False).learn
    assert [item.id for item in given] == sorted(item.id for item in given)
    assert len(split_files(data, 0, 5, True).learn) == 5
    assert split_files(data, 1, None, True).learn != split_files(data, 2, None, True).learn


def test_the_oracle_is_told_answers_as_they_are_voted_on() -> None:
    def item(name: str, truth: str | None, *labels: str) -> Item:
        return Item(name, name, lambda: Image.new("RGB", (8, 8)), "?", truth, labels)

    told = command._truths([item("a", "Three."), item("b", "The End", "The End", "Two"), item("c", None)])
    assert told == {"a": "3", "b": "The End"}


def test_unscored_items_are_mixed_in() -> None:
    attack = tuple(Item(f"x{n}", f"x{n}", lambda: Image.new("RGB", (8, 8)), "", None) for n in range(3))
    split = split_files(Data("made", items(2, 4), extra=attack), 0, None, True)
    assert [item.truth is None for item in split.learn] == [False, True] * 4


# --- figures -----------------------------------------------------------------------------------------


def test_calibration_error_by_hand() -> None:
    replies = [Reply(True, 0.95, 1), Reply(False, 0.95, 1), Reply(True, 0.55, 1)]
    assert calibration_error(replies) == pytest.approx((abs(1 - 1.9) + abs(1 - 0.55)) / 3)


def test_the_worst_window_is_the_minimum_over_all_windows() -> None:
    right = [(False, True)] * 300 + [(True, False)] * 100 + [(True, True)] * 300
    assert protocol._worst(right) == pytest.approx(-0.5)
    assert protocol._worst([(True, False)] * 3) == -1


def test_the_summary_takes_means_and_the_worst_window() -> None:
    def record(seed: int, adapted: float, worst: float) -> dict[str, Any]:
        figures = {"heldout_frozen": 0.5, "heldout_adapted": adapted, "worst_window": worst}
        return report.as_record("default", seed, Run(figures=figures), None)

    summary = report.summarise([record(0, 0.6, -0.1), record(1, 0.7, 0.0)])
    assert (summary["heldout_adapted"], summary["worst_window"], summary["removed"]) == (0.65, -0.1, 0.3)
    assert summary["unseen_labels_frozen"] is None
    assert summary["ci95"]["heldout_adapted"] == pytest.approx(12.71 * 0.05, rel=1e-3)


# --- runs --------------------------------------------------------------------------------------------


def test_a_run_measures_writes_repeats_and_resumes(folder: Path, tmp_path: Path) -> None:
    told = {"image": "banana/0.png", "answer": "banana", "candidate_labels": NAMES}
    clean = lines(folder / "clean.jsonl", told)
    first = command.evaluate(options(folder, tmp_path / "a", source=str(clean)), quiet)
    assert first["source_frozen"] == 1
    assert set(report.KEYS) <= first.keys()
    assert all(0 <= first[key] <= 1 for key in report.KEYS if key != "worst_window" and first[key] is not None)
    assert first["seeds"] == 1
    written = json.loads((tmp_path / "a" / "eval.json").read_text())
    assert written["runs"][0]["series"]
    assert "heldout_adapted" in (tmp_path / "a" / "eval.md").read_text()
    assert (tmp_path / "a" / "eval.png").stat().st_size > 10_000

    again = command.evaluate(options(folder, tmp_path / "b", source=str(clean)), quiet)
    assert {k: v for k, v in again.items() if k != "cpu_s"} == {k: v for k, v in first.items() if k != "cpu_s"}

    saved = tmp_path / "a" / "runs" / "default-0.json"
    record = json.loads(saved.read_text())
    record["figures"]["heldout_adapted"] = 0.123
    saved.write_text(json.dumps(record))
    resumed = command.evaluate(options(folder, tmp_path / "a", source=str(clean)), quiet)
    assert resumed["heldout_adapted"] == 0.123
    assert command.evaluate(options(folder, tmp_path / "a", samples=4), quiet)["heldout_adapted"] != 0.123


def test_the_frozen_learner_learns_nothing(folder: Path, tmp_path: Path) -> None:
    summary = command.evaluate(options(folder, tmp_path / "out", learner="frozen"), quiet)
    assert summary["published"] == 0
    for key in ("heldout", "unseen_labels", "valid", "ece"):
        assert summary[f"{key}_frozen"] == summary[f"{key}_adapted"]
    assert summary["frozen"] == summary["prequential"]


def test_every_learner_and_baseline_runs(folder: Path, tmp_path: Path) -> None:
    compare = ("frequency", "ttrv", "random", "oracle", "entropy", "self-training")
    command.evaluate(options(folder, tmp_path / "out", compare=compare, samples=4), quiet)
    written = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert list(written["summary"]) == ["default", *compare]


def test_transfer_measures_the_other_data(folder: Path, tmp_path: Path) -> None:
    other = lines(
        folder / "other.jsonl", {"image": "dog/0.png", "answer": "dog", "candidate_labels": ["dog", "cat"]}
    )
    summary = command.evaluate(options(folder, tmp_path / "out", test_on=str(other), samples=4), quiet)
    assert summary["heldout_frozen"] in (0, 1)
    assert summary["unseen_labels_frozen"] is None


def test_the_command_prints_json_last_and_refuses_nonsense(folder: Path, tmp_path: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "servetune", "eval", *arguments], capture_output=True, text=True, check=False
        )

    done = call(str(folder), "--seeds", "1", "--samples", "4", "--split", "label", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert {"frozen", "prequential", "cpu_s", "seeds", *report.KEYS} <= json.loads(
        done.stdout.splitlines()[-1]
    ).keys()
    for arguments, complaint in (
        ([], "name the DATA"),
        ([str(folder), "--learner", "magic"], "not magic"),
        ([str(folder), "--samples", "0"], "--samples"),
        ([str(tmp_path / "nowhere")], "neither a folder"),
        ([str(folder), "--split", "label", "--test-on", str(folder)], "no meaning with --test-on"),
    ):
        refused = call(*arguments, "--out", str(tmp_path / "none"))
        assert refused.returncode == 2
        assert complaint in refused.stderr


# --- built-in streams --------------------------------------------------------------------------------


@pytest.fixture
def artwork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three drawings instead of the registries' packages."""
    pictures = {name: Image.open(EXAMPLES / f"{name}.png").convert("RGBA").resize((64, 64)) for name in NAMES[:3]}
    drawn = {name: streams.np.asarray(picture) for name, picture in pictures.items()}
    monkeypatch.setattr(streams.artwork, "load_artwork", lambda style: {**drawn, "pile of poo": drawn["dog"]})
    streams._drawings.cache_clear()
    streams.source_names.cache_clear()


@pytest.mark.usefixtures("artwork")
@pytest.mark.parametrize("name", sorted(streams.STREAMS))
def test_every_built_in_stream_loads_and_is_the_same_each_time(name: str) -> None:
    first, second = streams.load(name), streams.load(name)
    assert [item.id for item in first.items] == [item.id for item in second.items]
    assert len({item.id for item in first.items}) == len(first.items)
    for ours, theirs in list(zip(first.items, second.items, strict=True))[:5]:
        assert ours.picture().tobytes() == theirs.picture().tobytes()
    assert all(item.truth is None for item in first.extra)
    assert {item.id for item in first.source}.isdisjoint(item.id for item in first.items)


@pytest.mark.usefixtures("artwork")
def test_a_stream_is_asked_by_letter_also_what_is_not_scored() -> None:
    made = command._by_letter(streams.load("hostile-attacker"), 4)
    assert {item.labels for item in (*made.items, *made.extra)} == {("A", "B", "C", "D")}
    assert {item.truth for item in made.items} <= {"A", "B", "C", "D"}
    assert {item.truth for item in made.extra} == {None}
    assert {len(item.labels) for item in made.source} == {4}
    assert not any(item.question for item in made.source), "the source domain stays as the model knows it"


def test_development_and_final_images_are_apart() -> None:
    for kind in ("noise", "blur"):
        development = {item.file for item in streams.corrupted(kind).items}
        final = {item.file for item in streams.corrupted(kind, final=True).items}
        assert development.isdisjoint(final)


def test_a_stream_that_does_not_exist_is_named() -> None:
    with pytest.raises(BadData, match="none of the built-in streams"):
        streams.load("nothing")


def test_views_are_natural_and_repeatable() -> None:
    drawing = Image.open(EXAMPLES / "dog.png").convert("RGBA")
    one, same, other = (streams.view_of(drawing, random.Random(seed)) for seed in ("a", "a", "b"))
    assert one.tobytes() == same.tobytes() != other.tobytes()
