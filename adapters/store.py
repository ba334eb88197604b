"""Versions on disk: immutable PEFT directories with a manifest, and aliases that move over them.

`<root>/<adapter>/v0007/` holds `adapter_model.safetensors`, `adapter_config.json` and `manifest.json`, which has
the SHA-256 of the others; its own is in `manifest.json.sha256`, as `sha256sum -c` reads it. A version is written
to a staging folder, synced and renamed, so that it is there completely or not at all. Aliases are one small file,
replaced atomically; `live` carries a generation that only grows, and whoever moves it can say which generation
they looked at. A file lock orders the writers of all processes; readers need none. Retention deletes weights and
never a manifest; a version is on record as retired before the first of its files goes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tarfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as dump_safetensors
from torch import Tensor

from servetune.adapters.conduct import Conduct
from servetune.adapters.parcel import LINEAGE, Parcel, dump_lineage
from servetune.adapters.retention import Hold, superfluous
from servetune.adapters.types import BASE
from servetune.adapters.versions import (
    Alias,
    Aliases,
    AliasMoved,
    CorruptVersion,
    Draft,
    ErasedIds,
    ErasedQuery,
    Erasure,
    ForeignStore,
    ForeignVersion,
    Manifest,
    NameTaken,
    Origin,
    RetiredVersion,
    StoreBusy,
    UnknownVersion,
    read_aliases,
    read_conduct,
    read_erased,
    read_manifest,
    version_name,
)

WEIGHTS, CONFIG, OPTIMIZER, MANIFEST = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.safetensors",
    "manifest.json",
)
MANIFEST_DIGEST = f"{MANIFEST}.sha256"
LOCK_S, LOCK_POLL_S = 5.0, 0.01  # a process that was stopped while it wrote would be waited for without an end
ERASED_KEPT = 100_000  # ids, for workers that have not heard of them
RESERVED = frozenset({"base", "latest", "live", "candidate", "last-good"})
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION = re.compile(r"v([0-9]{4,9})")


class AdapterStore:
    """One adapter's versions and aliases below `root`; safe to share between processes."""

    def __init__(self, root: Path, adapter: str = "default") -> None:
        if not _NAME.fullmatch(adapter):
            raise NameTaken(f"{adapter!r} is not an adapter name: use lower-case letters, digits, - _ .")
        self.name = adapter
        self.folder = root / adapter
        self._aliases = self.folder / "aliases.json"
        self._pause_mark = self.folder / "learning.paused"
        self._erased = self.folder / "erased.json"
        self._conduct = self.folder / "conduct.json"

    # --- reading -------------------------------------------------------------------------------------

    def versions(self) -> list[int]:
        """Numbers of all versions, ascending; 0 is the base."""
        found = (_VERSION.fullmatch(path.name) for path in self.folder.glob("v*"))
        return sorted(int(match[1]) for match in found if match)

    def manifest(self, version: int) -> Manifest:
        """Raises UnknownVersion, or CorruptVersion where the manifest is not what was written."""
        path = self._path(version) / MANIFEST
        try:
            written = path.read_bytes()
        except FileNotFoundError:
            raise UnknownVersion(f"{self.name} has no version {version_name(version)}") from None
        try:
            expected = path.with_name(MANIFEST_DIGEST).read_bytes()
        except FileNotFoundError:
            raise CorruptVersion(f"{version_name(version)}: {MANIFEST_DIGEST} is missing") from None
        if expected != _digest_line(written):
            raise CorruptVersion(f"{version_name(version)}: {MANIFEST} does not match its SHA-256")
        return read_manifest(written, version)

    def weights(self, version: int) -> dict[str, Tensor]:
        """The weights of a version, verified with its configuration.

        Raises:
            UnknownVersion, CorruptVersion: it is not there, or not what was written.
            ForeignVersion: it was made for a base that the adapter had before.
            RetiredVersion: retention deleted them.
        """
        self._expect_fit(version)
        self._verified(version, CONFIG)
        return self._tensors(version, WEIGHTS)

    def optimizer(self, version: int) -> dict[str, Tensor]:
        """The optimizer state kept with a version, empty where none was. Raises CorruptVersion."""
        if OPTIMIZER not in self.manifest(version).files:
            return {}
        return self._tensors(version, OPTIMIZER)

    def aliases(self) -> dict[str, int]:
        """Where every alias points; `base` is always version 0. Raises CorruptVersion."""
        return {**self._read_aliases()["aliases"], "base": BASE}

    def live(self) -> Alias:
        """The version that should be served. Raises CorruptVersion, and UnknownVersion before `initialise`."""
        content = self._read_aliases()
        if "live" not in content["aliases"]:
            raise UnknownVersion(f"{self.name} has not been initialised")
        return Alias(content["aliases"]["live"], content["generation"])

    def head(self) -> Alias:
        """The version that learning goes on from: `candidate`, where the mode has one wait, else `live`.

        The generation is that of `live`. Raises as `live` does.
        """
        live, candidate = self.live(), self._read_aliases()["aliases"].get("candidate")
        if candidate is None or not self.conduct().nominates:
            return live
        return Alias(candidate, live.generation)

    def conduct(self) -> Conduct:
        """How the operator wants the adapter to behave. Raises CorruptVersion."""
        try:
            return read_conduct(self._conduct.read_bytes())
        except FileNotFoundError:
            return Conduct()

    def resolve(self, choice: str) -> int:
        """A version number for `live`, an alias, `base`, `latest` or `v0007`. Raises UnknownVersion."""
        if match := _VERSION.fullmatch(choice):
            number = int(match[1])
            if number in self.versions():
                return number
        elif choice == "latest":
            return self.versions()[-1]
        elif choice in (aliases := self.aliases()):
            return aliases[choice]
        raise UnknownVersion(f"{self.name} has no version or alias {choice!r}")

    def learned_from(self, query_ids: set[str]) -> set[str]:
        """Those of the given queries that an accepted version names: they must not train again."""
        found: set[str] = set()
        for version in self.accepted() if query_ids else ():
            found |= query_ids.intersection(self.manifest(version).query_ids)
        return found

    def promoted(self) -> list[int]:
        """Versions that were live at some time, in the order of their first time."""
        return list(self._read_aliases().get("promoted", ()))

    def accepted(self) -> list[int]:
        """Versions that were live or the candidate at some time."""
        return list(dict.fromkeys([*self.promoted(), *self._read_aliases().get("nominated", ())]))

    def erased(self) -> tuple[int, list[str]]:
        """How many queries were erased so far, and which; of very many, the latest. Raises CorruptVersion."""
        content = self._read_erased()
        return content["count"], content["ids"]

    def pinned(self) -> list[int]:
        """Versions whose weights the operator keeps, ascending. Raises CorruptVersion."""
        return sorted(self._read_aliases().get("pinned", ()))

    def retired(self) -> list[int]:
        """Versions whose weights retention deleted, ascending. Raises CorruptVersion."""
        return sorted(self._read_aliases().get("retired", ()))

    def hold(self, version: int) -> Hold:
        """Keep retention from the weights of a version while they are in use.

        Raises UnknownVersion, RetiredVersion, CorruptVersion.
        """
        self._refuse_retired(version)
        try:
            return Hold(self._path(version) / WEIGHTS)
        except BlockingIOError:
            raise _retired(version) from None
        except FileNotFoundError:
            self.manifest(version)
            raise CorruptVersion(f"{version_name(version)}: {WEIGHTS} is missing") from None

    @property
    def paused(self) -> bool:
        """Is learning switched off by the operator?"""
        return self._pause_mark.exists()

    def check(self, parcel: Parcel) -> None:
        """Whether what came from elsewhere is an adapter for this model. Raises UnfitAdapter, CorruptVersion."""
        config = json.loads(self._verified(BASE, CONFIG))
        parcel.check(self.manifest(BASE), config, self.weights(BASE))

    def fits(self, config: Mapping[str, Any], base_digest: str) -> bool:
        """Whether its versions are of this base model and shape. Raises UnknownVersion, CorruptVersion."""
        return self.manifest(BASE).fit == (base_digest, config["r"], config["target_modules"])

    # --- writing -------------------------------------------------------------------------------------

    def initialise(
        self, zero: Mapping[str, Tensor], config: dict[str, Any], base_digest: str, probe: tuple[float, ...]
    ) -> None:
        """Make version 0, the zero adapter, or check that the store belongs to this base and shape.

        Raises:
            ForeignStore: the store was made for another base model, rank or set of layers.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._lock():
            for leftover in self.folder.glob(".staging-*"):
                shutil.rmtree(leftover)
            self._remove(self._read_aliases().get("dropped", ()))  # where a crash came between
            self._strip(self._read_aliases().get("retired", ()))
            if BASE not in self.versions():
                draft = Draft(weights=zero, origin="base", parent=None, probe=probe)
                self._write(BASE, draft, config, base_digest)
                if not self._read_aliases()["aliases"]:  # there are some where `rebase` was cut short
                    self._write_aliases(
                        {"aliases": {"live": BASE, "last-good": BASE}, "generation": 1, "promoted": [BASE]}
                    )
        if not self.fits(config, base_digest):
            raise ForeignStore(
                f"adapter {self.name!r} in {self.folder} was made for another base model or adapter shape: "
                f"`servetune adapters rebase {self.name}` begins it again on this one and keeps its versions "
                "listed; or choose another --adapter name, or another home"
            )

    def rebase(
        self, zero: Mapping[str, Tensor], config: dict[str, Any], base_digest: str, probe: tuple[float, ...]
    ) -> Manifest | None:
        """Begin again on another base or shape: its zero adapter becomes version 0 and, as a new version, live.

        What was learned on the base before stays as it is and can be exported, but not served. Cut short at any
        point, it is to be called again.

        Returns:
            the new version, None where the adapter is of this base already.
        """
        with self._lock():
            if self.fits(config, base_digest):
                return None
            was = self.manifest(BASE).base_digest
            draft = Draft(
                weights=zero,
                origin="reset",
                parent=BASE,
                probe=probe,
                generation=self.live().generation,
                metadata={"base_before": was},
            )
            made = self._write(self._newest() + 1, draft, config, base_digest)
            self._move_live(made.version, None, last_good=made.version)
            self._remove([BASE])
            self._write(BASE, Draft(weights=zero, origin="base", parent=None, probe=probe), config, base_digest)
            return made

    def publish(self, draft: Draft) -> Manifest:
        """Write a new immutable version; no alias moves.

        Raises:
            ErasedQuery: it learned from a query that was erased, by itself or by what it came from.
        """
        with self._lock():
            self._expect_nothing_erased(draft)
            return self._publish(draft)

    def promote(self, version: int, expected_generation: int | None = None) -> Alias:
        """Move `live`; the version it left becomes `last-good`.

        Raises:
            UnknownVersion, CorruptVersion: nothing servable is there.
            ForeignVersion: it was made for a base that the adapter had before.
            AliasMoved: `live` is no longer at `expected_generation`.
        """
        with self._lock():
            self._expect_fit(version)
            self._verified(version, WEIGHTS)
            return self._move_live(version, expected_generation)

    def accept(self, version: int, head: Alias) -> Alias:
        """Let learning go on from a version that it made from `head`.

        Where the mode has it wait for the operator it becomes `candidate`, until `live` moves; else it is live.

        Returns:
            the new head.

        Raises:
            AliasMoved: `head` is no longer the head, by an operator's act or another mode; or learning is off.
            UnknownVersion, CorruptVersion, ForeignVersion: as `promote`.
        """
        with self._lock():
            return self._accept(version, head)

    def restart(self, head: Alias) -> Manifest:
        """Let learning begin again: publish the zero adapter and accept it. Raises as `accept` does."""
        with self._lock():
            self._expect_head(head)
            made = self._copy(BASE, "reset", None, {})
            self._accept(made.version, head)
            return made

    def dismiss(self, version: int) -> None:
        """End the alias `candidate` where it names this version."""
        with self._lock():
            content = self._read_aliases()
            if content["aliases"].get("candidate") == version:
                del content["aliases"]["candidate"]
                self._write_aliases(content)

    def change(self, **changes: Any) -> Conduct:
        """Change how the adapter behaves; what is not named stays. Raises CorruptVersion."""
        with self._lock():
            made = replace(self.conduct(), **changes)
            _replace(self._conduct, json.dumps(asdict(made)))
            return made

    def rollback(self, to: int | None = None, expected_generation: int | None = None) -> Alias:
        """Move `live` back to an existing version, by default to `last-good`, which that version then is.

        Raises:
            UnknownVersion, CorruptVersion, ForeignVersion, AliasMoved: as `promote`.
        """
        with self._lock():
            target = self.aliases()["last-good"] if to is None else to
            self._expect_fit(target)
            self._verified(target, WEIGHTS)
            return self._move_live(target, expected_generation, last_good=target)

    def snapshot(self, label: str, metadata: dict[str, str] | None = None) -> Manifest:
        """Keep the live weights as a labelled version, with an alias of that label.

        Raises:
            NameTaken: the label is reserved or already names a version.
        """
        with self._lock():
            if label in RESERVED or _VERSION.fullmatch(label) or not _NAME.fullmatch(label):
                raise NameTaken(f"{label!r} is reserved or not a lower-case name: choose another label")
            if label in self.aliases():
                raise NameTaken(f"{label!r} already names {version_name(self.aliases()[label])}")
            made = self._copy(self.live().version, "snapshot", label, metadata or {})
            content = self._read_aliases()
            content["aliases"][label] = made.version
            self._write_aliases(content)
            return made

    def reset(self, to: int = BASE, expected_generation: int | None = None) -> Manifest:
        """Publish the weights of `to` (default: the zero adapter) as a new version and make it live.

        Raises:
            UnknownVersion, CorruptVersion, ForeignVersion, AliasMoved: as `promote`.
        """
        with self._lock():
            self._expect(expected_generation)
            made = self._copy(to, "reset", None, {})
            self._move_live(made.version, None)
            return made

    def erase(self, query_ids: Collection[str]) -> Erasure:
        """Drop the versions that learned from some queries, and all that came from them.

        `live` and `last-good` go back to the nearest version on their way that stays; other aliases of what is
        dropped end. Numbers are not given again.
        """
        with self._lock():
            dropped = self._taught_by(set(query_ids))
            content = self._read_aliases()
            aliases, before = content["aliases"], content["aliases"]["live"]
            for alias, number in list(aliases.items()):
                if number in dropped and alias not in ("live", "last-good"):
                    del aliases[alias]
                elif number in dropped:
                    aliases[alias] = self._servable(number, dropped)
            content["generation"] += aliases["live"] != before
            content["promoted"] = [number for number in content["promoted"] if number not in dropped]
            content["pinned"] = [number for number in content.get("pinned", ()) if number not in dropped]
            content["retired"] = [number for number in content.get("retired", ()) if number not in dropped]
            content["nominated"] = [number for number in content.get("nominated", ()) if number not in dropped]
            content["newest"] = self._newest()
            content["dropped"] = [*content.get("dropped", ()), *dropped]
            self._note_erased(query_ids, dropped)
            self._write_aliases(content)
            self._remove(dropped)
            return Erasure(tuple(dropped), Alias(aliases["live"], content["generation"]))

    def pin(self, version: int) -> Alias:
        """Keep the weights of a version from retention until it is unpinned.

        Raises:
            UnknownVersion, CorruptVersion, RetiredVersion: there are no weights to keep.
        """
        return self._set_pinned(version, True)

    def unpin(self, version: int) -> Alias:
        """Leave the weights of a version to retention again. Raises UnknownVersion, CorruptVersion."""
        return self._set_pinned(version, False)

    def retain(self, recent: int, best: int) -> list[int]:
        """Delete the weights of versions that are neither recent nor among the best; gives their numbers.

        The base, what an alias names, what is pinned or held, what `live` came from and what is of a base before
        `rebase` stay. A crash between leaves a version that is refused, and whose files go at the next start.
        """
        with self._lock():
            content = self._read_aliases()
            retired, aliases = content.get("retired", []), content["aliases"]
            whole = list(filter(None, map(self._readable, (n for n in self.versions() if n not in retired))))
            fit = self.manifest(BASE).fit
            whole = [made for made in whole if made.fit == fit]  # those of another base are there to be exported
            heads = {aliases["live"], aliases.get("candidate")}
            came_from = {made.parent for made in whole if made.version in heads}
            safe = {BASE, *aliases.values(), *content.get("pinned", ()), *came_from}
            holds = {number: self._alone(number) for number in superfluous(whole, safe, recent, best)}
            gone = [number for number, hold in holds.items() if hold]
            if gone:
                content["retired"] = [*retired, *gone]
                self._write_aliases(content)
                self._strip(gone)
            for hold in filter(None, holds.values()):
                hold.close()
            return gone

    def num_learned(self) -> int:
        """Queries that the head has learned from here: its own and those of all that it goes back to."""
        return sum(len(made.query_ids) for made in self._line(self.head().version) if made.origin == "worker")

    def set_paused(self, paused: bool) -> None:
        """Switch learning off or on; kept on disk, so it outlives every process."""
        if paused:
            self._pause_mark.touch()
        else:
            self._pause_mark.unlink(missing_ok=True)
        _sync(self.folder)

    def export(self, version: int) -> Iterator[bytes]:
        """A tar of the version's PEFT directory, in pieces, with what it learned from.

        One that came from something damaged does not say so, and cannot be imported. Raises UnknownVersion,
        CorruptVersion, RetiredVersion.
        """
        made = self.manifest(version)
        content = {name: self._verified(version, name) for name in (WEIGHTS, CONFIG)}
        with suppress(CorruptVersion):
            learned = {query_id for each in self._line(version) for query_id in each.query_ids}
            content[LINEAGE] = dump_lineage(made.files[WEIGHTS], sorted(learned))
        content |= {name: (self._path(version) / name).read_bytes() for name in (MANIFEST, MANIFEST_DIGEST)}
        for name, data in content.items():
            info = tarfile.TarInfo(f"{version_name(version)}/{name}")
            info.size, info.mtime = len(data), int(made.created)
            yield info.tobuf() + data + bytes(-len(data) % tarfile.BLOCKSIZE)
        yield bytes(2 * tarfile.BLOCKSIZE)

    # --- inside --------------------------------------------------------------------------------------

    def _taught_by(self, query_ids: set[str]) -> dict[int, int]:
        """Versions that learned from queries, by themselves or by what they came from, with their parents.

        An import of weights that are among them is one of them, whatever it says of itself.
        """
        found: dict[int, int] = {}
        digests: set[str] = set()
        for version in self.versions():  # a parent is older than what comes from it
            try:
                made = self.manifest(version)
            except CorruptVersion:  # nobody knows what it learned from
                found[version] = BASE
                continue
            is_copy = made.origin == "import" and made.digest in digests
            learned = is_copy or made.parent in found or query_ids.intersection(made.query_ids)
            if made.parent is not None and learned:
                found[version] = made.parent
                digests.add(made.digest)
        return found

    def _line(self, version: int) -> Iterator[Manifest]:
        """A version and all that it came from, up to the base."""
        while (made := self.manifest(version)).parent is not None:
            yield made
            version = made.parent

    def _note_erased(self, query_ids: Collection[str], dropped: Collection[int]) -> None:
        """Remember what was erased, and the weights that learned from it: an export of them may come back."""
        known = self._read_erased()
        readable = filter(None, map(self._readable, dropped))
        erased: ErasedIds = {
            "count": known["count"] + len(query_ids),
            "ids": [*known["ids"], *query_ids][-ERASED_KEPT:],
            "digests": [*known.get("digests", ()), *(made.digest for made in readable)][-ERASED_KEPT:],
        }
        _replace(self._erased, json.dumps(erased))

    def _read_erased(self) -> ErasedIds:
        try:
            return read_erased(self._erased.read_bytes())
        except FileNotFoundError:
            return {"count": 0, "ids": []}

    def _expect_nothing_erased(self, draft: Draft) -> None:
        known = self._read_erased()
        if gone := set(known["ids"]).intersection(draft.query_ids):
            raise ErasedQuery(f"{len(gone)} of the queries it learned from were erased: learn again without them")
        if draft.parent not in (None, *self.versions()):
            raise ErasedQuery("what it came from learned from queries that were erased: learn again without them")
        if draft.origin == "import" and _digest(dump_weights(draft.weights)) in known.get("digests", ()):
            raise ErasedQuery("these weights learned from queries that were erased: learn again without them")

    def _set_pinned(self, version: int, wanted: bool) -> Alias:
        with self._lock():
            self.manifest(version)
            if wanted:
                self._verified(version, WEIGHTS)
            content = self._read_aliases()
            others = [number for number in content.get("pinned", ()) if number != version]
            content["pinned"] = [*others, version] if wanted else others
            self._write_aliases(content)
            return Alias(version, content["generation"])

    def _alone(self, version: int) -> Hold | None:
        """A hold that nobody else has; None where somebody has one, or there is nothing to hold."""
        try:
            return Hold(self._path(version) / WEIGHTS, alone=True)
        except (BlockingIOError, FileNotFoundError):
            return None

    def _strip(self, versions: Iterable[int]) -> None:
        """Delete weights and optimizer states; the optimizer's first, which is nothing by itself."""
        for version in versions:
            for name in (OPTIMIZER, WEIGHTS):
                (self._path(version) / name).unlink(missing_ok=True)
            if self._path(version).exists():
                _sync(self._path(version))

    def _refuse_retired(self, version: int) -> None:
        if version in self._read_aliases().get("retired", ()):
            raise _retired(version)

    def _servable(self, version: int, dropped: Mapping[int, int]) -> int:
        """The nearest version that a dropped one came from, that stays and is not damaged."""
        while version in dropped or (version != BASE and not self._is_whole(version)):
            version = dropped[version] if version in dropped else self._parent(version)
        return version

    def _is_whole(self, version: int) -> bool:
        try:
            self.weights(version)
        except (CorruptVersion, ForeignVersion, RetiredVersion):
            return False
        return True

    def _expect_fit(self, version: int) -> None:
        if self.manifest(version).fit != self.manifest(BASE).fit:
            raise ForeignVersion(
                f"{version_name(version)} was made for another base model or shape of adapter, which {self.name} "
                "had before: it can be looked at and exported, but not served. Learn again on the present one"
            )

    def _readable(self, version: int) -> Manifest | None:
        """A version's manifest; None where it is damaged."""
        try:
            return self.manifest(version)
        except CorruptVersion:
            return None

    def _parent(self, version: int) -> int:
        return self.manifest(version).parent or BASE

    def _newest(self) -> int:
        """The highest number that was ever given."""
        return max(self.versions()[-1], int(self._read_aliases().get("newest", BASE)))

    def _remove(self, versions: Iterable[int]) -> None:
        """Take versions away, each at once: no reader meets half of one."""
        for version in versions:
            path = self._path(version)
            if path.exists():
                shutil.rmtree(path.rename(self.folder / f".staging-erased-{path.name}"))
        _sync(self.folder)

    def _path(self, version: int) -> Path:
        return self.folder / version_name(version)

    def _verified(self, version: int, name: str) -> bytes:
        expected = self.manifest(version).files.get(name)
        if name in (WEIGHTS, OPTIMIZER):
            self._refuse_retired(version)
        try:
            content = (self._path(version) / name).read_bytes()
        except FileNotFoundError:
            raise CorruptVersion(f"{version_name(version)}: {name} is missing") from None
        if expected != hashlib.sha256(content).hexdigest():
            raise CorruptVersion(f"{version_name(version)}: {name} does not match its SHA-256")
        return content

    def _tensors(self, version: int, name: str) -> dict[str, Tensor]:
        content = self._verified(version, name)
        try:
            return dict(parse_safetensors(content))
        except Exception:  # the parser raises what it likes where a file is whole, but no safetensors file
            raise CorruptVersion(f"{version_name(version)}: {name} does not read") from None

    def _publish(self, draft: Draft) -> Manifest:
        base = self.manifest(BASE)
        config = json.loads(self._verified(BASE, CONFIG))
        return self._write(self._newest() + 1, draft, config, base.base_digest)

    def _copy(self, source: int, origin: Origin, label: str | None, metadata: dict[str, str]) -> Manifest:
        made = self.manifest(source)
        draft = Draft(
            weights=self.weights(source),
            optimizer=self.optimizer(source) if origin == "snapshot" else {},
            origin=origin,
            parent=source,
            probe=made.probe,
            temperature=made.temperature,
            label=label,
            metadata=metadata,
            generation=self.live().generation,
        )
        return self._publish(draft)

    def _write(self, version: int, draft: Draft, config: dict[str, Any], base_digest: str) -> Manifest:
        content = {WEIGHTS: dump_weights(draft.weights)}
        content[CONFIG] = json.dumps(config, indent=2, sort_keys=True).encode()
        if draft.optimizer:
            content[OPTIMIZER] = dump_safetensors(dict(draft.optimizer))
        files = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
        story = asdict(draft)
        for name in ("weights", "optimizer"):
            del story[name]
        manifest = Manifest(
            version=version,
            created=time.time(),
            digest=_digest(content[WEIGHTS]),
            base_digest=base_digest,
            rank=config["r"],
            target_modules=config["target_modules"],
            files=files,
            **story,
        )
        content[MANIFEST] = json.dumps(asdict(manifest), indent=1).encode()
        content[MANIFEST_DIGEST] = _digest_line(content[MANIFEST])
        self._place(version, content)
        return manifest

    def _place(self, version: int, content: dict[str, bytes]) -> None:
        staging = self.folder / f".staging-{version_name(version)}"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        for name, data in content.items():
            with (staging / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _sync(staging)
        staging.rename(self._path(version))
        _sync(self.folder)

    def _move_live(self, version: int, expected: int | None, last_good: int | None = None) -> Alias:
        self._expect(expected)
        content = self._read_aliases()
        before = content["aliases"]["live"]
        if last_good is not None or before != version:
            content["aliases"]["last-good"] = before if last_good is None else last_good
        content["aliases"]["live"] = version
        content["aliases"].pop("candidate", None)  # it was one for what is live no longer
        content["generation"] += 1
        if version not in content.setdefault("promoted", [BASE]):
            content["promoted"].append(version)
        self._write_aliases(content)
        return Alias(version, content["generation"])

    def _accept(self, version: int, head: Alias) -> Alias:
        self._expect_head(head)
        self._expect_fit(version)
        self._verified(version, WEIGHTS)
        return self._nominate(version) if self.conduct().nominates else self._move_live(version, None)

    def _nominate(self, version: int) -> Alias:
        content = self._read_aliases()
        content["aliases"]["candidate"] = version
        nominated = content.setdefault("nominated", [])
        if version not in nominated:
            nominated.append(version)
        self._write_aliases(content)
        return Alias(version, content["generation"])

    def _expect_head(self, head: Alias) -> None:
        if (found := self.head()) != head:
            raise AliasMoved(f"learning goes on from {found}, not from {head}")
        if self.paused or not self.conduct().learns:
            raise AliasMoved("nothing is to be learned now")

    def _expect(self, generation: int | None) -> None:
        found = self._read_aliases()["generation"]
        if generation not in (None, found):
            raise AliasMoved(f"live is at generation {found}, not {generation}")

    def _read_aliases(self) -> Aliases:
        try:
            return read_aliases(self._aliases.read_bytes())
        except FileNotFoundError:
            return {"aliases": {}, "generation": 0}

    def _write_aliases(self, content: Aliases) -> None:
        _replace(self._aliases, json.dumps(content))

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with (self.folder / ".lock").open("w") as file:
            lock(file)
            yield


def lock(file: IO[Any]) -> None:
    """Hold a file, against threads that have opened it for themselves too, until it is closed.

    Raises:
        StoreBusy: somebody else has not let go of it in LOCK_S.
    """
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StoreBusy("another process holds the store") from None
        time.sleep(LOCK_POLL_S)


def _replace(path: Path, text: str) -> None:
    """Put a small file in place of another, at once and for good."""
    staging = path.with_suffix(".staging")
    with staging.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, path)
    _sync(path.parent)


def _retired(version: int) -> RetiredVersion:
    return RetiredVersion(
        f"retention deleted the weights of {version_name(version)}: choose a version that has them, or import an "
        "export of it; pin what must stay"
    )


def dump_weights(weights: Mapping[str, Tensor]) -> bytes:
    """As the file that PEFT reads."""
    return bytes(dump_safetensors(dict(weights), metadata={"format": "pt"}))


def _digest(weights: bytes) -> str:
    return f"sha256:{hashlib.sha256(weights).hexdigest()}"


def _digest_line(manifest: bytes) -> bytes:
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def _sync(folder: Path) -> None:
    """Make renames and new names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
