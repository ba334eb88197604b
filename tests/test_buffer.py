"""One contract for the buffer, on every server it runs on: real processes, really killed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import structlog
from PIL import Image

from servetune.adapters.types import Query
from servetune.clients.types import WorkerStatus
from servetune.server.buffer import BufferUnavailable, Delivery, QueryBuffer, QueryStream, Skipped
from servetune.server.cipher import LOSSLESS_PIXELS, Cipher, Unreadable, load_key
from servetune.server.settings import Settings
from servetune.server.valkey import EmbeddedValkey
from tests.redis_servers import SERVERS, make_query, open_buffer, open_stream, running

LEASE_S = 1.1
PERMANENT = {"queries", "ledger", "clients", "bytes", "key"}
OUT = ("trained", "no_signal", "rejected", "dead", "expired", "withdrawn")
adapters = (f"test{number}" for number in range(10_000))


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    with running(tmp_path_factory.mktemp("home"), request.param) as server:
        yield server


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, adapter=next(adapters), lease_s=LEASE_S, buffer_queries=8)


@pytest.fixture
def stream(server: EmbeddedValkey, settings: Settings) -> Iterator[QueryStream]:
    with open_stream(settings, server.url) as stream:
        yield stream


async def reason(buffer: QueryBuffer, query: Query, client: str = "ann") -> str | None:
    """Why the buffer refuses the query; None if it stored it."""
    try:
        await buffer.put(query, client)
    except Skipped as skipped:
        return skipped.reason
    return None


async def fill(buffer: QueryBuffer, count: int, start: int = 0) -> None:
    for number in range(start, start + count):
        await buffer.put(make_query(number), "ann")


def ids(deliveries: list[Delivery]) -> list[str]:
    return [delivery.query.id for delivery in deliveries]


async def counts(buffer: QueryBuffer) -> dict[str, int]:
    """The ledger's non-zero columns, after checking that it balances."""
    status = await buffer.status()
    assert status.connected
    left = sum(status.ledger[name] for name in OUT) + status.waiting + status.pending
    assert status.ledger["acked"] == left
    return {name: count for name, count in status.ledger.items() if count}


# --- storing -----------------------------------------------------------------------------------------


async def test_a_query_comes_out_as_it_went_in(
    server: EmbeddedValkey, settings: Settings, stream: QueryStream
) -> None:
    noise = Image.effect_noise((31, 17), 80).convert("RGB")
    query = Query("q_1", (noise, noise.rotate(90)), "was ist das, ühm?", ("a cat", "a dog"))
    async with open_buffer(settings, server.url) as buffer:
        await buffer.put(query, "ann")
        (delivery,) = stream.take(8, 1.0)
        assert (delivery.query.id, delivery.query.question) == (query.id, query.question)
        assert delivery.query.labels == query.labels
        assert [image.tobytes() for image in delivery.query.images] == [i.tobytes() for i in query.images]
        assert delivery.deliveries == 1
        assert (await buffer.status()).bytes > 0
        assert stream.settle([delivery], "trained") == 1
        assert await counts(buffer) == {"acked": 1, "trained": 1}
        assert (await buffer.status()).bytes == 0


async def test_a_full_buffer_refuses_and_drops_nothing(
    server: EmbeddedValkey, settings: Settings, stream: QueryStream
) -> None:
    async with open_buffer(settings, server.url) as buffer:
        await fill(buffer, 8)
        assert await reason(buffer, make_query(8)) == "buffer_full"
        assert ids(stream.take(100, 1.0)) == [f"q_{number}" for number in range(8)]
        assert await reason(buffer, make_query(8)) == "buffer_full", "taken is not yet learned"
        assert await counts(buffer) == {"acked": 8}


async def test_bytes_are_limited_too(server: EmbeddedValkey, settings: Settings) -> None:
    async with open_buffer(settings.model_copy(update={"buffer_bytes": 300}), server.url) as buffer:
        assert await reason(buffer, make_query(0)) is None
        assert await reason(buffer, make_query(1)) == "buffer_full"


async def test_an_equal_query_is_kept_once(
    server: EmbeddedValkey, settings: Settings, stream: QueryStream
) -> None:
    async with open_buffer(settings, server.url) as buffer:
        first = make_query(1)
        again = Query("q_again", first.images, first.question)
        await buffer.put(first, "ann")
        assert await reason(buffer, again, "ann") == "duplicate"
        assert await reason(buffer, Query("q_other", first.images, "and this?")) is None
        assert await reason(buffer, Query("q_labels", first.images, first.question, ("a", "b"))) is None
        stream.settle(stream.take(8, 1.0), "trained")
        assert await reason(buffer, again, "ann") == "duplicate", "learned from once is enough"


async def test_nobody_is_told_what_another_client_has_asked(server: EmbeddedValkey, settings: Settings) -> None:
    async with open_buffer(settings, server.url) as buffer:
        first = make_query(1)
        await buffer.put(first, "ann")
        assert await reason(buffer, Query("q_same", first.images, first.question), "bob") is None
        assert await buffer.withdraw(first.id)
        assert await reason(buffer, Query("q_again", first.images, first.question), "bob") == "duplicate"


async def test_one_client_cannot_crowd_out_the_others(server: EmbeddedValkey, settings: Settings) -> None:
    async with open_buffer(settings, server.url) as buffer:
        await fill(buffer, 5)  # alone, ann may use more than her half
        assert await reason(buffer, make_query(10), "bob") is None
        assert await reason(buffer, make_query(11), "ann") == "client_share"
        assert await reason(buffer, make_query(12), "bob") is None
        assert await buffer.withdraw("q_10")
        assert await buffer.withdraw("q_12")
        assert await reason(buffer, make_query(13), "ann") is None, "alone again"


async def test_every_client_has_an_equal_part_of_a_batch(
    server: EmbeddedValkey, settings: Settings, stream: QueryStream
) -> None:
    """However much earlier and more one of them sends; within a client the oldest comes first."""
    settings = settings.model_copy(update={"buffer_queries": 100})
    async with open_buffer(settings, server.url) as buffer:
        for number in range(20):
            await buffer.put(make_query(number), "mallory")
        for number in range(20, 26):
            await buffer.put(make_query(number), ("ann", "bob", "eve")[number % 3])
        first, second, third = (ids(stream.take(4, 1.0)) for _ in range(3))
        assert set(first) == {"q_0", "q_20", "q_21", "q_22"}
        assert set(second) == {"q_1", "q_23", "q_24", "q_25"}
        assert third == ["q_2", "q_3", "q_4", "q_5"], "where the others have none"
        status = await buffer.status()
        assert (status.waiting, status.pending) == (14, 12)


async def test_who_sends_most_has_none_of_what_is_left_over(
    server: EmbeddedValkey, settings: Settings, stream: QueryStream
) -> None:
    settings = settings.model_copy(update={"buffer_queries": 100})
    async with open_buffer(settings, server.url) as buffer:
        for number in range(20):
            await buffer.put(make_query(number), "mallory")
        for number in range(20, 30):
            await buffer.put(make_query(number), ("ann", "bob")[number % 2])
        taken = ids(stream.take(8, 1.0))
        assert sum(int(name[2:]) < 20 for name in taken) == 2


async def test_what_an_earlier_version_stored_is_taken_up(
    server: EmbeddedValkey, settings: Settings, stream: QueryStream
) -> None:
    """Entries that no client is known to wait for, some of them under lease."""
    async with open_buffer(settings, server.url) as buffer:
        await fill(buffer, 5)
        held = ids(stream.take(2, 1.0))
        with redis.Redis.from_url(server.url) as client:
            prefix = f"servetune:{{{settings.adapter}}}:"
            client.delete(*client.scan_iter(f"{prefix}waiting:*"))
        assert stream.take(8, 0.0) == []
    async with open_buffer(settings, server.url) as buffer:
        await counts(buffer)
        assert held == ["q_0", "q_1"]
        assert ids(stream.take(8, 0.0)) == ["q_2", "q_3", "q_4"]


async def test_withdrawn_queries_are_not_learned_and_may_come_back(
    server: EmbeddedValkey, settings: Settings, stream: QueryStream
) -> None:
    async with open_buffer(settings, server.url) as buffer:
        await fill(buffer, 3)
        taken = stream.take(1, 1.0)
        assert await buffer.withdraw("q_0"), "also from a worker that holds it"
        assert await buffer.withdraw("q_1")
        assert not await buffer.withdraw("q_1")
        assert stream.renew(taken) == []
        assert stream.settle(taken, "trained") == 0
        assert ids(stream.take(8, 1.0)) == ["q_2"]
        assert await counts(buffer) == {"acked": 3, "withdrawn": 2}
        assert await reason(buffer, make_query(1)) is None


async def test_purge_withdraws_whatever_is_not_settled(
    server: EmbeddedValkey, settings: Settings, stream: QueryStream
) -> None:
    async with open_buffer(settings, server.url) as buffer:
        await fill(buffer, 5)
        stream.settle(stream.take(1, 1.0), "no_signal")
        stream.take(1, 1.0)
        assert await buffer.purge() == 4
        assert await counts(buffer) == {"acked": 5, "no_signal": 1, "withdrawn": 4}
        assert (await buffer.status()).bytes == 0


# --- leases ------------------------------------------------------------------------------------------


async def test_a_lease_is_taken_over_only_after_it_ran_out(
    server: EmbeddedValkey, settings: Settings, stream: QueryStream
) -> None:
    async with open_buffer(settings, server.url) as buffer:
        await fill(buffer, 1)
        taken = stream.take(1, 1.0)
        with open_stream(settings, server.url) as thief:
            for _ in range(4):
                time.sleep(LEASE_S / 2)
                assert stream.renew(taken) == taken
                assert thief.take(1, 0.0) == []
            time.sleep(LEASE_S * 1.1)
            (stolen,) = thief.take(1, 0.0)
            assert (stolen.query.id, stolen.deliveries) == ("q_0", 2)
            assert stream.renew(taken) == [], "the first holder learns that it lost the query"
            assert thief.renew([stolen]) == [stolen]
            assert thief.settle([stolen], "trained") == 1
            assert stream.settle(taken, "trained") == 0
        assert await counts(buffer) == {"acked": 1, "trained": 1}


async def test_released_work_is_free_at_once_and_counts_only_if_it_failed(
    server: EmbeddedValkey, settings: Settings, stream: QueryStream
) -> None:
    async with open_buffer(settings, server.url) as buffer:
        await fill(buffer, 1)
        for _ in range(settings.max_deliveries + 1):
            (delivery,) = stream.take(1, 1.0)
            assert delivery.deliveries == 1
            stream.release([delivery])
        for number in range(settings.max_deliveries):
            (delivery,) = stream.take(1, 0.0)
            assert delivery.deliveries == number + 1
            stream.release([delivery], failed=True)
        assert stream.take(1, 0.0) == []
        assert await counts(buffer) == {"acked": 1, "dead": 1}


async def test_poison_is_set_aside_and_takes_no_other_query_with_it(
    server: EmbeddedValkey, settings: Settings
) -> None:
    async with open_buffer(settings, server.url) as buffer:
        await fill(buffer, 8)
        for _ in range(20):
            with open_stream(settings, server.url) as worker:
                while taken := worker.take(4, 0.0) + worker.take(4, 0.0):
                    if "q_3" in ids(taken):
                        worker.release(taken, failed=True)  # as if the lease of a killed worker ran out
                        break
                    worker.settle(taken, "trained")
        assert await counts(buffer) == {"acked": 8, "trained": 7, "dead": 1}
        assert (await buffer.status()).dead == 1


async def test_expired_queries_are_counted_and_not_delivered(server: EmbeddedValkey, settings: Settings) -> None:
    settings = settings.model_copy(update={"buffer_ttl_s": 1})
    async with open_buffer(settings, server.url) as buffer:
        await fill(buffer, 8)
        with open_stream(settings, server.url) as stream:
            stream.take(2, 1.0)
            await asyncio.sleep(1.1)
            assert await reason(buffer, make_query(9)) is None, "they no longer fill the buffer"
            assert ids(stream.take(8, 0.0)) == ["q_9"]
        assert await counts(buffer) == {"acked": 9, "expired": 8}


async def test_what_cannot_be_read_is_set_aside(server: EmbeddedValkey, settings: Settings) -> None:
    async with open_buffer(settings, server.url) as buffer:
        await fill(buffer, 2)
        with redis.Redis.from_url(server.url) as client:
            client.hset(f"servetune:{{{settings.adapter}}}:blob:q_0", "sealed", b"x" * 100)
        with open_stream(settings, server.url) as stream:
            assert ids(stream.take(8, 1.0)) == ["q_1"]
        assert await counts(buffer) == {"acked": 2, "dead": 1}


async def test_a_worker_with_another_key_gives_nothing_up(
    server: EmbeddedValkey, settings: Settings, tmp_path: Path
) -> None:
    async with open_buffer(settings, server.url) as buffer:
        await fill(buffer, 1)
        stranger = settings.model_copy(update={"home": tmp_path / "elsewhere"})
        with (
            open_stream(stranger, server.url) as stream,
            pytest.raises(BufferUnavailable, match="SERVETUNE_BUFFER_KEY"),
        ):
            stream.take(1, 0.0)
        assert await counts(buffer) == {"acked": 1}


def test_taking_from_an_empty_buffer_waits_as_long_as_told(stream: QueryStream) -> None:
    began = time.monotonic()
    assert stream.take(1, 0.3) == []
    assert 0.25 < time.monotonic() - began < 1.0


def test_an_unknown_outcome_is_a_mistake(stream: QueryStream) -> None:
    with pytest.raises(ValueError, match="outcome"):
        stream.settle([], "acked")


# --- books and heartbeat -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
async def test_the_ledger_balances_after_anything(
    server: EmbeddedValkey, settings: Settings, stream: QueryStream, seed: int
) -> None:
    dice = random.Random(seed)
    held: list[Delivery] = []
    stored = 0
    async with open_buffer(settings, server.url) as buffer:
        for number in range(150):
            match dice.choice(("put", "put", "put", "take", "settle", "release", "withdraw", "purge")):
                case "put":
                    stored += await reason(buffer, make_query(number // 2), dice.choice("ab")) is None
                case "take":
                    held += stream.take(dice.randint(1, 4), 0.0)
                case "settle":
                    stream.settle(dice.sample(held, len(held) // 2), dice.choice(("trained", "no_signal")))
                case "release":
                    stream.release(dice.sample(held, len(held) // 2), failed=dice.random() < 0.7)
                case "withdraw":
                    await buffer.withdraw(f"q_{dice.randrange(number + 1)}")
                case "purge" if dice.random() < 0.2:
                    await buffer.purge()
            assert (await counts(buffer)).get("acked", 0) == stored
        await buffer.purge()
        status = await buffer.status()
        assert (status.waiting, status.pending, status.bytes) == (0, 0, 0)


async def test_nothing_but_the_named_keys_lives_forever(
    server: EmbeddedValkey, settings: Settings, stream: QueryStream
) -> None:
    async with open_buffer(settings, server.url) as buffer:
        await fill(buffer, 6)
        stream.settle(stream.take(1, 1.0), "trained")
        for _ in range(settings.max_deliveries + 1):
            stream.release(stream.take(1, 0.0), failed=True)
        stream.report(WorkerStatus(state="idle"))
        await buffer.withdraw("q_5")
        with redis.Redis.from_url(server.url) as client:
            prefix = f"servetune:{{{settings.adapter}}}:"
            keys = {key.decode(): client.ttl(key) for key in client.scan_iter(f"{prefix}*")}
        forever = {key.removeprefix(prefix) for key, ttl in keys.items() if ttl < 0}
        assert forever == PERMANENT
        assert {f"{prefix}worker", f"{prefix}dead"} < keys.keys()


async def test_a_silent_worker_is_absent(server: EmbeddedValkey, settings: Settings, stream: QueryStream) -> None:
    async with open_buffer(settings, server.url) as buffer:
        assert (await buffer.read_worker()).state == "absent"
        stream.report(WorkerStatus(state="learning", steps=3))
        assert await buffer.read_worker() == WorkerStatus(state="learning", steps=3)
        await asyncio.sleep(LEASE_S * 1.1)
        assert (await buffer.read_worker()).state == "absent"


def test_a_worker_that_leaves_is_forgotten_unless_it_holds_work(
    server: EmbeddedValkey, settings: Settings
) -> None:
    for _ in range(3):
        with open_stream(settings, server.url) as stream:
            stream.take(1, 0.0)
    with redis.Redis.from_url(server.url) as client:
        assert client.xinfo_consumers(f"servetune:{{{settings.adapter}}}:queries", "workers") == []


# --- privacy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVERS)
async def test_nothing_readable_reaches_the_disk(tmp_path: Path, name: str) -> None:
    settings = Settings(home=tmp_path)
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    with running(tmp_path, name) as server:
        async with open_buffer(settings, server.url) as buffer:
            query = Query("q_1", (image,), "Is this Mrs Dalloway?", ("Clarissa", "Septimus"))
            await buffer.put(query, "ann@example.org")
    disk = b"".join(path.read_bytes() for path in (tmp_path / "valkey").rglob("*") if path.is_file())
    assert b"q_1" in disk
    for secret in (b"Dalloway", b"Clarissa", b"ann@", b"PNG", b"IHDR", image.tobytes()[:64]):
        assert secret not in disk


def test_metadata_is_left_out_and_damage_is_noticed() -> None:
    cipher = Cipher(bytes(32))
    image = Image.new("RGB", (8, 8))
    image.info = {"icc_profile": b"profile", "exif": b"Exif home", "comment": b"mine"}
    sealed = cipher.seal(Query("q_1", (image,), "?"))
    assert not set(cipher.open("q_1", sealed).images[0].info) & {"icc_profile", "exif", "comment"}
    assert set(image.info) == {"icc_profile", "exif", "comment"}, "the caller's image is left alone"
    for query_id, bad in [("q_2", sealed), ("q_1", sealed[:-1]), ("q_1", b""), ("q_1", bytes(99))]:
        with pytest.raises(Unreadable):
            cipher.open(query_id, bad)


def test_large_images_are_kept_as_jpeg() -> None:
    cipher = Cipher(bytes(32))
    side = int(LOSSLESS_PIXELS**0.5) + 1
    image = Image.linear_gradient("L").resize((side, side)).convert("RGB")
    (out,) = cipher.open("q_1", cipher.seal(Query("q_1", (image,), "?"))).images
    assert out.size == image.size
    assert abs(out.getpixel((300, 400))[0] - image.getpixel((300, 400))[0]) < 8  # type: ignore[index]


def test_the_key_file_is_made_once_and_private(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "new")
    key = load_key(settings)
    assert load_key(settings) == key
    assert len(key) == 32
    assert (tmp_path / "new" / "buffer.key").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["buffer.key"]
    with pytest.raises(ValueError, match="32 bytes"):
        load_key(Settings(home=tmp_path, buffer_key="c2hvcnQ="))  # type: ignore[arg-type]


# --- failures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVERS)
async def test_kill_9_loses_no_acknowledged_query(tmp_path: Path, name: str) -> None:
    settings = Settings(home=tmp_path, buffer_queries=1_000_000)
    dice = random.Random(0)
    stored: set[str] = set()
    numbers = iter(range(1_000_000))

    async def keep_putting(buffer: QueryBuffer, stop: asyncio.Event) -> None:
        while not stop.is_set():
            query = make_query(next(numbers))
            if await reason(buffer, query) is None:
                stored.add(query.id)
            else:
                await asyncio.sleep(0.05)

    async def grow(by: int) -> None:
        enough = len(stored) + by
        async with asyncio.timeout(60):
            while len(stored) < enough:
                await asyncio.sleep(0.01)

    with running(tmp_path, name) as server:
        async with open_buffer(settings, server.url) as buffer:
            for _ in range(2):
                stop = asyncio.Event()
                putting = [asyncio.create_task(keep_putting(buffer, stop)) for _ in range(8)]
                await grow(dice.randint(20, 60))
                assert server.pid
                os.kill(server.pid, signal.SIGKILL)
                await grow(20)  # buffering went on
                stop.set()
                await asyncio.gather(*putting)
            acked = (await counts(buffer))["acked"]
            assert acked >= len(stored)
        with open_stream(settings, server.url) as stream:
            found = ids(stream.take(1_000_000, 1.0))
        assert len(found) == len(set(found)) == acked
        assert stored <= set(found)


@pytest.mark.parametrize("name", SERVERS)
async def test_a_redis_that_hangs_or_lost_everything_costs_no_time_and_no_restart(
    tmp_path: Path, name: str
) -> None:
    settings = Settings(home=tmp_path)
    with running(tmp_path, name) as server:
        async with open_buffer(settings, server.url) as buffer:
            await fill(buffer, 1)
            assert server.pid
            os.kill(server.pid, signal.SIGSTOP)
            try:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(reason(buffer, make_query(1)), 0.05)
                assert await reason(buffer, make_query(2)) == "buffer_unavailable"
                began = time.monotonic()
                refused = await asyncio.gather(*(reason(buffer, make_query(n)) for n in range(100, 600)))
                assert set(refused) == {"buffer_unavailable"}
                assert time.monotonic() - began < 5  # each would wait a second of its own
                assert not (await buffer.status()).connected
                assert (await buffer.read_worker()).state == "absent"
                with pytest.raises(BufferUnavailable):
                    await buffer.purge()
            finally:
                os.kill(server.pid, signal.SIGCONT)
            await asyncio.sleep(1.2)
            await fill(buffer, 1, start=3)
            with redis.Redis.from_url(server.url) as client:
                client.flushall()
                client.function_flush("SYNC")
            await fill(buffer, 1, start=4)
            with open_stream(settings, server.url) as stream:
                assert ids(stream.take(8, 1.0)) == ["q_4"]


async def test_without_redis_nothing_is_stored_and_nobody_waits(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    async with open_buffer(settings, f"unix://{tmp_path}/nobody") as buffer:
        began = time.monotonic()
        assert await reason(buffer, make_query(0)) == "buffer_unavailable"
        assert not (await buffer.status()).connected
        assert time.monotonic() - began < 0.5
    with (
        open_stream(settings, f"unix://{tmp_path}/nobody") as stream,
        pytest.raises(BufferUnavailable),
    ):
        stream.take(1, 0.0)


async def test_cancelled_callers_never_mix_replies(server: EmbeddedValkey, settings: Settings) -> None:
    settings = settings.model_copy(update={"buffer_queries": 10_000})
    dice = random.Random(0)
    async with open_buffer(settings, server.url) as buffer:
        await fill(buffer, 1)

        async def one(number: int) -> None:
            duplicate = number % 2 == 0
            query = make_query(0 if duplicate else number)
            calls = (reason(buffer, query), buffer.status(), buffer.withdraw("q_unknown"))
            expected = ("duplicate" if duplicate else None, True, False)
            for call, right in zip(calls, expected, strict=True):
                try:
                    reply = await asyncio.wait_for(call, dice.choice((10.0, dice.uniform(0, 0.02))))
                except TimeoutError:
                    continue
                assert getattr(reply, "connected", reply) == right

        for start in range(1, 401, 50):
            await asyncio.gather(*(one(number) for number in range(start, start + 50)))
    async with open_buffer(settings, server.url) as buffer:
        ledger = await counts(buffer)
    assert ledger["acked"] == 201, "a caller that stops waiting does not stop the storing"
    assert 0 < ledger["unconfirmed"] < 201


async def test_what_was_erased_leaves_the_file_as_well(tmp_path: Path) -> None:
    """Also while the file is being written anew already, from before the erasure."""
    settings = Settings(home=tmp_path)

    def on_disk(query_id: str) -> bool:
        files = [path for path in (tmp_path / "valkey").rglob("*") if path.suffix in (".aof", ".rdb")]
        return any(f"blob:{query_id}".encode() in path.read_bytes() for path in files)

    with running(tmp_path) as server:
        async with open_buffer(settings, server.url) as buffer:
            await fill(buffer, 2)
            assert on_disk("q_0")
            rewriting = asyncio.create_task(buffer.compact())
            await buffer.withdraw("q_0")
            await asyncio.gather(rewriting, buffer.compact())
            async with asyncio.timeout(20):
                while on_disk("q_0"):
                    await asyncio.sleep(0.05)
            assert on_disk("q_1")


async def test_a_redis_that_forgets_is_named(tmp_path: Path, server: EmbeddedValkey, settings: Settings) -> None:
    with redis.Redis.from_url(server.url) as client, structlog.testing.capture_logs() as logs:
        async with open_buffer(settings, server.url) as buffer:
            await buffer.status()
        assert not [line for line in logs if line["event"] == "buffer_not_durable"]
        client.config_set("appendonly", "no")
        try:
            async with open_buffer(settings, server.url) as buffer:
                await buffer.status()
        finally:
            client.config_set("appendonly", "yes")
    assert [line["found"]["appendonly"] for line in logs if line["event"] == "buffer_not_durable"] == ["no"]
