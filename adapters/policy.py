"""The policy: a frozen family with LoRA slots. One thread uses it; a second one may load and probe a spare slot.

A slot holds one adapter version. Choosing a slot is cheap, loading a version copies small tensors, and the
reference is the same model with every adapter off.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from PIL import Image
from torch import Tensor
from torch.nn.functional import linear

from servetune.adapters import tree
from servetune.adapters.family import Family, Prefix, Prompt, Slots, image_tokens
from servetune.adapters.features import ByteCache, digest
from servetune.adapters.types import Query

Part = Literal["language", "vision", "all"]
PROBE_SIZE = 32  # values
PROBE_TOKENS = 16
CACHE_BYTES = 256 * 2**20
LIKELY = 6.0  # nats below the best label at which another no longer matters
UNLIKELY = 10.0  # and where it is put then
Tokens = Sequence[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """Shape of an adapter. `part` says which linear layers carry it: language, vision or all."""

    rank: int = 8
    alpha: int = 16
    part: Part = "language"


@dataclass(frozen=True, slots=True)
class Observation:
    """What the policy sees of a query: the rendered prompt and its vision features.

    `content` tells images and question from others; the same content is seen alike.
    """

    prompt: Prompt
    features: dict[str, Any]
    content: Hashable


class Policy:
    """A family plus LoRA slots.

    Args:
        family: the loaded checkpoint; its linear layers are wrapped in place.
        spec: rank, scaling and placement of every slot.
        slots: names of the adapters to make; the first is active. A name must not be an attribute of modules.
        cache_bytes: of prompts and vision features that are kept by what the images show.
    """

    def __init__(
        self,
        family: Family,
        spec: LoraSpec,
        slots: Sequence[str] = ("default",),
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.family = family
        self.spec = spec
        self.base_digest = family.digest()  # before the adapters become part of the model
        self.target_modules = _target_pattern(family, spec.part)
        self.config = LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,
            target_modules=self.target_modules,
            task_type="CAUSAL_LM",
            base_model_name_or_path=family.source,
        )
        self._peft = get_peft_model(family.model, self.config, adapter_name=slots[0])
        self._choice = _Choice(slots[0])
        family.using = self._using
        for module in self._peft.modules():
            if isinstance(module, LoraLayer):
                module.forward = _adapted(module, self._choice)
        self._slots = {slots[0]: self._parameters_of(slots[0])}
        self._ready()
        for slot in slots[1:]:
            self.add(slot)
        self._seen = ByteCache(cache_bytes)

    def peft_config(self) -> dict[str, Any]:
        """What `adapter_config.json` says, so that plain PEFT loads a version."""
        config = {**self.config.to_dict(), "inference_mode": True}
        plain: dict[str, Any] = json.loads(json.dumps(config, default=sorted))
        return plain

    # --- adapters ------------------------------------------------------------------------------------

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of all slots, in the order in which they were made."""
        return tuple(self._slots)

    def add(self, slot: str) -> None:
        """Make one more slot. On the policy's thread; what other slots hold stays."""
        self._peft.add_adapter(slot, self.config)
        self._slots[slot] = self._parameters_of(slot)
        self._ready()

    def _ready(self) -> None:
        """PEFT lets the newest adapter alone be trained, and in training mode."""
        self._peft.eval()
        for parameters in self._slots.values():
            for parameter in parameters.values():
                parameter.requires_grad_(True)

    @property
    def active(self) -> str | None:
        """The slot in use; None is the base model."""
        return self._choice.slot

    def use(self, slot: str | None) -> None:
        """Make a slot the active adapter; None is the untouched base model."""
        self._choice.slot = slot

    @property
    def mixes(self) -> bool:
        """Whether rows of one pass may have adapters of their own: not where they change what the images are."""
        return self.spec.part == "language"

    @contextmanager
    def _using(self, slots: Slots | None) -> Iterator[None]:
        """Feed each row of a pass with its own slot."""
        self._choice.rows = _rows_by_slot(slots, self.family.device) if slots else None
        try:
            yield
        finally:
            self._choice.rows = None

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The same weights with the adapter off, without gradient."""
        before = self.active
        self.use(None)
        try:
            with torch.no_grad():
                yield
        finally:
            self.use(before)

    def parameters(self, slot: str) -> dict[str, torch.nn.Parameter]:
        """The live LoRA parameters of a slot by their PEFT file keys."""
        return self._slots[slot]

    def weights(self, slot: str) -> dict[str, Tensor]:
        """A copy of a slot's weights, in PEFT's file format."""
        return {key: value.detach().cpu().clone() for key, value in self._slots[slot].items()}

    def load(self, slot: str, weights: Mapping[str, Tensor]) -> None:
        """Copy weights into a slot.

        Raises:
            ValueError: other keys or shapes than the slot's, or values that are not finite.
        """
        self.check(weights)
        with torch.no_grad():
            for key, parameter in self._slots[slot].items():
                parameter.copy_(weights[key])

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Refuse weights that do not fit this policy; a silent partial load is how adapters get lost."""
        slot = next(iter(self._slots.values()))
        if weights.keys() != slot.keys():
            odd = sorted(weights.keys() ^ slot.keys())
            raise ValueError(f"{len(odd)} tensors do not match this model's adapter, e.g. {odd[0]}")
        for key, value in weights.items():
            if value.shape != slot[key].shape:
                raise ValueError(f"{key} has shape {tuple(value.shape)}, expected {tuple(slot[key].shape)}")
            if not torch.isfinite(value).all():
                raise ValueError(f"{key} holds values that are not finite")

    def zero_weights(self) -> dict[str, Tensor]:
        """An adapter that changes nothing: random A as PEFT draws it, B zero."""
        generator = torch.Generator().manual_seed(0)
        slot = next(iter(self._slots.values()))
        zero = {}
        for key, value in slot.items():
            zero[key] = torch.zeros(value.shape)
            if ".lora_A." in key:
                bound = value.shape[1] ** -0.5
                zero[key].uniform_(-bound, bound, generator=generator)
        return zero

    def _parameters_of(self, slot: str) -> dict[str, torch.nn.Parameter]:
        mark = f".{slot}.weight"
        return {
            name.removesuffix(mark) + ".weight": parameter
            for name, parameter in self._peft.named_parameters()
            if "lora_" in name and name.endswith(mark)
        }

    # --- answers -------------------------------------------------------------------------------------

    def observe(self, query: Query) -> Observation:
        """Process a query's images and question and encode the images."""
        return self.observe_each([query])[0]

    @torch.no_grad()
    def observe_each(self, queries: Sequence[Query]) -> list[Observation]:
        """Several queries, their images encoded in few passes; an image that is known is not encoded again.

        Where the adapter leaves the vision tower alone, an observation has the projected features and no pixels.
        """
        pictures = [digest(query.images) for query in queries]
        contents = [(picture, query.question) for picture, query in zip(pictures, queries, strict=True)]
        if self.spec.part != "language":
            whole = [self.family.prompt(query.images, query.question) for query in queries]
            return list(map(Observation, whole, self.family.see_each(whole), contents))
        features: dict[bytes, Any] = {picture: self._seen.get(picture) for picture in pictures}
        prompts: list[Prompt] = []
        new: dict[bytes, Prompt] = {}
        for query, content in zip(queries, contents, strict=True):
            picture = content[0]
            inputs = self._seen.get(content) if features[picture] else None
            if inputs is None:
                prompt = self.family.prompt(query.images, query.question)
                if features[picture] is None:
                    new.setdefault(picture, prompt)
                inputs = self.family.without_pixels(prompt).inputs
                self._seen.put(content, inputs)
            prompts.append(Prompt(inputs))
        features |= zip(new, self.family.see_each(list(new.values())), strict=True)
        for picture in new:
            self._seen.put(picture, features[picture])
        return list(map(Observation, prompts, map(features.__getitem__, pictures), contents))

    def forget_images(self) -> None:
        """Keep nothing of what was seen."""
        self._seen.clear()

    def warm(self) -> None:
        """Find out now, and not with the first queries, what the family can do for several of them together."""
        queries = [Query("warm", (Image.new("RGB", (64, 64), color),), "?") for color in ("white", "black")]
        self.begin_each(self.observe_each(queries))

    @torch.no_grad()
    def rehearse(self) -> None:
        """What every answer begins with, and nothing of it cached: see an image, and forward a prompt."""
        self.family.prefill(self._picture, self.family.see(self._picture))

    def keep(self, observation: Observation) -> Observation:
        """An observation fit to be kept: without features that an adapter changes."""
        return observation if self.spec.part == "language" else replace(observation, features={})

    def begin(self, observation: Observation) -> Prefix:
        """Forward the prompt once with the active adapter; differentiable unless under no_grad."""
        features = observation.features
        if self.spec.part != "language":  # the adapter acts on vision too: cached features would be stale
            features = self.family.see(observation.prompt)
        return self.family.prefill(observation.prompt, features)

    def begin_each(
        self,
        observations: Sequence[Observation],
        versions: Sequence[str] | None = None,
        cache: ByteCache | None = None,
        slots: Slots | None = None,
    ) -> tree.Prefixes:
        """Forward several prompts, packed where possible; the adapters must not change while they are used.

        Args:
            versions: of the adapter of each, by which a prompt is told from the same one after another adapter.
            cache: where a prompt that was asked before is found.
            slots: the adapter of each, where it is not the active one. Only of a policy that `mixes`.
        """
        stale = self.spec.part != "language"  # features of before do not know this adapter
        prompts = [(one.prompt, None if stale else one.features) for one in observations]
        contents = [one.content for one in observations]
        keys = list(zip(versions, contents, strict=True)) if versions else None
        return tree.Prefixes(self.family, prompts, keys, cache, slots)

    def score_each(self, observations: Sequence[Observation], sequences: Sequence[Tokens]) -> list[Tensor]:
        """Per observation the (N,) log-probabilities of whole answers, differentiable, packed where possible."""
        return tree.score_each(self.begin_each(observations), sequences)

    @torch.no_grad()
    def likely_labels(self, observations: Sequence[Observation], labels: Sequence[str]) -> Tensor:
        """(B, L) log-probabilities of labels, exact for all that matter.

        A label is at most as likely as its first token, so much of a long list is decided without being scored: a
        label whose bound lies LIKELY nats below the best one is put UNLIKELY nats below it.
        """
        prefixes = self.begin_each(observations)
        tokens = [self.family.tokens(label) for label in labels]
        opening = {own[0]: None for own in tokens}
        firsts = tree.score_each(prefixes, [[(first,) for first in opening]] * len(observations))
        place = {first: column for column, first in enumerate(opening)}
        columns = torch.tensor([place[own[0]] for own in tokens])
        found = torch.stack(firsts).cpu()[:, columns]  # upper bounds
        exact = torch.zeros_like(found, dtype=torch.bool)
        wanted = found >= found.max(-1, keepdim=True).values - LIKELY
        while bool(wanted.any()):
            chosen = [row.nonzero()[:, 0].tolist() for row in wanted]
            scored = tree.score_each(prefixes, [[tokens[c] for c in each] for each in chosen])
            for row, (each, logprobs) in enumerate(zip(chosen, scored, strict=True)):
                found[row, each] = logprobs.cpu()
                exact[row, each] = True
            best = torch.where(exact, found, -torch.inf).max(-1, keepdim=True).values
            wanted = ~exact & (found > best - LIKELY)
        return torch.where(exact, found, best - UNLIKELY)

    def label_logprobs(self, prefix: Prefix, labels: Sequence[str]) -> Tensor:
        """(L,) log-probability that the whole answer is exactly this label, end token included."""
        logprobs, _ = tree.score(self.family, prefix, [self.family.tokens(label) for label in labels])
        return logprobs.sum(-1)

    @torch.no_grad()
    def probe(self) -> tuple[float, ...]:
        """What the active adapter makes of fixed tokens (and of a fixed image where it acts on vision): tells
        versions apart.

        It touches nothing that an answer depends on: a second thread may probe a slot of its own choice beside the
        policy's thread.
        """
        values = [self.family.glance(PROBE_TOKENS)]
        if self.spec.part != "language":
            values.append(image_tokens(self.family.see(self._probe)).flatten())
        sampled = [value[torch.linspace(0, len(value) - 1, PROBE_SIZE).long()].tolist() for value in values]
        return tuple(round(value, 6) for own in sampled for value in own)

    @cached_property
    def _probe(self) -> Prompt:
        return self._ramp(64)

    @cached_property
    def _picture(self) -> Prompt:
        return self._ramp(448)

    def _ramp(self, side: int) -> Prompt:
        ramp = Image.linear_gradient("L").resize((side, side)).convert("RGB")
        return self.family.prompt([ramp], "What is this?")


def scaled(weights: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """The adapter that changes the base's weights `factor` times as much."""
    return {key: value * factor if ".lora_B." in key else value for key, value in weights.items()}


_Rows = Sequence[tuple[str, slice | Tensor]]
"""Slots, and the rows of a pass that each is for."""


class _Choice(threading.local):
    """The slot that a thread uses, or those of the rows of the pass under way, known to all layers."""

    def __init__(self, slot: str | None) -> None:
        self.slot = slot
        self.rows: _Rows | None = None


def _rows_by_slot(slots: Slots, device: torch.device) -> _Rows:
    """The rows of each slot but the base's: a slice where they lie side by side, which copies nothing."""
    found: list[tuple[str, slice | Tensor]] = []
    for slot in dict.fromkeys(slot for slot in slots if slot):
        rows = [row for row, own in enumerate(slots) if own == slot]
        beside = rows[-1] - rows[0] + 1 == len(rows)
        found.append((slot, slice(rows[0], rows[-1] + 1) if beside else torch.tensor(rows, device=device)))
    return found


def _adapted(layer: Any, choice: _Choice) -> Callable[[Tensor], Tensor]:
    """The forward pass of a plain LoRA layer, without what PEFT's goes through for its other kinds.

    It takes a third of the time of a small layer, and choosing a slot costs one assignment.
    """
    base = layer.base_layer
    parts: dict[str, tuple[Tensor, Tensor, float]] = {}

    def add(result: Tensor, x: Tensor, slot: str, rows: Tensor | None = None) -> None:
        if slot not in parts:
            parts[slot] = layer.lora_A[slot].weight, layer.lora_B[slot].weight, layer.scaling[slot]
        down, up, scaling = parts[slot]
        change = linear(linear(x.to(down.dtype), down), up).to(result.dtype)
        # In place: nothing goes back through the output of a frozen layer but its gradient.
        if rows is None:
            result.add_(change, alpha=scaling)
        else:
            result.index_add_(0, rows, change, alpha=scaling)

    def forward(x: Tensor) -> Tensor:
        result: Tensor = base(x)
        if choice.rows is None:
            if choice.slot is not None:
                add(result, x, choice.slot)
            return result
        for slot, rows in choice.rows:
            if isinstance(rows, slice):
                add(result[rows], x[rows], slot)
            else:
                add(result, x[rows], slot, rows)
        return result

    return forward


def _target_pattern(family: Family, part: Part) -> str:
    """A regular expression over module names that matches exactly the linear layers of a part."""
    names = family.linear_names(part)
    leaves = "|".join(sorted({re.escape(name.rsplit(".", 1)[-1]) for name in names}))
    decoder = re.escape(family.decoder_name)
    start = {"language": rf"{decoder}\.", "vision": rf"(?!{decoder}\.)", "all": ""}[part]
    return rf"{start}.*\.({leaves})"
