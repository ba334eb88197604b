"""Natural views of a drawing, and corruptions: pure functions of an image and a random generator."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

SIDE = 112


def view_of(drawing: Image.Image, rng: random.Random) -> Image.Image:
    """An RGBA drawing as a camera might meet it: smaller, elsewhere, turned, on another ground."""
    side = round(SIDE * rng.uniform(0.7, 1.0))
    turned = drawing.resize((side, side), Image.Resampling.LANCZOS)
    turned = turned.rotate(rng.uniform(-12, 12), resample=Image.Resampling.BICUBIC)
    ground = _ground(rng)
    ground.paste(turned, (round((SIDE - side) * rng.random()), round((SIDE - side) * rng.random())), turned)
    return ground


def _ground(rng: random.Random) -> Image.Image:
    """White, one pale colour, or a pale slope."""
    kind = rng.randrange(3)
    if kind == 0:
        return Image.new("RGB", (SIDE, SIDE), "white")
    first, second = (np.array([rng.randint(190, 255) for _ in range(3)], dtype=np.float32) for _ in range(2))
    if kind == 1:
        second = first
    slope = np.linspace(0, 1, SIDE, dtype=np.float32)[:, None, None]
    pixels = np.broadcast_to(first + slope * (second - first), (SIDE, SIDE, 3))
    image = Image.fromarray(pixels.astype(np.uint8))
    return image.rotate(90) if rng.random() < 0.5 else image


def gaussian_noise(image: Image.Image, amount: float, rng: random.Random) -> Image.Image:
    """Noise of `amount` standard deviations in units of the full range."""
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 255 * amount, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image, dtype=np.float64) + noise).clip(0, 255).astype(np.uint8))


def low_contrast(image: Image.Image, amount: float, rng: random.Random) -> Image.Image:
    """Contrast lowered by a share of `amount`, around middle grey."""
    pixels = np.asarray(image, dtype=np.float64)
    return Image.fromarray(((pixels - 128) * (1 - amount) + 128).clip(0, 255).astype(np.uint8))


def blur(image: Image.Image, amount: float, rng: random.Random) -> Image.Image:
    """Gaussian blur with a radius of `amount` times the side."""
    return image.filter(ImageFilter.GaussianBlur(amount * max(image.size)))


def occlusion(image: Image.Image, amount: float, rng: random.Random) -> Image.Image:
    """One grey rectangle over a share `amount` of the area, its middle anywhere."""
    area = amount * image.width * image.height
    width = math.sqrt(area * rng.uniform(0.6, 1.6))
    height = area / width
    x, y = rng.random() * image.width, rng.random() * image.height
    left, top = round(x - width / 2), round(y - height / 2)
    covered = image.copy()
    covered.paste((128, 128, 128), (left, top, left + round(width), top + round(height)))
    return covered


CORRUPTIONS: dict[str, Callable[[Image.Image, float, random.Random], Image.Image]] = {
    "noise": gaussian_noise,
    "contrast": low_contrast,
    "blur": blur,
    "occlusion": occlusion,
}
