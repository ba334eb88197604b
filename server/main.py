"""The two processes: `serve` (API, engine, embedded Valkey, and one worker beside it) and `worker`.

This is the only module that reads the environment (through Settings) and that starts other processes.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import structlog
import transformers
import uvicorn
from pydantic import BaseModel
from pydantic_settings import SettingsError

from servetune.adapters.family import UnsupportedModel
from servetune.adapters.policy import Policy
from servetune.adapters.versions import ForeignStore, StoreError, version_name
from servetune.server import tracing
from servetune.server.access import Access, UnsafeBind, check_bind
from servetune.server.app import create_app
from servetune.server.audit import AuditLog
from servetune.server.buffer import BadBuffer, QueryBuffer, QueryStream
from servetune.server.history import History, Recorder
from servetune.server.lines import Lines
from servetune.server.model import Stores, load_policy, worker_lock
from servetune.server.protocol import TimelyProtocol
from servetune.server.settings import Settings
from servetune.server.stage import SLOTS, Stage
from servetune.server.valkey import EmbeddedValkey, ValkeyError
from servetune.server.webhook import tell_now

RESTART_S = (1.0, 30.0)  # first and longest pause before a dead worker is started again
EXAMPLE = Path("examples/images/fluent-emoji-flat/airplane.png")  # in a clone of the repository
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
PR_SET_PDEATHSIG = 1
SWITCH_S = 5e-4  # a tenth of what is usual

log = structlog.get_logger()


class Rebased(BaseModel):
    """What became of an adapter, and which of its versions stay without being servable."""

    adapter: str
    rebased: bool
    live: str
    base_digest: str
    not_servable: list[str]


class CannotListen(Exception):
    """The address is taken or not ours."""


def serve(**flags: Any) -> None:
    """Serve until interrupted. `flags` are fields of Settings that override environment and file."""
    _log_to_stderr()
    with _plain_refusals():
        settings = Settings(**flags)
        check_bind(settings.host, bool(settings.api_keys or settings.adapter_keys))
        _check_port(settings)  # before the model is loaded
        with _mismatch_told(settings), _redis(settings) as redis_url:
            stands_still = asyncio.run(_serve(settings, redis_url))
    if stands_still:  # Python would wait for that thread for ever
        log.error("model_stands_still")
        os._exit(1)


def worker(**flags: Any) -> None:
    """Learn until interrupted, for all adapters, from the buffer and into the store that the settings name."""
    from servetune.server.worker import SLOTS as WORKER_SLOTS
    from servetune.server.workers import Workers, yield_to_serving

    _log_to_stderr()
    yield_to_serving()
    stop = threading.Event()
    for name in STOP_SIGNALS:
        signal.signal(name, lambda *_: stop.set())
    with _plain_refusals():
        settings = Settings(**flags)
        with _mismatch_told(settings), _redis(settings) as redis_url:
            tracing.begin(settings, "worker")
            policy = load_policy(settings, WORKER_SLOTS, settings.worker_threads, stays=True)
            stores = Stores(settings, policy)
            stores.open(settings.adapter)  # what is wrong with it, the operator is to hear now
            audit = AuditLog(settings.path("audit.jsonl"))
            log.info("worker_started", model=settings.model, adapter=settings.adapter, home=str(settings.home))
            with (
                closing(QueryStream.connect(settings, redis_url, consumer=os.uname().nodename)) as stream,
                closing(Recorder.connect(redis_url)) as history,
            ):
                Workers(settings, policy, stores, stream, audit, history.record).run(stop)
            tracing.end()


def rebase(name: str | None, **flags: Any) -> Rebased:
    """Begin an adapter again on the model of the settings, while no worker learns for it."""
    _log_to_stderr()
    with _plain_refusals():
        settings = Settings(**flags)
        settings = settings.model_copy(update={"adapter": name or settings.adapter})
        with worker_lock(settings) as is_alone:
            if not is_alone():
                sys.exit(f"servetune: a worker learns for {settings.adapter}: end server and worker first")
            stores = Stores(settings, load_policy(settings, SLOTS[:1], settings.worker_threads))
            made = stores.rebase(settings.adapter)
        store = stores.at(settings.adapter)
        live = version_name(store.live().version)
        if made:
            details = {"adapter": settings.adapter, "version": live, **made.metadata}
            AuditLog(settings.path("audit.jsonl")).append("adapter_rebased", "operator", None, details)
        kept = [number for number in store.versions() if store.manifest(number).fit != store.manifest(0).fit]
        return Rebased(
            adapter=settings.adapter,
            rebased=made is not None,
            live=live,
            base_digest=store.manifest(0).base_digest,
            not_servable=[version_name(number) for number in kept],
        )


@contextmanager
def _mismatch_told(settings: Settings) -> Iterator[None]:
    """Tell the operator's address of an adapter of another base, which this process cannot start with."""
    try:
        yield
    except ForeignStore:
        tell_now(settings, "base_mismatch", {"adapters": [settings.adapter]})
        raise


async def _serve(settings: Settings, redis_url: str) -> bool:
    """Serve until told to end; whether the model did not come back from what it was doing."""
    # The loop gives up the interpreter at every read and write, and the threads of the model, of images and of the
    # buffer keep it this long each before it comes back.
    sys.setswitchinterval(SWITCH_S)
    tracing.begin(settings, "server")
    policy = await asyncio.to_thread(load_policy, settings, SLOTS, settings.serve_threads, stays=True)
    stage = Stage(policy, settings)
    lines = await asyncio.to_thread(_lines, settings, policy, stage, redis_url)
    history = History.connect(redis_url)
    access, audit = Access.from_settings(settings), AuditLog(settings.path("audit.jsonl"))
    app = create_app(settings, lines, access, audit, history)
    config = uvicorn.Config(
        app,
        http=TimelyProtocol,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=25,
    )
    beside = asyncio.create_task(_supervise_worker(settings, redis_url, history)) if settings.worker else None
    server = _Server(config, beside, history)
    announce = asyncio.create_task(_announce(server, settings))
    try:
        await server.serve()
    finally:
        for task in (announce, beside):
            if task:
                if not task.cancelling():  # the signal may have begun it: it is to end its worker in peace
                    task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
        await asyncio.to_thread(tracing.end)
    return stage.stands_still


def _lines(settings: Settings, policy: Policy, stage: Stage, redis_url: str) -> Lines:
    """The adapters of the home; those that have keys of their own are made."""
    stores = Stores(settings, policy)
    for name in sorted(set(settings.adapter_keys) - set(stores.names())):
        stores.open(name)
    return Lines(settings, stage, stores, QueryBuffer.connect(settings, redis_url))


class _Server(uvicorn.Server):
    """uvicorn that says when it listens, and returns when it is told to stop.

    The original raises the signal once more when it is done, which ends the process before the worker and the
    Valkey are stopped.
    """

    def __init__(self, config: uvicorn.Config, beside: asyncio.Task[None] | None, history: History) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()
        self._beside = beside
        self._history = history

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._beside and not self.should_exit:
            self._beside.cancel()  # now: the worker may need a while, and so may the last answers
        self._history.end()  # who follows it would be waited for
        super().handle_exit(sig, frame)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for name in STOP_SIGNALS:
            loop.add_signal_handler(name, self.handle_exit, name, None)
        try:
            yield
        finally:
            for name in STOP_SIGNALS:
                loop.remove_signal_handler(name)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


async def _announce(server: _Server, settings: Settings) -> None:
    await server.listening.wait()
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://{settings.host}:{port}"
    picture = _picture_to_try()
    print(
        f"\nservetune answers at {url} (API: {url}/docs)\n"
        f"watch it learn: {url}/\n"
        f"admin key: {settings.path('admin.key')}\n"
        f"try:\n  curl -s {url}/answer -F image=@{picture} -F 'question=What is this?'\n",
        flush=True,
    )


def _check_port(settings: Settings) -> None:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        socket.create_server((settings.host, settings.port), family=family).close()
    except OSError as error:
        where, why = f"{settings.host}:{settings.port}", os.strerror(error.errno or 0)
        raise CannotListen(f"cannot listen on {where} ({why}): choose another --port") from None


def _picture_to_try() -> str:
    return str(EXAMPLE) if EXAMPLE.exists() else "photo.png"


async def _supervise_worker(settings: Settings, redis_url: str, history: History) -> None:
    """Keep one worker running; a crash of learning is not a crash of serving."""
    # Through a pipe: everyone can read a command line, and a Redis URL may hold a password.
    flags = settings.without_secrets()
    told = json.dumps(flags | {"redis_url": redis_url}).encode()
    command = (sys.executable, "-m", "servetune.server.main", str(os.getpid()))
    pause, longest = RESTART_S
    while True:
        began = time.monotonic()
        process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE)
        try:
            await process.communicate(told)
            code = process.returncode
        except asyncio.CancelledError:
            with suppress(ProcessLookupError):
                process.terminate()
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 15)
            with suppress(ProcessLookupError):
                process.kill()
            raise
        pause = RESTART_S[0] if time.monotonic() - began > longest else min(2 * pause, longest)
        log.error("worker_ended", exit_code=code, restart_in_s=pause)
        history.record(settings.adapter, "degraded", {"error": "worker_ended", "exit_code": code})
        await asyncio.sleep(pause)


@contextmanager
def _redis(settings: Settings) -> Iterator[str]:
    """The Redis of the settings, or the embedded Valkey under the home."""
    if settings.redis_url:
        yield settings.redis_url
        return
    review_bytes = settings.review_bytes if settings.review_queries else 0
    valkey = EmbeddedValkey.start(settings.home, settings.buffer_bytes + review_bytes)
    try:
        yield valkey.url
    finally:
        valkey.stop()


@contextmanager
def _plain_refusals() -> Iterator[None]:
    """End with a sentence where the operator can act on it, not with a traceback."""
    try:
        yield
    except (
        CannotListen,
        SettingsError,
        UnsafeBind,
        UnsupportedModel,
        BadBuffer,
        StoreError,
        ValkeyError,
    ) as refusal:
        sys.exit(f"servetune: {refusal}")


def _die_with(parent: int) -> None:
    """Let the kernel end this process with `parent`, also after kill -9 (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit("the server is gone")


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft's to heed
    transformers.utils.logging.disable_progress_bar()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            tracing.add_trace_id,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )


if __name__ == "__main__":  # what the supervisor starts
    _die_with(int(sys.argv[1]))
    worker(**json.loads(sys.stdin.read()))
