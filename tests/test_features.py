"""The same picture is processed and encoded once, and what is kept stays within its bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from servetune.adapters import tree
from servetune.adapters.family import Family
from servetune.adapters.features import ByteCache, digest
from servetune.adapters.policy import LoraSpec, Policy
from servetune.adapters.types import Query
from tests.conftest import noise, query


def policy(tiny: Path, **chosen: Any) -> Policy:
    return Policy(Family.load(str(tiny)), LoraSpec(4, 8, chosen.pop("part", "language")), ("live",), **chosen)


def counted(made: Policy, monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    calls: list[int] = []
    whole = getattr(made.family, name)

    def count(*args: Any) -> Any:
        calls.append(len(args[0]))
        return whole(*args)

    monkeypatch.setattr(made.family, name, count)
    return calls


def test_a_picture_is_encoded_once_whatever_is_asked(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = policy(tiny)
    made.observe_each([query(8), query(9)])  # finds out once whether images can be seen together
    seen, processed = counted(made, monkeypatch, "see_each"), counted(made, monkeypatch, "prompt")
    first = made.observe_each([query(0), query(0, question="is it red?"), query(1)])
    assert seen == [2]
    again = made.observe_each([query(1), query(0), query(2)])
    assert seen == [2, 1]
    assert len(processed) == 4  # the third picture is the only new one
    torch.testing.assert_close(made.begin(again[1]).logits, made.begin(first[0]).logits, atol=0, rtol=0)


def test_a_cached_observation_answers_as_a_fresh_one(tiny: Path) -> None:
    made, fresh = policy(tiny), policy(tiny, cache_bytes=0)
    for _ in range(2):
        kept = made.observe(query(3))
        torch.testing.assert_close(
            made.begin(kept).logits, fresh.begin(fresh.observe(query(3))).logits, atol=1e-5, rtol=1e-5
        )


def test_features_that_an_adapter_changes_are_not_kept(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = policy(tiny, part="vision")
    seen = counted(made, monkeypatch, "see_each")
    made.observe(query(0))
    made.observe(query(0))
    assert seen == [1, 1]


def test_what_was_not_used_for_the_longest_time_leaves() -> None:
    cache = ByteCache(100)
    for name in "abc":
        cache.put(name, {"x": torch.zeros(10)})  # 40 bytes
        assert cache.get("a") is not None
    assert cache.get("b") is None
    assert cache.num_bytes == 80
    cache.put("c", {"x": torch.zeros(5)})
    assert cache.num_bytes == 60
    cache.put("big", {"x": torch.zeros(26)})
    assert cache.get("big") is None
    assert cache.num_bytes == 60


def test_a_digest_tells_pictures_apart() -> None:
    one, other = noise(1), noise(2)
    assert digest([one]) == digest([one.copy()])
    assert len({digest(each) for each in ([one], [other], [one, other], [other, one], [])}) == 5
    turned = one.resize((one.width * 2, one.height // 2))
    assert digest([turned]) != digest([one])


# --- prompts -----------------------------------------------------------------------------------------


ANSWERS = [(5, 9), (7,), (5, 3, 2)]


def answered(made: Policy, queries: list[Query], version: str, cache: ByteCache | None) -> list[Tensor]:
    with torch.no_grad():
        prefixes = made.begin_each(made.observe_each(queries), [version] * len(queries), cache)
        return tree.score_each(prefixes, [ANSWERS] * len(queries))


@pytest.mark.parametrize("part", ["language", "vision"])
def test_a_prompt_is_fed_once_for_each_version(tiny: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, cache = policy(tiny, part=part), ByteCache(10**9)
    asked = [query(0), query(0, question="is it red, or rather blue?"), query(1), query(0)]
    alone = [answered(made, [one], "v1", None)[0] for one in asked]
    fed: list[int] = []
    feed = tree.Prefixes._feed
    monkeypatch.setattr(tree.Prefixes, "_feed", lambda self, rows: fed.extend(rows) or feed(self, rows))
    for ours, theirs in zip(answered(made, asked[:2], "v1", cache), alone, strict=False):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert len(fed) == 2
    for ours, theirs in zip(answered(made, asked, "v1", cache), alone, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert len(fed) == 3  # of the four, one alone was not known
    answered(made, asked[:2], "v2", cache)
    assert len(fed) == 5


def test_what_is_kept_of_a_prompt_does_not_keep_its_batch(tiny: Path) -> None:
    made, cache = policy(tiny), ByteCache(10**9)
    answered(made, [query(number) for number in range(6)], "v1", cache)
    for prefix, size in cache._values.values():
        assert sum(tensor.untyped_storage().nbytes() for tensor in prefix.tensors()) == size
