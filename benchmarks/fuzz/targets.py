"""What is fuzzed. A target takes bytes, and raises where the parser does not keep its word.

Modules are imported when a target is made, so that atheris can instrument them on their way in.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

Target = Callable[[bytes], None]


class Broken(AssertionError):
    """A parser took what it must refuse, or left behind what it must not."""


@dataclass(frozen=True, slots=True)
class Made:
    """A target with inputs to begin from."""

    run: Target
    seeds: list[bytes]


def decode(folder: Path) -> Made:
    """A file, or its base64 text, becomes an RGB image within the limits, or is refused for a listed reason."""
    from PIL import Image

    from servetune.server import decoding

    limits = decoding.Limits(pixels=1_000_000, side=4096, decoded_side=256)  # small, so that a million are done

    def run(data: bytes) -> None:
        for parse in (_as_it_is, _from_text):
            try:
                image = decoding.decode(parse(data), limits)
            except decoding.Refused as refused:
                if refused.reason not in decoding.REASONS:
                    raise Broken(f"refused for {refused.reason}") from None
                continue
            if image.mode != "RGB" or image.info or not 0 < max(image.size) <= limits.decoded_side:
                raise Broken(f"decoded to {image.mode} {image.size} with {len(image.info)} remarks")

    def _as_it_is(data: bytes) -> bytes:
        return data

    def _from_text(data: bytes) -> bytes:
        return decoding.from_base64(data if data[:5] == b"data:" else base64.b64encode(data))

    def encoded(mode: str, kind: str, **options: object) -> bytes:
        file = io.BytesIO()
        Image.effect_noise((24, 16), 40).convert(mode).save(file, kind, **options)  # type: ignore[arg-type]
        return file.getvalue()

    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = [encoded(mode, "PNG") for mode in ("1", "L", "P", "RGB", "RGBA", "I;16")]
    seeds += [encoded("RGB", "JPEG", exif=exif), encoded("CMYK", "JPEG"), encoded("L", "JPEG", progressive=True)]
    seeds += [
        encoded("RGBA", "WEBP", lossless=True),
        encoded("RGB", "WEBP", exif=exif),
        encoded("P", "PNG", bits=2),
    ]
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("PNG", "WEBP"):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:])
        seeds.append(file.getvalue())
    return Made(run, [*seeds, b"data:image/png;base64," + base64.b64encode(seeds[0])])


def manifest(folder: Path) -> Made:
    """A store with one file that is not what the store wrote, but whose digest fits: read, or a StoreError."""
    import torch

    from servetune.adapters import store as stores
    from servetune.adapters.versions import Draft, StoreError

    store = stores.AdapterStore(folder)
    weights = {"a.lora_A.weight": torch.zeros(2, 4), "a.lora_B.weight": torch.zeros(4, 2)}
    store.initialise(weights, {"r": 2, "target_modules": "x"}, "sha256:base", (0.0,))
    draft = Draft(weights, "worker", 0, (0.5,), optimizer=weights, step_range=(1, 2), query_ids=("q1", "q2"))
    version = store.publish(draft).version
    store.promote(version)
    store.erase(["q9"])
    place = store.folder / f"v{version:04d}"
    files = [place / name for name in (stores.MANIFEST, stores.WEIGHTS, stores.OPTIMIZER, stores.CONFIG)]
    files += [store.folder / "aliases.json", store.folder / "erased.json"]
    whole = {path: path.read_bytes() for path in [*files, place / stores.MANIFEST_DIGEST]}

    def put(path: Path, data: bytes) -> None:
        path.write_bytes(data)
        if path.parent == place and path.name != stores.MANIFEST:  # the manifest owns up to it
            owned = json.loads(whole[files[0]])
            owned["files"][path.name] = hashlib.sha256(data).hexdigest()
            put(files[0], json.dumps(owned).encode())
        elif path.parent == place:
            (place / stores.MANIFEST_DIGEST).write_bytes(stores._digest_line(data))

    def run(data: bytes) -> None:
        if not data:
            return
        put(files[data[0] % len(files)], data[1:])
        try:
            for read in (_story, store.weights, store.optimizer, _names, _pieces):
                with suppress(StoreError):
                    read(version)
        finally:
            for path, content in whole.items():
                path.write_bytes(content)

    def _story(number: int) -> None:
        made = store.manifest(number)
        if made.version != number or not isinstance(made.query_ids, tuple):
            raise Broken("a manifest of another version, or not as it is described")
        hash((made.parent, made.label, made.query_ids, made.step_range, made.probe, made.digest))

    def _names(number: int) -> None:
        store.live(), store.resolve("latest"), store.num_learned(), store.learned_from({"q1"})
        store.erased()

    def _pieces(number: int) -> None:
        b"".join(store.export(number))

    return Made(run, [bytes([number]) + whole[path] for number, path in enumerate(files)])


def export(folder: Path) -> Made:
    """An archive becomes a PEFT directory or an APIError; nothing else is left, little does not become much."""
    from servetune.clients.errors import APIError
    from servetune.clients.exports import NEEDED, unpack

    target = folder / "in" / "adapter"

    def run(data: bytes) -> None:
        try:
            unpack(io.BytesIO(data), target)
            if not all((target / name).is_file() for name in NEEDED):
                raise Broken("what was unpacked is no adapter")
            if _size(target) > len(data):
                raise Broken("it unpacked to more than was sent")
        except APIError:
            if target.exists():
                raise Broken("refused, and yet there") from None
        finally:
            shutil.rmtree(target, ignore_errors=True)
            left = [path.name for path in folder.rglob("*") if path.name != "in"]
            shutil.rmtree(folder / "in", ignore_errors=True)
        if left:
            raise Broken("something was left beside it")

    return Made(run, _archives(NEEDED))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*"))


def _archives(names: tuple[str, ...]) -> list[bytes]:
    archives = []
    sparse = {"GNU.sparse.map": "0,4", "GNU.sparse.size": "5000"}  # holes, which take no room in an archive
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        for prefix, headers in (("v0001/", sparse), ("", {}), ("v0001/é" + 60 * "long/", {"comment": "x"})):
            file = io.BytesIO()
            with suppress(ValueError), tarfile.open(fileobj=file, mode="w", format=form) as tar:
                for name in names:
                    member = tarfile.TarInfo(prefix + name)
                    member.size, member.pax_headers = 20, headers
                    tar.addfile(member, io.BytesIO(b"x" * 20))
                archives.append(file)
    return [file.getvalue() for file in archives]


INSTRUMENTED = {
    "decode": ["servetune.server.decoding", "PIL"],
    "manifest": ["servetune.adapters.store", "servetune.adapters.versions"],
    "export": ["servetune.clients.exports", "tarfile"],
}
TARGETS: dict[str, Callable[[Path], Made]] = {"decode": decode, "manifest": manifest, "export": export}
