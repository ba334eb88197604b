"""For each row the change to the product that its check must notice; and faults that a check causes on purpose.

A mutation names what it replaces, and makes the replacement from the original. Nothing heavy is imported here:
every process of the product may read this.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True, slots=True)
class Mutation:
    """`path` in `module` is replaced by what `make` makes of it."""

    module: str
    path: str
    make: Callable[[Any], Any]


def replace(module: ModuleType, mutation: Mutation) -> Callable[[], None]:
    """Put a mutation in force; returns what takes it back."""
    *parents, name = mutation.path.split(".")
    owner: Any = module
    for parent in parents:
        owner = getattr(owner, parent)
    original = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
    bare = original.__func__ if isinstance(original, staticmethod | classmethod) else original
    made = mutation.make(bare)
    setattr(owner, name, type(original)(made) if bare is not original else made)
    return lambda: setattr(owner, name, original)


def always(value: Any) -> Callable[[Any], Any]:
    """Makes a function that returns a value whatever it is called with."""
    return lambda original: lambda *args, **named: value


def constant(value: Any) -> Callable[[Any], Any]:
    """Puts a value in place of another."""
    return lambda original: value


# --- faults ------------------------------------------------------------------------------------------


def _dies_on_poison(learn: Any) -> Any:
    def step(self: Any, queries: Any) -> Any:
        if any("poison" in query.question for query in queries):
            os.kill(os.getpid(), signal.SIGKILL)
        return learn(self, queries)

    return step


def _dies_once_before_settling(settle: Any) -> Any:
    """Where it hurts most: what was learned is live, and its queries are not yet settled."""

    def settling(self: Any, deliveries: Any, outcome: str) -> Any:
        marker = Path(self._settings.home, "died-before-settling")
        if deliveries and outcome == "trained" and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return settle(self, deliveries, outcome)

    return settling


def _notes_pixels(answer: Any) -> Any:
    """A digest of the picture that was given last, in a file `seen` of the home."""

    async def answering(self: Any, query: Any, *args: Any) -> Any:
        (image,) = query.images
        digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
        _write(f"{self.store.folder.parents[1]}/seen", digest)
        return await answer(self, query, *args)

    return answering


def _pictures_at_hand(init: Any) -> Any:
    """Every allowed host has the file `picture` of the home, and an address of the open internet."""
    import httpx2

    async def pieces(content: bytes) -> Any:
        yield content

    def give(request: Any) -> Any:
        return httpx2.Response(200, content=pieces(Path(os.environ["SERVETUNE_HOME"], "picture").read_bytes()))

    async def resolve(host: str) -> list[str]:
        return ["8.8.8.8"]

    def make(self: Any, hosts: Any, max_bytes: int, *args: Any) -> None:
        init(self, hosts, max_bytes, resolve, httpx2.MockTransport(give))

    return make


def _without_end(warm: Any) -> Any:
    """No answer ends before it is as long as it may be."""

    def warming(self: Any) -> None:
        warm(self)
        self.policy.family.end_tokens = frozenset()

    return warming


def _stands_still(observe_each: Any) -> Any:
    """For as long as there is a file `stalled` in the home."""

    def observing(self: Any, queries: Any) -> Any:
        while Path(os.environ["SERVETUNE_HOME"], "stalled").exists():
            time.sleep(0.05)
        return observe_each(self, queries)

    return observing


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _noted(path: str, before: list[float], now: list[float]) -> list[float]:
    """The larger of each, which the file has; it begins anew where there is no file."""
    most = list(map(max, before, now)) if os.path.exists(path) else now
    if most != before:
        _write(path, " ".join(map(str, most)))
    return most


def _notes_lag(announce: Any) -> Any:
    """How late the event loop has come to a timer at most, and how long its thread computed meanwhile at most.

    Both in seconds, in a file `lag` of the home.
    """

    async def announcing(server: Any, settings: Any) -> None:
        await announce(server, settings)
        most = [0.0, 0.0]
        while True:
            due, computed = time.monotonic() + 0.005, time.thread_time()
            await asyncio.sleep(0.005)
            now = [time.monotonic() - due, time.thread_time() - computed]
            most = _noted(f"{settings.home}/lag", most, now)

    return announcing


# --- mutations ---------------------------------------------------------------------------------------


def _forgetful(options: Any) -> Any:
    return lambda self: ["no" if word == "yes" else word for word in options(self)]


def _uncounted(settle: Any) -> Any:
    def erase(self: Any, deliveries: Any, outcome: str) -> int:
        ids = [delivery.entry_id for delivery in deliveries]
        return int(self._redis.xdel(self._queries, *ids)) if ids else 0

    return erase


def _patient(settle: Any) -> Any:
    async def waiting(self: Any, wait_s: float) -> Any:
        await asyncio.sleep(0.5)
        return await settle(self, wait_s + 5)

    return waiting


def _unlimited(take: Any) -> Any:
    def taking(self: Any, limit: int, block_s: float) -> Any:
        self._settings = self._settings.model_copy(update={"max_deliveries": 10**6})
        return take(self, limit, block_s)

    return taking


def _with_a_pickle(sources: Any) -> Any:
    hostile = Path(__file__).with_name("hostile.txt")
    return lambda: [*sources(), hostile]


class _Opened(str):
    """A name that makes a folder for whatever it is compared with."""

    folder: Path

    def __ne__(self, other: object) -> bool:
        with contextlib.suppress(OSError, ValueError):
            self.folder.with_name(str(other)).mkdir(exist_ok=True)
        return str(self) != other

    __hash__ = str.__hash__


def _opens_whatever_is_named(init: Any) -> Any:
    def make(self: Any, root: Path, adapter: str = "default") -> None:
        init(self, root, adapter)
        self.name = _Opened(adapter)
        self.name.folder = self.folder

    return make


def _in_place(place: Any) -> Any:
    def write(self: Any, version: int, content: dict[str, bytes]) -> None:
        folder = self._path(version)
        folder.mkdir()
        for name, data in content.items():
            with (folder / name).open("wb", buffering=0) as file:
                for start in range(0, len(data), 1024):
                    file.write(data[start : start + 1024])
                    time.sleep(2e-4)

    return write


def _unverified(verified: Any) -> Any:
    return lambda self, version, name: (self._path(version) / name).read_bytes()


def _to_where_it_is(reset: Any) -> Any:
    return lambda self, to=0, expected_generation=None: reset(self, self.live().version, expected_generation)


def _one_slot_for_all(free_slot: Any) -> Any:
    async def free(self: Any, adapter: str) -> str:
        return "slot0"

    return free


def _loads_between_answers(loaded: Any) -> Any:
    """On the engine's thread, from a disk that takes its time."""

    async def load(self: Any, store: Any, version: int) -> Any:
        await self.run(lambda: time.sleep(0.05))
        return await loaded(self, store, version)

    return load


def _forgets_every_third(release: Any) -> Any:
    numbers = count(1)

    def some(self: Any, key: Any) -> None:
        if next(numbers) % 3:
            release(self, key)
        else:
            self._waiting -= 1  # and keeps the lease

    return some


def _keeps_what_it_read(weights: Any) -> Any:
    kept = []

    def read(self: Any, version: int) -> Any:
        kept.append(weights(self, version))
        return kept[-1]

    return read


def _without_version(begin_each: Any) -> Any:
    return lambda self, seen, versions=None, cache=None, slots=None: begin_each(
        self, seen, versions and ["any"] * len(versions), cache, slots
    )


def _as_far_as_it_fits(load: Any) -> Any:
    def partly(self: Any, slot: str, weights: Any, probe: Any, version: int) -> None:
        for name, parameter in self.policy.parameters(slot).items():
            if name in weights:
                parameter.data.copy_(weights[name])

    return partly


def _raising(read: Any) -> Any:
    async def reading(self: Any, images: Any) -> Any:
        try:
            return await read(self, images)
        except Exception as error:
            raise RuntimeError("unforeseen") from error

    return reading


def _dials_as_told(fetch: Any) -> Any:
    from urllib.parse import urlsplit

    async def fetching(self: Any, url: str) -> Any:
        parts = urlsplit(url)
        with contextlib.suppress(OSError, TimeoutError, ValueError):
            async with asyncio.timeout(1):
                _, writer = await asyncio.open_connection(parts.hostname, parts.port)
                writer.close()
        return await fetch(self, url)

    return fetching


def _talkative(init: Any) -> Any:
    def tell(self: Any, *args: Any, **named: Any) -> None:
        init(self, *args, **named)
        self.detail += f" ({hex(id(self))} in {__file__})"

    return tell


def _unlimited_images(limits: Any) -> Any:
    return lambda pixels, side, decoded_side: limits(10**10, 10**6, decoded_side)


def _decoder_that_can_be_broken(command: Any) -> Any:
    # It is started without an environment, and looks nowhere but in its own libraries.
    program = f"""
import sys
sys.path.append({str(Path(__file__).parent)!r})
from mutations import MUTATIONS, replace
from servetune.server import decoding
for mutation in MUTATIONS["I3"]:
    if mutation.module == decoding.__name__:
        replace(decoding, mutation)
decoding._serve(sys.argv[1:])
"""

    def started(*args: Any) -> list[str]:
        whole = command(*args)
        return [whole[0], "-c", program, *whole[4:]]

    return started


def _as_large_as_it_is(to_rgb: Any) -> Any:
    return lambda image, longest_side: image.convert("RGB")


def _whatever_it_is(tensors: Any) -> Any:
    def parse(self: Any, version: int, name: str) -> Any:
        from safetensors.torch import load

        return load(self._verified(version, name))

    return parse


def _without_cap(init: Any) -> Any:
    return lambda self, app, limit: init(self, app, 10**12)


def _accepts(judge: Any) -> Any:
    def accept(self: Any, *args: Any, **named: Any) -> Any:
        from servetune.adapters.types import Verdict

        found = judge(self, *args, **named)
        return Verdict(True, (), found.metrics)

    return accept


def _whatever_was_voted(useful: Any) -> Any:
    return lambda self, lessons, dependence: [lesson for lesson in lessons if not lesson.ballot.witness]


def _another_each_time(digest: Any) -> Any:
    return lambda self, query: digest(self, query) + os.urandom(4).hex()


def _keeps_what_was_opted_out(why_not: Any) -> Any:
    return lambda request, choice, opted_out: None


def _talks_about_it(why_not: Any) -> Any:
    def telling(request: Any, choice: str, opted_out: bool) -> Any:
        import structlog

        structlog.get_logger().info("asked", question=request.question)
        return why_not(request, choice, opted_out)

    return telling


def _takes_all(enqueue: Any) -> Any:
    def taking(self: Any, *args: Any) -> Any:
        self._settings = self._settings.model_copy(update={"buffer_queries": 10**6})
        return enqueue(self, *args)

    return taking


def _shares_nothing_out(enqueue: Any) -> Any:
    def taking(self: Any, query: Any, client: str, *args: Any) -> Any:
        return enqueue(self, query, "all the same", *args)

    return taking


def _in_a_hurry(learner_config: Any) -> Any:
    def hasty(settings: Any) -> Any:
        return learner_config(settings.model_copy(update={"learning_rate": 0.3}))

    return hasty


def _compares_letter_by_letter(identify: Any) -> Any:
    def compare(self: Any, authorization: str) -> Any:
        key = authorization.partition(" ")[2]
        for letter, right in zip(key, f"stu_somebody.{'k' * 40}", strict=False):
            if letter != right:
                return None
        return identify(self, authorization)

    return compare


def _never_compacts(compact: Any) -> Any:
    async def nothing(self: Any) -> None:
        return None

    return nothing


def _mirrored_as_text(decode: Any) -> Any:
    async def decoding(self: Any, data: Any) -> Any:
        from PIL import ImageOps

        image = await decode(self, data)
        return ImageOps.mirror(image) if isinstance(data, str) else image

    return decoding


def _another_key_each_time(request: Any) -> Any:
    def requesting(self: Any, call: Any, headers: Any, content: Any) -> Any:
        return request(self, call, headers | {"Idempotency-Key": os.urandom(8).hex()}, content)

    return requesting


def _whoever_sends_it(slot: Any) -> Any:
    def without_caller(path: str, headers: Any) -> Any:
        named = {name: value for name, value in headers.items() if name != "authorization"}
        return slot(path, named)

    return without_caller


def _hands_on(infer: Any) -> Any:
    """Who asks next gets the answer of whoever has left."""
    abandoned: list[Any] = []

    async def inferring(self: Any, *args: Any) -> Any:
        if abandoned:
            return await abandoned.pop()
        working = asyncio.create_task(infer(self, *args))
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            abandoned.append(working)
            raise

    return inferring


def _whoever_has_left(while_connected: Any) -> Any:
    async def working(request: Any, work: Any) -> Any:
        return await work

    return working


def _waits_for_ever(lock: Any) -> Any:
    def locking(file: Any) -> None:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)

    return locking


def _in_a_while(handle_exit: Any) -> Any:
    def handle(self: Any, *args: Any) -> None:
        asyncio.get_running_loop().call_later(3, handle_exit, self, *args)

    return handle


def _on_the_loop(decode: Any) -> Any:
    async def decoding(self: Any, data: Any) -> Any:
        return self._decode(data)

    return decoding


def _believes_to_hold_all(renew: Any) -> Any:
    return lambda self, deliveries: [renew(self, deliveries), list(deliveries)][1]


def _biased(advantages: Any) -> Any:
    """The variance of the group in place of the unbiased one."""
    return lambda rewards, weights, num=None, *rest: advantages(rewards, weights, None, *rest)


def _admits_all(check_room: Any) -> Any:
    return lambda self: None


def _pushes_in(yield_to_serving: Any) -> Any:
    def pushing() -> None:
        with contextlib.suppress(OSError):
            os.nice(-10)

    return pushing


def _with_more_threads(load_policy: Any) -> Any:
    def load(settings: Any, slots: Any, threads: int, stays: bool = False) -> Any:
        return load_policy(settings, slots, 4 if "candidate" in slots else threads, stays)

    return load


def _leaves_a_file_open(answer: Any) -> Any:
    async def leaving(self: Any, *args: Any) -> Any:
        os.open(os.devnull, os.O_RDONLY)
        return await answer(self, *args)

    return leaving


def _anybody(authorize: Any) -> Any:
    def welcome(self: Any, authorization: Any, scope: Any) -> Any:
        from servetune.server.access import Principal

        return Principal("anybody", admin=True)

    return welcome


MUTATIONS: dict[str, list[Mutation]] = {
    "poison": [Mutation("servetune.adapters.step", "Learner.step", _dies_on_poison)],
    "dies-before-settling": [Mutation("servetune.server.worker", "Worker._settle", _dies_once_before_settling)],
    "notes-pixels": [Mutation("servetune.server.engine", "Engine.answer", _notes_pixels)],
    "pictures-at-hand": [Mutation("servetune.server.fetch", "ImageFetcher.__init__", _pictures_at_hand)],
    "endless": [Mutation("servetune.server.stage", "Stage._warm", _without_end)],
    "stalls": [Mutation("servetune.adapters.policy", "Policy.observe_each", _stands_still)],
    "notes-lag": [Mutation("servetune.server.main", "_announce", _notes_lag)],
    "A1": [Mutation("benchmarks.promises.artifacts", "sources", _with_a_pickle)],
    "A2": [Mutation("servetune.adapters.store", "AdapterStore.__init__", _opens_whatever_is_named)],
    "A3": [Mutation("servetune.adapters.store", "AdapterStore._place", _in_place)],
    "A4": [Mutation("servetune.server.worker", "RETRY_S", constant(3600.0))],
    "A5": [Mutation("servetune.adapters.store", "AdapterStore._verified", _unverified)],
    "A6": [Mutation("servetune.adapters.policy", "Policy.check", always(None))],
    "A7": [Mutation("servetune.adapters.store", "AdapterStore.reset", _to_where_it_is)],
    "S1": [Mutation("servetune.server.stage", "Stage._free_slot", _one_slot_for_all)],
    "S2": [Mutation("servetune.server.stage", "Stage._free_slot", _one_slot_for_all)],
    "S3": [Mutation("servetune.server.stage", "Stage._loaded", _loads_between_answers)],
    "S4": [Mutation("servetune.adapters.store", "AdapterStore.weights", _keeps_what_it_read)],
    "S5": [Mutation("servetune.server.stage", "Stage._release", _forgets_every_third)],
    "S6": [Mutation("servetune.adapters.policy", "Policy.begin_each", _without_version)],
    "S7": [Mutation("servetune.server.stage", "Stage._load", _as_far_as_it_fits)],
    "I1": [Mutation("servetune.server.images", "ImageReader.read", _raising)],
    "I5": [Mutation("servetune.server.protocol", "HEAD_S", constant(3600.0))],
    "I6": [Mutation("servetune.server.fetch", "ImageFetcher.fetch", _dials_as_told)],
    "I7": [Mutation("servetune.server.errors", "ServiceError.__init__", _talkative)],
    "I2": [Mutation("servetune.server.images", "Limits", _unlimited_images)],
    "I3": [
        Mutation("servetune.server.decoders", "command", _decoder_that_can_be_broken),
        Mutation("servetune.server.decoding", "FORMATS", constant(None)),
        Mutation("servetune.server.decoding", "_is_supported", always(True)),
    ],
    "I4": [Mutation("servetune.server.middleware", "BodyCap.__init__", _without_cap)],
    "I9": [
        Mutation("servetune.server.decoding", "_to_rgb", _as_large_as_it_is),
        Mutation("servetune.adapters.store", "AdapterStore._tensors", _whatever_it_is),
    ],
    "I10": [Mutation("servetune.server.description", "_EVERYWHERE", constant(()))],
    "P1": [Mutation("servetune.server.buffer", "QueryBuffer._enqueue", _shares_nothing_out)],
    "P2": [Mutation("servetune.adapters.gate", "Gate.judge", _accepts)],
    "P3": [Mutation("servetune.server.worker", "Worker._review", always(None))],
    "P4": [Mutation("servetune.adapters.step", "Learner._useful", _whatever_was_voted)],
    "P5": [
        Mutation("servetune.adapters.gate", "Gate.judge", _accepts),
        Mutation("servetune.server.worker", "learner_config", _in_a_hurry),
    ],
    "P6": [Mutation("servetune.adapters.gate", "Gate.judge", _accepts)],
    "P7": [Mutation("servetune.adapters.step", "Learner._useful", _whatever_was_voted)],
    "P8": [Mutation("servetune.server.cipher", "Cipher.digest", _another_each_time)],
    "P9": [Mutation("servetune.adapters.grpo", "advantages", _biased)],
    "O1": [Mutation("servetune.server.service", "AnswerService.check_room", _admits_all)],
    "O5": [
        Mutation("servetune.server.worker", "yield_to_serving", _pushes_in),
        Mutation("servetune.server.model", "load_policy", _with_more_threads),
    ],
    "O7": [Mutation("servetune.server.service", "AnswerService.answer", _leaves_a_file_open)],
    "T1": [Mutation("servetune.server.access", "Access.authorize", _anybody)],
    "T6": [
        Mutation("servetune.server.service", "_why_not_kept", _keeps_what_was_opted_out),
        Mutation("servetune.server.buffer", "QueryBuffer.compact", _never_compacts),
    ],
    "T7": [Mutation("servetune.server.service", "_why_not_kept", _talks_about_it)],
    "T3": [Mutation("servetune.server.access", "Access._identify", _compares_letter_by_letter)],
    "T4": [Mutation("servetune.server.quota", "Quota.admit", always(None))],
    "T5": [Mutation("servetune.server.audit", "AuditLog.first_broken", always(None))],
    "R1": [Mutation("servetune.server.valkey", "EmbeddedValkey._options", _forgetful)],
    "R2": [Mutation("servetune.server.buffer", "QueryStream.settle", _uncounted)],
    "R3": [Mutation("servetune.adapters.store", "AdapterStore.learned_from", always(set()))],
    "R4": [
        Mutation("servetune.server.buffer", "QueryStream.renew", _believes_to_hold_all),
        Mutation("servetune.adapters.store", "AdapterStore._expect_head", always(None)),
    ],
    "R5": [Mutation("servetune.server.buffer", "QueryStream.take", _unlimited)],
    "R6": [Mutation("servetune.server.buffer", "QueryBuffer._enqueue", _takes_all)],
    "R7": [Mutation("servetune.server.service", "Keeping.settle", _patient)],
    "R8": [Mutation("servetune.server.engine", "Engine.answer", _hands_on)],
    "I8": [Mutation("servetune.server.decoders", "Decoders.decode", _mirrored_as_text)],
    "K1": [Mutation("servetune.clients.session", "Session._request", _another_key_each_time)],
    "T2": [Mutation("servetune.server.idempotency", "_slot", _whoever_sends_it)],
    "O2": [Mutation("servetune.server.routes", "while_connected", _whoever_has_left)],
    "O3": [Mutation("servetune.server.main", "_Server.handle_exit", _in_a_while)],
    "O4": [Mutation("servetune.adapters.store", "lock", _waits_for_ever)],
    "O6": [Mutation("servetune.server.decoders", "Decoders.decode", _on_the_loop)],
}
