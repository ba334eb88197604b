"""Versions are whole or absent, aliases move atomically, and what is wrong is refused."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from servetune.adapters import store as store_module
from servetune.adapters.store import AdapterStore
from servetune.adapters.versions import (
    AliasMoved,
    CorruptVersion,
    Draft,
    ErasedQuery,
    Erasure,
    ForeignStore,
    NameTaken,
    RetiredVersion,
    StoreBusy,
    StoreError,
    UnknownVersion,
)

CONFIG = {"r": 2, "target_modules": "x", "peft_type": "LORA"}
ZERO = {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.zeros(3, 2)}


def opened(root: Path, name: str = "default") -> AdapterStore:
    store = AdapterStore(root, name)
    store.initialise(ZERO, CONFIG, "sha256:base", (0.0, 1.0))
    return store


def draft(value: float, **story: object) -> Draft:
    weights = {**ZERO, "a.lora_B.weight": torch.full((3, 2), value)}
    return Draft(weights, "worker", 0, (value,), **story)  # type: ignore[arg-type]


def test_what_comes_from_an_erased_version_is_not_published(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.promote(store.publish(draft(1.0, query_ids=("q1",))).version)
    late = Draft(draft(2.0).weights, "worker", 1, (2.0,), query_ids=("q2",))
    store.erase(["q1"])
    with pytest.raises(ErasedQuery, match="what it came from"):
        store.publish(late)
    assert store.versions() == [0]


def test_a_new_store_serves_the_base(tmp_path: Path) -> None:
    store = opened(tmp_path)
    assert store.versions() == [0]
    assert store.live().version == 0
    assert store.resolve("live") == store.resolve("base") == store.resolve("v0000") == 0


def test_publish_does_not_promote_and_promote_remembers_last_good(tmp_path: Path) -> None:
    store = opened(tmp_path)
    made = store.publish(draft(1.0, query_ids=("q1", "q2")))
    assert (made.version, store.live().version) == (1, 0)
    store.promote(1)
    store.promote(store.publish(draft(2.0)).version)
    assert store.aliases() == {"live": 2, "last-good": 1, "base": 0}
    assert store.rollback().version == 1
    assert store.rollback(to=0).version == 0
    assert store.learned_from({"q2", "q9"}) == {"q2"}


def test_generation_only_grows_and_guards_promotion(tmp_path: Path) -> None:
    store = opened(tmp_path)
    seen = store.live().generation
    made = store.publish(draft(1.0)).version
    reset = store.reset()
    with pytest.raises(AliasMoved):
        store.promote(made, expected_generation=seen)
    assert store.live().version == reset.version
    assert store.live().generation > seen


def test_reset_is_a_new_version_with_the_bytes_of_the_base(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.promote(store.publish(draft(1.0)).version)
    made = store.reset()
    assert made.version == 2
    assert made.digest == store.manifest(0).digest
    assert store.live().version == 2


def test_snapshot_names_the_live_weights_for_good(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.promote(store.publish(draft(1.0)).version)
    made = store.snapshot("before-monday", {"why": "test"})
    assert store.resolve("before-monday") == made.version
    assert made.digest == store.manifest(1).digest
    assert store.live().version == 1
    for taken in ("before-monday", "live", "v0007", "../x", "UPPER"):
        with pytest.raises(NameTaken):
            store.snapshot(taken)


def test_optimizer_state_travels_with_its_version(tmp_path: Path) -> None:
    store = opened(tmp_path)
    made = store.publish(draft(1.0, optimizer={"step:a": torch.tensor(3.0)}))
    assert store.optimizer(made.version) == {"step:a": torch.tensor(3.0)}
    assert store.optimizer(0) == {}


def test_a_store_of_another_base_is_refused(tmp_path: Path) -> None:
    opened(tmp_path)
    other = AdapterStore(tmp_path)
    with pytest.raises(ForeignStore, match="another --adapter name"):
        other.initialise(ZERO, CONFIG, "sha256:other", (0.0,))
    with pytest.raises(ForeignStore):
        other.initialise(ZERO, {**CONFIG, "r": 4}, "sha256:base", (0.0,))


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    store = opened(tmp_path)
    path = tmp_path / "default" / "v0000" / store_module.WEIGHTS
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        broken = bytearray(whole)
        broken[position] ^= 1 << (position % 8)
        path.write_bytes(broken)
        with pytest.raises(CorruptVersion):
            store.weights(0)
    path.unlink()
    with pytest.raises(CorruptVersion):
        store.promote(0)


def test_an_unreadable_manifest_is_corrupt(tmp_path: Path) -> None:
    store = opened(tmp_path)
    (tmp_path / "default" / "v0000" / "manifest.json").write_text("{")
    with pytest.raises(CorruptVersion):
        store.manifest(0)


def owned_up_to(folder: Path, change: bytes | dict[str, object]) -> None:
    """Replace or change a manifest, and have its digest fit."""
    path = folder / "manifest.json"
    written = change if isinstance(change, bytes) else json.dumps(json.loads(path.read_text()) | change).encode()
    path.write_bytes(written)
    (folder / "manifest.json.sha256").write_text(f"{hashlib.sha256(written).hexdigest()}  manifest.json\n")


@pytest.mark.parametrize(
    "change",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b'{"a": "\xff"}',
        b"[" * 5000,
        b"\x00\x00\xfe\xff\x00",
        {"version": 7},
        {"version": "one"},
        {"parent": 1},
        {"parent": None},
        {"parent": -1},
        {"query_ids": 5},
        {"query_ids": [["a"]]},
        {"step_range": [1]},
        {"origin": "elsewhere"},
        {"files": []},
    ],
)
def test_a_manifest_that_makes_no_sense_is_corrupt(change: bytes | dict[str, object], tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.promote(store.publish(draft(1.0)).version)
    owned_up_to(store.folder / "v0001", change)
    for read in (store.manifest, store.weights, store.promote):
        with pytest.raises(CorruptVersion):
            read(1)
    assert store.erase(["q"]).dropped == (1,)


def test_what_a_newer_manifest_says_more_is_passed_over(tmp_path: Path) -> None:
    store = opened(tmp_path)
    before = store.publish(draft(1.0, query_ids=("a",), step_range=(1, 2), metrics={"kl": 0.5})).version
    made = store.manifest(before)
    owned_up_to(store.folder / "v0001", {"more": {"to": "come"}})
    assert store.manifest(before) == made


@pytest.mark.parametrize("data", [b"", b"x" * 100, b"\x02\0\0\0\0\0\0\0{}"[:9], b"\xff" * 16])
def test_weights_that_are_none_are_corrupt(data: bytes, tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.publish(draft(1.0, optimizer=ZERO))
    folder = store.folder / "v0001"
    files = {name: hashlib.sha256(data).hexdigest() for name in (store_module.WEIGHTS, store_module.OPTIMIZER)}
    for name in files:
        (folder / name).write_bytes(data)
    owned_up_to(folder, {"files": json.loads((folder / "manifest.json").read_text())["files"] | files})
    for read in (store.weights, store.optimizer):
        with pytest.raises(CorruptVersion):
            read(1)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "{}", '{"aliases": {}, "generation": 1}', '{"aliases": {"live": -1}, "generation": 1}']
)
def test_damaged_aliases_are_said_to_be(text: str, tmp_path: Path) -> None:
    store = opened(tmp_path)
    (store.folder / "aliases.json").write_text(text)
    for read in (store.live, store.aliases, store.promoted, store.num_learned):
        with pytest.raises(CorruptVersion):
            read()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"count": "many", "ids": []}', '{"count": 1, "ids": [[]]}'])
def test_without_knowing_what_was_erased_nothing_is_published(text: str, tmp_path: Path) -> None:
    store = opened(tmp_path)
    (store.folder / "erased.json").write_text(text)
    with pytest.raises(CorruptVersion):
        store.publish(draft(1.0))


def test_what_a_newer_store_says_of_its_aliases_stays(tmp_path: Path) -> None:
    store = opened(tmp_path)
    path = store.folder / "aliases.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"more": [1]}))
    store.promote(store.publish(draft(1.0)).version)
    assert json.loads(path.read_text())["more"] == [1]


def test_digits_of_other_scripts_name_no_version(tmp_path: Path) -> None:
    store = opened(tmp_path)
    (store.folder / "v٠٠٠١").mkdir()
    assert store.versions() == [0]


@settings(max_examples=300, deadline=None)
@given(name=st.text(max_size=80))
def test_no_name_leaves_the_store(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.getbasetemp() / "names"
    store = opened(root)
    with contextlib.suppress(UnknownVersion):
        assert store.resolve(name) == 0
    with contextlib.suppress(NameTaken):
        assert AdapterStore(root, name).folder.parent == root
    assert {path.name for path in root.iterdir()} == {"default"}


def test_erasing_a_query_drops_what_came_of_it(tmp_path: Path) -> None:
    """1 and 2 learned one after the other; 3 is a snapshot of 2; 4 is the base again, and 5 learned from there."""
    store = opened(tmp_path)
    store.promote(store.publish(draft(1.0, query_ids=("a", "b"))).version)
    store.promote(store.publish(replace(draft(2.0, query_ids=("c",)), parent=1)).version)
    store.snapshot("kept")
    before = store.live().generation
    erasure = store.erase(["c"])
    assert erasure.dropped == (2, 3)
    assert (erasure.live.version, erasure.live.generation) == (1, before + 1)
    assert store.live() == erasure.live
    assert store.aliases() == {"live": 1, "last-good": 1, "base": 0}
    assert store.versions() == [0, 1]
    assert store.learned_from({"a", "c"}) == {"a"}
    with pytest.raises(UnknownVersion):
        store.resolve("kept")
    assert store.reset().version == 4, "no number is given twice"
    with pytest.raises(ErasedQuery):
        store.publish(draft(3.0, query_ids=("c", "d")))
    assert store.publish(replace(draft(5.0, query_ids=("d",)), parent=4)).version == 5
    assert store.erase(["a"]).dropped == (1,)
    assert store.live().version == 4, "what does not come from it stays"
    assert store.erased() == (2, ["c", "a"])
    assert store.erase(["nobody"]) == Erasure((), store.live())


def test_erasing_goes_back_to_what_can_be_served(tmp_path: Path) -> None:
    """1, 2 and 3 learned one after the other; 3 must go, and 2 is damaged."""
    store = opened(tmp_path)
    for number, name in ((1, "a"), (2, "b"), (3, "c")):
        made = replace(draft(float(number), query_ids=(name,)), parent=number - 1)
        store.promote(store.publish(made).version)
    (tmp_path / "default" / "v0002" / store_module.WEIGHTS).write_bytes(b"damaged")
    assert store.erase(["c"]).live.version == 1
    assert store.weights(store.live().version)


def test_a_version_whose_story_cannot_be_read_is_dropped_with_any(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.promote(store.publish(draft(1.0, query_ids=("a",))).version)
    (tmp_path / "default" / "v0001" / "manifest.json").write_bytes(b"damaged")
    assert store.erase(["b"]).dropped == (1,)
    assert (store.live().version, store.versions()) == (0, [0])


def test_an_erasure_that_was_cut_short_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(tmp_path)
    store.promote(store.publish(draft(1.0, query_ids=("a",))).version)
    with monkeypatch.context() as patch:
        patch.setattr(AdapterStore, "_remove", lambda *_: None)
        store.erase(["a"])
    assert (store.live().version, store.versions()) == (0, [0, 1])
    assert opened(tmp_path).versions() == [0]


# --- pins and retention ------------------------------------------------------------------------------


def witnessed(figure: float) -> dict[str, object]:
    return {"accepted": True, "metrics": {"witness_base": figure}}


def grown(root: Path, figures: dict[int, float] | None = None, upto: int = 8) -> AdapterStore:
    """A line of versions that learned one after the other, each with an optimizer state; the last one is live."""
    store = opened(root)
    for number in range(1, upto + 1):
        gate = witnessed(figures[number]) if figures and number in figures else None
        story = {"gate": gate, "optimizer": {"step:a": torch.tensor(1.0)}, "query_ids": (f"q{number}",)}
        store.promote(store.publish(replace(draft(float(number), **story), parent=number - 1)).version)
    return store


def with_weights(store: AdapterStore) -> list[int]:
    return [n for n in store.versions() if (store.folder / f"v{n:04d}" / store_module.WEIGHTS).exists()]


def test_retention_keeps_the_recent_the_best_and_what_somebody_wants(tmp_path: Path) -> None:
    store = grown(tmp_path, {1: 0.1, 2: 0.9, 3: 0.5, 5: 0.4})
    store.pin(4)
    assert store.retain(recent=1, best=2) == [1, 5, 6]
    # 0 is the base; 2 and 3 are the best; 4 is pinned; 7 is last-good and what live came from; 8 is live.
    assert with_weights(store) == [0, 2, 3, 4, 7, 8]
    assert store.versions() == list(range(9)), "manifests stay"
    assert (store.retired(), store.pinned()) == ([1, 5, 6], [4])
    assert store.manifest(5).query_ids == ("q5",)
    assert store.learned_from({"q5", "q9"}) == {"q5"}
    assert not (store.folder / "v0005" / store_module.OPTIMIZER).exists()
    assert store.optimizer(8), "learning goes on from here"
    assert store.retain(recent=1, best=2) == []
    store.unpin(4)
    assert store.retain(recent=1, best=2) == [4]
    assert store.retain(recent=0, best=0) == [], "0 keeps all"


def test_what_is_retired_is_refused_and_says_what_to_do(tmp_path: Path) -> None:
    store = grown(tmp_path, upto=4)
    store.retain(recent=1, best=0)
    assert store.retired() == [1, 2]
    refusals = (store.weights, store.optimizer, store.promote, store.rollback, store.reset, store.pin, store.hold)
    for refuse in (*refusals, lambda version: next(store.export(version))):
        with pytest.raises(RetiredVersion, match="v0001: choose a version that has them, or import an export"):
            refuse(1)  # type: ignore[operator]
    assert store.live().version == 4


def test_labels_keep_their_versions(tmp_path: Path) -> None:
    store = grown(tmp_path, upto=2)
    store.rollback(1)
    kept = store.snapshot("kept").version
    for number in (5, 6, 7):
        store.promote(store.publish(draft(float(number))).version)
    assert store.retain(recent=1, best=0) == [1, 2, 4]
    assert store.weights(store.resolve("kept"))
    assert kept == 3


def test_erasing_goes_back_past_what_is_retired(tmp_path: Path) -> None:
    store = grown(tmp_path, upto=6)
    store.pin(2)
    assert store.retain(recent=1, best=0) == [1, 3, 4]
    assert store.erase(["q5"]).live.version == 2
    assert (store.pinned(), store.retired()) == ([2], [1, 3, 4])


@pytest.mark.parametrize("files", [0, 1, 2])
def test_a_retention_that_was_cut_short_is_finished(
    files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after so many files were deleted: what is half there is never loaded, and goes at the next start."""
    store, left, unlink = grown(tmp_path, upto=4), [files], Path.unlink

    def dying(path: Path, missing_ok: bool = False) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dying)
        with pytest.raises(KeyboardInterrupt):
            store.retain(recent=1, best=0)
    assert len(list(store.folder.glob("v*/optimizer.safetensors"))) == 4 - min(files, 1)
    again = AdapterStore(tmp_path)
    for version in (1, 2):
        for refuse in (again.weights, again.promote):
            with pytest.raises(RetiredVersion):
                refuse(version)
    assert with_weights(opened(tmp_path)) == [0, 3, 4]
    assert (again.live().version, again.retired()) == (4, [1, 2])


def test_nothing_is_deleted_before_it_is_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = grown(tmp_path, upto=4)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AdapterStore, "_write_aliases", die)
        with pytest.raises(KeyboardInterrupt):
            store.retain(recent=1, best=0)
    assert with_weights(opened(tmp_path)) == [0, 1, 2, 3, 4]


def test_what_is_in_use_is_kept_until_it_is_not(tmp_path: Path) -> None:
    store = grown(tmp_path, upto=4)
    hold = store.hold(1)
    assert AdapterStore(tmp_path).retain(recent=1, best=0) == [2]
    assert store.weights(1)
    del hold  # nobody refers to it any more
    assert store.retain(recent=1, best=0) == [1]


def test_a_damaged_version_does_not_stop_retention(tmp_path: Path) -> None:
    store = grown(tmp_path, upto=4)
    (store.folder / "v0001" / "manifest.json").write_text("{")
    assert store.retain(recent=1, best=0) == [2]


def test_what_has_no_weights_is_not_pinned(tmp_path: Path) -> None:
    store = opened(tmp_path)
    with pytest.raises(UnknownVersion):
        store.pin(7)
    assert store.pin(0) == store.live()
    store.pin(0)
    assert store.pinned() == [0]
    store.unpin(0)
    assert store.pinned() == []


def test_pause_outlives_the_process(tmp_path: Path) -> None:
    opened(tmp_path).set_paused(True)
    assert opened(tmp_path).paused
    opened(tmp_path).set_paused(False)
    opened(tmp_path).set_paused(False)
    assert not opened(tmp_path).paused


def _publish_some(root: Path, count: int) -> None:
    store = AdapterStore(root)
    for value in range(count):
        store.promote(store.publish(draft(float(value))).version)


def test_two_writers_never_share_a_number(tmp_path: Path) -> None:
    store = opened(tmp_path)
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_publish_some, args=(tmp_path, 15)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert store.versions() == list(range(31))
    assert store.live().generation == 31


def test_errors_have_stable_codes() -> None:
    codes = {error.code for error in StoreError.__subclasses__()}
    assert codes == {
        "adapter_not_found",
        "adapter_corrupt",
        "alias_moved",
        "name_taken",
        "adapter_incompatible",
        "query_erased",
        "store_busy",
        "version_retired",
        "adapter_unfit",
    }


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    store = opened(tmp_path)
    content = json.loads((tmp_path / "default" / "v0000" / "manifest.json").read_text())
    assert content["files"].keys() == {store_module.WEIGHTS, store_module.CONFIG}
    assert store.manifest(0).origin == "base"


def test_a_process_that_stands_still_with_the_lock_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)
    monkeypatch.setattr(store_module, "LOCK_S", 0.05)
    with (store.folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StoreBusy):
            store.snapshot("kept")
        assert store.live().version == 0, "readers need no lock"
    assert store.snapshot("kept").version == 1
