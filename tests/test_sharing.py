"""Processes that serve one model have its weights in memory once, and no one can change another's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from servetune.adapters.family import Family
from servetune.adapters.policy import LoraSpec, Policy
from servetune.adapters.sharing import share_weights
from servetune.server.model import load_policy
from servetune.server.settings import Settings
from tests.conftest import query


def weights(folder: Path) -> Path:
    [path] = folder.glob("*.weights")
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_weights_answer_as_loaded_ones(tiny: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    plain, shared = (Family.load(str(tiny), dtype=dtype) for _ in range(2))
    share_weights(shared.model, tmp_path)
    assert shared.digest() == plain.digest()
    ours, theirs = (Policy(family, LoraSpec(4, 8)) for family in (shared, plain))
    assert ours.base_digest == theirs.base_digest
    ours.use(None), theirs.use(None)
    logits = [one.begin(one.observe(query(2))).logits for one in (ours, theirs)]
    torch.testing.assert_close(*logits, atol=0, rtol=0)


def test_tied_weights_stay_tied(tiny: Path, tmp_path: Path) -> None:
    family = Family.load(str(tiny))
    family.model.get_output_embeddings().weight = family.model.get_input_embeddings().weight
    share_weights(family.model, tmp_path)
    assert family.model.get_output_embeddings().weight is family.model.get_input_embeddings().weight


def test_a_write_stays_with_the_writer(tiny: Path, tmp_path: Path) -> None:
    one, other = (Family.load(str(tiny)) for _ in range(2))
    for family in (one, other):
        share_weights(family.model, tmp_path)
    before = other.digest()
    with torch.no_grad():
        next(one.model.parameters()).add_(1)
    assert one.digest() != before
    assert other.digest() == before
    third = Family.load(str(tiny))
    share_weights(third.model, tmp_path)
    assert third.digest() == before


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_file_is_written_again(tiny: Path, tmp_path: Path, damage: str) -> None:
    family = Family.load(str(tiny))
    digest = family.digest()
    share_weights(family.model, tmp_path)
    whole = weights(tmp_path).read_bytes()
    broken = whole[:-64] if damage == "cut" else whole[:7777] + bytes([whole[7777] ^ 1]) + whole[7778:]
    (tmp_path / "x").write_bytes(broken)
    (tmp_path / "x").replace(weights(tmp_path))
    again = Family.load(str(tiny))
    share_weights(again.model, tmp_path)
    assert again.digest() == digest
    assert weights(tmp_path).read_bytes() == whole


def test_the_file_of_another_model_leaves(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for name in ("idefics3", "internvl"):
        family = Family.load(str(checkpoints[name]))
        share_weights(family.model, tmp_path)
    assert weights(tmp_path).stat().st_size >= sum(p.nbytes for p in family.model.parameters())


def test_without_room_the_model_stays_as_it_was(tiny: Path, tmp_path: Path) -> None:
    family = Family.load(str(tiny))
    digest = family.digest()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        share_weights(family.model, tmp_path / "file")
    assert family.digest() == digest


def test_what_only_looks_at_a_model_leaves_no_file(tmp_path: Path) -> None:
    load_policy(Settings(home=tmp_path), ("one",), 1)
    assert not (tmp_path / "weights").exists()
    load_policy(Settings(home=tmp_path, share_weights=False), ("one",), 1, stays=True)
    assert not (tmp_path / "weights").exists()
    load_policy(Settings(home=tmp_path), ("one",), 1, stays=True)
    assert weights(tmp_path / "weights").stat().st_size > 10_000_000


SHARED = """
import sys, torch
from pathlib import Path
from servetune.adapters.sharing import share_weights
model = torch.nn.Linear(4096, 1024, bias=False)
torch.nn.init.constant_(model.weight, 0.5)
share_weights(model, Path(sys.argv[1]))
print(float(model.weight.sum()), flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_processes_have_the_pages_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHARED, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    children = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    assert [float(child.stdout.readline()) for child in children] == [4096 * 1024 * 0.5] * 2
    for child in children:
        entries = Path(f"/proc/{child.pid}/smaps").read_text().partition(".weights")[2].splitlines()
        sizes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in entries[1:9])}
        assert sizes["Rss"] == 4096 * 1024 * 4 // 1024
        assert sizes["Pss"] == sizes["Rss"] // 2
    for child in children:
        child.communicate("\n")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_what_is_freed_goes_back_to_the_system() -> None:
    """Many blocks below a kept one: the allocator holds them until it is told."""
    code = """
from pathlib import Path
from servetune.adapters.sharing import release_memory
pages = lambda: int(Path("/proc/self/statm").read_text().split()[1])
blocks = [bytearray(60_000) for _ in range(2000)]
top = bytearray(60_000)
del blocks
held = pages()
release_memory()
print(held - pages())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) * os.sysconf("SC_PAGE_SIZE") > 60_000_000
