"""Images: the same pixels by every route, refusals by header, and no way into the private network."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import re
import signal
import struct
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from servetune.clients.types import ImageData, ImageUrl
from servetune.server.decoders import Decoders
from servetune.server.decoding import Limits, Refused, decode, from_base64
from servetune.server.errors import ServiceError
from servetune.server.fetch import ImageFetcher, is_public
from servetune.server.images import ImageReader
from servetune.server.settings import Settings
from tests.fakes import World, encoded, png

LIMITS = Limits()
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (255, 255, 0)]


def picture() -> Image.Image:
    """3 x 2 distinct colours."""
    image = Image.new("RGB", (3, 2))
    image.putdata(COLOURS)
    return image


def pixels(image: Image.Image) -> list[tuple[int, ...]]:
    return [tuple(pixel) for row in np.asarray(image) for pixel in row]


def refusal(data: bytes, limits: Limits = LIMITS) -> str:
    with pytest.raises(Refused) as caught:
        decode(data, limits)
    return caught.value.reason


# --- golden pixels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
def test_every_exif_orientation_comes_out_upright(orientation: int, format: str) -> None:
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste("red", (0, 0, 16, 16))
    upright.paste("blue", (32, 16, 48, 32))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {"quality": 100} if format == "JPEG" else {}
    decoded = decode(encoded(stored, format, exif=exif, **options), LIMITS)
    difference = np.abs(np.asarray(decoded).astype(int) - np.asarray(upright).astype(int))
    assert decoded.size == upright.size
    assert difference.mean() < 4
    assert not decoded.getexif()


def test_a_palette_gives_its_colours() -> None:
    assert pixels(decode(png(picture().quantize(8)), LIMITS)) == COLOURS


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    image = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert [pixel[0] for pixel in pixels(decode(png(image), LIMITS))] == [0, 128, 255]


def test_cmyk_is_converted() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = pixels(decode(encoded(image, "JPEG", quality=100), LIMITS))[0]
    assert red > 240
    assert green < 15
    assert blue < 15


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_flattened_on_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    file = encoded(image.convert(mode), "PNG") if mode != "P" else encoded(image.quantize(), "PNG")
    assert pixels(decode(file, LIMITS)) == [(0, 0, 0), (255, 255, 255)]


def test_half_transparent_red_is_pink() -> None:
    assert pixels(decode(png(Image.new("RGBA", (1, 1), (255, 0, 0, 128))), LIMITS)) == [(255, 127, 127)]


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_counts(format: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    file = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert pixels(decode(file, LIMITS))[0] == (255, 0, 0)


def test_metadata_ends_at_the_door() -> None:
    file = encoded(picture(), "PNG", icc_profile=b"x" * 200, dpi=(300, 300))
    decoded = decode(file, LIMITS)
    assert decoded.info == {}
    assert type(decoded) is Image.Image


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_large_images_are_reduced(format: str) -> None:
    decoded = decode(encoded(Image.new("RGB", (900, 300), "red"), format), Limits(decoded_side=128))
    assert decoded.size == (128, 43)


def test_one_pixel_is_an_image() -> None:
    assert decode(png(Image.new("L", (1, 1), 7)), LIMITS).getpixel((0, 0)) == (7, 7, 7)


@pytest.mark.parametrize("route", ["data URI", "base64", "data object", "url object", "form"])
async def test_every_route_gives_the_same_pixels(route: str, tmp_path: Path) -> None:
    world = World(tmp_path)
    text = base64.b64encode(png(picture())).decode()
    images = {
        "data URI": f"data:image/png;base64,{text}",
        "base64": text,
        "data object": {"data": text, "media_type": "image/png"},
        "url object": {"url": f"data:image/png;base64,{text}"},
    }
    if route == "form":
        reply = await world.client.post(
            "/answer", files={"image": ("../x", png(picture()))}, data={"question": "?"}
        )
    else:
        reply = await world.ask(image=images[route])
    assert reply.status_code == 200
    assert pixels(world.engine.asked[0][0].images[0]) == COLOURS


# --- refusals ----------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises pixels it does not have."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))]
    chunks.append(struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("size", [(20_000, 20_000), (60_000, 60_000), (12_001, 1), (8000, 8000)])
def test_a_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    assert refusal(png_header(*size)) == "too_large"


def test_the_largest_photo_is_accepted_by_its_header() -> None:
    assert refusal(png_header(8000, 6000)) == "damaged"  # the size was fine, the pixels are missing


FOREIGN = ["GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "PCX", "SGI", "JPEG2000", "DDS", "EPS", "MSP", "XBM", "PDF"]


@pytest.mark.parametrize("format", FOREIGN)
def test_other_formats_are_refused(format: str) -> None:
    mode = "1" if format in {"MSP", "XBM"} else "RGB"
    assert refusal(encoded(Image.new(mode, (32, 32)), format)) == "unsupported"


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"<svg/>", b"%!PS", b"RIFF0000WAVE", b"PK\x03\x04"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    assert refusal(data) == "unsupported"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_file_is_refused(format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    file = encoded(noise, format)
    for share in (0.1, 0.5, 0.9):
        assert refusal(file[: int(len(file) * share)]) == "damaged"


@given(st.binary(max_size=200), st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP"]))
def test_rubbish_behind_a_good_start_is_refused(rubbish: bytes, magic: bytes) -> None:
    assert refusal(magic + rubbish) in {"damaged", "too_large"}


@pytest.mark.parametrize(
    "text", [b"a", b"not base64!", b"aGk=\n", b"data:image/png,xx", b"data:;base64", b"\xe9", b"ab=c"]
)
def test_base64_is_strict(text: bytes) -> None:
    with pytest.raises(Refused):
        from_base64(text)


@pytest.mark.parametrize(
    ("image", "code"),
    [
        (b"GIF89a", "unsupported_image"),
        (png_header(20_000, 20_000), "image_too_large"),
        (png_header(0, 7), "invalid_image"),
        (png()[:40], "invalid_image"),
        (ImageData(data="é"), "invalid_image"),
        (ImageUrl(url="data:image/png,xx"), "invalid_image"),
    ],
    ids=["format", "bomb", "empty", "cut", "base64", "data URI"],
)
async def test_a_refusal_says_in_fixed_words_what_to_do(
    image: bytes | ImageData | ImageUrl, code: str, tmp_path: Path
) -> None:
    reader = ImageReader(Settings(home=tmp_path))
    with pytest.raises(ServiceError) as caught:
        await reader.read([image])
    assert caught.value.code == code
    assert "0x" not in caught.value.detail
    assert caught.value.detail.endswith(".")


# --- decoders ----------------------------------------------------------------------------------------


def pid(decoders: Decoders) -> int:
    """Of the child that is asked first."""
    return decoders._free.queue[-1].pid


async def test_a_dead_decoder_is_replaced() -> None:
    decoders = Decoders(LIMITS, 10**6)
    assert pixels(await decoders.decode(png(picture()))) == COLOURS
    first = pid(decoders)
    os.kill(first, signal.SIGKILL)
    with pytest.raises(Refused, match="damaged"):
        await decoders.decode(png(picture()))
    assert pixels(await decoders.decode(base64.b64encode(png(picture())).decode())) == COLOURS
    assert pid(decoders) != first


async def test_decoders_that_cannot_start_are_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    Decoders(LIMITS, 10**6).start()
    monkeypatch.setattr("servetune.server.decoders.command", lambda *_: ["/bin/false"])
    with pytest.raises(RuntimeError, match="does not start"):
        Decoders(LIMITS, 10**6).start()


async def test_an_image_that_takes_too_long_is_given_up() -> None:
    decoders = Decoders(LIMITS, 10**6, timeout_s=0.5)
    await decoders.decode(png())
    os.kill(pid(decoders), signal.SIGSTOP)
    with pytest.raises(Refused, match="damaged"):
        await decoders.decode(png())
    decoders = Decoders(LIMITS, 10**6)
    assert pixels(await decoders.decode(png(picture()))) == COLOURS


async def test_a_decoder_has_no_keys_and_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVETUNE_ADMIN_KEY", "hidden")
    decoders = Decoders(LIMITS, 10**6)
    await decoders.decode(png())
    child = Path(f"/proc/{pid(decoders)}")
    assert (child / "environ").read_bytes() == b""
    limits = dict(re.findall(r"^(Max [a-z ]+?)  +(\S+)", (child / "limits").read_text(), re.MULTILINE))
    assert int(limits["Max address space"]) < 2**31
    assert limits["Max core file size"] == limits["Max file size"] == limits["Max processes"] == "0"


async def test_the_largest_image_fits_into_a_decoder() -> None:
    file = encoded(Image.new("RGBA", (7000, 7000), (255, 0, 0, 128)), "PNG", compress_level=1)
    image = await Decoders(LIMITS, 10**7).decode(file)
    assert (image.size, image.getpixel((5, 5))) == ((2048, 2048), (255, 127, 127))


async def test_many_at_once_are_all_decoded() -> None:
    decoders = Decoders(LIMITS, 10**6)
    sizes = [(n, 1 + n % 7) for n in range(1, 41)]
    images = await asyncio.gather(*(decoders.decode(png(Image.new("RGB", size))) for size in sizes))
    assert [image.size for image in images] == sizes


async def test_an_error_names_the_image(tmp_path: Path) -> None:
    reader = ImageReader(Settings(home=tmp_path))
    with pytest.raises(ServiceError) as caught:
        await reader.read([png(), ImageData(data="!")])
    assert caught.value.param == "images.1"
    with pytest.raises(ServiceError) as caught:
        await reader.read([ImageUrl(url="aGk=")])
    assert (caught.value.code, caught.value.param) == ("image_url_refused", "image")


# --- addresses ---------------------------------------------------------------------------------------

INTERNAL = [
    *("127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "192.0.0.8"),
    *("0.0.0.0", "224.0.0.1", "255.255.255.255", "198.18.0.1", "192.0.2.1", "192.88.99.1", "240.0.0.1"),
    *("::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "fe80::1", "fe80::1%eth0", "fc00::1"),
    *("fd00:ec2::254", "ff02::1", "2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b:1::1", "2001:db8::1"),
    *("2001::1", "100::1"),
]


@pytest.mark.parametrize("address", INTERNAL)
def test_internal_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.215.14", "2606:4700::6810:84e5", "2a00:1450:4001::1"])
def test_the_open_internet_is_public(address: str) -> None:
    assert is_public(address)


class Web:
    """One https host with an image, and a record of what was dialled."""

    def __init__(self, *addresses: str, status: int = 200, content: bytes = b"image") -> None:
        self.dialled: list[httpx2.Request] = []
        self.resolved: list[str] = []

        def serve(request: httpx2.Request) -> httpx2.Response:
            self.dialled.append(request)
            location = {"Location": "https://169.254.169.254/"}
            return httpx2.Response(status, content=stream(), headers=location if status > 299 else {})

        async def stream() -> AsyncIterator[bytes]:
            yield content

        async def resolve(host: str) -> list[str]:
            self.resolved.append(host)
            return list(addresses)

        self.fetcher = ImageFetcher(["Images.example"], 1000, resolve, httpx2.MockTransport(serve))


async def test_the_checked_address_is_the_one_dialled() -> None:
    web = Web("8.8.8.8", "8.8.4.4")
    assert await web.fetcher.fetch("https://images.EXAMPLE:443/a%20b?c=d#e") == b"image"
    request = web.dialled[0]
    assert str(request.url) == "https://8.8.8.8/a%20b?c=d"
    assert request.headers["host"] == "images.example"
    assert request.extensions["sni_hostname"] == "images.example"
    assert web.resolved == ["images.example"]


REFUSED = [
    "http://images.example/",
    "https://images.example:8443/",
    "https://images.example:0x1bb/",
    "https://user@images.example/",
    "https://images.example@127.0.0.1/",
    "https://other.example/",
    "https://images.example.evil.example/",
    "https://images.example./",
    "https://127.0.0.1/",
    "https://[::1]/",
    "https://2130706433/",
    "https://images.example\\@127.0.0.1/",
    "https://images.example /",
    "https://images.example/\r\nX: y",
    "https://ⓘmages.example/",
    "https://",
    "https://[/",
]


@pytest.mark.parametrize("url", REFUSED)
async def test_other_addresses_are_refused_before_any_name_is_resolved(url: str) -> None:
    web = Web("8.8.8.8")
    with pytest.raises(ServiceError) as caught:
        await web.fetcher.fetch(url)
    assert caught.value.code == "image_url_refused"
    assert caught.value.detail == "The image could not be read from there."
    assert web.resolved == web.dialled == []


@pytest.mark.parametrize("addresses", [[], ["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["64:ff9b::7f00:1"]])
async def test_one_internal_address_refuses_the_host(addresses: list[str]) -> None:
    web = Web(*addresses)
    with pytest.raises(ServiceError, match="image_url_refused"):
        await web.fetcher.fetch("https://images.example/")
    assert web.dialled == []


@pytest.mark.parametrize(("status", "content"), [(302, b""), (404, b"no"), (200, b"x" * 1001)])
async def test_redirects_failures_and_floods_are_refused(status: int, content: bytes) -> None:
    web = Web("8.8.8.8", status=status, content=content)
    with pytest.raises(ServiceError, match="image_url_refused"):
        await web.fetcher.fetch("https://images.example/")
    assert len(web.dialled) == 1


@pytest.mark.parametrize("image", ["https://images.example/", {"url": "HTTP://169.254.169.254/"}])
async def test_addresses_are_off_by_default(image: object, tmp_path: Path) -> None:
    reply = await World(tmp_path).ask(image=image)
    assert (reply.status_code, reply.json()["code"]) == (422, "image_url_disabled")


def test_an_mpo_photo_is_read() -> None:
    file = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(file, "MPO", save_all=True, append_images=frames[1:])
    assert pixels(decode(file.getvalue(), LIMITS))[0][0] > 240
