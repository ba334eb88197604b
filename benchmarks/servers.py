"""Servers of one checkpoint on the loopback interface: ours, a plain one, transformers' own, and vLLM."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx2

from benchmarks import envs

PATIENCE_S = 300.0


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: where it answers, what it writes, and how it is asked with at most so many tokens."""

    name: str
    url: str
    pid: int
    log: Path
    ask: Callable[[str, str, int], Mapping[str, Any]]  # data URI, question, tokens -> JSON body


def _native(image: str, question: str, tokens: int) -> dict[str, Any]:
    return {"image": image, "question": question, "max_tokens": tokens, "adapt": False}


def _chat(image: str, question: str, tokens: int, model: str = "model") -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question}]
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0.0,
    }


@contextmanager
def running(
    name: str,
    checkpoint: Path,
    threads: int,
    home: Path | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
    **settings: object,
) -> Iterator[Server]:
    """Start `ours`, `plain`, `transformers` or `vllm` on a free port, and end it afterwards.

    Args:
        environment: variables of the process.
        home, settings: of our own server, which has no worker unless they say so.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", **environment}
        if name == "ours":
            command = [_script("servetune"), "serve", str(checkpoint), "--port", str(port)]
            chosen = {"home": home or folder, "serve_threads": threads, "worker": False} | settings
            env |= {f"SERVETUNE_{key.upper()}": str(value) for key, value in chosen.items()}
            url, ready, ask = f"{root}/answer", f"{root}/readyz", _native
        elif name == "plain":
            script = Path(__file__).parent / "peers" / "plain_server.py"
            command = [sys.executable, str(script), str(checkpoint), str(port), str(threads)]
            url, ready, ask = f"{root}/answer", f"{root}/ready", _native
        elif name == "transformers":
            serve = envs.python("transformers").with_name("transformers")
            flags = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--device", "cpu"]
            command = [str(serve), "serve", str(checkpoint), *flags]
            url, ready = f"{root}/v1/chat/completions", f"{root}/health"
            ask = partial(_chat, model=str(checkpoint))
        else:
            command = [str(envs.python("vllm")), "-m", "vllm.entrypoints.openai.api_server"]
            command += _vllm(checkpoint, port)
            env |= {
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            }
            url, ready, ask = f"{root}/v1/chat/completions", f"{root}/health", _chat
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)
        signal.signal(
            signal.SIGTERM, lambda *_: sys.exit(143)
        )  # a benchmark that is ended leaves no server behind
        try:
            _wait(ready, process, log)
            yield Server(name, url, process.pid, log, ask)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()


async def adaptation(server: Server, home: Path) -> Any:
    """What one of our servers says about its learning."""
    key = (home / "admin.key").read_text().strip()
    async with httpx2.AsyncClient(headers={"Authorization": f"Bearer {key}"}) as http:
        reply = await http.get(server.url.replace("/answer", "/v1/adaptation"))
        return reply.raise_for_status().json()


async def num_steps(server: Server, home: Path) -> int:
    """How many steps the worker of one of our servers has made."""
    return int((await adaptation(server, home))["worker"]["steps"])


def processes(server: int) -> dict[str, list[int]]:
    """The processes of one of our servers: `server`, its `worker` and its `helpers`."""
    found: dict[str, list[int]] = {"server": [server], "worker": [], "helpers": []}
    for pid in _descendants(server):
        found["worker" if "servetune.server.main" in _command(pid) else "helpers"].append(pid)
    return found


def resident_mb(pid: int) -> float:
    """Memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _descendants(parent: int) -> Iterator[int]:
    for tasks in Path(f"/proc/{parent}/task").glob("*/children"):
        for pid in map(int, tasks.read_text().split()):
            yield pid
            yield from _descendants(pid)


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def _script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _vllm(checkpoint: Path, port: int) -> list[str]:
    chosen = {
        "model": checkpoint,
        "host": "127.0.0.1",
        "port": port,
        "served-model-name": "model",
        "dtype": "float32",
        "max-model-len": 1024,
        "block-size": 32,
        "max-num-seqs": 64,
        "max-num-batched-tokens": 4096,
        "limit-mm-per-prompt": '{"image": 1}',
    }
    flags = [text for name, value in chosen.items() for text in (f"--{name}", str(value))]
    return [*flags, "--enforce-eager", "--enable-prefix-caching"]


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise RuntimeError(f"{url} did not come up:\n{log.read_text()[-3000:]}")
