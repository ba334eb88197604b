"""The recipe of nano: `python -m servetune.nano.train` makes `nano/weights/` from the registries' packages.

Stage 1 trains the vision tower as a classifier of the artwork's names and of easy-VQA's shapes and colours;
stage 2 trains the whole model on questions and answers, in rounds that each start at a lower learning rate.
Augmentation ramps up during stage 1 and stays.
"""

import argparse
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Idefics3ForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

from servetune.nano import WEIGHTS, augment, data, model, questions

BATCH = 128
SHAPE_SHARE = 3 / 16  # views of easy-VQA in a batch; the rest is artwork
CLEAN_SHARE = 1 / 5  # views near the clean render, at any time of the training
CHUNKS = 3  # of questions of similar length, per part of a batch
VIEWS = [160_000, 200_000]  # of each round of stage 2
Part = TypeVar("Part")


@dataclass
class Views:
    """A batch of augmented images, artwork first, and what they show."""

    pixels: Tensor  # (N, 3, H, W), normalised to [-1, 1]
    labels: Tensor  # artwork: index of its label
    styles: Tensor  # artwork: index of its vendor
    shapes: Tensor  # easy-VQA: index of its image
    keep_hue: Tensor  # artwork: whether its colours are the drawing's own


class Source:
    """All training images on the training device."""

    def __init__(self, cache: Path, device: torch.device) -> None:
        self.device = device
        artwork = data.load_training_artwork(cache)
        self.artwork = torch.from_numpy(artwork).to(device)  # (style, label, H, W, 4)
        self.colours = [[data.main_colour(render) for render in style] for style in artwork]
        self.easy_vqa = data.load_shapes("train")
        side = (data.IMAGE_SIZE, data.IMAGE_SIZE)
        resized = [np.asarray(Image.fromarray(image).resize(side)) for image in self.easy_vqa.images]
        self.shapes = torch.from_numpy(np.stack(resized)).to(device)

    def views(self, count: int, strength: float) -> Views:
        """A batch at an augmentation strength, part of it nearly clean."""
        num_shapes = int(count * SHAPE_SHARE)
        num_art = count - num_shapes
        styles = torch.randint(self.artwork.shape[0], (num_art,), device=self.device)
        labels = torch.randint(self.artwork.shape[1], (num_art,), device=self.device)
        shapes = torch.randint(len(self.shapes), (num_shapes,), device=self.device)
        clean = torch.rand(num_art, device=self.device) < CLEAN_SHARE
        strengths = strength * torch.rand(num_art, device=self.device).sqrt()
        strengths = torch.where(clean, 0.1 * strengths, strengths)
        keep_hue = clean | (torch.rand(num_art, device=self.device) < 0.2)
        art = augment.view_artwork(self.artwork[styles, labels], strengths, keep_hue)
        drawn = augment.view_shapes(self.shapes[shapes], strength * torch.rand(num_shapes, device=self.device))
        return Views(torch.cat([art, drawn]) * 2 - 1, labels, styles, shapes, keep_hue)


class Optimiser:
    """Muon for matrices and AdamW for the rest, on float32 masters of a bfloat16 model, with an average."""

    def __init__(self, module: nn.Module, steps: int, lr: float) -> None:
        self.module, self.steps, self.done = module, steps, 0
        self.master = copy.deepcopy(module).float()
        self.average = copy.deepcopy(self.master).requires_grad_(False)
        module.to(torch.bfloat16)
        layers = {p for name, p in self.master.named_parameters() if ".layers." in name and p.ndim == 2}
        rest = [p for p in self.master.parameters() if p not in layers]
        muon = torch.optim.Muon(layers, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(rest, lr=lr / 2, weight_decay=0.02, betas=(0.9, 0.98))
        self.parts = [(muon, lr), (adam, lr / 2)]

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """One update from the gradients of the module's parameters."""
        for master, gradient in zip(self.master.parameters(), gradients, strict=True):
            master.grad = gradient
        nn.utils.clip_grad_norm_(self.master.parameters(), 1.0)
        self.done += 1
        warm = min(1.0, self.done / 100)
        scale = warm * (0.01 + 0.99 * (1 + math.cos(math.pi * self.done / self.steps)) / 2)
        for part, lr in self.parts:
            part.param_groups[0]["lr"] = lr * scale
            part.step()
        keep = min(0.995, self.done / (self.done + 20))
        trio = (self.master.parameters(), self.module.parameters(), self.average.parameters())
        with torch.no_grad():
            for master, working, average in zip(*trio, strict=True):
                working.copy_(master)
                average.lerp_(master, 1 - keep)


class Classifier(nn.Module):
    """The vision tower with a linear head over labels, shapes and colours."""

    def __init__(self, tower: Idefics3VisionTransformer, num_classes: int) -> None:
        super().__init__()
        self.tower = tower
        self.head = nn.Linear(tower.config.hidden_size, num_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.head(self.tower(pixel_values=pixels).last_hidden_state.mean(dim=1))
        return logits


def train(
    name: str, optimiser: Optimiser, workers: int, prepare: Callable[[int], Part], loss: Callable[[Part], Tensor]
) -> Iterator[int]:
    """Steps of training. Workers learn from parts of a batch side by side while their next parts are made."""
    parameters = list(optimiser.module.parameters())

    def learn(part: Part) -> tuple[float, Sequence[Tensor | None]]:
        value = loss(part)
        return value.item(), torch.autograd.grad(value, parameters, allow_unused=True)

    def mean(gradients: Sequence[Tensor | None]) -> Tensor | None:
        given = [gradient.float() for gradient in gradients if gradient is not None]
        return torch.stack(given).mean(dim=0) if given else None

    start = time.monotonic()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        parts = [prepare(0) for _ in range(workers)]
        for step in range(optimiser.steps):
            learning = [pool.submit(learn, part) for part in parts]
            parts = [prepare(step + 1) for _ in range(workers)]
            values, gradients = zip(*(part.result() for part in learning), strict=True)
            optimiser.step([mean(of_one) for of_one in zip(*gradients, strict=True)])
            if (step + 1) % 50 == 0 or step + 1 == optimiser.steps:
                pace = (step + 1) / (time.monotonic() - start)
                left = (optimiser.steps - step - 1) / pace / 60
                line = f"{name} {step + 1}/{optimiser.steps}: loss {fmean(values):.3f}"
                print(f"{line}, {pace * BATCH:.0f} views/s, {left:.1f} min left", flush=True)
            yield step


def shape_targets(source: Source) -> Tensor:
    """The classes of each easy-VQA image: its shape and its colour, (N, 2); -100 where neither is told."""
    facts = [questions.shape_facts(pairs) for pairs in source.easy_vqa.questions]
    shapes = {word: index for index, word in enumerate(questions.SHAPES)}
    colours = {word: index for index, word in enumerate(questions.SHAPE_COLOURS)}
    return torch.tensor(
        [[shapes.get(fact.name or "", -100), colours.get(fact.colour or "", -100)] for fact in facts]
    )


def train_tower(tower: Idefics3VisionTransformer, source: Source, views: int, workers: int) -> nn.Module:
    """Stage 1: the trained tower."""
    num_labels = source.artwork.shape[1]
    num_shapes = len(questions.SHAPES)
    targets = shape_targets(source).to(source.device)
    classifier = Classifier(tower, num_labels + num_shapes + len(questions.SHAPE_COLOURS)).to(source.device)
    optimiser = Optimiser(classifier, views // BATCH, lr=3e-3)

    def prepare(step: int) -> Views:
        return source.views(BATCH // workers, strength=min(1.0, 0.2 + 1.2 * step / optimiser.steps))

    def loss(batch: Views) -> Tensor:
        logits = classifier(batch.pixels.bfloat16()).float()
        art, drawn = logits.split([len(batch.labels), len(batch.shapes)])
        shape, colour = targets[batch.shapes].T
        drawn = drawn[:, num_labels:]
        named = F.cross_entropy(art[:, :num_labels], batch.labels, label_smoothing=0.05)
        shaped = F.cross_entropy(drawn[:, :num_shapes], shape)
        return named + 0.1 * shaped + 0.1 * F.cross_entropy(drawn[:, num_shapes:], colour)

    for _ in train("tower", optimiser, workers, prepare, loss):
        pass
    return optimiser.average.get_submodule("tower")


def make_tower(
    nano: Idefics3ForConditionalGeneration, source: Source, views: int, workers: int, cache: Path
) -> dict[str, Tensor]:
    """Stage 1, or with no views the tower that an earlier run left in the cache."""
    path = cache / "tower.safetensors"
    if views:
        tower = train_tower(copy.deepcopy(nano.model.vision_model), source, views, workers)
        save_file(tower.state_dict(), path)
    state: dict[str, Tensor] = load_file(path)
    return state


def recipe_text(asker: questions.Asker, shown: list[questions.Shown], own: list[tuple[str, str]]) -> Iterator[str]:
    """The text that the tokenizer is made of."""
    for _ in range(20_000):
        question, answer = asker.about(asker.random.choice(shown))
        yield f"{model.START}User: {question}{model.END}\nAssistant: {answer}{model.END}\n"
    for name in asker.names * 20:
        yield f" {name}"
    for question, answer in own:
        yield f" {question} {answer}"


class Teacher:
    """Questions and answers about batches of views, as padded token sequences."""

    def __init__(self, source: Source, seed: int, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
        self.source = source
        self.asker = questions.Asker(seed)
        kinds = self.asker.categories
        names = self.asker.names
        self.art = [
            [questions.Shown(name, kinds[name], colour) for name, colour in zip(names, colours, strict=True)]
            for colours in source.colours
        ]
        self.shapes = [questions.shape_facts(pairs) for pairs in source.easy_vqa.questions]
        own = [pair for pairs in source.easy_vqa.questions for pair in pairs]
        shown = [view for style in self.art for view in style]
        self.tokenizer = tokenizer or model.build_tokenizer(recipe_text(self.asker, shown, own[:5000]))

    def ask(self, views: Views) -> list[tuple[str, str]]:
        """A question and its answer about each view."""
        pairs = []
        rows = (views.styles.tolist(), views.labels.tolist(), views.keep_hue.tolist())
        for style, label, keep_hue in zip(*rows, strict=True):
            shown = self.art[style][label]
            pairs.append(self.asker.about(shown if keep_hue else dataclasses.replace(shown, colour=None)))
        for index in views.shapes.tolist():
            pairs.append(self.asker.about(self.shapes[index], self.source.easy_vqa.questions[index]))
        return pairs

    def encode(self, pairs: list[tuple[str, str]]) -> list[tuple[list[int], int]]:
        """The tokens of each conversation and where its answer starts."""
        prompts = [model.prompt(question, self.asker.random.random() < 0.9) for question, _ in pairs]
        answers = [f" {answer}{model.END}" for _, answer in pairs]
        asked, answered = self.tokenizer(prompts)["input_ids"], self.tokenizer(answers)["input_ids"]
        return [(one + other, len(one)) for one, other in zip(asked, answered, strict=True)]

    def pad(self, sequences: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
        """Right-padded token ids and a mask of the positions whose next token is part of the answer."""
        length = max(len(tokens) for tokens, _ in sequences)
        ids = torch.full((len(sequences), length), self.tokenizer.pad_token_id)
        answer = torch.zeros((len(sequences), length), dtype=torch.bool)
        for row, (tokens, start) in enumerate(sequences):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            answer[row, start - 1 : len(tokens) - 1] = True
        return ids.to(self.source.device), answer.to(self.source.device)


def answer_loss(nano: Idefics3ForConditionalGeneration, features: Tensor, ids: Tensor, answer: Tensor) -> Tensor:
    """Summed loss of the answers' tokens, given the image features of each sequence, (N, tokens, width)."""
    embeds = nano.get_input_embeddings()(ids).flatten(0, 1)
    image = (ids.flatten() == nano.config.image_token_id).nonzero()[:, 0]
    embeds = embeds.index_copy(0, image, features.flatten(0, 1)).view(*ids.shape, -1)
    hidden = nano.model.text_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    places = answer.flatten().nonzero()[:, 0]
    logits = nano.lm_head(hidden.flatten(0, 1).index_select(0, places))
    return F.cross_entropy(logits.float(), ids.roll(-1, dims=1)[answer], reduction="sum")


def train_model(
    nano: Idefics3ForConditionalGeneration,
    teacher: Teacher,
    views: int,
    lr: float,
    asked: int,
    workers: int,
    save_every: int,
    folder: Path,
) -> nn.Module:
    """A round of stage 2: the whole model, each view asked several questions."""
    optimiser = Optimiser(nano, views // BATCH, lr)

    def prepare(step: int) -> tuple[Views, list[tuple[Tensor, Tensor, Tensor]]]:
        batch = teacher.source.views(BATCH // workers, strength=1.0)
        sequences = [one for _ in range(asked) for one in teacher.encode(teacher.ask(batch))]
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index][0]))
        chunks = []
        for chunk in np.array_split(order, CHUNKS):
            rows = torch.from_numpy(chunk % len(batch.pixels)).to(batch.pixels.device)
            chunks.append((rows, *teacher.pad([sequences[index] for index in chunk])))
        return batch, chunks

    def loss(part: tuple[Views, list[tuple[Tensor, Tensor, Tensor]]]) -> Tensor:
        batch, chunks = part
        tower = nano.model.vision_model(pixel_values=batch.pixels.bfloat16()).last_hidden_state
        features = nano.model.connector(tower)  # (N, tokens, width)
        losses = [answer_loss(nano, features.index_select(0, rows), ids, answer) for rows, ids, answer in chunks]
        return torch.stack(losses).sum() / sum(int(answer.sum()) for _, _, answer in chunks)

    for step in train("model", optimiser, workers, prepare, loss):
        if (step + 1) % save_every == 0 or step + 1 == optimiser.steps:
            model.save(copy.deepcopy(optimiser.average).to(torch.bfloat16), teacher.tokenizer, folder)
    return optimiser.average


def main() -> None:
    """The whole recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=data.CACHE, help="downloads, renders and the trained tower")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=2, help="threads, each with a part of the batch")
    parser.add_argument("--tower-views", type=int, default=200_000, help="0: take the tower of an earlier run")
    parser.add_argument("--views", type=int, nargs="+", default=VIEWS, help="images of each round of stage 2")
    parser.add_argument("--start", type=Path, help="a model to go on with, after its first round")
    parser.add_argument("--questions", type=int, default=2, help="questions per image of stage 2")
    parser.add_argument("--save-every", type=int, default=250, help="steps of stage 2")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    torch.set_num_threads(1)
    source = Source(given.cache, torch.device(given.device))
    known = model.load_tokenizer(given.start) if given.start else None
    teacher = Teacher(source, given.seed, known)
    nano = Idefics3ForConditionalGeneration(model.config(teacher.tokenizer))
    nano.to(source.device).set_attn_implementation("eager")  # on a CPU faster to train than fused attention
    if given.start:
        started = Idefics3ForConditionalGeneration.from_pretrained(given.start, dtype=torch.float32)
        nano.load_state_dict(started.state_dict())
    else:
        nano.model.vision_model.load_state_dict(
            make_tower(nano, source, given.tower_views, given.workers, given.cache)
        )
    print(f"{sum(p.numel() for p in nano.parameters()):,} parameters", flush=True)
    for had, views in enumerate(given.views, start=1 if given.start else 0):
        lr = 2e-3 / (1 + had)
        options = (given.questions, given.workers, given.save_every, given.out)
        trained = train_model(nano, teacher, views, lr, *options)
        nano.float().load_state_dict(trained.state_dict())


if __name__ == "__main__":
    main()
