"""The canonical form of an answer, so that votes can be counted."""

from __future__ import annotations

import re
import unicodedata

_OPTION = re.compile(r"\(?([a-z])[).:](\s|$)")
_ARTICLE = re.compile(r"^(a|an|the)\s+(?=\S)")
_NUMBER = re.compile(r"-?\d+(,\d{3})*(\.\d+)?")


def canonical(text: str) -> str:
    """Lower case, one space, no article, no closing punctuation; `B. a dog` is `b`, `3.0` is `3`.

    An empty string means that there is no answer.
    """
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    if option := _OPTION.match(plain):
        return option[1]
    plain = _ARTICLE.sub("", plain.strip(" \t.,;:!?\"'`*()[]"))
    if _NUMBER.fullmatch(plain):
        return f"{float(plain.replace(',', '')):g}"
    return plain
