"""Connections to the Redis of a URL: one server by TCP, TLS or socket, or the primary that Sentinels name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import redis
import redis.asyncio
from redis.asyncio import sentinel as async_sentinel
from redis.connection import parse_url

SENTINEL_PORT = 26379
SCHEMES = {"redis+sentinel": "redis", "rediss+sentinel": "rediss"}
Made = TypeVar("Made")


def pool(url: str, **options: Any) -> redis.BlockingConnectionPool:
    """A pool for threads; `options` are those of each connection and of the pool. Raises ValueError."""
    if _sentinels(url) is None:
        return redis.BlockingConnectionPool.from_url(url, **options)
    return _through_sentinels(url, options, redis.sentinel.Sentinel, _Pool)


def async_pool(url: str, **options: Any) -> redis.asyncio.BlockingConnectionPool:
    """A pool for an event loop; `options` are those of each connection and of the pool. Raises ValueError."""
    if _sentinels(url) is None:
        return redis.asyncio.BlockingConnectionPool.from_url(url, **options)
    return _through_sentinels(url, options, async_sentinel.Sentinel, _AsyncPool)


class _Pool(redis.sentinel.SentinelConnectionPool, redis.BlockingConnectionPool):
    """Waits for a free connection; new ones go to whom the Sentinels name, over connections of their own."""

    def disconnect(self, inuse_connections: bool = True) -> None:
        super().disconnect(inuse_connections)
        if inuse_connections:
            for sentinel in self.sentinel_manager.sentinels:
                sentinel.close()


class _AsyncPool(async_sentinel.SentinelConnectionPool, redis.asyncio.BlockingConnectionPool):
    """As `_Pool`."""

    async def disconnect(self, inuse_connections: bool = True) -> None:
        await super().disconnect(inuse_connections)
        if inuse_connections:
            for sentinel in self.sentinel_manager.sentinels:
                await sentinel.aclose()


@dataclass(frozen=True, slots=True)
class _Sentinels:
    hosts: list[tuple[str, int]]
    service: str
    url: str  # of a server, from which the options of a connection to it are read


def _through_sentinels(url: str, options: Mapping[str, Any], manager: Any, kind: Callable[..., Made]) -> Made:
    found = _sentinels(url)
    assert found
    wanted = parse_url(found.url) | dict(options)  # type: ignore[no-untyped-call]
    for name in ("host", "port", "connection_class"):
        wanted.pop(name, None)
    own = {
        name.removeprefix("sentinel_"): wanted.pop(name) for name in list(wanted) if name.startswith("sentinel_")
    }
    times = {name: value for name, value in options.items() if name.startswith("socket_")}
    encrypted = {name: value for name, value in wanted.items() if name.startswith("ssl_")}
    encrypted |= {"ssl": True} if found.url.startswith("rediss:") else {}
    sentinels = manager(found.hosts, sentinel_kwargs=times | encrypted | own)
    return kind(found.service, sentinels, **wanted | ({"ssl": True} if encrypted else {}))


def _sentinels(url: str) -> _Sentinels | None:
    """What `redis+sentinel://[user:password@]host[:port][,host[:port]...]/service[/db][?option=value]` says."""
    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES:
        return None
    parts = urlsplit(f"//{rest}")
    user, at, hosts = parts.netloc.rpartition("@")
    service, _, database = parts.path.strip("/").partition("/")
    if not hosts or not service:
        raise ValueError(f"{scheme}:// needs hosts and a service: {scheme}://host1:26379,host2:26379/mymaster")
    query = f"?{parts.query}" if parts.query else ""
    server = f"{SCHEMES[scheme]}://{user}{at}primary/{database}{query}"
    return _Sentinels([_host(each) for each in hosts.split(",")], unquote(service), server)


def _host(text: str) -> tuple[str, int]:
    name, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        return text.strip("[]"), SENTINEL_PORT
    if not port.isdigit():
        raise ValueError(f"{port!r} is not a port")
    return name.strip("[]"), int(port)
