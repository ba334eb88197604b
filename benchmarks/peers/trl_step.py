"""GRPO steps of TRL's GRPOTrainer on one image and question, in an environment of its own (`envs.py`).

Prints one JSON line per step: CPU and wall seconds from `on_step_begin` to `on_step_end`, which takes in
generation, rewards, reference, forward, backward and optimizer, and the peak of memory so far, of the process
or of the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from servetune.adapters.family import _load_processor


class Clock(TrainerCallback):
    """Times every optimizer step."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        _wait()
        self.began = time.process_time(), time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        _wait()
        cpu, wall = time.process_time() - self.began[0], time.perf_counter() - self.began[1]
        on_gpu = torch.cuda.is_initialized()
        peak = torch.cuda.max_memory_allocated() if on_gpu else _resident()
        print(json.dumps({"cpu_s": cpu, "wall_s": wall, "peak_rss": peak}), flush=True)


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reward(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    """Share of the letter a minus a tenth of the share of digits."""
    texts = [completion[0]["content"] for completion in completions]
    return [(t.count("a") - 0.1 * sum(c.isdigit() for c in t)) / (len(t) + 1) for t in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--question", required=True)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--num", type=int, default=32)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model.generation_config.eos_token_id = None  # every completion has the full length
    processor = _load_processor(options.model, AutoConfig.from_pretrained(options.model))
    image = Image.open(options.image).convert("RGB")
    turn = [{"role": "user", "content": options.question}]
    decoder = next(n for n, m in model.named_modules() if m is model.get_decoder())
    layers = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out,
            use_cpu=options.device == "cpu",
            per_device_train_batch_size=options.num // options.accumulate,
            gradient_accumulation_steps=options.accumulate,
            num_generations=options.num,
            max_completion_length=options.tokens,
            generation_kwargs={"min_new_tokens": options.tokens},
            beta=0.04,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            temperature=1.0,
            loss_type="grpo",
            bf16=options.dtype == "bfloat16",
            gradient_checkpointing=False,
            use_vllm=False,
            dataloader_num_workers=0,
            save_strategy="no",
            report_to=[],
            max_steps=options.steps,
            seed=0,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": turn, "image": image}] * 4),
            processing_class=processor,
            peft_config=LoraConfig(
                r=8, lora_alpha=16, target_modules=rf"{decoder}\..*\.({layers})", task_type="CAUSAL_LM"
            ),
            callbacks=[Clock()],
        )
        trainer.train()


if __name__ == "__main__":
    main()
