"""The serving policy on its own thread: answers, and swaps between answers.

One thread answers, together what waits (`answering.py`). A request leases the version it was
admitted with; a new version is read, verified, copied into a free slot and probed by a second thread, and becomes
current by one assignment. A slot is reused only when nobody leases its version.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import structlog
import torch
from torch import Tensor

from servetune.adapters.looks import Look, Looks
from servetune.adapters.policy import Policy
from servetune.adapters.sharing import release_memory
from servetune.adapters.store import AdapterStore
from servetune.adapters.types import BASE, Query, Sampling
from servetune.adapters.versions import CorruptVersion, StoreError, version_name
from servetune.server.answering import Answering, Choice, Found, Job, Resident, entropy
from servetune.server.settings import Settings

T = TypeVar("T")
SLOTS = ("slot0", "slot1", "slot2")
PROBE_TOLERANCE = 1e-2
PAYS = 1.25  # how much slower half as many threads must be for the others to pay
STOP_S, STOP_POLL_S = 5.0, 0.01  # longest wait for a thread that has been told to end
TRIALS, LONG_S = 3, 2.0  # of each number of threads, or seconds; the fastest counts

log = structlog.get_logger()


class QueueFull(Exception):
    """As many requests wait, or as many versions are in use, as this process can hold."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the engine made of a query, with the version that made it. Probabilities are in 0..1.

    `views` counts the looks that were pooled into the answer, `rollouts` what was drawn for pooling.
    """

    text: str | None
    confidence: float | None
    candidates: list[tuple[str, float]]
    finish_reason: str  # stop, length, unparsed
    label_mass: float | None
    argmax_is_label: bool | None
    votes: dict[str, float] | None
    entropy: float | None
    input_tokens: int
    output_tokens: int
    version: int
    alias: str | None
    digest: str
    queue_s: float
    inference_s: float
    choices: tuple[Choice, ...] = ()
    views: int = 1
    rollouts: int = 0


@dataclass(frozen=True, slots=True)
class Swap:
    """A change of what is served, how long it took from being noticed, and why it was refused, if it was."""

    version: int
    previous: int
    seconds: float
    refused: str | None = None


class Engine:
    """Answers queries with any version of one adapter. Its methods run on the event loop's thread.

    `on_swap` is told of every swap, also of those that are refused.
    """

    def __init__(self, policy: Policy, store: AdapterStore, settings: Settings) -> None:
        self.store = store
        self.model_name = settings.model
        self.base_digest = store.manifest(BASE).base_digest
        self.device = str(policy.family.device)
        self.dtype = str(policy.family.model.dtype).removeprefix("torch.")
        self.recognition_question = settings.recognition_question or policy.family.recognition_question
        self.serving = BASE
        self.stands_still = False
        self.on_swap: Callable[[Swap], None] = lambda swap: None
        self._policy = policy
        self._settings = settings
        # The number of threads is a property of each thread that calls torch.
        self._thread = ThreadPoolExecutor(1, "engine", torch.set_num_threads, (settings.serve_threads,))
        self._loader = ThreadPoolExecutor(1, "loader", torch.set_num_threads, (1,))
        self._answering = Answering(policy, settings.prompt_cache_bytes)
        self._base = Resident(BASE, None, store.manifest(BASE).digest)
        self._resident: dict[int, Resident] = {}  # besides the base, least recently used first
        self._leases: Counter[int] = Counter()
        self._running: set[threading.Event] = set()  # set one, and its generation ends
        self._waiting = 0
        self._loading = asyncio.Lock()
        self._refused: tuple[int, int] | None = None  # (generation, version) that failed verification
        self._watcher: asyncio.Task[None] | None = None

    # --- life ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the live version and begin to follow the alias."""
        await self.refresh()
        await self._run(self._warm)
        self._watcher = asyncio.create_task(self._watch())

    def _warm(self) -> None:
        self._policy.warm()
        threads = fewest_threads(self._policy.rehearse, self._settings.serve_threads)
        log.info("threads_chosen", threads=threads, at_most=self._settings.serve_threads)
        release_memory()  # what loading took
        gc.freeze()  # or a full collection goes through all of the libraries' objects: 0.2 s of nothing else

    async def stop(self) -> None:
        """End the generation under way and refuse further ones; `stands_still` says if that came to no end."""
        if self._watcher:
            self._watcher.cancel()
        for stop in self._running:
            stop.set()
        self._answering.cancel()
        try:
            async with asyncio.timeout(STOP_S):
                for thread in (self._loader, self._thread):
                    await _ended(thread)
        except TimeoutError:
            self.stands_still = True

    def ready(self) -> bool:
        """Has `start` verified a version?"""
        return self._watcher is not None

    def wait_s(self, ahead: int) -> float:
        """How long a request will wait for so many others, going by how long answers have taken of late."""
        return ahead * self._answering.pace_s

    @property
    def waiting(self) -> int:
        """Requests that are with the model or wait for it."""
        return self._waiting

    @property
    def batches(self) -> Mapping[int, int]:
        """How often so many requests were answered together."""
        return dict(self._answering.batches)

    async def ping(self) -> None:
        """A no-op through the engine's thread."""
        await self._run(lambda: None)

    def residency(self) -> tuple[list[int], dict[int, int]]:
        """Versions whose weights are loaded (the base always is), and how many requests hold each."""
        return sorted({BASE, *self._resident}), {v: n for v, n in self._leases.items() if n}

    # --- answers -------------------------------------------------------------------------------------

    async def answer(
        self,
        query: Query,
        sampling: Sampling,
        choice: str,
        deadline: float | None = None,
        listen: Callable[[str], None] | None = None,
    ) -> Outcome:
        """Answer with the version that `choice` names now, whatever is swapped meanwhile.

        `listen` is told the text so far of a single answer that grows, on the event loop's thread.

        With a deadline, in seconds of the event loop's clock, the same version looks at the query again in further
        views while there is time, and all looks are pooled. Each look takes a place at the end of the queue. A
        deadline that is too short, and a look that fails, leave the answer as it is.

        Raises:
            UnknownVersion: no such alias or version.
            CorruptVersion: that version does not pass verification.
            QueueFull: too many requests wait, or three other versions are in use.
        """
        asked = time.perf_counter()
        version = self.serving if choice == "live" else await asyncio.to_thread(self.store.resolve, choice)
        looks: Looks | None = None
        async with self._hold(version) as resident:
            whole = (
                sampling if deadline is None else replace(sampling, top_k=max(sampling.top_k, len(query.labels)))
            )
            ask = partial(self._ask, query, whole, resident, listen=listen and _from_thread(listen))
            found = await self._on_thread(resident, ask)
            inference_s = found.inference_s
            if deadline is not None:
                looks = Looks(query, sampling, dict(found.candidates), resident.temperature)
                inference_s += await self._look_again(resident, looks, deadline, inference_s)
                found = _pooled(found, looks, sampling)
        return Outcome(
            text=found.text,
            confidence=found.confidence,
            candidates=found.candidates,
            finish_reason=found.finish_reason,
            label_mass=found.label_mass,
            argmax_is_label=found.argmax_is_label,
            votes=found.votes,
            entropy=found.entropy,
            choices=found.choices,
            input_tokens=found.input_tokens,
            output_tokens=found.output_tokens,
            version=resident.version,
            alias=None if choice == version_name(version) else choice,
            digest=resident.digest,
            queue_s=time.perf_counter() - asked - inference_s,
            inference_s=inference_s,
            views=max(1, len(looks.found)) if looks else 1,
            rollouts=sum(look.num_rollouts for look in looks.found) if looks else 0,
        )

    async def _look_again(self, resident: Resident, looks: Looks, deadline: float, expected_s: float) -> float:
        """Look while one more look, if it takes what the longest did, ends in time. Returns seconds computed."""
        clock = asyncio.get_running_loop().time
        computed_s = 0.0
        while not looks.done and (began := clock()) + expected_s <= deadline:
            try:
                async with asyncio.timeout_at(deadline):
                    look, look_s = await self._on_thread(
                        resident, partial(self._look_on_thread, looks, resident.slot)
                    )
            except (QueueFull, TimeoutError):  # others need the model more, or have kept it for too long
                break
            except Exception as error:  # there is an answer already
                log.warning("look_failed", error=type(error).__name__)
                break
            looks.found.append(look)
            computed_s += look_s
            expected_s = max(expected_s, clock() - began)
        return computed_s

    @asynccontextmanager
    async def _hold(self, version: int) -> AsyncIterator[Resident]:
        """Lease a version, also while nothing runs on it: its slot is not given to another."""
        self._leases[version] += 1
        try:
            yield await self._make_resident(version)
        finally:
            self._leases[version] -= 1

    async def _on_thread(self, resident: Resident, submit: Callable[[threading.Event], Future[T]]) -> T:
        """What is submitted to the thread for a version, at the end of the queue. Raises QueueFull."""
        if self._waiting >= self._settings.queue_size:
            raise QueueFull
        stop = threading.Event()
        job = submit(stop)
        self._leases[resident.version] += 1
        self._waiting += 1
        # The lease ends when the thread is done with it, not when an impatient caller is.
        loop = asyncio.get_running_loop()
        job.add_done_callback(lambda _: loop.call_soon_threadsafe(self._release, resident.version))
        self._running.add(stop)
        try:
            return await asyncio.wrap_future(job)
        finally:
            stop.set()  # whoever is cancelled or too late does not keep the model
            self._running.discard(stop)

    def _release(self, version: int) -> None:
        self._waiting -= 1
        self._leases[version] -= 1

    def _ask(
        self,
        query: Query,
        sampling: Sampling,
        version: Resident,
        stop: threading.Event,
        listen: Callable[[str], None] | None = None,
    ) -> Future[Found]:
        """Let a query wait; every query comes with a turn, and a turn answers all that it can together."""
        job = Job(query, sampling, version, stop, Future(), listen)
        self._answering.add(job)
        self._thread.submit(self._answering.turn)
        return job.found

    def _look_on_thread(self, looks: Looks, slot: str | None, stop: threading.Event) -> Future[tuple[Look, float]]:
        return self._thread.submit(self._look, slot, stop, looks)

    def _look(self, slot: str | None, stop: threading.Event, looks: Looks) -> tuple[Look, float]:
        began = time.perf_counter()
        self._policy.use(slot)
        return looks.take(self._policy, stop), time.perf_counter() - began

    # --- versions ------------------------------------------------------------------------------------

    async def refresh(self) -> int:
        """Serve what the alias `live` names now; a version that fails verification is not served.

        Returns:
            the version served afterwards.
        """
        live = await asyncio.to_thread(self.store.live)
        if live.version == self.serving or self._refused == (live.generation, live.version):
            return self.serving
        began = time.perf_counter()
        try:
            await self._make_resident(live.version)
        except (StoreError, RuntimeError) as error:  # torch raises RuntimeError, out of memory included
            self._refused = (live.generation, live.version)
            log.error("swap_refused", version=version_name(live.version), error=type(error).__name__)
            self.on_swap(Swap(live.version, self.serving, time.perf_counter() - began, type(error).__name__))
        except QueueFull:
            pass  # all slots are leased: the swap waits, the requests do not
        else:
            before, self.serving = self.serving, live.version
            if before != self.serving:  # an operator's act and the watch may both have waited for it
                log.info("swapped", version=version_name(live.version), previous=version_name(before))
                self.on_swap(Swap(live.version, before, time.perf_counter() - began))
        return self.serving

    async def forget(self, versions: Collection[int]) -> None:
        """Keep neither what was seen nor, once their last answer is given, versions that are gone.

        Raises TimeoutError where the model stands still; it forgets when it goes on.
        """
        for version in versions:
            if not self._leases[version] and version != self.serving:  # until another is loaded
                self._resident.pop(version, None)
        async with asyncio.timeout(self._settings.request_timeout_s):
            await asyncio.shield(self._run(self._forget))  # it comes to it, however late

    def _forget(self) -> None:
        self._policy.forget_images()
        self._answering.forget_prompts()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._settings.swap_poll_s)
            try:
                await self.refresh()
            except Exception as error:  # nothing that happens to a new version may end the serving of the old
                log.error("refresh_failed", error=type(error).__name__)

    async def _make_resident(self, version: int) -> Resident:
        """A version with its weights loaded and verified. Raises QueueFull, CorruptVersion."""
        if version == BASE:
            return self._base
        if version not in self._resident:  # who asks a resident version does not wait while another is loaded
            async with self._loading:
                if version not in self._resident:
                    self._resident[version] = await self._loaded(version)
        self._resident[version] = self._resident.pop(version)  # most recently used
        return self._resident[version]

    async def _loaded(self, version: int) -> Resident:
        slot = self._free_slot()
        manifest = await asyncio.to_thread(self.store.manifest, version)
        weights = await asyncio.to_thread(self.store.weights, version)
        loading = self._loader.submit(self._load, slot, weights, manifest.probe, version)
        await asyncio.wrap_future(loading)
        return Resident(version, slot, manifest.digest, manifest.temperature)

    def _free_slot(self) -> str:
        used = {resident.slot for resident in self._resident.values()}
        for slot in SLOTS:
            if slot not in used:
                return slot
        for version, resident in self._resident.items():
            if version != self.serving and not self._leases[version] and resident.slot:
                del self._resident[version]
                return resident.slot
        raise QueueFull

    def _load(self, slot: str, weights: Mapping[str, Tensor], probe: tuple[float, ...], version: int) -> None:
        """Fill a slot and make sure that it answers as it did where it was made."""
        try:
            self._policy.load(slot, weights)
        except ValueError as error:
            raise CorruptVersion(f"{version_name(version)}: {error}") from error
        self._policy.use(slot)
        ours, theirs = torch.tensor(self._policy.probe()), torch.tensor(probe)
        if not torch.allclose(
            ours, theirs, rtol=PROBE_TOLERANCE, atol=PROBE_TOLERANCE * float(theirs.abs().max())
        ):
            raise CorruptVersion(f"{version_name(version)} does not answer its probe as it did when it was made")

    async def _run(self, job: Callable[[], T]) -> T:
        future: Future[T] = self._thread.submit(job)
        return await asyncio.wrap_future(future)


def _from_thread(listen: Callable[[str], None]) -> Callable[[str], None]:
    """Passes on what another thread says to who listens on the loop that runs here."""
    loop = asyncio.get_running_loop()

    def tell(text: str) -> None:
        loop.call_soon_threadsafe(listen, text)

    return tell


async def _ended(pool: ThreadPoolExecutor) -> None:
    """Take no more work, and wait for what runs."""
    pool.shutdown(wait=False, cancel_futures=True)
    while any(thread.is_alive() for thread in pool._threads):
        await asyncio.sleep(STOP_POLL_S)


def fewest_threads(work: Callable[[], object], most: int) -> int:
    """Let the calling thread use half as many threads for tensors as long as that hardly costs; how many are left.

    A small model is no faster with more threads than its matrices are worth, and waits for each of them wherever
    another process wants a processor too.
    """
    chosen, best_s = most, _fastest_s(work, most)
    while chosen > 1:  # downwards: a large model is not to be tried with one thread
        spent_s = _fastest_s(work, chosen // 2)
        if spent_s > PAYS * best_s:
            break
        chosen, best_s = chosen // 2, min(best_s, spent_s)
    torch.set_num_threads(chosen)
    return chosen


def _fastest_s(work: Callable[[], object], threads: int) -> float:
    torch.set_num_threads(threads)
    spent_s: list[float] = []
    while len(spent_s) < TRIALS and sum(spent_s) < LONG_S:
        began = time.perf_counter()
        work()
        spent_s.append(time.perf_counter() - began)
    return min(spent_s)


def _pooled(found: Found, looks: Looks, sampling: Sampling) -> Found:
    """The answer of all looks together; with a single look the one that was found, cut to what was asked for."""
    if len(looks.found) < 2:
        cut = sampling.top_k if looks.query.labels else len(found.candidates)
        return replace(found, candidates=found.candidates[:cut])
    ranked = looks.ranked()
    text, share = ranked[0]
    drawn = sum(look.num_tokens for look in looks.found)
    return replace(
        found,
        text=text,
        confidence=share,
        candidates=ranked[: sampling.top_k],
        finish_reason="stop",
        output_tokens=len(looks.found[-1].tokens[text]) + drawn,
        entropy=entropy([share for _, share in ranked]),
    )
