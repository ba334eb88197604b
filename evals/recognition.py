"""The eight recognition data sets of the TTRV paper, from local copies in their public layouts.

A converter takes the folder and yields every test image with its class among all classes. Class names are read
from a file that comes with the data.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from servetune.evals.data import BadData
from servetune.evals.layout import Line, folders_in, images_in, located, text_lines
from servetune.evals.letters import TEXTURE

SYNSETS = "n[0-9]*/"
MAPPING = "LOC_synset_mapping.txt"
NAMES = (MAPPING, "words.txt", "README.txt")


def imagenet(folder: Path, images: Path) -> Iterator[Line]:
    """ImageNet's validation set (image-net.org, for non-commercial research).

    `val/<synset>/*.JPEG` or flat `val/*.JPEG`, also at `ILSVRC/Data/CLS-LOC/val/`; flat ones need Kaggle's
    `LOC_val_solution.csv`, or `map_clsloc.txt` and `*validation_ground_truth.txt` of a devkit. Names:
    `LOC_synset_mapping.txt` or `words.txt`.
    """
    places = [folder / "ILSVRC/Data/CLS-LOC/val", folder / "val", folder]
    val = next((place for place in places if place.is_dir()), folder)
    if val.is_dir() and any(val.glob(SYNSETS)):
        return _synset_folders(val, folder)
    files = images_in(val) if val.is_dir() else []
    if not files:
        raise BadData(f"{folder} holds neither val/<synset>/ nor images in val/")
    truths = _flat_truths(folder, files)
    names = _names(folder, set(truths))
    return _named(zip(files, (names[synset] for synset in truths), strict=True), names.values())


def imagenet_v2(folder: Path, images: Path) -> Iterator[Line]:
    """ImageNetV2, matched frequency (huggingface.co/datasets/vaishaal/ImageNetV2, MIT).

    `imagenetv2-matched-frequency-format-val/<class index>/*.jpeg`; the index counts the sorted synsets of
    ImageNet's `LOC_synset_mapping.txt`, which must lie in the folder or beside it.
    """
    root = located(folder, "[0-9]*/")
    place = next((p for p in (root, folder, folder.parent) if (p / MAPPING).is_file()), None)
    if place is None:
        raise BadData(f"{folder} needs {MAPPING} of ImageNet, in it or beside it: its folders are class indices")
    found = _read_names(place / MAPPING)
    names = [name for _, name in sorted(_distinct(found).items())]
    folders = [each for each in folders_in(root) if each.name.isdecimal()]
    beyond = [each.name for each in folders if int(each.name) >= len(names)]
    if beyond:
        raise BadData(f"{place / MAPPING} has {len(names)} classes and none for the folder {beyond[0]}")
    return _named(((file, names[int(each.name)]) for each in folders for file in images_in(each)), names)


def imagenet_r(folder: Path, images: Path) -> Iterator[Line]:
    """ImageNet-R (github.com/hendrycks/imagenet-r, MIT): `imagenet-r/<synset>/*`, names in its `README.txt`."""
    return _synset_folders(located(folder, SYNSETS), folder)


def imagenet_sketch(folder: Path, images: Path) -> Iterator[Line]:
    """ImageNet-Sketch (github.com/HaohanWang/ImageNet-Sketch, MIT): `sketch/<synset>/*.JPEG`.

    Names: ImageNet's `LOC_synset_mapping.txt` or `words.txt`, in the folder or beside it.
    """
    return _synset_folders(located(folder, SYNSETS), folder)


def imagenet_a(folder: Path, images: Path) -> Iterator[Line]:
    """ImageNet-A (github.com/hendrycks/natural-adv-examples, MIT), as ImageNet-R: `imagenet-a/<synset>/*`."""
    return _synset_folders(located(folder, SYNSETS), folder)


def food101(folder: Path, images: Path) -> Iterator[Line]:
    """Food-101 (data.vision.ee.ethz.ch/cvl/datasets_extra/food-101, images for scientific fair use only).

    `food-101/meta/test.txt` with lines `apple_pie/1011328`, and `food-101/images/apple_pie/1011328.jpg`.
    """
    root = located(folder, "meta/test.txt")
    return _listed(root / "images", [f"{line}.jpg" for line in text_lines(root / "meta/test.txt")])


def dtd(folder: Path, images: Path) -> Iterator[Line]:
    """Describable Textures (robots.ox.ac.uk/~vgg/data/dtd, for research), the first test split.

    `dtd/labels/test1.txt` with lines `banded/banded_0002.jpg`, and `dtd/images/banded/banded_0002.jpg`.
    """
    root = located(folder, "labels/test1.txt")
    return _listed(root / "images", text_lines(root / "labels/test1.txt"), TEXTURE)


def resisc45(folder: Path, images: Path) -> Iterator[Line]:
    """NWPU-RESISC45 (Cheng 2017; huggingface.co/datasets/torchgeo/resisc45, licence not stated).

    `NWPU-RESISC45/<class>/<class>_001.jpg`, all of them: the data set has no split of its own.
    """
    root = located(folder, "*/*.jpg")
    found = [f"{each.name}/{file.name}" for each in folders_in(root) for file in images_in(each)]
    return _listed(root, found)


def _synset_folders(root: Path, folder: Path) -> Iterator[Line]:
    folders = sorted(path for path in root.glob(SYNSETS) if path.is_dir())
    names = _names(folder, {each.name for each in folders}, root)
    return _named(((file, names[each.name]) for each in folders for file in images_in(each)), names.values())


def _listed(root: Path, files: list[str], question: str = "") -> Iterator[Line]:
    """Files `class_name/file`, the class in words."""
    named = ((root / file, file.partition("/")[0].replace("_", " ")) for file in files)
    return _named(named, {file.partition("/")[0].replace("_", " ") for file in files}, question)


def _named(files: Iterable[tuple[Path, str]], names: Iterable[str], question: str = "") -> Iterator[Line]:
    labels = tuple(sorted(set(names)))  # two classes of ImageNet are called crane
    return (Line(file, question, name, labels) for file, name in files)


def _names(folder: Path, synsets: set[str], *more: Path) -> dict[str, str]:
    """Class names of the synsets, from the first file that has them all."""
    tried = [place / name for place in (*more, folder, folder.parent) for name in NAMES]
    for file in tried:
        found = _read_names(file) if file.is_file() else {}
        if synsets <= found.keys():
            return _distinct({synset: found[synset] for synset in synsets})
    raise BadData(
        f"{folder} has no class names: put {MAPPING} or words.txt of ImageNet into it or beside it "
        f"(a line is: n01443537 goldfish, Carassius auratus)"
    )


def _read_names(file: Path) -> dict[str, str]:
    return dict(re.findall(r"^(n\d{8})\s+(\S.*?)\s*$", file.read_text(), re.MULTILINE))


def _distinct(names: dict[str, str]) -> dict[str, str]:
    """The first name of each class, or all of them where two classes share the first."""
    first = {synset: text.partition(",")[0] for synset, text in names.items()}
    count = Counter(first.values())
    return {synset: name if count[name] == 1 else names[synset] for synset, name in first.items()}


def _flat_truths(folder: Path, files: list[Path]) -> list[str]:
    """The synset of each file."""
    solution = _found(folder, "LOC_val_solution.csv")
    if solution is not None:
        rows = csv.DictReader(text_lines(solution))
        by_name = {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
        return [by_name[file.stem] for file in files]
    truth, mapping = _found(folder, "*validation_ground_truth.txt"), _found(folder, "map_clsloc.txt")
    if truth is None or mapping is None:
        raise BadData(
            f"{folder} is flat: it needs LOC_val_solution.csv, or *validation_ground_truth.txt with "
            "map_clsloc.txt of a devkit (from 2014 on; the older meta.mat is not read)"
        )
    synsets = {number: synset for synset, number, *_ in map(str.split, text_lines(mapping))}
    numbers = text_lines(truth)
    if len(numbers) != len(files):
        raise BadData(f"{truth} has {len(numbers)} lines for {len(files)} images")
    return [synsets[number] for number in numbers]


def _found(folder: Path, name: str) -> Path | None:
    """A file of the folder or of a devkit inside it."""
    return next((file for place in ("", "*/", "*/data/") for file in folder.glob(place + name)), None)
