"""The recipe of nano: `python -m servetune.nano.train` makes `nano/weights/` from the registries' packages.

Stage 1 trains the vision tower as a classifier of the artwork's names and of easy-VQA's shapes and colours;
stage 2 trains the whole model on questions and answers. Augmentation ramps up during stage 1 and stays.
"""

import argparse
import copy
import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Idefics3ForConditionalGeneration
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

from servetune.nano import WEIGHTS, augment, data, model, questions

BATCH = 128
SHAPE_SHARE = 1 / 8  # views of easy-VQA in a batch; the rest is artwork
CLEAN_SHARE = 1 / 5  # views near the clean render, at any time of the training


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
        keep_hue = torch.rand(num_art, device=self.device) < 0.2
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

    def step(self) -> None:
        """One update from the module's gradients."""
        for master, working in zip(self.master.parameters(), self.module.parameters(), strict=True):
            master.grad = None if working.grad is None else working.grad.float()
            working.grad = None
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


def progress(steps: int, batch: int, name: str) -> Iterator[int]:
    """Step numbers, with a line on pace and time left now and then."""
    start = time.monotonic()
    for step in range(steps):
        yield step
        if (step + 1) % 50 == 0 or step + 1 == steps:
            pace = (step + 1) / (time.monotonic() - start)
            left = (steps - step - 1) / pace
            print(f"{name} {step + 1}/{steps}: {pace * batch:.0f} views/s, {left / 60:.1f} min left", flush=True)


def shape_targets(source: Source) -> Tensor:
    """The classes of each easy-VQA image: its shape and its colour, (N, 2); -100 where neither is told."""
    facts = [questions.shape_facts(pairs) for pairs in source.easy_vqa.questions]
    shapes = {word: index for index, word in enumerate(questions.SHAPES)}
    colours = {word: index for index, word in enumerate(questions.SHAPE_COLOURS)}
    return torch.tensor(
        [[shapes.get(fact.name or "", -100), colours.get(fact.colour or "", -100)] for fact in facts]
    )


def train_tower(tower: Idefics3VisionTransformer, source: Source, views: int) -> nn.Module:
    """Stage 1: the trained tower."""
    num_labels = source.artwork.shape[1]
    num_shapes = len(questions.SHAPES)
    targets = shape_targets(source).to(source.device)
    classifier = Classifier(tower, num_labels + num_shapes + len(questions.SHAPE_COLOURS)).to(source.device)
    steps = views // BATCH
    optimiser = Optimiser(classifier, steps, lr=3e-3)
    for step in progress(steps, BATCH, "tower"):
        batch = source.views(BATCH, strength=min(1.0, 0.2 + 1.2 * step / steps))
        logits = classifier(batch.pixels.bfloat16()).float()
        art, drawn = logits.split([len(batch.labels), len(batch.shapes)])
        shape, colour = targets[batch.shapes].T
        drawn = drawn[:, num_labels:]
        loss = F.cross_entropy(art[:, :num_labels], batch.labels, label_smoothing=0.05)
        loss = loss + 0.1 * F.cross_entropy(drawn[:, :num_shapes], shape)
        loss = loss + 0.1 * F.cross_entropy(drawn[:, num_shapes:], colour)
        torch.autograd.backward(loss)
        optimiser.step()
        if (step + 1) % 50 == 0:
            right = (art[:, :num_labels].argmax(dim=1) == batch.labels).float().mean()
            print(f"tower loss {loss:.3f}, right on augmented views {right:.2f}", flush=True)
    return optimiser.average.get_submodule("tower")


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

    def __init__(self, source: Source, seed: int) -> None:
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
        self.tokenizer = model.build_tokenizer(recipe_text(self.asker, shown, own[:5000]))

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
    asked: int,
    save_every: int,
    folder: Path,
) -> nn.Module:
    """Stage 2: the whole model, each view asked several questions."""
    steps = views // BATCH
    optimiser = Optimiser(nano, steps, lr=2e-3)
    for step in progress(steps, BATCH, "model"):
        batch = teacher.source.views(BATCH, strength=1.0)
        tower = nano.model.vision_model(pixel_values=batch.pixels.bfloat16()).last_hidden_state
        features = nano.model.connector(tower)  # (N, tokens, width)
        sequences = [one for _ in range(asked) for one in teacher.encode(teacher.ask(batch))]
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index][0]))
        total, count = torch.zeros((), device=features.device), 0
        for chunk in np.array_split(order, 4):  # of similar length
            ids, answer = teacher.pad([sequences[index] for index in chunk])
            rows = torch.from_numpy(chunk % BATCH).to(features.device)
            total = total + answer_loss(nano, features.index_select(0, rows), ids, answer)
            count += int(answer.sum())
        torch.autograd.backward(total / count)
        optimiser.step()
        if (step + 1) % 50 == 0:
            print(f"model loss {total.item() / count:.3f}", flush=True)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            model.save(copy.deepcopy(optimiser.average).to(torch.bfloat16), teacher.tokenizer, folder)
    return optimiser.average


def main() -> None:
    """The whole recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=data.CACHE, help="downloads, renders and the trained tower")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--tower-views", type=int, default=200_000, help="0: take the tower of an earlier run")
    parser.add_argument("--views", type=int, default=250_000, help="images of stage 2")
    parser.add_argument("--questions", type=int, default=2, help="questions per image of stage 2")
    parser.add_argument("--save-every", type=int, default=250, help="steps of stage 2")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    torch.set_num_threads(given.threads)
    source = Source(given.cache, torch.device(given.device))
    teacher = Teacher(source, given.seed)
    nano = Idefics3ForConditionalGeneration(model.config(teacher.tokenizer)).to(source.device)
    nano.set_attn_implementation("eager")  # on a CPU faster to train than fused attention
    print(f"{sum(p.numel() for p in nano.parameters()):,} parameters", flush=True)
    tower = given.cache / "tower.safetensors"
    if given.tower_views:
        trained = train_tower(copy.deepcopy(nano.model.vision_model), source, given.tower_views)
        save_file(trained.state_dict(), tower)
    nano.model.vision_model.load_state_dict(load_file(tower))
    train_model(nano, teacher, given.views, given.questions, given.save_every, given.out)


if __name__ == "__main__":
    main()
