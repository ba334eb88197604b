"""What deploys it, checked by the tools that will read it and against what there is."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from servetune.server.settings import Settings

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
FILES = [DEPLOY / "compose.yaml", *UNITS, ROOT / "Dockerfile"]
INSTALLED = "/opt/servetune/bin/servetune"
VARIABLE = re.compile(r"SERVETUNE_([A-Z_]+)")
NOT_SETTINGS = {"KEY", "BIND"}  # of compose.yaml itself


def tool(name: str) -> str:
    """A program; skips the test where it is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not on PATH")
    return path


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    made: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return made


def test_compose_takes_it_and_asks_for_the_key() -> None:
    config = [tool("docker-compose"), "-f", str(DEPLOY / "compose.yaml"), "config", "-q"]
    with_key = subprocess.run(config, env=os.environ | {"SERVETUNE_KEY": "x"}, capture_output=True, text=True)
    assert with_key.returncode == 0, with_key.stderr
    bare = {name: value for name, value in os.environ.items() if name != "SERVETUNE_KEY"}
    without = subprocess.run(config, env=bare, capture_output=True, text=True)
    assert without.returncode != 0
    assert "set it to a long random secret" in without.stderr


def test_what_compose_mounts_is_there(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), f"{name} mounts {source}"
            else:
                assert source in compose["volumes"]
    scrape = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert all((DEPLOY / "prometheus" / file).exists() for file in scrape["rule_files"])
    [target] = scrape["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target.partition(":")[0] in compose["services"]
    key = scrape["scrape_configs"][0]["authorization"]["credentials_file"]
    assert key in str(compose["services"]["prometheus"]["command"])


def test_prometheus_takes_the_rules_and_they_say_what_they_should() -> None:
    promtool, rules = tool("promtool"), DEPLOY / "prometheus"
    for check in (
        ("check", "rules", rules / "servetune.rules.yml"),
        ("check", "config", "--syntax-only", rules / "prometheus.yml"),
        ("test", "rules", ROOT / "tests" / "servetune.rules.test.yml"),
    ):
        done = subprocess.run([promtool, *map(str, check)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_its_valkey_forgets_nothing(compose: dict[str, Any]) -> None:
    from servetune.server.buffer import DURABLE

    command = compose["services"]["valkey"]["command"]
    given = dict(zip(command[1::2], command[2::2], strict=True))
    assert {name: given[f"--{name}"] for name in DURABLE} == DURABLE


@pytest.mark.parametrize(
    "file", [DEPLOY / "compose.yaml", *UNITS, ROOT / "Dockerfile"], ids=lambda path: path.name
)
def test_every_variable_is_a_setting(file: Path) -> None:
    named = set(VARIABLE.findall(file.read_text())) - NOT_SETTINGS
    assert named <= {name.upper() for name in Settings.model_fields}


def test_the_image_has_every_package() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    copied = re.findall(r"^COPY (\w+) \1$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert set(packages.values()) == set(copied)


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_takes_the_units(unit: Path, tmp_path: Path) -> None:
    verify = tool("systemd-analyze")
    there = tmp_path / unit.name
    there.write_text(unit.read_text().replace(INSTALLED, "/bin/true"))
    done = subprocess.run([verify, "verify", "--man=no", str(there)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    there.write_text(there.read_text().replace("[Service]", "[Service]\nNoSuchDirective=1"))
    assert "NoSuchDirective" in subprocess.run([verify, "verify", there], capture_output=True, text=True).stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_the_units_run_commands_that_exist(unit: Path) -> None:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(unit.read_text())
    program, command = parser["Service"]["ExecStart"].split()
    assert program == INSTALLED
    assert command in ("serve", "worker")
    # A server ends within 25 s of its signal, and its worker within 15 s.
    assert int(parser["Service"]["TimeoutStopSec"]) >= 40
