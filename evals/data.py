"""Questions for an evaluation or to learn from: image folders and JSONL files, and how they are split.

True answers stay here: what a learner gets are `Query` objects, which have none.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from servetune.adapters.types import Query
from servetune.server.decoding import Limits, Refused, decode

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})


class BadData(ValueError):
    """The data cannot be used; the message names the place and what to do."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question about one image, and its answer for the scorer. An empty question is the model's own default.

    `truth` is None where an item is asked but never scored.
    """

    id: str
    file: str
    picture: Callable[[], Image.Image]
    question: str
    truth: str | None
    labels: tuple[str, ...] = ()

    def query(self, default_question: str) -> Query:
        """The item as a server receives it."""
        return Query(self.id, (self.picture(),), self.question or default_question, self.labels)


@dataclass(frozen=True, slots=True)
class Data:
    """Items to learn from and to be measured on, and items of the domain that the model comes from.

    `extra` holds unscored items that are mixed into what is learned from, such as an attacker's. `ordered` is True
    where the sequence is the point.
    """

    name: str
    items: tuple[Item, ...]
    source: tuple[Item, ...] = ()
    extra: tuple[Item, ...] = ()
    ordered: bool = False


@dataclass(frozen=True, slots=True)
class Split:
    """`learn` in the order of the stream; nothing of `heldout` and `unseen` is ever learned from.

    `learned` are the items about images of `learn`, which are measured again at the end as part of the whole.
    """

    learn: list[Item]
    heldout: list[Item]
    unseen: list[Item] = field(default_factory=list)
    learned: list[Item] = field(default_factory=list)


class _Line(BaseModel):
    """One line of a JSONL file, without what an evaluation alone reads."""

    model_config = ConfigDict(extra="ignore")

    image: str
    question: str = ""
    candidate_labels: tuple[str, ...] = ()


class _AnsweredLine(_Line):
    answer: str = Field(min_length=1)


def read(path: Path) -> Data:
    """An image folder (`label/*.png`) or a JSONL file.

    Raises:
        BadData: neither, or something in it cannot be used.
    """
    if path.is_dir():
        return Data(path.name, tuple(_read_folder(path)))
    if path.is_file():
        return Data(path.stem, tuple(_read_lines(path)))
    raise BadData(f"{path} is neither a folder, nor a JSONL file, nor a built-in stream")


def read_unlabeled(path: Path, question: str = "", labels: tuple[str, ...] = ()) -> Data:
    """As `read`, but true answers are not looked at, and need not be there.

    Args:
        question: asked where the data have none; without it, an image is asked the model's recognition question.
        labels: chosen from where a line has none; of a folder, every image below it is then read.

    Raises:
        BadData: as `read`, and for a line with neither a question nor labels.
    """
    if path.is_dir():
        if labels or len(_label_names(path)) < 2:
            items = _read_pictures(path, question, labels)
        else:
            items = [replace(item, question=question, truth=None) for item in _read_folder(path)]
        return Data(path.name, tuple(items))
    if path.is_file():
        return Data(path.stem, tuple(_read_lines(path, _Line, question, labels)))
    raise BadData(f"{path} is neither a folder, nor a JSONL file, nor a built-in stream")


def _label_names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))


def _read_folder(folder: Path) -> list[Item]:
    labels = _label_names(folder)
    if len(labels) < 2:
        raise BadData(f"{folder} needs a folder of images for each of at least two labels")
    items = []
    for label in labels:
        files = sorted(p for p in (folder / label).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise BadData(f"{folder / label} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
        for file in files:
            name = f"{label}/{file.name}"
            items.append(Item(name, name, opener(file), "", label, labels))
    return items


def _read_pictures(folder: Path, question: str, labels: tuple[str, ...]) -> list[Item]:
    """Every image at any depth."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise BadData(f"{folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    names = [str(file.relative_to(folder)) for file in files]
    return [
        Item(name, name, opener(file), question, None, labels) for name, file in zip(names, files, strict=True)
    ]


def _read_lines(
    path: Path, kind: type[_Line] = _AnsweredLine, question: str = "", labels: tuple[str, ...] = ()
) -> list[Item]:
    try:
        texts = path.read_text().split("\n")
    except UnicodeDecodeError as error:
        raise BadData(f"{path} is neither a folder nor a JSONL file in UTF-8") from error
    items = []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            line = kind.model_validate(json.loads(text))
        except json.JSONDecodeError as error:
            raise BadData(f"{path}:{number}: no JSON: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            raise BadData(f"{path}:{number}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        if len(set(line.candidate_labels)) < len(line.candidate_labels):
            raise BadData(f"{path}:{number}: candidate_labels names a label twice")
        truth = line.answer if isinstance(line, _AnsweredLine) else None
        if truth is not None and line.candidate_labels and truth not in line.candidate_labels:
            raise BadData(f"{path}:{number}: the answer is not one of candidate_labels")
        own, asked = line.candidate_labels or labels, line.question or question
        if not own and not asked:
            raise BadData(f"{path}:{number}: a question is needed where there are no candidate_labels")
        file = path.parent / line.image
        if not file.is_file():
            raise BadData(f"{path}:{number}: there is no image {line.image}")
        items.append(Item(f"{path.stem}:{number}", line.image, opener(file), asked, truth, own))
    if not items:
        raise BadData(f"{path} is empty")
    return items


def opener(file: Path) -> Callable[[], Image.Image]:
    def picture() -> Image.Image:
        try:
            return decode(file.read_bytes(), Limits())
        except (OSError, Refused) as error:
            raise BadData(f"{file} is not an image that can be read: {error}") from error

    return picture


def unsplit(data: Data, seed: int) -> list[Item]:
    """All items, in the order of a stream to learn from."""
    return _stream(list(data.items), data, random.Random(f"learn {seed}"), None, True)


def split_files(data: Data, seed: int, samples: int | None, shuffled: bool) -> Split:
    """Half of the files of each label are learned from, the other half is held out."""
    rng = random.Random(f"files {seed}")
    learned = _half_of_files(data.items, rng)
    learn = [item for item in data.items if item.file in learned]
    heldout = [item for item in data.items if item.file not in learned]
    return Split(_stream(learn, data, rng, samples, shuffled), heldout)


def split_labels(data: Data, seed: int, samples: int | None, shuffled: bool) -> Split:
    """Half of the labels never occur in what is learned from; they stay among the candidates."""
    rng = random.Random(f"labels {seed}")
    truths = sorted({item.truth for item in data.items if item.truth is not None})
    unseen = set(rng.sample(truths, len(truths) // 2))
    learned = _half_of_files([item for item in data.items if item.truth not in unseen], rng)
    learn = [item for item in data.items if item.file in learned and item.truth not in unseen]
    heldout = [item for item in data.items if item.file not in learned and item.truth not in unseen]
    others = [item for item in data.items if item.truth in unseen and item.file not in learned]
    return Split(_stream(learn, data, rng, samples, shuffled), heldout, others)


def split_whole(data: Data, seed: int, samples: int | None, shuffled: bool) -> Split:
    """Some items are learned from and all are measured, as TTRV does; held out are those of other images."""
    rng = random.Random(f"whole {seed}")
    learn = _stream(list(data.items), data, rng, samples, shuffled)
    files = {item.file for item in learn}
    learned, rest = ([item for item in data.items if (item.file in files) == own] for own in (True, False))
    return Split(learn, rest, learned=learned)


def _half_of_files(items: Iterable[Item], rng: random.Random) -> set[str]:
    """Half of the files of each label; in open questions a file has many answers, and any half will do."""
    files: dict[str | None, list[str]] = {}
    for item in items:
        group = files.setdefault(item.truth if item.labels else None, [])
        if item.file not in group:
            group.append(item.file)
    chosen: set[str] = set()
    for group in files.values():
        odd = len(group) % 2 and rng.random() < 0.5
        chosen.update(rng.sample(group, len(group) // 2 + bool(odd)))
    return chosen


def _stream(learn: list[Item], data: Data, rng: random.Random, samples: int | None, shuffled: bool) -> list[Item]:
    if shuffled and not data.ordered:
        rng.shuffle(learn)
    learn = learn[:samples]
    if not data.extra:
        return learn
    mixed: list[Item] = []
    for index, item in enumerate(learn):
        mixed += [item, data.extra[index % len(data.extra)]]
    return mixed


def interleave(*parts: Sequence[Item]) -> tuple[Item, ...]:
    """Items of several kinds by turns."""
    longest = max(map(len, parts))
    return tuple(part[index] for index in range(longest) for part in parts if index < len(part))
