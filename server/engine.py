"""One adapter's answers: which version answers a request, and when `live` moves on to another.

A request leases the version it was admitted with; a new version is loaded beside it and becomes current by one
assignment.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial

import structlog

from servetune.adapters.conduct import Conduct
from servetune.adapters.looks import Look, Looks
from servetune.adapters.parcel import Parcel
from servetune.adapters.store import AdapterStore
from servetune.adapters.types import BASE, Query, Sampling
from servetune.adapters.versions import Alias, Draft, StoreError, UnfitAdapter, UnknownVersion, version_name
from servetune.server.answering import Choice, Found, Job, Resident, entropy
from servetune.server.settings import Settings
from servetune.server.stage import QueueFull, Stage, is_same_probe

AWAKE_S = 60.0  # how long after a question an adapter is looked at often
SELDOM = 20  # times as long between two looks at one that nobody asks

log = structlog.get_logger()


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
    adapter: str
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

    def __init__(self, stage: Stage, store: AdapterStore, settings: Settings) -> None:
        family = stage.policy.family
        self.store = store
        self.model_name = settings.model
        self.base_digest = store.manifest(BASE).base_digest
        self.device = str(family.device)
        self.dtype = str(family.model.dtype).removeprefix("torch.")
        self.recognition_question = settings.recognition_question or family.recognition_question
        self.serving = BASE
        self.conduct = Conduct()
        self.stage = stage
        stage.introduce(store)
        self.on_swap: Callable[[Swap], None] = lambda swap: None
        self._poll_s = settings.swap_poll_s
        self._asked = self._looked = time.monotonic()
        self._refreshing = asyncio.Lock()
        self._refused: tuple[int, int] | None = None  # (generation, version) that failed verification
        self._watcher: asyncio.Task[None] | None = None
        self._unfit: int | None = None  # a version other than live that could not be loaded

    # --- life ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the live version and begin to follow the alias."""
        await self.refresh()
        await self.stage.start()
        self._watcher = asyncio.create_task(self._watch())

    def stop(self) -> None:
        """Follow the alias no longer."""
        if self._watcher:
            self._watcher.cancel()

    def ready(self) -> bool:
        """Has `start` verified a version?"""
        return self._watcher is not None

    def wait_s(self, ahead: int) -> float:
        """How long a request will wait for so many others, going by how long answers have taken of late."""
        return self.stage.wait_s(ahead)

    @property
    def waiting(self) -> int:
        """Requests that are with the model or wait for it."""
        return self.stage.waiting

    @property
    def batches(self) -> Mapping[int, int]:
        """How often so many requests were answered together."""
        return dict(self.stage.answering.batches)

    async def ping(self) -> None:
        """A no-op through the model's thread."""
        await self.stage.run(lambda: None)

    def residency(self) -> tuple[list[int], dict[int, int]]:
        """Versions whose weights are loaded (the base always is), and how many requests hold each."""
        return self.stage.residency(self.store.name)

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
            QueueFull: too many requests wait, or as many other versions are in use as can be loaded.
        """
        asked = time.perf_counter()
        version = await self._version(choice)
        looks: Looks | None = None
        async with self.stage.hold(self.store, version) as resident:
            whole = (
                sampling if deadline is None else replace(sampling, top_k=max(sampling.top_k, len(query.labels)))
            )
            ask = partial(self._ask, query, whole, resident, listen=listen and _from_thread(listen))
            found = await self.stage.perform(resident, ask)
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
            adapter=resident.adapter,
            version=resident.version,
            alias=None if choice == version_name(version) else choice,
            digest=resident.digest,
            queue_s=time.perf_counter() - asked - inference_s,
            inference_s=inference_s,
            views=max(1, len(looks.found)) if looks else 1,
            rollouts=sum(look.num_rollouts for look in looks.found) if looks else 0,
        )

    async def can_answer(self, choice: str) -> bool:
        """Whether the version that `choice` names is there and, as far as is known, can be loaded."""
        try:
            version = await self._version(choice)
        except UnknownVersion:
            return False
        if version == self._unfit:
            return False
        try:
            await self.stage.load(self.store, version)
        except QueueFull:
            return False
        except (StoreError, RuntimeError) as error:  # torch raises RuntimeError, out of memory included
            self._unfit = version
            log.error(
                "version_unfit", adapter=self.store.name, version=version_name(version), error=type(error).__name__
            )
            return False
        return True

    async def _look_again(self, resident: Resident, looks: Looks, deadline: float, expected_s: float) -> float:
        """Look while one more look, if it takes what the longest did, ends in time. Returns seconds computed."""
        clock = asyncio.get_running_loop().time
        computed_s = 0.0
        while not looks.done and (began := clock()) + expected_s <= deadline:
            try:
                async with asyncio.timeout_at(deadline):
                    look, look_s = await self.stage.perform(
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

    async def _version(self, choice: str) -> int:
        if choice in ("live", "candidate"):
            self._asked = time.monotonic()
        if choice != "live":
            return await asyncio.to_thread(self.store.resolve, choice)
        if self._asked - self._looked > 2 * self._poll_s + 1:  # nobody has asked for a while
            await self.refresh()
        return self.serving

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
        self.stage.answering.add(job)
        self.stage.submit(self.stage.answering.turn)
        return job.found

    def _look_on_thread(self, looks: Looks, slot: str | None, stop: threading.Event) -> Future[tuple[Look, float]]:
        return self.stage.submit(partial(self._look, slot, stop, looks))

    def _look(self, slot: str | None, stop: threading.Event, looks: Looks) -> tuple[Look, float]:
        began = time.perf_counter()
        policy = self.stage.policy
        policy.use(slot)
        return looks.take(policy, stop), time.perf_counter() - began

    # --- versions ------------------------------------------------------------------------------------

    async def refresh(self) -> int:
        """Serve what the alias `live` names now; a version that fails verification is not served.

        Returns:
            the version served afterwards.
        """
        async with self._refreshing:  # an operator's act and the watch may come to it together
            self._looked = time.monotonic()
            live, self.conduct = await asyncio.to_thread(lambda: (self.store.live(), self.store.conduct()))
            if live.version != self.serving and self._refused != (live.generation, live.version):
                await self._swap(live)
            return self.serving

    async def _swap(self, live: Alias) -> None:
        began = time.perf_counter()
        try:
            await self.stage.load(self.store, live.version)
        except (StoreError, RuntimeError) as error:  # torch raises RuntimeError, out of memory included
            self._refused = (live.generation, live.version)
            refused, name = type(error).__name__, version_name(live.version)
            log.error("swap_refused", adapter=self.store.name, version=name, error=refused)
            self.on_swap(Swap(live.version, self.serving, time.perf_counter() - began, refused))
        except QueueFull:
            pass  # all slots are leased: the swap waits, the requests do not
        else:
            before, self.serving = self.serving, live.version
            self.stage.serve(self.store, live.version)
            versions = {"version": version_name(live.version), "previous": version_name(before)}
            log.info("swapped", adapter=self.store.name, **versions)
            self.on_swap(Swap(live.version, before, time.perf_counter() - began))

    async def forget(self, versions: Collection[int]) -> None:
        """Keep neither what was seen nor, once their last answer is given, versions that are gone.

        Raises TimeoutError where the model stands still; it forgets when it goes on.
        """
        await self.stage.forget(self.store.name, versions)

    async def try_on(self, query: Query) -> None:
        """Whether the model can take a query: its processor has a look. Raises UnusableQuery."""
        family = self.stage.policy.family
        await self.stage.run(lambda: family.prompt(query.images, query.question))

    async def examine(self, parcel: Parcel) -> Draft:
        """An adapter from elsewhere as a version to be, once it is known how it answers here.

        Raises:
            UnfitAdapter: it does not fit this model, or answers otherwise than where it was exported.
            QueueFull: every slot is leased.
        """
        await asyncio.to_thread(self.store.check, parcel)
        probe = await self.stage.examine(self.store, parcel.weights)
        if not all(map(math.isfinite, probe)):
            raise UnfitAdapter("what it makes of the probe is not finite: train it with smaller steps")
        if parcel.manifest is not None and not is_same_probe(probe, parcel.manifest.probe):
            raise UnfitAdapter(
                "it does not answer its probe as where it was exported: is the model the same there?"
            )
        return parcel.draft(probe)

    async def _watch(self) -> None:
        while True:
            is_asked = time.monotonic() - self._asked < AWAKE_S
            await asyncio.sleep(self._poll_s * (1 if is_asked else SELDOM))
            try:
                await self.refresh()
            except Exception as error:  # nothing that happens to a new version may end the serving of the old
                log.error("refresh_failed", error=type(error).__name__)


def _from_thread(listen: Callable[[str], None]) -> Callable[[str], None]:
    """Passes on what another thread says to who listens on the loop that runs here."""
    loop = asyncio.get_running_loop()

    def tell(text: str) -> None:
        loop.call_soon_threadsafe(listen, text)

    return tell


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
