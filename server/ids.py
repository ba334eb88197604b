"""Identifiers: a prefix that says what is named, then a ULID, so that they sort by time."""

from __future__ import annotations

import secrets
import time
from typing import Literal

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford's base 32  # pragma: allowlist secret
_RANDOM_BITS = 80


def new_id(prefix: Literal["ans", "q", "req"]) -> str:
    """For example `ans_01K9XV5D3QZ8…`: 48 bits of milliseconds, then 80 random bits."""
    number = (time.time_ns() // 1_000_000 << _RANDOM_BITS) | secrets.randbits(_RANDOM_BITS)
    return f"{prefix}_" + "".join(_ALPHABET[(number >> shift) & 31] for shift in range(125, -1, -5))


def made_at(id: str) -> float:
    """When an id was made, in seconds since 1970."""
    number = 0
    for letter in id.partition("_")[2]:
        number = number << 5 | _ALPHABET.index(letter)
    return (number >> _RANDOM_BITS) / 1000
