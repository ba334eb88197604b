"""From bytes to RGB pixels, in a process of its own that may do little else.

What decides before a pixel is decoded: the magic bytes, then the size in the header. Run as a module, this is the
child of `decoders.py`: it takes a file from the memory that both share, leaves pixels there, and says in one line
what it did. It imports Pillow and nothing of ours.
"""

from __future__ import annotations

import base64
import binascii
import ctypes
import mmap
import os
import resource
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from io import BytesIO

from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP")
CHANNELS = 3
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
ROOM = 512 * 2**20  # bytes of address space besides pixels: interpreter, libraries, the file
PIXEL_BYTES = 16  # an image of 32 bits a pixel, its conversion, and both once more

# Pillow only warns between its limit and twice that; the filter makes the warning the refusal it should be.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a header may announce, and the longest side of what is kept, in pixels."""

    pixels: int = 50_000_000
    side: int = 12_000
    decoded_side: int = 2048


class Refused(Exception):
    """An image that is not taken, by the code of its reason: one of REASONS."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


REASONS = ("unsupported", "too_large", "empty", "damaged", "not_base64", "bad_data_uri")


def decode(data: bytes, limits: Limits) -> Image.Image:
    """The upright first frame on white, as plain RGB without metadata, reduced to `limits.decoded_side`.

    Raises:
        Refused: not an image of FORMATS, too large, empty or damaged.
    """
    if not _is_supported(data):
        raise Refused("unsupported")
    Image.MAX_IMAGE_PIXELS = limits.pixels
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            _check_size(image, limits)
            return _to_rgb(image, limits.decoded_side)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError):
        raise Refused("too_large") from None
    except Refused:
        raise
    except Exception:  # decoders raise whatever they like on damaged files
        raise Refused("damaged") from None


def from_base64(text: bytes) -> bytes:
    """The bytes of strict base64, bare or as a `data:` URI. Raises Refused."""
    if text[:5].lower() == b"data:":
        head, comma, text = text.partition(b",")
        if not comma or not head.lower().endswith(b";base64"):
            raise Refused("bad_data_uri")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refused("not_base64") from None


def _is_supported(data: bytes) -> bool:
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return is_webp or data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"))


def _check_size(image: Image.Image, limits: Limits) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise Refused("empty")
    if width * height > limits.pixels or max(width, height) > limits.side:
        raise Refused("too_large")


def _to_rgb(image: Image.Image, longest_side: int) -> Image.Image:
    image.draft(image.mode, (longest_side, longest_side))  # JPEG: decode at half, quarter or eighth size
    image.seek(0)
    ImageOps.exif_transpose(image, in_place=True)
    colours = _to_colours(image)
    # Reduced before it is copied any further: what is copied then is small.
    colours.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    rgb = _on_white(colours) if colours.mode == "RGBA" else colours.convert("RGB")
    rgb.info = {}  # EXIF, ICC profile and comments end here
    return rgb


def _to_colours(image: Image.Image) -> Image.Image:
    """The image as RGB or RGBA, itself where it is that already."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    wanted = "RGBA" if image.has_transparency_data else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def _on_white(image: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


# --- the child -------------------------------------------------------------------------------------------


def command(shared: int, size: int, limits: Limits) -> list[str]:
    """What starts a child that shares `size` bytes of the open file `shared`."""
    numbers = map(str, (os.getpid(), shared, size, *astuple(limits)))
    return [sys.executable, "-I", "-m", __name__, *numbers]


def _serve(arguments: Sequence[str]) -> None:
    """Decode what is asked for, one file at a time, until the pipe closes.

    A request is a line `bytes N` or `text N` (base64) and N bytes at the start of the shared memory; the reply is
    `ok WIDTH HEIGHT` with the pixels there, or a reason.
    """
    parent, shared, size, *limits = map(int, arguments)
    _confine(parent, Limits(*limits))
    memory = mmap.mmap(shared, size)
    while line := sys.stdin.buffer.readline():
        kind, length = line.split()
        data = memory[: int(length)]
        try:
            image = decode(from_base64(data) if kind == b"text" else data, Limits(*limits))
            pixels = image.tobytes()
            memory[: len(pixels)] = pixels
            reply = f"ok {image.width} {image.height}"
        except Refused as refusal:
            reply = refusal.reason
        except MemoryError:
            reply = "too_large"
        sys.stdout.write(f"{reply}\n")
        sys.stdout.flush()


def _confine(parent: int, limits: Limits) -> None:
    """No more memory than the largest image takes, nothing written, no processes, no life without the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to act on
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold images
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # root is not held by it
    if sys.platform != "linux":
        return
    memory = ROOM + PIXEL_BYTES * limits.pixels
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    system = ctypes.CDLL(None)
    system.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    system.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit()


if __name__ == "__main__":
    _serve(sys.argv[1:])
