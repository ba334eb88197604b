"""Many answers to one prompt, as a tree of tokens: whatever they share is computed once.

The prompt has one row in the key-value cache, and so has everything below it: tokens of different answers lie
side by side in that row, and a mask lets each see the prompt, its own ancestors and itself. Thirty-two rollouts
that agree on their first token feed that token once; so do labels with a common beginning. Compared with N
copies of the prompt this is the same arithmetic without the repetition, and it is differentiable. Several prompts
are rows of one cache where the family allows it.
"""

from __future__ import annotations

import math
import statistics
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor

from servetune.adapters.attention import Blocks
from servetune.adapters.family import Family, Prefix, Prompt
from servetune.adapters.features import ByteCache

MAX_NODES = 2048
"""Tokens fed in one pass; more are fed in several, so that the mask and the logits stay bounded."""

COPY_COST = 8
"""What it takes to copy one key and value of the prompt, in scores of a query against a key."""

FEW_NODES = 96
"""As many tokens of answers are fed at once rather than searched."""

EPSILON = 1e-2
"""Share of the probability of all answers that a search may leave unexplored."""

KEPT_BYTES = 256 * 2**20
"""Keys and values of prompts that are kept for a second use; beyond, the prompts are fed again."""


class Stopped(Exception):
    """Nobody waits for these answers any more."""


class Watch:
    """What is asked and told while answers to several prompts grow, between two tokens."""

    def stopped(self, row: int) -> bool:
        """Whether nobody waits for the answers to a prompt any more."""
        return False

    def finished(self, row: int, samples: list[Sample]) -> None:
        """All answers to a prompt have come to an end."""

    def stepped(self, depth: int) -> None:
        """Every answer that still grows has its token at this depth, from 0."""


@dataclass(frozen=True, slots=True)
class Sample:
    """An answer drawn `count` times: its tokens, their summed log-probability, and whether it came to an end."""

    tokens: tuple[int, ...]
    logprob: float
    count: int
    finished: bool


class Prefixes:
    """Several prompts after their forward passes with the active adapter, packed where the family allows it.

    What does not fit into KEPT_BYTES is fed again for every use, so the adapter must stay the same.

    Args:
        prompts: B prompts with their vision features; None where the active adapter is to see them.
        keys: under which a prompt is found in `cache` and left there; prompts with the same key are fed once.
    """

    def __init__(
        self,
        family: Family,
        prompts: Sequence[tuple[Prompt, dict[str, Any] | None]],
        keys: Sequence[Hashable] | None = None,
        cache: ByteCache | None = None,
    ) -> None:
        self.family = family
        self._prompts = prompts
        self._keys = keys or range(len(prompts))
        self._cache = cache
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
        prefix = self._found(self._packs[number]) if self._cache else self._feed(self._packs[number])
        if prefix.num_bytes + sum(kept.num_bytes for kept in self._kept.values()) <= KEPT_BYTES:
            self._kept[number] = prefix
        return prefix

    def _feed(self, rows: list[int]) -> Prefix:
        prompts = [
            (p, self.family.see(p) if seen is None else seen) for p, seen in map(self._prompts.__getitem__, rows)
        ]
        return self.family.prefill_each(prompts) if len(prompts) > 1 else self.family.prefill(*prompts[0])

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
    rows = _score(family, prefix, [sequences], _Trie.read)[0]
    longest = max(len(row) for row in rows)
    padded = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=padded.device)
    return padded, torch.arange(longest, device=padded.device) < lengths[:, None]


def score_each(prefixes: Prefixes, sequences: Sequence[Sequence[Sequence[int]]]) -> list[Tensor]:
    """Log-probabilities of whole answers to several prompts.

    Args:
        sequences: for each prompt its N_b token sequences.

    Returns:
        B tensors (N_b,).
    """
    found: dict[int, Tensor] = {}
    for rows, prefix in prefixes:
        scored = _score(prefixes.family, prefix, [sequences[row] for row in rows], _Trie.totals)
        none = prefix.logits.new_zeros(0)
        found |= {row: torch.cat([none, *parts]) for row, parts in zip(rows, scored, strict=True)}
    return [found[row] for row in range(len(prefixes))]


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


def _score(
    family: Family,
    prefix: Prefix,
    sequences: Sequence[Sequence[Sequence[int]]],
    read: Callable[[_Trie, Tensor], list[Tensor]],
) -> list[list[Tensor]]:
    """What `read` makes of every prompt's trie of sequences; in several passes where there are many nodes."""
    distinct = {id(own): own for own in sequences}  # the same long list of labels is often given for every prompt
    parts = {key: [_Trie(part) for part in _parts(own, len(sequences))] for key, own in distinct.items()}
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


def _feed_tries(family: Family, prefix: Prefix, tries: Sequence[_Trie | None]) -> list[Tensor]:
    """Per row (1 + M, V) logits after its prompt and after the inner nodes of its trie, where it has one."""
    logits = prefix.logits[:, None]
    most = max(len(trie.inner) if trie else 0 for trie in tries)
    if len(tries) == 1 and tries[0] and (groups := tries[0].groups(prefix.width)):
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
        fed = family.extend(prefix.fork(), tokens.to(device), positions.to(device), mask.to(device))
        logits = torch.cat([logits, fed], dim=1)
    return list(_allowed(family, logits))


def search(family: Family, prefix: Prefix, sequences: Sequence[Sequence[int]], epsilon: float = EPSILON) -> Tensor:
    """As `search_each`, after a single prompt."""
    return search_each(family, prefix, [sequences], epsilon)[0]


@torch.no_grad()
def search_each(
    family: Family, prefix: Prefix, sequences: Sequence[Sequence[Sequence[int]]], epsilon: float = EPSILON
) -> list[Tensor]:
    """(N,) log-probabilities of whole answers after each prompt, without feeding what cannot matter.

    All that begins alike is together at most as likely as its beginning. Beginnings are fed, the likeliest first,
    until those that are left have no more than `epsilon` of the probability that was found; it is shared out among
    the answers below them. Where all lists are short they are fed at once, and exactly.
    """
    distinct = {id(own): _Trie(own) for own in sequences}
    tries = [distinct[id(own)] for own in sequences]
    if max(len(trie.inner) for trie in tries) <= FEW_NODES:
        return [torch.cat(parts) for parts in _score(family, prefix, sequences, _Trie.totals)]
    crowns = [_Crown(trie) for trie in tries]
    for row, crown in enumerate(crowns):
        crown.note([-1], _allowed(family, prefix.logits[row : row + 1]))
    shoots, most = _Shoots(family, prefix), MAX_NODES // len(crowns)
    while any(chosen := [crown.choose(epsilon, most) for crown in crowns]):
        # A list that needs many takes more rounds: the others are done then, and out of the way.
        usual = statistics.median(len(nodes) for nodes in chosen if nodes)
        chosen = [nodes[: max(16, int(2 * usual))] for nodes in chosen]
        branches = [crown.branch(row, node) for row, crown in enumerate(crowns) for node in chosen[row]]
        logits = _allowed(family, shoots.feed(branches))
        for row, (crown, nodes) in enumerate(zip(crowns, chosen, strict=True)):
            own = [place for place, branch in enumerate(branches) if branch.row == row]
            crown.places |= {node: branches[place].path for node, place in zip(nodes, own, strict=True)}
            crown.note(nodes, logits[own])
    return [crown.totals() for crown in crowns]


class _Crown:
    """A trie of answers of which only the likely beginnings are fed."""

    def __init__(self, trie: _Trie) -> None:
        self.trie = trie
        self.places: dict[int, tuple[int, ...]] = {-1: ()}  # fed node -> places of its path in the cache row
        self._children: dict[int, list[int]] = {}
        for node, parent in enumerate(trie.parents):
            self._children.setdefault(parent, []).append(node)
        self._logprobs: dict[int, float] = {}  # of the path up to each node that is known
        self._found = 0.0  # probability of the whole answers that are known
        self._open: set[int] = set()  # known nodes with children that are not

    def choose(self, epsilon: float, most: int) -> list[int]:
        """The beginnings to feed next: none when the rest does not matter."""
        mass = {node: math.exp(self._logprobs[node]) for node in self._open}
        rest = sum(mass.values())
        if rest <= epsilon * self._found:
            return []
        enough = epsilon / 2 * (self._found + rest)
        chosen: list[int] = []
        for node in sorted(mass, key=mass.__getitem__, reverse=True)[:most]:
            if rest <= enough and chosen:
                break
            chosen.append(node)
            rest -= mass[node]
        return chosen

    def note(self, nodes: list[int], logits: Tensor) -> None:
        """Take down the children of some nodes, from the (M, V) logits after them."""
        logprobs = logits.log_softmax(-1)
        for node, row in zip(nodes, logprobs, strict=True):
            before, children = self._logprobs.get(node, 0.0), self._children[node]
            following = row[[self.trie.tokens[child] for child in children]].tolist()
            for child, logprob in zip(children, following, strict=True):
                self._logprobs[child] = before + logprob
                if child in self._children:
                    self._open.add(child)
                else:
                    self._found += math.exp(before + logprob)
            self._open.discard(node)

    def totals(self) -> Tensor:
        """(N,) log-probability of each answer, or its share of the beginning that was not fed."""
        known = [next(node for node in reversed(path) if node in self._logprobs) for path in self.trie.paths]
        below = Counter(known)
        return torch.tensor([self._logprobs[node] - math.log(below[node]) for node in known])

    def branch(self, row: int, node: int) -> _Branch:
        """A node to be fed, in a row of the cache."""
        return _Branch(row, (self.trie.tokens[node],), 0.0, 1, self.places[self.trie.parents[node]])


def _feed_groups(family: Family, prefix: Prefix, trie: _Trie, groups: list[list[int]]) -> Tensor:
    """(1, M, V) logits after the inner nodes, whose attention is computed group by group."""
    tokens, depths, visible = trie.fed()
    blocks, device = Blocks(groups), prefix.logits.device
    mask = torch.ones(*blocks.tokens.shape, prefix.width + blocks.tokens.shape[1], dtype=torch.bool)
    mask[:, :, prefix.width :] = False
    for row, group in enumerate(groups):
        size = len(group)
        mask[row, :size, prefix.width : prefix.width + size] = visible[group][:, group]
    positions = (depths + prefix.positions[0])[None].to(device)
    return family.extend(prefix.fork(), tokens[None].to(device), positions, mask.to(device), blocks)


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
        alone = [_score(family, family.prefill(*prompt), [answers], _Trie.totals)[0][0] for prompt in prompts]
        try:
            packed = _score(family, family.prefill_each(prompts), [answers] * 2, _Trie.totals)
            known = all(torch.allclose(a, b[0], atol=1e-2, rtol=1e-3) for a, b in zip(alone, packed, strict=True))
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            known = False
        _PACKS[family] = known
    return known


_PACKS: WeakKeyDictionary[Family, bool] = WeakKeyDictionary()


def _allowed(family: Family, logits: Tensor) -> Tensor:
    """Logits without the tokens that stand for images."""
    return logits.index_fill(-1, family.forbidden.to(logits.device), float("-inf"))


Draw = Callable[[Tensor, Sequence[int]], list[Iterable[tuple[int, int]]]]
"""(n, V) log-probabilities and the counts of n branches -> the tokens that follow each, with their counts."""


@dataclass(slots=True)
class _Branch:
    row: int  # number of its prompt
    tokens: tuple[int, ...]
    logprob: float
    count: int
    path: tuple[int, ...]  # places of its tokens in the cache row, after the prompt


def sample(
    family: Family,
    prefix: Prefix,
    num: int,
    max_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    stop: threading.Event | None = None,
) -> list[Sample]:
    """Draw `num` answers to a single prompt independently; equal beginnings are one branch with a count.

    Temperature 0 takes the likeliest token. Log-probabilities are those at temperature 1, whatever was drawn at.
    The returned counts sum to `num`.

    Raises:
        Stopped: `stop` was set meanwhile.
    """
    return _grow(family, prefix, num, _drawing(temperature, generator), [max_tokens], _Stop(stop))[0]


def sample_each(
    prefixes: Prefixes,
    num: int,
    max_tokens: int | Sequence[int],
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    watch: Watch | None = None,
) -> list[list[Sample]]:
    """As `sample`, `num` answers to each of several prompts; those to one that was stopped are incomplete."""
    found: dict[int, list[Sample]] = {}
    longest = [max_tokens] * len(prefixes) if isinstance(max_tokens, int) else max_tokens
    for rows, prefix in prefixes:
        limits, watched = [longest[row] for row in rows], _Rows(watch or Watch(), rows)
        grown = _grow(prefixes.family, prefix, num, _drawing(temperature, generator), limits, watched)
        found |= zip(rows, grown, strict=True)
    return [found[row] for row in range(len(prefixes))]


class _Rows(Watch):
    """A watch over some rows of a batch."""

    def __init__(self, watch: Watch, rows: list[int]) -> None:
        self._watch, self._rows = watch, rows
        self.stepped = watch.stepped  # type: ignore[method-assign]

    def stopped(self, row: int) -> bool:
        return self._watch.stopped(self._rows[row])

    def finished(self, row: int, samples: list[Sample]) -> None:
        self._watch.finished(self._rows[row], samples)


class _Stop(Watch):
    """Ends everything when an event is set."""

    def __init__(self, stop: threading.Event | None) -> None:
        self._stop = stop

    def stopped(self, row: int) -> bool:
        if self._stop and self._stop.is_set():
            raise Stopped
        return False


def _drawing(temperature: float, generator: torch.Generator | None) -> Draw:
    def draw(logprobs: Tensor, counts: Sequence[int]) -> list[Iterable[tuple[int, int]]]:
        if temperature == 0:
            return [[each] for each in zip(logprobs.argmax(-1).tolist(), counts, strict=True)]
        shares = (logprobs / temperature).softmax(-1).cpu()  # generators live on the CPU
        drawn = torch.multinomial(shares, max(counts), replacement=True, generator=generator).tolist()
        return [Counter(row[:count]).items() for row, count in zip(drawn, counts, strict=True)]

    return draw


def alternatives(
    family: Family, prefix: Prefix, num: int, max_tokens: int, stop: threading.Event | None = None
) -> list[Sample]:
    """The `num` likeliest first tokens, each continued greedily; likeliest answer first. Raises Stopped."""

    def draw(logprobs: Tensor, counts: Sequence[int]) -> list[Iterable[tuple[int, int]]]:
        found: list[Iterable[tuple[int, int]]] = []
        for row, count in zip(logprobs, counts, strict=True):
            best = row.topk(min(count, int(row.isfinite().sum()))).indices.tolist()
            found.append([(token, 1) for token in best])
        return found

    return sorted(_grow(family, prefix, num, draw, [max_tokens], _Stop(stop))[0], key=lambda s: -s.logprob)


@torch.no_grad()
def _grow(
    family: Family, prefix: Prefix, num: int, draw: Draw, max_tokens: Sequence[int], watch: Watch
) -> list[list[Sample]]:
    """Grow a tree below every prompt, all of them a level at a time."""
    done: list[list[Sample]] = [[] for _ in prefix.lengths]
    limits = [
        min(most, family.max_length - length) for most, length in zip(max_tokens, prefix.lengths, strict=True)
    ]
    level = [_Branch(row, (), 0.0, num, ()) for row in range(len(prefix.lengths))]
    shoots, logits = _Shoots(family, prefix), prefix.logits
    for depth in range(max(limits)):
        stopped = {row for row in {branch.row for branch in level} if watch.stopped(row)}
        logprobs = _allowed(family, logits).log_softmax(-1)
        drawn = draw(logprobs, [branch.count for branch in level])
        children = []
        for branch, found, row in zip(level, drawn, logprobs.cpu().numpy(), strict=True):
            for token, count in found if branch.row not in stopped else ():
                tokens = (*branch.tokens, token)
                logprob = branch.logprob + float(row[token])
                if token in family.end_tokens or depth + 1 == limits[branch.row]:
                    done[branch.row].append(Sample(tokens, logprob, count, token in family.end_tokens))
                else:
                    children.append(_Branch(branch.row, tokens, logprob, count, branch.path))
        for row in {branch.row for branch in level} - {branch.row for branch in children} - stopped:
            watch.finished(row, done[row])
        if not children:
            break
        watch.stepped(depth)
        level = children
        logits = shoots.feed(level)
    return done


class _Shoots:
    """The cache while answers grow: a row for each prompt that still has any."""

    def __init__(self, family: Family, prefix: Prefix) -> None:
        self._family = family
        self._cache = prefix.fork()
        self._positions = prefix.positions
        self._device = prefix.logits.device
        self._rows = list(range(len(prefix.lengths)))
        self._seen = prefix.seen()
        self._fed = 0  # columns after the prompts

    def feed(self, branches: list[_Branch]) -> Tensor:
        """(branches, V) logits after the last token of every branch, whose place in its cache row is noted."""
        self._drop_finished({branch.row for branch in branches})
        place = {row: index for index, row in enumerate(self._rows)}
        taken = [0] * len(self._rows)
        cells = []  # of each branch, in what is fed
        for branch in branches:
            row = place[branch.row]
            cells.append((row, taken[row]))
            taken[row] += 1
        rows, columns = torch.tensor(cells).T
        most = max(taken)
        tokens = torch.zeros(len(taken), most, dtype=torch.long)
        tokens[rows, columns] = torch.tensor([branch.tokens[-1] for branch in branches])
        depths = torch.zeros(len(taken), most, dtype=torch.long)
        depths[rows, columns] = torch.tensor([len(branch.path) for branch in branches])
        positions = depths + torch.tensor([self._positions[row] for row in self._rows])[:, None]
        mask = self._mask(branches, cells, most)
        self._fed += most
        fed = self._family.extend(
            self._cache,
            tokens.to(self._device),
            positions.to(self._device),
            mask if mask is None else mask.to(self._device),
        )
        return fed[rows, columns]

    def _mask(self, branches: list[_Branch], cells: list[tuple[int, int]], most: int) -> Tensor | None:
        """(B, M, cached + M): each branch sees its prompt and its own tokens, the last of which is fed now."""
        width = self._seen.shape[1]
        mask = torch.zeros(len(self._rows), most, width + self._fed + most, dtype=torch.bool)
        mask[:, :, :width] = self._seen[:, None]
        seen: list[tuple[int, int, int]] = []
        for branch, (row, column) in zip(branches, cells, strict=True):
            branch.path = (*branch.path, self._fed + column)
            seen += [(row, column, width + place) for place in branch.path]
        mask[tuple(torch.tensor(seen).T)] = True
        return None if bool(mask.all()) else mask

    def _drop_finished(self, growing: set[int]) -> None:
        """Once no more than half of the rows are growing, the others leave the cache."""
        if 2 * len(growing) > len(self._rows):
            return
        kept = [index for index, row in enumerate(self._rows) if row in growing]
        self._cache.batch_select_indices(torch.tensor(kept, device=self._device))
        self._seen = self._seen[kept]
        self._rows = [self._rows[index] for index in kept]
