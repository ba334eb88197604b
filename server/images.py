"""From bytes or text to RGB pixels: the one path every image takes.

What decides before a pixel is decoded: the magic bytes, then the size in the header. Error texts are fixed;
what the decoder says about a file is never passed on.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO

from PIL import Image, ImageOps

from servetune.clients.types import ImageData, ImageInput, ImageUrl
from servetune.server.errors import ServiceError
from servetune.server.fetch import ImageFetcher
from servetune.server.settings import Settings

FORMATS = ("JPEG", "PNG", "WEBP")
DECODE_THREADS = 2  # a 50 Mpx image takes 150 MB and more while it is decoded

# Pillow only warns between its limit and twice that; the filter makes the warning the refusal it should be.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a header may announce, and the longest side of what is kept, in pixels."""

    pixels: int = 50_000_000
    side: int = 12_000
    decoded_side: int = 2048


def decode(data: bytes, limits: Limits) -> Image.Image:
    """The upright first frame on white, as plain RGB without metadata, reduced to `limits.decoded_side`.

    Raises:
        ServiceError: `unsupported_image`, `image_too_large` or `invalid_image`.
    """
    if not _is_supported(data):
        raise ServiceError("unsupported_image", "Send a JPEG, PNG or WebP image.", param="image")
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            _check_size(image, limits)
            return _to_rgb(image, limits.decoded_side)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(limits) from None
    except ServiceError:
        raise
    except Exception:  # decoders raise whatever they like on damaged files
        raise ServiceError("invalid_image", "The image is damaged or cut short.", param="image") from None


def from_base64(text: str) -> bytes:
    """The bytes of strict base64, bare or as a `data:` URI. Raises ServiceError `invalid_image`."""
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise ServiceError("invalid_image", "The data URI has no ';base64,' part.", param="image")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ServiceError("invalid_image", "The image is not valid base64.", param="image") from None


class ImageReader:
    """Reads the images of requests off the event loop, fetching those that were sent as an address."""

    def __init__(self, settings: Settings, fetcher: ImageFetcher | None = None) -> None:
        self._limits = Limits(settings.max_image_pixels, settings.max_image_side, settings.decode_side)
        self._fetcher = fetcher or ImageFetcher(settings.image_hosts, settings.max_body_bytes)
        self._threads = ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="decode")
        Image.MAX_IMAGE_PIXELS = settings.max_image_pixels

    async def read(self, inputs: Sequence[bytes | ImageInput]) -> tuple[Image.Image, ...]:
        """Decode uploads, base64 texts and addresses, in order; an error names the image it is about."""
        images = []
        for number, source in enumerate(inputs):
            try:
                images.append(await self._read(source))
            except ServiceError as error:
                error.param = "image" if len(inputs) == 1 else f"images.{number}"
                raise
        return tuple(images)

    async def _read(self, source: bytes | ImageInput) -> Image.Image:
        text = _text(source)
        content = await self._fetcher.fetch(text) if isinstance(text, str) and _is_address(text) else text
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, _decode_source, content, self._limits)

    def close(self) -> None:
        """Let go of the threads; decodes under way are not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _text(source: bytes | ImageInput) -> bytes | str:
    match source:
        case ImageUrl(url=url):
            if not _is_address(url) and url[:5].lower() != "data:":
                raise ServiceError("image_url_refused", "An address begins with https:// or data:.", param="image")
            return url
        case ImageData(data=data):
            return data
        case _:
            return source


def _is_address(text: str) -> bool:
    return text[:8].lower().startswith(("http://", "https://"))


def _decode_source(source: bytes | str, limits: Limits) -> Image.Image:
    return decode(from_base64(source) if isinstance(source, str) else source, limits)


def _is_supported(data: bytes) -> bool:
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return is_webp or data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"))


def _check_size(image: Image.Image, limits: Limits) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ServiceError("invalid_image", "The image has no pixels.", param="image")
    if width * height > limits.pixels or max(width, height) > limits.side:
        raise _too_large(limits)


def _too_large(limits: Limits) -> ServiceError:
    detail = f"An image may have {limits.pixels} pixels and {limits.side} on a side at most."
    return ServiceError("image_too_large", detail, param="image")


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
