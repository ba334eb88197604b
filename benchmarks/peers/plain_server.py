"""What people write first: FastAPI around `generate`, one request at a time, in a thread of its own."""

from __future__ import annotations

import base64
import io
import sys
import threading
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from servetune.adapters.family import _load_processor


def application(source: str) -> FastAPI:
    """The server of one checkpoint."""
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    processor = _load_processor(source, AutoConfig.from_pretrained(source))
    app, lock = FastAPI(), threading.Lock()

    @app.get("/ready")
    def ready() -> str:
        return "yes"

    @app.post("/answer")
    def answer(body: dict[str, Any]) -> dict[str, str]:
        image = Image.open(io.BytesIO(base64.b64decode(body["image"].partition(",")[2]))).convert("RGB")
        content = [{"type": "image"}, {"type": "text", "text": body["question"]}]
        template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
        text = processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=template,
            add_generation_prompt=True,
            tokenize=False,
        )
        inputs = processor(text=[text], images=[[image]], return_tensors="pt")
        with lock, torch.inference_mode():
            whole = model.generate(**inputs, do_sample=False, max_new_tokens=body["max_tokens"])
        return {
            "answer": processor.tokenizer.decode(
                whole[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
        }

    return app


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    uvicorn.run(application(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="error")
