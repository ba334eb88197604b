"""Keys, scopes, where a server without keys may listen, and who may talk to it."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from servetune.server import routes
from servetune.server.access import Access, UnsafeBind, check_bind, new_key, read_or_create_key
from servetune.server.app import UndeclaredScope, declared_scopes
from servetune.server.errors import ServiceError
from servetune.server.settings import Settings
from tests.fakes import ADMIN, ADMIN_KEY, USER, USER_KEY, World

PAGE = {"/", "/page/{file}"}  # static, and without data
OPEN = {"/livez", "/readyz", "/health", "/v2/health/live", "/v2/health/ready"} | PAGE
HISTORY = {"/v1/adaptation/events", "/v1/adaptation/series"}  # numbers and names, for whoever may ask


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]"])
def test_without_keys_a_server_listens_on_loopback(host: str) -> None:
    check_bind(host, has_keys=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "", "127.0.0.1.example.org"])
def test_without_keys_it_listens_nowhere_else(host: str) -> None:
    with pytest.raises(UnsafeBind, match="SERVETUNE_API_KEYS"):
        check_bind(host, has_keys=False)
    check_bind(host, has_keys=True)


def test_the_admin_key_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "admin.key"
    with ThreadPoolExecutor(8) as threads:
        keys = set(threads.map(lambda _: read_or_create_key(path), range(32)))
    assert len(keys) == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [child.name for child in tmp_path.iterdir()] == ["admin.key"]
    assert keys != {new_key()}
    assert len(keys.pop().partition(".")[2]) >= 43  # 256 bits in base64


def test_an_empty_key_opens_nothing(tmp_path: Path) -> None:
    (tmp_path / "admin.key").write_text("\n")
    with pytest.raises(ValueError, match="empty"):
        read_or_create_key(tmp_path / "admin.key")
    with pytest.raises(ValueError, match="empty"):
        Access([""], None)


def test_keys_come_from_the_settings(tmp_path: Path) -> None:
    access = Access.from_settings(Settings(home=tmp_path, api_keys=(SecretStr(USER_KEY),)))
    key = (tmp_path / "admin.key").read_text().strip()
    assert access.authorize(f"Bearer {key}", "admin").admin
    assert access.authorize(f"bearer {USER_KEY}", "user").id == "stu_somebody"
    chosen = Access.from_settings(Settings(home=tmp_path, admin_key=SecretStr("my own secret")))
    assert chosen.authorize("Bearer my own secret", "admin").id == "admin"  # nothing of it is shown


@given(st.text(max_size=80))
def test_no_other_key_is_accepted(text: str) -> None:
    access = Access([USER_KEY], ADMIN_KEY)
    for header in (text, f"Bearer {text}", f"Basic {ADMIN_KEY}", None, ADMIN_KEY):
        with pytest.raises(ServiceError, match="unauthorized"):
            access.authorize(header, "user")


# --- routes ------------------------------------------------------------------------------------------


def test_every_route_declares_one_scope(tmp_path: Path) -> None:
    routes = declared_scopes(World(tmp_path).app)
    assert all(len(declared) == 1 for _, declared in routes)
    scopes = dict(routes)
    assert {path for path, declared in scopes.items() if declared == {"open"}} == OPEN
    admin = {path for path, declared in scopes.items() if declared == {"admin"}}
    assert admin == {path for path in scopes if path.startswith(("/v1/adap", "/v1/audit"))} - HISTORY
    assert len(admin) == 24
    assert {path for path in HISTORY | {"/metrics"} if scopes[path] == {"user"}} == HISTORY | {"/metrics"}


def test_a_route_without_a_scope_stops_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    forgotten.add_api_route("/dump", lambda: None)
    monkeypatch.setattr(routes, "router", forgotten.router)
    with pytest.raises(UndeclaredScope, match="/dump"):
        World(tmp_path)


@pytest.fixture
def keyed(tmp_path: Path) -> World:
    return World(tmp_path, user_keys=(USER_KEY,), host="0.0.0.0")


def paths(world: World) -> list[tuple[str, str]]:
    """A request for each route; POST where that is what it takes."""
    declared = [path.replace("{model:path}", "default") for path, _ in declared_scopes(world.app)]
    filled = [path.format(name="default", version="live", file="page.js", id="ans_1") for path in declared]
    acts = (
        "answer",
        "batch",
        "completions",
        "snapshot",
        "promote",
        "rollback",
        "reset",
        "pause",
        "resume",
        "erase",
        "judge",
        "feedback",
        "pin",
        "import",
        "remove",
    )
    return [("POST" if path.endswith(acts) else "GET", path) for path in filled]


async def test_with_keys_everything_but_health_needs_one(keyed: World) -> None:
    for method, path in paths(keyed):
        reply = await keyed.client.request(method, path)
        is_open = path in OPEN or path == "/page/page.js"
        assert (reply.status_code == 200) if is_open else (reply.status_code == 401), path
        if reply.status_code == 401:
            assert reply.headers["www-authenticate"] == "Bearer"
            body = reply.json()
            assert body.get("error", body)["code"] == "unauthorized"


async def test_a_user_key_opens_no_admin_route_and_the_attempt_is_audited(keyed: World) -> None:
    restricted = [each for each in paths(keyed) if each[1].startswith(("/v1/ad", "/v1/au"))]
    tried = [(method, path) for method, path in restricted if path not in HISTORY]
    for method, path in tried:
        assert (await keyed.client.request(method, path, headers=USER)).status_code == 403
    entries, _ = keyed.audit.page(limit=100)
    assert {(entry.event, entry.actor) for entry in entries} == {("access_refused", "stu_somebody")}
    assert len(entries) == len(tried) == 27
    assert USER_KEY.partition(".")[2] not in keyed.audit.path.read_text()


@pytest.mark.parametrize("headers", [USER, ADMIN])
async def test_both_kinds_of_key_may_ask(keyed: World, headers: dict[str, str]) -> None:
    keyed.client.headers.update(headers)
    assert (await keyed.ask()).status_code == 200
    [(_, client)] = keyed.buffer.kept.values()
    assert client == headers["Authorization"].removeprefix("Bearer ").partition(".")[0]


async def test_without_an_admin_key_there_are_no_admin_routes(tmp_path: Path) -> None:
    world = World(tmp_path, admin=False)
    assert (await world.client.get("/v1/adapters", headers=ADMIN)).status_code == 404


async def test_admin_routes_are_keyed_even_without_user_keys(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert (await world.ask()).status_code == 200
    assert (await world.client.get("/v1/adapters")).status_code == 401
    assert (await world.client.get("/v1/adapters", headers=ADMIN)).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "rebound.example"}, 400),
        ({"Host": "localhost.evil.example"}, 400),
        ({"Host": "[::1"}, 400),
        ({"Host": ""}, 400),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
async def test_without_keys_no_web_page_may_ask(headers: dict[str, str], status: int, tmp_path: Path) -> None:
    assert (await World(tmp_path).client.get("/info", headers=headers)).status_code == status


async def test_with_keys_any_host_name_will_do(keyed: World) -> None:
    reply = await keyed.client.get(
        "/info", headers={**USER, "Host": "vision.example", "Origin": "https://a.example"}
    )
    assert reply.status_code == 200
