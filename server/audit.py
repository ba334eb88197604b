"""The audit trail: one JSON line per administrative act, each naming the hash of the line before.

The chain shows a changed, inserted or removed line; it cannot show that the newest lines were cut off, so copy
the trail elsewhere where that matters. Safe between threads and processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedRandom
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from servetune.adapters.store import lock
from servetune.clients.types import AuditEntry

_START = "0" * 64
_BLOCK = 8192


class AuditLog:
    """An append-only JSONL file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(
        self, event: str, actor: str, request_id: str | None = None, details: dict[str, Any] | None = None
    ) -> AuditEntry:
        """Write one act; it is on disk when this returns. Blocks (fsync): call it in a thread.

        Raises StoreBusy where another process holds the file.
        """
        with self._locked() as file:
            fields = {
                "timestamp": time.time(),
                "event": event,
                "actor": actor,
                "request_id": request_id,
                "details": details or {},
                "prev": _digest(_last_line(file)),
            }
            entry = AuditEntry.model_validate(fields)
            file.write(json.dumps(entry.model_dump()).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return entry

    def page(self, cursor: int | None = None, limit: int = 50) -> tuple[list[AuditEntry], int | None]:
        """Acts, newest first, from before line `cursor` on; the second value continues, None at the end.

        A damaged line is passed over: it must not hide the others, and `first_broken` names it.
        """
        lines = self._lines()
        end = len(lines) if cursor is None else max(0, min(cursor, len(lines)))
        start = max(0, end - limit)
        entries = filter(None, map(_entry, lines[start:end]))
        return list(entries)[::-1], start or None

    def first_broken(self) -> int | None:
        """Index of the first line that does not continue the chain; None when all do."""
        before = b""
        for number, line in enumerate(self._lines()):
            if _is_whole(line) and json.loads(line).get("prev") != _digest(before):
                return number
            before = line
        return None

    def _lines(self) -> list[bytes]:
        return self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []

    @contextmanager
    def _locked(self) -> Iterator[BufferedRandom]:
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(handle, "r+b") as file:
            lock(file)
            yield file


def _last_line(file: BufferedRandom) -> bytes:
    """The newest line, without its end; a line torn by a crash is closed first and stays in the chain."""
    position = file.seek(0, os.SEEK_END)
    tail = b""
    while position > 0 and b"\n" not in tail[:-1]:
        step = min(_BLOCK, position)
        position -= step
        file.seek(position)
        tail = file.read(step) + tail
    if tail and not tail.endswith(b"\n"):
        file.write(b"\n")
        tail += b"\n"
    return tail[:-1].rpartition(b"\n")[2]


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest() if line else _START


def _entry(line: bytes) -> AuditEntry | None:
    """None for a line that is no entry."""
    try:
        return AuditEntry.model_validate_json(line)
    except ValidationError:
        return None


def _is_whole(line: bytes) -> bool:
    """False for a line that a crash cut short."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
