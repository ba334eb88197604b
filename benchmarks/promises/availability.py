"""R8 and O: who leaves, stalls or restarts takes nothing with it, and nobody else waits for that."""

from __future__ import annotations

import asyncio
import base64
import fcntl
import io
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import httpx2
import numpy

from benchmarks.promises.delivery import OUTCOMES, QUICK, left
from benchmarks.promises.product import LABELS, Product, eventually, going_on, picture
from benchmarks.promises.rows import Found, Trial, promise
from servetune import AsyncClient, Client

ALONE = QUICK | {"worker": False, "queue_wait_s": 3600}


def encoded(number: int) -> str:
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def free(product: Product) -> bool:
    """Whether no request holds a version, so nothing is computed for anybody."""
    with product.client() as client:
        return not client.adapters.get().leases


def open_files(product: Product) -> int:
    return len(list(Path(f"/proc/{product.pid('server')}/fd").iterdir()))


async def refused(product: Product, num: int) -> int:
    """How many of so many short questions at once are refused: each slot that has leaked is one."""
    body = {"image": encoded(0), "question": "what is this?", "max_tokens": 1, "adapt": False}
    async with httpx2.AsyncClient(base_url=product.url, timeout=120) as http:
        replies = await asyncio.gather(*(http.post("/answer", json=body) for _ in range(num)))
    return sum(reply.status_code != 200 for reply in replies)


# --- who leaves --------------------------------------------------------------------------------------


@dataclass
class Replies:
    """What came of requests some of which were given up."""

    right: int = 0
    foreign: int = 0
    left: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    kept: set[str] = field(default_factory=set)
    usual_s: float = 0.1  # that an answer takes: when to leave is drawn from it

    async def ask(self, client: AsyncClient, number: int, leave: float | None) -> None:
        """Ask for one of two labels that nobody else has; `leave` after a part of an answer's time."""
        labels = [f"{LABELS[number % len(LABELS)]} {number}", f"something else {number}"]
        began = time.monotonic()
        try:
            async with asyncio.timeout(None if leave is None else leave * self.usual_s):
                answer = await client.recognize(picture(number), labels)
        except TimeoutError:
            self.left += 1
            return
        except Exception as error:
            self.failed[type(error).__name__] += 1
            return
        self.usual_s += 0.1 * (time.monotonic() - began - self.usual_s)
        mine = {answer.answer, *(candidate.label for candidate in answer.candidates)} == set(labels)
        self.right, self.foreign = self.right + mine, self.foreign + (not mine)
        if answer.adaptation.status == "queued" and answer.adaptation.query_id:
            self.foreign += answer.adaptation.query_id in self.kept
            self.kept.add(answer.adaptation.query_id)


@promise("R8", "disconnects never mix replies")
def replies_are_never_mixed(trial: Trial) -> Found:
    """Of many requests, each with labels of its own, three in ten are given up at a random moment."""
    times, together, slots = trial.times(200, 20_000), 12, 24
    dice, found, numbers = trial.dice, Replies(), iter(range(10**9))

    async def ask_some(product: Product) -> None:
        mine = list(islice(numbers, times // 2))[::-1]

        async def ask(client: AsyncClient) -> None:
            while mine:
                await found.ask(client, mine.pop(), dice.random() if dice.random() < 0.3 else None)

        async with AsyncClient(product.url, max_retries=0) as client:
            await asyncio.gather(*(ask(client) for _ in range(together)))

    with Product(trial.folder / "home", **ALONE | {"queue_size": slots}) as product:
        asyncio.run(ask_some(product))  # opens what is opened once: connections to Redis, threads
        before = open_files(product)
        asyncio.run(ask_some(product))
        eventually(lambda: free(product))
        leaked = asyncio.run(refused(product, slots))
        with suppress(TimeoutError):
            eventually(lambda: open_files(product) <= before, 10)
        grown = open_files(product) - before
    _, kept = left(product.home)
    missing = len(found.kept - kept)
    figure = f"{found.foreign} foreign of {found.right + found.foreign}, {found.left} left, {missing} of "
    figure += f"{len(found.kept)} kept ones missing, {leaked} slots leaked, {grown:+d} files {dict(found.failed)}"
    good = not (found.foreign or found.failed or missing or leaked) and grown <= 0
    return Found(good and found.left > times / 20 and found.right > times / 2, figure)


@promise("O2", "abandoned work stops", timed=True)
def abandoned_work_stops(trial: Trial) -> Found:
    """Clients leave while answers without an end grow; half of them had asked for several at once."""
    num, rounds = 16, trial.times(1, 13)
    dice, freed_s, computed_s = trial.dice, 0.0, 0.0
    image = encoded(0)
    greedy = {"image": image, "question": "what is this?", "max_tokens": 900, "adapt": False}
    drawn = greedy | {"n": 8, "max_tokens": 900, "temperature": 1.0}

    async def leave(http: httpx2.AsyncClient, number: int) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(dice.uniform(0.3, 1.0)):
                await http.post("/answer", json=drawn if number % 2 else greedy)
                raise RuntimeError("it was answered before anybody could leave")

    async def all_leave() -> None:
        async with httpx2.AsyncClient(base_url=product.url, timeout=120) as http:
            await asyncio.gather(*(leave(http, number) for number in range(num)))

    with Product(trial.folder / "home", "endless", **ALONE | {"queue_size": num}) as product:
        asyncio.run(refused(product, 2))
        began = time.monotonic()
        httpx2.post(f"{product.url}/answer", json=greedy, timeout=120).raise_for_status()
        whole_s = time.monotonic() - began
        for _ in range(rounds):
            asyncio.run(all_leave())
            began = time.monotonic()
            with suppress(TimeoutError):
                eventually(partial(free, product), 15)
            freed_s = max(freed_s, time.monotonic() - began)
            spent = _processor_s(product)
            time.sleep(1)
            computed_s = max(computed_s, _processor_s(product) - spent)
        leaked = asyncio.run(refused(product, num))
    figure = (
        f"freed after {freed_s:.2f} s (one answer takes {whole_s:.1f} s), then {computed_s:.2f} s computed in "
    )
    figure += f"the next second; {leaked} slots leaked"
    return Found(freed_s <= 1 and computed_s <= 0.25 and leaked == 0 and whole_s > 1.5, figure)


def _processor_s(product: Product) -> float:
    """Seconds of a processor that the server has used."""
    fields = Path(f"/proc/{product.pid('server')}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- who restarts ------------------------------------------------------------------------------------


@promise("O3", "a restart loses nothing", timed=True)
def a_restart_loses_nothing(trial: Trial) -> Found:
    """SIGTERM to a server that learns, while clients of the SDK ask on and on, who try ten times.

    Not ready is also whoever does not listen any more: that is how it ends here, at once.
    """
    dice, asked, turned_s, ended_s = trial.dice, Answered(), 0.0, 0.0
    product = Product(trial.folder / "home", port=_free_port(), **QUICK)

    def some_more() -> None:
        enough = len(asked.told) + 10
        eventually(lambda: len(asked.told) >= enough)

    with product, asked.busy(product.url):
        for _ in range(trial.times(1, 20)):
            some_more()
            time.sleep(dice.uniform(0, 0.5))
            began = time.monotonic()
            os.kill(product.pid("server") or 0, signal.SIGTERM)
            eventually(lambda: not _is_ready(product.url))
            turned_s = max(turned_s, time.monotonic() - began)
            code = product.stop()
            ended_s = max(ended_s, time.monotonic() - began)
            asked.failures += [f"exit code {code}"] if code else []
            product.start()
        some_more()
    counts, kept = left(product.home)
    settled = sum(counts.get(outcome, 0) for outcome in OUTCOMES)
    lost = max(0, len(asked.kept - kept) - settled)
    figure = (
        f"{len(asked.failures)} of {len(asked.told)} failed {asked.failures[:1]}, {lost} of {len(asked.kept)} "
    )
    figure += f"kept ones lost, not ready after {turned_s:.2f} s, ended after {ended_s:.1f} s"
    return Found(not asked.failures and lost == 0 and turned_s <= 1 and ended_s <= 30, figure)


@dataclass
class Answered:
    """What clients that retry were told."""

    told: list[str] = field(default_factory=list)
    kept: set[str] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def busy(self, url: str, clients: int = 4) -> Iterator[None]:
        """Clients that ask on and on."""
        numbers, lock = iter(range(10**9)), threading.Lock()

        def ask(stop: threading.Event) -> None:
            with Client(url, max_retries=10) as client:
                while not stop.is_set():
                    with lock:
                        number = next(numbers)
                    self._once(client, number)

        with going_on(*[ask] * clients):
            yield

    def _once(self, client: Client, number: int) -> None:
        try:
            answer = client.recognize(picture(number), LABELS)
        except Exception as error:
            self.failures.append(f"{type(error).__name__}: {error}")
            return
        self.told.append(answer.id)
        if answer.adaptation.status == "queued" and answer.adaptation.query_id:
            self.kept.add(answer.adaptation.query_id)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx2.RequestError:
        return False  # nobody listens any more


# --- who stalls --------------------------------------------------------------------------------------

DEADLINE_S, GRACE_S, EXIT_S = 10.0, 1.0, 30.0


@promise("O4", "nothing hangs", timed=True)
def nothing_hangs(trial: Trial) -> Found:
    """Every kind of request while Redis, the worker (in the middle of publishing) or the model stands still.

    Then the server is told to end while its model still does.
    """
    slow: list[str] = []
    most_s: dict[str, float] = {}
    for number in range(trial.times(1, 5)):
        settings = QUICK | {"request_timeout_s": DEADLINE_S}
        product = Product(trial.folder / f"home{number}", "stalls", **settings)
        with product:
            _ready_to_stall(product)
            for part in ("redis", "worker", "model"):
                with _stalled(product, part):
                    spent = _ask_everything(product)
                    if part == "model":
                        began = time.monotonic()
                        product.stop()
                        spent["ending"] = time.monotonic() - began - (EXIT_S - DEADLINE_S)
                slow += [f"{what} ({part})" for what, spent_s in spent.items() if spent_s > DEADLINE_S + GRACE_S]
                most_s[part] = max(most_s.get(part, 0), *(s for what, s in spent.items() if what != "ending"))
                most_s["ending"] = spent.get("ending", 0) + EXIT_S - DEADLINE_S
    figure = ", ".join(f"{part} {spent_s:.1f} s" for part, spent_s in most_s.items())
    return Found(not slow, f"slowest while stalled: {figure}; too slow: {slow[:3]}")


def _ready_to_stall(product: Product) -> None:
    with product.client() as client:
        client.recognize(picture(0), LABELS)
        eventually(lambda: client.adaptation.status().worker.state != "absent")


@contextmanager
def _stalled(product: Product, part: str) -> Iterator[None]:
    """Let a part of the product stand still; the worker with the lock of the store in its hands."""
    if part == "model":
        marker = product.home / "stalled"
        marker.touch()
        try:
            yield
        finally:
            marker.unlink()
        return
    pid = product.pid(part)  # type: ignore[arg-type]
    assert pid
    with (product.home / "store" / "default" / ".lock").open("w") as file:
        if part == "worker":
            fcntl.flock(file, fcntl.LOCK_EX)
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)


def _ask_everything(product: Product) -> dict[str, float]:
    """How long each kind of request took when all were made at once, in seconds."""
    key = (product.home / "admin.key").read_text().strip()
    spent: dict[str, float] = {}

    def ask(method: str, path: str, body: Any) -> None:
        began = time.monotonic()
        with suppress(httpx2.TimeoutException):
            http.request(method, path, json=body)
        name = f"{method} {path}"
        spent[name] = max(spent.get(name, 0), time.monotonic() - began)

    asked, headers = list(_requests()), {"Authorization": f"Bearer {key}"}
    with (
        httpx2.Client(base_url=product.url, headers=headers, timeout=3 * DEADLINE_S) as http,
        ThreadPoolExecutor(len(asked)) as pool,
    ):
        list(pool.map(lambda each: ask(*each), asked))
    return spent


def _requests() -> Iterator[tuple[str, str, Any]]:
    for number in range(4):
        yield "POST", "/answer", {"image": encoded(random.randrange(10**6)), "question": f"what is {number}?"}
    yield (
        "POST",
        "/answer",
        {"image": encoded(5), "candidate_labels": ["a", "b"], "adapt": "now", "deadline_s": 60},
    )
    yield "POST", "/answer", {"image": encoded(6), "question": "what is this?", "adapter": "base"}
    for path in ("/livez", "/readyz", "/info", "/v1/adaptation", "/v1/adapters/default", "/v1/audit"):
        yield "GET", path, None
    yield "POST", "/v1/adapters/default/snapshot", {"label": f"kept{random.randrange(10**6)}"}
    yield "POST", "/v1/adapters/default/rollback", {}
    yield "POST", "/v1/adapters/default/reset", {"purge_buffer": True}
    yield "POST", "/v1/adaptation/erase", {"query_ids": ["q_unknown"]}
    yield "POST", "/v1/adaptation/pause", None
    yield "POST", "/v1/adaptation/resume", None


# --- the event loop ----------------------------------------------------------------------------------


LAG_S, WINDOW_S = 0.1, 4.0


@promise("O6", "the event loop stays responsive", timed=True)
def the_loop_stays_responsive(trial: Trial) -> Found:
    """Large images in every form and many small questions; the loop notes how late it comes to a timer.

    Whatever keeps the loop does so with every such request, and so in each of a few windows; a neighbour of this
    machine that keeps the processors (an idle loop has been 90 ms late here) is away in some. So the best window
    counts and, in all of them, what the loop's own thread computed at a stretch, which no neighbour makes longer.
    """
    late_s, computed_s, statuses = [], [], Counter[int]()
    with Product(trial.folder / "home", "notes-lag", **ALONE) as product:
        asyncio.run(refused(product, 4))
        with _asking(product, statuses):
            for _ in range(trial.times(3, 30)):
                (product.home / "lag").unlink()
                time.sleep(WINDOW_S)
                late, computed = map(float, (product.home / "lag").read_text().split())
                late_s.append(late)
                computed_s.append(computed)
    told = ", ".join(f"{1e3 * late:.0f}" for late in sorted(late_s)[:5])
    figure = f"late by {told} ms at most in windows of {WINDOW_S:.0f} s, {1e3 * max(computed_s):.0f} ms of them "
    figure += f"at work; {statuses[200]} of {statuses.total()} answered"
    good = min(late_s) <= LAG_S and max(computed_s) <= LAG_S
    return Found(good and statuses[200] == statuses.total() > 20, figure)


@contextmanager
def _asking(product: Product, statuses: Counter[int]) -> Iterator[None]:
    """Clients that send large images, as a form and as base64, and small ones."""
    large = _large()
    askers = [partial(_send_large, "form", large), partial(_send_large, "base64", large), _send_small, _send_small]

    def ask(send: Callable[[httpx2.Client], httpx2.Response], stop: threading.Event) -> None:
        with httpx2.Client(base_url=product.url, timeout=60) as http:
            while not stop.is_set():
                statuses[send(http).status_code] += 1

    with going_on(*(partial(ask, asker) for asker in askers)):
        yield


def _large() -> bytes:
    """A photo of 11 megabytes, that no compression makes smaller."""
    from PIL import Image

    noise = numpy.random.default_rng(0).integers(0, 256, (2600, 3400, 3), dtype=numpy.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG", quality=90)
    return file.getvalue()


def _send_large(kind: str, data: bytes, http: httpx2.Client) -> httpx2.Response:
    if kind == "form":
        fields = {"question": "what is this?", "adapt": "true"}
        return http.post("/answer", files={"image": ("i.jpg", data)}, data=fields)
    body = {"image": base64.b64encode(data).decode(), "question": "what is this?"}
    return http.post("/answer", json=body, headers={"Idempotency-Key": os.urandom(8).hex()})


def _send_small(http: httpx2.Client) -> httpx2.Response:
    body = {"image": encoded(random.randrange(1000)), "question": "what is this?"}
    return http.post("/answer", json=body)
