"""Modes of an adapter: what is kept, what is learned, and who is answered by what was accepted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from servetune.adapters.conduct import Conduct
from servetune.adapters.store import WEIGHTS, AdapterStore
from servetune.adapters.types import Verdict
from servetune.adapters.versions import AliasMoved, CorruptVersion
from servetune.server.audit import AuditLog
from servetune.server.worker import Worker
from tests.fakes import ADMIN, World, learn
from tests.test_store import draft, opened
from tests.test_worker import BATCH, Killed, Site, die, settings, site, store  # noqa: F401

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
    first = made.accept(made.publish(draft(1.0, query_ids=("q1",))).version, seen)
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
        made.accept(made.publish(draft(2.0)).version, seen)
    made.accept(2, made.head())
    made.dismiss(2)
    assert made.head() == made.live()
    assert made.learned_from({"q1"}) == {"q1"}


def test_retention_spares_a_candidate_and_what_it_came_from(tmp_path: Path) -> None:
    made = opened(tmp_path)
    for number in range(1, 6):
        made.publish(draft(float(number)))
    made.accept(2, made.head())
    assert made.retain(recent=1, best=0) == [1, 3, 4]
    assert (made.folder / "v0002" / WEIGHTS).exists()


# --- the worker --------------------------------------------------------------------------------------


async def test_what_is_observed_waits_for_the_operator(site: Site) -> None:  # noqa: F811
    told: list[tuple[str, Any]] = []
    site.store.change(mode="observe")
    with site.at_work(lambda *event: told.append(event)) as worker:  # type: ignore[arg-type]
        for start in (0, BATCH):
            await site.ask(start=start)
            worker.turn()
        assert (site.store.live().version, site.store.aliases()["candidate"]) == (0, 2)
        assert site.store.manifest(2).parent == 1, "it goes on from its own candidate"
        assert await site.ledger() == {"trained": 2 * BATCH}
        assert [data["alias"] for kind, data in told if kind == "publish"] == ["candidate"] * 2
        acts = [entry.event for entry in AuditLog(site.settings.path("audit.jsonl")).page()[0]]
        assert acts == ["adapter_nominated"] * 2
        site.store.promote(2)
        site.store.change(mode="live")
        await site.ask(start=2 * BATCH)
        worker.turn()
    assert (site.store.live().version, site.store.manifest(3).parent) == (3, 2)
    assert "candidate" not in site.store.aliases()


async def test_a_crash_before_a_nomination_is_finished(
    site: Site,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site.store.change(mode="observe")
    await site.ask()
    with site.at_work() as worker, monkeypatch.context() as patch:
        patch.setattr(AdapterStore, "accept", die)
        with pytest.raises(Killed):
            worker.turn()
    assert (site.store.versions(), "candidate" in site.store.aliases()) == ([0, 1], False)
    with site.at_work():
        assert (site.store.aliases()["candidate"], site.store.live().version) == (1, 0)


async def test_leaving_observe_does_not_promote_by_itself(site: Site) -> None:  # noqa: F811
    site.store.change(mode="canary")
    await site.ask()
    with site.at_work() as worker:
        worker.turn()
        site.store.change(mode="live")
        worker.turn(0)
    assert (site.store.live().version, site.store.aliases()["candidate"]) == (0, 1)


async def test_a_candidate_that_no_longer_passes_is_taken_back(
    site: Site,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site.store.change(mode="observe")
    await site.ask()
    told: list[str] = []
    with site.at_work(lambda kind, data: told.append(kind)) as worker:
        worker.turn()
        assert site.store.aliases()["candidate"] == 1
        refusal = Verdict(False, ("kl_base 9 is above 2",), {"kl_base": 9.0, "kl_step": 0.0, "valid": 1.0})
        monkeypatch.setattr(type(worker._gate), "judge", lambda *_, **__: refusal)
        await site.ask(start=BATCH)
        worker.turn()
    assert "candidate" not in site.store.aliases()
    assert site.store.live().version == 0
    assert told[-1] == "dismiss"


async def test_an_adapter_that_is_off_learns_nothing(site: Site) -> None:  # noqa: F811
    site.store.change(mode="off")
    await site.ask()
    with site.at_work() as worker:
        assert not worker.turn()
        assert site.store.versions() == [0]
        site.store.change(mode="live")
        worker.turn()
    assert site.store.live().version == 1


def during_a_step(worker: Worker, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let something happen in the middle of the worker's next step."""
    step = worker.learner.step

    def interrupted(queries: Any) -> Any:
        monkeypatch.undo()
        act()
        return step(queries)

    monkeypatch.setattr(worker.learner, "step", interrupted)


async def test_a_mode_that_changes_during_a_step_promotes_nothing(
    site: Site,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was collected while it was observed waits for the operator still."""
    site.store.change(mode="observe")
    with site.at_work() as worker:
        await site.ask()
        worker.turn()
        await site.ask(BATCH)
        during_a_step(worker, lambda: site.store.change(mode="live"), monkeypatch)
        worker.turn()
        assert (site.store.live().version, site.store.aliases()["candidate"]) == (0, 1)
        worker.turn(0)
        assert site.store.manifest(site.store.live().version).parent == 0, "it goes on from what is live"
        assert site.store.accepted() == [0, 3, 1]


@pytest.mark.parametrize("how", ["pause", "mode"])
async def test_what_is_switched_off_during_a_step_publishes_nothing(
    site: Site,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    def off() -> None:
        site.store.set_paused(True) if how == "pause" else site.store.change(mode="off")

    await site.ask()
    with site.at_work() as worker:
        during_a_step(worker, off, monkeypatch)
        worker.turn()
        worker.turn(0)
        assert site.store.versions() == [0]
        assert await site.ledger() == {"left": BATCH}
        site.store.set_paused(False)
        site.store.change(mode="live")
        worker.turn(0)
        assert site.store.live().version == 1, "it goes on where it was"
        assert await site.ledger() == {"trained": BATCH}


async def test_what_comes_from_an_erased_candidate_is_not_published(
    site: Site,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site.store.change(mode="observe")
    with site.at_work() as worker:
        await site.ask()
        worker.turn()
        assert site.store.aliases()["candidate"] == 1
        await site.ask(BATCH)
        during_a_step(worker, lambda: site.store.erase(["q_0"]), monkeypatch)
        worker.turn()
        assert site.store.versions() == [0]
        worker.turn(0)
        made = site.store.manifest(site.store.aliases()["candidate"])
        assert (made.parent, "q_0" in made.query_ids) == (0, False)


async def test_a_reset_that_is_due_waits_for_the_operator_as_well(site: Site) -> None:  # noqa: F811
    site.store.change(mode="observe")
    with site.at_work(reset_after_queries=2 * BATCH) as worker:
        for start in (0, BATCH):
            await site.ask(start)
            worker.turn()
        made = site.store.manifest(site.store.aliases()["candidate"])
        assert (made.version, made.origin, site.store.live().version) == (3, "reset", 0)
        assert site.store.num_learned() == 0
        await site.ask(2 * BATCH)
        worker.turn()
        assert site.store.manifest(site.store.aliases()["candidate"]).parent == 3
        site.store.promote(2)  # which learned enough for another reset
        await site.ask(3 * BATCH)
        worker.turn()
    assert site.store.live().version == 2, "what the operator promoted stays"


async def test_promoting_the_candidate_forgets_nothing(site: Site) -> None:  # noqa: F811
    site.store.change(mode="observe")
    with site.at_work(learner="default", min_information=0.0) as worker:
        await site.ask()
        worker.turn()
        number, remembered = site.store.head().version, worker.learner.remembered()
        assert remembered
        site.store.promote(number)
        worker.turn(0)
        assert worker.learner.remembered() == remembered
        site.store.reset()
        worker.turn(0)
        assert not worker.learner.remembered()


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
    await change(world, mode="observe")
    world.store.accept(learn(world.store, 3.0).version, world.store.head())
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
    world.store.accept(learn(world.store, 3.0).version, world.store.head())
    assert (await world.ask()).json()["adapter"]["version"] == "v0003"
    world.engine.unfit.add("candidate")
    assert (await world.ask()).json()["adapter"]["version"] == "v0002"
    world.engine.unfit.clear()
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
