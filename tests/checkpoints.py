"""Tiny random checkpoints of each supported family, built from their configs: real classes, real files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Idefics3Config,
    InternVLConfig,
    LlavaOnevisionConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen3_5Config,
    Qwen3VLConfig,
    SmolVLMConfig,
)

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
WORDS = "a cat or dog on the mat; what is this? yes no red green blue 0 1 2 3 4 5 6 7 8 9"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(special: dict[str, str], image: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few hundred tokens with the family's special tokens and a chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator([WORDS], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>", *special.values()],
        model_specific_special_tokens=special,
    )
    made.chat_template = TEMPLATE.replace("IMAGE", image)
    return made


def _save(
    folder: Path, config: PretrainedConfig, tok: PreTrainedTokenizerFast, images: dict, processor: dict
) -> None:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():  # the default init makes every answer equally likely
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = tok.eos_token_id
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").write_text(json.dumps(processor))


def _idefics(folder: Path, config_class: type, kind: str) -> None:
    special = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
        "video_token": "<video>",
    }
    tok = tokenizer(special, "<image>")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = config_class(
        text_config={"model_type": "llama", "vocab_size": len(tok), **TEXT},
        vision_config={**vision, "image_size": 32, "patch_size": 8},
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tok.pad_token_id,
        tie_word_embeddings=True,
    )
    edge = {"longest_edge": 32}
    images = {
        "image_processor_type": f"{kind}ImageProcessor",
        "size": edge,
        "max_image_size": edge,
        "do_image_splitting": False,
    }
    _save(folder, config, tok, images, {"processor_class": f"{kind}Processor", "image_seq_len": 4})


def idefics3(folder: Path) -> None:
    _idefics(folder, Idefics3Config, "Idefics3")


def smolvlm(folder: Path) -> None:
    _idefics(folder, SmolVLMConfig, "SmolVLM")


def llava_onevision(folder: Path) -> None:
    _llava_onevision(folder, {"model_type": "qwen2", **TEXT})


def lfm2(folder: Path) -> None:
    """LFM2's language model, convolutions between full attention; LFM2-VL's processor is torchvision's."""
    layers = ["conv", "full_attention", "conv"]
    _llava_onevision(folder, {"model_type": "lfm2", **TEXT, "num_hidden_layers": 3, "layer_types": layers})


def _llava_onevision(folder: Path, text: dict) -> None:
    tok = tokenizer({"image_token": "<image>", "video_token": "<video>"}, "<image>")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaOnevisionConfig(
        text_config={"vocab_size": len(tok), **text},
        vision_config={
            "model_type": "siglip_vision_model",
            **vision,
            "image_size": 32,
            "patch_size": 8,
            "vision_use_head": False,
        },
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        video_token_index=tok.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[32, 32], [32, 64]],
        tie_word_embeddings=True,
    )
    images = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": {"height": 32, "width": 32},
        "image_grid_pinpoints": [[32, 32], [32, 64]],
    }
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": 16,
        "vision_feature_select_strategy": "full",
    }
    _save(folder, config, tok, images, processor)


_QWEN = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_QWEN_PIXELS = {"image_processor_type": "Qwen2VLImageProcessor", "merge_size": 2, "temporal_patch_size": 2}


def _qwen_ids(tok: PreTrainedTokenizerFast) -> dict[str, int]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {name: tok.convert_tokens_to_ids(token) for name, token in names.items()}


def qwen2_5_vl(folder: Path) -> None:
    tok = tokenizer(_QWEN, _QWEN_IMAGE)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(
        text_config={"vocab_size": len(tok), **TEXT, "rope_parameters": rope},
        vision_config={**vision, "patch_size": 8, "window_size": 32, "fullatt_block_indexes": [1]},
        tie_word_embeddings=True,
        **_qwen_ids(tok),
    )
    images = {**_QWEN_PIXELS, "patch_size": 8, "size": {"shortest_edge": 256, "longest_edge": 4096}}
    _save(folder, config, tok, images, {"processor_class": "Qwen2_5_VLProcessor"})


def qwen3_vl(folder: Path) -> None:
    tok = tokenizer(_QWEN, _QWEN_IMAGE)
    rope = {
        "rope_type": "default",
        "mrope_section": [2, 3, 3],
        "rope_theta": 10000.0,
        "mrope_interleaved": True,
    }
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen3VLConfig(
        text_config={"vocab_size": len(tok), **TEXT, "rope_parameters": rope},
        vision_config={
            **vision,
            "patch_size": 8,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        tie_word_embeddings=True,
        **_qwen_ids(tok),
    )
    images = {**_QWEN_PIXELS, "patch_size": 8, "size": {"shortest_edge": 256, "longest_edge": 4096}}
    _save(folder, config, tok, images, {"processor_class": "Qwen3VLProcessor"})


def internvl(folder: Path) -> None:
    special = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tok = tokenizer(special, "<IMG_CONTEXT>")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = InternVLConfig(
        text_config={"model_type": "qwen2", "vocab_size": len(tok), **TEXT},
        vision_config={**vision, "image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=tok.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=True,
    )
    images = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": {"height": 32, "width": 32},
        "crop_to_patches": False,
        "min_patches": 1,
        "max_patches": 4,
    }
    _save(folder, config, tok, images, {"processor_class": "InternVLProcessor", "image_seq_length": 4})


def gemma3(folder: Path) -> None:
    """Layers with a window of 8 tokens, shorter than any prompt, between layers with full attention."""
    special = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tok = tokenizer(special, "<start_of_image>")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={
            "vocab_size": len(tok),
            **TEXT,
            "num_hidden_layers": 3,
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        vision_config={**vision, "image_size": 32, "patch_size": 8, "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=tok.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tok.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tok.convert_tokens_to_ids("<image_soft_token>"),
        eos_token_id=tok.eos_token_id,
        tie_word_embeddings=True,
    )
    images = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 32, "width": 32}}
    _save(folder, config, tok, images, {"processor_class": "Gemma3Processor", "image_seq_length": 4})


def qwen3_5(folder: Path) -> None:
    """Recurrent layers between layers with full attention."""
    tok = tokenizer(_QWEN, _QWEN_IMAGE)
    rope = {
        "rope_type": "default",
        "mrope_section": [2, 3, 3],
        "rope_theta": 10000.0,
        "mrope_interleaved": True,
        "partial_rotary_factor": 1.0,
    }
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen3_5Config(
        text_config={
            "vocab_size": len(tok),
            **TEXT,
            "num_hidden_layers": 3,
            "rope_parameters": rope,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        vision_config={**vision, "patch_size": 8, "num_position_embeddings": 16},
        tie_word_embeddings=True,
        **_qwen_ids(tok),
    )
    images = {**_QWEN_PIXELS, "patch_size": 8, "size": {"shortest_edge": 256, "longest_edge": 4096}}
    _save(folder, config, tok, images, {"processor_class": "Qwen3VLProcessor"})


FAMILIES: dict[str, Callable[[Path], None]] = {
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "llava_onevision": llava_onevision,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "gemma3": gemma3,
    "qwen3_5": qwen3_5,
    "lfm2": lfm2,
}
