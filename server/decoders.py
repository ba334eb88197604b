"""Child processes that decode images: a file that breaks or stalls a decoder takes only a child with it.

Nothing that a child says is trusted: its reply is one line of a few known words, and pixels are plain bytes.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import queue
import socket
import subprocess
import tempfile
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import structlog
from PIL import Image

from servetune.server.decoding import CHANNELS, REASONS, Limits, Refused, command

NUM_CHILDREN = 2  # a 50 Mpx image takes 150 MB and more while it is decoded
TIMEOUT_S = 10.0  # of one image; the largest one that is taken needs about 2
LONGEST_REPLY = 64
PIXEL = bytes.fromhex(  # a PNG of 1 x 1
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c636000000002000148afa4710000000049454e44ae426082"
)

log = structlog.get_logger()


class Decoders:
    """A few children, started when they are needed and again when one has died.

    Args:
        max_file_bytes: of one file, base64 included.
        timeout_s: after which a child is killed and its file called damaged.
    """

    def __init__(self, limits: Limits, max_file_bytes: int, timeout_s: float = TIMEOUT_S) -> None:
        self._threads = ThreadPoolExecutor(NUM_CHILDREN, thread_name_prefix="decode")  # one waits for each child
        self._free: queue.LifoQueue[_Child] = queue.LifoQueue()  # the same child while one is enough
        for _ in range(NUM_CHILDREN):
            self._free.put(_Child(limits, max_file_bytes, timeout_s))

    def start(self) -> None:
        """Start the children now, and not with the first images.

        Raises:
            RuntimeError: they do not decode an image.
        """
        for child in self._free.queue:
            try:
                child.decode(PIXEL)
            except Refused:
                raise RuntimeError("images cannot be decoded: the decoder does not start") from None

    async def decode(self, data: bytes | str) -> Image.Image:
        """The RGB image of a file, or of its base64 text.

        Raises:
            Refused: see `decoding.decode`; "damaged" also where the decoder died of it or was too slow.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._decode, data)

    def _decode(self, data: bytes | str) -> Image.Image:
        child = self._free.get()
        try:
            return child.decode(data)
        finally:
            self._free.put(child)

    def close(self) -> None:
        """Take no more; what is being decoded is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class _Child:
    """One process, and the memory that it shares with this one. Both end with this object."""

    def __init__(self, limits: Limits, max_file_bytes: int, timeout_s: float) -> None:
        self._limits = limits
        self._timeout_s = timeout_s
        self._size = max(max_file_bytes, limits.decoded_side**2 * CHANNELS)
        self._file = _memory_file(self._size)
        self._memory = mmap.mmap(self._file, self._size)
        self._ended: Callable[[], Any] | None = None  # ends the process that runs
        weakref.finalize(self, os.close, self._file)

    def decode(self, data: bytes | str) -> Image.Image:
        kind, content = ("text", data.encode("ascii", "replace")) if isinstance(data, str) else ("bytes", data)
        if len(content) > self._size:
            raise Refused("too_large")
        self._memory[: len(content)] = content
        match self._ask(f"{kind} {len(content)}\n".encode()).split():
            case ["ok", width, height] if self._fits(width) and self._fits(height):
                size = int(width), int(height)
                return Image.frombytes("RGB", size, self._memory[: size[0] * size[1] * CHANNELS])
            case [reason] if reason in REASONS:
                raise Refused(reason)
        self._end()
        raise Refused("damaged")

    def _ask(self, request: bytes) -> str:
        """The child's reply; none when it died or was too slow."""
        try:
            child = self._started()
            child.sendall(request)
            return child.recv(LONGEST_REPLY).decode("ascii", "replace")
        except OSError:  # a timeout is one
            return ""

    def _fits(self, side: str) -> bool:
        return side.isdigit() and 0 < int(side) <= self._limits.decoded_side

    def _started(self) -> socket.socket:
        if self._ended is None:
            ours, theirs = socket.socketpair()
            ours.settimeout(self._timeout_s)
            process = subprocess.Popen(
                command(self._file, self._size, self._limits),
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                pass_fds=(self._file,),
                env={},  # the operator's keys are none of its business
            )
            theirs.close()
            self._socket, self.pid = ours, process.pid
            self._ended = weakref.finalize(self, _end, process, ours)
        return self._socket

    def _end(self) -> None:
        if self._ended:
            log.warning("decoder_lost", exit_code=self._ended())
            self._ended = None


def _end(process: subprocess.Popen[bytes], ours: socket.socket) -> int:
    ours.close()
    process.kill()
    return process.wait()


def _memory_file(size: int) -> int:
    """An open file that is nowhere on disk, where the system has such."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("servetune-decode")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.truncate(file, size)
    return file
