"""The eight question data sets of the TTRV paper, from local copies in their public layouts.

A converter takes the folder, and a place for images that lie inside parquet files, and yields every question that
the paper's protocol can ask: about one image, answered by a letter or, where the data set is so, freely.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from servetune.evals.data import BadData
from servetune.evals.layout import Line, folders_in, images_in, located, read_json, records, text_lines
from servetune.evals.letters import letter_question, letters

ONLY = "Do not include any explanation or extra text."


def mathverse(folder: Path, images: Path) -> Iterator[Line]:
    """MathVerse testmini, its multiple-choice questions (huggingface.co/datasets/AI4Math/MathVerse, MIT).

    `testmini.json` with `query_wo`, `question_for_eval`, `answer`, `question_type`, `image`, and the images below
    `images/`; or `testmini.parquet`.
    """
    for record in records(folder, images, "testmini.json", "testmini.parquet"):
        if record["question_type"] != "multi-choice":
            continue
        # The version whose question is in the picture names its choices here alone.
        labels = _named_letters(record["question_for_eval"]) or letters(4)
        question = record["query_wo"].replace("e.g., A, B, C, D.", f"e.g., A, B, C, D. {ONLY}")
        yield Line(_image(folder, record["image"], "images"), question, record["answer"].strip(), labels)


def mathvista(folder: Path, images: Path) -> Iterator[Line]:
    """MathVista testmini, its multiple-choice questions (huggingface.co/datasets/AI4Math/MathVista, CC BY-SA 4.0).

    `annot_testmini.json` (or GitHub's `testmini.json`), a table of `question`, `choices`, `answer`,
    `question_type`, `unit` and `image`, with `images/`; or `data/testmini-*.parquet`.
    """
    found = records(folder, images, "annot_testmini.json", "testmini.json", "data/testmini-*.parquet")
    for record in found:
        if record["question_type"] != "multi_choice":
            continue
        choices = record["choices"]
        labels = letters(len(choices))
        unit = f" (Unit: {record['unit']})" if record.get("unit") else ""
        listed = "\n".join(f"({letter}) {choice}" for letter, choice in zip(labels, choices, strict=True))
        question = (
            "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the "
            f"end.\nQuestion: {record['question']}{unit}\nChoices:\n{listed}"
        )
        image = record.get("decoded_image") or record["image"]
        yield Line(_image(folder, image), question, labels[choices.index(record["answer"])], labels)


def seed_bench(folder: Path, images: Path) -> Iterator[Line]:
    """SEED-Bench, its questions about images (huggingface.co/datasets/AILab-CVC/SEED-Bench, CC BY-NC 4.0).

    `SEED-Bench.json` with `choice_a` to `choice_d`, `answer`, `data_type`, `data_id`, and
    `SEED-Bench-image/<data_id>`; or parquet in `data/`.
    """
    for record in records(folder, images, "SEED-Bench.json", "data/*.parquet"):
        if record["data_type"] != "image":
            continue
        choices = [record[f"choice_{letter}"] for letter in "abcd"]
        image = record.get("image") or record["data_id"]
        question = letter_question(record["question"], choices)
        yield Line(_image(folder, image, "SEED-Bench-image"), question, record["answer"], letters(4))


def mme(folder: Path, images: Path) -> Iterator[Line]:
    """MME (github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, on request, for academic research).

    `MME_Benchmark/<task>/` with `images/0001.jpg` and `questions_answers_YN/0001.txt`, or with both side by side;
    a line is `question Please answer yes or no.<TAB>Yes`. Or parquet in `data/`.
    """
    if any(folder.glob("data/*.parquet")):
        for record in records(folder, images, "data/*.parquet"):
            yield _yes_or_no(record["image"], record["question"], record["answer"])
        return
    release = folder / "MME_Benchmark_release_version"
    places = release / "MME_Benchmark", release, folder / "MME_Benchmark", folder
    root = next((place for place in places if place.is_dir()), folder)
    for task in folders_in(root) if root.is_dir() else []:
        apart = (task / "questions_answers_YN").is_dir()
        pictures = {image.stem: image for image in images_in(task / "images" if apart else task)}
        for file in sorted((task / "questions_answers_YN" if apart else task).glob("*.txt")):
            if file.stem not in pictures:
                raise BadData(f"there is no image for {file}")
            for line in text_lines(file):
                question, answer = line.split("\t")
                yield _yes_or_no(pictures[file.stem], question, answer)


def realworldqa(folder: Path, images: Path) -> Iterator[Line]:
    """RealWorldQA (huggingface.co/datasets/xai-org/RealworldQA, CC BY-ND 4.0).

    `data/test-*.parquet` with `image`, `question`, `answer`, or `annotations.json` with `images/`. A question that
    lists options is answered by a letter, any other freely.
    """
    for record in records(folder, images, "data/*.parquet", "annotations.json"):
        question, answer = record["question"], record["answer"]
        labels = _named_letters(question)
        yield Line(_image(folder, record["image"], "images"), question, answer.strip(), labels)


def capture(folder: Path, images: Path) -> Iterator[Line]:
    """CAPTURe, its real occluded images (huggingface.co/datasets/atinp/CAPTURe, MIT): counting, answered freely.

    `real_metadata.json` with `image_file`, `object`, `ground_truth`, and `real_dataset/`.
    """
    for record in records(folder, images, "real_metadata.json"):
        things = record["object"]
        question = (
            f"How many {things} are there in all? Assume that their pattern goes on behind the black box, and "
            "count those behind it too. Answer with a number only."
        )
        yield Line(_image(folder, record["image_file"], "real_dataset"), question, str(record["ground_truth"]))


def crpe(folder: Path, images: Path) -> Iterator[Line]:
    """CRPE, its relation questions (huggingface.co/datasets/OpenGVLab/CRPE, Apache-2.0; images of COCO).

    `crpe_relation.jsonl` with `text`, `correct_option`, `image`; images in `abnormal_images/` and, from COCO,
    in `coco/val2017/`.
    """
    for record in records(folder, images, "crpe_relation.jsonl"):
        question = record["text"]
        answer = record["correct_option"].strip()
        yield Line(_image(folder, record["image"]), question, answer, _named_letters(question))


def ai2d(folder: Path, images: Path) -> Iterator[Line]:
    """AI2D's test questions (allenai.org/data/diagrams, CC BY-SA 4.0; huggingface.co/datasets/lmms-lab/ai2d).

    `data/test-*.parquet` with `question`, `options`, `answer` (an index) and `image`; or Allen AI's
    `questions/*.json`, `images/`, `abc_images/` and `ai2d_test_ids.csv`.
    """
    if any(folder.glob("data/*.parquet")):
        for record in records(folder, images, "data/test-*.parquet"):
            yield _choice(record["image"], record["question"], record["options"], int(record["answer"]))
        return
    root = located(folder, "questions/*.json")
    listed = next((p / "ai2d_test_ids.csv" for p in (root, folder) if (p / "ai2d_test_ids.csv").is_file()), None)
    if listed is None:
        raise BadData(f"{root} needs ai2d_test_ids.csv, which says which of its questions are the test")
    test = set(text_lines(listed))
    for file in sorted(root.glob("questions/*.json")):
        whole = read_json(file)
        name = whole["imageName"]
        if Path(name).stem not in test:
            continue
        for question, record in whole["questions"].items():
            # The letters that such a question speaks of are drawn into a second copy of the image.
            image = _image(root, name, "abc_images" if record["abcLabel"] else "images")
            yield _choice(image, question, record["answerTexts"], record["correctAnswer"])


def _choice(image: Path, question: str, options: list[str], truth: int) -> Line:
    labels = letters(len(options))
    return Line(image, letter_question(question, options), labels[truth], labels)


def _yes_or_no(image: Path, question: str, answer: str) -> Line:
    """As the paper asks MME: no is A, yes is B."""
    options = ["No", "Yes"]
    question = question.replace("Please answer yes or no.", "").strip()
    return _choice(image, question, options, options.index(answer.strip().capitalize()))


def _named_letters(text: str) -> tuple[str, ...]:
    """The letters at the starts of lines, as in `A. a dog`, `A:40°` or `(A) a dog`."""
    found = re.findall(r"^\s*\(?([A-Z])[.:)]", text, re.MULTILINE)
    return letters(len(found)) if len(found) > 1 and tuple(found) == letters(len(found)) else ()


def _image(folder: Path, value: Any, *inside: str) -> Path:
    """The image that a record names, or has brought along."""
    if isinstance(value, Path):
        return value
    places = [folder / str(value), *(folder / each / str(value) for each in inside)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise BadData(f"there is no image {places[-1]}")
    return found
