"""Unpacking an exported adapter: a tar from the server becomes a PEFT directory, or nothing at all."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from servetune.clients.errors import APIError

NEEDED = ("adapter_config.json", "adapter_model.safetensors")


def check_free(target: Path) -> None:
    """Raises FileExistsError unless `target` is missing or an empty folder."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} exists already")


def unpack(archive: BinaryIO, target: Path) -> Path:
    """Extract beside `target`, look at the result, then rename: a bad or broken tar leaves no trace.

    Raises APIError where the tar is damaged, reaches outside its folder or is no PEFT adapter.
    """
    archive.seek(0)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        staging = Path(scratch) / "adapter"
        staging.mkdir()
        try:
            # "r:" takes no compression, so what unpacks is no larger than what was sent.
            with tarfile.open(fileobj=archive, mode="r:") as tar:
                _extract(tar, staging)
        except tarfile.TarError as error:
            raise APIError(f"refused the archive the server sent: {error}") from error
        found = _adapter_folder(staging)
        found.chmod(0o755)
        found.rename(target)
    return target


def _extract(tar: tarfile.TarFile, folder: Path) -> None:
    """Write the files of an archive below a folder. What else it holds, or files elsewhere, are refused.

    The filters of `extractall` came with Python 3.11.4, and Debian 12 has an earlier one.
    """
    for member in tar:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts or not (member.isreg() or member.isdir()):
            raise APIError(f"refused the archive the server sent: {path.name} is no plain file inside it")
        content = tar.extractfile(member)
        if content is None:
            continue
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with content, target.open("wb") as file:
            shutil.copyfileobj(content, file)


def _adapter_folder(staging: Path) -> Path:
    """The folder holding the adapter: the top of the archive, or the single folder in it."""
    candidates = [staging, *(path for path in staging.iterdir() if path.is_dir())]
    for folder in candidates:
        if all((folder / name).is_file() for name in NEEDED):
            return folder
    raise APIError(f"the archive the server sent lacks {' or '.join(NEEDED)}")
