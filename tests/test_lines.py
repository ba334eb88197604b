"""Several adapters on one server: who is answered by which, what each learns from, whose weights are loaded."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from servetune.adapters.family import Family
from servetune.adapters.policy import LoraSpec, Policy
from servetune.adapters.store import AdapterStore
from servetune.adapters.types import Sampling
from servetune.adapters.versions import ForeignStore, version_name
from servetune.server.engine import Engine, Outcome
from servetune.server.model import Stores
from servetune.server.settings import Settings
from servetune.server.stage import SLOTS, QueueFull, Stage
from tests.conftest import query
from tests.fakes import ADMIN, USER, USER_KEY, ZERO, World, learn, png
from tests.test_engine import LABELS, count_turns, publish

ANN_KEY = "stu_annkey.aaaaaaaaaaaaaaaaaaaaaaaa"
BOB_KEY = "stu_bobkey.bbbbbbbbbbbbbbbbbbbbbbbb"
ANN, BOB = ({"Authorization": f"Bearer {key}"} for key in (ANN_KEY, BOB_KEY))


@pytest.fixture
async def world(tmp_path: Path) -> World:
    """A server with a key of its own for Ann and Bob, and one for everybody else."""
    made = World(tmp_path, user_keys=(USER_KEY,), adapter_keys={"ann": [ANN_KEY], "bob": [BOB_KEY]})
    for name in ("ann", "bob"):
        await made.lines.create(name)
    return made


async def ask(world: World, headers: dict[str, str], **fields: Any) -> httpx2.Response:
    image = "data:image/png;base64," + base64.b64encode(png()).decode()
    body = {"image": image, "question": "what is it?", **fields}
    return await world.client.post("/v1/answer", json=body, headers=headers)


async def admin(world: World, method: str, path: str, **options: Any) -> httpx2.Response:
    return await world.client.request(method, path, headers=ADMIN, **options)


# --- who is answered by which --------------------------------------------------------------------------


async def test_a_key_of_an_adapter_is_answered_by_it_and_teaches_it_alone(world: World) -> None:
    reply = await ask(world, ANN)
    assert reply.json()["adapter"]["name"] == "ann"
    buffers = world.buffer.others
    assert [len(buffers[name].kept) for name in ("ann", "bob")] == [1, 0]
    assert not world.buffer.kept
    assert reply.json()["adaptation"]["query_id"] in buffers["ann"].kept


@pytest.mark.parametrize("wanted", ["bob@live", "default@live", "default@v0001", "nobody@live"])
async def test_it_opens_no_other_and_does_not_tell_whether_there_is_one(world: World, wanted: str) -> None:
    refused = await ask(world, ANN, adapter=wanted)
    unknown = await ask(world, USER, adapter="nobody@live")
    assert (refused.status_code, refused.json()["code"]) == (404, "adapter_not_found")
    assert refused.json()["detail"] == unknown.json()["detail"]
    assert not world.engine.asked


async def test_other_keys_choose(world: World) -> None:
    for wanted, name in (("live", "default"), ("default@v0001", "default"), ("bob@base", "bob")):
        adapter = (await ask(world, USER, adapter=wanted)).json()["adapter"]
        assert adapter["name"] == name
    assert (await ask(world, ANN, adapter="ann@live")).json()["adapter"]["name"] == "ann"
    assert (await ask(world, ANN, adapter="v0001")).status_code == 404, "of default, not of ann"


async def test_through_openais_door_the_walls_are_the_same(world: World) -> None:
    image = "data:image/png;base64," + base64.b64encode(png()).decode()
    parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "what?"}]

    async def chat(headers: dict[str, str], model: str) -> httpx2.Response:
        body = {"model": model, "messages": [{"role": "user", "content": parts}]}
        return await world.client.post("/v1/chat/completions", json=body, headers=headers)

    assert (await chat(ANN, "ann")).json()["servetune"]["adapter"]["name"] == "ann"
    assert (await chat(ANN, "fake")).json()["servetune"]["adapter"] | {"digest": ""} == {
        "name": "ann",
        "version": "v0000",
        "alias": "base",
        "digest": "",
    }
    assert (await chat(USER, "bob@live")).json()["servetune"]["adapter"]["name"] == "bob"
    for model in ("bob", "bob@live", "default", "default@v0001"):
        assert (await chat(ANN, model)).status_code == 404
    for headers, names in ((ANN, {"ann"}), (USER, {"default", "ann", "bob"})):
        cards = (await world.client.get("/v1/models", headers=headers)).json()["data"]
        assert {card["id"].partition("@")[0] for card in cards} == names | {"fake"}
    assert (await world.client.get("/info", headers=ANN)).json()["adapter"] == "ann"


async def test_a_key_of_an_adapter_sees_the_history_of_no_other(world: World) -> None:
    for name in ("ann", "bob"):
        world.history.record(name, "step", {"step": 1, "reward": 0.5})
    for path in ("/v1/adaptation/series", "/v1/adaptation/events?since=0&follow=false"):
        own = await world.client.get(path, headers=ANN)
        assert (own.status_code, '"ann"' in own.text, '"bob"' in own.text) == (200, True, False)
        join = "&" if "?" in path else "?"
        assert (await world.client.get(f"{path}{join}adapter=bob", headers=ANN)).status_code == 404
        assert '"bob"' in (await world.client.get(f"{path}{join}adapter=bob", headers=USER)).text
    assert (await world.client.get("/metrics", headers=ANN)).status_code == 403
    await ask(world, BOB)
    told = (await world.client.get("/metrics", headers=USER)).text
    assert 'servetune_requests_total{adapter="bob",alias="live",outcome="answered",task="vqa"} 1.0' in told
    assert 'servetune_train_steps_total{adapter="bob",outcome="learned"} 0.0' in told


async def test_a_damaged_adapter_leaves_the_metrics_of_the_others(world: World) -> None:
    await ask(world, BOB)
    (world.lines.look("bob")[0].folder / "aliases.json").write_text("{")
    told = await world.client.get("/metrics", headers=USER)
    assert told.status_code == 200
    assert 'servetune_adapter_lag_versions{adapter="default"}' in told.text
    assert 'servetune_adapter_lag_versions{adapter="bob"}' not in told.text


# --- the operator --------------------------------------------------------------------------------------


async def test_an_adapter_is_made_listed_and_moved_by_name(world: World) -> None:
    made = await admin(world, "POST", "/v1/adapters", json={"name": "eve"})
    assert (made.status_code, made.json()["live"], made.json()["num_versions"]) == (201, "v0000", 1)
    again = await admin(world, "POST", "/v1/adapters", json={"name": "eve"})
    assert (again.status_code, again.json()["code"]) == (409, "name_taken")
    events = [(each.event, each.details) for each in world.audit.page(limit=2)[0]]
    assert events == [
        ("adapter_created", {"adapter": "eve", "refused": "name_taken"}),
        ("adapter_created", {"adapter": "eve"}),
    ]
    store = world.lines.look("eve")[0]
    store.promote(learn(store, 1.0).version)
    moved = await admin(world, "POST", "/v1/adapters/eve/reset", json={})
    assert moved.json()["version"] == "v0002"
    assert (world.store.live().version, store.live().version) == (2, 2)
    assert world.engines["eve"].serving == 2
    names: list[str] = []
    cursor: str | None = None
    while True:
        query = {"limit": 3} | ({"cursor": cursor} if cursor else {})
        page = (await admin(world, "GET", "/v1/adapters", params=query)).json()
        names += [row["name"] for row in page["data"]]
        if (cursor := page["next_cursor"]) is None:
            break
    assert names == ["ann", "bob", "default", "eve"]


async def test_an_adapter_that_nobody_asks_is_shown_and_not_loaded(world: World, tmp_path: Path) -> None:
    later = World(tmp_path)  # the server is started again
    rows = (await admin(later, "GET", "/v1/adapters")).json()["data"]
    assert [row["name"] for row in rows] == ["ann", "bob", "default"]
    assert [line.name for line in later.lines.in_use()] == ["default"]


async def test_learning_is_paused_and_told_of_each(world: World) -> None:
    await ask(world, BOB)
    assert (await admin(world, "POST", "/v1/adaptation/pause?adapter=ann", json={})).json()["paused"]
    found = {
        name: (await admin(world, "GET", "/v1/adaptation", params={"adapter": name})).json()
        for name in ("ann", "bob", "default")
    }
    assert [status["paused"] for status in found.values()] == [True, False, False]
    assert [status["buffer"]["waiting"] for status in found.values()] == [0, 1, 0]
    assert (await admin(world, "GET", "/v1/adaptation?adapter=nobody")).status_code == 404


async def test_what_one_erases_another_keeps(world: World) -> None:
    kept = (await ask(world, BOB)).json()["adaptation"]["query_id"]
    erase = {"query_ids": [kept]}
    gone = (await admin(world, "POST", "/v1/adaptation/erase?adapter=ann", json=erase)).json()
    assert (gone["withdrawn"], kept in world.buffer.others["bob"].kept) == (0, True)
    gone = (await admin(world, "POST", "/v1/adaptation/erase?adapter=bob", json=erase)).json()
    assert (gone["withdrawn"], kept in world.buffer.others["bob"].kept) == (1, False)


async def test_a_name_that_another_model_uses_is_taken(world: World) -> None:
    AdapterStore(world.settings.home / "store", "theirs").initialise(*ZERO[:2], "sha256:another", ZERO[3])
    reply = await admin(world, "POST", "/v1/adapters", json={"name": "theirs"})
    assert (reply.status_code, reply.json()["code"]) == (409, "name_taken")


@pytest.mark.parametrize("name", ["UPPER", "../up", "a/b", "", "a" * 65, ".hidden", "a@b"])
async def test_a_name_that_is_none_makes_nothing(world: World, name: str) -> None:
    assert (await admin(world, "POST", "/v1/adapters", json={"name": name})).status_code == 422


async def test_all_end_when_the_server_does(world: World) -> None:
    await ask(world, ANN)
    async with world.app.router.lifespan_context(world.app):
        pass
    assert world.stage.stopped
    assert [engine.life[-1] for engine in world.engines.values()] == ["stopped"] * 3
    assert world.buffer.num_adapters == 3, "each has its part of the room"


# --- whose weights are loaded --------------------------------------------------------------------------


@pytest.fixture
def policy(tiny: Path) -> Policy:
    return Policy(Family.load(str(tiny)), LoraSpec(4, 8), SLOTS)


class Two:
    """Two adapters on one stage, each with four versions."""

    def __init__(self, policy: Policy, home: Path, **chosen: Any) -> None:
        settings = Settings(home=home, swap_poll_s=60, **chosen)
        self.policy, self.stage = policy, Stage(policy, settings)
        self.engines = []
        for number, name in enumerate(("one", "two")):
            store = AdapterStore(home / "store", name)
            policy.use(None)
            store.initialise(policy.zero_weights(), policy.peft_config(), "sha256:base", policy.probe())
            for seed in range(1, 5):
                publish(policy, store, 10 * number + seed)
            store.promote(1)
            self.engines.append(Engine(self.stage, store, settings))

    async def ask(self, number: int, choice: str = "live") -> Outcome:
        return await self.engines[number].answer(query(labels=LABELS), Sampling(top_k=3), choice)

    def loaded(self) -> list[list[int]]:
        return [engine.residency()[0] for engine in self.engines]


@pytest.fixture
async def two(policy: Policy, tmp_path: Path) -> AsyncIterator[Two]:
    made = Two(policy, tmp_path, resident_versions=4)
    for engine in made.engines:
        await engine.start()
    yield made
    for engine in made.engines:
        engine.stop()
    await made.stage.stop()


async def test_the_same_number_is_another_version_in_another_adapter(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [await two.ask(number) for number in (0, 1)]
    assert [(each.adapter, each.version) for each in alone] == [("one", 1), ("two", 1)]
    assert alone[0].candidates != alone[1].candidates
    turns = count_turns(monkeypatch)
    two.stage.answering.forget_prompts()
    mixed = await asyncio.gather(*(two.ask(number) for number in (0, 1) * 3))
    assert sum(turns) == 6
    for number, each in enumerate(mixed):
        assert dict(each.candidates) == pytest.approx(dict(alone[number % 2].candidates), abs=1e-4)


async def test_one_adapter_cannot_take_the_room_of_all(two: Two) -> None:
    await two.ask(1)
    for version in (2, 3, 4, 2, 3, 4):
        await two.ask(0, version_name(version))
    assert [len(loaded) - 1 for loaded in two.loaded()] == [3, 1]
    assert two.loaded()[1] == [0, 1]
    assert len(two.policy.slots) == 4


async def test_what_is_served_is_put_aside_last_and_comes_back(policy: Policy, tmp_path: Path) -> None:
    two = Two(policy, tmp_path, resident_versions=3)
    for engine in two.engines:
        await engine.start()
    first = (await two.ask(0)).candidates
    for version in (2, 3):
        await two.ask(1, version_name(version))  # three slots: one's and two's live, and another of two
    assert two.loaded() == [[0, 1], [0, 1, 3]]
    await two.ask(1, version_name(4))
    assert two.loaded() == [[0, 1], [0, 1, 4]]
    async with two.stage.hold(two.engines[1].store, 1), two.stage.hold(two.engines[1].store, 4):
        await two.ask(1, version_name(2))  # the only one that nobody holds is what the other serves
        assert two.loaded() == [[0], [0, 1, 2, 4]]
        async with two.stage.hold(two.engines[1].store, 2):
            with pytest.raises(QueueFull):
                await two.ask(0)
    assert (await two.ask(0)).candidates == first
    assert 1 in two.loaded()[0]
    for engine in two.engines:
        engine.stop()
    await two.stage.stop()


async def test_a_slot_made_later_is_like_the_first_ones(policy: Policy) -> None:
    weights = policy.zero_weights()
    for key, value in weights.items():
        if ".lora_B." in key:
            value.normal_(std=0.5)
    before = {slot: policy.weights(slot) for slot in policy.slots}
    policy.add("late")
    assert all(
        (policy.weights(slot)[key] == value).all() for slot, own in before.items() for key, value in own.items()
    )
    for slot in ("late", "slot0"):
        policy.load(slot, weights)
    probes = []
    for slot in ("late", "slot0", "slot1"):
        policy.use(slot)
        probes.append(policy.probe())
    assert probes[0] == probes[1] != probes[2]
    assert all(parameter.requires_grad for slot in policy.slots for parameter in policy.parameters(slot).values())
    assert not any(module.training for module in policy.family.model.modules())


async def test_one_that_nobody_has_asked_for_long_is_looked_at_before_it_answers(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its alias is followed seldom meanwhile."""
    engine = two.engines[0]
    await two.ask(0)
    engine.store.promote(2)
    assert (await two.ask(0)).version == 1, "looked at a moment ago"
    monkeypatch.setattr(engine, "_looked", engine._looked - 1000)
    assert (await two.ask(0)).version == 2


# --- homes with adapters of other models ---------------------------------------------------------------


def test_an_adapter_of_another_model_is_none_of_ours(policy: Policy, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    stores = Stores(settings, policy)
    stores.open("ours")
    other = stores.at("theirs")
    other.initialise(policy.zero_weights(), policy.peft_config(), "sha256:another", policy.probe())
    damaged = stores.open("damaged").folder / "v0000" / "manifest.json"
    assert stores.names() == ["damaged", "ours"]
    damaged.write_text("{}")
    assert Stores(settings, policy).names() == ["damaged", "ours"], "who asks for it hears what is wrong"
    with pytest.raises(ForeignStore):
        stores.open("theirs")
