"""Many answers to one prompt, as a tree of tokens: whatever they share is computed once.

The prompt has one row in the key-value cache, and so has everything below it: tokens of different answers lie
side by side in that row, and a mask lets each see the prompt, its own ancestors and itself. Thirty-two rollouts
that agree on their first token feed that token once; so do labels with a common beginning. Compared with N
copies of the prompt this is the same arithmetic without the repetition, and it is differentiable. Several prompts
are rows of one cache where the family allows it. Where a model's layers cannot share a prompt, the same is
computed in copies of it (`copies.py`).

Here given answers are scored; `search.py` looks for the likely ones of a long list, `growth.py` draws new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor

from servetune.adapters.attention import Blocks
from servetune.adapters.copies import feed_paths
from servetune.adapters.family import Family, Prefix, Prompt, Slots
from servetune.adapters.features import ByteCache

MAX_NODES = 2048
"""Tokens fed in one pass; more are fed in several, so that the mask and the logits stay bounded."""

COPY_COST = 8
"""What it takes to copy one key and value of the prompt, in scores of a query against a key."""

KEPT_BYTES = 256 * 2**20
"""Keys and values of prompts that are kept for a second use; beyond, the prompts are fed again."""


class Prefixes:
    """Several prompts after their forward passes with the active adapter, packed where the family allows it.

    What does not fit into KEPT_BYTES is fed again for every use, so the adapter must stay the same.

    Args:
        prompts: B prompts with their vision features; None where the active adapter is to see them.
        keys: under which a prompt is found in `cache` and left there; prompts with the same key are fed once.
        slots: the adapter of each prompt, where it is not the active one.
    """

    def __init__(
        self,
        family: Family,
        prompts: Sequence[tuple[Prompt, dict[str, Any] | None]],
        keys: Sequence[Hashable] | None = None,
        cache: ByteCache | None = None,
        slots: Slots | None = None,
    ) -> None:
        self.family = family
        self._prompts = prompts
        self._keys = keys or range(len(prompts))
        self._cache = cache
        self._slots = slots
        together = packs(family) if len(prompts) > 1 else False
        lengths = [prompt.length for prompt, _ in prompts]
        self._packs = list(_packs(lengths)) if together else [[row] for row in range(len(prompts))]
        self._kept: dict[int, Prefix] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def __iter__(self) -> Iterator[tuple[list[int], Prefix]]:
        """The numbers of some prompts, and those prompts fed."""
        for number, rows in enumerate(self._packs):
            yield rows, self._fed(number)

    def _fed(self, number: int) -> Prefix:
        if number in self._kept:
            return self._kept[number]
        rows = self._packs[number]
        prefix = self._found(rows) if self._cache else self._feed(rows)
        prefix = replace(prefix, slots=self._slots_of(rows))  # what is cached outlives the slot it was made with
        if prefix.num_bytes + sum(kept.num_bytes for kept in self._kept.values()) <= KEPT_BYTES:
            self._kept[number] = prefix
        return prefix

    def _feed(self, rows: list[int]) -> Prefix:
        prompts = [
            (p, self.family.see(p) if seen is None else seen) for p, seen in map(self._prompts.__getitem__, rows)
        ]
        slots = self._slots_of(rows)
        if len(prompts) > 1:
            return self.family.prefill_each(prompts, slots)
        return self.family.prefill(*prompts[0], slots)

    def _slots_of(self, rows: list[int]) -> Slots | None:
        return self._slots and tuple(self._slots[row] for row in rows)

    def _found(self, rows: list[int]) -> Prefix:
        """What is in the cache, and the rest fed and left there."""
        assert self._cache is not None
        keys = [self._keys[row] for row in rows]
        known: dict[Hashable, Prefix] = {key: kept for key in keys if (kept := self._cache.get(key))}
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
        if new:
            fed = self._feed(list(new.values()))
            known |= {key: fed.alone(place) for place, key in enumerate(new)}
            for key in new:
                self._cache.put(key, known[key].cloned() if len(new) > 1 else known[key])
            if len(new) == len(rows):
                return fed
        return Prefix.joined([known[key] for key in keys])


def score(family: Family, prefix: Prefix, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given token sequences after a single prompt.

    Returns:
        (N, T) log-probabilities of the tokens, zero where padded, and the (N, T) mask that is True on tokens.
    """
    rows = score_tries(family, prefix, [sequences], Trie.read)[0]
    longest = max(len(row) for row in rows)
    padded = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=padded.device)
    return padded, torch.arange(longest, device=padded.device) < lengths[:, None]


def likelihoods(
    family: Family, prefix: Prefix, sequence: Sequence[int], top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of T tokens after a single prompt, and of the likeliest in its place.

    Returns:
        (T,) log-probabilities of the tokens, (T, top) of the likeliest, and (T, top) which these are.
    """
    logprobs = _feed_tries(family, prefix, [Trie([sequence])])[0].log_softmax(-1)
    best = logprobs.topk(top)
    own = logprobs[range(len(sequence)), list(sequence)]
    return own.cpu(), best.values.cpu(), best.indices.cpu()


def score_each(prefixes: Prefixes, sequences: Sequence[Sequence[Sequence[int]]]) -> list[Tensor]:
    """Log-probabilities of whole answers to several prompts.

    Args:
        sequences: for each prompt its N_b token sequences.

    Returns:
        B tensors (N_b,).
    """
    found: dict[int, Tensor] = {}
    for rows, prefix in prefixes:
        scored = score_tries(prefixes.family, prefix, [sequences[row] for row in rows], Trie.totals)
        none = prefix.logits.new_zeros(0)
        found |= {row: torch.cat([none, *parts]) for row, parts in zip(rows, scored, strict=True)}
    return [found[row] for row in range(len(prefixes))]


class Trie:
    """Token sequences as a tree: what each token's log-probability is read from, and what has to be fed for it."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node; parents come before children
        self.paths = []
        for sequence in sequences:
            node, path = -1, []
            for token in sequence:
                node = nodes.setdefault((node, token), len(nodes))
                path.append(node)
            self.paths.append(path)
        self.parents = [parent for parent, _ in nodes]
        self.tokens = [token for _, token in nodes]
        self.inner = sorted(set(self.parents) - {-1})  # leaves need no forward pass

    def fed(self) -> tuple[Tensor, Tensor, Tensor]:
        """The M inner nodes: (M,) tokens, (M,) depths, (M, M) True where a token sees an ancestor or itself."""
        place = {node: index for index, node in enumerate(self.inner)}
        visible = torch.eye(len(self.inner), dtype=torch.bool)
        depths = [0] * len(self.inner)
        for index, node in enumerate(self.inner):
            if self.parents[node] != -1:
                parent = place[self.parents[node]]
                visible[index] |= visible[parent]
                depths[index] = depths[parent] + 1
        tokens = torch.tensor([self.tokens[node] for node in self.inner], dtype=torch.long)
        return tokens, torch.tensor(depths, dtype=torch.long), visible

    def branches(self) -> list[list[int]]:
        """The longest paths of inner nodes, from the prompt on; every inner node is in one of them at least."""
        paths = []
        for node in set(self.inner) - {self.parents[node] for node in self.inner}:
            path = []
            while node != -1:
                path.append(node)
                node = self.parents[node]
            paths.append(path[::-1])
        return sorted(paths)

    def groups(self, prompt: int) -> list[list[int]] | None:
        """Places of the inner nodes in groups of about one size that do not see each other.

        What follows one first token stays together. None where it does not pay.
        """
        families: dict[int, list[int]] = {}
        roots: dict[int, int] = {}
        for index, node in enumerate(self.inner):
            roots[node] = roots.get(self.parents[node], node)
            families.setdefault(roots[node], []).append(index)
        longest = max(map(len, families.values()), default=0)
        groups: list[list[int]] = []
        for family in sorted(families.values(), key=len, reverse=True):
            room = next((group for group in groups if len(group) + len(family) <= longest), None)
            if room is None:
                groups.append(room := [])
            room.extend(family)
        whole = len(self.inner) * (prompt + len(self.inner))
        apart = len(groups) * (longest * (prompt + longest) + COPY_COST * prompt)
        return groups if 1.5 * apart < whole else None

    def read(self, logits: Tensor) -> list[Tensor]:
        """Per sequence its tokens' log-probabilities, from (1 + M, V) logits after prompt and inner nodes."""
        logprobs, device = self._logprobs(logits), logits.device
        whole = torch.tensor([node for path in self.paths for node in path], device=device)
        return list(torch.split(logprobs[whole], [len(path) for path in self.paths]))

    def totals(self, logits: Tensor) -> list[Tensor]:
        """(N,) log-probability of each whole sequence, from the logits that `read` takes."""
        logprobs, device = self._logprobs(logits), logits.device
        owners = [index for index, path in enumerate(self.paths) for _ in path]
        whole = torch.tensor([node for path in self.paths for node in path], device=device)
        empty = logprobs.new_zeros(len(self.paths))
        return [empty.index_add(0, torch.tensor(owners, device=device), logprobs[whole])]

    def _logprobs(self, logits: Tensor) -> Tensor:
        """(nodes,) log-probability of each node after its parent."""
        device = logits.device
        rows = {node: row for row, node in enumerate([-1, *self.inner])}
        source = torch.tensor([rows[parent] for parent in self.parents], device=device)
        chosen = logits[source, torch.tensor(self.tokens, device=device)]
        return chosen - logits.logsumexp(-1)[source]


def score_tries(
    family: Family,
    prefix: Prefix,
    sequences: Sequence[Sequence[Sequence[int]]],
    read: Callable[[Trie, Tensor], list[Tensor]],
) -> list[list[Tensor]]:
    """What `read` makes of every prompt's trie of sequences; in several passes where there are many nodes."""
    distinct = {id(own): own for own in sequences}  # the same long list of labels is often given for every prompt
    parts = {key: [Trie(part) for part in _parts(own, len(sequences))] for key, own in distinct.items()}
    found: list[list[Tensor]] = [[] for _ in sequences]
    for tries in zip_longest(*(parts[id(own)] for own in sequences)):
        rows = _feed_tries(family, prefix, tries)
        for own, trie, logits in zip(found, tries, rows, strict=True):
            own.extend(read(trie, logits) if trie else [])
    return found


def _parts(sequences: Sequence[Sequence[int]], rows: int) -> Iterator[list[Sequence[int]]]:
    part: list[Sequence[int]] = []
    size = 0
    for sequence in sequences:
        if part and (size + len(sequence)) * rows > MAX_NODES:
            yield part
            part, size = [], 0
        part.append(sequence)
        size += len(sequence)
    if part:
        yield part


def _feed_tries(family: Family, prefix: Prefix, tries: Sequence[Trie | None]) -> list[Tensor]:
    """Per row (1 + M, V) logits after its prompt and after the inner nodes of its trie, where it has one."""
    logits = prefix.logits[:, None]
    most = max(len(trie.inner) if trie else 0 for trie in tries)
    if not family.shares:
        [trie] = tries
        if trie and trie.inner:
            logits = torch.cat([logits, _feed_branches(family, prefix, trie)], dim=1)
    elif len(tries) == 1 and tries[0] and (groups := tries[0].groups(prefix.width)):
        logits = torch.cat([logits, _feed_groups(family, prefix, tries[0], groups)], dim=1)
    elif most:
        device = logits.device
        tokens, positions = (torch.zeros(len(tries), most, dtype=torch.long) for _ in range(2))
        mask = torch.zeros(len(tries), most, prefix.width + most, dtype=torch.bool)
        mask[:, :, : prefix.width] = prefix.seen()[:, None]
        for row, trie in enumerate(tries):
            if trie and (size := len(trie.inner)):
                tokens[row, :size], depths, mask[row, :size, prefix.width : prefix.width + size] = trie.fed()
                positions[row, :size] = depths + prefix.positions[row]
        cells = tokens.to(device), positions.to(device), mask.to(device)
        fed = family.extend(prefix.fork(), *cells, slots=prefix.slots)
        logits = torch.cat([logits, fed], dim=1)
    return list(allowed(family, logits))


def _feed_groups(family: Family, prefix: Prefix, trie: Trie, groups: list[list[int]]) -> Tensor:
    """(1, M, V) logits after the inner nodes, whose attention is computed group by group."""
    tokens, depths, visible = trie.fed()
    blocks, device = Blocks(groups), prefix.logits.device
    mask = torch.ones(*blocks.tokens.shape, prefix.width + blocks.tokens.shape[1], dtype=torch.bool)
    mask[:, :, prefix.width :] = False
    for row, group in enumerate(groups):
        size = len(group)
        mask[row, :size, prefix.width : prefix.width + size] = visible[group][:, group]
    positions = (depths + prefix.positions[0])[None].to(device)
    return family.extend(prefix.fork(), tokens[None].to(device), positions, mask.to(device), blocks, prefix.slots)


def _feed_branches(family: Family, prefix: Prefix, trie: Trie) -> Tensor:
    """(1, M, V) logits after the inner nodes, each branch fed in a copy of the prompt."""
    branches = trie.branches()
    fed = torch.cat(feed_paths(family, prefix, [[trie.tokens[node] for node in path] for path in branches]))
    cells = {node: cell for cell, node in enumerate(node for path in branches for node in path)}
    return fed[[cells[node] for node in trie.inner]][None]


def _packs(lengths: list[int]) -> Iterator[list[int]]:
    """Rows for one pass each: of like lengths, and at most MAX_NODES tokens with their padding."""
    rows: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if rows and (len(rows) + 1) * lengths[row] > MAX_NODES:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


@torch.no_grad()
def packs(family: Family) -> bool:
    """Whether packing gives what one prompt at a time gives; tried once per family.

    Other position schemes (M-RoPE), features fed between layers or scaled logits are found out this way.
    """
    if not family.shares:
        return False
    if (known := _PACKS.get(family)) is None:
        ramp = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
        asked = [family.prompt([ramp], question) for question in ("What is this?", "Is this a long question?")]
        prompts = [(prompt, family.see(prompt)) for prompt in asked]
        answers = [family.tokens("a red dog"), family.tokens("a red cat")]
        alone = [score_tries(family, family.prefill(*prompt), [answers], Trie.totals)[0][0] for prompt in prompts]
        try:
            packed = score_tries(family, family.prefill_each(prompts), [answers] * 2, Trie.totals)
            known = all(torch.allclose(a, b[0], atol=1e-2, rtol=1e-3) for a, b in zip(alone, packed, strict=True))
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            known = False
        _PACKS[family] = known
    return known


_PACKS: WeakKeyDictionary[Family, bool] = WeakKeyDictionary()


def allowed(family: Family, logits: Tensor) -> Tensor:
    """Logits without the tokens that stand for images."""
    return logits.index_fill(-1, family.forbidden.to(logits.device), float("-inf"))
