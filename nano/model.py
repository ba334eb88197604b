"""The shape of nano: a small Idefics3 model, its tokenizer, its processor and the folder they are saved in."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from servetune.nano import data, questions

PATCH_SIZE = 12
SCALE_FACTOR = 2
NUM_IMAGE_TOKENS = (data.IMAGE_SIZE // PATCH_SIZE // SCALE_FACTOR) ** 2
VOCAB_SIZE = 1536

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<end_of_utterance>"
FAKE, GLOBAL, IMAGE = "<fake_token_around_image>", "<global-img>", "<image>"
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ ' ' + part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of the recipe's own text: it encodes every string."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, START, END, FAKE, GLOBAL, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrap(tokenizer)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a saved model."""
    return wrap(Tokenizer.from_file(str(folder / "tokenizer.json")))


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer as transformers takes it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        model_max_length=1024,
        additional_special_tokens=[FAKE, GLOBAL, IMAGE],
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Idefics3Processor:
    """A processor that stretches any image to the model's square."""
    side = {"longest_edge": data.IMAGE_SIZE}
    images = Idefics3ImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False)
    return Idefics3Processor(images, tokenizer, image_seq_len=NUM_IMAGE_TOKENS, chat_template=CHAT_TEMPLATE)


def config(tokenizer: PreTrainedTokenizerFast) -> Idefics3Config:
    """The architecture."""
    vision = {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "image_size": data.IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "hidden_act": "silu",
    }
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    }
    return Idefics3Config(
        vision_config=vision,
        text_config=text | tokens,
        scale_factor=SCALE_FACTOR,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=True,
        **tokens,
    )


def prompt(question: str, image_first: bool = True) -> str:
    """The text of a question about one image, as the chat template and the processor write it."""
    image = FAKE + GLOBAL + IMAGE * NUM_IMAGE_TOKENS + FAKE
    content = f"{image} {question}" if image_first else f" {question}{image}"
    return f"{START}User:{content}{END}\nAssistant:"


def save(model: Idefics3ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write everything that the Auto classes and servetune need to load nano."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)
    about = {"recognition_question": questions.RECOGNITION}
    (folder / "servetune.json").write_text(json.dumps(about, indent=2) + "\n")
