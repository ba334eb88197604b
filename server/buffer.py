"""The durable queue of queries to learn from, on Redis Streams.

Owns the Redis connections: `QueryBuffer` is the API's end, `QueryStream` the worker's. What must be atomic
is in buffer.lua. Knows nothing about HTTP, engines or adapters.

A stored query is delivered at least once. At any quiescent point, exactly:
acked = trained + no_signal + rejected + dead + expired + withdrawn + waiting + pending.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.resources import files
from types import TracebackType
from typing import Any, TypeVar

import redis
import redis.asyncio
import structlog
from pydantic import ValidationError
from redis.backoff import NoBackoff
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError
from redis.retry import Retry
from redis.utils import str_if_bytes

from servetune.adapters.types import Query
from servetune.clients.types import BufferStatus, FeedbackCounts, WorkerStatus
from servetune.server import connections
from servetune.server.cipher import Cipher, Unreadable, load_key
from servetune.server.settings import Settings

T = TypeVar("T")

OUTCOMES = ("trained", "no_signal", "rejected")
"""What a worker may settle a query as: in a published version, without signal, in a refused candidate."""

LEDGER = ("acked", *OUTCOMES, "dead", "expired", "withdrawn", "unconfirmed")
"""`unconfirmed` counts stored queries whose caller had stopped waiting; they are part of `acked`."""

DURABLE = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
CONNECTIONS = 16
ANSWER_S = 1.0  # longest wait for one reply on the API's side
RETRY_S = 1.0  # while Redis is down, one attempt per this time
WORKER_ANSWER_S = 10.0  # the worker may block; it must still notice a Redis that hangs
COMPACT_S = 5.0, 3600.0  # least and longest pause between two rewritings of the file
COMPACT_POLL_S = 0.2
PURGE_CHUNK = 500  # queries that one call withdraws, so that Redis serves others in between
FORGET_LEASES = 100  # a consumer silent for this many leases is not coming back
MOST_SAID = 100_000  # answers of an adapter of which it is known what feedback they had
MOST_VERSIONS = 100  # of an adapter, whose feedback is counted

log = structlog.get_logger(__name__)


class Skipped(Exception):
    """The query was not stored: buffer_full, duplicate, client_share or buffer_unavailable."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class BadBuffer(ValueError):
    """The Redis URL or the buffer key cannot be used as given."""


class BufferUnavailable(Exception):
    """Redis cannot be reached, does not answer in time or refuses."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A query under lease. `deliveries` counts this one."""

    entry_id: str
    query: Query
    deliveries: int


WORKERS = "servetune:workers"


def _key(settings: Settings, name: str) -> str:
    return f"servetune:{{{settings.adapter}}}:{name}"


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _load_command() -> tuple[str, ...]:
    return "FUNCTION LOAD", "REPLACE", files("servetune.server").joinpath("buffer.lua").read_text()


def _forgot_us(error: ResponseError) -> bool:
    """Redis was restarted empty or flushed: it misses our functions or our consumer group."""
    return "Function not found" in str(error) or "NOGROUP" in str(error)


class _Circuit:
    """Fails at once while Redis is down and lets one attempt per RETRY_S through to see whether it is back."""

    def __init__(self) -> None:
        self._open = False
        self._next_attempt = 0.0

    def __enter__(self) -> None:
        if self._open:
            if time.monotonic() < self._next_attempt:
                raise BufferUnavailable("Redis was down a moment ago")
            self._next_attempt = time.monotonic() + RETRY_S

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RedisError | OSError) and not isinstance(error, OutOfMemoryError):
            if not self._open:
                log.warning("buffer_unavailable", error=type(error).__name__, detail=str(error)[:200])
            self._open = True
            self._next_attempt = time.monotonic() + RETRY_S
            raise BufferUnavailable(type(error).__name__) from error
        if error is None and self._open:
            self._open = False
            log.info("buffer_available")


class _Shared:
    """What the buffers of all adapters have in common: the Redis, whether it is up, and its room."""

    def __init__(self) -> None:
        self.circuit = _Circuit()
        self.slots = asyncio.Semaphore(CONNECTIONS)
        self.num_adapters = 1


class QueryBuffer:
    """The API's end for one adapter: stores queries and tells what became of them.

    Every command runs in a task of its own, so that a cancelled caller never leaves a connection with an
    unread reply.
    """

    def __init__(self, settings: Settings, client: Any, cipher: Cipher, shared: _Shared | None = None) -> None:
        self._settings = settings
        self._redis = client  # Any: redis-py types one signature for both of its clients
        self._cipher = cipher
        self._queries = _key(settings, "queries")
        self._ttl_ms = settings.buffer_ttl_s * 1000
        self._review_ttl_ms = settings.review_ttl_s * 1000
        self._ready = False
        self._shared = shared or _Shared()
        self._tasks: set[asyncio.Task[Any]] = set()

    @classmethod
    def connect(cls, settings: Settings, redis_url: str) -> QueryBuffer:
        """A buffer on the Redis at `redis_url`, which need not be up. Raises BadBuffer."""
        with _configured():
            pool = connections.async_pool(
                redis_url,
                max_connections=CONNECTIONS,
                socket_timeout=ANSWER_S,
                socket_connect_timeout=ANSWER_S,
                retry=Retry(NoBackoff(), 0),
            )
            return cls(settings, redis.asyncio.Redis.from_pool(pool), Cipher(load_key(settings)))

    def of(self, adapter: str) -> QueryBuffer:
        """The buffer of another adapter, on the same connections."""
        settings = self._settings.model_copy(update={"adapter": adapter})
        return QueryBuffer(settings, self._redis, self._cipher, self._shared)

    def share_among(self, num_adapters: int) -> None:
        """How many adapters have an equal part of `buffer_bytes`, so that none can fill what the others need."""
        self._shared.num_adapters = max(1, num_adapters)

    async def put(self, query: Query, client: str) -> None:
        """Store the query for learning; on return it is durable. Raises Skipped.

        A caller that stops waiting does not stop the storing: it may still succeed, and is then counted
        as `unconfirmed`.
        """
        task = self._start(self._store(query, client))
        try:
            reason = await asyncio.shield(task)
        except asyncio.CancelledError:
            self._start(self._count_unconfirmed(task))
            raise
        if reason:
            raise Skipped(reason)

    async def withdraw(self, query_id: str) -> bool:
        """Erase a query that was not learned from yet. Raises BufferUnavailable."""
        return bool(await self._call("withdraw", query_id))

    async def purge(self) -> int:
        """Erase every query that was not learned from yet, and all that are kept for review.

        Returns how many were not learned from. Raises BufferUnavailable.
        """
        erased = 0
        while count := int(await self._call("purge", PURGE_CHUNK)):
            erased += count
        while await self._call("forget", PURGE_CHUNK):
            pass
        return erased

    async def recent(self, pair: str) -> dict[str, str]:
        """The queries that are kept for review, newest first, and what `mark` noted of each for two versions.

        Raises BufferUnavailable.
        """
        rows = [row.decode() for row in await self._call("recent", pair)]
        return dict(zip(rows[::2], rows[1::2], strict=True))

    async def recall(self, query_id: str) -> Query | None:
        """A query that is kept for review; None where it no longer is. Raises BufferUnavailable."""
        sealed = await self._call("recall", query_id)
        if sealed is None:
            return None
        with suppress(Unreadable):  # sealed with a key that is no more: as good as erased
            return await asyncio.to_thread(self._cipher.open, query_id, sealed)
        return None

    async def mark(self, query_id: str, pair: str, mark: str) -> bool:
        """Note of a kept query that two versions answer it the `same` or `different`ly or, of those, who is right.

        False where the query is gone, or where that does not follow what was noted. Raises BufferUnavailable.
        """
        return bool(await self._call("mark", query_id, pair, mark, self._review_ttl_ms))

    async def review(self, pair: str) -> dict[str, int]:
        """How often each mark was made for two versions, also on what is gone. Raises BufferUnavailable."""
        return _counts(await self._call("review", pair))

    def coin(self, query_id: str, pair: str) -> bool:
        """A toss for a query and two versions: it always falls the same, and needs the key to be known."""
        return int(self._cipher.mark("coin", query_id.encode(), pair.encode()), 16) % 2 == 1

    async def say(self, answer_id: str, version: str, is_correct: bool, ttl_s: float) -> None:
        """Count feedback on an answer of a version; of each answer the last word. Raises BufferUnavailable."""
        kind = "correct" if is_correct else "incorrect"
        bounds = (_milliseconds(ttl_s), MOST_SAID, MOST_VERSIONS)
        await self._call("say", answer_id, version, kind, *bounds)

    async def compact(self) -> None:
        """Have Redis write its file anew, without what was erased. Raises BufferUnavailable.

        A rewriting under way, begun before, is waited for. A Redis that refuses is its operator's to compact: what
        is left there stays sealed.
        """
        while not await self._shielded(self._compact()):
            await asyncio.sleep(COMPACT_POLL_S)

    async def keep_compact(self, buffers: Callable[[], Sequence[QueryBuffer]]) -> None:
        """Write the file anew as often as what leaves the buffers asks for; runs until it is cancelled."""
        pause_s = min(COMPACT_S[1], max(COMPACT_S[0], self._settings.buffer_ttl_s / 10))
        before = 0
        while True:
            await asyncio.sleep(pause_s)
            found = [await buffer.status() for buffer in buffers()]
            gone = sum(each.ledger.get("acked", 0) - each.waiting - each.pending - each.kept for each in found)
            if all(each.connected for each in found) and gone != before:
                with suppress(BufferUnavailable):
                    await self.compact()
                    before = gone

    async def _compact(self) -> bool:
        """Whether it has begun, or never will."""
        with self._shared.circuit:
            try:
                await self._redis.execute_command("BGREWRITEAOF")
            except ResponseError as refusal:
                return "in progress" not in str(refusal)
        return True

    async def status(self) -> BufferStatus:
        """What is stored and what became of the rest. Never raises: `connected` tells."""
        try:
            waiting, pending, dead, size, flat, age_ms, kept, said = await self._call("status", self._ttl_ms)
        except BufferUnavailable:
            return BufferStatus(connected=False)
        counts = _counts(flat)
        ledger = {name: counts.get(name, 0) for name in LEDGER}
        return BufferStatus(
            connected=True,
            waiting=waiting,
            pending=pending,
            dead=dead,
            bytes=size,
            oldest_age_s=age_ms / 1000,
            ledger=ledger,
            kept=kept,
            feedback=_feedback(_counts(said)),
        )

    async def read_worker(self) -> WorkerStatus:
        """The worker's last heartbeat. Never raises."""
        try:
            report = await self._shielded(self._command("GET", _key(self._settings, "worker")))
            is_there = report or await self._shielded(self._command("GET", WORKERS))
        except BufferUnavailable:
            return WorkerStatus(state="absent")
        try:
            return WorkerStatus.model_validate_json(report or b"")
        except ValidationError:  # none, or one of another version of servetune
            return WorkerStatus(state="idle" if is_there else "absent")

    async def close(self) -> None:
        """Wait for what is being stored, then disconnect."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._redis.aclose()

    async def _store(self, query: Query, client: str) -> str:
        """Store the query; the reason if it was not."""
        async with self._shared.slots:
            try:
                digest, sealed = await asyncio.to_thread(self._seal, query)
                reply: bytes = await self._command(*self._enqueue(query, client, digest, sealed))
            except OutOfMemoryError:
                return "buffer_full"
            except BufferUnavailable:
                return "buffer_unavailable"
        return reply.decode()

    def _seal(self, query: Query) -> tuple[str, bytes]:
        return self._cipher.digest(query), self._cipher.seal(query)

    def _enqueue(self, query: Query, client: str, digest: str, sealed: bytes) -> tuple[Any, ...]:
        limit = self._settings.buffer_queries
        client_mark = self._cipher.mark("client", client.encode())
        client_cap = max(1, int(limit * self._settings.buffer_client_share))
        # Of each client: who was told "duplicate" would know what somebody else had asked.
        digest = self._cipher.mark("seen", client.encode(), digest.encode())
        room = self._settings.buffer_bytes // self._shared.num_adapters
        quota = (self._ttl_ms, limit, room, client_cap)
        kept_room = self._settings.review_bytes // self._shared.num_adapters
        review = (self._settings.review_queries, kept_room, self._review_ttl_ms)
        stored = (query.id, digest, client_mark, sealed)
        return "FCALL", "servetune_enqueue", 1, self._queries, *stored, *quota, *review

    async def _count_unconfirmed(self, storing: asyncio.Task[str]) -> None:
        with suppress(BufferUnavailable):
            if await storing == "":
                await self._command("HINCRBY", _key(self._settings, "ledger"), "unconfirmed", 1)

    async def _call(self, function: str, *args: str | int) -> Any:
        return await self._shielded(self._command("FCALL", f"servetune_{function}", 1, self._queries, *args))

    async def _shielded(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.shield(self._start(work))

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop alone keeps only a weak reference
        task.add_done_callback(self._tasks.discard)
        return task

    async def _command(self, *command: Any) -> Any:
        with self._shared.circuit:
            if not self._ready:
                await self._set_up()
            try:
                return await self._redis.execute_command(*command)
            except ResponseError as error:
                if not _forgot_us(error):
                    raise
            await self._set_up()
            return await self._redis.execute_command(*command)

    async def _set_up(self) -> None:
        await self._redis.execute_command(*_load_command())
        await self._redis.execute_command(
            "FCALL", "servetune_setup", 1, self._queries, self._cipher.fingerprint, 1
        )
        await self._warn_if_volatile()
        self._ready = True

    async def _warn_if_volatile(self) -> None:
        """Say once that this Redis forgets what it acknowledged: its settings are its operator's to choose."""
        try:
            reply = await self._redis.execute_command("CONFIG GET", *DURABLE)
        except ResponseError:  # a managed Redis may not tell
            return
        found = {str_if_bytes(name): str_if_bytes(value) for name, value in reply.items()}
        if found != DURABLE:
            log.warning("buffer_not_durable", found=found, wanted=DURABLE)


class QueryStream:
    """The worker's end: takes queries under a lease and settles them. Safe to use from several threads.

    A lease lasts `lease_s` and must be renewed well before; then the query is delivered to someone else.
    Every method raises BufferUnavailable.
    """

    def __init__(self, settings: Settings, client: Any, cipher: Cipher, consumer: str) -> None:
        self._settings = settings
        self._redis = client
        self._cipher = cipher
        self._consumer = consumer
        self._queries = _key(settings, "queries")
        self._ttl_ms = settings.buffer_ttl_s * 1000
        self._lease_ms = _milliseconds(settings.lease_s)
        self._ready = False

    @classmethod
    def connect(cls, settings: Settings, redis_url: str, consumer: str) -> QueryStream:
        """A stream on the Redis at `redis_url`, which need not be up. Raises BadBuffer.

        `consumer` is for people; leases are held under a name that no other stream has.
        """
        with _configured():
            pool = connections.pool(
                redis_url,
                max_connections=CONNECTIONS,
                socket_timeout=WORKER_ANSWER_S,
                socket_connect_timeout=ANSWER_S,
                retry=Retry(NoBackoff(), 0),
            )
            name = f"{consumer}:{secrets.token_hex(4)}"
            return cls(settings, redis.Redis.from_pool(pool), Cipher(load_key(settings)), name)

    def take(self, limit: int, block_s: float) -> list[Delivery]:
        """Up to `limit` queries: those whose lease ran out, else new ones, of every client an equal part.

        The oldest of each client, in turn; who sends more than others has a larger part only where they have none.

        A query is given up after `max_deliveries`. On its last it comes alone and only to a worker that
        holds nothing else, so that one that kills its worker takes no other with it.

        Waits for the first up to `block_s`, but never longer than half of WORKER_ANSWER_S.
        """
        limits = (limit, self._lease_ms, self._settings.max_deliveries, self._ttl_ms)
        rows = self._call("claim", self._consumer, *limits) or self._new(limit, block_s)
        return [delivery for row in rows if (delivery := self._open(*row))]

    def renew(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Start the leases anew; returns those still held.

        Of the others someone else has taken over, or the query was withdrawn or has expired: what was
        learned from them must not be published.
        """
        ids = [delivery.entry_id for delivery in deliveries]
        kept = {entry_id.decode() for entry_id in self._call("renew", self._consumer, *ids)}
        return [delivery for delivery in deliveries if delivery.entry_id in kept]

    def settle(self, deliveries: Sequence[Delivery], outcome: str) -> int:
        """Erase queries that are done with, as one of OUTCOMES; each counts once. Returns how many did now."""
        if outcome not in OUTCOMES:
            raise ValueError(f"outcome must be one of {OUTCOMES}, not {outcome!r}")
        return int(self._call("settle", outcome, *(delivery.entry_id for delivery in deliveries)))

    def release(self, deliveries: Sequence[Delivery], *, failed: bool = False) -> None:
        """Give undone work back: anyone may take it at once. Only a failed delivery counts as one."""
        ids = (delivery.entry_id for delivery in deliveries)
        self._call("release", self._consumer, self._lease_ms, int(failed), *ids)

    def of(self, adapter: str) -> QueryStream:
        """The stream of another adapter, on the same connections."""
        settings = self._settings.model_copy(update={"adapter": adapter})
        return QueryStream(settings, self._redis, self._cipher, self._consumer)

    def waiting(self, adapters: Sequence[str]) -> list[str]:
        """Those of some adapters that have queries in the buffer, under lease or not."""
        with _unavailable(), self._redis.pipeline(transaction=False) as asking:
            for adapter in adapters:
                asking.xlen(_key(self._settings.model_copy(update={"adapter": adapter}), "queries"))
            return [adapter for adapter, num in zip(adapters, asking.execute(), strict=True) if num]

    def beat(self) -> None:
        """Tell that there is a worker, for the adapters that it has no place for yet."""
        self._command("SET", WORKERS, "1", "PX", self._lease_ms)

    def report(self, status: WorkerStatus) -> None:
        """Leave a heartbeat; without another within `lease_s` the worker is absent."""
        self._command("SET", _key(self._settings, "worker"), status.model_dump_json(), "PX", self._lease_ms)

    def leave(self) -> None:
        """Leave the group, where Redis can be reached: else the next worker to leave forgets this one."""
        with suppress(BufferUnavailable):
            self._call("leave", self._consumer, FORGET_LEASES * self._lease_ms)

    def close(self) -> None:
        """Leave the group and disconnect."""
        self.leave()
        self._redis.close()

    def _new(self, limit: int, block_s: float) -> list[list[Any]]:
        """Entries that nobody took yet, once there are any."""
        rows, last = self._call("take", self._consumer, limit)
        if not rows:
            block_ms = max(1, _milliseconds(min(block_s, WORKER_ANSWER_S / 2)))  # 0 would mean forever
            if self._command("XREAD", "COUNT", 1, "BLOCK", block_ms, "STREAMS", self._queries, last):
                rows, _ = self._call("take", self._consumer, limit)
        return list(rows)

    def _open(self, entry_id: bytes, query_id: bytes, sealed: bytes, deliveries: int) -> Delivery | None:
        try:
            query = self._cipher.open(query_id.decode(), sealed)
        except Unreadable:
            self._call("dead_letter", "unreadable", self._ttl_ms, entry_id)
            return None
        return Delivery(entry_id.decode(), query, deliveries)

    def _call(self, function: str, *args: str | bytes | int) -> Any:
        return self._command("FCALL", f"servetune_{function}", 1, self._queries, *args)

    def _command(self, *command: Any) -> Any:
        with _unavailable():
            if not self._ready:
                self._set_up()
            try:
                return self._redis.execute_command(*command)
            except ResponseError as error:
                if not _forgot_us(error):
                    raise
            self._set_up()
            return self._redis.execute_command(*command)

    def _set_up(self) -> None:
        fingerprint = self._cipher.fingerprint
        self._redis.execute_command(*_load_command())
        found = self._redis.execute_command("FCALL", "servetune_setup", 1, self._queries, fingerprint, 0)
        if found.decode() != fingerprint:  # else it would give up every query as unreadable
            raise BufferUnavailable("the API seals with another key: give both the same SERVETUNE_BUFFER_KEY")
        self._ready = True


def _counts(flat: Sequence[bytes]) -> dict[str, int]:
    return {name.decode(): int(count) for name, count in zip(flat[::2], flat[1::2], strict=True)}


def _feedback(counts: Mapping[str, int]) -> dict[str, FeedbackCounts]:
    """Counts under `v0007 correct`, by version."""
    versions = sorted({name.partition(" ")[0] for name in counts})
    kinds = ("correct", "incorrect")
    return {each: FeedbackCounts(**{kind: counts.get(f"{each} {kind}", 0) for kind in kinds}) for each in versions}


@contextmanager
def _configured() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise BadBuffer(str(error)) from error


@contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError) as error:
        raise BufferUnavailable(type(error).__name__) from error
