"""From what people hold in their hands to the image the wire carries.

Pillow and numpy are known by their shape only: neither is needed to send a file, bytes or a URL.
"""

from __future__ import annotations

import os
from base64 import b64encode
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from servetune.clients.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image

MAX_SIDE = 2048  # the server decodes to at most this many pixels a side, so more is only slower to send
_LOSSLESS_PIXELS = 1_000_000  # a larger opaque picture goes as JPEG: as PNG it may exceed the server's limit


class Readable(Protocol):
    """A binary file."""

    def read(self) -> bytes: ...


class PillowImage(Protocol):
    """A `PIL.Image.Image`."""

    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def mode(self) -> str: ...
    def save(self, fp: Any, format: str | None = None, **params: Any) -> None: ...


class Array(Protocol):
    """A numpy array of uint8: (H, W), (H, W, 3) or (H, W, 4)."""

    @property
    def __array_interface__(self) -> dict[str, Any]: ...


ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | Readable | PillowImage | Array"


def encode(image: ImageSource, *, resize: bool = True) -> dict[str, str | None]:
    """The wire form of an image: `{"url"}` for https URLs and data URIs, else `{"data", "media_type"}`.

    With Pillow at hand and `resize`, a picture of more than 2048 pixels a side is shrunk to that first.
    JPEG, PNG and WebP bytes that are small enough go out as they are. Raises ImageError.
    """
    if isinstance(image, str) and image[:8].lower().startswith(("https://", "data:")):
        return {"url": image}
    if hasattr(image, "save") and hasattr(image, "mode"):
        data = _reencode(image, resize)
    elif hasattr(image, "__array_interface__"):
        data = _reencode(_from_array(image), resize)
    else:
        data = _fit(_read(image), resize)
    return {"data": b64encode(data).decode(), "media_type": media_type(data)}


def media_type(data: bytes) -> str | None:
    """What the first bytes say; None where it is neither JPEG, PNG nor WebP."""
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return None


def _read(image: Any) -> bytes:
    if isinstance(image, bytes | bytearray):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        return _read_file(image)
    if not hasattr(image, "read"):
        raise ImageError(
            f"cannot send a {type(image).__name__}: give a path, an https URL, a data: URI, bytes, "
            "a binary file, a PIL image or a numpy array"
        )
    data = image.read()
    if not isinstance(data, bytes):
        raise ImageError("the file must be open in binary mode")
    return data


def _read_file(path: str | os.PathLike[str]) -> bytes:
    if isinstance(path, str) and not os.path.isfile(path):
        shown = path if len(path) <= 80 else f"{path[:77]}..."
        raise ImageError(
            f"{shown!r} is no existing file; a str may be a path, an https:// URL or a data: URI "
            "(decode base64 text and give the bytes)"
        )
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"cannot read {os.fspath(path)!r}: {error.strerror}") from error


def _fit(data: bytes, resize: bool) -> bytes:
    """Bytes the server decodes, shrunk where that is asked for and possible."""
    if not data:
        raise ImageError("the image is empty")
    known = media_type(data) is not None
    if known and not resize:
        return data
    try:
        from PIL import Image
    except ImportError:
        if known:
            return data
        raise ImageError("the image is neither JPEG, PNG nor WebP; install pillow to send it") from None
    try:
        with Image.open(BytesIO(data)) as picture:
            if known and max(picture.size) <= MAX_SIDE:
                return data
            if resize:
                picture.draft(None, (MAX_SIDE, MAX_SIDE))  # a JPEG is then decoded at a reduced size
            return _reencode(picture, resize)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError("the bytes are no image that Pillow can read") from error


def _from_array(array: Any) -> Image.Image:
    try:
        from PIL import Image
    except ImportError:
        raise ImageError("sending an array needs pillow: pip install pillow") from None
    kind, shape = array.__array_interface__["typestr"], array.__array_interface__["shape"]
    if kind != "|u1" or len(shape) not in (2, 3) or shape[2:] not in ((), (3,), (4,)) or 0 in shape:
        raise ImageError(f"an array must be uint8 (H, W), (H, W, 3) or (H, W, 4), not {kind} {shape}")
    return Image.fromarray(array)


def _reencode(picture: Any, resize: bool) -> bytes:
    """Upright, in a plain mode, small enough; the picture given is left as it is."""
    from PIL import ImageOps

    ours = ImageOps.exif_transpose(picture)  # always a copy
    if ours.mode not in ("L", "RGB", "RGBA"):
        ours = ours.convert("RGBA" if ours.has_transparency_data else "RGB")
    if resize:
        ours.thumbnail((MAX_SIDE, MAX_SIDE))  # never enlarges
    buffer = BytesIO()
    if ours.mode != "RGBA" and ours.width * ours.height > _LOSSLESS_PIXELS:
        ours.save(buffer, "JPEG", quality=95)
    else:
        ours.save(buffer, "PNG")
    return buffer.getvalue()
