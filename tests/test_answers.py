"""Votes are counted over canonical answers."""

import pytest

from servetune.adapters.answers import canonical


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog.", "dog"),
        ("  the  Red   apple! ", "red apple"),
        ("B. a dog", "b"),
        ("(C)", "c"),
        ("a) a dog", "a"),
        ("T. rex", "t. rex"),
        ("x: 4", "x: 4"),
        ("3.0", "3"),
        ("-0.0", "0"),
        ("-007.50", "-7.5"),
        ("1234567", "1234567"),
        ("9" * 400, "9" * 400),
        ("1,200", "1200"),
        ("Yes", "yes"),
        ("ﬁsh", "fish"),
        ("a", "a"),
        ("theatre", "theatre"),
        ("", ""),
        (" . ", ""),
    ],
)
def test_canonical_form(text: str, expected: str) -> None:
    assert canonical(text) == expected


def test_canonical_is_idempotent() -> None:
    for text in ("A dog.", "B. a dog", "3.50", "the red, apple"):
        assert canonical(canonical(text)) == canonical(text)
