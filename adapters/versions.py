"""What a version of an adapter is, how it is named, and what a store may refuse about one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from torch import Tensor
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from servetune.adapters.conduct import Conduct

Origin = Literal["base", "worker", "snapshot", "reset", "import"]


class StoreError(Exception):
    """Base of what the store refuses; `code` is stable."""

    code = "store_error"


class UnknownVersion(StoreError):
    """No version or alias has that name."""

    code = "adapter_not_found"


class CorruptVersion(StoreError):
    """A file is missing, its SHA-256 is not the manifest's, or it does not read as what it should be."""

    code = "adapter_corrupt"


class RetiredVersion(StoreError):
    """Retention deleted the weights of a version; its manifest is there."""

    code = "version_retired"


class UnfitAdapter(StoreError):
    """What came to be imported is damaged, no plain adapter, or none for this model."""

    code = "adapter_unfit"


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


class ForeignVersion(ForeignStore):
    """A version was made for the base, or the shape of adapter, that its line had before."""


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

    @property
    def fit(self) -> tuple[str, int, str]:
        """What a version must share with version 0 to be served: the base model and the shape of the adapter."""
        return self.base_digest, self.rank, self.target_modules


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


@with_config(ConfigDict(extra="allow"))  # a newer servetune may have written more, and it must stay
class Aliases(TypedDict):
    """The file of the aliases."""

    aliases: dict[str, int]
    generation: int
    promoted: NotRequired[list[int]]
    newest: NotRequired[int]
    dropped: NotRequired[list[int]]
    pinned: NotRequired[list[int]]
    retired: NotRequired[list[int]]
    nominated: NotRequired[list[int]]


class ErasedIds(TypedDict):
    """The file of the erased queries: how many, the latest of them, and digests of what had learned from any."""

    count: int
    ids: list[str]
    digests: NotRequired[list[str]]


T = TypeVar("T")
_CONDUCT = TypeAdapter(Conduct)
_MANIFEST, _ALIASES, _ERASED = TypeAdapter(Manifest), TypeAdapter(Aliases), TypeAdapter(ErasedIds)


def read_manifest(data: bytes, version: int) -> Manifest:
    """The manifest of a version; what it does not know is left out. Raises CorruptVersion."""
    made = _read(_MANIFEST, data, f"{version_name(version)}: the manifest")
    parents = range(version) if version else (None,)  # nothing can come from itself, or from what came later
    if made.version != version or made.parent not in parents:
        raise CorruptVersion(f"{version_name(version)}: the manifest is of another version")
    return made


def read_foreign_manifest(data: bytes) -> Manifest:
    """The manifest of a version that another store exported. Raises CorruptVersion."""
    return _read(_MANIFEST, data, "the manifest")


def read_aliases(data: bytes) -> Aliases:
    """Where aliases point. Raises CorruptVersion."""
    content = _read(_ALIASES, data, "the file of the aliases")
    if not {"live", "last-good"} <= content["aliases"].keys() or min(content["aliases"].values()) < 0:
        raise CorruptVersion("the file of the aliases lacks one, or names what cannot be a version")
    return content


def read_erased(data: bytes) -> ErasedIds:
    """Which queries were erased. Raises CorruptVersion."""
    return _read(_ERASED, data, "the file of the erased queries")


def read_conduct(data: bytes) -> Conduct:
    """What an operator chose for an adapter. Raises CorruptVersion."""
    return _read(_CONDUCT, data, "the file of the adapter's settings")


def _read(kind: TypeAdapter[T], data: bytes, name: str) -> T:
    try:
        return kind.validate_json(data)
    except ValidationError:
        raise CorruptVersion(f"{name} does not read") from None


def version_name(number: int) -> str:
    """7 -> `v0007`."""
    return f"v{number:04d}"
