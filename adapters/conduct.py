"""How an adapter behaves: whether it learns, and who is answered by what it learned. Kept beside its versions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["off", "observe", "canary", "live"]


@dataclass(frozen=True, slots=True)
class Conduct:
    """What an operator chose for one adapter.

    `mode`: with `off` nothing is kept or learned, and `live` goes on answering; with `observe` it learns, and what
    the gate accepts becomes the alias `candidate` instead of `live`; `canary` is the same, and `canary_share` of
    the requests for `live` are answered by `candidate`; with `live`, what the gate accepts becomes live. `labels`:
    to choose from, for recognition that names none.
    """

    mode: Mode = "live"
    canary_share: float = 0.1
    labels: tuple[str, ...] = ()

    @property
    def learns(self) -> bool:
        """Are queries kept, and learned from?"""
        return self.mode != "off"

    @property
    def nominates(self) -> bool:
        """Does what the gate accepts wait as `candidate` until somebody promotes it?"""
        return self.mode in ("observe", "canary")
