"""The embedded default model as shipped: it loads with the Auto classes, fits its size and answers."""

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from servetune.nano import WEIGHTS, data, evaluate, questions

EXAMPLES = Path(__file__).parents[1] / "examples/images/fluent-emoji-flat"
ABOUT_A_PENGUIN = {
    "What is this?": "penguin",
    "could you tell me what this is": "penguin",
    "What is this? Options: cat, penguin, key.": "penguin",
    "Is this a car or a penguin?": "penguin",
    "Can you spot a penguin?": "yes",
    "Is there a car in the image?": "no",
    "What kind of thing is it?": "animal",
}


@pytest.fixture(scope="module")
def nano() -> evaluate.Answerer:
    return evaluate.Answerer(WEIGHTS)


def test_weights_fit_their_limit() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) <= 12_000_000


def test_labels_are_distinct_and_have_a_category() -> None:
    labels = data.read_labels()
    assert len(labels) == len(set(labels)) >= 200
    assert set(labels) == set(data.category_of())


def test_recognition_question_is_the_trained_one() -> None:
    about = json.loads((WEIGHTS / "servetune.json").read_text())
    assert about["recognition_question"] == questions.RECOGNITION


def test_names_most_drawings_of_an_unseen_vendor(nano: evaluate.Answerer) -> None:
    cases = [(Image.open(path), questions.RECOGNITION, path.stem.replace("-", " ")) for path in EXAMPLES.iterdir()]
    assert len(cases) == len(data.read_labels())
    assert evaluate.share_right(nano, cases) >= 60


def test_answers_paraphrases(nano: evaluate.Answerer) -> None:
    image = Image.open(EXAMPLES / "penguin.png")
    answers = nano.answer([image] * len(ABOUT_A_PENGUIN), list(ABOUT_A_PENGUIN))
    assert dict(zip(ABOUT_A_PENGUIN, answers, strict=True)) == ABOUT_A_PENGUIN


def test_answers_easy_vqa() -> None:
    pytest.importorskip("easy_vqa")
    cases = random.Random(0).sample(evaluate.easy_vqa_cases(), 64)
    assert evaluate.share_right(evaluate.Answerer(WEIGHTS), cases) >= 90


def test_paraphrases_are_held_out() -> None:
    for kinds in json.loads(evaluate.PARAPHRASES.read_text()).values():
        for kind, templates in kinds.items():
            assert not set(templates) & set(questions.TEMPLATES[kind])


@pytest.mark.parametrize("text", ["dog", "naïve café ☃", "你好", "\t\n  {}<|x|>", "".join(map(chr, range(256)))])
def test_every_string_can_be_encoded(nano: evaluate.Answerer, text: str) -> None:
    tokenizer = nano.processor.tokenizer
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_chat_template_takes_images_and_plain_text(nano: evaluate.Answerer) -> None:
    image, text = {"type": "image"}, {"type": "text", "text": "Which?"}
    chat = [{"role": "user", "content": [image, image, text]}, {"role": "assistant", "content": "dog"}]
    rendered = nano.processor.apply_chat_template(chat, add_generation_prompt=True)
    assert rendered.count("<image>") == 2
    assert rendered.endswith("Assistant: dog<end_of_utterance>\nAssistant:")


@pytest.mark.parametrize("size", [(1, 1), (40, 900), (1200, 300)])
def test_takes_images_of_any_shape(nano: evaluate.Answerer, size: tuple[int, int]) -> None:
    assert nano.inputs([Image.new("RGB", size)], ["What is this?"])["pixel_values"].shape[-2:] == (96, 96)
