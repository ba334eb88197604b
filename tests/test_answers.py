"""Votes are counted over canonical answers."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from servetune.adapters.answers import canonical

UNITS, TENS, ORDINALS = (
    line.split()
    for line in (
        """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
        seventeen eighteen nineteen""",
        "twenty thirty forty fifty sixty seventy eighty ninety",
        "first second third fourth fifth sixth seventh eighth ninth",
    )
)
# Pieces of answers whose rules meet each other, beside any text at all.
WORDS = "a an the A. (b) c) T. one twenty first and or don't 's 1,000 3.50 -0 .5 - / , ; ’ “ … none dog t-shirt"
PIECES = WORDS.split(" ")
TEXTS = (
    st.text()
    | st.lists(st.sampled_from([*PIECES, " "])).map("".join)
    | st.lists(st.sampled_from(PIECES)).map(" ".join)
)


def spelled(number: int, between: str) -> str:
    if number < 20:
        return UNITS[number]
    tens = TENS[number // 10 - 2]
    return f"{tens}{between}{UNITS[number % 10]}" if number % 10 else tens


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog.", "dog"),
        ("  the  Red   apple! ", "red apple"),
        ("a dog on the mat", "dog on mat"),
        ("the the dog", "dog"),
        ("B. a dog", "b"),
        ("(C)", "c"),
        ("a) a dog", "a"),
        ("A", "a"),
        ("a.", "a"),
        ("A:", "a"),
        ("vitamin A", "vitamin a"),
        ("A, B", "a b"),
        ("A and C", "a and c"),
        ("the", "the"),
        ("T. rex", "t rex"),
        ("U.S.A.", "usa"),
        ("x: 4", "x: 4"),
        ("a T-shirt", "t shirt"),
        ("red/white", "red white"),
        ("red,white", "red white"),
        ("10:30", "10:30"),
        ("1/2", "1/2"),
        ("3.0", "3"),
        (".5", "0.5"),
        ("3.5.", "3.5"),
        ("1,5", "1,5"),
        ("-5", "-5"),
        ("-0.0", "0"),
        ("-007.50", "-7.5"),
        ("1234567", "1234567"),
        ("9" * 400, "9" * 400),
        ("1,200", "1200"),
        ("1,000 dogs", "1000 dogs"),
        ("Three dogs", "3 dogs"),
        ("none", "0"),
        ("twenty-first", "twenty first"),
        ("someone", "someone"),
        ("Yes", "yes"),
        ("“Yes”", "yes"),
        ("Don’t", "dont"),
        ("5 o'clock", "5 oclock"),
        ("the dog's", "dog's"),
        ("ﬁsh", "fish"),
        ("theatre", "theatre"),
        ("", ""),
        (" . ", ""),
        ("…", ""),
    ],
)
def test_canonical_form(text: str, expected: str) -> None:
    assert canonical(text) == expected


@given(TEXTS)
@example("the (b) dog")
@example("a a. the one")
def test_canonical_is_idempotent(text: str) -> None:
    assert canonical(canonical(text)) == canonical(text)


@given(TEXTS)
def test_what_says_something_stays_an_answer(text: str) -> None:
    if any(character.isalnum() for character in text):
        assert canonical(text)


@pytest.mark.parametrize("number", range(100))
def test_number_words_are_their_digits(number: int) -> None:
    for between in (" ", "-"):
        assert canonical(spelled(number, between)) == str(number)
        assert canonical(f"There are {spelled(number, between).title()}.") == f"there are {number}"


@given(st.sampled_from(ORDINALS), st.sampled_from(TENS), st.sampled_from(" -"))
def test_ordinals_stay_words(ordinal: str, tens: str, between: str) -> None:
    assert canonical(f"The {ordinal}.") == ordinal
    assert canonical(f"The {tens}{between}{ordinal}.") == f"{tens} {ordinal}"


@given(
    st.sampled_from("abcdefgh"), st.sampled_from(["{}", "{}.", "{}:", "({})", "{})", "{}. a dog", "({}) the one"])
)
def test_every_way_to_write_an_option_is_its_letter(letter: str, form: str) -> None:
    assert canonical(form.format(letter.upper())) == canonical(form.format(letter)) == letter


@given(st.decimals(-(10**9), 10**9, places=3), st.decimals(-(10**9), 10**9, places=3))
def test_numbers_are_equal_when_their_values_are(first: Decimal, second: Decimal) -> None:
    assert (canonical(f"{first:,}") == canonical(str(second))) == (first == second)
    assert canonical(f"{first:,}") == canonical(f"{first}0")
