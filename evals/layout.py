"""What the public layouts of data sets have in common: nested folders, lists of records, images inside parquet."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servetune.evals.data import IMAGE_SUFFIXES, BadData

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """One question of a data set about an image file. Without labels it is an open question."""

    image: Path
    question: str
    answer: str
    labels: tuple[str, ...] = ()


def located(folder: Path, pattern: str) -> Path:
    """The folder itself, or the one an archive unpacked inside it, that holds what the glob pattern names.

    Raises:
        BadData: there is none.
    """
    if folder.is_dir():
        for place in (folder, *folders_in(folder)):
            if next(place.glob(pattern), None) is not None:
                return place
    raise BadData(f"{folder} holds no {pattern}; docs/paper.md has the layout")


def folders_in(folder: Path) -> list[Path]:
    """Its folders by name, without hidden ones."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def images_in(folder: Path) -> list[Path]:
    """Its image files by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def text_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        BadData: there is no such file.
    """
    if not path.is_file():
        raise BadData(f"{path} is missing; it comes with the data set")
    # Not splitlines: a JSON string may hold the other characters that it takes for the end of a line.
    return [line.strip() for line in path.read_text().split("\n") if line.strip()]


def records(folder: Path, images: Path, *patterns: str) -> Iterator[Record]:
    """The records of the first pattern that names files: a JSON list or table, JSON lines, or parquet.

    An image that lies inside a parquet file is written into `images`, and the record has its path instead.

    Raises:
        BadData: no such file, or it cannot be read.
    """
    for pattern in patterns:
        files = sorted(folder.glob(pattern))
        for file in files:
            if file.suffix == ".parquet":
                yield from _parquet(file, images)
            else:
                yield from _json(file)
        if files:
            return
    raise BadData(f"{folder} holds no {' and no '.join(patterns)}; docs/paper.md has the layout")


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        BadData: it is no JSON.
    """
    return _parsed(file.read_text(), file)


def _parsed(text: str, file: Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadData(f"{file} is no JSON: {error}") from error


def _json(file: Path) -> Iterator[Record]:
    if file.suffix == ".jsonl":
        yield from (_parsed(line, file) for line in text_lines(file))
        return
    whole = read_json(file)
    if isinstance(whole, dict):
        whole = whole["questions"] if "questions" in whole else whole.values()
    yield from whole


def _parquet(file: Path, images: Path) -> Iterator[Record]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise BadData(f"{file} needs pyarrow: pip install pyarrow") from None
    for batch in parquet.ParquetFile(file).iter_batches(batch_size=64):
        for row in batch.to_pylist():
            yield {column: _saved(value, images) for column, value in row.items()}


def _saved(value: Any, images: Path) -> Any:
    """What a column holds; an image becomes a file named by its content, one for all questions about it."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        return _saved(value[0], images)
    if not (isinstance(value, dict) and isinstance(value.get("bytes"), bytes)):
        return value
    file = images / hashlib.sha256(value["bytes"]).hexdigest()[:32]
    if not file.exists():
        images.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".new").write_bytes(value["bytes"])
        file.with_suffix(".new").replace(file)
    return file
