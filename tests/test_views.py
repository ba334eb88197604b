"""Views: what is tried for which question, and that it is repeatable."""

from __future__ import annotations

import random
from typing import Any

import pytest
from PIL import Image, ImageChops

from servetune.adapters.views import SAME, look, safe_views

PICTURE = Image.linear_gradient("L").resize((80, 60)).rotate(30).convert("RGB")


def mirrored(question: str) -> bool:
    """Whether any look at a picture with a bright left half is bright on the right."""
    sides = Image.new("RGB", (64, 64), "white")
    sides.paste((0, 0, 0), (32, 0, 64, 64))
    looks = (look("moved", sides, question, str(seed)) for seed in range(20))
    return any(seen.getpixel((63, 32))[0] > seen.getpixel((0, 32))[0] for seen in looks)  # type: ignore[index]


def test_the_first_view_is_the_image_itself() -> None:
    assert safe_views("What is this?")[0] == SAME
    assert look(SAME, PICTURE, "What is this?", "q") is PICTURE


@pytest.mark.parametrize("view", safe_views("What is this?"))
def test_a_view_keeps_size_and_mode_and_is_repeatable(view: str) -> None:
    seen = look(view, PICTURE, "What is this?", "q1")
    assert (seen.size, seen.mode) == (PICTURE.size, "RGB")
    assert ImageChops.difference(seen, look(view, PICTURE, "What is this?", "q1")).getbbox() is None


def test_a_big_photo_is_filtered_at_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A median over a photo as it is would hold the server for a minute."""
    filtered = []
    original = Image.Image.filter

    def noting(self: Image.Image, kernel: Any) -> Image.Image:
        filtered.append(max(self.size))
        return original(self, kernel)

    monkeypatch.setattr(Image.Image, "filter", noting)
    seen = look("median", Image.new("RGB", (2048, 1024), "red"), "What is this?", "q")
    assert seen.size == (2048, 1024)
    assert filtered == [256]


def test_noise_is_filtered_before_the_picture_is_moved() -> None:
    """What a move has blended, a median no longer finds."""
    clean = Image.new("RGB", (64, 64), (40, 90, 160))
    noisy, dice = clean.copy(), random.Random(0)
    for _ in range(800):
        noisy.putpixel((dice.randrange(64), dice.randrange(64)), dice.choice([(0, 0, 0), (255, 255, 255)]))
    for seed in range(5):
        seen = look("median", noisy, "What is this?", str(seed))
        worst = max(high for _, high in ImageChops.difference(seen, clean).getextrema())  # type: ignore[misc]
        assert worst < 30


def test_levels_undo_what_is_dark_or_hazy() -> None:
    for dull in (PICTURE.point(lambda value: value // 4), PICTURE.point(lambda value: 190 + value // 5)):
        low, high = look("levels", dull, "What is this?", "q").convert("L").getextrema()
        assert low < 15
        assert high > 240


def test_sides_are_not_swapped_where_the_question_asks_for_them() -> None:
    assert mirrored("What is this?")
    assert not mirrored("Is the dog on the left?")
    assert not mirrored("What does the text say?")


def test_nothing_is_cut_off_where_things_are_counted() -> None:
    question = "How many dots are there?"
    assert "blur" not in safe_views(question)
    framed = Image.new("RGB", (64, 64), "white")
    framed.paste((0, 0, 0), (2, 2, 62, 62))
    assert look("moved", framed, question, "q").getpixel((0, 0)) == (255, 255, 255)


def test_light_stays_where_the_question_is_about_light() -> None:
    assert not {"bright", "contrast", "levels", "other light"} & set(safe_views("Is the picture dark?"))


@pytest.mark.parametrize(
    "form",
    [
        "Choose from the options below and respond with only the corresponding option letter (A, B, C, or D).",
        "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.",
        "Answer the question using a single word or phrase.",
    ],
)
def test_how_to_answer_is_no_part_of_the_question(form: str) -> None:
    assert safe_views(f"What animal is it? {form}") == safe_views("What animal is it?")
    assert mirrored(f"What animal is it? {form}")
    assert not mirrored(f"Which side is it on? {form}")


@pytest.mark.parametrize(
    "question", ["Which letter is written here?", "Answer: how many words does the sign have?"]
)
def test_letters_in_the_image_are_part_of_it(question: str) -> None:
    assert not mirrored(question)
