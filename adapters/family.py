"""A checkpoint made usable: its model, its processor, and the few facts in which families differ.

This is the only module that knows that families exist. What the rest of the learning core sees is a prompt,
its vision features, one prefill and the extension of a key-value cache by further tokens.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    DynamicCache,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from servetune.adapters import attention, caches

DEFAULT_RECOGNITION_QUESTION = "What is this? Answer with its name only."
TOKEN_CACHE = 65_536  # answers
Slots = tuple[str | None, ...]
"""Names of adapters, one for each row of a pass; None is the base."""
RECURRENT_CHUNK = 64  # tokens
MAX_SEEN = 4_000_000  # pixel values in one pass of the vision tower


class UnsupportedModel(ValueError):
    """The checkpoint cannot be served; the message names what is missing and what to do."""


class UnusableQuery(ValueError):
    """The model cannot take this query. The message may be shown to whoever sent it."""


class UnusableImage(UnusableQuery):
    """The model's processor refuses an image, for its shape for instance."""


class PromptTooLong(UnusableQuery):
    """Question and images are more tokens than the model has positions."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered chat turn: `input_ids` (1, P) and whatever the family's vision tower takes."""

    inputs: dict[str, Tensor]

    @property
    def length(self) -> int:
        return int(self.inputs["input_ids"].shape[1])


@dataclass(slots=True)
class Prefix:
    """Prompts after their forward pass, a cache row each, to be extended by any number of continuations.

    Rows may be of different lengths; what is cached beyond a prompt is padding. `positions` are the position ids
    of the first continued tokens: M-RoPE families count an image as fewer positions than it has tokens.
    """

    cache: DynamicCache
    logits: Tensor  # (B, V) after the last token of each prompt, float32
    lengths: tuple[int, ...]
    positions: tuple[int, ...]
    slots: Slots | None = None  # the adapters that further tokens of each row are fed with; None: the active one

    @property
    def width(self) -> int:
        """Cached columns."""
        return max(self.lengths)

    @property
    def num_bytes(self) -> int:
        """Memory of what it holds."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def detached(self) -> tuple[Prefix, list[Tensor], list[Tensor]]:
        """A copy whose tensors gather gradient of their own, those tensors, and the ones they stand for.

        Many passes can then go back as far as the prompt one by one, and the prompt once for all of them.
        """
        ours = self.tensors()
        leaves = [tensor.detach().requires_grad_() for tensor in ours]
        return self._holding(leaves), leaves, ours

    def cloned(self) -> Prefix:
        """The same with tensors of its own."""
        return self._holding([tensor.clone() for tensor in self.tensors()])

    def _holding(self, tensors: Sequence[Tensor]) -> Prefix:
        """The same prompts with other tensors, in the order of `tensors`."""
        return replace(self, cache=caches.holding(self.cache, tensors[1:]), logits=tensors[0])

    def seen(self) -> Tensor:
        """(B, width) True on the tokens of each prompt."""
        return torch.arange(self.width) < torch.tensor(self.lengths)[:, None]

    def alone(self, row: int) -> Prefix:
        """One of the prompts; it shares the tensors of all."""
        if len(self.lengths) == 1:
            return self
        cache, length = self.fork(), self.lengths[row]
        for layer in cache.layers:
            layer.keys, layer.values = (each[row : row + 1, :, :length] for each in (layer.keys, layer.values))
        return Prefix(cache, self.logits[row : row + 1], (length,), (self.positions[row],))

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [self.logits, *caches.tensors(self.cache)]

    @staticmethod
    def joined(prefixes: Sequence[Prefix]) -> Prefix:
        """Prefixes of single prompts as rows of one."""
        if len(prefixes) == 1:
            return prefixes[0]
        cache, width = prefixes[0].fork(), max(prefix.width for prefix in prefixes)
        for number, layer in enumerate(cache.layers):
            rows = [prefix.cache.layers[number] for prefix in prefixes]
            layer.keys = torch.cat([_padded(row.keys, width) for row in rows])
            layer.values = torch.cat([_padded(row.values, width) for row in rows])
        logits = torch.cat([prefix.logits for prefix in prefixes])
        lengths = tuple(prefix.lengths[0] for prefix in prefixes)
        return Prefix(cache, logits, lengths, tuple(prefix.positions[0] for prefix in prefixes))

    def fork(self) -> DynamicCache:
        """A cache that shares the prompts' tensors; extending it leaves this prefix untouched."""
        return caches.fork(self.cache)


class Family:
    """One loaded image-text-to-text checkpoint, frozen and in evaluation mode."""

    def __init__(self, model: nn.Module, processor: Any, recognition_question: str, source: str) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.shares = _layer_kinds(self.model.config) <= caches.SHARED
        """Whether answers can lie side by side after one prompt; else each needs a copy of it."""
        if self.shares:
            self.model.get_decoder().config._attn_implementation = attention.NAME  # type: ignore[operator]
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
        self.recognition_question = recognition_question
        self.source = source
        # What wraps the model in adapters sets how a pass is made with some of them.
        self.using: Callable[[Slots | None], AbstractContextManager[None]] = lambda slots: nullcontext()
        self.end_tokens = frozenset(_end_tokens(self.model, self.tokenizer))
        self.forbidden = torch.tensor(sorted(_placeholder_tokens(self.model.config)), dtype=torch.long)
        self._tokens = lru_cache(TOKEN_CACHE)(self._encode)  # the same labels come with every request
        self._special = sorted({str(t) for t in self.tokenizer.get_added_vocab()}, key=len, reverse=True)

    @classmethod
    def load(cls, source: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Family:
        """Load a folder or hub id.

        Raises:
            UnsupportedModel: not found, not an image-text-to-text checkpoint, no chat template, or layers of a
                kind whose cache servetune cannot copy.
        """
        if source.startswith(("/", ".", "~")) and not Path(source).is_dir():
            raise UnsupportedModel(f"cannot load {source}: there is no such folder")
        try:
            config = AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0][:300]
            raise UnsupportedModel(f"cannot load {source}: {reason}") from error
        _require_known_layers(config)
        processor = _load_processor(source, config)
        if not (getattr(processor, "chat_template", None) or processor.tokenizer.chat_template):
            raise UnsupportedModel(f"{source} has no chat template: use its instruction-tuned variant")
        try:
            model = AutoModelForImageTextToText.from_pretrained(
                source, dtype=dtype, attn_implementation="sdpa", device_map=None
            )
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0][:300]  # transformers goes on to list every class it has
            raise UnsupportedModel(f"{source} is not an image-text-to-text checkpoint: {reason}") from error
        return cls(model.to(device), processor, _recognition_question(source), source)

    @cached_property
    def max_length(self) -> int:
        """Positions of the language model: tokens of prompt and answer together."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 2**31))

    @cached_property
    def token_bytes(self) -> int:
        """What one token of a forward pass keeps in memory until its backward pass, about.

        Per layer its normalised inputs, projections, attention and the parts of a gated MLP, with what LoRA adds;
        and its logits and their logarithms in float32.
        """
        text = self.model.config.get_text_config()
        hidden, middle = int(text.hidden_size), int(getattr(text, "intermediate_size", 4 * text.hidden_size))
        size = int(next(self.model.parameters()).element_size())
        layers = int(text.num_hidden_layers) * (12 * hidden + 5 * middle) * size
        return layers + self._recurrent_bytes + 8 * int(text.vocab_size)

    @cached_property
    def _recurrent_bytes(self) -> int:
        """Of `token_bytes`, what layers with a recurrent state keep besides, in float32 (measured).

        They work on RECURRENT_CHUNK tokens at once, each of which is compared with all others.
        """
        text = self.model.config.get_text_config()
        layers = list(getattr(text, "layer_types", None) or ()).count("linear_attention")
        if not layers:
            return 0
        key, value = (int(getattr(text, f"linear_{which}_head_dim", 128)) for which in ("key", "value"))
        heads = int(getattr(text, "linear_num_value_heads", text.num_attention_heads))
        return 4 * layers * heads * (5 * RECURRENT_CHUNK + 7 * (key + value) + 2 * key * value // RECURRENT_CHUNK)

    def copy_cost(self, length: int) -> int:
        """Memory that a copy of a prompt takes for each answer, in tokens: none where answers share it.

        Keys and values, as many as there are heads, of every layer; and recurrent layers fill up their chunk.
        """
        if self.shares:
            return 0
        text = self.model.config.get_text_config()
        size = int(next(self.model.parameters()).element_size())
        own = 2 * int(text.num_hidden_layers) * int(text.hidden_size) * size
        return -(-(length * own + RECURRENT_CHUNK * self._recurrent_bytes) // self.token_bytes)

    @property
    def device(self) -> torch.device:
        return torch.device(next(self.model.parameters()).device)

    def prompt(self, images: Sequence[Image], question: str) -> Prompt:
        """Render one user turn with its images; special tokens in the question are made plain text.

        Raises:
            UnusableImage, PromptTooLong: the model cannot take it.
        """
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": self._plain(question)}]
        try:
            inputs = self.processor(text=[self._render(content)], images=[list(images)], return_tensors="pt")
        except ValueError:
            sizes = ", ".join(f"{image.width}x{image.height}" for image in images)
            raise UnusableImage(f"This model cannot take images of {sizes} pixels.") from None
        length = inputs["input_ids"].shape[1]
        if length >= self.max_length:
            raise PromptTooLong(f"Question and images make {length} tokens; the model takes {self.max_length}.")
        return Prompt({name: self._placed(value) for name, value in inputs.items() if isinstance(value, Tensor)})

    def _placed(self, value: Tensor) -> Tensor:
        """A tensor on the model's device; from pinned memory, so that the GPU does not wait for the copy."""
        if self.device.type != "cuda":
            return value.to(self.device)
        return value.pin_memory().to(self.device, non_blocking=True)

    def see(self, prompt: Prompt) -> dict[str, Any]:
        """Vision features of a prompt, projected to the language model, in the form `prefill` takes.

        They do not depend on a language-model adapter, so one pass serves every version and rollout. The states of
        the tower, which no decoder looks at, are dropped.
        """
        output = self._look(prompt.inputs)
        return {"image": type(output)(**{k: v for k, v in output.items() if k not in _HIDDEN})}

    def see_each(self, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """Vision features of several prompts, in few passes where pixels are alike and the family allows it."""
        alike: dict[tuple[Any, ...], list[int]] = {}
        for index, prompt in enumerate(prompts):
            shapes = ((name, value.shape) for name, value in prompt.inputs.items() if name not in _TEXT)
            alike.setdefault(tuple(shapes), []).append(index)
        found: dict[int, dict[str, Any]] = {}
        for places in alike.values():
            pixels = max(1, prompts[places[0]].inputs["pixel_values"].numel())
            size = max(1, MAX_SEEN // pixels) if self._sees_together else 1
            for start in range(0, len(places), size):
                part = places[start : start + size]
                seen = self._see_together([prompts[index] for index in part])
                found |= zip(part, seen, strict=True)
        return [found[index] for index in range(len(prompts))]

    def _see_together(self, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """Features of prompts with pixels of the same shapes, from one pass over all of them."""
        if len(prompts) == 1:
            return [self.see(prompts[0])]
        names = [name for name in prompts[0].inputs if name not in _TEXT]
        output = self._look({name: torch.cat([prompt.inputs[name] for prompt in prompts]) for name in names})
        if known := {name for name, value in output.items() if value is not None} - _HIDDEN - {"pooler_output"}:
            raise ValueError(f"vision features with {', '.join(known)} are not split")
        size, rest = divmod(len(output.pooler_output), len(prompts))
        if rest:
            raise ValueError("vision features cannot be told apart")
        parts = [output.pooler_output[start * size : (start + 1) * size] for start in range(len(prompts))]
        return [{"image": type(output)(pooler_output=part)} for part in parts]

    @cached_property
    def _sees_together(self) -> bool:
        """Whether images seen together give what each gives alone; tried once."""
        ramp = PIL.Image.linear_gradient("L").resize((64, 64)).convert("RGB")
        prompts = [self.prompt([image], "?") for image in (ramp, ramp.rotate(90))]
        with torch.no_grad():
            alone = [image_tokens(self.see(prompt)) for prompt in prompts]
            try:
                together = [image_tokens(each) for each in self._see_together(prompts)]
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
                return False
        return all(
            ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-2, rtol=1e-3)
            for ours, theirs in zip(together, alone, strict=True)
        )

    def _look(self, inputs: Mapping[str, Tensor]) -> Any:
        takes = inspect.signature(self.model.get_image_features).parameters
        given = {name: value for name, value in inputs.items() if name in takes and name not in _TEXT}
        return self.model.get_image_features(**given, return_dict=True)

    def without_pixels(self, prompt: Prompt) -> Prompt:
        """A prompt that can still be prefilled with its features, at a fraction of the memory."""
        return Prompt({name: value for name, value in prompt.inputs.items() if name not in _PIXELS})

    def prefill(self, prompt: Prompt, features: dict[str, Any], slots: Slots | None = None) -> Prefix:
        """One forward pass over the prompt; differentiable in the adapter's weights."""
        cache = caches.empty(self.model.config.get_text_config())
        inputs = self.without_pixels(prompt).inputs
        # The model writes into the dict that it is given.
        with self.using(slots):
            output = self.model(
                **inputs,
                mm_encoder_outputs=dict(features),
                cache=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        shift = getattr(self.model.base_model, "rope_deltas", None)
        position = prompt.length + (0 if shift is None else int(shift.reshape(-1)[0]))
        return Prefix(cache, output.logits[:, -1].float(), (prompt.length,), (position,))

    def prefill_each(self, prompts: Sequence[tuple[Prompt, dict[str, Any]]], slots: Slots | None = None) -> Prefix:
        """One forward pass over several prompts of their own lengths, with their vision features.

        Args:
            slots: the adapters of the rows, where they are not the active one.

        It feeds the decoder directly, with plain positions 0, 1, 2...; `tree.packs` tells which family allows it.
        """
        decoder, head = self.model.get_decoder(), self.model.get_output_embeddings()
        rows = [self._embedded(prompt, features) for prompt, features in prompts]
        lengths = [len(row) for row in rows]
        total = max(lengths)
        # Padding is on the right, where causal attention does not look.
        inputs = torch.stack([nn.functional.pad(row, (0, 0, 0, total - len(row))) for row in rows])
        cache = caches.empty(self.model.config.get_text_config())
        positions = torch.arange(total, device=inputs.device).expand(len(rows), -1)
        with self.using(slots):
            hidden = decoder(inputs_embeds=inputs, position_ids=positions, cache=cache, use_cache=True)
        last = hidden.last_hidden_state[torch.arange(len(rows)), torch.tensor(lengths) - 1]
        return Prefix(cache, head(last).float(), tuple(lengths), tuple(lengths))

    def extend(
        self,
        cache: DynamicCache,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        blocks: attention.Blocks | None = None,
        slots: Slots | None = None,
    ) -> Tensor:
        """Feed M further tokens to each of B cache rows.

        Args:
            tokens: (B, M) token ids.
            positions: (B, M) position ids.
            mask: (B, M, cached + M) True where a token may look, or None for plain causal attention.
            blocks: of the tokens of a single row; the mask is then (R, T, cached + T), one row for each block.
            slots: the adapters of the rows, where they are not the active one.

        Returns:
            (B, M, V) float32 logits.
        """
        allowed = None
        if mask is not None:
            dtype = self.model.dtype
            allowed = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
            allowed = allowed.masked_fill(~mask, torch.finfo(dtype).min)[:, None]
            if blocks is not None:
                allowed = attention.with_blocks(allowed, blocks)
        with self.using(slots):
            output = self.model(
                input_ids=tokens,
                attention_mask=allowed,
                position_ids=positions,
                cache=cache,
                use_cache=True,
            )
        return output.logits.float()  # type: ignore[no-any-return]

    def glance(self, num_tokens: int) -> Tensor:
        """(V,) float32 logits after a fixed sequence of tokens, fed to the decoder alone; no state is kept."""
        decoder, head = self.model.get_decoder(), self.model.get_output_embeddings()
        known = torch.ones(len(head.weight), dtype=torch.bool)
        known[self.forbidden] = False
        ids = known.nonzero()[:, 0]
        chosen = ids[torch.linspace(0, len(ids) - 1, num_tokens).long()].to(self.device)
        inputs = self.model.get_input_embeddings()(chosen)[None]
        positions = torch.arange(num_tokens, device=self.device)[None]
        hidden = decoder(inputs_embeds=inputs, position_ids=positions, use_cache=False)
        return head(hidden.last_hidden_state[0, -1]).float()  # type: ignore[no-any-return]

    def _embedded(self, prompt: Prompt, features: dict[str, Any]) -> Tensor:
        """(P, D) input embeddings of a prompt, its image features in place."""
        ids, seen = prompt.inputs["input_ids"][0], image_tokens(features)
        embedded = self.model.get_input_embeddings()(ids)
        where = torch.isin(ids, self.forbidden.to(ids.device)).nonzero()[:, 0]
        if len(where) != len(seen):
            raise ValueError(f"{len(seen)} image features for {len(where)} places")
        return embedded.index_copy(0, where, seen.to(embedded.dtype))  # type: ignore[no-any-return]

    def tokens(self, answer: str) -> tuple[int, ...]:
        """Token ids of an answer as the model would write it after the prompt, end token included."""
        return self._tokens(answer)

    def _encode(self, answer: str) -> tuple[int, ...]:
        answer = self._plain(answer)  # a label that spells an image token would be impossible
        opening, space, _ = self._reply
        before, whole = self._ids(opening), self._ids(opening + space + answer)
        own = whole[len(before) :] if whole[: len(before)] == before else self._ids(space + answer)
        return (*own, self.end_token)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, tokens: Sequence[int]) -> str:
        """The answer that these tokens spell, without special tokens or surrounding space."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()

    @cached_property
    def end_token(self) -> int:
        """The token that ends a turn in the chat template, where it can be told."""
        ends = [*self._ids(self._reply[2])[:1], self.tokenizer.eos_token_id, min(self.end_tokens)]
        return next(int(end) for end in ends if end in self.end_tokens)

    @cached_property
    def _reply(self) -> tuple[str, str, str]:
        """A rendered question up to where the answer is due, the space before the answer, and what follows it.

        "Assistant:" wants " dog" where a new line wants "dog": other tokens, with another probability.
        """
        question, answer = [{"type": "text", "text": "?"}], "yes"
        opening = self._render(question)
        whole = self._render(question, [{"type": "text", "text": answer}])
        space, found, end = whole.removeprefix(opening).partition(answer)
        if not (found and whole.startswith(opening)) or space.strip():
            return opening, "", ""
        return opening, space, end

    def _render(self, question: list[dict[str, str]], answer: list[dict[str, str]] | None = None) -> str:
        turns = [{"role": "user", "content": question}]
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
        # The tokenizer renders: some processors' own method insists on a video part.
        text = self.tokenizer.apply_chat_template(
            turns, chat_template=self.template, add_generation_prompt=answer is None, tokenize=False
        )
        return str(text)

    @cached_property
    def decoder_name(self) -> str:
        """Qualified name of the language model inside the checkpoint."""
        decoder = self.model.get_decoder()
        return str(next(name for name, module in self.model.named_modules() if module is decoder))

    def linear_names(self, part: str) -> list[str]:
        """Qualified names of the linear layers of the `language`, `vision` or `all` part."""
        head = self.model.get_output_embeddings()
        names = []
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear) and module is not head:
                is_language = name.startswith(f"{self.decoder_name}.")
                if part == "all" or is_language == (part == "language"):
                    names.append(name)
        return names

    def digest(self) -> str:
        """Fingerprint of the weights as they are now: `sha256:` over names, shapes and values."""
        total = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            total.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            total.update(value.detach().contiguous().cpu().view(torch.uint8).numpy().data)
        return f"sha256:{total.hexdigest()}"

    def _plain(self, text: str) -> str:
        for token in self._special:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text


def _padded(tensor: Tensor, width: int) -> Tensor:
    """(1, H, T, D) keys or values of a prompt, with columns of zeros up to a width."""
    return nn.functional.pad(tensor, (0, 0, 0, width - tensor.shape[2]))


def image_tokens(features: dict[str, Any]) -> Tensor:
    """(T, D) the vision features of a prompt, one row per image token."""
    found = features["image"].pooler_output
    parts = list(found) if isinstance(found, (list, tuple)) else [found]
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


_TEXT = frozenset({"input_ids", "attention_mask", "mm_token_type_ids"})
_HIDDEN = frozenset({"last_hidden_state", "hidden_states", "attentions"})
_PIXELS = frozenset({"pixel_values", "pixel_attention_mask", "image_sizes", "batch_num_images"})


def _layer_kinds(config: Any) -> set[str]:
    return set(getattr(config.get_text_config(), "layer_types", None) or caches.SHARED)


def _require_known_layers(config: Any) -> None:
    """What a layer keeps of a prompt must be something that `caches` can copy."""
    if unknown := _layer_kinds(config) - caches.SHARED - caches.COPIED:
        known = ", ".join(sorted(caches.SHARED | caches.COPIED))
        raise UnsupportedModel(
            f"{config.model_type} has layers of the kind {', '.join(sorted(unknown))}: servetune knows {known}"
        )


def _load_processor(source: str, config: Any) -> Any:
    """The checkpoint's processor; where its video part cannot be built (torchvision), images alone."""
    try:
        return AutoProcessor.from_pretrained(source)
    except (ImportError, AttributeError, ValueError):
        whole = PROCESSOR_MAPPING[type(config)]

    # A processor learns its parts from `get_attributes`: naming only two makes it an image processor.
    class ImageOnly(whole):  # type: ignore[misc, valid-type]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

    known, _ = whole.get_processor_dict(source)
    parts = AutoImageProcessor.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    takes = inspect.signature(whole.__init__).parameters
    options = {name: value for name, value in known.items() if name in takes and "processor" not in name}
    options.setdefault("chat_template", parts[1].chat_template)
    return ImageOnly(image_processor=parts[0], tokenizer=parts[1], video_processor=None, **options)


def _end_tokens(model: Any, tokenizer: Any) -> Iterator[int]:
    for ids in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        yield from [ids] if isinstance(ids, int) else ids or []


def _placeholder_tokens(config: Any) -> Iterator[int]:
    """Ids that stand for an image or a video; sampled, they would break any later forward pass."""
    for name in ("image_token_id", "video_token_id", "image_token_index", "video_token_index"):
        value = getattr(config, name, None)
        if isinstance(value, int) and 0 <= value < config.get_text_config().vocab_size:
            yield value


def _recognition_question(source: str) -> str:
    """A checkpoint folder may say in `servetune.json` how it was taught to be asked."""
    path = Path(source, "servetune.json")
    if not path.is_file():
        return DEFAULT_RECOGNITION_QUESTION
    return str(json.loads(path.read_text()).get("recognition_question", DEFAULT_RECOGNITION_QUESTION))
