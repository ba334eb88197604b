"""The command line: what it prints, where, and with which exit code."""

import base64
import functools
import io
import json
import re
import shlex
import subprocess
import sys
import tarfile
import types

import httpx2
import pytest
import typer
from pydantic import BaseModel, Field
from rich.console import Console
from typer.testing import CliRunner

from servetune import AsyncClient, Client, __version__, bench, cli, connect, watching
from servetune.clients.types import Event, Series

PIXEL = (  # a PNG of one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
ANSWER = {
    "id": "ans_1",
    "created": 1,
    "model": "nano",
    "adapter": {"name": "default", "version": "v0007", "digest": "sha256:0"},
    "task": "recognition",
    "answer": "[red]cat\x1b[2J",
    "confidence": 0.812,
    "confidence_source": "label_probability",
    "candidates": [{"label": "cat", "score": 0.812}, {"label": "dog", "score": 0.188}],
    "finish_reason": "stop",
    "diagnostics": {},
    "adaptation": {"status": "skipped", "reason": "adapt_false"},
    "usage": {"input_tokens": 9, "output_tokens": 1},
    "timings": {"queue_s": 0.0, "inference_s": 0.1},
}
VERSION = {
    "version": "v0001",
    "created": 1.0,
    "origin": "worker",
    "digest": "d",
    "base_digest": "b",
    "rank": 8,
    "target_modules": ["q_proj"],
    "metrics": {"kl": 0.01234567},
}
ADAPTER = {
    "name": "default",
    "aliases": {"live": "v0001"},
    "live": "v0001",
    "serving": "v0001",
    "generation": 1,
    "num_versions": 2,
    "resident": [],
    "leases": {},
}
STATUS = {
    "adapter": "default",
    "paused": True,
    "live": "v0002",
    "serving": "v0001",
    "lag_versions": 1,
    "buffer": {"connected": True, "waiting": 3},
    "worker": {"state": "paused"},
}
ERASED = {"withdrawn": 1, "dropped": ["v0002"], "live": "v0001", "serving": "v0001"}
REVIEW = {
    "adapter": "default",
    "old": "v0000",
    "new": "v0007",
    "kept": 9,
    "compared": 9,
    "different": 4,
    "judged": 2,
    "only_old": 0,
    "only_new": 2,
    "both": 0,
    "neither": 0,
    "gain": 0.44,
    "low": 0.01,
    "high": 0.44,
}
DIFF = {
    "adapter": "default",
    "old": "v0003",
    "new": "v0007",
    "facts": {"parent": {"old": "v0002", "new": "v0006"}},
    "metrics": {"kl": {"old": 0.25, "new": 0.5}},
    "gate": {},
    "compared": 9,
    "answers": [{"query_id": "q_1", "question": "what [red]is it?", "old": "a cat", "new": None}],
}
FEEDBACK = {"id": "ans_1", "adapter": "default", "version": "v0007", "correct": False}
PROBES = {"version": "p0001", "created": 1.0, "num_probes": 2, "active": True}
AUDIT = [{"timestamp": 1.0, "event": f"event_{i}", "actor": "admin"} for i in range(3)]


def exported():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            archive.addfile(tarfile.TarInfo(f"v0001/{name}"))
    return buffer.getvalue()


def reply(request):
    """A server in which every admin route works, and `missing` is no adapter."""
    path = request.url.path
    if "/missing" in path:
        body = {"type": "t", "title": "t", "status": 404, "detail": "no such adapter", "request_id": "req_1"}
        return httpx2.Response(404, json={**body, "code": "adapter_not_found"})
    if path.endswith("/export"):
        return httpx2.Response(200, content=exported())
    bodies = {
        "/v1/answer": ANSWER,
        "/v1/adapters": {"data": [ADAPTER]},
        "/v1/audit": {"data": AUDIT},
        "versions": {"data": [VERSION]},
        "snapshot": VERSION,
        "reset": VERSION,
        "review": REVIEW,
        "diff": DIFF,
        "feedback": FEEDBACK,
        "pin": VERSION,
        "probes": {"data": [PROBES]},
        "remove": {"data": [PROBES]},
        "settings": {"mode": "live", "canary_share": 0.1, "labels": []},
        "import": VERSION,
        "unpin": VERSION,
    }
    body = bodies.get(path) or bodies.get(path.rpartition("/")[2])
    if path == "/v1/adapters" and request.method == "POST":
        body = ADAPTER
    if path.endswith("erase"):
        return httpx2.Response(200, json=ERASED)
    return httpx2.Response(200, json=body or (STATUS if "adaptation" in path else ADAPTER))


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """A machine without settings, whose home is a temporary folder."""
    for name in ("SERVETUNE_BASE_URL", "SERVETUNE_API_KEY", "SERVETUNE_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SERVETUNE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def server(monkeypatch):
    """The fake server, with the requests it got."""
    requests = []

    def handle(request):
        requests.append(request)
        return reply(request)

    transport = httpx2.MockTransport(handle)
    monkeypatch.setattr(connect, "Client", functools.partial(Client, transport=transport))
    return requests


def run(*arguments, **options):
    return CliRunner().invoke(cli.app, [str(each) for each in arguments], **options)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(base64.b64decode(PIXEL))
    return path


COMMANDS = [
    "adapters list",
    "adapters create camera-7",
    "adapters show",
    "adapters versions",
    "adapters snapshot keep -m by=me",
    "adapters promote v0001",
    "adapters rollback",
    "adapters reset --to base --purge-buffer",
    "adapters export v0001 {home}/out",
    "adapters diff v0003 v0007",
    "adapters review",
    "feedback ans_1 --wrong",
    "feedback ans_1 --answer cat",
    "adapters pin v0001",
    "adapters probes list",
    "adapters probes remove p0001",
    "adapters settings",
    "adapters settings --mode canary --canary-share 0.2 -l cat -l dog",
    "adapters unpin v0001",
    "status",
    "status --name camera-7",
    "config",
    "pause",
    "resume",
    "erase q_1 q_2",
    "audit",
    "answer https://example.org/a.png what?",
    "recognize https://example.org/a.png -l cat -l dog",
]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_gives_one_json_document_or_something_to_read(server, home, line):
    result = run(*line.format(home=home).split(), "-o", "json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)
    assert result.stderr == ""
    read = run(*line.format(home=home / "again").split())
    assert read.exit_code == 0, read.output
    assert read.stdout.strip()


def test_an_adapter_is_imported_from_a_folder(server, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    result = run("adapters", "import", tmp_path, "--promote", "-o", "json")
    assert result.exit_code == 0, result.output
    [request] = server
    assert str(request.url).endswith("/v1/adapters/default/import?promote=true")
    with tarfile.open(fileobj=io.BytesIO(request.content), mode="r:") as archive:
        assert archive.getnames() == ["adapter_config.json", "adapter_model.safetensors"]


def test_an_answer_is_shown_with_its_confidence_and_without_its_tricks(server, image):
    result = run("recognize", image, "-l", "cat", "-l", "dog", "--no-adapt")
    assert "[red]cat\ufffd[2J  (81.2%, label_probability)" in result.stdout
    assert "\x1b" not in result.stdout
    assert "dog" in result.stdout
    assert "default v0007" in result.stdout
    assert "learning skipped: adapt_false" in result.stdout


def test_a_diff_shows_what_changed(server):
    result = run("adapters", "diff", "v0003", "v0007", "--limit", "5", "--name", "camera")
    [request] = server
    assert str(request.url.copy_with(query=None)).endswith("/v1/adapters/camera/diff")
    assert dict(request.url.params) == {"old": "v0003", "new": "v0007", "limit": "5"}
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["manifest", "v0003", "v0007", "change"] in lines
    assert ["kl", "0.25", "0.5", "+0.25"] in lines
    assert ["q_1", "what", "[red]is", "it?", "a", "cat", "-"] in lines
    assert "1 of 9 kept queries are answered differently" in result.stdout


def test_feedback_reaches_the_server(server):
    run("feedback", "ans_1", "--wrong", "--answer", "a dog")
    [request] = server
    assert request.url.path == "/v1/answers/ans_1/feedback"
    assert json.loads(request.content) == {"correct": False, "answer": "a dog"}


def test_options_reach_the_server(server, image):
    run("answer", image, "what?", "-n", 4, "--temperature", 0.7, "--adapter", "base", "--no-adapt", "--seed", 3)
    body = json.loads(server[0].content)
    del body["image"]
    assert body == {
        "question": "what?",
        "n": 4,
        "temperature": 0.7,
        "adapter": "base",
        "adapt": False,
        "seed": 3,
    }


def test_an_answer_now_and_its_deadline_reach_the_server(server, image, monkeypatch):
    done = {"status": "now", "queued": False, "reason": "duplicate", "views": 5, "rollouts": 0}
    monkeypatch.setitem(ANSWER, "adaptation", done)
    result = run("answer", image, "what?", "--adapt", "now", "--deadline", 2)
    assert "5 views · learning skipped: duplicate" in result.stdout
    run("recognize", image, "-l", "a", "-l", "b", "--adapt", "now")
    run("answer", image, "what?", "--adapt", "no")
    sent = [json.loads(request.content) for request in server]
    assert [(body["adapt"], body.get("deadline_s")) for body in sent] == [
        ("now", 2.0),
        ("now", None),
        (False, None),
    ]
    assert run("answer", image, "what?", "--adapt", "maybe").exit_code == 2


def test_an_image_can_come_from_stdin(server, image):
    result = run("answer", "-", "what?", input=image.read_bytes())
    assert result.exit_code == 0, result.output
    assert json.loads(server[0].content)["image"]["data"] == PIXEL


def test_the_audit_is_cut_at_its_limit(server):
    assert len(json.loads(run("audit", "--limit", 2, "-o", "json").stdout)) == 2


# --- keys --------------------------------------------------------------------------------------------


def test_this_machines_admin_key_is_found_in_the_home(server, home):
    (home / "admin.key").write_text("from-file\n")
    run("status")
    run("status", "--admin-key", "given")
    run("status", env={"SERVETUNE_ADMIN_KEY": "from-env"})
    run("status", "--base-url", "https://elsewhere.example")
    sent = [request.headers.get("authorization") for request in server]
    assert sent == ["Bearer from-file", "Bearer given", "Bearer from-env", None]


def test_without_servetune_home_the_key_is_where_platformdirs_puts_it(server, home, monkeypatch):
    (home / "servetune").mkdir()
    (home / "servetune" / "admin.key").write_text("from-xdg")
    monkeypatch.delenv("SERVETUNE_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(home))
    run("status")
    assert server[0].headers["authorization"] == "Bearer from-xdg"


def test_keys_given_in_the_environment_are_not_in_the_help():
    shown = run("status", "--help", env={"SERVETUNE_ADMIN_KEY": "s3cret"}).output
    assert "SERVETUNE_ADMIN_KEY" in shown
    assert "s3cret" not in shown


# --- errors ------------------------------------------------------------------------------------------


def test_a_refusal_is_one_line_with_code_and_request_id(server):
    result = run("adapters", "show", "missing", "-o", "json")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "error: no such adapter [404 adapter_not_found, request req_1]\n"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("answer missing.png what?", "no existing file"),
        ("status --base-url nowhere", "base_url must be http(s)"),
        ("status --base-url http://box:port", "base_url cannot be read"),
        ("adapters snapshot keep -m nothing", "KEY=VALUE"),
        ("adapters export v0001 {home}", "exists already"),
        ("adapters import {home}/nothing", "lacks adapter_config.json"),
        ("answer", "Missing argument"),
        ("status -o xml", "xml"),
        ("feedback ans_1", "say whether it was correct"),
    ],
)
def test_a_mistake_of_the_user_is_exit_code_2(server, home, image, line, reason):
    result = run(*line.format(home=home).split())
    assert result.exit_code == 2
    assert result.stdout == ""
    assert reason in result.stderr
    assert "Traceback" not in result.stderr
    assert server == []


def test_no_server_is_exit_code_3_and_names_how_to_start_one(monkeypatch):
    def refuse(request):
        raise httpx2.ConnectError("Connection refused")

    options = {"transport": httpx2.MockTransport(refuse), "max_retries": 0}
    monkeypatch.setattr(connect, "Client", functools.partial(Client, **options))
    result = run("status")
    assert result.exit_code == 3
    assert "cannot reach http://127.0.0.1:8000: Connection refused" in result.stderr
    assert "servetune serve" in result.stderr


# --- a newcomer ----------------------------------------------------------------------------------------


def leaves(group=None, words=()):
    """Every command with its words."""
    group = group or typer.main.get_command(cli.app)
    for name, each in group.commands.items():
        yield from leaves(each, (*words, name)) if hasattr(each, "commands") else [((*words, name), each)]


def test_every_command_that_prints_a_result_can_print_json():
    without = {words for words, each in leaves() if not any("-o" in option.opts for option in each.params)}
    assert without == {("serve",), ("worker",)}


def test_the_examples_of_the_help_are_commands_with_options_that_exist():
    known = dict(leaves())
    shown = [typer.main.get_command(cli.app).epilog, cli.VERSIONS, *(each.epilog for each in known.values())]
    lines = [line for text in shown if text for line in text.splitlines() if line.startswith("  servetune ")]
    assert len(lines) > 20
    for line in lines:
        words = shlex.split(re.split(r"   +", line.strip())[0])[1:]
        name = tuple(words[:2]) if words[0] == "adapters" else (words[0],)
        known[name].make_context("servetune", words[len(name) :])


def test_the_help_begins_with_first_steps():
    shown = run("--help").output
    assert shown.index("servetune serve ") < shown.index("servetune answer ") < shown.index("servetune doctor ")


# --- bench -------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """A server that answers, but for each fourth question, with the bodies it got."""
    bodies = []

    def handle(request):
        bodies.append(json.loads(request.content))
        if len(bodies) % 4 == 0:
            document = {"type": "t", "title": "t", "status": 503, "detail": "d", "code": "queue_full"}
            return httpx2.Response(503, json=document)
        return httpx2.Response(200, json=ANSWER)

    made = functools.partial(AsyncClient, transport=httpx2.MockTransport(handle))
    monkeypatch.setattr(connect, "AsyncClient", made)
    return bodies


def test_bench_counts_what_was_answered_and_what_was_not(asked):
    result = run("bench", "--questions", 10, "--at-once", 3, "-o", "json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["questions"], told["answered"], told["failed"]) == (10, 8, {"queue_full": 2})
    assert told["versions"] == {"default@v0007": 8}
    assert told["model_p50_ms"] == 100
    assert 0 < told["p50_ms"] <= told["p95_ms"] <= told["p99_ms"]
    assert len(asked) == 11, "one is asked before"
    assert not any(body["adapt"] for body in asked), "none is to be kept"
    assert len({body["image"]["data"] for body in asked}) == 11, "nothing kept of one answers another"
    asked.clear()
    assert "answered" in run("bench", "--questions", 2).stdout


def test_bench_asks_what_it_is_told(asked, image):
    run("bench", image, "-l", "cat", "-l", "dog", "--question", "which?", "--questions", 1)
    assert asked[0]["candidate_labels"] == ["cat", "dog"]
    assert asked[0]["question"] == "which?"
    assert {body["image"]["data"] for body in asked} == {PIXEL}
    assert run("bench", "-l", "cat").exit_code == 2


def test_bench_says_what_is_wrong_with_all_questions(monkeypatch):
    def refuse(request):
        raise httpx2.ConnectError("Connection refused")

    made = functools.partial(AsyncClient, transport=httpx2.MockTransport(refuse))
    monkeypatch.setattr(connect, "AsyncClient", made)
    result = run("bench")
    assert result.exit_code == 3
    assert "servetune serve" in result.stderr


def test_pictures_of_the_bench_are_pictures():
    from PIL import Image

    first, second = (Image.open(io.BytesIO(bench.picture(number))) for number in (0, 1))
    assert first.size == (bench.SIDE, bench.SIDE)
    assert first.tobytes() != second.tobytes()


# --- processes ---------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch):
    """A stand-in for the server's entry points, with the flags they got."""
    calls = []
    module = types.ModuleType("servetune.server.main")
    module.serve = lambda **flags: calls.append(("serve", flags))
    module.worker = lambda **flags: calls.append(("worker", flags))
    monkeypatch.setitem(sys.modules, "servetune.server.main", module)
    return calls


def test_only_the_flags_given_override_settings(started, tmp_path):
    assert run("serve").exit_code == 0
    run("serve", "nano", "--port", 0, "--home", tmp_path, "--no-worker", "--redis-url", "redis://box")
    run("worker", "some/model", "--learner", "ttrv")
    given = {"model": "nano", "port": 0, "home": tmp_path, "worker": False, "redis_url": "redis://box"}
    assert started == [
        ("serve", {}),
        ("serve", given),
        ("worker", {"model": "some/model", "learner": "ttrv"}),
    ]


def test_flags_are_fields_of_the_settings():
    settings = pytest.importorskip("servetune.server.settings").Settings
    for role in (cli.serve, cli.worker):
        assert set(role.__annotations__) - {"return"} <= set(settings.model_fields)


@pytest.mark.parametrize("missing", ["fastapi", "torch"])
def test_without_the_extra_the_install_command_is_named(started, monkeypatch, missing):
    def serve(**flags):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(sys.modules["servetune.server.main"], "serve", serve)
    result = run("serve")
    assert result.exit_code == 2
    assert result.stderr == (
        f'error: {missing} is not installed. Install the server: pip install "servetune[server]"\n'
    )


def test_a_wrong_setting_is_one_line(started, monkeypatch):
    class Settings(BaseModel):
        port: int = Field(le=65535)

    monkeypatch.setattr(sys.modules["servetune.server.main"], "serve", lambda **flags: Settings(**flags))
    result = run("serve", "--port", 70000)
    assert result.exit_code == 2
    assert result.stderr == "error: port: Input should be less than or equal to 65535\n"


def test_the_module_runs_and_help_imports_no_server():
    version = subprocess.run(
        [sys.executable, "-m", "servetune", "--version"], capture_output=True, text=True, check=True
    )
    assert version.stdout == f"{__version__}\n"
    code = "import servetune.cli, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "fastapi", "transformers", "PIL", "servetune.server"}.isdisjoint(loaded.stdout.split())


# --- watching ----------------------------------------------------------------------------------------


def happened(kind, number, **data):
    return Event(id=f"{number}-0", time=1000.0 + number, adapter="default", kind=kind, data=data)


EVENTS = [
    happened("step", 1, step=1, reward=0.25, majority=0.5),
    happened("step", 2, step=2, reward=0.75, majority=0.5),
    happened("step", 3, step=3, failed="RuntimeError"),
    happened("verdict", 4, accepted=False, early=False, reasons=["kl_step 0.4 is above 0.3", "surer 2"]),
    happened("publish", 5, version="v0007", num_queries=16),
    happened("snapshot", 6, by="operator", version="v0008", label="be\x1bfore"),
]


def test_events_are_told_line_by_line_until_there_are_no_more(monkeypatch):
    replies = ["".join(f"data: {each.model_dump_json()}\nid: {each.id}\n\n" for each in EVENTS)]

    def handle(request):
        if not replies:
            return httpx2.Response(404, json={})
        return httpx2.Response(200, content=replies.pop())

    monkeypatch.setattr(connect, "Client", functools.partial(Client, transport=httpx2.MockTransport(handle)))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    text = "".join(f"data: {each.model_dump_json()}\nid: {each.id}\n\n" for each in EVENTS)
    for options, check in (((), "refused kl_step 0.4 is above 0.3; surer 2"), (("-o", "json"), '"label":"be')):
        replies[:] = [text]
        result = run("watch", *options)
        lines = result.stdout.splitlines()
        assert len(lines) == len(EVENTS)
        assert check in result.stdout
        assert "\x1b" not in result.stdout
        assert result.exit_code == 1, "the server does not know it any more"


def test_the_view_shows_how_it_stands_what_it_learns_and_what_happened():
    view = watching.View()
    columns = {"time": [1.0, 2.0], "reward": [0.25, None], "majority": [0.5, 0.5]}
    view.begin(Series(adapter="default", columns=columns, marks=[EVENTS[4]], last_event_id="5-0"))
    assert "connecting" in shown(view)
    for event in EVENTS[1:4]:
        view.hear(event)
    buffer = {"waiting": 3, "pending": 1, "connected": True}
    requests = {"per_s": 2.5, "p50_s": 0.05, "p95_s": 0.2}
    status = {"serving": "v0007", "mode": "learning", "lag_versions": 1, "buffer": buffer, "requests": requests}
    view.hear(happened("status", 9, **status))
    text = shown(view)
    assert "default  v0007  1 behind  learning  4 kept  2.5/s  p50 50 ms  p95 200 ms" in text
    assert "▁█" in text, "two rewards"
    assert "0.75" in text
    assert "publish v0007" in text
    assert "step 3 RuntimeError" in text
    view.hear(happened("status", 9, **status | {"buffer": {**buffer, "connected": False}}))
    assert "buffer unreachable" in shown(view)
    note = "waiting for its window until 22:00"
    view.hear(happened("status", 9, **status | {"mode": "waiting", "worker": {"note": note}}))
    assert f"v0007  1 behind  {note}  4 kept" in shown(view)


def shown(view):
    console = Console(file=io.StringIO(), width=100)
    console.print(view)
    return console.file.getvalue()


def test_the_settings_are_shown_with_their_sources_and_no_key(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "servetune.toml").write_text(
        'port = 9001\nhost = "localhost"\n[adapter_keys]\nann = ["s3cret-ann"]\n'
    )
    monkeypatch.setenv("SERVETUNE_PORT", "9002")
    monkeypatch.setenv("SERVETUNE_API_KEYS", '["s3cret-user"]')
    result = run("config", "-o", "json")
    found = {each["setting"]: (each["value"], each["source"]) for each in json.loads(result.stdout)}
    assert found["port"] == (9002, "environment")
    assert found["host"] == ("localhost", "servetune.toml")
    assert found["queue_size"] == (256, "default")
    assert found["api_keys"] == (True, "environment")
    assert found["adapter_keys"] == (True, "servetune.toml")
    assert found["admin_key"] == (False, "default")
    assert "s3cret" not in result.output + run("config").output
    monkeypatch.setenv("SERVETUNE_PORT", "many")
    wrong = run("config")
    assert (wrong.exit_code, "port" in wrong.output, wrong.output.count("\n")) == (2, True, 1)


def test_a_shell_can_complete():
    shown = run("--show-completion", "bash")
    assert "_SERVETUNE_COMPLETE" in shown.output or "--show-completion" in run("--help").output
