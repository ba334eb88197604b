"""Images by address, for operators who list the hosts they trust.

The host is resolved once, every address must be public, and the address that was checked is the one dialled;
the certificate is still checked for the host. No redirects, no proxies, and one answer to every refusal, so
that nothing about the network behind the server can be asked.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv6Address, ip_address, ip_network
from urllib.parse import urlsplit

import httpx2

from servetune.server.errors import ServiceError

TIMEOUT_S = 5.0
_PLAIN_URL = re.compile(r"https://[!-~]{1,4000}", re.IGNORECASE)
# `is_global` of Python 3.11 calls all of these public: see CVE-2024-4032 and the two NAT64 prefixes.
_NEVER = tuple(
    ip_network(network)
    for network in (
        "192.0.0.0/24",
        "192.88.99.0/24",
        "100.64.0.0/10",
        "::/96",
        "::ffff:0:0/96",
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "2001::/23",
        "2002::/16",
    )
)

Resolve = Callable[[str], Awaitable[Sequence[str]]]


class ImageFetcher:
    """Reads images from the listed hosts; with none listed it refuses everything."""

    def __init__(
        self,
        hosts: Sequence[str],
        max_bytes: int,
        resolve: Resolve | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._hosts = frozenset(host.lower() for host in hosts)
        self._max_bytes = max_bytes
        self._resolve = resolve or _resolve
        self._transport = transport

    async def fetch(self, url: str) -> bytes:
        """The bytes at an address. Raises ServiceError `image_url_disabled` or `image_url_refused`."""
        if not self._hosts:
            raise ServiceError("image_url_disabled", "Send the image itself: addresses are switched off.")
        try:
            host = self._checked_host(url)
            async with asyncio.timeout(TIMEOUT_S):
                return await self._download(url, host, await self._checked_address(host))
        except (ValueError, OSError, TimeoutError, httpx2.HTTPError, httpx2.InvalidURL):
            raise ServiceError("image_url_refused", "The image could not be read from there.") from None

    def _checked_host(self, url: str) -> str:
        if not _PLAIN_URL.fullmatch(url) or "\\" in url:  # URL parsers disagree about what this leaves out
            raise ValueError
        parts = urlsplit(url)
        host = parts.hostname or ""
        if "@" in parts.netloc or parts.port not in (None, 443) or host not in self._hosts:
            raise ValueError
        return host

    async def _checked_address(self, host: str) -> str:
        addresses = await self._resolve(host)
        if not addresses or not all(is_public(address) for address in addresses):
            raise ValueError
        return addresses[0]

    async def _download(self, url: str, host: str, address: str) -> bytes:
        content = bytearray()
        dialled = httpx2.URL(url).copy_with(host=address, port=None, fragment=None)
        async with (
            httpx2.AsyncClient(transport=self._transport, trust_env=False, follow_redirects=False) as client,
            client.stream(
                "GET",
                dialled,
                headers={"Host": host, "Accept-Encoding": "identity"},
                extensions={"sni_hostname": host},  # also the name that the certificate is checked for
            ) as response,
        ):
            if response.status_code != 200:
                raise ValueError
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > self._max_bytes:
                    raise ValueError
        return bytes(content)


def is_public(address: str) -> bool:
    """May this address be dialled? Only unicast addresses of the open internet, no tunnels into other ranges."""
    ip = ip_address(address)
    if isinstance(ip, IPv6Address) and ip.scope_id is not None:
        return False
    tunnelled = any(ip in network for network in _NEVER if network.version == ip.version)
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and not tunnelled


async def _resolve(host: str) -> list[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, 443, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return [str(entry[4][0]) for entry in found]
