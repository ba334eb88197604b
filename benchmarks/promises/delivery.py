"""R: what was acknowledged is accounted for, whatever is killed; and Redis down is no outage of ours."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import redis

from benchmarks.promises.product import LABELS, Part, Product, eventually, going_on, picture
from benchmarks.promises.rows import Found, Skip, Trial, promise
from servetune import Client
from servetune.adapters.step import Learner
from servetune.adapters.store import AdapterStore
from servetune.adapters.types import Query, StepMetrics
from servetune.server.audit import AuditLog
from servetune.server.buffer import QueryBuffer, QueryStream
from servetune.server.model import Stores, load_policy
from servetune.server.settings import Settings
from servetune.server.valkey import EmbeddedValkey
from servetune.server.worker import POLL_S, SLOTS, Worker
from servetune.server.workers import Workers

PARTS: tuple[Part, ...] = ("worker", "redis", "server", "all")
OUTCOMES = ("trained", "no_signal", "rejected", "dead", "expired", "withdrawn")
CLIENTS = 4
LEASE_S = 3
QUICK = {"lease_s": LEASE_S, "flush_s": 0.5, "max_deliveries": 100, "queue_wait_s": 60}
QUICK |= {"buffer_client_share": 1, "queries_per_step": 4, "steps_per_candidate": 1}
STREAM = "servetune:{default}:queries"
AT_WORK = "at-work-"
BATCH = 2
SETTLED_S, LEARNED_S = 600.0, 300.0


@dataclass
class Asked:
    """What clients were told, each query of which is unlike any other."""

    acked: set[str] = field(default_factory=set)
    skipped: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    times_s: list[float] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=lambda: iter(range(10**9)))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def once(self, client: Client) -> None:
        """Ask one thing; a server that is away refuses."""
        with self._lock:
            number = next(self._numbers)
        began = time.monotonic()
        try:
            kept = client.recognize(picture(number), LABELS).adaptation
        except Exception:
            with self._lock:
                self.refused += 1
            time.sleep(0.1)
            return
        with self._lock:
            self.times_s.append(time.monotonic() - began)
            if kept.status == "queued" and kept.query_id:
                self.acked.add(kept.query_id)
            else:
                self.skipped[kept.reason or kept.status] += 1

    @contextmanager
    def busy(self, product: Product, clients: int = CLIENTS) -> Iterator[None]:
        """Clients that ask on and on, wherever the product answers now."""

        def ask(stop: threading.Event) -> None:
            while not stop.is_set():
                with suppress(Exception), product.client(max_retries=0, timeout=20) as client:
                    url = product.url
                    while product.url == url and not stop.is_set():
                        self.once(client)

        with going_on(*[ask] * clients):
            yield


@dataclass(frozen=True, slots=True)
class Ledger:
    """What became of acknowledged queries."""

    acked: frozenset[str]  # as clients were told
    counts: dict[str, int]  # as the server counts
    kept: frozenset[str]  # still in the stream
    trained: Counter[str]  # by id, over the live version and those that it came from
    kills: str

    @property
    def difference(self) -> int:
        """Of the ledger; and more was never acknowledged than is in it."""
        settled = sum(self.counts.get(name, 0) for name in OUTCOMES)
        return self.counts.get("acked", 0) - settled - len(self.kept)

    @property
    def lost(self) -> int:
        """Acknowledged, and neither kept nor trained nor settled in another way."""
        unseen = len(self.acked - self.kept - self.trained.keys())
        otherwise = sum(self.counts.get(name, 0) for name in OUTCOMES if name != "trained")
        missing = len(self.acked) - self.counts.get("acked", 0)
        return max(0, unseen - otherwise, missing)


@cache
def ledger(short: bool, seed: int, broken: str) -> Ledger:
    """Kill everything at random times while clients ask, then look at what is left.

    R1, R2 and R3 read the same run.
    """
    dice, asked, told = random.Random(seed), Asked(), []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder, "home")
        product = Product(home, "dies-before-settling", **QUICK)
        with product, asked.busy(product):
            for part in PARTS * (1 if short else 20):
                eventually(lambda: product.pid("worker") is not None and product.pid("redis") is not None)
                _some_more(asked)
                pause_s = dice.uniform(0, 3)
                time.sleep(pause_s)
                told.append(f"{part} {pause_s:.2f}")
                product.kill(part)
                if part in ("server", "all"):
                    product.start()
            _some_more(asked)
        with product, product.client() as client:  # it learns on what is left idle: soon nobody asks any more
            for _ in range(12):
                asked.once(client)
            with suppress(TimeoutError):  # where nothing is learned R3 says so
                eventually(lambda: _has_gone_on(home), 60 if broken else LEARNED_S)
        # Everybody has stopped in good order: the file is what a restart would find.
        store = AdapterStore(home / "store")
        trained = Counter(query_id for number in _line(store) for query_id in store.manifest(number).query_ids)
        counts, kept = left(home)
    return Ledger(frozenset(asked.acked), counts, kept, trained, ", ".join(told))


def _some_more(asked: Asked, num: int = 6) -> None:
    enough = len(asked.acked) + num
    eventually(lambda: len(asked.acked) >= enough, 120)


def _line(store: AdapterStore) -> Iterator[int]:
    """The live version and what it came from."""
    version: int | None = store.live().version
    while version is not None:
        yield version
        version = store.manifest(version).parent


def _has_gone_on(home: Path) -> bool:
    """Whether the worker has published something after it died before settling."""
    marker, store = home / "died-before-settling", AdapterStore(home / "store")
    live = store.manifest(store.live().version)
    return marker.exists() and live.created > marker.stat().st_mtime


def left(home: Path) -> tuple[dict[str, int], frozenset[str]]:
    """The ledger and the ids in the stream of a home whose server is not running."""
    server = EmbeddedValkey.start(home, 10**9)
    try:
        with redis.Redis.from_url(server.url, decode_responses=True) as client:
            counts = {name: int(value) for name, value in client.hgetall("servetune:{default}:ledger").items()}  # type: ignore[union-attr]
            entries = client.xrange(STREAM)
            return counts, frozenset(fields["query"] for _, fields in entries)  # type: ignore[union-attr]
    finally:
        server.stop()


@promise("R1", "no acknowledged query is lost")
def nothing_is_lost(trial: Trial) -> Found:
    found = ledger(trial.short, trial.seed, trial.broken)
    figure = f"{found.lost} of {len(found.acked)} lost; killed after s: {found.kills}"
    return Found(found.lost == 0 and len(found.acked) > 20, figure)


@promise("R2", "the ledger balances")
def it_balances(trial: Trial) -> Found:
    found = ledger(trial.short, trial.seed, trial.broken)
    kept = {**found.counts, "in the stream": len(found.kept)}
    return Found(found.difference == 0, f"difference {found.difference}: {kept}")


@promise("R3", "a query is trained on at most once")
def at_most_once(trial: Trial) -> Found:
    found = ledger(trial.short, trial.seed, trial.broken)
    twice = sum(count > 1 for count in found.trained.values())
    return Found(twice == 0 and bool(found.trained), f"{twice} of {len(found.trained)} trained twice")


@promise("R4", "live work is not stolen, and what was taken over is not committed twice")
def live_work_is_not_stolen(trial: Trial) -> Found:
    """Steps of three leases and two workers; in every other round the one at work is stopped for two leases.

    On one machine a lock keeps the second worker waiting; these do without it, to meet the fence behind it.
    """
    home, rounds, stolen = trial.folder / "home", trial.times(2, 50), 0
    settings = Settings(
        home=home, lease_s=1.5, max_deliveries=100, max_answer_tokens=4, learner="random"
    )  # always a signal
    settings = settings.model_copy(update={"queries_per_step": BATCH, "steps_per_candidate": 1, "flush_s": 0.0})
    store, valkey = AdapterStore(home / "store"), EmbeddedValkey.start(home, 10**9)
    start = multiprocessing.get_context("spawn").Process
    workers = [start(target=_dawdle, args=(settings, valkey.url), daemon=True) for _ in range(2)]
    try:
        for worker in workers:
            worker.start()
        for number in range(rounds):
            eventually(lambda: store.live().generation > 0)
            store.set_paused(True)  # so that one worker takes all of them
            time.sleep(2 * POLL_S)
            asyncio.run(_put(settings, valkey.url, [BATCH * number + each for each in range(BATCH)]))
            store.set_paused(False)
            stolen += _one_round(settings, valkey.url, stopped=number % 2 == 1)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
        valkey.stop()
    counts, kept = left(home)
    commits = Counter(query_id for made in store.promoted() for query_id in store.manifest(made).query_ids)
    twice = sum(count > 1 for count in commits.values())
    settled = counts["acked"] == BATCH * rounds == sum(counts.get(name, 0) for name in OUTCOMES)
    figure = f"{twice} of {len(commits)} committed twice, {stolen} taken from a live worker, ledger {counts}"
    return Found(twice + stolen == 0 and settled and not kept and bool(commits), figure)


def _dawdle(settings: Settings, url: str) -> None:
    """A worker whose steps take three leases more than they would; it says from when on a turn has work."""
    policy = load_policy(settings, SLOTS, 1)
    mark = settings.path(f"{AT_WORK}{os.getpid()}")
    step, turn = Learner.step, Worker.turn

    def slowly(self: Learner, queries: Sequence[Query]) -> tuple[StepMetrics, list[Query]]:
        mark.touch()
        time.sleep(3 * settings.lease_s)
        return step(self, queries)

    def marked(self: Worker, block_s: float) -> bool:
        busy = turn(self, block_s)
        mark.unlink(missing_ok=True)
        return busy

    Learner.step, Worker.turn = slowly, marked  # type: ignore[method-assign, assignment]
    with closing(QueryStream.connect(settings, url, "worker")) as stream:
        audit = AuditLog(settings.path("audit.jsonl"))
        Workers(settings, policy, Stores(settings, policy), stream, audit).run(threading.Event())


async def _put(settings: Settings, url: str, numbers: list[int]) -> None:
    buffer = QueryBuffer.connect(settings, url)
    for number in numbers:
        await buffer.put(Query(f"q{number}", (picture(number),), "what is this?", tuple(LABELS)), "somebody")
    await buffer.close()


def _one_round(settings: Settings, url: str, stopped: bool) -> int:
    """Until all that waits is settled; how many queries changed hands although nobody had stopped."""
    eventually(lambda: bool(_at_work(settings)), 60)
    if stopped:
        [victim, *_] = _at_work(settings)
        os.kill(victim, signal.SIGSTOP)
        time.sleep(2 * settings.lease_s)
        os.kill(victim, signal.SIGCONT)
    again: set[str] = set()
    with redis.Redis.from_url(url, decode_responses=True) as client:

        def settled() -> bool:
            for lease in client.xpending_range(STREAM, "workers", "-", "+", 100):  # type: ignore[union-attr]
                if lease["times_delivered"] > 1:
                    again.add(lease["message_id"])
            return client.xlen(STREAM) == 0

        eventually(settled, 20 * settings.lease_s)
    eventually(lambda: not _at_work(settings), 20 * settings.lease_s)  # also who is late has come to an end
    return 0 if stopped else len(again)


def _at_work(settings: Settings) -> list[int]:
    return [int(path.name.removeprefix(AT_WORK)) for path in settings.home.glob(f"{AT_WORK}*")]


@promise("R5", "poison is set aside, and takes no other query with it")
def poison_is_set_aside(trial: Trial) -> Found:
    """One query ends the worker by SIGKILL wherever it is learned from (`breaking/mutations.py`)."""
    others = trial.times(24, 999)
    product = Product(trial.folder / "home", "poison", **QUICK | {"max_deliveries": 3})
    with product, product.client() as client:
        asked = Asked()
        for number in range(others):
            asked.once(client)
            if number == others // 2:
                client.answer(picture(10**6), "a question that is poison")

        def settled() -> bool:
            buffer = client.adaptation.status().buffer
            return buffer.connected and buffer.waiting + buffer.pending == 0

        with suppress(TimeoutError):  # what is not settled is counted below
            eventually(settled, 60 if trial.broken else SETTLED_S)
        counts = client.adaptation.status().buffer.ledger
    done = sum(counts[name] for name in ("trained", "no_signal", "rejected"))
    return Found(
        counts["dead"] == 1 and done == len(asked.acked) == others,
        f"{counts['dead']} dead, {done} of {others} done",
    )


@promise("R6", "a full buffer neither blocks nor drops")
def a_full_buffer_refuses(trial: Trial) -> Found:
    """More is asked than there is room for, and nobody learns: all is answered, and what is kept stays kept."""
    room, num = trial.times(20, 500), trial.times(60, 5000)
    settings = QUICK | {"worker": False, "buffer_queries": room}
    with Product(trial.folder / "home", **settings) as product, product.client() as client:
        asked = Asked()
        for _ in range(num):
            asked.once(client)
        buffer = client.adaptation.status().buffer
    counts, kept = left(product.home)
    exact = asked.skipped == {"buffer_full": num - room} and len(asked.acked) == room == buffer.waiting
    good = exact and asked.refused == 0 and kept == asked.acked and counts["acked"] == room
    return Found(good, f"{asked.refused} of {num} refused, {len(kept)} of {room} kept, {dict(asked.skipped)}")


@promise("R7", "Redis down is not our outage", timed=True)
def redis_is_not_our_outage(trial: Trial) -> Found:
    """Redis killed and kept down, then hung; answers go on, and buffering comes back."""
    seconds = trial.times(6, 60)
    if not Path("/proc").is_dir():
        raise Skip("needs /proc to find the processes")
    with Product(trial.folder / "home", **QUICK | {"worker": False}) as product, product.client() as client:
        usual, hung, after = Asked(), Asked(), Asked()
        _ask_for(usual, client, seconds)
        pid = product.pid("redis")
        assert pid
        os.kill(pid, signal.SIGSTOP)
        try:
            _ask_for(hung, client, seconds)
        finally:
            os.kill(pid, signal.SIGCONT)
        began = time.monotonic()
        while not after.acked and time.monotonic() - began < 30:
            after.once(client)
        back_s = time.monotonic() - began
        down = _killed_on_and_on(product, client, seconds)
    failed = usual.refused + hung.refused + after.refused + down.refused
    slower_ms = 1e3 * (max(_p99(hung), _p99(down)) - _p99(usual))
    figure = f"{failed} failed, p99 +{slower_ms:.0f} ms, buffering back after {back_s:.1f} s"
    enough = min(len(hung.times_s), len(down.times_s)) > 5 and not hung.acked
    return Found(failed == 0 and back_s <= 5 and slower_ms <= 50 and enough, figure)


def _ask_for(asked: Asked, client: Client, seconds: float) -> None:
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        asked.once(client)


def _killed_on_and_on(product: Product, client: Client, seconds: float) -> Asked:
    asked, stop = Asked(), threading.Event()

    def kill() -> None:
        while not stop.wait(0.02):
            product.kill("redis")

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        _ask_for(asked, client, seconds)
    finally:
        stop.set()
        killer.join()
    return asked


def _p99(asked: Asked) -> float:
    ranked = sorted(asked.times_s)
    return ranked[min(len(ranked) - 1, int(0.99 * len(ranked)))]
