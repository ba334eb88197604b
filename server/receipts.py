"""The ids of answers: each says by itself which version gave it to whom, sealed with the buffer's key.

So nothing is kept of an answer for the sake of feedback that may come, also of answers to those who opted out.
"""

from __future__ import annotations

import base64
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass

from servetune.adapters.answers import canonical
from servetune.server.cipher import Cipher
from servetune.server.ids import made_at, new_id

_FORM = re.compile(r"(ans_[0-9A-HJKMNP-TV-Z]{26})([0-9A-V]{32})")
_VERSION, _ANSWER, _SEAL = 4, 4, 12  # bytes of each part
_LETTERS = 32  # of all three, five bits each


@dataclass(frozen=True, slots=True)
class Receipt:
    """Who answered. `created` is in seconds since 1970."""

    id: str
    adapter: str
    version: int
    created: float
    answer_mark: bytes


class Receipts:
    """Writes ids of answers and reads those that it wrote, on this server or one with the same key."""

    def __init__(self, cipher: Cipher) -> None:
        self._cipher = cipher

    def write(self, client: str, adapter: str, version: int, answer: str | None) -> str:
        """An id for an answer that a client was given."""
        name = new_id("ans")
        told = version.to_bytes(_VERSION, "big") + self._answer_mark(name, answer)
        return name + base64.b32hexencode(told + self._seal(name, client, adapter, told)).decode()

    def read(self, id: str, client: str, adapters: Iterable[str]) -> Receipt | None:
        """What an id says, if it was written for this client and one of these adapters; else None."""
        match = _FORM.fullmatch(id)
        if match is None:
            return None
        told, seal = _split(base64.b32hexdecode(match[2]), _VERSION + _ANSWER)
        for adapter in adapters:
            if hmac.compare_digest(self._seal(match[1], client, adapter, told), seal):
                version, answer_mark = _split(told, _VERSION)
                return Receipt(id, adapter, int.from_bytes(version, "big"), made_at(match[1]), answer_mark)
        return None

    def is_answer(self, receipt: Receipt, text: str) -> bool:
        """Whether a text is, in its canonical form, the answer that was given."""
        return self._answer_mark(receipt.id[:-_LETTERS], text) == receipt.answer_mark

    def _answer_mark(self, name: str, answer: str | None) -> bytes:
        return self._mark("answer", _ANSWER, name, canonical(answer or ""))

    def _seal(self, name: str, client: str, adapter: str, told: bytes) -> bytes:
        return self._mark("receipt", _SEAL, name, client, adapter, told.hex())

    def _mark(self, purpose: str, size: int, *parts: str) -> bytes:
        return bytes.fromhex(self._cipher.mark(purpose, *(part.encode() for part in parts)))[:size]


def _split(data: bytes, at: int) -> tuple[bytes, bytes]:
    return data[:at], data[at:]
