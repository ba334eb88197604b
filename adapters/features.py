"""What was made of an image, kept by its content: the same picture is processed and encoded once.

So is a prompt with the keys and values that a version made of it, which the same question finds again.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from PIL.Image import Image
from torch import Tensor


def digest(images: Sequence[Image]) -> bytes:
    """Of the pixels of some images, in their order."""
    total = hashlib.sha256()
    for image in images:
        total.update(f"{image.mode} {image.size} ".encode())
        total.update(image.tobytes())
    return total.digest()


class ByteCache:
    """The values that were used last, as many as fit into some bytes of tensors; 0 keeps nothing."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def get(self, key: Hashable) -> Any | None:
        """The value kept under a key, or None."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: Hashable, value: Any) -> None:
        """Keep what `tensors` finds tensors in; what was not used for the longest time leaves."""
        size = sum(tensor.nbytes for tensor in tensors(value))
        if size > self.max_bytes:
            return
        self.num_bytes += size - self._values.pop(key, (None, 0))[1]
        self._values[key] = value, size
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= self._values.popitem(last=False)[1][1]

    def clear(self) -> None:
        """Keep nothing of what was put so far."""
        self._values.clear()
        self.num_bytes = 0


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested mappings and sequences, and in what has `tensors` of its own."""
    if isinstance(value, Tensor):
        yield value
    elif hasattr(value, "tensors"):
        yield from value.tensors()
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors(each)
