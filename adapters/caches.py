"""What a language model keeps of a prompt, layer by layer, whatever kinds of layers it has.

Full attention keeps every key and value, sliding windows the latest of them, convolutions and recurrent layers a
state. Only the first can be shared by continuations that lie side by side in one row (`tree.py`); the others are
copied for each (`copies.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

SHARED = frozenset({"full_attention"})
COPIED = frozenset({"sliding_attention", "chunked_attention", "linear_attention", "conv"})


def empty(config: Any) -> DynamicCache:
    """A cache for a model of this configuration."""
    cache = DynamicCache(config=config)
    cache.layers = [
        _StateLayer(layer.number_of_states) if type(layer) is LinearAttentionLayer else layer
        for layer in cache.layers
    ]
    return cache


def fork(cache: DynamicCache) -> DynamicCache:
    """A cache that shares the tensors of another and is extended by itself."""
    forked = copy.copy(cache)
    forked.layers = [_copied(layer) for layer in cache.layers]
    return forked


def tensors(cache: DynamicCache) -> list[Tensor]:
    """All that a cache holds."""
    return [owner[name] for owner, name in _held(cache)]


def holding(cache: DynamicCache, held: Sequence[Tensor]) -> DynamicCache:
    """The same cache with other tensors, in the order of `tensors`."""
    forked = fork(cache)
    for (owner, name), tensor in zip(list(_held(forked)), held, strict=True):
        owner[name] = tensor
    return forked


def rows(cache: DynamicCache, chosen: Tensor) -> DynamicCache:
    """A cache of copies of some rows, in the order in which they are given, any of them as often as wanted."""
    return holding(cache, [tensor.index_select(0, chosen.to(tensor.device)) for tensor in tensors(cache)])


def _copied(layer: Any) -> Any:
    copied = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):  # states by number, and what is known of them
            setattr(copied, name, dict(value))
    return copied


def _held(cache: DynamicCache) -> Iterator[tuple[dict[Any, Any], Any]]:
    """Where each tensor is kept."""
    for layer in cache.layers:
        own = vars(layer)
        places = [(own, "keys"), (own, "values")]
        for states in (own.get("conv_states", {}), own.get("recurrent_states", {})):
            places += [(states, number) for number in states]
        yield from (place for place in places if isinstance(place[0].get(place[1]), Tensor))


class _StateLayer(LinearAttentionLayer):  # type: ignore[misc]
    """A new recurrent state takes the place of the old one instead of being written over it.

    The old one is needed to go back through, and other continuations begin at it.
    """

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        self.is_recurrent_states_initialized[state_idx] = True
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states
