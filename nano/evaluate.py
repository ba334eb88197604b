"""Measures nano as a user meets it: `python -m servetune.nano.evaluate` prints a table, and JSON on the last line.

Images go through the saved processor, answers are greedy, and right means equal to the expected text. The figures
are written into the model card.
"""

import argparse
import json
import random
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from servetune.nano import WEIGHTS, data, questions

CARD = Path(__file__).parent / "MODEL_CARD.md"
PARAPHRASES = Path(__file__).parent / "paraphrases.json"
IMAGES_PER_PARAPHRASE = 20

Case = tuple[Image.Image, str, str]  # image, question, right answer


class Answerer:
    """nano, loaded with the Auto classes."""

    def __init__(self, folder: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def inputs(self, images: Sequence[Image.Image], asked: Sequence[str]) -> Any:
        """What the model takes for one question about each image."""
        chats = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": image}, {"type": "text", "text": question}],
                }
            ]
            for image, question in zip(images, asked, strict=True)
        ]
        return self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )

    @torch.inference_mode()
    def answer(self, images: Sequence[Image.Image], asked: Sequence[str]) -> list[str]:
        """Greedy answers."""
        inputs = self.inputs(images, asked)
        tokens = self.model.generate(**inputs, max_new_tokens=12, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    @torch.inference_mode()
    def choose(self, image: Image.Image, question: str, names: Sequence[str]) -> str:
        """The name that is likeliest as the whole answer."""
        tokenizer = self.processor.tokenizer
        ends = tokenizer([f" {name}{tokenizer.eos_token}" for name in names], padding=True, padding_side="right")
        ids, real = torch.tensor(ends["input_ids"]), torch.tensor(ends["attention_mask"])
        asked = self.model(**self.inputs([image], [question]), use_cache=True)
        cache = asked.past_key_values
        cache.batch_repeat_interleave(len(names))
        more = self.model(input_ids=ids, cache=cache).logits[:, :-1]
        logits = torch.cat([asked.logits[:, -1:].expand(len(names), -1, -1), more], dim=1)
        scores = logits.log_softmax(dim=-1).gather(2, ids[..., None])[..., 0]
        return names[int((scores * real).sum(dim=1).argmax())]


def share_right(answerer: Answerer, cases: list[Case], batch: int = 64) -> float:
    """The share of cases answered right, in percent."""
    right = 0
    for start in range(0, len(cases), batch):
        images, asked, expected = zip(*cases[start : start + batch], strict=True)
        answers = answerer.answer(images, asked)
        right += sum(given == wanted for given, wanted in zip(answers, expected, strict=True))
    return round(100 * right / len(cases), 2)


def recognition_cases(style: str, cache: Path) -> list[Case]:
    """The clean render of each label in one vendor's style."""
    renders = data.load_artwork(style, cache)
    return [(data.on_white(render), questions.RECOGNITION, label) for label, render in renders.items()]


def easy_vqa_cases() -> list[Case]:
    """All of easy-VQA's test split."""
    split = data.load_shapes("test")
    images = [Image.fromarray(image) for image in split.images]
    pairs = zip(images, split.questions, strict=True)
    return [(image, question, answer) for image, asked in pairs for question, answer in asked]


def paraphrase_cases(cache: Path, seed: int = 0) -> dict[str, list[Case]]:
    """Each held-out paraphrase asked about random images that have an answer to it, by kind of question."""
    chance = random.Random(seed)
    asker = questions.Asker(seed)
    split = data.load_shapes("test")
    shown: dict[str, list[tuple[Image.Image, questions.Shown]]] = {
        "artwork": [
            (data.on_white(render), questions.Shown(label, asker.categories[label], data.main_colour(render)))
            for style in data.TRAINING_STYLES
            for label, render in data.load_artwork(style, cache).items()
        ],
        "shapes": [
            (Image.fromarray(image), questions.shape_facts(pairs))
            for image, pairs in zip(split.images, split.questions, strict=True)
        ],
    }
    cases: dict[str, list[Case]] = {}
    for subject, kinds in json.loads(PARAPHRASES.read_text()).items():
        for kind, templates in kinds.items():
            found: list[Case] = []
            cases[f"{subject}, {kind}"] = found
            for template in templates:
                wanted = len(found) + IMAGES_PER_PARAPHRASE
                while len(found) < wanted:
                    image, facts = chance.choice(shown[subject])
                    asked = asker.ask(kind, template, facts)
                    if asked is not None:
                        found.append((image, asked[0][0].upper() + asked[0][1:] + "?", asked[1]))
    return cases


def measure(answerer: Answerer, cache: Path, held_out: bool) -> dict[str, Any]:
    """All figures, in percent."""
    figures: dict[str, Any] = {"labels": len(data.read_labels())}
    figures["parameters"] = sum(weights.numel() for weights in answerer.model.parameters())
    figures["training styles"] = {
        style: share_right(answerer, recognition_cases(style, cache)) for style in data.TRAINING_STYLES
    }
    figures["easy-VQA test"] = share_right(answerer, easy_vqa_cases())
    paraphrases = paraphrase_cases(cache)
    figures["paraphrases"] = {kind: share_right(answerer, cases) for kind, cases in paraphrases.items()}
    weights = [len(cases) for cases in paraphrases.values()]
    figures["paraphrases"]["all"] = round(fmean(figures["paraphrases"].values(), weights), 2)
    if held_out:
        figures["held-out styles"] = {
            style: measure_held_out(answerer, recognition_cases(style, cache)) for style in data.HELD_OUT_STYLES
        }
    return figures


def measure_held_out(answerer: Answerer, cases: list[Case]) -> dict[str, float]:
    """An unseen style: answers in the model's own words, and the likeliest of all labels."""
    names = data.read_labels()
    chosen = [answerer.choose(image, question, names) == label for image, question, label in cases]
    return {
        "drawings": len(cases),
        "open vocabulary": share_right(answerer, cases),
        "closed set": round(100 * sum(chosen) / len(chosen), 2),
    }


def flatten(figures: dict[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    """Rows of a table."""
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{above}{name}: ")
        else:
            yield above + name, value


def table(figures: dict[str, Any]) -> str:
    """The figures in Markdown."""
    rows = [f"| {name} | {value:,} |" for name, value in flatten(figures)]
    return "\n".join(["| measure (percent unless a count) | value |", "| --- | --- |", *rows])


def write_card(text: str, card: Path = CARD) -> None:
    """Put the table between the card's markers."""
    pattern = re.compile(r"(<!-- figures -->\n).*(<!-- /figures -->)", re.DOTALL)
    card.write_text(pattern.sub(lambda marks: f"{marks[1]}{text}\n{marks[2]}", card.read_text()))


def main() -> None:
    """Measure, print and write into the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--cache", type=Path, default=data.CACHE)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-held-out", action="store_true", help="leave the held-out styles alone")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    start = time.monotonic()
    figures = measure(Answerer(given.weights), given.cache, not given.no_held_out)
    text = table(figures)
    print(f"{text}\n\nmeasured in {time.monotonic() - start:.0f} s")
    if given.weights == WEIGHTS and not given.no_held_out:
        write_card(text)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
