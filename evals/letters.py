"""Recognition as TTRV asks it (arXiv 2510.06783, section 8): the true class among random ones, by its letter."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import replace

from servetune.evals.data import BadData, Item

WHAT = "Look at the given image and identify what it shows."
TEXTURE = "Look at the given image and identify what texture it shows."
MOST = len(string.ascii_uppercase)


def letters(count: int) -> tuple[str, ...]:
    """The first letters: `("A", "B", ...)`."""
    return tuple(string.ascii_uppercase[:count])


def letter_question(lead: str, options: Sequence[str]) -> str:
    """A question with options, in the published words; `lead` says what is asked."""
    *first, last = letters(len(options))
    named = f"{', '.join(first)}, or {last}" if len(first) > 1 else f"{first[0]} or {last}"
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip((*first, last), options, strict=True))
    return (
        f"{lead} Choose the correct answer from the options below and respond with only the corresponding option "
        f"letter ({named}). Do not include any explanation or extra text. \n Options:\n{listed}"
    )


def ask_by_letter(item: Item, count: int, rng: random.Random) -> Item:
    """The item with `count` of its labels as options, the truth among them, and their letters as its labels.

    Raises:
        BadData: it has fewer labels than options.
    """
    known = [] if item.truth is None else [item.truth]
    others = [label for label in dict.fromkeys(item.labels) if label not in known]
    if len(known) + len(others) < count:
        raise BadData(f"{item.id} has {len(known) + len(others)} labels, which is too few for {count} options")
    options = known + rng.sample(others, count - len(known))
    rng.shuffle(options)
    truth = None if item.truth is None else letters(count)[options.index(item.truth)]
    return replace(
        item, question=letter_question(item.question or WHAT, options), truth=truth, labels=letters(count)
    )


def ask_all_by_letter(items: Sequence[Item], count: int) -> tuple[Item, ...]:
    """Every item that has labels asked by letter, the same way in every run.

    Open questions and those that are answered by a letter already stay as they are.
    """
    return tuple(
        ask_by_letter(item, count, random.Random(f"options {item.id}"))
        if item.labels and not set(item.labels) <= set(letters(MOST))
        else item
        for item in items
    )
