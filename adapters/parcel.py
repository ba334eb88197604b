"""An adapter that comes from elsewhere: a tar of a PEFT directory, read in memory and believed in nothing.

safetensors and JSON alone. Nothing is unpacked to disk, no name in the archive is used as a path, and what does
not fit this model is refused in words that say what to do.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load as parse_safetensors
from torch import Tensor
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from servetune.adapters.types import BASE
from servetune.adapters.versions import (
    CorruptVersion,
    Draft,
    Manifest,
    UnfitAdapter,
    read_foreign_manifest,
    version_name,
)

WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "manifest.json"
LINEAGE = "lineage.json"
KNOWN = frozenset({WEIGHTS, CONFIG, MANIFEST, f"{MANIFEST}.sha256", LINEAGE})
MOST_CONFIG, MOST_JSON = 2_000_000, 64_000_000  # bytes; a manifest and a lineage may name a million queries
MOST_FILES = 8
_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "use_dora": (None, False),
    "use_rslora": (None, False),
    "use_qalora": (None, False),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
}
"""What a configuration may say where it is plain LoRA, which is all that answers are computed with."""


class _Lineage(TypedDict):
    """The file that says what weights with this SHA-256 learned from, by themselves or by what they came from."""

    weights: str
    query_ids: list[str]


_LINEAGE = TypeAdapter(_Lineage)


@dataclass(frozen=True, slots=True)
class Parcel:
    """What a tar holds. `manifest`: of the version it was exported from, None for an adapter of plain PEFT.

    `source` is the SHA-256 of its weights file; `query_ids` is what the version learned from, by itself or by
    what it came from.
    """

    weights: dict[str, Tensor]
    config: dict[str, Any]
    manifest: Manifest | None
    source: str
    query_ids: tuple[str, ...] = ()

    def check(self, base: Manifest, config: Mapping[str, Any], zero: Mapping[str, Tensor]) -> None:
        """Whether it is an adapter for the model whose version 0 has this manifest, configuration and weights.

        Raises UnfitAdapter.
        """
        if self.manifest is not None and self.manifest.base_digest != base.base_digest:
            raise UnfitAdapter(
                "it was made for another base model: import it where that is served, or train one for this model"
            )
        if odd := sorted(name for name, plain in PLAIN.items() if self.config.get(name) not in plain):
            raise UnfitAdapter(
                f"it is no plain LoRA ({', '.join(odd)} in {CONFIG}): train it without these options"
            )
        for name, setting in (("r", "lora_rank"), ("lora_alpha", "lora_alpha")):
            if self.config.get(name) != config[name]:
                raise UnfitAdapter(
                    f"{name} in {CONFIG} is not {config[name]}: train it so, or use a home whose {setting} fits"
                )
        shapes = {key: value.shape for key, value in self.weights.items()}
        if shapes != {key: value.shape for key, value in zero.items()}:
            num = len(zero.keys() ^ self.weights.keys()) or "some"
            raise UnfitAdapter(
                f"{num} of its tensors do not fit the layers that are adapted here: take target_modules from an "
                "export of this adapter, or a home whose lora_targets fit"
            )
        if not all(value.is_floating_point() and torch.isfinite(value).all() for value in self.weights.values()):
            raise UnfitAdapter("its weights are not finite numbers: the training diverged, or the file is damaged")

    def draft(self, probe: tuple[float, ...]) -> Draft:
        """The version to be, which answers its probe so. What it says of its gate is not taken over."""
        made = self.manifest
        metadata = {"source": f"sha256:{self.source}"}
        if made is not None:
            metadata["source_version"] = version_name(made.version)
        return Draft(
            weights=self.weights,
            origin="import",
            parent=BASE,
            probe=probe,
            temperature=1.0 if made is None else made.temperature,
            query_ids=self.query_ids,  # so that erasing them finds it
            metadata=metadata,
        )


def unpack(archive: bytes) -> Parcel:
    """Read a tar of a PEFT directory, with or without a folder around its files. Raises UnfitAdapter."""
    files = _files(archive)
    if missing := sorted({WEIGHTS, CONFIG} - files.keys()):
        raise UnfitAdapter(f"the archive lacks {' and '.join(missing)}: pack the directory that PEFT saved")
    source = hashlib.sha256(files[WEIGHTS]).hexdigest()
    manifest: Manifest | None = None
    query_ids: tuple[str, ...] = ()
    if MANIFEST in files:
        try:
            manifest = read_foreign_manifest(files[MANIFEST])
        except CorruptVersion:
            raise UnfitAdapter(f"{MANIFEST} does not read: export it again, or leave it out") from None
        if manifest.files.get(WEIGHTS) != source:
            raise UnfitAdapter(f"{WEIGHTS} is not what {MANIFEST} says: export it again")
        query_ids = read_lineage(files.get(LINEAGE, b""), source)
    return Parcel(_tensors(files[WEIGHTS]), _object(files[CONFIG]), manifest, source, query_ids)


def dump_lineage(source: str, query_ids: Sequence[str]) -> bytes:
    """What weights with this SHA-256 learned from, as it travels with an export."""
    return json.dumps({"weights": source, "query_ids": list(query_ids)}).encode()


def read_lineage(data: bytes, source: str) -> tuple[str, ...]:
    """What the weights with this SHA-256 learned from. Raises UnfitAdapter."""
    try:
        told = _LINEAGE.validate_json(data)
    except ValidationError:
        told = None
    if told is None or told["weights"] != source:
        raise UnfitAdapter(
            f"it does not say what it learned from ({LINEAGE}), so that could not be erased: export it again"
        )
    return tuple(told["query_ids"])


def _files(archive: bytes) -> dict[str, bytes]:
    """Files by their names. Only headers are left to the library: its walk follows whatever an archive says."""
    found: dict[str, bytes] = {}
    position, blocks = 0, tarfile.BLOCKSIZE
    while any(header := archive[position : position + blocks]):
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        except (tarfile.TarError, ValueError):
            raise UnfitAdapter("the archive is damaged or no tar") from None
        position += blocks
        parts = PurePosixPath(info.name).parts
        if info.isdir() and info.size == 0 and len(parts) <= 1:
            continue
        name = parts[-1] if 1 <= len(parts) <= 2 and all(map(_PART.fullmatch, parts)) else ""
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or name not in KNOWN or name in found:
            raise UnfitAdapter(
                f"the archive holds more than the plain files {', '.join(sorted(KNOWN))}: pack these alone, "
                "with tar --format=ustar"
            )
        most = {WEIGHTS: len(archive), CONFIG: MOST_CONFIG}.get(name, MOST_JSON)
        if not 0 <= info.size <= min(most, len(archive) - position) or len(found) >= MOST_FILES:
            raise UnfitAdapter("the archive is damaged, or a file in it is too large")
        found[name] = archive[position : position + info.size]
        position += -(-info.size // blocks) * blocks
    return found


def _tensors(data: bytes) -> dict[str, Tensor]:
    try:
        return dict(parse_safetensors(data))
    except Exception:  # the parser raises what it likes
        raise UnfitAdapter(f"{WEIGHTS} does not read as safetensors") from None


def _object(data: bytes) -> dict[str, Any]:
    try:
        read = json.loads(data)
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, dict):
        raise UnfitAdapter(f"{CONFIG} does not read as a JSON object")
    return read
