"""Little memory for several processes: one file with the weights that all map, and what is freed given back."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # bytes; what vector instructions like
SAMPLES = 64  # values of each tensor that tell one model from another in the file's name


def share_weights(model: nn.Module, folder: Path) -> None:
    """Let the parameters of a model on the CPU be pages of a file in a folder, written where it is missing.

    The pages are mapped privately: what one process would write into its weights, no other sees. They are compared
    with the loaded weights first, so a damaged file is written again. Files of other models are removed.

    Raises:
        OSError: the file cannot be written; the model is as it was.
    """
    weights = dict(model.named_parameters())
    if not weights or any(value.device.type != "cpu" for value in weights.values()):
        return
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"{_name(weights)}.weights"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two that come at once, one writes
        if not (path.is_file() and _holds(path, weights)):
            _write(path, weights)
    for name, view in _mapped(path, weights):
        weights[name].data = view


def _places(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, int]]:
    """Each tensor and where it begins in the file; at last "" and the size of the file."""
    place = 0
    for name, value in weights.items():
        yield name, place
        place += -(-value.nbytes // ALIGNMENT) * ALIGNMENT
    yield "", place


def _name(weights: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name, value in weights.items():
        some = value.detach().flatten()[:: max(1, value.numel() // SAMPLES)]
        total.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        total.update(_bytes(some).numpy().tobytes())
    return total.hexdigest()[:32]


def _bytes(value: Tensor) -> Tensor:
    return value.detach().contiguous().view(-1).view(torch.uint8)


def _mapped(path: Path, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    places = dict(_places(weights))
    whole = torch.from_file(str(path), shared=False, size=places[""], dtype=torch.uint8)
    for name, value in weights.items():
        own = whole[places[name] : places[name] + value.nbytes]
        yield name, own.view(value.dtype).view(value.shape)


def _holds(path: Path, weights: Mapping[str, Tensor]) -> bool:
    """Whether a file has these weights, to the bit."""
    if path.stat().st_size != dict(_places(weights))[""]:
        return False
    return all(torch.equal(_bytes(view), _bytes(weights[name])) for name, view in _mapped(path, weights))


def _write(path: Path, weights: Mapping[str, Tensor]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with open(handle, "wb") as file:
            for name, place in _places(weights):
                file.seek(place)
                if name:
                    file.write(_bytes(weights[name]).numpy().data)
            file.truncate()
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    for other in path.parent.glob("*.weights"):
        if other != path:
            other.unlink(missing_ok=True)  # who has mapped it keeps it


def release_memory() -> None:
    """Give freed memory back to the system, where the C library can (glibc).

    It keeps what a step needed at its largest for the next one, which may be hours away.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
