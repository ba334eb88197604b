"""The shape of the code: who imports whom, what is packaged, and what never appears."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("servetune", "server", "adapters", "clients", "nano", "evals")
NOT_SHIPPED = {".ci", "tests", "benchmarks", "docs", "examples", "deploy"}
MAY_IMPORT = {
    "clients": {"clients"},
    "adapters": {"adapters"},
    "nano": {"nano"},
    "server": {"server", "adapters", "clients", "nano"},
    "evals": {"evals", "server", "adapters", "clients", "nano"},
}
HEAVY = {"torch", "transformers", "peft", "fastapi", "uvicorn", "redis", "PIL", "structlog"}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).glob("*.py"))


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, at any depth of nesting."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def imported_at_import(path: Path) -> set[str]:
    """As `imported`, without what only functions import."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_imports_go_one_way(folder: str) -> None:
    for path in sources(folder):
        ours = {name.split(".")[1] for name in imported(path) if name.startswith("servetune.")}
        assert ours <= MAY_IMPORT[folder], f"{path.name} imports {sorted(ours - MAY_IMPORT[folder])}"


def test_the_server_takes_only_wire_types_from_the_clients() -> None:
    for path in sources("server"):
        for name in imported(path):
            assert not name.startswith("servetune.clients") or name.startswith("servetune.clients.types"), (
                path.name
            )


def test_only_the_cli_imports_the_server() -> None:
    for path in sources("servetune"):
        reaches = any(name.startswith("servetune.server") for name in imported(path))
        assert not reaches or path.name == "cli.py"
        assert not any(name.startswith("servetune.server") for name in imported_at_import(path))


def test_the_base_install_needs_nothing_heavy() -> None:
    for folder in ("clients", "servetune"):
        for path in sources(folder):
            tops = {name.split(".")[0] for name in imported_at_import(path)}
            assert not tops & HEAVY, path


def test_importing_the_sdk_stays_light() -> None:
    code = f"import sys, servetune.cli, servetune; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_folder_with_code_is_packaged_or_named_here() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    with_code = {line.split("/")[0] for line in tracked.stdout.splitlines() if "/" in line} or set(FOLDERS)
    assert with_code - NOT_SHIPPED == set(FOLDERS)
    assert set(settings["package-dir"].values()) == set(FOLDERS)
    assert set(settings["packages"]) == set(settings["package-dir"])
    for folder in FOLDERS:
        assert not list((ROOT / folder).glob("*/*.py")), f"{folder} has a sub-package that would not be shipped"


def test_folders_refuse_to_be_imported_as_themselves() -> None:
    for folder in FOLDERS[1:]:
        done = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True)
        assert f"import servetune.{folder}" in done.stderr


def test_no_pickle_and_no_code_from_data() -> None:
    banned = {"pickle", "dill", "joblib", "shelve", "marshal"}
    for folder in FOLDERS:
        for path in sources(folder):
            assert not banned & {name.split(".")[0] for name in imported(path)}, path
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    called = ast.unparse(node.func)
                    assert called not in {"eval", "exec", "torch.load", "yaml.load"}, f"{path}: {called}"


def test_only_the_edges_know_their_library() -> None:
    """torch, redis and fastapi each stay where they belong."""
    at_home = {
        "redis": {"buffer.py", "connections.py", "history.py", "valkey.py"},
        "fastapi": {"app.py", "routes.py", "admin.py", "chat.py", "live.py", "errors.py", "review.py"},
        "prometheus_client": {"metrics.py"},
        "opentelemetry": {"tracing.py"},
        "torch": {"answering.py", "model.py", "stage.py"},
    }
    for path in sources("server"):
        for name in {name.split(".")[0] for name in imported(path)} & set(at_home):
            assert path.name in at_home[name], f"{path.name} imports {name}"


def test_nothing_needs_opentelemetry_unless_it_is_configured() -> None:
    for folder in FOLDERS:
        for path in sources(folder):
            tops = {name.split(".")[0] for name in imported_at_import(path)}
            assert "opentelemetry" not in tops, path


def test_settings_are_the_only_reader_of_the_environment() -> None:
    for folder in ("server", "adapters"):
        for path in sources(folder):
            assert "os.environ" not in path.read_text(), path
