"""Many answers to one prompt, as a tree of tokens: whatever they share is computed once.

The prompt's key-value cache has a single row, and so has everything below it: tokens of different answers lie
side by side in that row, and a mask lets each see the prompt, its own ancestors and itself. Thirty-two rollouts
that agree on their first token feed that token once; so do labels with a common beginning. Compared with N
copies of the prompt this is the same arithmetic without the repetition, and it is differentiable.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from servetune.adapters.family import Family, Prefix, Prompt, TokenTree

MAX_NODES = 2048
"""Tokens fed in one pass; more are fed in several, so that the mask and the logits stay bounded."""


class Stopped(Exception):
    """Nobody waits for these answers any more."""


@dataclass(frozen=True, slots=True)
class Sample:
    """An answer drawn `count` times: its tokens, their summed log-probability, and whether it came to an end."""

    tokens: tuple[int, ...]
    logprob: float
    count: int
    finished: bool


def score(family: Family, prefix: Prefix, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given token sequences after a prompt.

    Returns:
        (N, T) log-probabilities of the tokens, zero where padded, and the (N, T) mask that is True on tokens.
    """
    rows: list[Tensor] = []
    for part in _parts(sequences):
        rows.extend(_score_part(family, prefix, part))
    longest = max(len(row) for row in rows)
    padded = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=padded.device)
    return padded, torch.arange(longest, device=padded.device) < lengths[:, None]


def _parts(sequences: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    part: list[Sequence[int]] = []
    size = 0
    for sequence in sequences:
        if part and size + len(sequence) > MAX_NODES:
            yield part
            part, size = [], 0
        part.append(sequence)
        size += len(sequence)
    if part:
        yield part


class _Trie:
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

    def fed(self) -> TokenTree:
        """The inner nodes."""
        place = {node: index for index, node in enumerate(self.inner)}
        visible = torch.eye(len(self.inner), dtype=torch.bool)
        depths = [0] * len(self.inner)
        for index, node in enumerate(self.inner):
            if self.parents[node] != -1:
                parent = place[self.parents[node]]
                visible[index] |= visible[parent]
                depths[index] = depths[parent] + 1
        tokens = torch.tensor([self.tokens[node] for node in self.inner], dtype=torch.long)
        return TokenTree(tokens, torch.tensor(depths, dtype=torch.long), visible)

    def read(self, logits: Tensor) -> list[Tensor]:
        """Per sequence its tokens' log-probabilities, from (1 + inner, V) logits after prompt and inner nodes."""
        device = logits.device
        rows = {node: row for row, node in enumerate([-1, *self.inner])}
        source = torch.tensor([rows[parent] for parent in self.parents], device=device)
        chosen = logits[source, torch.tensor(self.tokens, device=device)]
        logprobs = chosen - logits.logsumexp(-1)[source]  # (nodes,)
        whole = torch.tensor([node for path in self.paths for node in path], device=device)
        return list(torch.split(logprobs[whole], [len(path) for path in self.paths]))

    def totals(self, logits: Tensor) -> Tensor:
        """(N,) log-probability of each whole sequence, from the logits that `read` takes."""
        owners = [index for index, path in enumerate(self.paths) for _ in path]
        parts = torch.cat(self.read(logits))
        return parts.new_zeros(len(self.paths)).index_add(0, torch.tensor(owners, device=parts.device), parts)


def _score_part(family: Family, prefix: Prefix, sequences: list[Sequence[int]]) -> list[Tensor]:
    trie = _Trie(sequences)
    logits = prefix.logits
    if trie.inner:
        tree = trie.fed()
        seen = torch.ones(len(trie.inner), prefix.length, dtype=torch.bool)
        mask = torch.cat([seen, tree.visible], dim=1).to(logits.device)
        positions = tree.depths.to(logits.device) + prefix.position
        fed = family.extend(prefix.fork(), tree.tokens.to(logits.device), positions, mask)
        logits = torch.cat([logits, fed])
    return trie.read(_allowed(family, logits))


def score_each(
    family: Family,
    prompts: Sequence[tuple[Prompt, dict[str, Any]]],
    sequences: Sequence[Sequence[Sequence[int]]],
) -> list[Tensor]:
    """Log-probabilities of whole answers to several prompts, packed into few passes where the family allows it.

    Args:
        prompts: B prompts with their vision features. sequences: for each its N_b token sequences.

    Returns:
        B tensors (N_b,).
    """
    if not packs(family):
        return [_score_alone(family, prompt, own) for prompt, own in zip(prompts, sequences, strict=True)]
    distinct = {id(own): own for own in sequences}  # the same long list of labels is often given for every prompt
    grown = {key: _Trie(own) for key, own in distinct.items()}
    tries = [grown[id(own)] for own in sequences]
    found: dict[int, Tensor] = {}
    for rows in _packs([p.length + len(t.inner) for (p, _), t in zip(prompts, tries, strict=True)]):
        logits = _allowed(family, family.extend_each([prompts[r] for r in rows], [tries[r].fed() for r in rows]))
        for place, row in enumerate(rows):
            found[row] = tries[row].totals(logits[place, : 1 + len(tries[row].inner)])
    return [found[row] for row in range(len(prompts))]


def _score_alone(
    family: Family, prompt: tuple[Prompt, dict[str, Any]], sequences: Sequence[Sequence[int]]
) -> Tensor:
    return score(family, family.prefill(*prompt), sequences)[0].sum(-1)


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
    if (known := _PACKS.get(family)) is None:
        ramp = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
        asked = [family.prompt([ramp], question) for question in ("What is this?", "Is this a long question?")]
        prompts = [(prompt, family.see(prompt)) for prompt in asked]
        answers = [family.tokens("a red dog"), family.tokens("a red cat")]
        alone = [_score_alone(family, prompt, answers) for prompt in prompts]
        try:
            logits = _allowed(family, family.extend_each(prompts, [_Trie(answers).fed()] * 2))
            packed = [_Trie(answers).totals(row) for row in logits]
            known = all(torch.allclose(a, b, atol=1e-2, rtol=1e-3) for a, b in zip(alone, packed, strict=True))
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            known = False
        _PACKS[family] = known
    return known


_PACKS: WeakKeyDictionary[Family, bool] = WeakKeyDictionary()


def _allowed(family: Family, logits: Tensor) -> Tensor:
    """Logits without the tokens that stand for images."""
    return logits.index_fill(-1, family.forbidden.to(logits.device), float("-inf"))


@dataclass(slots=True)
class _Branch:
    tokens: tuple[int, ...]
    logprob: float
    count: int
    path: tuple[int, ...]  # places of its tokens in the cache row, after the prompt


@torch.no_grad()
def sample(
    family: Family,
    prefix: Prefix,
    num: int,
    max_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    stop: threading.Event | None = None,
) -> list[Sample]:
    """Draw `num` answers independently; equal beginnings are drawn and fed as one branch with a count.

    Temperature 0 takes the likeliest token. Log-probabilities are those at temperature 1, whatever was drawn at.
    The returned counts sum to `num`.

    Raises:
        Stopped: `stop` was set meanwhile.
    """

    def draw(logprobs: Tensor, count: int) -> Iterator[tuple[int, int]]:
        if temperature == 0:
            yield int(logprobs.argmax()), count
            return
        shares = (logprobs / temperature).softmax(-1).cpu()  # generators live on the CPU
        drawn = torch.multinomial(shares, count, replacement=True, generator=generator)
        values, counts = torch.unique(drawn, return_counts=True)
        yield from zip(values.tolist(), counts.tolist(), strict=True)

    return _grow(family, prefix, _Branch((), 0.0, num, ()), draw, max_tokens, stop)


@torch.no_grad()
def alternatives(
    family: Family, prefix: Prefix, num: int, max_tokens: int, stop: threading.Event | None = None
) -> list[Sample]:
    """The `num` likeliest first tokens, each continued greedily; likeliest answer first. Raises Stopped."""

    def draw(logprobs: Tensor, count: int) -> Iterator[tuple[int, int]]:
        possible = int(logprobs.isfinite().sum())
        for token in logprobs.topk(min(count, possible)).indices.tolist():
            yield token, 1

    found = _grow(family, prefix, _Branch((), 0.0, num, ()), draw, max_tokens, stop)
    return sorted(found, key=lambda s: -s.logprob)


def _grow(
    family: Family,
    prefix: Prefix,
    root: _Branch,
    draw: Callable[[Tensor, int], Iterator[tuple[int, int]]],
    max_tokens: int,
    stop: threading.Event | None,
) -> list[Sample]:
    """Grow the tree a level at a time: `draw` yields the tokens that follow a branch, with their counts."""
    cache, fed = prefix.fork(), 0
    branches, logits = [root], prefix.logits
    done: list[Sample] = []
    max_tokens = min(max_tokens, family.max_length - prefix.length)
    for depth in range(max_tokens):
        if stop and stop.is_set():
            raise Stopped
        logprobs = _allowed(family, logits).log_softmax(-1)
        children = []
        for branch, row in zip(branches, logprobs, strict=True):
            for token, count in draw(row, branch.count):
                tokens = (*branch.tokens, token)
                logprob = branch.logprob + float(row[token])
                if token in family.end_tokens or depth + 1 == max_tokens:
                    done.append(Sample(tokens, logprob, count, token in family.end_tokens))
                else:
                    children.append(_Branch(tokens, logprob, count, branch.path))
        if not children:
            break
        branches = children
        logits = _feed(family, prefix, cache, branches, fed, depth)
        fed += len(branches)
    return done


def _feed(
    family: Family, prefix: Prefix, cache: DynamicCache, branches: list[_Branch], fed: int, depth: int
) -> Tensor:
    """Feed the last token of every branch and note its place in the cache row."""
    device = prefix.logits.device
    mask = None
    for index, branch in enumerate(branches):
        branch.path = (*branch.path, fed + index)
    if fed or len(branches) > 1:
        mask = torch.zeros(len(branches), prefix.length + fed + len(branches), dtype=torch.bool)
        mask[:, : prefix.length] = True
        for row, branch in enumerate(branches):
            mask[row, [prefix.length + place for place in branch.path]] = True
        mask = mask.to(device)
    tokens = torch.tensor([branch.tokens[-1] for branch in branches], device=device)
    positions = torch.full_like(tokens, prefix.position + depth)
    return family.extend(cache, tokens, positions, mask)
