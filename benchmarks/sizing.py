"""What a load takes, on paper: GPUs, Redis, store and learner, from the arithmetic of `docs/scale.md`.

    python -m benchmarks.sizing [--requests 100] [--adapters 1000] [--tiles 12] [--learned 0.02] [--table]

Nothing here is measured: the model's shape is exact, and what a GPU attains of its peak is an assumption that is
named. `--table` prints the table of the document. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Model:
    """InternVL3-8B: InternViT-300M and Qwen2.5-7B, bfloat16 (its config.json)."""

    hidden: int = 3584
    middle: int = 18944
    layers: int = 28
    heads: int = 28
    key_heads: int = 4
    vocabulary: int = 151_674
    vision_parameters: float = 0.304e9
    tile_patches: int = 1025  # of 448 x 448 pixels, that the tower sees
    tile_tokens: int = 256  # that it becomes in the prompt
    question_tokens: int = 60
    bytes_each: int = 2

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    @property
    def layer_parameters(self) -> int:
        keys = self.key_heads * self.head
        return 2 * self.hidden**2 + 2 * self.hidden * keys + 3 * self.hidden * self.middle

    @property
    def weight_bytes(self) -> float:
        text = self.layers * self.layer_parameters + 2 * self.vocabulary * self.hidden
        return self.bytes_each * (text + self.vision_parameters)

    @property
    def token_flops(self) -> float:
        """Of one token through the language model's layers, attention left out (a tenth at 3,000 tokens)."""
        return 2.0 * self.layers * self.layer_parameters

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.key_heads * self.head * self.bytes_each

    def lora_bytes(self, rank: int) -> int:
        """Of a version: every linear layer of the language model, float32."""
        keys, wide = self.key_heads * self.head, self.hidden + self.middle
        return 4 * rank * self.layers * (2 * 2 * self.hidden + 2 * (self.hidden + keys) + 3 * wide)


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked, and what the machines give."""

    requests: float = 100.0  # a second
    adapters: int = 1000
    tiles: int = 12  # of an image, and one of the whole
    answer_tokens: int = 5
    learned: float = 0.02  # share of the questions that are learned from
    views: int = 8  # in which the reference votes on each
    updates: int = 6  # steps that each takes part in, its rounds when nothing waits left out
    versions_a_day: float = 24.0  # of an adapter that is in use
    rank: int = 8
    image_bytes: float = 300e3  # as it is kept: re-encoded and sealed
    gpu_flops: float = 989e12  # an H100's peak in bfloat16, dense
    attained: float = 0.4  # of it, in prefills of this size: an assumption
    gpu_bytes: float = 80e9
    gpu_hour: float = 2.5  # dollars; an assumption
    busy: float = 0.6  # of a GPU, so that questions need not queue
    replica_gpus: int = 1
    redis_writes: float = (
        5000.0  # a second that a Redis makes durable one by one (appendfsync always): an assumption
    )


def size(model: Model, load: Load) -> dict[str, float]:
    """The figures for a load; rates are a second, bytes are bytes, money is dollars an hour."""
    tiles = load.tiles + (load.tiles > 1)
    prompt = tiles * model.tile_tokens + model.question_tokens
    vision = 2 * model.vision_parameters * tiles * model.tile_patches
    prefill = model.token_flops * prompt
    answered = vision + prefill + model.token_flops * load.answer_tokens
    # A view is another image: it is seen and forwarded by itself. A step goes forward and back, which without
    # gradients of the frozen weights takes one more pass.
    voted = load.views * (vision + prefill)
    stepped = load.updates * 2 * prefill
    rate = load.attained * load.gpu_flops * load.busy
    serving, learning = (load.requests * work / rate for work in (answered, load.learned * (voted + stepped)))
    replicas = math.ceil(serving / load.replica_gpus)
    lora = model.lora_bytes(load.rank)
    readers = min(replicas, max(2, math.ceil(replicas / load.adapters) + 1))
    published = load.adapters * load.versions_a_day / 86_400
    kept = load.requests * load.learned
    return {
        "prompt_tokens": prompt,
        "answer_tflop": answered / 1e12,
        "learned_tflop": (voted + stepped) / 1e12,
        "gpus_serving": math.ceil(serving),
        "gpus_learning": math.ceil(learning),
        "learner_share": learning / (serving + learning),
        "dollars_hour": load.gpu_hour * (math.ceil(serving) + math.ceil(learning)),
        "weights_bytes": model.weight_bytes,
        "prompts_in_cache": (0.9 * load.gpu_bytes - model.weight_bytes) / (prompt * model.cache_bytes),
        "version_bytes": lora,
        "adapters_resident": 0.1 * load.gpu_bytes / lora,
        "redis_bytes_s": 2 * kept * load.image_bytes,  # in and out
        "redis_writes_s": 2 * kept,  # stored, and settled
        "redis_servers": math.ceil(2 * kept / load.redis_writes),
        "buffer_bytes_hour": 3600 * kept * load.image_bytes,
        "store_writes_s": published,
        "store_bytes_s": published * lora * (1 + readers),  # written once; questions go where their adapter is
        "store_bytes_s_everywhere": published * lora * (1 + replicas),  # each replica serves every adapter
        "store_bytes_day": 86_400 * published * lora,
    }


CASES = {
    "100/s, 13 tiles, all learned": Load(learned=1.0),
    "100/s, 13 tiles, 2 % learned": Load(),
    "100/s, 1 tile, 2 % learned": Load(tiles=1),
    "10,000/s, 13 tiles, 2 % learned": Load(requests=10_000),
    "10,000/s, 1 tile, 2 % learned": Load(requests=10_000, tiles=1),
    "10,000/s, 1 tile, 0.1 % learned": Load(requests=10_000, tiles=1, learned=0.001),
}


def table() -> str:
    """The table of `docs/scale.md`."""
    head = ("load", "GPUs that serve", "and learn", "$ an hour", "Redis", "images kept an hour", "store")
    rows = [head, ("---",) * len(head)]
    for name, load in CASES.items():
        found = size(Model(), load)
        redis = f"{found['redis_bytes_s'] / 1e6:,.0f} MB/s, {found['redis_writes_s']:,.0f} writes/s"
        store = (
            f"{found['store_bytes_s'] / 1e6:,.0f} MB/s ({found['store_bytes_s_everywhere'] / 1e6:,.0f} everywhere)"
        )
        counts = (f"{found[each]:,.0f}" for each in ("gpus_serving", "gpus_learning", "dollars_hour"))
        rows.append((name, *counts, redis, f"{found['buffer_bytes_hour'] / 1e9:,.1f} GB", store))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Print what a load takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("requests", "learned"):
        parser.add_argument(f"--{name}", type=float, default=getattr(Load(), name))
    for name in ("adapters", "tiles"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Load(), name))
    parser.add_argument("--table", action="store_true")
    options = vars(parser.parse_args())
    if options.pop("table"):
        print(table())
    load = Load(**options)
    print(json.dumps({"load": asdict(load), "figures": {k: round(v, 4) for k, v in size(Model(), load).items()}}))


if __name__ == "__main__":
    main()
