"""Other looks at an image under which the answer to a question stays the same.

A view moves the picture a little, at random, and may change its light or its detail. Which changes help depends
on what is wrong with the images, and that is found out from the stream itself (`consensus.view_weights`); here is
only what may be tried for which question.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

MEDIAN_SIDE = 256
MEDIAN = 5  # pixels: noise is of the size of pixels, however large the image is
SAME = "same"
"""The image as it was sent."""

Change = Callable[[Image.Image, random.Random], Image.Image]


def _pattern(words: str) -> re.Pattern[str]:
    return re.compile(rf"\b({'|'.join(words.split())})\b", re.IGNORECASE)


# Words of questions whose answer a change could make untrue.
_SIDES = _pattern(
    """left right mirror mirrored direction facing clockwise clock time read text word written letter number digit
    say says sign spell spelled spelt position side"""
)
_PLACE = _pattern(
    """count corner edge border size big bigger biggest small smaller smallest position tilted upright straight
    angle rotated rotation horizontal vertical many"""
)
_LIGHT = _pattern(
    """bright brighter brightness dark darker light lighter contrast pale vivid saturated saturation grayscale
    exposure sunny shade night day"""
)
_DETAIL = _pattern(
    """blur blurred blurry sharp focus texture noise noisy read text word written letter number digit quality count
    many"""
)

# "respond with only the option letter": how to answer, which says nothing about the image.
_FORM = re.compile(
    r"\b(?:answer|respond|reply|provide)\b(?:(?!\b(?:which|what|how|where|who|whose)\b)[^.?!\n]){0,60}?"
    r"\b(?:letters?|words?|numbers?|digits?)\b",
    re.IGNORECASE,
)


def _radius(image: Image.Image, share: float) -> float:
    return share * max(image.size)


def _blur(image: Image.Image, rng: random.Random) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(_radius(image, 0.012)))


def _median(image: Image.Image, rng: random.Random) -> Image.Image:
    small = image.copy()
    small.thumbnail((MEDIAN_SIDE, MEDIAN_SIDE))  # the filter takes a minute on a photo, and holds the interpreter
    filtered = small.filter(ImageFilter.MedianFilter(MEDIAN))
    return filtered if small.size == image.size else filtered.resize(image.size, Image.Resampling.BICUBIC)


def _sharpen(image: Image.Image, rng: random.Random) -> Image.Image:
    return image.filter(ImageFilter.UnsharpMask(_radius(image, 0.04), 200, 0))


def _contrast(factor: float) -> Change:
    return lambda image, rng: ImageEnhance.Contrast(image).enhance(factor)


def _levels(image: Image.Image, rng: random.Random) -> Image.Image:
    """The darkest hundredth black, the lightest white, and colours as they are: what is too dark, or in a haze."""
    return ImageOps.autocontrast(image, cutoff=1, preserve_tone=True)


def _other_light(image: Image.Image, rng: random.Random) -> Image.Image:
    for kind, low, high in (
        (ImageEnhance.Brightness, 0.8, 1.2),
        (ImageEnhance.Contrast, 0.7, 1.4),
        (ImageEnhance.Color, 0.4, 1.7),
    ):
        image = kind(image).enhance(rng.uniform(low, high))
    return image


def _unchanged(image: Image.Image, rng: random.Random) -> Image.Image:
    return image


# Name -> change of light or detail, and the words that forbid it. All but SAME are moved as well, afterwards: a
# move blends neighbouring pixels, and noise that is blended cannot be told from what it hides.
_CHANGES: dict[str, tuple[Change, re.Pattern[str] | None]] = {
    SAME: (_unchanged, None),
    "moved": (_unchanged, None),
    "moved again": (_unchanged, None),
    "moved once more": (_unchanged, None),
    "other light": (_other_light, _LIGHT),
    "another light": (_other_light, _LIGHT),
    "blur": (_blur, _DETAIL),
    "median": (_median, _DETAIL),
    "sharp": (_sharpen, _DETAIL),
    "contrast": (_contrast(1.5), _LIGHT),
    "strong contrast": (_contrast(2.5), _LIGHT),
    "saturated": (lambda image, rng: ImageEnhance.Color(image).enhance(1.8), _LIGHT),
    "levels": (_levels, _LIGHT),
    "bright": (lambda image, rng: ImageEnhance.Brightness(image).enhance(1.25), _LIGHT),
}


def safe_views(question: str) -> list[str]:
    """Names of the views that keep the answer to a question; SAME is always the first."""
    asked = _FORM.sub("", question)
    return [name for name, (_, unsafe) in _CHANGES.items() if not (unsafe and unsafe.search(asked))]


def look(view: str, image: Image.Image, question: str, seed: str) -> Image.Image:
    """One view of an RGB image; `seed` makes what is random about it repeatable."""
    if view == SAME:
        return image
    rng, asked = random.Random(f"{view} {seed}"), _FORM.sub("", question)
    image = _CHANGES[view][0](image, rng)
    if not _PLACE.search(asked):
        image = _move(image, rng)
    mirrored = rng.random() < 0.5 and not _SIDES.search(asked)
    return ImageOps.mirror(image) if mirrored else image


def _move(image: Image.Image, rng: random.Random) -> Image.Image:
    """A window of 80 to 100 % of each side, brought back to the full size."""
    share = rng.uniform(0.8, 1.0)
    width, height = share * image.width, share * image.height
    left, top = rng.random() * (image.width - width), rng.random() * (image.height - height)
    box = (left, top, left + width, top + height)
    return image.resize(image.size, Image.Resampling.BICUBIC, box=box)
