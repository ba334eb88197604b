"""The built-in streams: recognition under vendor shift, VQA under corruption, drifting, mixed and hostile ones.

Drawings are rendered once from the registries' packages and cached (`nano.data`). Every object is seen in four
natural views. Of easy-VQA's test split the even images are for development and the odd ones for the final report.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from servetune.evals.data import BadData, Data, Item, interleave
from servetune.evals.views import CORRUPTIONS, SIDE, view_of
from servetune.nano import data as artwork

VIEWS = 4
IMAGES = 400  # of easy-VQA in a stream
QUESTIONS = 4  # on each of them
SOURCE = 120  # items of the training domain
VENDORS = tuple(artwork.HELD_OUT_STYLES)
SEVERITY = {"noise": 0.15, "contrast": 0.65, "blur": 0.06, "occlusion": 0.2}
"""Each costs the frozen nano at least 15 points of 0.998. Measured on the two halves of the development questions:
noise 30 and 27, contrast 16 and 17, blur 21 and 16, occlusion 18 and 24."""


def vendor(style: str) -> Data:
    """Objects drawn by a vendor, asked by name."""
    return Data(style, _drawings(style, VIEWS), source_names())


def corrupted(kind: str, final: bool = False) -> Data:
    """easy-VQA's questions on corrupted images; `final` takes the half that development never sees."""
    change = CORRUPTIONS[kind]
    name = f"easy-vqa-{kind}"
    rng = random.Random(name)
    items = _shapes(name, lambda image: change(image, SEVERITY[kind], rng), IMAGES, final)
    return Data(name, items, source_shapes(final))


def drifting() -> Data:
    """Domains that follow each other and return, in this order."""
    first, second = (_sampled(_drawings(style, VIEWS), 320, style) for style in VENDORS[:2])
    halves = first[:160], second[:160], first[160:], second[160:]
    return Data("drifting", tuple(item for half in halves for item in half), source_names(), ordered=True)


def mixed() -> Data:
    """Two tasks by turns: names of drawings, and questions on noisy shapes."""
    names = _sampled(_drawings(VENDORS[0], 2), 240, "mixed")
    shapes = _sampled(corrupted("noise").items, 240, "mixed")
    return Data("mixed", interleave(names, shapes), interleave(source_names()[::2], source_shapes()[::2]))


def confidently_wrong() -> Data:
    """Drawings half of which hide behind another's colours: their majority is wrong, and sure of itself."""
    clean = _sampled(_drawings(VENDORS[0], VIEWS), 480, "wrong")
    traps = []
    for index, item in enumerate(_sampled(_drawings(VENDORS[0], 2), 240, "traps")):
        other = clean[(index * 7 + 3) % len(clean)]
        traps.append(
            Item(f"trap {index}", f"trap {index}", _overlaid(item.picture, other.picture), "", None, item.labels)
        )
    return Data("hostile-wrong", clean, source_names(), extra=tuple(traps))


def blanks() -> Data:
    """Half of what is asked shows nothing at all."""
    scored = _sampled(_drawings(VENDORS[0], VIEWS), 480, "blank")
    blank = [
        Item(f"blank {i}", f"blank {i}", functools.partial(_blank, i), "", None, scored[0].labels)
        for i in range(240)
    ]
    return Data("hostile-blank", scored, source_names(), extra=tuple(blank))


def attacked() -> Data:
    """Half of what is asked comes from a client who wants one answer: the same object again and again."""
    scored = _sampled(_drawings(VENDORS[0], VIEWS), 480, "attacked")
    drawing = Image.fromarray(artwork.load_artwork("noto")["pile of poo"])
    same = [
        Item(f"attack {i}", f"attack {i}", functools.partial(_attack, drawing, i), "", None, scored[0].labels)
        for i in range(240)
    ]
    return Data("hostile-attacker", scored, source_names(), extra=tuple(same))


STREAMS: dict[str, Callable[[], Data]] = {
    **{style: functools.partial(vendor, style) for style in VENDORS},
    **{f"easy-vqa-{kind}": functools.partial(corrupted, kind) for kind in CORRUPTIONS},
    **{f"easy-vqa-{kind}-final": functools.partial(corrupted, kind, True) for kind in CORRUPTIONS},
    "drifting": drifting,
    "mixed": mixed,
    "hostile-wrong": confidently_wrong,
    "hostile-blank": blanks,
    "hostile-attacker": attacked,
}


def load(name: str) -> Data:
    """A built-in stream.

    Raises:
        BadData: no such stream, or what it is made of is not at hand.
    """
    if name not in STREAMS:
        raise BadData(f"{name} is none of the built-in streams: {', '.join(STREAMS)}")
    try:
        return STREAMS[name]()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise BadData(
            f'{name} needs npm for the drawings and pip install "servetune[server,nano]": {error}'
        ) from error


@functools.cache
def source_names() -> tuple[Item, ...]:
    """Objects as nano was taught them, in the same natural views."""
    parts = [_sampled(_drawings(style, 1), SOURCE // 3, style) for style in artwork.TRAINING_STYLES]
    return tuple(item for part in parts for item in part)


def source_shapes(final: bool = False) -> tuple[Item, ...]:
    """easy-VQA as it is."""
    return _shapes("easy-vqa", lambda image: image, SOURCE // QUESTIONS, final)


@functools.cache
def _drawings(style: str, views: int) -> tuple[Item, ...]:
    renders = artwork.load_artwork(style)
    labels = tuple(sorted(renders))
    items = []
    for label in labels:
        drawing = Image.fromarray(renders[label])
        for number in range(views):
            name = f"{style}/{label}/{number}"
            items.append(Item(name, name, functools.partial(_view, drawing, name), "", label, labels))
    return tuple(items)


def _view(drawing: Image.Image, name: str) -> Image.Image:
    return view_of(drawing, random.Random(name))


def _shapes(name: str, change: Callable[[Image.Image], Image.Image], images: int, final: bool) -> tuple[Item, ...]:
    shapes = artwork.load_shapes("test")
    rng = random.Random(f"{name} {final}")
    items = []
    for index in rng.sample(range(int(final), len(shapes.images), 2), images):
        image = change(Image.fromarray(shapes.images[index]))
        asked = shapes.questions[index]
        for number, (question, answer) in enumerate(rng.sample(asked, min(QUESTIONS, len(asked)))):
            file = f"{name}/{index}"
            items.append(Item(f"{file}/{number}", file, functools.partial(_given, image), question, answer))
    return tuple(items)


def _sampled(items: Sequence[Item], count: int, seed: str) -> tuple[Item, ...]:
    return tuple(random.Random(seed).sample(list(items), min(count, len(items))))


def _given(image: Image.Image) -> Image.Image:
    return image


def _overlaid(picture: Callable[[], Image.Image], other: Callable[[], Image.Image]) -> Callable[[], Image.Image]:
    return lambda: Image.blend(picture(), other(), 0.6)


def _blank(number: int) -> Image.Image:
    rng = np.random.default_rng(number)
    pixels = np.full((SIDE, SIDE, 3), rng.integers(0, 256, 3)) + rng.normal(0, 2, (SIDE, SIDE, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _attack(drawing: Image.Image, number: int) -> Image.Image:
    return view_of(drawing, random.Random(f"attack {number}"))
