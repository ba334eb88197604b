"""servetune as its users start it: a tree of processes in a home, that can be killed and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from PIL import Image

from benchmarks.promises import breaking
from benchmarks.servers import processes
from servetune import Client

Part = Literal["server", "worker", "redis", "all"]
START_S = 120.0
EXAMPLES = Path(__file__).parents[2] / "examples" / "images" / "fluent-emoji-flat"


class Product:
    """A server with its embedded Valkey and one worker.

    Args:
        home: where its state lies; a second start goes on from there.
        faults: of `breaking/mutations.py`, caused in its processes.
        settings: as the environment would give them, without the prefix.
    """

    def __init__(self, home: Path, *faults: str, **settings: object) -> None:
        self.home = home
        self._faults = faults
        self._settings = {"home": home, "port": 0, "serve_threads": 1, "worker_threads": 1} | settings
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    def __enter__(self) -> Product:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, and wait until it answers. Raises RuntimeError with its last words."""
        self.home.mkdir(parents=True, exist_ok=True)
        chosen = {f"SERVETUNE_{name.upper()}": str(value) for name, value in self._settings.items()}
        environment = os.environ | chosen | breaking.environment(*self._faults)
        command = [sys.executable, "-m", "servetune", "serve"]
        with open(self.home / "server.log", "a") as log:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=self.home
            )
        assert self._process.stdout
        for line in self._process.stdout:
            if "answers at" in line:
                self.url = line.split("answers at ")[1].split()[0]
                return
        raise RuntimeError(f"it did not start:\n{self.log()[-2000:]}")

    def stop(self) -> int:
        """End it as an operator does; its exit code."""
        assert self._process
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(60)
        self._process.kill()
        self._process.stdout.close()  # type: ignore[union-attr]
        return self._process.wait()

    def client(self, **options: Any) -> Client:
        """An SDK client with the admin key."""
        return Client(self.url, admin_key=(self.home / "admin.key").read_text().strip(), **options)

    def pid(self, part: Part) -> int | None:
        """Of a part that runs."""
        assert self._process
        if part == "server":
            return self._process.pid
        found = processes(self._process.pid)
        if part == "worker":
            return next(iter(found["worker"]), None)
        return next((pid for pid in found["helpers"] if _is_redis(pid)), None)

    def kill(self, part: Part) -> None:
        """kill -9; what is not the server's own is started again by it, the server by whoever calls `start`."""
        victims = [self.pid(each) for each in (("redis", "worker", "server") if part == "all" else (part,))]  # type: ignore[arg-type]
        for pid in filter(None, victims):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if part in ("server", "all"):
            assert self._process
            self._process.wait()
            self._process.stdout.close()  # type: ignore[union-attr]

    def log(self) -> str:
        """All that it has written."""
        return (self.home / "server.log").read_text()


def _is_redis(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip() in ("valkey-server", "redis-server")
    return False


def eventually(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    """Raises TimeoutError where it does not come true in time; errors on the way count as not yet."""
    deadline = time.monotonic() + within_s
    while True:
        with suppress(Exception):
            if condition():
                return
        if time.monotonic() > deadline:
            raise TimeoutError(f"it did not happen within {within_s:.0f} s")
        time.sleep(0.05)


@contextmanager
def going_on(*works: Callable[[threading.Event], None]) -> Iterator[None]:
    """Threads, one for each work, that end with the block: each is given the event that says so."""
    stop = threading.Event()
    threads = [threading.Thread(target=work, args=(stop,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


IMAGES = sorted(EXAMPLES.glob("*.png"))
LABELS = [path.stem.replace("-", " ") for path in IMAGES][::16]


def picture(number: int) -> Image.Image:
    """Another picture for every number, of something with a name."""
    image = Image.open(IMAGES[number % len(IMAGES)]).convert("RGB")
    turned = image.rotate(number // len(IMAGES) * 7 % 30 - 15, fillcolor="white")
    turned.putpixel((0, 0), (number % 256, number // 256 % 256, number // 65536 % 256))
    return turned
