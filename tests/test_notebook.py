"""The notebook of examples/, run from top to bottom beside a server of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from servetune import Client
from tests.test_tour import serving

NOTEBOOK = Path(__file__).parents[1] / "examples/learn.ipynb"
RUN = """\
import nbformat, sys
from nbclient import NotebookClient

book = nbformat.read(sys.argv[1], as_version=4)
for cell in book.cells:
    cell.source = cell.source.replace("ROUNDS = 12", "ROUNDS = 2")
NotebookClient(book, timeout=240, resources={"metadata": {"path": sys.argv[2]}}).execute()
"""


def cells() -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(NOTEBOOK.read_text())["cells"]
    return found


def test_it_is_kept_without_what_it_printed() -> None:
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells())
    assert "ROUNDS = 12" in NOTEBOOK.read_text(), "which the test below makes fewer"


@pytest.mark.timeout(900)
def test_it_runs_and_something_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the cheapest learner and small steps: what is shown here is that the notebook works."""
    for name, value in {"LEARNER": "frequency", "QUERIES_PER_STEP": 4, "STEPS_PER_CANDIDATE": 1}.items():
        monkeypatch.setenv(f"SERVETUNE_{name}", str(value))
    home = tmp_path / "home"
    with serving(home) as tour:
        own = {
            "SERVETUNE_BASE_URL": tour.url,
            "SERVETUNE_HOME": str(home),
            "HOME": str(tmp_path),
            "MPLBACKEND": "Agg",
        }
        done = subprocess.run(
            [sys.executable, "-c", RUN, NOTEBOOK, NOTEBOOK.parent],
            env=os.environ | own,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        with Client(tour.url, admin_key=(home / "admin.key").read_text().strip()) as client:
            made = [version.origin for version in client.adapters.versions()]
            assert {"worker", "snapshot", "reset"} <= set(made)
            assert client.info().serving == client.adapters.get().live
