"""The arithmetic of docs/scale.md: the document holds to it, and its shapes are the model's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.sizing import Load, Model, size, table

DOCUMENT = Path(__file__).parents[1] / "docs" / "scale.md"


def test_the_document_has_the_table() -> None:
    assert table() in DOCUMENT.read_text()


def test_shapes_are_those_of_the_language_model() -> None:
    """Qwen2.5-7B without memory, and LoRA on every linear layer of it."""
    shape = Model()
    config = Qwen2Config(
        hidden_size=shape.hidden,
        intermediate_size=shape.middle,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
        parameters = sum(each.numel() for each in model.parameters())
        peft = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    assert shape.weight_bytes / 2 - shape.vision_parameters == pytest.approx(parameters, rel=0.001)
    lora = sum(each.numel() for name, each in peft.named_parameters() if "lora_" in name)
    assert shape.lora_bytes(8) == 4 * lora


def test_twice_the_load_takes_twice_the_machines() -> None:
    once, twice = (size(Model(), Load(requests=requests)) for requests in (1000, 2000))
    assert twice["gpus_serving"] == pytest.approx(2 * once["gpus_serving"], rel=0.01)
    assert twice["redis_bytes_s"] == 2 * once["redis_bytes_s"]
    assert once["learner_share"] == pytest.approx(twice["learner_share"])
    assert size(Model(), Load(learned=0))["gpus_learning"] == 0
