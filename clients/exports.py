"""Adapters as tars: one from the server becomes a PEFT directory, or nothing; a directory becomes one to send."""

from __future__ import annotations

import io
import re
import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from servetune.clients.errors import APIError

NEEDED = ("adapter_config.json", "adapter_model.safetensors")
TOLD = ("manifest.json", "manifest.json.sha256", "lineage.json")  # of an export
DEEPEST = 4  # folders and the file, in the archive
_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


def pack(source: Path) -> bytes:
    """A tar of what makes an adapter in a PEFT directory; a tar file is taken as it is.

    Raises FileNotFoundError where it is neither, or lacks a file.
    """
    if source.is_file():
        return source.read_bytes()
    if missing := [name for name in NEEDED if not (source / name).is_file()]:
        raise FileNotFoundError(f"{source} is no adapter that PEFT saved: it lacks {' and '.join(missing)}")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in (*NEEDED, *(each for each in TOLD if (source / each).is_file())):
            content = (source / name).read_bytes()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


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
        except (tarfile.TarError, ValueError) as error:  # of numbers and texts in it that are none
            raise APIError("refused the archive the server sent: it is damaged") from error
        except (FileExistsError, NotADirectoryError) as error:  # the folder was empty: the archive did this
            raise APIError("refused the archive the server sent: it has a name twice") from error
        found = _adapter_folder(staging)
        found.chmod(0o755)
        found.rename(target)
    return target


def _extract(tar: tarfile.TarFile, folder: Path) -> None:
    """Write the files of an archive below a folder. What else it holds, or files elsewhere, are refused.

    The filters of `extractall` came with Python 3.11.4, and Debian 12 has an earlier one. Sparse files have holes
    that take no room in the archive: a thousand bytes of it would fill a disk.
    """
    for member in tar:
        parts = PurePosixPath(member.name).parts
        is_plain = (member.isreg() and not member.issparse() and parts) or member.isdir()
        if not is_plain or len(parts) > DEEPEST or not all(map(_PART.fullmatch, parts)):
            raise APIError("refused the archive the server sent: it holds what is no plain file inside it")
        content = tar.extractfile(member)
        if content is None:
            continue
        target = folder.joinpath(*parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        with content, target.open("xb") as file:
            shutil.copyfileobj(content, file)


def _adapter_folder(staging: Path) -> Path:
    """The folder holding the adapter: the top of the archive, or the single folder in it."""
    candidates = [staging, *(path for path in staging.iterdir() if path.is_dir())]
    for folder in candidates:
        if all((folder / name).is_file() for name in NEEDED):
            return folder
    raise APIError(f"the archive the server sent lacks {' or '.join(NEEDED)}")
