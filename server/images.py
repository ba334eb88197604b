"""What a request sends as an image, made into pixels: uploads, base64 texts and addresses, by one path.

Error texts are fixed; what the decoder says about a file is never passed on.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from servetune.clients.types import ImageData, ImageInput, ImageUrl
from servetune.server.decoders import Decoders
from servetune.server.decoding import Limits, Refused
from servetune.server.errors import ServiceError
from servetune.server.fetch import ImageFetcher
from servetune.server.settings import Settings


class ImageReader:
    """Reads the images of requests off the event loop, fetching those that were sent as an address."""

    def __init__(self, settings: Settings, fetcher: ImageFetcher | None = None) -> None:
        self._limits = Limits(settings.max_image_pixels, settings.max_image_side, settings.decode_side)
        self._fetcher = fetcher or ImageFetcher(settings.image_hosts, settings.max_body_bytes)
        self._decoders = Decoders(self._limits, settings.max_body_bytes)

    def start(self) -> None:
        """Be ready for the first image. Raises RuntimeError where images cannot be decoded."""
        self._decoders.start()

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
        try:
            return await self._decoders.decode(content)
        except Refused as refusal:
            raise _as_error(refusal, self._limits) from None

    def close(self) -> None:
        """Take no more images; what is being decoded is given up."""
        self._decoders.close()


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


def _as_error(refusal: Refused, limits: Limits) -> ServiceError:
    code, detail = {
        "unsupported": ("unsupported_image", "Send a JPEG, PNG or WebP image."),
        "too_large": (
            "image_too_large",
            f"An image may have {limits.pixels} pixels and {limits.side} on a side at most.",
        ),
        "empty": ("invalid_image", "The image has no pixels."),
        "damaged": ("invalid_image", "The image is damaged or cut short."),
        "not_base64": ("invalid_image", "The image is not valid base64."),
        "bad_data_uri": ("invalid_image", "The data URI has no ';base64,' part."),
    }[refusal.reason]
    return ServiceError(code, detail, param="image")
