"""Log-probabilities of a long list of answers, without feeding what cannot matter."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from servetune.adapters.family import Family, Prefix
from servetune.adapters.growth import Branch, shoots_of
from servetune.adapters.tree import MAX_NODES, Trie, allowed, score_tries

FEW_NODES = 96
"""As many tokens of answers are fed at once rather than searched."""

EPSILON = 1e-2
"""Share of the probability of all answers that a search may leave unexplored."""


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
    distinct = {id(own): Trie(own) for own in sequences}
    tries = [distinct[id(own)] for own in sequences]
    if max(len(trie.inner) for trie in tries) <= FEW_NODES:
        return [torch.cat(parts) for parts in score_tries(family, prefix, sequences, Trie.totals)]
    crowns = [_Crown(trie) for trie in tries]
    for row, crown in enumerate(crowns):
        crown.note([-1], allowed(family, prefix.logits[row : row + 1]))
    shoots, most = shoots_of(family, prefix), MAX_NODES // len(crowns)
    while any(chosen := [crown.choose(epsilon, most) for crown in crowns]):
        # A list that needs many takes more rounds: the others are done then, and out of the way.
        usual = statistics.median(len(nodes) for nodes in chosen if nodes)
        chosen = [nodes[: max(16, int(2 * usual))] for nodes in chosen]
        branches = [crown.branch(row, node) for row, crown in enumerate(crowns) for node in chosen[row]]
        logits = allowed(family, shoots.feed(branches))
        for row, (crown, nodes) in enumerate(zip(crowns, chosen, strict=True)):
            own = [place for place, branch in enumerate(branches) if branch.row == row]
            crown.places |= {node: branches[place].path for node, place in zip(nodes, own, strict=True)}
            crown.note(nodes, logits[own])
    return [crown.totals() for crown in crowns]


class _Crown:
    """A trie of answers of which only the likely beginnings are fed."""

    def __init__(self, trie: Trie) -> None:
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

    def branch(self, row: int, node: int) -> Branch:
        """A node to be fed, in a row of the cache."""
        return Branch(row, (self.trie.tokens[node],), 0.0, 1, self.places[self.trie.parents[node]])
