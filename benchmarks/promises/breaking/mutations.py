"""For each row the change to the product that its check must notice; and faults that a check causes on purpose.

A mutation names what it replaces, and makes the replacement from the original. Nothing heavy is imported here:
every process of the product may read this.
"""

from __future__ import annotations

import asyncio
import contextlib
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
    return lambda self: "slot0"


def _loads_between_answers(loaded: Any) -> Any:
    """On the engine's thread, from a disk that takes its time."""

    async def load(self: Any, version: int) -> Any:
        await self._run(lambda: time.sleep(0.05))
        return await loaded(self, version)

    return load


def _forgets_every_third(release: Any) -> Any:
    numbers = count(1)

    def some(self: Any, version: int) -> None:
        if next(numbers) % 3:
            release(self, version)
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
        for name, parameter in self._policy.parameters(slot).items():
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
    return lambda request, opted_out: None


def _talks_about_it(why_not: Any) -> Any:
    def telling(request: Any, opted_out: bool) -> Any:
        import structlog

        structlog.get_logger().info("asked", question=request.question)
        return why_not(request, opted_out)

    return telling


def _takes_all(enqueue: Any) -> Any:
    def taking(self: Any, *args: Any) -> Any:
        self._settings = self._settings.model_copy(update={"buffer_queries": 10**6})
        return enqueue(self, *args)

    return taking


def _shares_nothing_out(enqueue: Any) -> Any:
    def taking(self: Any, *args: Any) -> Any:
        self._settings = self._settings.model_copy(update={"buffer_client_share": 1.0})
        return enqueue(self, *args)

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


def _believes_to_hold_all(renew: Any) -> Any:
    return lambda self, deliveries: [renew(self, deliveries), list(deliveries)][1]


def _biased(advantages: Any) -> Any:
    """The variance of the group in place of the unbiased one."""
    return lambda rewards, weights, num=None, *rest: advantages(rewards, weights, None, *rest)


def _admits_all(admitted: Any) -> Any:
    return lambda self: contextlib.nullcontext()


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
    "A1": [Mutation("benchmarks.promises.artifacts", "sources", _with_a_pickle)],
    "A2": [Mutation("servetune.adapters.store", "AdapterStore.__init__", _opens_whatever_is_named)],
    "A3": [Mutation("servetune.adapters.store", "AdapterStore._place", _in_place)],
    "A4": [Mutation("servetune.server.worker", "RETRY_S", constant(3600.0))],
    "A5": [Mutation("servetune.adapters.store", "AdapterStore._verified", _unverified)],
    "A6": [Mutation("servetune.adapters.policy", "Policy.check", always(None))],
    "A7": [Mutation("servetune.adapters.store", "AdapterStore.reset", _to_where_it_is)],
    "S1": [Mutation("servetune.server.engine", "Engine._free_slot", _one_slot_for_all)],
    "S2": [Mutation("servetune.server.engine", "Engine._free_slot", _one_slot_for_all)],
    "S3": [Mutation("servetune.server.engine", "Engine._loaded", _loads_between_answers)],
    "S4": [Mutation("servetune.adapters.store", "AdapterStore.weights", _keeps_what_it_read)],
    "S5": [Mutation("servetune.server.engine", "Engine._release", _forgets_every_third)],
    "S6": [Mutation("servetune.adapters.policy", "Policy.begin_each", _without_version)],
    "S7": [Mutation("servetune.server.engine", "Engine._load", _as_far_as_it_fits)],
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
    "O1": [Mutation("servetune.server.service", "AnswerService._admitted", _admits_all)],
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
        Mutation("servetune.adapters.store", "AdapterStore._expect", always(None)),
    ],
    "R5": [Mutation("servetune.server.buffer", "QueryStream.take", _unlimited)],
    "R6": [Mutation("servetune.server.buffer", "QueryBuffer._enqueue", _takes_all)],
    "R7": [Mutation("servetune.server.service", "Keeping.settle", _patient)],
}
