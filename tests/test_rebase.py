"""When the base model is upgraded: what was learned on the old one is refused, kept, and learned again."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from servetune import cli
from servetune.adapters.store import WEIGHTS, AdapterStore
from servetune.adapters.types import Sampling
from servetune.adapters.versions import AliasMoved, Draft, ForeignStore, ForeignVersion
from servetune.evals import learn
from servetune.server.engine import Engine
from servetune.server.model import load_policy, open_store, worker_lock
from servetune.server.settings import Settings
from servetune.server.stage import SLOTS, Stage
from tests.checkpoints import FAMILIES
from tests.conftest import noise, query
from tests.fakes import ADMIN, ZERO, World
from tests.fakes import learn as publish

OTHER: Any = (
    {"layer.lora_A.weight": torch.zeros(4, 2)},
    {"r": 4, "target_modules": "all"},
    "sha256:other",
    (1.0,),
)
FAST: dict[str, Any] = {
    "learner": "frequency",
    "queries_per_step": 4,
    "steps_per_candidate": 1,
    "learning_rate": 1e-4,
}


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    """Version 2 is live on the old base; the operator has a name for version 1."""
    made = AdapterStore(tmp_path)
    made.initialise(*ZERO)
    made.promote(publish(made, 1.0).version)
    made.snapshot("best")
    made.promote(publish(made, 3.0).version)
    return made


def test_the_new_base_is_version_0_and_live_is_new(store: AdapterStore) -> None:
    generation = store.live().generation
    made = store.rebase(*OTHER)
    assert made is not None
    assert (made.version, made.origin, made.base_digest, made.rank) == (4, "reset", "sha256:other", 4)
    assert made.metadata == {"base_before": "sha256:base"}
    assert (store.live().version, store.live().generation) == (4, generation + 1)
    assert store.aliases() == {"live": 4, "last-good": 4, "best": 2, "base": 0}
    assert store.manifest(0).base_digest == "sha256:other"
    assert store.weights(0)["layer.lora_A.weight"].shape == (4, 2)
    assert store.versions() == [0, 1, 2, 3, 4]
    store.initialise(*OTHER)
    with pytest.raises(ForeignStore, match="servetune adapters rebase default"):
        store.initialise(*ZERO)


def test_retention_counts_versions_of_the_present_base(store: AdapterStore) -> None:
    """Those of the base before are there to be exported, and neither recent nor good."""
    store.rebase(*OTHER)
    for value in (5.0, 6.0, 7.0):
        store.publish(Draft({"layer.lora_A.weight": torch.full((4, 2), value)}, "worker", 4, (0.0,)))
    assert store.retain(recent=2, best=0) == [5]
    assert store.retired() == [5]
    assert all((store.folder / f"v000{number}" / WEIGHTS).exists() for number in (1, 2, 3))


@pytest.mark.parametrize("act", ["promote", "rollback", "reset", "weights"])
def test_what_was_learned_before_cannot_be_served_again(store: AdapterStore, act: str) -> None:
    store.rebase(*OTHER)
    before = store.live()
    with pytest.raises(ForeignVersion, match="v0003 was made for another base"):
        getattr(store, act)(3)
    assert store.live() == before
    assert b"v0003/adapter_model.safetensors" in b"".join(store.export(3))
    assert store.manifest(3).query_ids == ("q_3",)


def test_to_rebase_twice_changes_nothing(store: AdapterStore) -> None:
    store.rebase(*OTHER)
    before = store.live(), store.versions()
    assert store.rebase(*OTHER) is None
    assert (store.live(), store.versions()) == before


def test_what_is_learned_from_then_on_is_of_the_new_base(store: AdapterStore) -> None:
    store.rebase(*OTHER)
    made = publish(store, 5.0)
    assert (made.version, made.base_digest, made.rank) == (5, "sha256:other", 4)
    store.promote(made.version)
    store.erase(["q_5", "q_3"])
    assert (store.live().version, store.versions()) == (4, [0, 1, 2, 4])


@pytest.mark.parametrize("cut", range(4))
def test_cut_short_at_any_point_it_is_called_again(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    class Cut(Exception):
        pass

    def ends(*_: Any, **__: Any) -> Any:
        raise Cut

    real = AdapterStore._write
    written: list[int] = []

    def write(self: AdapterStore, version: int, *given: Any) -> Any:
        written.append(version)
        return ends() if cut == 3 and len(written) == 2 else real(self, version, *given)

    with monkeypatch.context() as broken:
        broken.setattr(AdapterStore, "_write", ends if cut == 0 else write)
        if cut in (1, 2):
            broken.setattr(AdapterStore, "_move_live" if cut == 1 else "_remove", ends)
        with pytest.raises(Cut):
            store.rebase(*OTHER)
    if cut == 3:  # version 0 is missing: whoever starts makes it, and keeps the aliases
        store.initialise(*OTHER)
    else:
        store.rebase(*OTHER)
    store.initialise(*OTHER)
    live = store.live().version
    assert live >= 4
    assert store.manifest(live).base_digest == "sha256:other"
    assert store.aliases()["best"] == 2
    store.weights(live)


def test_a_worker_of_the_old_base_publishes_nothing_more(store: AdapterStore) -> None:
    was = store.live()
    store.rebase(*OTHER)
    with pytest.raises(AliasMoved):
        store.promote(4, expected_generation=was.generation)


# --- over HTTP ---------------------------------------------------------------------------------------


async def test_the_operator_sees_them_and_is_told_why_not(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.store.rebase(*OTHER)
    listed = (await world.client.get("/v1/adapters/default/versions", headers=ADMIN)).json()["data"]
    assert {row["version"]: row["servable"] for row in listed} == {
        "v0003": True,
        "v0002": False,
        "v0001": False,
        "v0000": True,
    }
    url = "/v1/adapters/default/promote"
    reply = await world.client.post(url, json={"version": "v0002"}, headers=ADMIN)
    assert (reply.status_code, reply.json()["code"]) == (409, "adapter_incompatible")
    assert "Learn again" in reply.json()["detail"]
    assert '"refused": "adapter_incompatible"' in (tmp_path / "audit.jsonl").read_text()


async def test_adapters_of_another_base_are_refused_and_told_of(tmp_path: Path) -> None:
    world = World(tmp_path)
    (tmp_path / "store" / "theirs").mkdir()
    (tmp_path / "store" / "theirs" / "of-another-base").touch()
    async with world.app.router.lifespan_context(world.app):
        reply = await world.ask(adapter="theirs@live")
        assert (reply.status_code, reply.json()["code"]) == (409, "adapter_incompatible")
        assert "servetune adapters rebase" in reply.json()["detail"]
        assert (await world.ask(adapter="nobody@live")).status_code == 404
    [event] = world.history.events
    assert (event.kind, event.data) == ("base_mismatch", {"adapters": ["theirs"]})


# --- from one model to another -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny checkpoint and its next release, of the same shape."""
    old, new = tmp_path_factory.mktemp("old"), tmp_path_factory.mktemp("new")
    for folder in (old, new):
        FAMILIES["idefics3"](folder)
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_pretrained(new)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(new)
    return old, new


def run(*words: object) -> Any:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


async def test_an_upgrade_from_the_refusal_to_a_version_learned_again(
    bases: tuple[Path, Path], tmp_path: Path
) -> None:
    old, new = bases
    home, data = tmp_path / "home", tmp_path / "data"
    data.mkdir()
    for seed in range(8):
        noise(seed).save(data / f"{seed}.png")
    taught = learn.run(str(data), labels=list("abcdefgh"), home=home, model=str(old), **FAST)
    assert taught["live"] == "v0002"

    settings = Settings(home=home, model=str(new))
    policy = load_policy(settings, SLOTS, 1)
    with pytest.raises(ForeignStore, match="servetune adapters rebase default"):
        open_store(settings, policy)
    start = "serve", new, "--home", home, "--port", 0, "--no-worker", "--redis-url", "redis://127.0.0.1:1"
    refused = await asyncio.to_thread(run, *start)
    assert refused.exit_code == 1
    assert "servetune adapters rebase default" in str(refused.exception)

    with worker_lock(settings) as is_alone:
        assert is_alone()
        busy = run("adapters", "rebase", "--model", new, "--home", home)
        assert busy.exit_code == 1
        assert "end server and worker first" in str(busy.exception)
    done = run("adapters", "rebase", "--model", new, "--home", home, "-o", "json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["rebased"], told["live"]) == (True, "v0003")
    assert told["base_digest"] == policy.base_digest
    assert told["not_servable"] == ["v0001", "v0002"]
    assert "adapter_rebased" in (home / "audit.jsonl").read_text()
    again = run("adapters", "rebase", "--model", new, "--home", home, "-o", "json")
    assert json.loads(again.stdout)["rebased"] is False

    store = open_store(settings, policy)
    engine = Engine(Stage(policy, settings), store, settings)
    await engine.start()
    asked = query(1, labels=("a", "b"))
    base = await engine.answer(asked, Sampling(top_k=2), "base")
    live = await engine.answer(asked, Sampling(top_k=2), "live")
    assert live.version == 3
    assert dict(live.candidates) == pytest.approx(dict(base.candidates)), "it begins as the base does"
    with pytest.raises(ForeignVersion):
        await engine.answer(asked, Sampling(), "v0002")
    engine.stop()
    await engine.stage.stop()

    learned = learn.run(str(data), labels=list("abcdefgh"), home=home, model=str(new), **FAST)
    assert learned["published"][0] == "v0004"
    assert store.manifest(store.live().version).base_digest == policy.base_digest
