"""The serving model on its own thread, and the versions that are loaded into it, whatever the adapter.

One thread answers, together what waits (`answering.py`). A version that is asked for is read, verified, copied
into a slot and probed by a second thread. A slot is given to another version only when nobody leases its version.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

import structlog
import torch
from torch import Tensor

from servetune.adapters.policy import Policy
from servetune.adapters.sharing import release_memory
from servetune.adapters.store import AdapterStore
from servetune.adapters.types import BASE
from servetune.adapters.versions import CorruptVersion, version_name
from servetune.server.answering import Answering, Resident
from servetune.server.settings import Settings

T = TypeVar("T")
SLOTS = ("slot0", "slot1", "slot2")
"""What a policy that serves begins with, and as many versions as one adapter may have loaded beside the base."""

PROBE_TOLERANCE = 1e-2
PAYS = 1.25  # how much slower half as many threads must be for the others to pay
STOP_S, STOP_POLL_S = 5.0, 0.01  # longest wait for a thread that has been told to end
TRIALS, LONG_S = 3, 2.0  # of each number of threads, or seconds; the fastest counts

log = structlog.get_logger()


class QueueFull(Exception):
    """As many requests wait, or as many versions are in use, as this process can hold."""


class Stage:
    """What the engines of all adapters share. Its methods run on the event loop's thread."""

    def __init__(self, policy: Policy, settings: Settings) -> None:
        self.policy = policy
        self.answering = Answering(policy, settings.prompt_cache_bytes)
        self.waiting = 0  # requests that are with the model or wait for it
        self.stands_still = False
        self._settings = settings
        # The number of threads is a property of each thread that calls torch.
        self._thread = ThreadPoolExecutor(1, "model", torch.set_num_threads, (settings.serve_threads,))
        self._loader = ThreadPoolExecutor(1, "loader", torch.set_num_threads, (1,))
        self._resident: dict[tuple[str, int], Resident] = {}  # by adapter and version, least recently used first
        self._served: dict[str, int] = {}  # the version that each adapter serves
        self._leases: Counter[tuple[str, int]] = Counter()
        self._running: set[threading.Event] = set()  # set one, and its generation ends
        self._loading = asyncio.Lock()
        self._is_warm = False

    # --- life ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Be as fast with the first answer as with the next ones."""
        if not self._is_warm:
            await self.run(self._warm)
            self._is_warm = True

    def _warm(self) -> None:
        self.policy.warm()
        threads = fewest_threads(self.policy.rehearse, self._settings.serve_threads)
        log.info("threads_chosen", threads=threads, at_most=self._settings.serve_threads)
        release_memory()  # what loading took
        gc.freeze()  # or a full collection goes through all of the libraries' objects: 0.2 s of nothing else

    async def stop(self) -> None:
        """End the generation under way and refuse further ones; `stands_still` says if that came to no end."""
        for stop in self._running:
            stop.set()
        self.answering.cancel()
        try:
            async with asyncio.timeout(STOP_S):
                for thread in (self._loader, self._thread):
                    await _ended(thread)
        except TimeoutError:
            self.stands_still = True

    def wait_s(self, ahead: int) -> float:
        """How long a request will wait for so many others, going by how long answers have taken of late."""
        return ahead * self.answering.pace_s

    # --- the thread ----------------------------------------------------------------------------------

    async def run(self, job: Callable[[], T]) -> T:
        """Something short, when what was asked before is answered."""
        future: Future[T] = self._thread.submit(job)
        return await asyncio.wrap_future(future)

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """The same, for who waits in another way."""
        return self._thread.submit(job)

    async def perform(self, resident: Resident, submit: Callable[[threading.Event], Future[T]]) -> T:
        """What is submitted to the thread for a version, at the end of the queue. Raises QueueFull."""
        if self.waiting >= self._settings.queue_size:
            raise QueueFull
        stop = threading.Event()
        job = submit(stop)
        self._leases[resident.key] += 1
        self.waiting += 1
        # The lease ends when the thread is done with it, not when an impatient caller is.
        loop = asyncio.get_running_loop()
        job.add_done_callback(lambda _: loop.call_soon_threadsafe(self._release, resident.key))
        self._running.add(stop)
        try:
            return await asyncio.wrap_future(job)
        finally:
            stop.set()  # whoever is cancelled or too late does not keep the model
            self._running.discard(stop)

    def _release(self, key: tuple[str, int]) -> None:
        self.waiting -= 1
        self._leases[key] -= 1

    # --- versions ------------------------------------------------------------------------------------

    def introduce(self, store: AdapterStore) -> None:
        """An adapter, whose base is there without being loaded."""
        base = Resident(store.name, BASE, None, store.manifest(BASE).digest)
        self._resident[base.key] = base

    @asynccontextmanager
    async def hold(self, store: AdapterStore, version: int) -> AsyncIterator[Resident]:
        """Lease a version, also while nothing runs on it: its slot is not given to another.

        Raises QueueFull, and UnknownVersion or CorruptVersion as the store does.
        """
        key = store.name, version
        self._leases[key] += 1
        try:
            yield await self.load(store, version)
        finally:
            self._leases[key] -= 1

    async def load(self, store: AdapterStore, version: int) -> Resident:
        """A version with its weights loaded and verified. Raises as `hold` does."""
        key = store.name, version
        if key not in self._resident:  # who asks a resident version does not wait while another is loaded
            async with self._loading:
                if key not in self._resident:
                    self._resident[key] = await self._loaded(store, version)
        self._resident[key] = self._resident.pop(key)  # most recently used
        return self._resident[key]

    def serve(self, store: AdapterStore, version: int) -> None:
        """From now on this version, which is loaded, is what the adapter answers with."""
        self._served[store.name] = version

    def residency(self, adapter: str) -> tuple[list[int], dict[int, int]]:
        """Versions of an adapter that are loaded (the base always is), and how many requests hold each."""
        versions = {BASE, *(version for name, version in self._resident if name == adapter)}
        leases = {version: num for (name, version), num in self._leases.items() if num and name == adapter}
        return sorted(versions), leases

    async def forget(self, adapter: str, versions: Collection[int]) -> None:
        """Keep neither what was seen nor, once their last answer is given, versions that are gone.

        Raises TimeoutError where the model stands still; it forgets when it goes on.
        """
        for version in versions:
            key = adapter, version
            if not self._leases[key] and version != self._served.get(adapter):  # until another is loaded
                self._resident.pop(key, None)
        async with asyncio.timeout(self._settings.request_timeout_s):
            await asyncio.shield(self.run(self._forget))  # it comes to it, however late

    def _forget(self) -> None:
        self.policy.forget_images()
        self.answering.forget_prompts()

    async def _loaded(self, store: AdapterStore, version: int) -> Resident:
        slot = await self._free_slot(store.name)
        hold = await asyncio.to_thread(store.hold, version)
        manifest = await asyncio.to_thread(store.manifest, version)
        weights = await asyncio.to_thread(store.weights, version)
        loading = self._loader.submit(self._load, slot, weights, manifest.probe, version)
        await asyncio.wrap_future(loading)
        return Resident(store.name, version, slot, manifest.digest, manifest.temperature, hold)

    async def examine(self, store: AdapterStore, weights: Mapping[str, Tensor]) -> tuple[float, ...]:
        """What weights that are no version yet make of the probe, in a slot that is free again afterwards.

        Raises QueueFull where every slot is leased, and ValueError where they do not fit the model.
        """
        async with self._loading:
            slot = await self._free_slot(store.name)
            return await asyncio.wrap_future(self._loader.submit(self._probed, slot, weights))

    async def _free_slot(self, adapter: str) -> str:
        """A slot that nobody uses or leases. One adapter takes no more than its part, however much it swaps."""
        own = [key for key, resident in self._resident.items() if key[0] == adapter and resident.slot]
        used = {resident.slot for resident in self._resident.values()}
        if len(own) < len(SLOTS):
            if free := [slot for slot in self.policy.slots if slot not in used]:
                return free[0]
            if len(self.policy.slots) < self._settings.resident_versions:
                return await self.run(self._add_slot)
        serving = adapter, self._served.get(adapter, BASE)
        others = own if len(own) >= len(SLOTS) else list(self._resident)
        idle = [key for key in others if not self._leases[key] and key != serving and self._resident[key].slot]
        for key in sorted(idle, key=lambda key: self._served.get(key[0]) == key[1]):  # what is served goes last
            slot = self._resident.pop(key).slot
            assert slot
            return slot
        raise QueueFull

    def _add_slot(self) -> str:
        name = f"slot{len(self.policy.slots)}"
        self.policy.add(name)
        return name

    def _load(self, slot: str, weights: Mapping[str, Tensor], probe: tuple[float, ...], version: int) -> None:
        """Fill a slot and make sure that it answers as it did where it was made."""
        try:
            ours = self._probed(slot, weights)
        except ValueError as error:
            raise CorruptVersion(f"{version_name(version)}: {error}") from error
        if not is_same_probe(ours, probe):
            raise CorruptVersion(f"{version_name(version)} does not answer its probe as it did when it was made")

    def _probed(self, slot: str, weights: Mapping[str, Tensor]) -> tuple[float, ...]:
        self.policy.load(slot, weights)
        self.policy.use(slot)
        return self.policy.probe()


def is_same_probe(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether two probes are of the same weights on the same model, as far as machines differ."""
    if len(ours) != len(theirs):
        return False
    made = torch.tensor(theirs)
    atol = PROBE_TOLERANCE * float(made.abs().max())
    return torch.allclose(torch.tensor(ours), made, rtol=PROBE_TOLERANCE, atol=atol)


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
