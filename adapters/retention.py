"""Whose weights may go: which versions nobody would miss, and a hold on those that somebody uses.

What retention takes are weights and optimizer states. Manifests stay, so that what was ever learned from what, and
why it was served, can be read for good.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from servetune.adapters.versions import Manifest

FIGURE = "witness_base"
"""Of the gate, what says which version is better: nats by which it comes nearer than the base to votes on queries
that it was not taught."""


def superfluous(versions: Sequence[Manifest], safe: Collection[int | None], recent: int, best: int) -> list[int]:
    """Numbers of the versions whose weights may be deleted, ascending.

    Args:
        versions: those that have weights, oldest first. safe: numbers that stay whatever else is said.
        recent: so many of the newest stay; 0 keeps all. best: so many of the best stay, by the gate's FIGURE; a
            version without that figure is none of the best.
    """
    if not recent:
        return []
    rated = [made for made in versions if FIGURE in _figures(made)]
    rated.sort(key=lambda made: (_figures(made)[FIGURE], made.version), reverse=True)
    kept = {*safe, *(made.version for made in versions[-recent:]), *(made.version for made in rated[:best])}
    return [made.version for made in versions if made.version not in kept]


def _figures(made: Manifest) -> dict[str, float]:
    figures: dict[str, float] = (made.gate or {}).get("metrics", {})
    return figures


class Hold:
    """A version's file is in use as long as this is referred to, by any process of the machine.

    Raises BlockingIOError where `alone` and somebody else holds it, or somebody holds it alone.
    """

    def __init__(self, path: Path, alone: bool = False) -> None:
        self._handle: int | None = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(self._handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise

    def close(self) -> None:
        """Let go."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __del__(self) -> None:
        # Not by hand: who answers with a version lets go of it when the last answer is given.
        if getattr(self, "_handle", None) is not None:
            self.close()
