"""O: serving stays what it is under overload, beside learning, and for as long as it runs."""

from __future__ import annotations

import asyncio
import contextlib
import io
import statistics
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks import beside, overload
from benchmarks.models import checkpoint
from benchmarks.promises.delivery import QUICK, Asked
from benchmarks.promises.product import Part, Product
from benchmarks.promises.rows import Found, Skip, Trial, promise
from benchmarks.servers import resident_mb, running
from servetune import Client
from servetune.evals.data import BadData

CROWD = 16  # questions at once, before threads are counted
CLIENTS = 32  # that never wait longer than they are asked to: as many as the model answers in one batch
WAIT_S = 0.12  # how long a question may wait for the model: what bounds the p99 of those that are let in
FLAT_MB = 32.0  # what the allocator may keep of a wave of requests
CACHES = {"prompt_cache_bytes": 2**20, "feature_cache_bytes": 2**20}  # full soon: what grows is no cache
SETTLING_S = 900  # of the long form


@promise("O1", "overload degrades flat", timed=True)
def overload_degrades_flat(trial: Trial) -> Found:
    """Four times as many questions as can be answered (`benchmarks.overload`)."""
    options = Namespace(model="nano", seconds=18.0 if trial.short else 120.0, times=4.0, clients=CLIENTS)
    with (
        running("ours", checkpoint("nano"), 1, trial.folder, queue_wait_s=WAIT_S, **CACHES) as server,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        found = asyncio.run(overload.measure(server, options))
    good = found["goodput_ratio"] >= 0.9 and found["admitted_p99_ratio"] <= 2 and found["only_429_503"]
    good = good and found["refused_p99_s"] <= 0.05 and found["grown_mb"] <= FLAT_MB and found["refused"] > 0
    return Found(
        bool(good),
        f"goodput {found['goodput_ratio']:.2f} of capacity, p99 {found['admitted_p99_ratio']:.2f} times, "
        f"{found['refused']} refused, 99 % within {1e3 * found['refused_p99_s']:.0f} ms, "
        f"RSS {found['grown_mb']:+.0f} MB",
    )


@promise("O5", "learning does not spoil serving", timed=True)
def learning_does_not_spoil_serving(trial: Trial) -> Found:
    """The same load with the learner busy and stopped, by turns (`benchmarks.beside`)."""
    # A window in which the worker makes no step would say nothing.
    options = Namespace(rounds=trial.times(3, 5), seconds=8.0 if trial.short else 15.0)
    options.queries = trial.times(96, 640)
    chosen = {"worker": True, "worker_threads": 1, "lease_s": 3600, "queue_wait_s": 600}
    try:
        with (
            running("ours", checkpoint("nano"), 1, trial.folder, **chosen) as server,
            contextlib.redirect_stdout(io.StringIO()),
        ):
            found = asyncio.run(beside.measure(server, trial.folder, options))
    except BadData as error:
        raise Skip(str(error)) from error
    good = found["p99_ratio"] <= 1.3 and found["errors"] == 0 and found["learner_steps_per_minute"] > 0
    figure = f"p99 {found['p99_ratio']:.2f} times, throughput {found['throughput_ratio']:.2f} times, "
    figure += f"{found['learner_steps_per_minute']:.0f} steps a minute, {found['errors']} errors"
    return Found(good, figure)


@dataclass(frozen=True, slots=True)
class _Sample:
    """What the server holds at some time."""

    hours: float
    memory_mb: float
    files: int
    threads: int

    @classmethod
    def of(cls, pid: int, hours: float) -> _Sample:
        files, threads = (len(list(Path(f"/proc/{pid}/{name}").iterdir())) for name in ("fd", "task"))
        return cls(hours, resident_mb(pid), files, threads)


@promise("O7", "a long run leaves nothing behind", timed=True)
def nothing_is_left_behind(trial: Trial) -> Found:
    """Questions, swaps, and kills of the worker and the Valkey on and on; what the server holds is written down.

    The short form cannot tell a slope of 1 MB an hour: there memory may grow by what the allocator keeps.
    """
    seconds, settling_s = trial.times(24, 7200), trial.times(8, SETTLING_S)
    warming, asked, samples, number, dice = Asked(), Asked(), [], 0, trial.dice
    with Product(trial.folder / "home", **QUICK | CACHES) as product, product.client() as client:
        with ThreadPoolExecutor(CROWD) as crowd:  # every pool of threads as large as it will be
            list(crowd.map(lambda _: warming.once(client), range(4 * CROWD)))
        began, server = time.monotonic(), product.pid("server")
        assert server
        while (spent_s := time.monotonic() - began) < seconds:
            number += 1
            asked.once(client)
            if number % 10 == 0:
                _swap(client, number)
            if number % 100 == 0:
                part: Part = dice.choice(("worker", "redis"))
                product.kill(part)
            if spent_s > settling_s:
                samples.append(_Sample.of(server, spent_s / 3600))
    half = len(samples) // 2
    early, late = samples[:half], samples[half:]
    usual = statistics.median_low  # while a worker is down, nobody waits for it to end
    files, threads = (
        usual(getattr(s, name) for s in late) - usual(getattr(s, name) for s in early)
        for name in ("files", "threads")
    )
    slope = statistics.linear_regression([s.hours for s in samples], [s.memory_mb for s in samples]).slope
    grown_mb = statistics.median(s.memory_mb for s in late) - statistics.median(s.memory_mb for s in early)
    flat = grown_mb <= FLAT_MB if trial.short else slope <= 1
    figure = f"{asked.refused} of {number} failed, {grown_mb:+.1f} MB ({slope:.1f} an hour), "
    return Found(
        flat and files <= 0 and threads <= 0 and asked.refused == 0,
        f"{figure}{files:+} open files, {threads:+} threads",
    )


def _swap(client: Client, number: int) -> None:
    if number % 20:
        client.adapters.reset()
    else:
        client.adapters.rollback()
