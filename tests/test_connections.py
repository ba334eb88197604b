"""Redis as operators run it: over TLS, with an ACL, and behind Sentinels that move the primary."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from servetune.server import connections
from servetune.server.buffer import BadBuffer, BufferUnavailable, QueryBuffer, Skipped
from servetune.server.history import History
from servetune.server.settings import Settings, resolved, without_password
from tests.redis_servers import binary, eventually, make_query, open_buffer, open_stream

COMMANDS = "+@connection +@read +@write +@scripting -@dangerous +time +config|get +bgrewriteaof"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextmanager
def redis_server(folder: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(binary("redis-server")), *options, "--dir", str(folder), "--save", ""]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def answers(url: str, **options: object) -> bool:
    with suppress(redis.RedisError), redis.Redis(connection_pool=connections.pool(url, **options)) as client:
        return bool(client.ping())
    return False


async def is_used(settings: Settings, url: str, first: int = 0) -> None:
    """A query goes in and out, and an event."""
    async with open_buffer(settings, url) as buffer:
        await buffer.put(make_query(first), "ann")
        with open_stream(settings, url) as stream:
            (delivery,) = stream.take(8, 1.0)
            assert delivery.query.id == f"q_{first}"
            assert stream.settle([delivery], "trained") == 1
    history = History.connect(url)
    await history._record("default", "swap", {"version": f"v{first}"})
    assert [event.data["version"] for event in await history.read("default")][-1] == f"v{first}"
    await history.close()


def certificate(folder: Path) -> tuple[Path, Path]:
    """Of 127.0.0.1, signed by itself: the file that vouches for it, and that of its key."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = (
        made.serial_number(1).not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
    )
    made = made.add_extension(
        x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False
    )
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    files = folder / "server.crt", folder / "server.key"
    files[0].write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return files


async def test_over_tls_with_a_user_of_its_own(tmp_path: Path) -> None:
    """The server is known by its certificate, and the user may do what servetune does and nothing else."""
    (vouches, key), port = certificate(tmp_path), free_port()
    options = [
        "--port",
        "0",
        "--tls-port",
        str(port),
        "--tls-auth-clients",
        "no",
        "--tls-ca-cert-file",
        str(vouches),
    ]
    options += ["--tls-cert-file", str(vouches), "--tls-key-file", str(key)]
    acl = [
        "--user",
        "servetune",
        "on",
        ">pass:word",
        "~servetune:*",
        *COMMANDS.split(),
        "--user",
        "default",
        "off",
    ]
    url = f"rediss://servetune:pass%3Aword@127.0.0.1:{port}/0?ssl_ca_certs={vouches}"  # pragma: allowlist secret
    with redis_server(tmp_path / "redis", *options, *acl):
        eventually(lambda: answers(url))
        assert not answers(url.replace("pass%3Aword", "wrong"))
        assert not answers(url.partition("?")[0]), "who vouches for it?"
        await is_used(Settings(home=tmp_path), url)
        with redis.Redis(connection_pool=connections.pool(url)) as client:
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.get("somebody else's")
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.flushall()


SENTINEL = """port {port}
sentinel monitor main 127.0.0.1 {primary} 1
sentinel auth-pass main secret
sentinel down-after-milliseconds main 300
sentinel failover-timeout main 2000
requirepass guard
"""


async def test_sentinels_name_the_primary_and_its_successor(tmp_path: Path) -> None:
    """The primary dies: the same buffer goes on with the replica, which has what it acknowledged."""
    primary, replica, watcher = (free_port() for _ in range(3))
    known = ["--requirepass", "secret", "--masterauth", "secret"]
    (tmp_path / "sentinel.conf").write_text(SENTINEL.format(port=watcher, primary=primary))
    url = f"redis+sentinel://:secret@127.0.0.1:{watcher},127.0.0.1:1/main/0?sentinel_password=guard"
    settings = Settings(home=tmp_path / "home")
    with ExitStack() as stack:
        first = stack.enter_context(redis_server(tmp_path / "a", "--port", str(primary), *known))
        follows = ["--replicaof", "127.0.0.1", str(primary)]
        stack.enter_context(redis_server(tmp_path / "b", "--port", str(replica), *known, *follows))
        stack.enter_context(redis_server(tmp_path / "c", str(tmp_path / "sentinel.conf"), "--sentinel"))
        eventually(lambda: answers(url), 20)
        second = f"redis://:secret@127.0.0.1:{replica}"
        with (
            redis.Redis.from_url(second) as client,
            redis.Redis.from_url(f"redis://:guard@127.0.0.1:{watcher}") as sentinel,
        ):
            await is_used(settings, url)
            eventually(lambda: client.info("replication")["master_link_status"] == "up", 20)
            eventually(lambda: bool(sentinel.execute_command("SENTINEL", "REPLICAS", "main")), 20)
            async with open_buffer(settings, url) as buffer:
                await buffer.put(make_query(1), "ann")
                eventually(lambda: client.exists("servetune:{default}:blob:q_1") == 1)
                first.kill()
                eventually(lambda: client.role()[0] == b"master", 30)
                await stored_again(buffer)
                with open_stream(settings, url) as stream:
                    assert [delivery.query.id for delivery in stream.take(8, 1.0)] == ["q_1", "q_2"]


async def stored_again(buffer: QueryBuffer) -> None:
    """Put until the successor is found; the buffer waits between attempts, as it does for any Redis."""
    async with asyncio.timeout(30):
        while True:
            with suppress(Skipped, BufferUnavailable):
                await buffer.put(make_query(2), "ann")
                return
            await asyncio.sleep(0.1)


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("redis+sentinel://host1,host2", "needs hosts and a service"),
        ("redis+sentinel:///main", "needs hosts and a service"),
        ("rediss+sentinel://host:here/main", "'here' is not a port"),
        ("http://host", "scheme"),
    ],
)
def test_a_url_that_cannot_be_used_says_why(tmp_path: Path, url: str, complaint: str) -> None:
    with pytest.raises(BadBuffer, match=complaint):
        QueryBuffer.connect(Settings(home=tmp_path), url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host:1/0", "redis://host:1/0"),
        ("rediss://ann:s3@cret@host/0", "rediss://ann:***@host/0"),  # pragma: allowlist secret
        (
            "redis+sentinel://:secret@a,b/main?sentinel_password=guard",
            "redis+sentinel://:***@a,b/main?sentinel_password=***",
        ),
        ("unix:///run/redis.sock?password=secret", "unix:///run/redis.sock?password=***"),
        ("redis://host?db=1&password=p%40ss%2Fw&x=1", "redis://host?db=1&password=***&x=1"),
    ],
)
def test_a_password_is_not_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown
    assert next(each.value for each in resolved(redis_url=url) if each.setting == "redis_url") == shown
