"""The data sets of the TTRV paper by name: where each comes from, and how a local copy is read or converted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from servetune.evals import recognition, vqa
from servetune.evals.data import BadData, Data, Item, opener
from servetune.evals.layout import Line
from servetune.evals.letters import ask_all_by_letter

REFUSALS = (BadData,)
HUB = "huggingface.co/datasets"


@dataclass(frozen=True, slots=True)
class DataSet:
    """`lines` takes the folder of a local copy, and a place for images that lie inside parquet files."""

    lines: Callable[[Path, Path], Iterable[Line]]
    source: str


RECOGNITION = {
    "imagenet": DataSet(recognition.imagenet, "image-net.org (ILSVRC2012 validation images)"),
    "imagenet-v2": DataSet(recognition.imagenet_v2, f"{HUB}/vaishaal/ImageNetV2"),
    "imagenet-r": DataSet(recognition.imagenet_r, "github.com/hendrycks/imagenet-r"),
    "imagenet-sketch": DataSet(recognition.imagenet_sketch, "github.com/HaohanWang/ImageNet-Sketch"),
    "imagenet-a": DataSet(recognition.imagenet_a, "github.com/hendrycks/natural-adv-examples"),
    "food101": DataSet(recognition.food101, "data.vision.ee.ethz.ch/cvl/datasets_extra/food-101"),
    "dtd": DataSet(recognition.dtd, "www.robots.ox.ac.uk/~vgg/data/dtd"),
    "resisc45": DataSet(recognition.resisc45, f"{HUB}/torchgeo/resisc45"),
}
VQA = {
    "mathverse": DataSet(vqa.mathverse, f"{HUB}/AI4Math/MathVerse"),
    "mathvista": DataSet(vqa.mathvista, f"{HUB}/AI4Math/MathVista"),
    "seed-bench": DataSet(vqa.seed_bench, f"{HUB}/AILab-CVC/SEED-Bench"),
    "mme": DataSet(vqa.mme, "github.com/BradyFU/Awesome-Multimodal-Large-Language-Models"),
    "realworldqa": DataSet(vqa.realworldqa, f"{HUB}/xai-org/RealworldQA"),
    "capture": DataSet(vqa.capture, f"{HUB}/atinp/CAPTURe"),
    "crpe": DataSet(vqa.crpe, f"{HUB}/OpenGVLab/CRPE, and val2017 of cocodataset.org"),
    "ai2d": DataSet(vqa.ai2d, f"{HUB}/lmms-lab/ai2d"),
}
DATASETS = RECOGNITION | VQA


def load(name: str, folder: Path, images: Path) -> Data:
    """The questions of a local copy in its public layout.

    Args:
        images: a folder for images that lie inside parquet files.

    Raises:
        BadData: the data set is not known, or the folder is not laid out as it is published.
    """
    if name not in DATASETS:
        raise BadData(f"{name} is none of the data sets: {', '.join(DATASETS)}")
    try:
        lines = list(DATASETS[name].lines(folder, images))
    except KeyError as error:
        raise BadData(f"{folder}: a record of {name} has no {error}; docs/paper.md has the layout") from error
    except (AttributeError, IndexError, TypeError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, BadData):
            raise
        raise BadData(f"{folder}: a record of {name} cannot be used: {error}") from error
    if not lines:
        raise BadData(f"{folder} holds no question of {name}")
    return Data(name, tuple(_item(f"{name}:{number}", line) for number, line in enumerate(lines, start=1)))


def _item(name: str, line: Line) -> Item:
    if not line.image.is_file():
        raise BadData(f"{name}: there is no image {line.image}")
    if not line.answer or (line.labels and line.answer not in line.labels):
        raise BadData(f"{name}: the answer {line.answer!r} is not one of {', '.join(line.labels[:8])}")
    return Item(name, str(line.image), opener(line.image), line.question, line.answer, line.labels)


def convert(name: str, folder: Path, out: Path, num_options: int | None = None) -> int:
    """Write a data set as JSONL, its images by paths relative to the file, and return the number of questions.

    Images that lie inside parquet files are written beside it.

    Args:
        num_options: ask recognition by letter, with so many options.

    Raises:
        BadData: as `load`.
    """
    items = load(name, folder.absolute(), out.absolute().parent / f"{out.stem}-images").items
    if num_options is not None:
        items = ask_all_by_letter(items, num_options)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w") as file:
        for item in items:
            labels = {"candidate_labels": item.labels} if item.labels else {}
            image = os.path.relpath(item.file, out.absolute().parent)
            record = {"image": image, "question": item.question, "answer": item.truth, **labels}
            file.write(json.dumps(record) + "\n")
    return len(items)
