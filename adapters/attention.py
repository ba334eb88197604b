"""Attention for continuations of a shared prompt, as an implementation that transformers can choose.

Beside what PyTorch's kernel does it packs heads that share keys, so that no key is copied for them, and it lets
tokens that cannot see each other be attended to in blocks: answers to one prompt share its keys and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "servetune"


class Blocks:
    """M tokens in R groups of T at most, none of which sees a token of another group.

    Args:
        groups: R lists of places among the M tokens.
    """

    def __init__(self, groups: list[list[int]]) -> None:
        longest = max(map(len, groups))
        padded = [group + group[:1] * (longest - len(group)) for group in groups]
        self.tokens = torch.tensor(padded)  # (R, T), padded with the group's first
        cells = {
            place: row * longest + column for row, group in enumerate(groups) for column, place in enumerate(group)
        }
        self.cells = torch.tensor([cells[place] for place in sorted(cells)])  # (M,) of each token among the R * T


def with_blocks(mask: Tensor, blocks: Blocks) -> Tensor:
    """A (R, 1, T, prompt + T) mask that stands for M tokens in blocks, for the layers of one forward pass."""
    mask.blocks = blocks  # type: ignore[attr-defined]
    return mask


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if attention_mask is None or kwargs.get("position_bias") is not None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return plain
    blocks: Blocks | None = getattr(attention_mask, "blocks", None)
    if blocks is None:
        return _packed(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None
    prompt = attention_mask.shape[-1] - blocks.tokens.shape[1]
    tokens = blocks.tokens.to(query.device)
    rows = (len(tokens), -1, -1, -1)

    def taken(tensor: Tensor) -> Tensor:  # (1, heads, M, D) -> (R, heads, T, D)
        return tensor[0].transpose(0, 1)[tokens].transpose(1, 2)

    keys, values = (
        torch.cat([each[:, :, :prompt].expand(rows), taken(each[:, :, prompt:])], dim=2) for each in (key, value)
    )
    found = _packed(taken(query), keys, values, attention_mask, scaling)  # (R, H, T, D)
    flat = found.transpose(1, 2).reshape(-1, *found.shape[1::2])
    return flat[blocks.cells.to(flat.device)][None], None


def _packed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """(B, H, M, D); query heads that share a key head are further queries to it."""
    batch, heads, num, size = query.shape
    shared = heads // key.shape[1]
    if shared > 1:
        query = query.reshape(batch, key.shape[1], shared * num, size)
        mask = _repeated(mask, shared)
    found = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return found.reshape(batch, heads, num, found.shape[-1])


def _repeated(mask: Tensor, times: int) -> Tensor:
    """The mask for several heads, made once for all layers."""
    known: Tensor | None = getattr(mask, "repeated", None)
    if known is None or known.shape[2] != times * mask.shape[2]:
        known = mask.repeat(1, 1, times, 1)
        mask.repeated = known  # type: ignore[attr-defined]
    return known


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
