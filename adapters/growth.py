"""Answers drawn from a prompt: a tree of tokens that grows level by level, equal beginnings as one branch."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from servetune.adapters import caches
from servetune.adapters.copies import extend_copies, feed_paths, most_copies
from servetune.adapters.family import Family, Prefix
from servetune.adapters.tree import Prefixes, allowed


class Stopped(Exception):
    """Nobody waits for these answers any more."""


class Watch:
    """What is asked and told while answers to several prompts grow, between two tokens."""

    def stopped(self, row: int) -> bool:
        """Whether nobody waits for the answers to a prompt any more."""
        return False

    def finished(self, row: int, samples: list[Sample]) -> None:
        """All answers to a prompt have come to an end."""

    def grew(self, row: int, tokens: tuple[int, ...]) -> None:
        """An answer to a prompt has these tokens, and will have more."""

    def stepped(self, depth: int) -> None:
        """Every answer that still grows has its token at this depth, from 0."""


@dataclass(frozen=True, slots=True)
class Sample:
    """An answer drawn `count` times: its tokens, their summed log-probability, and whether it came to an end."""

    tokens: tuple[int, ...]
    logprob: float
    count: int
    finished: bool


Draw = Callable[[Tensor, Sequence[int]], list[Iterable[tuple[int, int]]]]
"""(n, V) log-probabilities and the counts of n branches -> the tokens that follow each, with their counts."""


@dataclass(slots=True)
class Branch:
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
    listen: Callable[[tuple[int, ...]], None] | None = None,
) -> list[Sample]:
    """Draw `num` answers to a single prompt independently; equal beginnings are one branch with a count.

    Temperature 0 takes the likeliest token. Log-probabilities are those at temperature 1, whatever was drawn at.
    The returned counts sum to `num`. `listen` is told the tokens of every answer that will have more.

    Raises:
        Stopped: `stop` was set meanwhile.
    """
    return _grow(family, prefix, num, _drawing(temperature, generator), [max_tokens], _Alone(stop, listen))[0]


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

    def grew(self, row: int, tokens: tuple[int, ...]) -> None:
        self._watch.grew(self._rows[row], tokens)


class _Alone(Watch):
    """Of a single prompt: ends everything when an event is set, and passes on what grows."""

    def __init__(
        self, stop: threading.Event | None, listen: Callable[[tuple[int, ...]], None] | None = None
    ) -> None:
        self._stop = stop
        self._listen = listen

    def grew(self, row: int, tokens: tuple[int, ...]) -> None:
        if self._listen:
            self._listen(tokens)

    def stopped(self, row: int) -> bool:
        if self._stop and self._stop.is_set():
            raise Stopped
        return False


def _drawing(temperature: float, generator: torch.Generator | None) -> Draw:
    def draw(logprobs: Tensor, counts: Sequence[int]) -> list[Iterable[tuple[int, int]]]:
        if temperature == 0:
            return [[each] for each in zip(logprobs.argmax(-1).tolist(), counts, strict=True)]
        # Where a number from (0, 1] falls in the cumulated shares: `multinomial` goes through the whole vocabulary
        # once more for every draw, and would have it brought to the CPU, where generators live.
        sums = (logprobs / temperature).softmax(-1).cumsum(-1)
        points = 1 - torch.rand(len(counts), max(counts), generator=generator)
        drawn = torch.searchsorted(sums, points.to(sums) * sums[:, -1:]).tolist()
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

    return sorted(_grow(family, prefix, num, draw, [max_tokens], _Alone(stop))[0], key=lambda s: -s.logprob)


@torch.no_grad()
def _grow(
    family: Family, prefix: Prefix, num: int, draw: Draw, max_tokens: Sequence[int], watch: Watch
) -> list[list[Sample]]:
    """Grow a tree below every prompt, all of them a level at a time."""
    done: list[list[Sample]] = [[] for _ in prefix.lengths]
    limits = [
        min(most, family.max_length - length) for most, length in zip(max_tokens, prefix.lengths, strict=True)
    ]
    level = [Branch(row, (), 0.0, num, ()) for row in range(len(prefix.lengths))]
    shoots, logits = shoots_of(family, prefix), prefix.logits
    for depth in range(max(limits)):
        stopped = {row for row in {branch.row for branch in level} if watch.stopped(row)}
        logprobs = allowed(family, logits).log_softmax(-1)
        drawn = draw(logprobs, [branch.count for branch in level])
        children = []
        for child in _children(level, drawn, logprobs):
            if child.row in stopped:
                continue
            ended = child.tokens[-1] in family.end_tokens
            if ended or depth + 1 == limits[child.row]:
                done[child.row].append(Sample(child.tokens, child.logprob, child.count, ended))
            else:
                children.append(child)
                watch.grew(child.row, child.tokens)
        for row in {branch.row for branch in level} - {branch.row for branch in children} - stopped:
            watch.finished(row, done[row])
        if not children:
            break
        watch.stepped(depth)
        level = children
        logits = shoots.feed(level)
    return done


def _children(
    level: Sequence[Branch], drawn: Sequence[Iterable[tuple[int, int]]], logprobs: Tensor
) -> list[Branch]:
    """The branches one token further, as drawn; (branches, V) log-probabilities are read where they are."""
    taken = [(number, *each) for number, found in enumerate(drawn) for each in found]
    numbers, tokens, _ = zip(*taken, strict=True)
    added = logprobs[list(numbers), list(tokens)].tolist()
    return [
        Branch(
            level[number].row,
            (*level[number].tokens, token),
            level[number].logprob + more,
            count,
            level[number].path,
        )
        for (number, token, count), more in zip(taken, added, strict=True)
    ]


def shoots_of(family: Family, prefix: Prefix) -> Shoots | CopiedShoots:
    """The cache in which answers to these prompts grow."""
    return Shoots(family, prefix) if family.shares else CopiedShoots(family, prefix)


class CopiedShoots:
    """As `Shoots`, of a single prompt that cannot be shared: each beginning has a copy of its row.

    A beginning that goes on from one of those that were fed last is fed its last token, any other is fed whole.
    """

    def __init__(self, family: Family, prefix: Prefix) -> None:
        self._family = family
        self._prefix = prefix
        self._cache = prefix.cache
        self._rows: dict[int | None, int] = {None: 0}  # of the places that go on in the cache; None: the prompt
        self._beginnings: list[tuple[int, ...]] = []  # tokens after the prompt, by place

    def feed(self, branches: list[Branch]) -> Tensor:
        """(branches, V) logits after the last token of every branch, whose place is noted."""
        parents = [branch.path[-1] if branch.path else None for branch in branches]
        places = []
        for branch, parent in zip(branches, parents, strict=True):
            places.append(len(self._beginnings))
            before = () if parent is None else self._beginnings[parent]
            self._beginnings.append((*before, branch.tokens[-1]))
            branch.path = (*branch.path, places[-1])
        if self._rows.keys() >= set(parents) and len(branches) <= most_copies(self._prefix):
            self._cache = caches.rows(self._cache, torch.tensor([self._rows[parent] for parent in parents]))
            self._rows = {place: row for row, place in enumerate(places)}
            tokens = torch.tensor([[branch.tokens[-1]] for branch in branches])
            depth = len(branches[0].path) - 1
            return extend_copies(self._family, self._prefix, self._cache, tokens, depth)[:, 0]
        self._rows = {}
        whole = feed_paths(self._family, self._prefix, [self._beginnings[place] for place in places])
        return torch.stack([logits[-1] for logits in whole])


class Shoots:
    """The cache while answers grow: a row for each prompt that still has any."""

    def __init__(self, family: Family, prefix: Prefix) -> None:
        self._family = family
        self._cache = prefix.fork()
        self._positions = prefix.positions
        self._device = prefix.logits.device
        self._rows = list(range(len(prefix.lengths)))
        self._slots = prefix.slots
        self._seen = prefix.seen()
        self._fed = 0  # columns after the prompts

    def feed(self, branches: list[Branch]) -> Tensor:
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
            slots=self._slots and tuple(self._slots[row] for row in self._rows),
        )
        return fed[rows, columns]

    def _mask(self, branches: list[Branch], cells: list[tuple[int, int]], most: int) -> Tensor | None:
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
