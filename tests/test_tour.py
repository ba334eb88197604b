"""The main job from outside: real processes, started as the README says, and killed as the field does it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from servetune import Client
from servetune.clients import AuthenticationError
from tests.redis_servers import eventually

IMAGES = sorted((Path(__file__).parents[1] / "examples/images/fluent-emoji-flat").glob("*.png"))
NAMES = [path.stem.replace("-", " ") for path in IMAGES]
LABELS = NAMES[::16]
PATIENCE_S = 300.0


@dataclass
class Tour:
    """A running server."""

    process: subprocess.Popen[str]
    url: str
    home: Path

    def client(self) -> Client:
        return Client(self.url, admin_key=(self.home / "admin.key").read_text().strip())

    def children(self) -> dict[int, str]:
        """The command lines of the worker and the Valkey, by process id."""
        listed = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(self.process.pid)],
            capture_output=True,
            text=True,
            check=False,
        )
        rows = (line.split(None, 1) for line in listed.stdout.splitlines())
        return {int(pid): args for pid, args in rows if "defunct" not in args}

    def worker_pid(self) -> int | None:
        return next((pid for pid, args in self.children().items() if "servetune.server.main" in args), None)


@contextmanager
def serving(home: Path) -> Iterator[Tour]:
    environment = {
        **os.environ,
        "SERVETUNE_HOME": str(home),
        "SERVETUNE_LEASE_S": "3",
        "SERVETUNE_FLUSH_S": "0.5",
        "SERVETUNE_MAX_DELIVERIES": "50",  # more than this test kills
    }
    command = [sys.executable, "-m", "servetune", "serve", "--port", "0"]
    home.mkdir(exist_ok=True)
    with open(home / "server.log", "a") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=home
        )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "answers at" in line:
                break
        else:
            pytest.fail((home / "server.log").read_text()[-3000:])
        yield Tour(process, line.split("answers at ")[1].split()[0], home)
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def view(number: int) -> Image.Image:
    """Another picture for every number."""
    image = Image.open(IMAGES[number % len(IMAGES)]).convert("RGB")
    return image.rotate(number // len(IMAGES) * 7 % 30 - 15, fillcolor="white")


def ask_until(client: Client, done: Callable[[], bool], start: int = 0) -> list[str]:
    """Ask on and on; returns the versions that answered."""
    versions = []
    deadline = time.monotonic() + PATIENCE_S
    number = start
    while not done():
        assert time.monotonic() < deadline, "it did not learn in time"
        answer = client.recognize(view(number), LABELS)
        versions.append(answer.adapter.version)
        number += 1
        time.sleep(0.05)  # the worker runs on what is left idle, on a busy machine too
    return versions


def test_it_answers_learns_swaps_and_goes_back(home: Path, tmp_path: Path) -> None:
    with serving(home) as tour, tour.client() as client:
        curl = shutil.which("curl")
        if curl:
            command = [
                curl,
                "-s",
                f"{tour.url}/answer",
                "-F",
                f"image=@{IMAGES[0]}",
                "-F",
                "question=What is this?",
            ]
            answer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            assert answer["answer"]
            assert answer["adaptation"]["status"] == "queued"
        private = client.answer(IMAGES[0], "What is this?", adapt=False)
        assert (private.adaptation.status, private.adaptation.reason) == ("skipped", "adapt_false")
        pinned = [client.recognize(path, LABELS, adapter="base", adapt=False) for path in IMAGES[:8]]

        served = ask_until(client, lambda: client.info().serving >= "v0002")
        assert served == sorted(served), "a version never goes back by itself"
        learned = client.recognize(IMAGES[0], LABELS, adapt=False).adapter
        assert learned.version >= "v0002"

        client.adaptation.pause()
        kept = client.adapters.snapshot("learned")
        after = client.adapters.reset()
        client.wait_for_version(after.version)
        for path, before in zip(IMAGES, pinned, strict=False):
            now = client.recognize(path, LABELS, adapt=False)
            assert now.adapter.version == after.version
            assert now.candidates == before.candidates
        client.adapters.promote("learned")
        eventually(lambda: client.info().serving == kept.version)
        assert client.recognize(IMAGES[0], LABELS, adapt=False).adapter.digest == kept.digest

        client.adapters.export("learned", tmp_path / "exported")
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {
            path.name for path in (tmp_path / "exported").iterdir()
        }
        acts = {entry.event for entry in client.adaptation.audit()}
        assert acts >= {"adapter_snapshot", "adapter_reset", "adapter_promoted", "adapter_exported"}
        with Client(tour.url) as stranger, pytest.raises(AuthenticationError):
            stranger.adapters.reset()
    assert tour.process.returncode == 0
    log = (home / "server.log").read_text()
    assert "What is this" not in log
    assert (home / "admin.key").read_text().strip() not in log


def test_kill_9_of_worker_and_server_loses_no_acknowledged_query(home: Path) -> None:
    acknowledged: set[str] = set()

    def ask(client: Client, start: int, count: int = 12) -> None:
        for number in range(start, start + count):
            kept = client.recognize(view(number), LABELS).adaptation
            if kept.status == "queued":
                assert kept.query_id is not None
                acknowledged.add(kept.query_id)

    for life in range(3):
        with serving(home) as tour, tour.client() as client:
            eventually(lambda tour=tour: tour.worker_pid() is not None, within_s=30)  # type: ignore[misc]
            ask(client, 100 * life)
            worker = tour.worker_pid()
            assert worker
            os.kill(worker, signal.SIGKILL)
            ask(client, 100 * life + 50)
            eventually(lambda tour=tour, worker=worker: tour.worker_pid() not in (None, worker), within_s=30)  # type: ignore[misc]
            before = client.info().serving
            if life < 2:
                os.kill(tour.process.pid, signal.SIGKILL)
                tour.process.wait()
                continue
            assert before >= "v0000"

            def settled() -> bool:
                buffer = client.adaptation.status().buffer
                return buffer.connected and buffer.waiting + buffer.pending == 0

            eventually(settled, within_s=PATIENCE_S)
            ledger = client.adaptation.status().buffer.ledger
            assert ledger["dead"] == ledger["expired"] == ledger["withdrawn"] == 0
            assert ledger["acked"] >= len(acknowledged) > 0
            learned = sum(ledger[name] for name in ("trained", "no_signal", "rejected"))
            assert ledger["acked"] == learned
