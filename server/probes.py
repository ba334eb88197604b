"""Labelled probe sets of an adapter: queries with the operator's answers, for the gate's eyes alone.

A set is one file beside the adapter's versions, sealed as stored queries are, and never changed; the newest that
was not removed counts. A removed set is an empty file, so that no number is given twice.
"""

from __future__ import annotations

import base64
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from servetune.adapters.store import lock
from servetune.adapters.types import Probe
from servetune.server.cipher import Cipher, Unreadable, load_key
from servetune.server.settings import Settings

_NAME = re.compile(r"p([0-9]{4,9})\.json")


class UnknownProbes(Exception):
    """No probe set has that number."""


@dataclass(frozen=True, slots=True)
class ProbeSet:
    """A set that is there: its number, when it was made (seconds since 1970) and how many probes it has."""

    version: int
    created: float
    num_probes: int


class ProbeSets:
    """The sets of one adapter, in the folder of its versions; safe to share between processes."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self._store = folder
        self._folder = folder / "probes"
        self._settings = settings

    @cached_property
    def _cipher(self) -> Cipher:
        return Cipher(load_key(self._settings))

    def newest(self) -> int:
        """The number of the set that counts; 0 where there is none."""
        return max((number for number, path in self._files() if path.stat().st_size), default=0)

    def all(self) -> list[ProbeSet]:
        """The sets that are there, newest first."""
        return [self._look(number) for number, path in self._files()[::-1] if path.stat().st_size]

    def upload(self, probes: Sequence[Probe]) -> ProbeSet:
        """Keep a new set, which counts from now on."""
        self._folder.mkdir(exist_ok=True, mode=0o700)
        with (self._store / ".lock").open("w") as held:
            lock(held)
            version = max((number for number, _ in self._files()), default=0) + 1
            sealed = [self._seal(f"probe:{version}:{place}", probe) for place, probe in enumerate(probes)]
            self._write(version, json.dumps({"created": time.time(), "sealed": sealed}))
        return self._look(version)

    def remove(self, version: int) -> None:
        """Erase a set. Raises UnknownProbes."""
        self._look(version)
        self._write(version, "")

    def read(self, version: int) -> list[Probe]:
        """The probes of a set. Raises UnknownProbes, and Unreadable where this key does not open them."""
        try:
            sealed = json.loads(self._text(version))["sealed"]
            return [self._open(f"probe:{version}:{place}", each) for place, each in enumerate(sealed)]
        except (ValueError, KeyError, TypeError) as error:
            raise Unreadable(probes_name(version)) from error

    def _seal(self, id: str, probe: Probe) -> str:
        # Sealed as a query whose text is the question and the answer.
        text = json.dumps([probe.query.question, probe.answer])
        return base64.b64encode(self._cipher.seal(replace(probe.query, id=id, question=text))).decode()

    def _open(self, id: str, sealed: str) -> Probe:
        query = self._cipher.open(id, base64.b64decode(sealed))
        question, answer = json.loads(query.question)
        return Probe(replace(query, question=question), answer)

    def _look(self, version: int) -> ProbeSet:
        content = json.loads(self._text(version))
        return ProbeSet(version, content["created"], len(content["sealed"]))

    def _text(self, version: int) -> str:
        try:
            text = self._path(version).read_text()
        except FileNotFoundError:
            text = ""
        if not text:
            raise UnknownProbes(f"there is no probe set {probes_name(version)}")
        return text

    def _write(self, version: int, text: str) -> None:
        staging = self._folder / f".{probes_name(version)}.staging"
        with staging.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, self._path(version))

    def _path(self, version: int) -> Path:
        return self._folder / f"{probes_name(version)}.json"

    def _files(self) -> list[tuple[int, Path]]:
        found = ((_NAME.fullmatch(path.name), path) for path in self._folder.glob("p*.json"))
        return sorted((int(match[1]), path) for match, path in found if match)


def probes_name(version: int) -> str:
    """3 -> `p0003`."""
    return f"p{version:04d}"
