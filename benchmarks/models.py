"""Checkpoints for benchmarks, made on the spot: the embedded nano, and two with random parameters.

They are InternVLs with a Qwen2 decoder; images of 448 pixels are 256 tokens a tile. `mid` has 49 million: hidden
size 512, 8 layers, 16 heads (8 for keys and values) and intermediate size 1536 in both towers. `large` has 390
million, 1.5 GB: the same vision tower and a decoder of 28 layers with hidden size 1024 and intermediate size 3072.
`2b`, for GPUs, has the shape of InternVL3-2B: 1.9 billion parameters and a vocabulary of 151,674.
What they say means nothing; what they cost does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForImageTextToText, InternVLConfig, PreTrainedTokenizerFast

from servetune.nano import WEIGHTS

VOCABULARY = 512
LAYERS = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 16}
SMALL = {"num_key_value_heads": 8, "vocab_size": VOCABULARY}
DECODERS = {
    "mid": {**LAYERS, **SMALL},
    "large": {**LAYERS, **SMALL, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
    "2b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_674,
    },
}
TOWERS = {
    "2b": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
}
SPECIAL = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LINE = "what is the answer in this image? a b c d yes no cat dog red green blue 0 1 2 3 4 5 6 7 8 9"


def checkpoint(name: str, cache: Path = Path(".cache/models")) -> Path:
    """The folder of `nano`, of one that is made here, or of a checkpoint that is named by its own folder."""
    if name == "nano":
        return WEIGHTS
    if name not in DECODERS:
        return Path(name)
    folder = cache / name
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _make(folder, DECODERS[name], TOWERS.get(name, LAYERS))
        (folder / "done").touch()
    return folder


def _make(folder: Path, decoder: Mapping[str, int], tower: Mapping[str, int]) -> None:
    tok = _tokenizer()
    config = InternVLConfig(
        text_config={
            "model_type": "qwen2",
            **decoder,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
        },
        vision_config={**tower, "image_size": [448, 448], "patch_size": [14, 14]},
        image_token_id=tok.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=256,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id = tok.eos_token_id
    model.generation_config.pad_token_id = tok.pad_token_id
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    images = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": {"height": 448, "width": 448},
        "crop_to_patches": False,
        "min_patches": 1,
        "max_patches": 12,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": 256}
    (folder / "processor_config.json").write_text(json.dumps(processor))


def _tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator([LINE], trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>", *SPECIAL.values()],
        model_specific_special_tokens=SPECIAL,
    )
    made.chat_template = TEMPLATE
    return made
