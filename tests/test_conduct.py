"""Modes of an adapter: what is kept, what is learned, and who is answered by what was accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from servetune.adapters.conduct import Conduct
from servetune.adapters.policy import Policy
from servetune.adapters.store import WEIGHTS, AdapterStore
from servetune.adapters.types import Verdict
from servetune.adapters.versions import AliasMoved, CorruptVersion
from servetune.server.audit import AuditLog
from servetune.server.settings import Settings
from servetune.server.valkey import EmbeddedValkey
from tests.fakes import ADMIN, World, learn
from tests.test_store import draft, opened
from tests.test_worker import BATCH, Killed, ask, at_work, die, ledger, settings, store, valkey  # noqa: F401

PATH = "/v1/adapters/default/settings"

# --- in the store ------------------------------------------------------------------------------------


def test_what_was_chosen_outlives_the_process(tmp_path: Path) -> None:
    assert opened(tmp_path).conduct() == Conduct("live", 0.1, ())
    opened(tmp_path).change(mode="canary", labels=("a", "b"))
    opened(tmp_path).change(canary_share=0.5)
    assert AdapterStore(tmp_path).conduct() == Conduct("canary", 0.5, ("a", "b"))


@pytest.mark.parametrize("text", ["", "[]", '{"mode": "sometimes"}', '{"labels": "a"}'])
def test_damaged_settings_are_said_to_be(text: str, tmp_path: Path) -> None:
    made = opened(tmp_path)
    (made.folder / "conduct.json").write_text(text)
    with pytest.raises(CorruptVersion):
        made.conduct()


def test_a_candidate_lasts_until_live_moves(tmp_path: Path) -> None:
    made = opened(tmp_path)
    made.change(mode="observe")
    seen = made.live()
    first = made.nominate(made.publish(draft(1.0, query_ids=("q1",))).version, seen.generation)
    assert (made.aliases()["candidate"], made.live(), made.head()) == (1, seen, first)
    assert made.learned_from({"q1", "q9"}) == {"q1"}
    made.dismiss(7)
    assert made.head() == first, "another was meant"
    made.change(mode="live")
    assert made.head() == seen, "learning goes on from what is live"
    made.change(mode="observe")
    made.promote(1)
    assert "candidate" not in made.aliases()
    assert made.head() == made.live()
    with pytest.raises(AliasMoved):
        made.nominate(made.publish(draft(2.0)).version, seen.generation)
    made.nominate(2)
    made.dismiss(2)
    assert made.head() == made.live()
    assert made.learned_from({"q1"}) == {"q1"}


def test_retention_spares_a_candidate_and_what_it_came_from(tmp_path: Path) -> None:
    made = opened(tmp_path)
    for number in range(1, 6):
        made.publish(draft(float(number)))
    made.nominate(2)
    assert made.retain(recent=1, best=0) == [1, 3, 4]
    assert (made.folder / "v0002" / WEIGHTS).exists()


# --- the worker --------------------------------------------------------------------------------------


async def test_what_is_observed_waits_for_the_operator(
    settings: Settings,  # noqa: F811
    policy: Policy,
    store: AdapterStore,  # noqa: F811
    valkey: EmbeddedValkey,  # noqa: F811
) -> None:
    told: list[tuple[str, Any]] = []
    store.change(mode="observe")
    with at_work(settings, policy, store, valkey.url, lambda *event: told.append(event)) as worker:  # type: ignore[arg-type]
        for start in (0, BATCH):
            await ask(settings, valkey.url, start=start)
            worker.turn()
        assert (store.live().version, store.aliases()["candidate"]) == (0, 2)
        assert store.manifest(2).parent == 1, "it goes on from its own candidate"
        assert await ledger(settings, valkey.url) == {"trained": 2 * BATCH}
        assert [data["alias"] for kind, data in told if kind == "publish"] == ["candidate"] * 2
        acts = [entry.event for entry in AuditLog(settings.path("audit.jsonl")).page()[0]]
        assert acts == ["adapter_nominated"] * 2
        store.promote(2)
        store.change(mode="live")
        await ask(settings, valkey.url, start=2 * BATCH)
        worker.turn()
    assert (store.live().version, store.manifest(3).parent) == (3, 2)
    assert "candidate" not in store.aliases()


async def test_a_crash_before_a_nomination_is_finished(
    settings: Settings,  # noqa: F811
    policy: Policy,
    store: AdapterStore,  # noqa: F811
    valkey: EmbeddedValkey,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store.change(mode="observe")
    await ask(settings, valkey.url)
    with at_work(settings, policy, store, valkey.url) as worker, monkeypatch.context() as patch:
        patch.setattr(AdapterStore, "nominate", die)
        with pytest.raises(Killed):
            worker.turn()
    assert (store.versions(), "candidate" in store.aliases()) == ([0, 1], False)
    with at_work(settings, policy, store, valkey.url):
        assert (store.aliases()["candidate"], store.live().version) == (1, 0)


async def test_leaving_observe_does_not_promote_by_itself(
    settings: Settings,  # noqa: F811
    policy: Policy,
    store: AdapterStore,  # noqa: F811
    valkey: EmbeddedValkey,  # noqa: F811
) -> None:
    store.change(mode="canary")
    await ask(settings, valkey.url)
    with at_work(settings, policy, store, valkey.url) as worker:
        worker.turn()
        store.change(mode="live")
        worker.turn(0)
    assert (store.live().version, store.aliases()["candidate"]) == (0, 1)


async def test_a_candidate_that_no_longer_passes_is_taken_back(
    settings: Settings,  # noqa: F811
    policy: Policy,
    store: AdapterStore,  # noqa: F811
    valkey: EmbeddedValkey,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store.change(mode="observe")
    await ask(settings, valkey.url)
    told: list[str] = []
    with at_work(settings, policy, store, valkey.url, lambda kind, data: told.append(kind)) as worker:
        worker.turn()
        assert store.aliases()["candidate"] == 1
        refusal = Verdict(False, ("kl_base 9 is above 2",), {"kl_base": 9.0, "kl_step": 0.0, "valid": 1.0})
        monkeypatch.setattr(type(worker._gate), "judge", lambda *_, **__: refusal)
        await ask(settings, valkey.url, start=BATCH)
        worker.turn()
    assert "candidate" not in store.aliases()
    assert store.live().version == 0
    assert told[-1] == "dismiss"


async def test_an_adapter_that_is_off_learns_nothing(
    settings: Settings,  # noqa: F811
    policy: Policy,
    store: AdapterStore,  # noqa: F811
    valkey: EmbeddedValkey,  # noqa: F811
) -> None:
    store.change(mode="off")
    await ask(settings, valkey.url)
    with at_work(settings, policy, store, valkey.url) as worker:
        assert not worker.turn()
        assert store.versions() == [0]
        store.change(mode="live")
        worker.turn()
    assert store.live().version == 1


# --- over HTTP ---------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.client.headers.update(ADMIN)
    return made


async def change(world: World, **fields: Any) -> None:
    reply = await world.client.patch(PATH, json=fields)
    assert reply.status_code == 200, reply.text


async def test_settings_are_shown_changed_and_audited(world: World) -> None:
    assert (await world.client.get(PATH)).json() == {"mode": "live", "canary_share": 0.1, "labels": []}
    changed = {"mode": "canary", "labels": ["cat", "dog"]}
    reply = await world.client.patch(PATH, json=changed)
    assert reply.json() == {"mode": "canary", "canary_share": 0.1, "labels": ["cat", "dog"]}
    entry = world.audit.page(limit=1)[0][0]
    assert (entry.event, entry.details) == (
        "adapter_settings",
        {"adapter": "default", "mode": "canary", "labels": 2},
    )
    assert world.history.events[-1].data == {"by": "operator", "mode": "canary"}
    assert (await world.client.get("/v1/adapters/default")).json()["mode"] == "canary"
    assert (await world.client.get("/v1/adaptation")).json()["mode"] == "canary"
    assert (await world.client.patch(PATH, json={"labels": []})).json()["labels"] == []


@pytest.mark.parametrize(
    "fields",
    [{"mode": "sometimes"}, {"canary_share": 1.5}, {"labels": ["one"]}, {"labels": ["a", "a"]}, {"moed": "off"}],
)
async def test_settings_that_make_no_sense_change_nothing(world: World, fields: dict[str, Any]) -> None:
    reply = await world.client.patch(PATH, json=fields)
    assert (reply.status_code, reply.json()["code"]) == (422, "invalid_request")
    assert world.store.conduct() == Conduct()


async def test_off_answers_and_keeps_nothing(world: World) -> None:
    await change(world, mode="off")
    reply = (await world.ask()).json()
    assert (reply["adapter"]["version"], reply["adaptation"]["reason"]) == ("v0002", "mode_off")
    assert world.buffer.kept == {}


async def test_a_share_of_the_questions_is_answered_by_the_candidate(world: World) -> None:
    """By the same one whenever it is asked again; each is kept as what live answers is."""
    world.store.nominate(learn(world.store, 3.0).version)
    questions = [f"what is in picture {number}?" for number in range(40)]
    for mode, share, fewest, most in (
        ("observe", 1.0, 0, 0),
        ("canary", 0.0, 0, 0),
        ("canary", 0.5, 10, 30),
        ("canary", 1.0, 40, 40),
    ):
        await change(world, mode=mode, canary_share=share)
        answers = [(await world.ask(question=each)).json() for each in questions]
        aliases = [answer["adapter"]["alias"] for answer in answers]
        again = [(await world.ask(question=each)).json()["adapter"]["alias"] for each in questions]
        assert aliases == again
        assert fewest <= aliases.count("candidate") <= most, (mode, share)
        versions = {answer["adapter"]["alias"]: answer["adapter"]["version"] for answer in answers}
        assert versions.items() <= {"candidate": "v0003", "live": "v0002"}.items()
        assert {answer["adaptation"]["status"] for answer in answers} == {"queued"}
    named = (await world.ask(adapter="v0002")).json()
    assert named["adapter"]["version"] == "v0002", "who names a version gets it"
    text = (await world.client.get("/metrics")).text
    assert 'alias="candidate"' in text


async def test_without_a_candidate_that_can_answer_live_does(world: World) -> None:
    await change(world, mode="canary", canary_share=1.0)
    assert (await world.ask()).json()["adapter"]["alias"] == "live"
    world.store.nominate(learn(world.store, 3.0).version)
    (world.store.folder / "v0003" / "manifest.json").write_text("{")
    assert (await world.ask()).json()["adapter"]["version"] == "v0002"


async def test_recognition_without_labels_takes_the_adapters(world: World) -> None:
    asked = {"question": None, "task": "recognition"}
    reply = await world.ask(**asked)
    assert (reply.status_code, reply.json()["param"]) == (422, "candidate_labels")
    assert "adapters settings" in reply.json()["detail"]
    await change(world, labels=["heron", "crane"])
    answer = (await world.ask(**asked)).json()
    assert (answer["answer"], answer["task"]) == ("heron", "recognition")
    assert answer["candidates"][1]["label"] == "crane"
    query, _ = next(iter(world.buffer.kept.values()))
    assert query.labels == ("heron", "crane"), "they are learned from as if they had been sent"
    mine = (await world.ask(candidate_labels=["x", "y"])).json()
    assert mine["answer"] == "x"
