"""P: learning never makes it worse for long, and where there is nothing to learn nothing changes."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from PIL import Image

from benchmarks.gate import drill
from benchmarks.promises.delivery import QUICK, Asked
from benchmarks.promises.product import LABELS, Product, picture
from benchmarks.promises.rows import Found, Trial, promise
from servetune.adapters.family import Family
from servetune.adapters.policy import LoraSpec, Policy
from servetune.adapters.step import Learner, LearnerConfig
from servetune.adapters.store import AdapterStore
from servetune.adapters.types import Query
from servetune.adapters.versions import Draft
from servetune.server.lockstep import ListStream, list_worker, lock_step
from servetune.server.model import load_policy, open_store
from servetune.server.settings import Settings
from servetune.server.worker import SLOTS


@promise("P2", "the gate works")
def the_gate_works(trial: Trial) -> Found:
    """Sabotaged candidates and healthy ones, as `benchmarks.gate` makes them."""
    num = trial.times(10, 100)
    with contextlib.redirect_stdout(io.StringIO()):
        found = drill(num, trial.seed)
    good = found["stopped"] >= 0.99 * num and found["refused"] <= 0.05 * num
    return Found(
        good, f"{found['stopped']} of {num} sabotaged stopped, {found['refused']} of {num} healthy refused"
    )


@promise("P3", "what is bad and live is rolled back", timed=True)
def bad_is_rolled_back(trial: Trial) -> Found:
    """A version that answers at random is made live behind the gate's back, while people ask."""
    asked, limit_s, limit = Asked(), 60.0, 200
    with Product(trial.folder / "home", **QUICK) as product, product.client() as client:
        store = AdapterStore(product.home / "store")
        for _ in range(16):
            asked.once(client)
        bad = store.publish(_ruined(store)).version
        store.promote(bad)
        before, began = len(asked.times_s), time.monotonic()
        while store.live().version == bad and len(asked.times_s) - before < limit:
            asked.once(client)
            time.sleep(0.1)
            if time.monotonic() - began > (limit_s if not trial.broken else 20):
                break
        spent_s, answers = time.monotonic() - began, len(asked.times_s) - before
        live, good = store.live().version, store.live().version != bad
    return Found(good, f"v{live:04d} serves after {spent_s:.0f} s and {answers} answers")


def _ruined(store: AdapterStore) -> Draft:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(value.shape, generator=generator) / 3 for name, value in store.weights(0).items()}
    policy = Policy(Family.load(_nano()), LoraSpec(), ("made",))
    policy.load("made", weights)
    policy.use("made")
    return Draft(weights, "worker", 0, policy.probe())


def _nano() -> str:
    from benchmarks.models import checkpoint

    return str(checkpoint("nano"))


@promise("P4", "a stream that can only collapse teaches nothing")
def collapse_teaches_nothing(trial: Trial) -> Found:
    """Grey images with a little noise and a list of labels: the votes agree, and would teach one answer."""
    settings = Settings(home=trial.folder, worker_threads=1, queries_per_step=16, seed=trial.seed)
    policy = load_policy(settings, SLOTS, 1)
    store, stream = open_store(settings, policy), ListStream()
    worker = list_worker(settings, policy, store, stream)
    for _ in lock_step(worker, stream, _nothing(policy, trial)):
        pass
    worker.finish()
    live = store.live().version
    return Found(worker.learner.steps <= 3 and live == 0, f"{worker.learner.steps} steps, v{live:04d} live")


def _nothing(policy: Policy, trial: Trial) -> Iterator[list[Query]]:
    dice = trial.dice
    for batch in range(trial.times(3, 20)):
        pictures = [Image.effect_noise((112, 112), dice.uniform(1, 8)).convert("RGB") for _ in range(16)]
        question = policy.family.recognition_question
        yield [Query(f"q{batch}-{n}", (one,), question, tuple(LABELS)) for n, one in enumerate(pictures)]


@promise("P7", "no signal, no change")
def no_signal_no_change(trial: Trial) -> Found:
    """Answers that all agree, an empty batch, images that are all alike: not a byte of the weights moves."""
    policy = Policy(Family.load(_nano()), LoraSpec(), SLOTS)
    same = [Query(f"s{n}", (picture(0),), "what is this?", tuple(LABELS)) for n in range(8)]
    sure = [replace(query, labels=(LABELS[0], "nothing of the kind")) for query in same]
    cases: dict[str, tuple[str, list[Query]]] = {
        "empty batch": ("default", []),
        "images alike": ("default", same),
        "all agree": ("majority", sure),
    }
    moved = []
    for name, (kind, queries) in cases.items():
        policy.load(SLOTS[0], policy.zero_weights())
        config = LearnerConfig.named(kind, num_rollouts=8, max_tokens=5)
        learner = Learner(
            policy, config if kind == "default" else replace(config, agreement=(0.0, 0.99)), SLOTS[0]
        )
        before = policy.weights(SLOTS[0])
        for _ in range(3):
            learner.step(queries)
        after = policy.weights(SLOTS[0])
        if any(not torch.equal(before[key], after[key]) for key in before):
            moved.append(name)
    return Found(not moved, f"{len(cases) - len(moved)} of {len(cases)} left the weights as they were {moved}")


@promise("P8", "sending it again buys nothing")
def again_buys_nothing(trial: Trial) -> Found:
    """One image many times, also encoded anew; the same pixels are kept once. A JPEG of it is another image."""
    times, kept, near = trial.times(40, 1000), 0, 0
    with Product(trial.folder / "home", **QUICK | {"worker": False}) as product, product.client() as client:
        image = picture(0)
        for number in range(times):
            file = io.BytesIO()
            image.save(file, "PNG", compress_level=number % 10)
            answer = client.recognize(file.getvalue(), LABELS)
            kept += answer.adaptation.status == "queued"
        for quality in (70, 80, 90):
            file = io.BytesIO()
            image.save(file, "JPEG", quality=quality)
            near += client.recognize(file.getvalue(), LABELS).adaptation.status == "queued"
    return Found(kept <= 1, f"{kept} of {times} equal ones kept; {near} of 3 near-copies kept")
