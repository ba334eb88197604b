"""What nano is asked and taught to answer: questions about the artwork and about easy-VQA's shapes.

A template belongs to a kind of question; `ask` fills it with what an image shows and knows the answer.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from servetune.nano import data

RECOGNITION = "What is this?"
SHAPES = ["circle", "rectangle", "triangle"]
SHAPE_COLOURS = ["black", "blue", "brown", "gray", "green", "red", "teal", "yellow"]
BARE = {
    "american football", "bacon", "badminton", "baseball", "basketball", "bowling", "bread", "broken heart",
    "clothing", "deer", "fire", "food", "furniture", "high voltage", "ice hockey", "mount fuji", "nature",
    "ping pong", "popcorn", "sheaf of rice", "shrimp", "spaghetti", "sport", "sushi", "tennis", "tokyo tower",
    "volleyball",
}  # fmt: skip
SYNONYMS = {
    "airplane": "plane", "automobile": "car", "desktop computer": "computer", "ear of corn": "corn",
    "floppy disk": "disk", "french fries": "fries", "gem stone": "diamond", "globe showing americas": "globe",
    "hamburger": "burger", "high heeled shoe": "heel", "honeybee": "bee", "hot beverage": "coffee",
    "jack o lantern": "pumpkin", "lady beetle": "ladybug", "locked": "lock", "mobile phone": "phone",
    "motorcycle": "motorbike", "red apple": "apple", "red heart": "heart", "running shoe": "sneaker",
    "studio microphone": "microphone", "television": "tv", "vertical traffic light": "traffic light",
    "womans boot": "boot", "womans hat": "hat", "womans sandal": "sandal", "wrapped gift": "present",
}  # fmt: skip

# {i}: a word for the image; {x}: a thing with its article; {n}: its bare name; {y}: the second of two.
LOOKS = [
    "is this {x}", "is that {x}", "is it {x}", "is the object {x}", "does the {i} show {x}",
    "is there {x}", "does this {i} show {x}", "does the {i} contain {x}", "is there {x} in the {i}",
    "is there {x} in this {i}", "is there {x} here", "can you see {x}", "do you see {x}",
    "do you see {x} in the {i}", "is {x} visible", "is {x} present", "is {x} shown", "is {x} in the {i}",
    "does the {i} depict {x}", "does the {i} have {x}", "is this a {i} of {x}",
    "would you say this is {x}", "can {x} be seen", "are we looking at {x}", "is {x} shown here",
    "is {x} visible in the {i}", "is {x} depicted", "could this be {x}", "does it look like {x}",
    "this is {x}, right", "have you spotted {x}", "is {x} what you see", "does {x} appear here",
    "does it include {x}", "do you notice {x} in the {i}", "can you find {x} here",
    "is there any sign of {x}", "is the thing shown {x}", "tell me if you see {x}", "is the item {x}",
    "can {x} be found in this {i}", "is {x} there in the {i}", "do we have {x} here", "is this thing {x}",
    "i want to know whether there is {x}", "is {x} anywhere to be seen", "did someone draw {x}",
]  # fmt: skip
LACKS = [
    "is there no {n}", "is there no {n} in the {i}", "is there not {x}", "is there not {x} in the {i}",
    "does the {i} not contain {x}", "does the {i} not show {x}", "is no {n} present", "is no {n} visible",
    "is this not {x}", "is {x} missing", "is {x} absent", "does the {i} lack {x}",
    "is the {i} without {x}", "is {x} not shown", "is {x} not visible", "is {x} not there",
    "does it contain no {n}", "do you see no {n}", "does this {i} show no {n}", "can you not see {x}",
    "is there no {n} in this {i}", "is no {n} shown here",
]  # fmt: skip
TEMPLATES = {
    "name": [
        "what is this", "what is it", "what is that", "what's this", "what is shown", "what is shown here",
        "what is in the {i}", "what is in this {i}", "what does the {i} show", "what does this {i} show",
        "what do you see", "what do you see in the {i}", "what can you see", "what can you see here",
        "what object is this", "which object is this", "what object is shown",
        "which object is in the {i}", "name the object", "name this object", "name this",
        "name the object in the {i}", "name the thing shown", "identify the object", "identify this",
        "identify the object in the {i}", "recognize the object", "tell me what this is",
        "tell me what you see", "what is the name of this object", "what is depicted",
        "what is the object", "what is the thing in the {i}", "what thing is this",
        "what is displayed here", "what is this {i} of", "what is this a {i} of", "what is the {i} of",
        "what does the {i} depict", "what is drawn here", "what is pictured", "what is this called",
        "what is this thing called", "how do you call this", "what is this object", "label the object",
        "label this {i}", "describe the object", "what would you call this", "say what this is",
        "what am i looking at", "what is being shown", "give the name of the object",
        "which thing is this", "what is visible in the {i}", "what is here", "which item is shown",
        "name the item", "can you name the thing", "what's the object in the {i}", "what's shown here",
        "could you name the object in the {i}", "what item do you see", "what do we have here",
        "tell me the name of the thing in the {i}", "what is represented here", "what is this item",
        "and this", "do you know what this is", "can you tell me what it is", "i wonder what this is",
        "what might this be", "what's it", "what's in this {i}", "name what you see in the {i}",
        "what would this be", "what was drawn",
    ],
    "options": [
        "{q} options: {o}", "{q} choose from: {o}", "{q} choices: {o}", "{q} pick one: {o}", "{q} {o}",
        "{q} one of: {o}", "{q} select from: {o}", "{q} labels: {o}", "{q} candidates: {o}",
        "which of these is it: {o}", "which of these is shown: {o}", "pick the right name: {o}",
    ],
    "which": [
        "is this {x} or {y}", "is it {x} or {y}", "which is it, {x} or {y}", "is that {x} or {y}",
        "{x} or {y}", "does the {i} show {x} or {y}", "is there {x} or {y} in the {i}",
        "do you see {x} or {y}", "what is shown, {x} or {y}", "what is this, {x} or {y}",
        "which of the two is it, {x} or {y}", "is the object {x} or {y}", "is this a {i} of {x} or {y}",
        "which one is shown: {x} or {y}", "would you call this {x} or {y}", "what do you see, {x} or {y}",
        "can you see {x} or {y}", "tell me which it is, {x} or {y}", "is the thing shown {x} or {y}",
        "do we have {x} or {y} here", "are we looking at {x} or {y}", "is {x} in the {i} or {y}",
        "which is shown here: {x} or {y}",
    ],
    "is": LOOKS,
    "is_not": LACKS,
    "category": [
        "what kind of thing is this", "what kind of object is this", "what type of thing is this",
        "what type of object is shown", "what sort of thing is this", "what sort of object is it",
        "what category is this", "which category does this belong to",
        "what is the category of this object", "what class of thing is this",
        "what kind of thing is shown", "what kind of thing is in the {i}",
        "what group does this belong to", "name the category", "what category does the object belong to",
        "what kind of thing do you see", "which kind of object is this", "what type is this",
        "what's the category", "tell me what kind of thing this is", "which type of thing is it",
        "of what kind is this", "what sort of thing does the {i} show", "which category is it in",
    ],
    "colour": [
        "what {c} is this", "what {c} is it", "what {c} is the {n}", "which {c} is the {n}",
        "what is the {c}", "what is the {c} of the {n}", "what is the main {c}", "what {c} is the object",
        "which {c} is it", "what {c} does the {n} have", "what {c} is shown", "name the {c}",
        "tell me the {c}", "which {c} is this", "what {c} do you see", "name the {c} of the {n}",
        "what is the main {c} of the {n}", "what {c} is the thing in the {i}",
        "tell me the {c} of the {n}", "which {c} does it have", "what is its {c}",
        "what {c} is the {n} in the {i}", "in what {c} is the {n} drawn", "what's the {c} here",
        "what {c} does this {n} have", "can you name the {c} of the {n}", "the {c} is",
        "do you know the {c} of this", "what {c} would you call this {n}", "what's its {c}",
        "of which {c} is it", "could you tell me the {c}", "what {c} has the {n}", "what {c} is this {n}",
        "which {c} do you see here",
    ],
    "shape": [
        "what shape is this", "what shape is it", "what shape is shown", "which shape is this",
        "name the shape", "what shape is in the {i}", "which shape is shown", "what is the shape",
        "what shape do you see", "what is the shape of the object", "what is the shape in the {i}",
        "which shape do you see", "what shape does the {i} show", "what shape can you see",
        "what figure is this", "name the figure", "what form is this", "what kind of shape is this",
        "what type of shape is it", "identify the shape", "tell me the shape", "what is the {k} shape",
        "what shape is the {k} object", "which shape is {k}", "what is the {k} object",
        "what is the {k} figure", "what shape is the {k} thing", "what {k} shape is this",
        "which shape does the {i} contain", "what shape does the object have", "what shape is drawn here",
        "what's the shape", "what's this shape", "could you tell me the shape",
        "do you know what shape it is", "which geometric figure do you see", "what geometric shape is it",
        "what shape appears here", "what shape is there", "what shape is visible",
        "which shape is present in the {i}", "of what shape is the object", "what is the shape called",
    ],
}  # fmt: skip
PICTURES = ["image", "picture", "photo", "drawing", "icon", "illustration"]
# What each kind of image is asked, with weights. "own" are easy-VQA's questions in their own words.
ARTWORK_KINDS = {"name": 7, "options": 3, "which": 2, "is": 5, "is_not": 2, "category": 2, "colour": 6}
SHAPE_KINDS = {"own": 8, "shape": 2, "colour": 2, "is": 3, "is_not": 1, "which": 2, "name": 0.5}


@dataclass(frozen=True)
class Shown:
    """What an image shows, as far as it is known. A shape's kind of thing is `shape`."""

    name: str | None
    category: str
    colour: str | None


def shape_facts(pairs: Sequence[tuple[str, str]]) -> Shown:
    """The shape and colour that easy-VQA's questions and answers about an image give away."""
    told = []
    for text, answer in pairs:
        words = text.strip("?").split()
        denied = "not" in words or "no" in words
        if words[0] == "what" or answer == ("no" if denied else "yes"):
            told += [answer, *words]
    shape = next((word for word in told if word in SHAPES), None)
    return Shown(shape, "shape", next((word for word in told if word in SHAPE_COLOURS), None))


def with_article(name: str) -> str:
    """A thing as it is spoken of: an apple, a dog, scissors."""
    if name in BARE or (name.endswith("s") and not name.endswith(("ss", "us", "bus"))):
        return name
    return f"an {name}" if name[0] in "aeiou" and not name.startswith("uni") else f"a {name}"


class Asker:
    """Makes questions and their answers about what an image shows."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.categories = data.category_of()
        self.names = data.read_labels()

    def another_name(self, shown: Shown) -> str:
        """A wrong name, often one of the same category."""
        if shown.category == "shape":
            pool = SHAPES
        elif self.random.random() < 0.5:
            pool = [name for name in self.names if self.categories[name] == shown.category]
        else:
            pool = self.names
        return self.random.choice([name for name in pool if name != shown.name])

    def claim(self, shown: Shown, true: bool) -> str | None:
        """A noun phrase without article that is true or false of the image."""
        if shown.category == "shape":
            return self.shape_claim(shown, true)
        if self.random.random() < 0.25:
            kinds = [kind for kind in data.CATEGORIES if kind != shown.category and kind != "object"]
            if true and shown.category == "object":
                return None
            return shown.category if true else self.random.choice(kinds)
        name = str(shown.name) if true else self.another_name(shown)
        return SYNONYMS.get(name, name) if self.random.random() < 0.4 else name

    def shape_claim(self, shown: Shown, true: bool) -> str | None:
        """A claim on shape, colour or both."""
        shape, colour = shown.name, shown.colour
        other_shape = self.random.choice([word for word in SHAPES if word != shape])
        other_colour = self.random.choice([word for word in SHAPE_COLOURS if word != colour])
        pick = self.random.random()
        if pick < 0.4:
            return shape if true else shape and other_shape
        noun = self.random.choice(["shape", "shape", "object", "thing", "figure"])
        if pick < 0.8:
            word = colour if true else colour and other_colour
            return word and f"{word} {noun}"
        if not shape or not colour:
            return None
        wrong = [f"{other_colour} {shape}", f"{colour} {other_shape}", f"{other_colour} {other_shape}"]
        return f"{colour} {shape}" if true else self.random.choice(wrong)

    def ask(self, kind: str, template: str, shown: Shown) -> tuple[str, str] | None:
        """A template's question about an image with its answer; None where the image does not have one."""
        words = {"i": self.random.choice(PICTURES), "c": self.random.choice(["color", "colour"])}
        answerers: dict[str, Callable[[dict[str, str], Shown], str | None]] = {
            "name": lambda words, shown: shown.name,
            "options": self.offer,
            "which": self.oppose,
            "is": lambda words, shown: self.state(words, shown, "yes", "no"),
            "is_not": lambda words, shown: self.state(words, shown, "no", "yes"),
            "category": lambda words, shown: shown.category,
            "colour": self.colour,
            "shape": self.shape,
        }
        answer = answerers[kind](words, shown)
        return (template.format(**words), answer) if answer else None

    def state(self, words: dict[str, str], shown: Shown, if_true: str, if_false: str) -> str | None:
        """Fill in a claim."""
        true = self.random.random() < 0.5
        claim = self.claim(shown, true)
        if claim is None:
            return None
        words.update(x=with_article(claim), n=claim)
        return if_true if true else if_false

    def oppose(self, words: dict[str, str], shown: Shown) -> str | None:
        """Fill in a right and a wrong name, or colours for half the shapes."""
        right, wrong = shown.name, self.another_name(shown)
        phrase: Callable[[str], str] = with_article
        if shown.category == "shape" and self.random.random() < 0.5:
            right, phrase = shown.colour, str
            wrong = self.random.choice([word for word in SHAPE_COLOURS if word != right])
        if right is None:
            return None
        words["x"], words["y"] = self.random.sample([phrase(right), phrase(wrong)], 2)
        return right

    def offer(self, words: dict[str, str], shown: Shown) -> str | None:
        """Fill in a list of options that holds the right name."""
        count = self.random.randint(1, 5) if self.random.random() < 0.7 else self.random.randint(5, 9)
        options = [str(shown.name), *dict.fromkeys(self.another_name(shown) for _ in range(count))]
        self.random.shuffle(options)
        question = self.random.choice(TEMPLATES["name"]).format(**words)
        words.update(q=self.random.choice(["{}?", "{}"]).format(question), o=", ".join(options))
        return shown.name

    def colour(self, words: dict[str, str], shown: Shown) -> str | None:
        """Fill in what has the colour."""
        general = ["shape", "object", "figure", "thing"]
        words["n"] = self.random.choice([str(shown.name), "object"] if shown.category != "shape" else general)
        if shown.category == "shape" and shown.name and self.random.random() < 0.4:
            words["n"] = shown.name
        return shown.colour

    def shape(self, words: dict[str, str], shown: Shown) -> str | None:
        """Fill in the colour of the shape that is asked for."""
        words["k"] = shown.colour or ""
        return shown.name if shown.colour else None

    def restyle(self, question: str) -> str:
        """A question as people type it: with or without capitals, question mark and politeness."""
        pick = self.random.random
        if pick() < 0.04:
            question = self.random.choice(["please tell me: ", "can you tell me, ", "look. ", "hi, "]) + question
        if pick() < 0.05:
            question += self.random.choice([" please", " in one word", ", please"])
        ending = self.random.choices(["?", "", ".", " ?"], [70, 18, 10, 2])[0]
        question += ending
        if pick() < 0.6:
            question = question[0].upper() + question[1:]
        elif pick() < 0.06:
            question = question.upper()
        if pick() < 0.02:
            question = question.replace(" ", "  ", 1)
        return question

    def about(self, shown: Shown, own: Sequence[tuple[str, str]] = ()) -> tuple[str, str]:
        """One random question about an image, its answer too."""
        kinds = SHAPE_KINDS if own else ARTWORK_KINDS
        while True:
            kind = self.random.choices(list(kinds), list(kinds.values()))[0]
            if kind == "own":
                question, answer = self.random.choice(own)
                return (question if self.random.random() < 0.7 else self.restyle(question.strip("?"))), answer
            if kind == "name" and not own and self.random.random() < 0.35:
                return RECOGNITION, str(shown.name)
            asked = self.ask(kind, self.random.choice(TEMPLATES[kind]), shown)
            if asked is not None:
                return self.restyle(asked[0]), asked[1]
