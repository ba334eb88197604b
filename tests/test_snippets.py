"""Every command and snippet of README.md and docs/ is run here, or says before it why it cannot be.

They meet a real server with the embedded model and Valkey, whose state is where a user's is, in a home of its own.
A snippet that cannot be run has `<!-- not run: the reason -->` before it; its commands must exist all the same.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from servetune.cli import app
from servetune.server.settings import Settings

ROOT = Path(__file__).parents[1]
ASIDE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "nano/MODEL_CARD.md"]
DOCUMENTS = [*ASIDE, *sorted((ROOT / "docs").rglob("*.md"))]
PICTURES = ROOT / "examples/images/fluent-emoji-flat"
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
RUN = {"bash", "python"}
READ = {"yaml", "toml", "json"}
SHOWN = {"text"}  # drawings and equations
ADDRESS = "http://127.0.0.1:8000"
COMMANDS = ("servetune", "make", "python", "pytest", "pip", "curl")
CLIENTS_OWN = {"BASE_URL", "API_KEY", "ADMIN_KEY", "KEY"}  # variables that are no setting of the server
OMITTED = {"…", "..."}


@dataclass(frozen=True)
class Snippet:
    """A fenced block. `excuse`: why it is not run."""

    document: Path
    line: int
    language: str
    text: str
    excuse: str | None

    @property
    def where(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def tokens(document: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(document.read_text())


def snippets(document: Path) -> Iterator[Snippet]:
    excuse: str | None = None
    for token in tokens(document):
        if token.type == "fence":
            line = (token.map or [0])[0] + 1
            yield Snippet(document, line, token.info.strip(), token.content, excuse)
        found = NOT_RUN.search(token.content) if token.type == "html_block" else None
        excuse = found[1] if found else None


ALL = [snippet for document in DOCUMENTS for snippet in snippets(document)]


def name(item: Snippet | Path) -> str:
    return item.where if isinstance(item, Snippet) else str(item.relative_to(ROOT))


# --- what can be told without running it -------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_block_is_fenced_and_says_what_it_is(document: Path) -> None:
    for token in tokens(document):
        assert token.type != "code_block", f"{name(document)}:{(token.map or [0])[0] + 1} is not fenced"
    for snippet in snippets(document):
        assert snippet.language in RUN | READ | SHOWN, f"{snippet.where}: {snippet.language!r}"
        assert not snippet.excuse or snippet.language in RUN, f"{snippet.where} has no need of an excuse"
        if snippet.language in SHOWN:
            assert not [line for line in snippet.text.splitlines() if line.startswith(COMMANDS)], snippet.where


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_commands_exist_in_prose_and_in_what_is_not_run(document: Path) -> None:
    inline = [
        child.content
        for token in tokens(document)
        for child in token.children or ()
        if child.type == "code_inline"
    ]
    excused = [
        line
        for each in snippets(document)
        if each.excuse and each.language == "bash"
        for line in each.text.splitlines()
    ]
    for command in (*inline, *excused):
        assert_exists(command, name(document))


def assert_exists(command: str, where: str) -> None:
    """A command of ours is known, with its options; variables are settings."""
    variables = set(re.findall(r"SERVETUNE_([A-Z_]+)\b(?!\*)", command)) - CLIENTS_OWN - {"NAME"}
    assert variables <= {setting.upper() for setting in Settings.model_fields}, f"{where}: {command}"
    if not command.startswith(COMMANDS):
        return
    words = [word for word in shlex.split(command, comments=True) if word not in OMITTED]
    match words:
        case ["servetune", *given]:
            _assert_known(given, f"{where}: {command}")
        case ["make", target, *_] if "=" not in target:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"{where}: {command}"
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module), f"{where}: {command}"
        case ["python" | "pytest", file, *_]:
            assert (ROOT / file).exists(), f"{where}: {command}"


def _assert_known(given: list[str], where: str) -> None:
    command: Any = typer.main.get_command(app)
    while given and given[0] in getattr(command, "commands", {}):
        command, given = command.commands[given[0]], given[1:]
    options = {option for each in command.params for option in (*each.opts, *each.secondary_opts)} | {"--help"}
    for word in given:
        if re.match(r"--?[a-z]", word):
            assert word.partition("=")[0] in options, where
        else:
            assert not hasattr(command, "commands"), f"{where}: no such command"


@pytest.mark.parametrize("snippet", [each for each in ALL if each.language in READ], ids=name)
def test_files_that_are_shown_can_be_read(
    snippet: Snippet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if snippet.language == "yaml":
        assert yaml.safe_load(snippet.text)
    elif snippet.language == "json":
        assert json.loads(snippet.text)
    else:
        (tmp_path / "servetune.toml").write_text(snippet.text)
        monkeypatch.chdir(tmp_path)
        assert "servetune.toml" in Settings.origins().values()
        Settings()


# --- what is run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """Who follows the documents: a checkout, an environment, and a server that runs."""

    folder: Path
    environment: dict[str, str]
    address: str


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """Has some pictures and a fresh account; the server has no worker, so that nothing moves meanwhile."""
    folder, account = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("account")
    lay_out(folder)
    own = {key: value for key, value in os.environ.items() if not key.startswith(("SERVETUNE_", "XDG_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = own | {"HOME": str(account), "PATH": path, "OMP_NUM_THREADS": "1"}
    with serving(folder, environment) as address:
        yield Reader(folder, environment | {"SERVETUNE_BASE_URL": address}, address)


def lay_out(folder: Path) -> None:
    """A checkout, and what the documents take for the reader's own."""
    for part in ("examples", "deploy", "docs", "benchmarks", "Makefile", "pyproject.toml"):
        (folder / part).symlink_to(ROOT / part)
    (folder / ".venv").symlink_to(sys.prefix)
    for own in ("photo", "private", "blurred", "dog"):
        shutil.copy(PICTURES / "airplane.png", folder / f"{own}.png")
    lines = []
    for label in ("airplane", "rocket", "sailboat"):
        (folder / "my-images" / label).mkdir(parents=True)
        (folder / "photos").mkdir(exist_ok=True)
        shutil.copy(PICTURES / f"{label}.png", folder / "photos")
        lines.append({"image": f"photos/{label}.png", "question": "What is this?", "answer": label})
        for number in (0, 1):
            shutil.copy(PICTURES / f"{label}.png", folder / "my-images" / label / f"{number}.png")
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@contextmanager
def serving(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    command = [sys.executable, "-m", "servetune", "serve", "--port", "0", "--no-worker"]
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=folder
        )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "answers at" in line:
                break
        else:
            pytest.fail((folder / "server.log").read_text()[-3000:])
        yield line.split("answers at ")[1].split()[0]
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def runnable(document: Path) -> list[Snippet]:
    return [each for each in snippets(document) if each.language in RUN and not each.excuse]


@pytest.mark.timeout(900)  # a minute, and much more on a machine that has other things to do
@pytest.mark.parametrize("document", [each for each in DOCUMENTS if runnable(each)], ids=name)
def test_snippets_run_in_their_order(document: Path, reader: Reader) -> None:
    steps = [
        {"where": each.where, "language": each.language, "text": each.text.replace(ADDRESS, reader.address)}
        for each in runnable(document)
    ]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("snippet_runner.py")],
        input=json.dumps(steps),
        capture_output=True,
        text=True,
        env=reader.environment,
        cwd=reader.folder,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_there_is_something_to_run() -> None:
    assert len([each for each in ALL if each.language in RUN and not each.excuse]) >= 15
