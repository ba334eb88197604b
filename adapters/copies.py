"""Answers to a prompt that cannot be shared: each in a copy of the row that the prompt has in the cache.

Sliding windows and recurrent states know only one continuation. The results are those of a tree (`tree.py`); what
answers have in common is fed for each of them, and memory grows with their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from servetune.adapters import caches
from servetune.adapters.family import Family, Prefix

COPIED_BYTES = 512 * 2**20
"""Of copies of a prompt that are alive at once."""


def feed_paths(family: Family, prefix: Prefix, paths: Sequence[Sequence[int]]) -> list[Tensor]:
    """Per path the (T, V) logits after each of its tokens, after a single prompt; differentiable."""
    found: list[Tensor] = []
    for part in _parts(prefix, paths):
        tokens = torch.zeros(len(part), max(map(len, part)), dtype=torch.long)
        for row, path in enumerate(part):
            # What follows a path in its row is not looked at: every layer is causal.
            tokens[row, : len(path)] = torch.tensor(path)
        logits = extend_copies(
            family, prefix, caches.rows(prefix.cache, torch.zeros(len(part), dtype=torch.long)), tokens, 0
        )
        found += [own[: len(path)] for own, path in zip(logits, part, strict=True)]
    return found


def _parts(prefix: Prefix, paths: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    size = most_copies(prefix)
    for start in range(0, len(paths), size):
        yield paths[start : start + size]


def most_copies(prefix: Prefix) -> int:
    """Copies of a prompt that may be alive at once."""
    return max(1, COPIED_BYTES // prefix.num_bytes)


def extend_copies(family: Family, prefix: Prefix, cache: DynamicCache, tokens: Tensor, depth: int) -> Tensor:
    """(R, T, V) logits after (R, T) tokens, the first of which is the one at this depth after the prompt."""
    num, length = tokens.shape
    positions = (prefix.positions[0] + depth + torch.arange(length)).expand(num, -1)
    device = prefix.logits.device
    slots = prefix.slots and prefix.slots * num
    return family.extend(cache, tokens.to(device), positions.to(device), None, slots=slots)
