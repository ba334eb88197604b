"""What a version of an adapter is, how it is named, and what a store may refuse about one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

Origin = Literal["base", "worker", "snapshot", "reset"]


class StoreError(Exception):
    """Base of what the store refuses; `code` is stable."""

    code = "store_error"


class UnknownVersion(StoreError):
    """No version or alias has that name."""

    code = "adapter_not_found"


class CorruptVersion(StoreError):
    """A file is missing or its SHA-256 is not the manifest's."""

    code = "adapter_corrupt"


class StoreBusy(StoreError):
    """Another process holds a file for too long: it stands still, perhaps."""

    code = "store_busy"


class AliasMoved(StoreError):
    """`live` was moved by somebody else since it was read."""

    code = "alias_moved"


class NameTaken(StoreError):
    """The name is reserved, malformed or in use."""

    code = "name_taken"


class ErasedQuery(StoreError):
    """A version must not be published that learned from a query which was erased."""

    code = "query_erased"


class ForeignStore(StoreError):
    """The store's versions belong to another base model or another shape of adapter."""

    code = "adapter_incompatible"


@dataclass(frozen=True, slots=True)
class Alias:
    """Where `live` points, and how often it has been moved."""

    version: int
    generation: int


@dataclass(frozen=True, slots=True)
class Erasure:
    """Versions that are gone because of what they learned from, and where `live` points now."""

    dropped: tuple[int, ...]
    live: Alias


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a version is and where it came from. `digest` is the SHA-256 of its weights file."""

    version: int
    parent: int | None
    created: float
    origin: Origin
    digest: str
    base_digest: str
    rank: int
    target_modules: str
    probe: tuple[float, ...]
    temperature: float = 1.0  # divides log-probabilities before they are shown as confidence
    label: str | None = None
    generation: int = 0  # of `live`, when the version was made
    step_range: tuple[int, int] | None = None
    query_ids: tuple[str, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    gate: dict[str, Any] | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Draft:
    """A version before it is published: its content and its story."""

    weights: Mapping[str, Tensor]
    origin: Origin
    parent: int | None
    probe: tuple[float, ...]
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    temperature: float = 1.0
    label: str | None = None
    generation: int = 0
    step_range: tuple[int, int] | None = None
    query_ids: tuple[str, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    gate: dict[str, Any] | None = None
    metadata: dict[str, str] = field(default_factory=dict)


def version_name(number: int) -> str:
    """7 -> `v0007`."""
    return f"v{number:04d}"
