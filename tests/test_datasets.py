"""The data sets of the TTRV paper: every public layout is read item by item, a broken one is refused by name."""

from __future__ import annotations

import io
import json
import random
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from servetune import cli
from servetune.evals.data import BadData, Item, read
from servetune.evals.datasets import DATASETS, RECOGNITION, VQA, convert, load
from servetune.evals.letters import WHAT, ask_all_by_letter, ask_by_letter, letter_question

FISH, SHARK = "n01440764", "n01484850"
MAPPING = f"{FISH} tench, Tinca tinca\n{SHARK} great white shark, white shark\n"
LETTER = "respond with only the corresponding option letter (A, B, C, or D)"
ABCD = ("A", "B", "C", "D")

Expected = list[tuple[str, str, str, tuple[str, ...]]]
"""Image relative to the folder, a part of the question, the answer, the labels."""


def picture(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (shade, 0, 0)).save(path, "PNG")
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def dump(path: Path, content: Any) -> Path:
    return text(path, json.dumps(content))


def synsets(root: Path) -> Expected:
    labels = ("great white shark", "tench")
    for synset in (FISH, SHARK):
        picture(root / synset / "1.JPEG")
    return [(f"{FISH}/1.JPEG", "", "tench", labels), (f"{SHARK}/1.JPEG", "", "great white shark", labels)]


def inside(place: str, expected: Expected) -> Expected:
    return [(f"{place}/{file}", *others) for file, *others in expected]


def imagenet(folder: Path) -> Expected:
    text(folder / "LOC_synset_mapping.txt", MAPPING)
    return inside("val", synsets(folder / "val"))


def imagenet_v2(folder: Path) -> Expected:
    place = "imagenetv2-matched-frequency-format-val"
    text(folder / "LOC_synset_mapping.txt", MAPPING)
    for index in ("0", "1"):
        picture(folder / place / index / "ab.jpeg")
    labels = ("great white shark", "tench")
    return [(f"{place}/0/ab.jpeg", "", "tench", labels), (f"{place}/1/ab.jpeg", "", "great white shark", labels)]


def imagenet_r(folder: Path) -> Expected:
    text(folder / "imagenet-r" / "README.txt", f"200 classes are as follows.\n\n{MAPPING}")
    return inside("imagenet-r", synsets(folder / "imagenet-r"))


def imagenet_sketch(folder: Path) -> Expected:
    text(folder.parent / "words.txt", MAPPING.replace(" ", "\t", 1))
    return inside("sketch", synsets(folder / "sketch"))


def imagenet_a(folder: Path) -> Expected:
    text(folder / "README.txt", MAPPING)
    return synsets(folder)


def food101(folder: Path) -> Expected:
    root = folder / "food-101"
    text(root / "meta" / "test.txt", "apple_pie/11\nsushi/7\n")
    for file in ("apple_pie/11", "sushi/7", "sushi/8"):
        picture(root / "images" / f"{file}.jpg")
    labels = ("apple pie", "sushi")
    return [
        ("food-101/images/apple_pie/11.jpg", "", "apple pie", labels),
        ("food-101/images/sushi/7.jpg", "", "sushi", labels),
    ]


def dtd(folder: Path) -> Expected:
    text(folder / "labels" / "test1.txt", "banded/banded_0002.jpg\nwoven/woven_0001.jpg\n")
    for file in ("banded/banded_0002.jpg", "woven/woven_0001.jpg"):
        picture(folder / "images" / file)
    return [
        ("images/banded/banded_0002.jpg", "what texture", "banded", ("banded", "woven")),
        ("images/woven/woven_0001.jpg", "what texture", "woven", ("banded", "woven")),
    ]


def resisc45(folder: Path) -> Expected:
    labels = ("airplane", "golf course")
    for name in ("airplane", "golf_course"):
        picture(folder / "NWPU-RESISC45" / name / f"{name}_001.jpg")
    return [
        ("NWPU-RESISC45/airplane/airplane_001.jpg", "", "airplane", labels),
        ("NWPU-RESISC45/golf_course/golf_course_001.jpg", "", "golf course", labels),
    ]


def mathverse(folder: Path) -> Expected:
    picture(folder / "images" / "images_version_1-4" / "image_1.png")
    asked = "How large is angle A? ()\nChoices:\nA:40°\nB:60°\nC:140°"
    ask = "Please directly answer the question and provide the correct option letter, e.g., A, B, C, D."
    seen = f"According to the question shown in the image, {ask[0].lower()}{ask[1:]}"
    shared = {"image": "images_version_1-4/image_1.png", "question_for_eval": asked}
    dump(
        folder / "testmini.json",
        [
            shared | {"question_type": "multi-choice", "query_wo": f"{ask}\nQuestion: {asked}", "answer": "C"},
            shared | {"question_type": "free-form", "query_wo": "How long?", "answer": "3"},
            shared | {"question_type": "multi-choice", "query_wo": seen, "answer": "B "},
        ],
    )
    file = "images/images_version_1-4/image_1.png"
    instruction = "A, B, C, D. Do not include any explanation or extra text."
    return [(file, instruction, "C", ABCD[:3]), (file, instruction, "B", ABCD[:3])]


def mathvista(folder: Path) -> Expected:
    picture(folder / "images" / "1.jpg")
    shared = {"image": "images/1.jpg", "question": "How far?", "unit": "cm"}
    dump(
        folder / "annot_testmini.json",
        {
            "1": shared | {"question_type": "multi_choice", "choices": ["2", "3"], "answer": "3"},
            "2": shared | {"question_type": "free_form", "choices": None, "answer": "3"},
        },
    )
    return [("images/1.jpg", "Question: How far? (Unit: cm)\nChoices:\n(A) 2\n(B) 3", "B", ("A", "B"))]


def seed_bench(folder: Path) -> Expected:
    picture(folder / "SEED-Bench-image" / "1454426_25")
    choices = {f"choice_{letter}": f"thing {letter}" for letter in "abcd"}
    shared = choices | {"question": "What is it?", "answer": "D", "data_id": "1454426_25"}
    questions = [shared | {"data_type": "image"}, shared | {"data_type": "video"}]
    dump(folder / "SEED-Bench.json", {"question_type": {"Scene": 1}, "questions": questions})
    return [
        (
            "SEED-Bench-image/1454426_25",
            f"What is it? Choose the correct answer from the options below and {LETTER}",
            "D",
            ABCD,
        )
    ]


def mme(folder: Path) -> Expected:
    root = folder / "MME_Benchmark_release_version" / "MME_Benchmark"
    picture(root / "artwork" / "images" / "10.jpg")
    text(root / "artwork" / "questions_answers_YN" / "10.txt", "Is it oil? Please answer yes or no.\tYes\n")
    picture(root / "OCR" / "0001.png")
    text(
        root / "OCR" / "0001.txt",
        "Is it a? Please answer yes or no.\tYes\nIs it b? Please answer yes or no.\tNo\n\n",
    )
    place = "MME_Benchmark_release_version/MME_Benchmark"
    tail = "Options:\nA. No\nB. Yes"
    return [
        (f"{place}/OCR/0001.png", tail, "B", ("A", "B")),
        (f"{place}/OCR/0001.png", "Is it b? Choose", "A", ("A", "B")),
        (f"{place}/artwork/images/10.jpg", "letter (A or B)", "B", ("A", "B")),
    ]


def realworldqa(folder: Path) -> Expected:
    picture(folder / "images" / "0.webp")
    asked = "Which way?\n\nA. Left.\nB. Right.\nC. Up.\n\nPlease answer directly with only the letter."
    dump(
        folder / "annotations.json",
        [
            {"image": "0.webp", "question": asked, "answer": "B"},
            {"image": "0.webp", "question": "How many lanes?", "answer": "3"},
        ],
    )
    return [("images/0.webp", asked, "B", ABCD[:3]), ("images/0.webp", "How many lanes?", "3", ())]


def capture(folder: Path) -> Expected:
    picture(folder / "real_dataset" / "1455.jpg")
    dump(
        folder / "real_metadata.json", [{"image_file": "1455.jpg", "ground_truth": 63, "object": "keyboard keys"}]
    )
    return [("real_dataset/1455.jpg", "How many keyboard keys", "63", ())]


def crpe(folder: Path) -> Expected:
    picture(folder / "abnormal_images" / "a.png")
    picture(folder / "coco" / "val2017" / "000000000139.jpg")
    asked = "Who sits\u2028there?\nA. man\nB. dog\nC. cat\nD. hen\nAnswer with the option's letter."
    files = "abnormal_images/a.png", "coco/val2017/000000000139.jpg"
    records = [{"question_id": 0, "image": file, "text": asked, "correct_option": "C"} for file in files]
    text(folder / "crpe_relation.jsonl", "\n".join(json.dumps(record, ensure_ascii=False) for record in records))
    return [(file, asked, "C", ABCD) for file in files]


def ai2d(folder: Path) -> Expected:
    shared = {"answerTexts": ["ears", "nose", "mouth", "face"], "correctAnswer": 3}
    questions = {"What is A?": shared | {"abcLabel": True}, "What eats?": shared | {"abcLabel": False}}
    for name in ("0", "1"):
        picture(folder / "images" / f"{name}.png")
        picture(folder / "abc_images" / f"{name}.png")
        dump(folder / "questions" / f"{name}.png.json", {"imageName": f"{name}.png", "questions": questions})
    text(folder / "ai2d_test_ids.csv", "1\n")
    return [
        (
            "abc_images/1.png",
            f"What is A? Choose the correct answer from the options below and {LETTER}",
            "D",
            ABCD,
        ),
        ("images/1.png", "Options:\nA. ears\nB. nose\nC. mouth\nD. face", "D", ABCD),
    ]


BUILD: dict[str, Callable[[Path], Expected]] = {
    "imagenet": imagenet,
    "imagenet-v2": imagenet_v2,
    "imagenet-r": imagenet_r,
    "imagenet-sketch": imagenet_sketch,
    "imagenet-a": imagenet_a,
    "food101": food101,
    "dtd": dtd,
    "resisc45": resisc45,
    "mathverse": mathverse,
    "mathvista": mathvista,
    "seed-bench": seed_bench,
    "mme": mme,
    "realworldqa": realworldqa,
    "capture": capture,
    "crpe": crpe,
    "ai2d": ai2d,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "root" / "data").mkdir(parents=True)
    return tmp_path / "root" / "data"


def test_all_sixteen_are_there() -> None:
    assert list(BUILD) == list(DATASETS)
    assert (len(RECOGNITION), len(VQA)) == (8, 8)


@pytest.mark.parametrize("name", DATASETS)
def test_the_public_layout_is_read_item_by_item(name: str, folder: Path, tmp_path: Path) -> None:
    expected = BUILD[name](folder)
    items = load(name, folder, tmp_path / "images").items
    assert [(str(Path(item.file).relative_to(folder)), item.truth, item.labels) for item in items] == [
        (file, answer, labels) for file, _, answer, labels in expected
    ]
    for item, (_, asked, _, _) in zip(items, expected, strict=True):
        assert asked in item.question
        assert bool(asked) == bool(item.question)
        assert item.picture().size == (8, 6)
    assert len({item.id for item in items}) == len(items)
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("name", DATASETS)
def test_an_empty_or_missing_folder_is_refused_with_its_name(name: str, folder: Path, tmp_path: Path) -> None:
    for empty in (folder, tmp_path / "nowhere"):
        with pytest.raises(BadData, match=str(empty)):
            load(name, empty, tmp_path / "images")


@pytest.mark.parametrize("name", ["food101", "dtd", *VQA])
def test_a_missing_image_is_named(name: str, folder: Path, tmp_path: Path) -> None:
    file = BUILD[name](folder)[-1][0]
    (folder / file).unlink()
    with pytest.raises(BadData, match=rf"there is no image.*\b{Path(file).stem}\b"):
        load(name, folder, tmp_path / "images")


@pytest.mark.parametrize(
    ("name", "file", "key"),
    [
        ("mathverse", "testmini.json", "answer"),
        ("mathvista", "annot_testmini.json", "choices"),
        ("seed-bench", "SEED-Bench.json", "choice_c"),
        ("realworldqa", "annotations.json", "question"),
        ("capture", "real_metadata.json", "ground_truth"),
        ("crpe", "crpe_relation.jsonl", "correct_option"),
        ("ai2d", "questions/1.png.json", "answerTexts"),
    ],
)
def test_a_record_without_a_field_is_refused(name: str, file: str, key: str, folder: Path, tmp_path: Path) -> None:
    BUILD[name](folder)
    text(folder / file, (folder / file).read_text().replace(f'"{key}"', '"other"'))
    with pytest.raises(BadData, match=f"{folder}.*{name} has no '{key}'"):
        load(name, folder, tmp_path / "images")
    text(folder / file, "{no json")
    with pytest.raises(BadData, match="is no JSON"):
        load(name, folder, tmp_path / "images")


def test_an_answer_that_is_no_option_is_refused(folder: Path, tmp_path: Path) -> None:
    seed_bench(folder)
    file = folder / "SEED-Bench.json"
    text(file, file.read_text().replace('"answer": "D"', '"answer": "E"'))
    with pytest.raises(BadData, match="seed-bench:1: the answer 'E'"):
        load("seed-bench", folder, tmp_path)
    mathvista(folder)
    file = folder / "annot_testmini.json"
    text(file, file.read_text().replace('"answer": "3"', '"answer": "4"'))
    with pytest.raises(BadData, match="a record of mathvista cannot be used"):
        load("mathvista", folder, tmp_path)


@pytest.mark.parametrize("name", ["imagenet", "imagenet-v2", "imagenet-r", "imagenet-sketch", "imagenet-a"])
def test_missing_class_names_are_asked_for(name: str, folder: Path, tmp_path: Path) -> None:
    BUILD[name](folder)
    for file in [*folder.rglob("*.txt"), *folder.parent.glob("*.txt")]:
        file.unlink()
    with pytest.raises(BadData, match=r"LOC_synset_mapping\.txt"):
        load(name, folder, tmp_path)
    text(folder / "LOC_synset_mapping.txt", MAPPING.splitlines()[0])
    with pytest.raises(BadData, match=r"none for the folder 1|no class names"):
        load(name, folder, tmp_path)


def test_classes_of_the_same_first_name_are_told_apart(folder: Path, tmp_path: Path) -> None:
    imagenet(folder)
    text(folder / "LOC_synset_mapping.txt", f"{FISH} maillot\n{SHARK} maillot, tank suit\n")
    assert [item.truth for item in load("imagenet", folder, tmp_path).items] == ["maillot", "maillot, tank suit"]


def test_flat_validation_images_take_their_truth_from_the_devkit_or_the_solution(
    folder: Path, tmp_path: Path
) -> None:
    val = folder / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    for number in (1, 2, 3):
        picture(val / f"ILSVRC2012_val_0000000{number}.JPEG")
    text(folder / "LOC_synset_mapping.txt", MAPPING)
    with pytest.raises(BadData, match=r"is flat: it needs LOC_val_solution\.csv"):
        load("imagenet", folder, tmp_path)
    devkit = folder / "ILSVRC2015_devkit" / "data"
    text(devkit / "map_clsloc.txt", f"{SHARK} 1 great_white_shark\n{FISH} 2 tench\n")
    truth = text(devkit / "ILSVRC2015_clsloc_validation_ground_truth.txt", "2\n1\n2\n")
    assert [item.truth for item in load("imagenet", folder, tmp_path).items] == [
        "tench",
        "great white shark",
        "tench",
    ]
    text(truth, "2\n1\n")
    with pytest.raises(BadData, match="2 lines for 3 images"):
        load("imagenet", folder, tmp_path)
    rows = "".join(f"ILSVRC2012_val_0000000{number},{SHARK} 1 2 3 4 \n" for number in (3, 1, 2))
    text(folder / "LOC_val_solution.csv", f"ImageId,PredictionString\n{rows}")
    assert {item.truth for item in load("imagenet", folder, tmp_path).items} == {"great white shark"}


# --- parquet -----------------------------------------------------------------------------------------


def png(shade: int) -> dict[str, Any]:
    memory = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, 0, 0)).save(memory, "PNG")
    return {"bytes": memory.getvalue(), "path": None}


PARQUET: dict[str, tuple[str, list[dict[str, Any]], Expected]] = {
    "mathverse": (
        "testmini.parquet",
        [
            {
                "question_type": "multi-choice",
                "query_wo": "Q?\nChoices:\nA:1\nB:2",
                "question_for_eval": "Q?\nChoices:\nA:1\nB:2",
                "answer": "B",
                "image": png(1),
            }
        ],
        [("", "Q?", "B", ("A", "B"))],
    ),
    "mathvista": (
        "data/testmini-0.parquet",
        [
            {
                "question_type": "multi_choice",
                "question": "Q?",
                "choices": ["1", "2"],
                "answer": "1",
                "unit": None,
                "image": "images/1.jpg",
                "decoded_image": png(1),
            }
        ],
        [("", "(A) 1", "A", ("A", "B"))],
    ),
    "seed-bench": (
        "data/test-0.parquet",
        [
            {f"choice_{letter}": letter for letter in "abcd"}
            | {"data_type": "image", "question": "Q?", "answer": "C", "data_id": "9", "image": [png(1)]}
        ],
        [("", "Q?", "C", ABCD)],
    ),
    "mme": (
        "data/test-0.parquet",
        [
            {"image": png(shade), "question": "Is it? Please answer yes or no.", "answer": "No"}
            for shade in (1, 1, 2)
        ],
        [("", "Is it? Choose", "A", ("A", "B"))] * 3,
    ),
    "realworldqa": (
        "data/test-0.parquet",
        [{"image": png(1), "question": "How many?", "answer": "3"}],
        [("", "How many?", "3", ())],
    ),
    "ai2d": (
        "data/test-0.parquet",
        [{"image": png(1), "question": "Q?", "options": ["a", "b", "c", "d"], "answer": "2"}],
        [("", "C. c", "C", ABCD)],
    ),
}


@pytest.mark.parametrize("name", PARQUET)
def test_parquet_is_read_with_pyarrow_and_asks_for_it(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, rows, expected = PARQUET[name]
    text(folder / file, "")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(BadData, match="needs pyarrow: pip install pyarrow"):
        load(name, folder, tmp_path / "images")

    # pyarrow is not among what the tests install: only its reader's interface is stood in for.
    batch = types.SimpleNamespace(to_pylist=lambda: rows)
    reader = types.SimpleNamespace(iter_batches=lambda batch_size: iter([batch]))
    module = types.ModuleType("pyarrow.parquet")
    module.ParquetFile = lambda path: reader  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)
    items = load(name, folder, tmp_path / "images").items
    assert [(item.truth, item.labels) for item in items] == [(answer, labels) for _, _, answer, labels in expected]
    assert all(asked in item.question for item, (_, asked, _, _) in zip(items, expected, strict=True))
    assert all(item.picture().size == (8, 6) for item in items)
    if name == "mme":
        assert items[0].file == items[1].file != items[2].file, (
            "one image is one file, however often it is asked about"
        )


# --- conversion --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["imagenet-r", "realworldqa"])
def test_a_converted_data_set_reads_as_the_original(name: str, folder: Path, tmp_path: Path) -> None:
    BUILD[name](folder)
    out = tmp_path / "made" / "here.jsonl"
    assert convert(name, folder, out) == 2
    ours, theirs = read(out).items, load(name, folder, tmp_path).items
    assert [(i.question, i.truth, i.labels) for i in ours] == [(i.question, i.truth, i.labels) for i in theirs]
    assert ours[0].picture().tobytes() == theirs[0].picture().tobytes()
    assert not Path(json.loads(out.read_text().splitlines()[0])["image"]).is_absolute()


def test_the_command_converts_and_refuses(folder: Path, tmp_path: Path) -> None:
    imagenet_r(folder)
    out = tmp_path / "r.jsonl"
    done = CliRunner().invoke(cli.app, ["convert", "imagenet-r", str(folder), str(out), "--options", "2"])
    assert (done.exit_code, done.stdout) == (0, f"2 questions: {out}\n")
    assert {item.labels for item in read(out).items} == {("A", "B")}
    for arguments, complaint in (
        (["nothing", str(folder)], "nothing is none of the data sets: imagenet, "),
        (["dtd", str(folder)], "holds no labels/test1.txt"),
        (["imagenet-r", str(folder), "--options", "4"], "too few for 4 options"),
    ):
        refused = CliRunner().invoke(cli.app, ["convert", *arguments[:2], str(tmp_path / "x"), *arguments[2:]])
        assert refused.exit_code == 2
        assert complaint in refused.stderr
    assert not (tmp_path / "x").exists()


# --- letters -----------------------------------------------------------------------------------------


def blank() -> Image.Image:
    return Image.new("RGB", (8, 6))


def thing(name: str = "x", **changes: Any) -> Item:
    given = {
        "id": name,
        "file": name,
        "question": "",
        "truth": "dog",
        "labels": ("ant", "bee", "cat", "dog", "elk"),
    }
    return Item(**(given | {"picture": blank} | changes))


def test_the_wording_is_the_published_one() -> None:
    assert letter_question(WHAT, ["a", "b", "c", "d"]) == (
        "Look at the given image and identify what it shows. Choose the correct answer from the options below and "
        "respond with only the corresponding option letter (A, B, C, or D). Do not include any explanation or "
        "extra text. \n Options:\nA. a\nB. b\nC. c\nD. d"
    )
    assert "(A or B)" in letter_question(WHAT, ["no", "yes"])


def test_the_truth_is_among_different_options_at_its_letter() -> None:
    places = set()
    for seed in range(40):
        made = ask_by_letter(thing(), 4, random.Random(seed))
        assert made == ask_by_letter(thing(), 4, random.Random(seed))
        options = dict(line.split(". ") for line in made.question.splitlines()[-4:])
        assert tuple(options) == made.labels == ABCD
        assert options[str(made.truth)] == "dog"
        assert len(set(options.values())) == 4
        assert set(options.values()) <= set(thing().labels)
        places.add(made.truth)
    assert places == set(ABCD)


def test_an_own_question_leads_and_an_unscored_item_stays_unscored() -> None:
    made = ask_by_letter(thing(question="Which animal?", truth=None), 3, random.Random(0))
    assert made.question.startswith("Which animal? Choose the correct answer")
    assert (made.truth, made.labels) == (None, ABCD[:3])


def test_only_recognition_is_asked_by_letter_and_always_the_same_way() -> None:
    open_question, lettered = thing("a", labels=(), question="?"), thing("b", labels=ABCD, truth="A", question="?")
    items = (open_question, lettered, thing("c"), thing("d"))
    made = ask_all_by_letter(items, 4)
    assert made[:2] == items[:2]
    assert made[2].question != made[3].question
    assert ask_all_by_letter(items[::-1], 4) == made[::-1]
    with pytest.raises(BadData, match="c has 5 labels, which is too few for 6 options"):
        ask_all_by_letter(items, 6)
