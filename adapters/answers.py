"""The canonical form of an answer, so that votes can be counted and answers compared.

It follows the evaluation of VQA v2 (`vqaEval.py` of github.com/GT-Vision-Lab/VQA): no articles, number words as
digits, no punctuation but what belongs to a number, contractions with and without their apostrophe alike. Four
differences, because models write what its annotators did not: an option is its letter, an article is kept where it
may be a letter, numbers keep their sign and lose needless zeros, and `twenty one` is 21.

It is nobody's reply: a server shows an answer as the model wrote it, and labels of a closed set are compared as
they were given.
"""

from __future__ import annotations

import re
import unicodedata

_TYPOGRAPHIC = str.maketrans("‘’“”", "''\"\"")
_OPTION = re.compile(r"\(?(?:([a-z])\)|([a-h])[.:])(?:\s|$)")
_APOSTROPHE = re.compile(r"(?<=n)'(?=t\b)|(?<=[a-z])'(?=(?:ll|ve|re|d|m)\b)|(?<=\bo)'(?=clock\b)")
_PERIOD = re.compile(r"\.(?!\d)")
_BETWEEN_WORDS = re.compile(r"[;!?()\[\]{}<>\"`*_]|,(?!\d)|(?<!\d),|(?<=[^\W\d])[-/]|[-/](?=[^\W\d])")
_ENDS = " \t.,;:!?\"'`*()[]"
# "a b" and "a and c" are letters of options.
_ARTICLE = re.compile(r"(?<!\S)(?:an|the|a(?!(?: (?:and|or|&))? [b-h](?!\S))) (?=\S)")
_NUMBER = re.compile(r"-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)")

_UNITS, _TEENS, _TENS, _ORDINALS = (
    line.split()
    for line in (
        "zero one two three four five six seven eight nine",
        "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen",
        "twenty thirty forty fifty sixty seventy eighty ninety",
        "first second third fourth fifth sixth seventh eighth ninth",
    )
)
_WORDS = {word: number for number, word in enumerate(_UNITS + _TEENS)} | {"none": 0}
_NUMBER_WORDS = re.compile(
    rf"(?<!\S)(?:({'|'.join(_TENS)})(?: ({'|'.join(_UNITS[1:])}))?(?! (?:{'|'.join(_ORDINALS)})(?!\S))"
    rf"|({'|'.join(_WORDS)}))(?!\S)"
)


def canonical(text: str) -> str:
    """The form under which equal answers are equal: `A dog.` is `dog`, `Twenty-one` is `21`, `3.0` is `3`.

    Lower case; one space; articles and punctuation go, except in numbers (`1,000` is `1000`, `-3.50` is `-3.5`)
    and where an article is all there is or may be a letter (`A.` is `a`, `A, B` is `a b`). Number words up to
    ninety-nine become digits, ordinals do not. `B. a dog` is `b`: an option is a letter in brackets, or one of the
    first eight with a full stop or a colon. It is idempotent.

    An empty string means that there is no answer: nothing was written but punctuation.
    """
    plain = text
    while (simpler := _simplify(plain)) != plain:  # what is taken away may uncover an article or an option
        plain = simpler
    return plain


def _simplify(text: str) -> str:
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().translate(_TYPOGRAPHIC).split())
    if option := _OPTION.match(plain):
        return option[1] or option[2]
    plain = _PERIOD.sub("", _APOSTROPHE.sub("", plain))
    plain = " ".join(_BETWEEN_WORDS.sub(" ", plain).split()).rstrip(_ENDS).lstrip(_ENDS.replace(".", ""))
    plain = _NUMBER_WORDS.sub(_in_digits, _ARTICLE.sub("", plain))
    return " ".join(_plain_number(word) if _NUMBER.fullmatch(word) else word for word in plain.split())


def _in_digits(found: re.Match[str]) -> str:
    tens, unit, word = found.groups()
    if word:
        return str(_WORDS[word])
    return str(10 * (_TENS.index(tens) + 2) + (_WORDS[unit] if unit else 0))


def _plain_number(text: str) -> str:
    """Without needless zeros, digit by digit: rounding would make different answers equal."""
    whole, _, part = text.replace(",", "").lstrip("-").partition(".")
    size = ".".join(filter(None, (whole.lstrip("0") or "0", part.rstrip("0"))))
    return f"-{size}" if text.startswith("-") and size != "0" else size
