"""The operator's routes against the real store, and the audit trail."""

from __future__ import annotations

import fcntl
import io
import json
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from servetune.adapters import store as store_module
from servetune.clients.types import AdaptationStatus, AdapterInfo, AuditEntry, VersionInfo
from servetune.server.audit import AuditLog
from tests.fakes import ADMIN, ADMIN_KEY, World, learn

ADAPTER = "/v1/adapters/default"


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.client.headers.update(ADMIN)
    return made


async def post(world: World, path: str, body: Any = None, **headers: str) -> httpx2.Response:
    return await world.client.post(path, json=body if body is not None else {}, headers=headers)


def newest(world: World) -> AuditEntry:
    return world.audit.page(limit=1)[0][0]


def refused(reply: httpx2.Response) -> tuple[int, str]:
    assert reply.headers["content-type"] == "application/problem+json"
    return reply.status_code, reply.json()["code"]


# --- reading -----------------------------------------------------------------------------------------


async def test_an_adapter_shows_what_is_wanted_and_what_is_served(world: World) -> None:
    world.store.promote(learn(world.store, 3.0).version)  # the engine has not noticed yet
    adapter = AdapterInfo.model_validate_json((await world.client.get(ADAPTER)).text)
    assert (adapter.live, adapter.serving, adapter.generation) == ("v0003", "v0002", 4)
    assert adapter.aliases == {"live": "v0003", "last-good": "v0002", "base": "v0000"}
    assert (await world.client.get("/v1/adapters")).json()["data"] == [adapter.model_dump()]
    status = AdaptationStatus.model_validate_json((await world.client.get("/v1/adaptation")).text)
    assert (status.lag_versions, status.live, status.serving) == (1, "v0003", "v0002")


async def test_versions_are_paged_newest_first(world: World) -> None:
    for value in (3.0, 4.0):
        learn(world.store, value)
    seen, cursor = [], None
    while True:
        query = {"limit": 2, **({"cursor": cursor} if cursor else {})}
        page = (await world.client.get(f"{ADAPTER}/versions", params=query)).json()
        seen += [VersionInfo.model_validate(row).version for row in page["data"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == ["v0004", "v0003", "v0002", "v0001", "v0000"]


async def test_a_version_is_found_by_number_or_alias(world: World) -> None:
    by_alias = VersionInfo.model_validate_json((await world.client.get(f"{ADAPTER}/versions/live")).text)
    assert (by_alias.version, by_alias.parent, by_alias.num_queries) == ("v0002", "v0001", 1)
    assert (await world.client.get(f"{ADAPTER}/versions/v0002")).json() == by_alias.model_dump(mode="json")


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v1/adapters/other", 404, "adapter_not_found"),
        (f"{ADAPTER}/versions/v0042", 404, "adapter_not_found"),
        (f"{ADAPTER}/versions/v0042/export", 404, "adapter_not_found"),
        (f"{ADAPTER}/versions/..%00", 422, "invalid_request"),
        (f"{ADAPTER}/versions?cursor=v0042", 404, "adapter_not_found"),
        (f"{ADAPTER}/versions?limit=0", 422, "invalid_request"),
        ("/v1/audit?cursor=-1", 422, "invalid_request"),
        ("/v1/audit?cursor=" + "9" * 5000, 422, "invalid_request"),
    ],
)
async def test_what_is_not_there_is_refused(world: World, path: str, status: int, code: str) -> None:
    assert refused(await world.client.get(path)) == (status, code)


async def test_an_export_is_a_peft_directory(world: World) -> None:
    reply = await world.client.get(f"{ADAPTER}/versions/v0001/export")
    assert reply.headers["content-disposition"] == 'attachment; filename="default-v0001.tar"'
    with tarfile.open(fileobj=io.BytesIO(reply.content)) as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names
    assert (newest(world).event, newest(world).details) == (
        "adapter_exported",
        {"adapter": "default", "version": "v0001"},
    )


async def test_a_damaged_version_is_a_problem_and_no_half_a_tar(world: World) -> None:
    (world.store.folder / "v0001" / "adapter_model.safetensors").write_bytes(b"flipped")
    assert refused(await world.client.get(f"{ADAPTER}/versions/v0001/export")) == (500, "adapter_corrupt")
    assert newest(world).details["refused"] == "adapter_corrupt"


# --- acting ------------------------------------------------------------------------------------------


async def test_promote_is_served_and_audited_when_the_reply_comes(world: World) -> None:
    reply = await post(world, f"{ADAPTER}/promote", {"version": "v0001"}, **{"X-Request-ID": "r-1"})
    adapter = AdapterInfo.model_validate_json(reply.text)
    assert (adapter.live, adapter.serving, adapter.generation) == ("v0001", "v0001", 4)
    entry = newest(world)
    assert (entry.event, entry.actor, entry.request_id) == ("adapter_promoted", "sta_operator", "r-1")
    assert entry.details == {"adapter": "default", "version": "v0001"}


async def test_promote_honours_if_match(world: World) -> None:
    path, body = f"{ADAPTER}/promote", {"version": "v0001"}
    assert refused(await post(world, path, body, **{"If-Match": '"2"'})) == (409, "alias_moved")
    assert newest(world).details == {"adapter": "default", "version": "v0001", "refused": "alias_moved"}
    assert (await post(world, path, body, **{"If-Match": '"3"'})).status_code == 200
    assert refused(await post(world, path, body, **{"If-Match": "x"})) == (422, "invalid_request")


async def test_rollback_goes_to_last_good_or_where_it_is_told(world: World) -> None:
    assert (await post(world, f"{ADAPTER}/rollback")).json()["serving"] == "v0001"
    assert (await post(world, f"{ADAPTER}/rollback", {"to": "base"})).json()["serving"] == "v0000"


async def test_snapshot_makes_a_labelled_version(world: World) -> None:
    body = {"label": "before-fair", "metadata": {"why": "safety"}}
    reply = await post(world, f"{ADAPTER}/snapshot", body)
    made = VersionInfo.model_validate_json(reply.text)
    assert (reply.status_code, made.version, made.origin) == (201, "v0003", "snapshot")
    assert (made.label, made.metadata, made.parent) == ("before-fair", {"why": "safety"}, "v0002")
    assert world.store.aliases()["before-fair"] == 3
    assert newest(world).details == {"adapter": "default", "label": "before-fair", "made": "v0003"}
    assert refused(await post(world, f"{ADAPTER}/snapshot", body)) == (409, "name_taken")
    assert refused(await post(world, f"{ADAPTER}/snapshot", {"label": "live"})) == (409, "name_taken")


async def test_a_store_that_somebody_holds_is_a_problem_and_not_a_wait(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "LOCK_S", 0.05)
    with (world.store.folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert refused(await post(world, f"{ADAPTER}/snapshot", {"label": "kept"})) == (503, "store_busy")
    assert newest(world).details["refused"] == "store_busy"


async def test_a_snapshot_sent_again_is_made_once(world: World) -> None:
    replies = [
        await post(world, f"{ADAPTER}/snapshot", {"label": "once"}, **{"Idempotency-Key": "k"}) for _ in "ab"
    ]
    assert [reply.status_code for reply in replies] == [201, 201]
    assert replies[0].content == replies[1].content
    assert world.store.versions() == [0, 1, 2, 3]


@pytest.mark.parametrize("purge", [True, False])
async def test_reset_publishes_and_serves_the_base_again(world: World, purge: bool) -> None:
    await world.ask()
    made = (await post(world, f"{ADAPTER}/reset", {"purge_buffer": purge})).json()
    assert (made["version"], made["origin"], made["parent"]) == ("v0003", "reset", "v0000")
    assert world.engine.serving == 3
    assert len(world.buffer.kept) == (0 if purge else 1)


@pytest.mark.parametrize("purge", ["yes", 1, "true", None])
async def test_nothing_is_purged_for_what_is_no_boolean(world: World, purge: Any) -> None:
    before = world.store.live()
    assert refused(await post(world, f"{ADAPTER}/reset", {"purge_buffer": purge})) == (422, "invalid_request")
    assert world.store.live() == before


async def test_a_reset_that_cannot_purge_changes_nothing_and_says_so(world: World) -> None:
    world.buffer.down = True
    live = world.store.live()
    reply = await post(world, f"{ADAPTER}/reset", {"purge_buffer": True})
    assert refused(reply) == (503, "buffer_unavailable")
    assert newest(world).details["refused"] == "buffer_unavailable"
    assert world.store.live() == live


async def test_erasing_takes_queries_out_of_everything(world: World) -> None:
    """One waits, one was learned from; what learned from it is gone, and who served it goes back."""
    kept = (await world.ask()).json()["adaptation"]["query_id"]
    reply = (await post(world, "/v1/adaptation/erase", {"query_ids": [kept, "q_2", "q_unknown"]})).json()
    assert reply == {"withdrawn": 1, "dropped": ["v0002"], "live": "v0001", "serving": "v0001"}
    assert world.buffer.kept == {}
    assert (world.engine.forgotten, world.buffer.compacted) == ([(2,)], 1)
    assert newest(world).details == {"adapter": "default", "num": 3}, "the trail says how many, and not which"
    world.buffer.down = True
    assert refused(await post(world, "/v1/adaptation/erase", {"query_ids": ["q_1"]})) == (
        503,
        "buffer_unavailable",
    )
    assert world.store.versions() == [0, 1], "either everywhere or nowhere"
    assert refused(await post(world, "/v1/adaptation/erase", {"query_ids": []})) == (422, "invalid_request")


async def test_a_version_is_pinned_and_unpinned(world: World) -> None:
    path = f"{ADAPTER}/versions/last-good"
    made = VersionInfo.model_validate_json((await post(world, f"{path}/pin")).text)
    assert (made.version, made.pinned, made.retired) == ("v0001", True, False)
    assert (newest(world).event, newest(world).details) == (
        "adapter_pinned",
        {"adapter": "default", "version": "last-good"},
    )
    listed = (await world.client.get(f"{ADAPTER}/versions")).json()["data"]
    assert [row["version"] for row in listed if row["pinned"]] == ["v0001"]
    assert (await post(world, f"{path}/unpin")).json()["pinned"] is False
    assert world.store.pinned() == []
    assert [(event.kind, event.data) for event in world.history.events] == [
        ("pin", {"by": "operator", "version": "v0001"}),
        ("unpin", {"by": "operator", "version": "v0001"}),
    ]
    assert refused(await post(world, f"{ADAPTER}/versions/v0042/pin")) == (404, "adapter_not_found")
    assert newest(world).details["refused"] == "adapter_not_found"


async def test_a_version_whose_weights_are_gone_is_listed_and_refused(world: World) -> None:
    world.store.promote(learn(world.store, 3.0).version)
    assert world.store.retain(recent=1, best=0) == [1]
    assert (await world.client.get(f"{ADAPTER}/versions/v0001")).json()["retired"] is True
    for act, body in (
        ("promote", {"version": "v0001"}),
        ("rollback", {"to": "v0001"}),
        ("reset", {"to": "v0001"}),
    ):
        reply = await post(world, f"{ADAPTER}/{act}", body)
        assert refused(reply) == (409, "version_retired")
        assert "import an export" in reply.json()["detail"]
    for reply in (
        await world.client.get(f"{ADAPTER}/versions/v0001/export"),
        await post(world, f"{ADAPTER}/versions/v0001/pin"),
    ):
        assert refused(reply) == (409, "version_retired")
    assert world.store.live().version == 3


async def test_learning_is_paused_and_resumed(world: World) -> None:
    assert (await post(world, "/v1/adaptation/pause")).json()["paused"] is True
    assert world.store.paused
    assert (await world.ask()).status_code == 200
    assert (await post(world, "/v1/adaptation/resume")).json()["paused"] is False
    assert [entry.event for entry in world.audit.page()[0]] == ["adaptation_resumed", "adaptation_paused"]


@pytest.mark.parametrize("act", ["promote", "rollback", "reset"])
async def test_acts_on_unknown_versions_change_nothing_and_are_audited(world: World, act: str) -> None:
    body = {"version": "v0042"} if act == "promote" else {"to": "v0042"}
    assert refused(await post(world, f"{ADAPTER}/{act}", body)) == (404, "adapter_not_found")
    assert (world.store.live().version, world.store.versions()) == (2, [0, 1, 2])
    assert newest(world).details["refused"] == "adapter_not_found"


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 50_000, b'{"version": NaN}', b'{"version":"\\ud800"}', b"[]"])
async def test_broken_bodies_are_refused(world: World, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    reply = await world.client.post(f"{ADAPTER}/promote", content=body, headers=headers)
    assert reply.status_code in {400, 422}
    assert reply.headers["content-type"] == "application/problem+json"


# --- the audit trail ---------------------------------------------------------------------------------


async def test_the_trail_is_read_page_by_page(world: World) -> None:
    for number in range(5):
        world.audit.append("event", "somebody", None, {"number": number})
    seen, cursor = [], None
    while True:
        query = {"limit": 2, **({"cursor": cursor} if cursor else {})}
        page = (await world.client.get("/v1/audit", params=query)).json()
        seen += [row["details"]["number"] for row in page["data"]]
        cursor = page["next_cursor"]
        world.audit.append("later", "somebody", None, {"number": -1})  # moves no page
        if cursor is None:
            break
    assert seen == [4, 3, 2, 1, 0]


async def test_the_key_itself_is_never_written(world: World) -> None:
    await post(world, "/v1/adaptation/pause")
    assert ADMIN_KEY.partition(".")[2] not in world.audit.path.read_text()
    assert world.audit.path.stat().st_mode & 0o077 == 0


WRITER = """
import pathlib, sys
from servetune.server.audit import AuditLog
for number in range(20):
    AuditLog(pathlib.Path(sys.argv[1])).append("event", "another process", None, {"number": number})
"""


def test_the_chain_holds_between_threads_and_processes(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    others = [subprocess.Popen([sys.executable, "-c", WRITER, str(path)]) for _ in range(2)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda n: AuditLog(path).append("event", "a thread", None, {"n": n}), range(40)))
    assert [other.wait(30) for other in others] == [0, 0]
    assert len(AuditLog(path).page(limit=1000)[0]) == 80
    assert AuditLog(path).first_broken() is None


@pytest.mark.parametrize("damage", ["change", "remove", "insert", "swap"])
def test_the_chain_shows_what_was_tampered_with(damage: str, tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit.jsonl")
    for number in range(5):
        audit.append("event", "me", None, {"number": number, "text": "x" * 3000})
    lines = audit.path.read_bytes().splitlines()
    match damage:
        case "change":
            lines[1] = lines[1].replace(b'"me"', b'"you"')
        case "remove":
            del lines[1]
        case "insert":
            lines.insert(1, lines[0])
        case "swap":
            lines[1], lines[2] = lines[2], lines[1]
    audit.path.write_bytes(b"\n".join(lines) + b"\n")
    assert audit.first_broken() in {1, 2}


def test_a_line_torn_by_a_crash_breaks_nothing(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit.jsonl")
    audit.append("before", "me")
    with audit.path.open("ab") as file:
        file.write(b'{"event": "to')
    audit.append("after", "me")
    assert [entry.event for entry in audit.page()[0]] == ["after", "before"]
    assert audit.first_broken() is None
    assert json.loads(audit.path.read_bytes().splitlines()[-1])["event"] == "after"


@pytest.mark.parametrize("damage", [b"{}", b"[1]", b'{"event": 5}', b"\xff\xfe", b"[" * 5000, b""])
def test_a_damaged_line_hides_no_other(damage: bytes, tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit.jsonl")
    for number in range(3):
        audit.append("event", "me", None, {"number": number})
    first, _, last = audit.path.read_bytes().splitlines()
    audit.path.write_bytes(b"\n".join([first, damage, last, b""]))
    assert [entry.details["number"] for entry in audit.page()[0]] == [2, 0]
    assert audit.first_broken() is not None
