"""Images nano learns from and is measured on: emoji artwork of several vendors and easy-VQA's shapes.

Everything comes from package registries through their own clients: the artwork with `npm pack`, the shapes
with the installed `easy-vqa`. Renders are kept in one .npz per vendor style.
"""

import argparse
import io
import json
import os
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CACHE = Path(".cache/nano")
IMAGE_SIZE = 96
RENDER_SIZE = 256
DRAWINGS = ("package/icons.json", "package/chars.json")  # all that is used of a vendor's package
EXAMPLE_SIZE = 112

# npm package and version of each vendor style. The held-out ones are for evaluation alone.
TRAINING_STYLES = {"noto": "1.2.9", "twemoji": "1.2.5", "emojione": "1.2.3"}
HELD_OUT_STYLES = {"fluent-emoji-flat": "1.2.6", "openmoji": "1.2.29", "streamline-emojis": "1.2.4"}
EXAMPLE_STYLE = "fluent-emoji-flat"

COLOURS = {
    "red": (215, 45, 45),
    "orange": (245, 145, 35),
    "yellow": (252, 210, 60),
    "green": (85, 165, 60),
    "blue": (60, 130, 205),
    "purple": (140, 85, 180),
    "pink": (245, 140, 175),
    "brown": (130, 85, 60),
    "gray": (140, 145, 150),
    "black": (40, 45, 50),
    "white": (240, 240, 240),
}

CATEGORIES = {
    "animal": """ant, bat, bear, bird, blowfish, butterfly, camel, cat, chicken, cow, crab, crocodile, deer,
        dog, dolphin, dragon, duck, eagle, elephant, fish, fox, frog, goat, gorilla, hamster,
        hatching chick, honeybee, horse, koala, lady beetle, leopard, lion, lizard, monkey, mouse,
        octopus, owl, panda, penguin, pig, rabbit, rhinoceros, rooster, scorpion, shark, shrimp,
        snail, snake, spider, squid, tiger, tropical fish, turtle, unicorn, whale, wolf""",
    "plant": """bouquet, cactus, cherry blossom, deciduous tree, evergreen tree, four leaf clover, hibiscus,
        maple leaf, mushroom, palm tree, rose, seedling, sheaf of rice, sunflower, tulip""",
    "food": """avocado, bacon, baguette bread, banana, bento box, birthday cake, bread, burrito, candy,
        carrot, cheese wedge, cherries, chocolate bar, cookie, croissant, cucumber, doughnut, ear of
        corn, egg, eggplant, french fries, grapes, green salad, hamburger, honey pot, hot dog, hot
        pepper, ice cream, kiwi fruit, lemon, lollipop, meat on bone, melon, pancakes, peach, pear,
        pineapple, pizza, popcorn, potato, poultry leg, red apple, rice ball, shaved ice, spaghetti,
        strawberry, sushi, taco, tomato, watermelon""",
    "drink": """baby bottle, beer mug, bottle with popping cork, cocktail glass, glass of milk, hot
        beverage, wine glass""",
    "vehicle": """airplane, ambulance, automobile, bicycle, bullet train, bus, canoe, delivery truck, fire
        engine, helicopter, kick scooter, locomotive, motor scooter, motorcycle, racing car, rocket,
        sailboat, ship, speedboat, taxi, tractor""",
    "building": """castle, church, circus tent, classical building, factory, house, japanese castle, mosque,
        shinto shrine, statue of liberty, tent, tokyo tower""",
    "clothing": """bikini, dress, glasses, graduation cap, handbag, high heeled shoe, jeans, kimono, necktie,
        running shoe, sunglasses, t shirt, top hat, womans boot, womans hat, womans sandal""",
    "tool": """balance scale, bow and arrow, crossed swords, dagger, fishing pole, flashlight, fork and
        knife, fountain pen, gear, hammer, key, kitchen knife, magnifying glass tilted left,
        microscope, nut and bolt, paintbrush, paperclip, pencil, scissors, spoon, straight ruler,
        syringe, telescope, triangular ruler, wrench""",
    "instrument": "drum, guitar, musical keyboard, saxophone, trumpet, violin",
    "sport": """american football, badminton, baseball, basketball, bowling, boxing glove, bullseye, flag in
        hole, ice hockey, ice skate, ping pong, pool 8 ball, skis, soccer ball, tennis, trophy,
        volleyball""",
    "device": """alarm clock, battery, camera, computer mouse, desktop computer, electric plug, floppy disk,
        headphone, joystick, laptop, light bulb, mobile phone, printer, radio, satellite, stopwatch,
        studio microphone, telephone, television, video game, watch""",
    "furniture": "bathtub, bed, couch and lamp, door, seat, shower, toilet",
    "nature": """cloud, cloud with lightning, cloud with rain, crescent moon, desert island, droplet, fire,
        globe showing americas, high voltage, mount fuji, rainbow, snowflake, snowman, star, sun,
        tornado, volcano, water wave""",
    "character": "alien, clown face, ghost, pile of poo, robot, skull",
    "object": """anchor, artist palette, backpack, balloon, bell, bomb, books, briefcase, broken heart,
        candle, carousel horse, christmas tree, clipboard, closed book, coffin, credit card, crown,
        crystal ball, envelope, ferris wheel, fountain, fuel pump, game die, gem stone, hourglass
        done, jack o lantern, lipstick, locked, megaphone, moai, money bag, newspaper, open book,
        package, party popper, pill, postbox, pushpin, red heart, red paper lantern, ring, scroll,
        shield, shopping bags, shopping cart, stop sign, umbrella, vertical traffic light,
        wastebasket, wrapped gift""",
}


@dataclass(frozen=True)
class Shapes:
    """One split of easy-VQA: images (N, H, W, 3) and, for each, its (question, answer) pairs."""

    images: np.ndarray
    questions: list[list[tuple[str, str]]]


def read_labels() -> list[str]:
    """The names nano knows, in order."""
    return (Path(__file__).parent / "labels.txt").read_text().split("\n")[:-1]


def category_of() -> dict[str, str]:
    """The category of each name."""
    return {name: kind for kind, names in CATEGORIES.items() for name in " ".join(names.split()).split(", ")}


def fetch(style: str, version: str, cache: Path) -> Path:
    """The folder of a vendor's npm package, fetched once."""
    folder = cache / style
    if not (folder / "package").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as staging:
            command = ["npm", "pack", "--silent", f"@iconify-json/{style}@{version}"]
            packed = subprocess.run(command, cwd=staging, check=True, capture_output=True, text=True).stdout
            with tarfile.open(Path(staging, packed.strip())) as tar:
                Path(staging, "package").mkdir()
                for name in DRAWINGS:
                    content = tar.extractfile(name)
                    assert content is not None
                    Path(staging, name).write_bytes(content.read())
            if not (folder / "package").exists():  # somebody else may have been faster
                os.rename(Path(staging, "package"), folder / "package")
    return folder / "package"


class IconSet:
    """One vendor's drawings, found by code point or, where a set carries none, by any of their names."""

    def __init__(self, package: Path) -> None:
        data = json.loads((package / "icons.json").read_text())
        self.icons: dict[str, dict[str, Any]] = data["icons"]
        self.aliases = {name: alias["parent"] for name, alias in data.get("aliases", {}).items()}
        self.by_code: dict[str, str] = json.loads((package / "chars.json").read_text())
        self.size = (data.get("width", 16), data.get("height", 16))

    def names(self, icon: str) -> list[str]:
        """A drawing's name and its aliases."""
        return [icon, *(alias for alias, parent in self.aliases.items() if parent == icon)]

    def code(self, icon: str) -> str | None:
        """The code point of a drawing."""
        return next((code for code, name in self.by_code.items() if name == icon), None)

    def find(self, code: str | None, names: list[str]) -> str | None:
        """The drawing of a code point, else of the first name that is known here."""
        if code in self.by_code:
            return self.by_code[code]
        # Where a set draws a thing several times, its name is numbered: the first drawing stands for it.
        candidates = (self.aliases.get(name, name) for name in [*names, *(f"{name}-1" for name in names)])
        return next((name for name in candidates if name in self.icons), None)

    def render(self, icon: str, size: int) -> Image.Image:
        """A drawing as RGBA pixels."""
        from resvg_py import svg_to_bytes

        drawing = self.icons[icon]
        width, height = drawing.get("width", self.size[0]), drawing.get("height", self.size[1])
        box = f"{drawing.get('left', 0)} {drawing.get('top', 0)} {width} {height}"
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{drawing["body"]}</svg>'
        png = bytes(svg_to_bytes(svg_string=svg, width=size, height=size))
        return Image.open(io.BytesIO(png)).convert("RGBA")


def find_icons(style: str, cache: Path = CACHE) -> tuple[IconSet, list[str | None]]:
    """A vendor's set and the drawing of each label in it."""
    versions = TRAINING_STYLES | HELD_OUT_STYLES
    noto = IconSet(fetch("noto", versions["noto"], cache))
    twemoji = IconSet(fetch("twemoji", versions["twemoji"], cache))
    icons = IconSet(fetch(style, versions[style], cache))
    found = []
    for label in read_labels():
        name = label.replace(" ", "-")
        name = noto.aliases.get(name, name)
        code = noto.code(name)
        also = twemoji.by_code.get(code or "")
        found.append(icons.find(code, noto.names(name) + (twemoji.names(also) if also else [])))
    return icons, found


def load_artwork(style: str, cache: Path = CACHE, size: int = RENDER_SIZE) -> dict[str, np.ndarray]:
    """The RGBA render of each label that a vendor draws, by label."""
    path = cache / f"{style}-{size}.npz"
    if not path.exists():
        icons, found = find_icons(style, cache)
        pairs = zip(read_labels(), found, strict=True)
        renders = {label: np.asarray(icons.render(icon, size)) for label, icon in pairs if icon is not None}
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as staging:
            np.savez_compressed(staging, allow_pickle=False, **renders)
        os.replace(staging.name, path)  # somebody else may be reading, or rendering the same
    with np.load(path) as stored:
        return {label: stored[label] for label in read_labels() if label in stored}


def on_white(render: np.ndarray) -> Image.Image:
    """A transparent render on a white background."""
    image = Image.fromarray(render)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def load_training_artwork(cache: Path = CACHE) -> np.ndarray:
    """All training renders at the model's size, (style, label, H, W, RGBA)."""

    def shrink(render: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(render).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS))

    renders = [load_artwork(style, cache) for style in TRAINING_STYLES]
    return np.stack([[shrink(style[label]) for label in read_labels()] for style in renders])


def load_shapes(split: str) -> Shapes:
    """A split of easy-VQA, `train` or `test`, at its own image size."""
    import easy_vqa

    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    texts, answers, owners = getattr(easy_vqa, f"get_{split}_questions")()
    questions: list[list[tuple[str, str]]] = [[] for _ in paths]
    for text, answer, owner in zip(texts, answers, owners, strict=True):
        questions[owner].append((text, answer))
    images = np.stack([np.asarray(Image.open(paths[i]).convert("RGB")) for i in range(len(paths))])
    return Shapes(images, questions)


def main_colour(render: np.ndarray) -> str | None:
    """The colour that covers most of a render, where one clearly does."""
    pixels = render[render[..., 3] > 128][:, :3].astype(np.float32)
    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    nearest = np.linalg.norm(pixels[:, None] - palette, axis=2).argmin(axis=1)
    shares = np.bincount(nearest, minlength=len(palette)) / len(pixels)
    return list(COLOURS)[int(shares.argmax())] if shares.max() > 0.6 else None


def write_examples(style: str, folder: Path, cache: Path = CACHE) -> None:
    """Small files of a vendor's clean renders, for demonstrations."""
    folder.mkdir(parents=True, exist_ok=True)
    for label, render in load_artwork(style, cache).items():
        image = on_white(render).resize((EXAMPLE_SIZE, EXAMPLE_SIZE), Image.Resampling.LANCZOS)
        image.quantize(128).save(folder / f"{label.replace(' ', '-')}.png", optimize=True)


def main() -> None:
    """Fetch and render every style; write example images where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--examples", type=Path, help="folder for small renders of a style nano never saw")
    given = parser.parse_args()
    for style in TRAINING_STYLES | HELD_OUT_STYLES:
        print(f"{style}: {len(load_artwork(style, given.cache))} of {len(read_labels())} labels")
    if given.examples:
        write_examples(EXAMPLE_STYLE, given.examples, given.cache)


if __name__ == "__main__":
    main()
