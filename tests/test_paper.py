"""The paper's protocol: k samples, then the whole set, with the rest and the printed figures beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from servetune import cli
from servetune.evals import Options, PaperOptions, command, paper, protocol, published
from servetune.evals.data import BadData, Data, Item, split_whole
from servetune.evals.datasets import DATASETS, RECOGNITION, VQA

EXAMPLES = Path(__file__).parents[1] / "examples" / "images" / "fluent-emoji-flat"
NAMES = ("anchor", "banana", "castle", "dog")


def quiet(who: str, done: int, of: int) -> None:
    """No progress bar."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """DTD with two images of each of four classes, and CAPTURe with two images."""
    dtd, capture = tmp_path / "root" / "dtd", tmp_path / "root" / "capture"
    files = [f"{name}/{name}_{turn}.jpg" for name in NAMES for turn in range(2)]
    for number, file in enumerate(files):
        (dtd / "images" / file).parent.mkdir(parents=True, exist_ok=True)
        drawing = Image.open(EXAMPLES / f"{file.partition('/')[0]}.png").convert("RGB")
        drawing.rotate(3 * number, fillcolor="white").save(dtd / "images" / file)
    (dtd / "labels").mkdir()
    (dtd / "labels" / "test1.txt").write_text("\n".join(files))
    (capture / "real_dataset").mkdir(parents=True)
    records = []
    for number, name in enumerate(NAMES[:2]):
        Image.open(EXAMPLES / f"{name}.png").convert("RGB").save(capture / "real_dataset" / f"{name}.jpg")
        records.append({"image_file": f"{name}.jpg", "object": f"{name}s", "ground_truth": number + 1})
    (capture / "real_metadata.json").write_text(json.dumps(records))
    return tmp_path / "root"


def test_one_command_runs_what_is_there_and_names_what_is_not(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [
        "eval",
        "paper",
        "--root",
        str(root),
        "--out",
        str(out),
        "--samples",
        "1,20",
        "--compare",
        "frozen",
    ]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    ran = [
        (row["dataset"], row["learner"], row["samples"], row["items"], row["paper_items"]) for row in made["rows"]
    ]
    assert ran == [
        (name, learner, samples, items, printed)
        for name, items, printed in (("dtd", 8, 5640), ("capture", 2, 817))
        for learner in ("default", "frozen")
        for samples in (1, 20)
    ]
    assert list(made["missing"]) == [name for name in DATASETS if name not in ("dtd", "capture")]
    for row in made["rows"]:
        assert 0 <= row["whole_frozen"] <= 1
        assert (row["heldout_adapted"] is None) == (row["samples"] == 20), "nothing is left beside all samples"
        if row["learner"] == "frozen":
            assert row["whole_frozen"] == row["whole_adapted"]
    saved = json.loads((out / "paper.json").read_text())
    assert saved == {"model": "nano", **made}
    table = (out / "paper.md").read_text()
    assert "|dtd|8 (5640)|default|1|" in table
    assert "- `imagenet`: image-net.org" in table
    assert "1 - sMAPE" in table


def test_a_finished_run_is_not_run_again(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = PaperOptions(root, datasets=("dtd",), samples=(1,), learners=("frozen",), out=tmp_path / "out")
    first = paper.evaluate(options, quiet)
    monkeypatch.setattr(protocol, "run", lambda *arguments, **named: pytest.fail("it was there"))
    assert paper.evaluate(options, quiet) == first


def test_letters_are_asked_and_scored(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Item] = []
    run = protocol.run

    def watched(policy: Any, settings: Any, split: Any, *others: Any, **named: Any) -> protocol.Run:
        seen.extend(split.heldout)
        return run(policy, settings, split, *others, **named)

    monkeypatch.setattr(protocol, "run", watched)
    options = PaperOptions(root, datasets=("dtd",), samples=(1,), learners=("frozen",), out=tmp_path / "out")
    paper.evaluate(options, quiet)
    assert len(seen) == 7
    for item in seen:
        assert "identify what texture it shows. Choose the correct answer" in item.question
        assert item.labels == ("A", "B", "C", "D")
        assert f"{item.truth}. {Path(item.file).parent.name}" in item.question.splitlines()


def test_nothing_there_nonsense_and_a_broken_set_are_usage_errors(root: Path, tmp_path: Path) -> None:
    def call(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(cli.app, ["eval", "paper", *arguments, "--out", str(tmp_path / "out")])
        return done.exit_code, done.stderr

    (tmp_path / "empty").mkdir()
    (root / "ai2d").mkdir()
    for arguments, complaint in (
        ([], "--root DIR"),
        (["--root", str(tmp_path / "empty")], "holds none of the data sets imagenet, "),
        (["--root", str(root), "--datasets", "mme,dtds"], "dtds is none of the data sets"),
        (["--root", str(root), "--datasets", "mme"], "holds none of the data sets mme"),
        (["--root", str(root), "--samples", "1,none"], "--samples"),
        (["--root", str(root), "--options", "4"], "does not take --options"),
        (["--root", str(root), "--split", "label"], "does not take --split"),
        (["--root", str(root), "--learner", "magic"], "not magic"),
        (["--root", str(root)], "ai2d holds no questions"),
    ):
        code, said = call(*arguments)
        assert (code, complaint in said.replace("\n", " ")) == (2, True), said
    refused = CliRunner().invoke(cli.app, ["eval", "openmoji", "--root", str(root)])
    assert (refused.exit_code, "belong to" in refused.stderr) == (2, True)


# --- the whole set in any evaluation -----------------------------------------------------------------


def test_the_whole_is_learned_and_rest_and_images_are_on_one_side() -> None:
    items = [Item(f"{n}", f"f{n // 2}", lambda: Image.new("RGB", (8, 8)), f"{n}?", "a") for n in range(20)]
    split = split_whole(Data("made", tuple(items)), 0, 3, True)
    assert len(split.learn) == 3
    assert {item.id for item in split.learn} <= {item.id for item in split.learned}
    assert {item.file for item in split.learned} == {item.file for item in split.learn}
    assert {item.file for item in split.heldout}.isdisjoint(item.file for item in split.learn)
    assert sorted(int(item.id) for item in split.learned + split.heldout) == list(range(20))
    assert split == split_whole(Data("made", tuple(items)), 0, 3, True)
    assert split != split_whole(Data("made", tuple(items)), 1, 3, True)


def test_whole_accuracy_is_over_all_items(root: Path, tmp_path: Path) -> None:
    """On labels instead of letters, which nano knows."""
    chosen: dict[str, Any] = {"model": "nano", "source": str(root / "dtd" / "images"), "seeds": 1}
    options = Options(
        str(root / "dtd" / "images"), learner="frozen", samples=2, split="whole", out=tmp_path, **chosen
    )
    summary = command.evaluate(options, quiet)
    record = json.loads((tmp_path / "runs" / "frozen-0.json").read_text())
    learned = sum(frozen for frozen, _ in record["right"])
    assert summary["whole_frozen"] == pytest.approx((learned + 6 * summary["heldout_frozen"]) / 8, abs=1e-3)
    assert summary["unseen_labels_frozen"] is None


def test_the_last_steps_are_judged_although_they_make_no_whole_candidate(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVETUNE_QUERIES_PER_STEP", "4")
    source = str(root / "dtd" / "images")
    options = Options(
        source, learner="frequency", samples=8, split="whole", num_options=4, source=source, seeds=1, out=tmp_path
    )
    summary = command.evaluate(options, quiet)
    assert summary["published"] + sum(summary["rejected"].values()) >= 1


def test_options_need_labels(root: Path, tmp_path: Path) -> None:
    asked = tmp_path / "open.jsonl"
    file = root / "dtd" / "images" / "dog" / "dog_0.jpg"
    asked.write_text(json.dumps({"image": str(file), "question": "?", "answer": "dog"}))
    with pytest.raises(BadData, match="--options asks by letter what has labels"):
        command.evaluate(Options(str(asked), num_options=4, source=str(asked), out=tmp_path / "out"), quiet)


# --- printed figures ---------------------------------------------------------------------------------


def test_the_paper_s_means_follow_from_its_cells() -> None:
    """Tables 1 and 2 print these means for the 2B model."""
    model = published.MODELS["internvl3-2b"]
    for names, row, mean in (
        (RECOGNITION, model.frozen, 62.03),
        (RECOGNITION, model.ttrv[20], 94.99),
        (VQA, model.frozen, 47.47),
        (VQA, model.ttrv[20], 57.15),
    ):
        assert sum(row[name] for name in names) / 8 == pytest.approx(mean, abs=0.006)
    assert set(published.ITEMS) == set(DATASETS)


def test_a_checkpoint_is_known_by_its_name() -> None:
    assert published.of("OpenGVLab/InternVL3-2B-hf") is published.MODELS["internvl3-2b"]
    assert published.of("/models/InternVL2_5-4B/") is published.MODELS["internvl2.5-4b"]
    assert published.of("nano") is None
