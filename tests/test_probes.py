"""Labelled probe sets: sealed, versioned, and for the gate's eyes alone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from servetune import clients
from servetune.adapters.gate import Gate, Limits
from servetune.adapters.policy import Policy
from servetune.adapters.types import Probe
from servetune.server import admin
from servetune.server.cipher import Unreadable
from servetune.server.probes import ProbeSets, UnknownProbes
from servetune.server.settings import Settings
from tests.conftest import query, stir
from tests.fakes import ADMIN, ADMIN_KEY, World, base64_png, png
from tests.test_worker import BATCH, LABELS, Site, settings, site, store  # noqa: F401

PATH = "/v1/adapters/default/probes"


def labelled(count: int, answer: str = "a") -> list[Probe]:
    return [Probe(query(100 + number, labels=LABELS), answer) for number in range(count)]


# --- the gate ----------------------------------------------------------------------------------------


def test_a_candidate_that_answers_probes_wrongly_is_refused(policy: Policy) -> None:
    limits = Limits(max_kl_base=1e9, max_kl_step=1e9, min_valid=0, min_distinct=0, min_unshown=0)
    gate = Gate(policy, limits, max_tokens=4)
    queries = [query(number, labels=LABELS) for number in range(12)]
    gate.remember(queries[:3])
    assert "probe_accuracy" not in gate.judge().metrics
    views = gate._views(None, queries, policy.observe_each(queries))
    gate.set_probes([Probe(one, view.answer) for one, view in zip(queries, views, strict=True)], 3)
    unchanged = gate.judge()
    assert unchanged.accepted
    expected = {"probes": 12, "probe_set": 3, "probe_accuracy": 1, "probe_live": 0, "probe_base": 0}
    assert unchanged.metrics.items() >= expected.items()
    stir(policy, "candidate", std=3.0)
    verdict = gate.judge()
    assert verdict.metrics["probe_accuracy"] < 0.8
    assert [reason.split()[0] for reason in verdict.reasons] == ["probe_live", "probe_base"]
    gate.set_probes([], 0)
    assert gate.judge().accepted, "without them it cannot know"


def test_open_probes_are_compared_in_canonical_form(policy: Policy) -> None:
    gate = Gate(policy, max_tokens=4)
    asked = [query(number) for number in range(3)]
    answers = [view.answer for view in gate._views(None, asked, policy.observe_each(asked))]
    probes = [Probe(one, f" {answer.upper()}. ") for one, answer in zip(asked, answers, strict=True) if answer]
    gate.set_probes([*probes, Probe(asked[0], "what nobody would say")], 1)
    assert gate.judge().metrics["probe_accuracy"] == pytest.approx(len(probes) / (len(probes) + 1))


# --- what is kept ------------------------------------------------------------------------------------


def test_a_set_is_sealed_and_never_changed(tmp_path: Path) -> None:
    sets = ProbeSets(tmp_path, Settings(home=tmp_path))
    assert (sets.newest(), sets.all()) == (0, [])
    first, second = sets.upload(labelled(2, "a")), sets.upload(labelled(3, "b"))
    assert (first.version, second.version, sets.newest()) == (1, 2, 2)
    [one, _] = sets.read(1)
    assert (one.answer, one.query.labels, one.query.question) == ("a", LABELS, query(100).question)
    assert one.query.images[0].tobytes() == query(100).images[0].convert("RGB").tobytes()
    written = (tmp_path / "probes" / "p0001.json").read_text()
    assert query(100).question not in written
    sets.remove(2)
    assert [each.version for each in sets.all()] == [1]
    assert sets.newest() == 1
    for refused in (sets.read, sets.remove):
        with pytest.raises(UnknownProbes):
            refused(2)
    assert sets.upload(labelled(1)).version == 3, "no number is given twice"


def test_another_key_opens_nothing(tmp_path: Path) -> None:
    ProbeSets(tmp_path, Settings(home=tmp_path / "mine")).upload(labelled(1))
    with pytest.raises(Unreadable):
        ProbeSets(tmp_path, Settings(home=tmp_path / "theirs")).read(1)


# --- the worker --------------------------------------------------------------------------------------


async def test_verdicts_tell_the_accuracy_and_nothing_is_learned_from_probes(site: Site) -> None:  # noqa: F811
    told: list[tuple[str, Any]] = []
    sets = ProbeSets(site.store.folder, site.settings)
    with site.at_work(lambda *event: told.append(event)) as worker:  # type: ignore[arg-type]
        sets.upload(labelled(4))  # a worker that runs takes it up
        await site.ask()
        worker.turn()
        verdict = next(data for kind, data in told if kind == "verdict")
        assert verdict["metrics"].items() >= {"probes": 4.0, "probe_set": 1.0}.items()
        made = site.store.manifest(1)
        assert made.gate is not None
        assert made.gate["metrics"]["probe_accuracy"] == verdict["metrics"]["probe_accuracy"]
        assert sorted(made.query_ids) == [f"q_{number}" for number in range(BATCH)]
        sets.remove(1)
        await site.ask(start=BATCH)
        worker.turn()
        assert "probe_accuracy" not in [data for kind, data in told if kind == "verdict"][-1]["metrics"]
        sets.upload(labelled(2))
        (site.store.folder / "probes" / "p0002.json").write_text("damaged")
        await site.ask(start=2 * BATCH)
        worker.turn()
    assert site.store.live().version == 3, "a set that does not read stops nothing"


async def test_a_set_that_this_model_cannot_take_is_told_of_and_stops_nothing(site: Site) -> None:  # noqa: F811
    told: list[tuple[str, Any]] = []
    unfit = Probe(query(question="which bird? " * site.policy.family.max_length), "heron")
    ProbeSets(site.store.folder, site.settings).upload([unfit])
    await site.ask()
    with site.at_work(lambda *event: told.append(event)) as worker:  # type: ignore[arg-type]
        worker.turn()
        worker.turn(0)
    assert site.store.live().version == 1
    assert [data for kind, data in told if kind == "degraded"] == [{"error": "PromptTooLong", "probes": "p0001"}]


# --- over HTTP ---------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.client.headers.update(ADMIN)
    return made


def item(**fields: Any) -> dict[str, Any]:
    return {"image": base64_png(), "answer": "heron", "candidate_labels": ["heron", "crane"], **fields}


async def test_sets_are_uploaded_listed_removed_and_on_record(world: World) -> None:
    items = [item(), item(candidate_labels=None, question="which bird?")]
    made = await world.client.post(PATH, json={"probes": items})
    assert made.status_code == 201, made.text
    assert made.json().items() >= {"version": "p0001", "num_probes": 2, "active": True}.items()
    await world.client.post(PATH, json={"probes": items[:1]})
    listed = (await world.client.get(PATH)).json()["data"]
    assert [(each["version"], each["active"]) for each in listed] == [("p0002", True), ("p0001", False)]
    [first, second] = ProbeSets(world.store.folder, world.settings).read(1)
    assert (first.query.labels, first.answer, first.query.question) == (
        ("heron", "crane"),
        "heron",
        world.engine.recognition_question,
    )
    assert (second.query.labels, second.query.question) == ((), "which bird?")
    left = (await world.client.post(f"{PATH}/p0002/remove", json={})).json()["data"]
    assert [(each["version"], each["active"]) for each in left] == [("p0001", True)]
    gone = await world.client.post(f"{PATH}/p0002/remove", json={})
    assert (gone.status_code, gone.json()["code"]) == (404, "probes_not_found")
    acts = [entry.event for entry in world.audit.page()[0]]
    assert acts == ["probes_removed", "probes_removed", "probes_uploaded", "probes_uploaded"]
    told = world.audit.path.read_text() + json.dumps([event.data for event in world.history.events])
    assert "heron" not in told
    assert "bird" not in told
    assert world.buffer.kept == {}


@pytest.mark.parametrize(
    ("items", "status", "param"),
    [
        ([], 422, "probes"),
        ([item(), item(answer="stork")], 422, "probes.1"),
        ([item(candidate_labels=None)], 422, "probes.0"),
        ([item(), item(image="bm8gaW1hZ2U=")], 415, "probes.1"),
        ([item(), item(candidate_labels=None, question="which? " * 200)], 422, "probes.1"),
    ],
)
async def test_what_is_wrong_with_a_set_is_named(
    items: list[dict[str, Any]], status: int, param: str, world: World
) -> None:
    reply = await world.client.post(PATH, json={"probes": items})
    assert (reply.status_code, reply.json()["param"]) == (status, param), reply.text
    assert (await world.client.get(PATH)).json()["data"] == []


async def test_a_set_has_images_of_so_many_pixels_at_most(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    size = Image.open(io.BytesIO(png())).size
    monkeypatch.setattr(admin, "MOST_PROBED", 2 * size[0] * size[1])
    assert (await world.client.post(PATH, json={"probes": [item(), item()]})).status_code == 201
    reply = await world.client.post(PATH, json={"probes": [item(), item(), item()]})
    assert (reply.json()["code"], reply.json()["param"]) == ("image_too_large", "probes.2")
    assert "smaller" in reply.json()["detail"]


async def test_the_sdk_reads_a_file(world: World, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    probe = {"image": "a.png", "answer": "heron", "question": "which bird?"}
    path = tmp_path / "probes.jsonl"
    path.write_text(json.dumps(probe) + "\n\n" + json.dumps(probe) + "\n")
    transport = httpx2.ASGITransport(app=world.app)
    async with clients.AsyncClient("http://localhost", admin_key=ADMIN_KEY, transport=transport) as client:
        made = await client.adapters.upload_probes(path)
        assert (made.version, made.num_probes) == ("p0001", 2)
        assert await client.adapters.probe_sets() == [made]
        given = [{"image": png(), "answer": "a", "candidate_labels": ["a", "b"]}]
        assert (await client.adapters.upload_probes(given)).version == "p0002"
        assert [each.version for each in await client.adapters.remove_probes("p0002")] == ["p0001"]
        path.write_text('{"answer": "heron"}')
        with pytest.raises(ValueError, match="line 1: give a JSON object with an image"):
            await client.adapters.upload_probes(path)
