"""A request's head is due in time; whoever sends theirs whole is not touched, on a connection kept open too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn

from servetune.server import protocol
from servetune.server.protocol import TimelyProtocol

HEAD_S = 0.3
REQUEST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
async def port(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    monkeypatch.setattr(protocol, "HEAD_S", HEAD_S)
    config = uvicorn.Config(app, http=TimelyProtocol, port=0, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving


async def test_a_head_that_trickles_is_cut(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began = asyncio.get_running_loop().time()
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n")
    reading = asyncio.create_task(reader.read())
    while not reading.done():
        writer.write(b"X-More: y\r\n")
        await asyncio.sleep(0.05)
    assert HEAD_S <= asyncio.get_running_loop().time() - began < 10 * HEAD_S
    writer.close()


async def test_a_connection_that_says_nothing_is_cut(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    assert await asyncio.wait_for(reader.read(), 10 * HEAD_S) == b""
    writer.close()


async def test_a_slow_body_and_a_second_request_are_left_alone(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(2):
        writer.write(REQUEST)
        await asyncio.sleep(1.5 * HEAD_S)
        writer.write(b"hi")
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert head.startswith(b"HTTP/1.1 200")
        assert await reader.readexactly(2) == b"ok"
    writer.write(REQUEST[:20])
    assert await asyncio.wait_for(reader.read(), 10 * HEAD_S) == b""
    writer.close()
