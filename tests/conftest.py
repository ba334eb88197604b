"""Shared fixtures: tiny real checkpoints, made once a session, and one thread for torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: spinning threads make small tests slow
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import structlog
import torch
from PIL import Image

from servetune.adapters.family import Family
from servetune.adapters.policy import LoraSpec, Policy
from servetune.adapters.types import Query
from servetune.server.valkey import EmbeddedValkey
from tests.checkpoints import FAMILIES
from tests.redis_servers import running

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Commands configure the logging of their process, which in tests is everybody's."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each family, built on first use of the session."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, build in FAMILIES.items():
        (root / name).mkdir()
        build(root / name)
    return {name: root / name for name in FAMILIES}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Idefics3 checkpoint."""
    folder = tmp_path_factory.mktemp("tiny")
    FAMILIES["idefics3"](folder)
    return folder


@pytest.fixture
def policy(tiny: Path) -> Policy:
    """A fresh policy with a candidate and a live slot, both at the zero adapter."""
    made = Policy(Family.load(str(tiny)), LoraSpec(rank=4, alpha=8), ("candidate", "live"))
    for slot in ("candidate", "live"):
        made.load(slot, made.zero_weights())
    return made


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    """A Valkey for the tests of a module."""
    with running(tmp_path_factory.mktemp("valkey")) as server:
        yield server


def noise(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A reproducible picture of nothing."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def query(seed: int = 0, labels: tuple[str, ...] = (), question: str = "what is this?") -> Query:
    return Query(f"q_{seed}", (noise(seed),), question, labels)


def stir(policy: Policy, slot: str, seed: int = 0, std: float = 0.1) -> None:
    """Give a slot an adapter that changes answers."""
    generator = torch.Generator().manual_seed(seed)
    weights = policy.zero_weights()
    for key, value in weights.items():
        if ".lora_B." in key:
            value.normal_(std=std, generator=generator)
    policy.load(slot, weights)
