"""The canonical form of an answer, so that votes can be counted."""

from __future__ import annotations

import re
import unicodedata

_OPTION = re.compile(r"\(?(?:([a-z])\)|([a-h])[.:])(?:\s|$)")
_ARTICLE = re.compile(r"^(a|an|the)\s+(?=\S)")
_NUMBER = re.compile(r"-?\d+(,\d{3})*(\.\d+)?")


def canonical(text: str) -> str:
    """Lower case, one space, no article, no closing punctuation; `B. a dog` is `b`, `3.0` is `3`.

    An option is a letter in brackets, or one of the first eight with a full stop or a colon: `T. rex` is none.

    An empty string means that there is no answer.
    """
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    if option := _OPTION.match(plain):
        return option[1] or option[2]
    plain = _ARTICLE.sub("", plain.strip(" \t.,;:!?\"'`*()[]"))
    if _NUMBER.fullmatch(plain):
        return _plain_number(plain.replace(",", ""))
    return plain


def _plain_number(text: str) -> str:
    """Without needless zeros, digit by digit: rounding would make different answers equal."""
    whole, _, part = text.lstrip("-").partition(".")
    size = ".".join(filter(None, (whole.lstrip("0") or "0", part.rstrip("0"))))
    return f"-{size}" if text.startswith("-") and size != "0" else size
