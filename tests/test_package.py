"""The wheel and the sdist, installed where nothing of the repository is in sight."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
import urllib.request
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PICTURE = next(iter(sorted((ROOT / "examples/images").rglob("*.png"))), None)


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return done  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, and a wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def home_alone(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean environment with the wheel alone; third-party packages are lent by this one through a .pth."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", next(dist.glob("*.whl")))
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])").stdout.strip())
    lent = folder / "lent"
    lent.mkdir()
    for item in Path(pytest.__file__).parents[1].iterdir():
        if "servetune" not in item.name and item.name != "__pycache__":
            (lent / item.name).symlink_to(item)
    (site / "lent.pth").write_text(f"{lent}\n")
    return folder


def test_wheel_and_sdist_hold_what_they_should(dist: Path) -> None:
    names = set(zipfile.ZipFile(next(dist.glob("*.whl"))).namelist())
    for needed in (
        "servetune/server/app.py",
        "servetune/server/buffer.lua",
        "servetune/server/page/index.html",
        "servetune/server/page/uPlot.iife.min.js",
        "servetune/server/page/uPlot.LICENSE",
        "servetune/adapters/grpo.py",
        "servetune/clients/types.py",
        "servetune/nano/weights/model.safetensors",
        "servetune/nano/labels.txt",
        "servetune/py.typed",
    ):
        assert needed in names, needed
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "examples"))]
    with tarfile.open(next(dist.glob("*.tar.gz"))) as tar:
        assert any(name.endswith("nano/weights/model.safetensors") for name in tar.getnames())


def test_the_base_install_names_what_the_server_needs(home_alone: Path, tmp_path: Path) -> None:
    """Without the lent packages there is no torch: `serve` says what to install and ends with 2."""
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['uvicorn'] = None; "
        "sys.argv = ['servetune', 'serve']; from servetune.cli import main; main()"
    )
    done = subprocess.run([home_alone / "bin/python", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "servetune[server]" in done.stderr


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_a_users_program_is_typed(checker: str, home_alone: Path, tmp_path: Path) -> None:
    """Strictly, and against the wheel, as its users see it; a mistake in the program is found."""
    program = tmp_path / "program.py"
    program.write_text((ROOT / "tests/users_program.py").read_text())
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    python, tool = home_alone / "bin/python", Path(sys.executable).with_name(checker)
    options = {
        "mypy": ["--strict", f"--python-executable={python}", f"--cache-dir={tmp_path / 'cache'}"],
        "pyright": ["--project", tmp_path, "--pythonpath", python],
    }
    run(tool, *options[checker], *([program] if checker == "mypy" else []), cwd=tmp_path)
    program.write_text(program.read_text().replace("answer.answer\n", "answer.answr\n", 1))
    wrong = subprocess.run(
        [str(part) for part in (tool, *options[checker], *([program] if checker == "mypy" else []))],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "answr" in wrong.stdout


@pytest.fixture
def served(home_alone: Path, tmp_path: Path) -> Iterator[str]:
    environment = {**os.environ, "SERVETUNE_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    command = [home_alone / "bin/servetune", "serve", "--port", "0", "--no-worker"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if "answers at" in line:
                    yield line.split("answers at ")[1].split()[0]
                    break
            else:
                pytest.fail("the server ended before it listened")
        finally:
            process.terminate()
            process.wait(60)


def test_the_installed_wheel_serves_an_answer(served: str, home_alone: Path, tmp_path: Path) -> None:
    assert PICTURE is not None
    for _ in range(100):
        try:
            if urllib.request.urlopen(f"{served}/readyz", timeout=5).status == 200:
                break
        except OSError:
            time.sleep(0.1)
    page = urllib.request.urlopen(f"{served}/", timeout=5).read().decode()
    assert "Watch it learn" in page
    command = [
        home_alone / "bin/servetune",
        "answer",
        PICTURE,
        "What is this?",
        "-o",
        "json",
        "--base-url",
        served,
    ]
    answer = json.loads(run(*command, cwd=tmp_path).stdout)
    assert answer["answer"]
    assert answer["adapter"]["version"] == "v0000"
