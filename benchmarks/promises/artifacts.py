"""A: adapters on disk are whole, verified and inert, and the way back is exact."""

from __future__ import annotations

import ast
import asyncio
import math
import multiprocessing
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import torch
from torch import Tensor

from benchmarks.models import checkpoint
from benchmarks.promises.delivery import QUICK, Asked
from benchmarks.promises.product import LABELS, Product, eventually, picture
from benchmarks.promises.rows import Found, Skip, Trial, promise
from servetune import Client
from servetune.adapters.family import Family
from servetune.adapters.policy import LoraSpec, Policy
from servetune.adapters.store import AdapterStore
from servetune.adapters.versions import Draft, StoreError
from servetune.server.engine import Engine
from servetune.server.model import load_policy, open_store
from servetune.server.settings import Settings
from servetune.server.stage import SLOTS, Stage

ROOT = Path(__file__).parents[2]
PRODUCT = [ROOT / name for name in ("server", "adapters", "clients", "nano", "evals", "servetune")]
FORBIDDEN = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load"}
CONFIG = {"r": 1, "target_modules": "x", "peft_type": "LORA"}


@promise("A1", "there is no code in artifacts")
def no_code(trial: Trial) -> Found:
    """Nothing that could run code from data is used, and a pickle beside the weights is not looked at."""
    found = [f"{path.name}:{what}" for path in sources() for what in _dangerous(path)]
    store = _made(trial.folder)
    hostile = store.folder / "v0000" / "adapter_model.bin"
    hostile.write_bytes(b"cos\nsystem\n(S'touch hostile'\ntR.")
    store.weights(0)
    return Found(not found, f"{len(found)} uses {found[:3]}; adapter_model.bin ignored")


def sources() -> list[Path]:
    """The modules of the product."""
    return [path for folder in PRODUCT for path in folder.rglob("*.py")]


def _dangerous(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN:
            yield node.module or ""
        elif isinstance(node, ast.Call):
            if ast.unparse(node.func) in CALLS:
                yield ast.unparse(node.func)
            pickles = [w for w in node.keywords if w.arg == "allow_pickle" and ast.unparse(w.value) != "False"]
            yield from map(ast.unparse, pickles)


@promise("A2", "names cannot leave the root")
def names_stay_inside(trial: Trial) -> Found:
    """Hostile names through every admin route of a running server; its folder's surroundings are compared."""
    dice = trial.dice
    with Product(trial.folder / "home", worker=False) as product:
        key = (product.home / "admin.key").read_text().strip()
        before = _files(trial.folder, product.home)
        statuses: Counter[int] = Counter()
        with httpx2.Client(headers={"Authorization": f"Bearer {key}"}, timeout=20) as http:
            for _ in range(trial.times(300, 10_000)):
                name = _hostile(dice.choice, dice.randint)
                method, path, body = dice.choice(_requests(name))
                with suppress(httpx2.InvalidURL, ValueError):
                    statuses[http.request(method, product.url + path, json=body).status_code] += 1
        stray = _files(trial.folder, product.home) - before
        inside = {path.name for path in (product.home / "store").iterdir()}
    failed = sum(count for status, count in statuses.items() if status >= 500)
    good = not stray and not failed and inside == {"default"}
    return Found(good, f"{len(stray)} files outside, {failed} of {statuses.total()} answers 5xx")


def _hostile(choice: Callable[[list[str]], str], randint: Callable[[int, int], int]) -> str:
    pieces = [
        "..",
        "/",
        "\\",
        "%2e%2e",
        "%2f",
        "\0",
        "~",
        "etc",
        "passwd",
        "é",
        "\u202e",
        "v0001",
        "base",
        ".",
        "a" * 80,
    ]
    pieces += ["C:", "con", "\n", " ", "%00", "/tmp/stray", "../../stray"]
    return "".join(choice(pieces) for _ in range(randint(1, 5)))


def _requests(name: str) -> list[tuple[str, str, dict[str, object] | None]]:
    return [
        ("POST", "/v1/adapters/default/snapshot", {"label": name}),
        ("POST", "/v1/adapters/default/promote", {"version": name}),
        ("POST", "/v1/adapters/default/rollback", {"to": name}),
        ("POST", "/v1/adapters/default/reset", {"to": name}),
        ("GET", f"/v1/adapters/default/versions/{name}/export", None),
        ("GET", f"/v1/adapters/default/versions/{name}", None),
        ("GET", f"/v1/adapters/{name}", None),
        ("POST", f"/v1/adapters/{name}/snapshot", {"label": "kept"}),
    ]


def _files(folder: Path, home: Path) -> set[str]:
    """All below a folder but what the server writes anyway; and what is in the place a name might point to."""
    own = {home / "server.log", home / "audit.jsonl"}
    around = {
        str(path)
        for path in folder.rglob("*")
        if home / "store" / "default" not in path.parents and path not in own
    }
    return {path for path in around if "valkey" not in path} | {str(path) for path in Path("/tmp").glob("stray*")}


@promise("A3", "a published version is whole")
def published_is_whole(trial: Trial) -> Found:
    """A process that publishes and promotes on and on is killed at random times; then the store is read."""
    dice, times = trial.dice, trial.times(5, 200)
    store, whole, told = _made(trial.folder), 0, []
    for _ in range(times):
        process = multiprocessing.get_context("spawn").Process(target=_publish, args=(trial.folder,))
        process.start()
        before = store.live().generation
        with suppress(StoreError, ValueError):
            eventually(lambda before=before: store.live().generation > before, 60)  # type: ignore[misc]
        told.append(dice.uniform(0, 0.05))
        time.sleep(told[-1])
        process.kill()
        process.join()
        with suppress(StoreError, ValueError):
            store.weights(store.live().version)
            for version in store.versions():
                store.weights(version)
            whole += 1
    delays = ", ".join(f"{1e3 * each:.0f}" for each in told[:12])
    return Found(whole == times, f"{whole} of {times} kills left a whole store (after ms: {delays} ...)")


def _publish(folder: Path) -> None:
    store, value = AdapterStore(folder), 0.0
    while True:
        value += 1
        store.promote(store.publish(Draft(_weights(value), "worker", 0, (0.0,))).version)


def _made(folder: Path) -> AdapterStore:
    store = AdapterStore(folder)
    store.initialise(_weights(0.0), CONFIG, "sha256:base", (0.0,))
    return store


def _weights(value: float) -> dict[str, Tensor]:
    return {"a.lora_A.weight": torch.full((8, 512), value), "a.lora_B.weight": torch.full((512, 8), value)}


@promise("A4", "a full disk hurts only learning", timed=True)
def a_full_disk_hurts_only_learning(trial: Trial) -> Found:
    """The disk of the store fills while people ask, and is freed again; nobody restarts anything."""
    home, asked, stop = trial.folder / "home", Asked(), threading.Event()
    with (
        _small_disk(home / "store") as disk,
        Product(home, **QUICK) as product,
        product.client() as client,
        ThreadPoolExecutor(1) as pool,
    ):
        asking = pool.submit(_ask_until, stop, asked, client)
        try:
            first = _next_version(client, 0)
            (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free))
            degraded_s = _seconds(lambda: client.adaptation.status().worker.state == "degraded", 60)
            time.sleep(trial.times(3, 60))
            held = AdapterStore(disk).live().version
            (disk / "filler").unlink()
            resumed_s = _seconds(lambda: _next_version(client, held, 1) > held, 40)
        finally:
            stop.set()
            asking.result()
    figure = f"{asked.refused} of {len(asked.times_s) + asked.refused} answers failed, degraded after "
    figure += f"{degraded_s:.1f} s, learning again after {resumed_s:.1f} s (v{first:04d}, v{held:04d} before)"
    return Found(asked.refused == 0 and degraded_s <= 5 and resumed_s <= 30, figure)


@contextmanager
def _small_disk(place: Path) -> Iterator[Path]:
    """A file system of its own, so small that it can be filled."""
    place.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", place], capture_output=True).returncode:
        raise Skip("needs the right to mount a tmpfs")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def _ask_until(stop: threading.Event, asked: Asked, client: Client) -> None:
    while not stop.wait(0.2):  # the worker learns on what is left idle
        asked.once(client)


def _next_version(client: Client, before: int, within_s: float = 120) -> int:
    """The version that is live, once it is another."""

    def live() -> int:
        return int(client.adaptation.status().live.removeprefix("v"))

    eventually(lambda: live() != before, within_s)
    return live()


def _seconds(condition: Callable[[], bool], within_s: float) -> float:
    """Until it comes true; infinitely many where it does not in time."""
    began = time.monotonic()
    with suppress(TimeoutError):
        eventually(condition, within_s)
        return time.monotonic() - began
    return math.inf


@promise("A5", "corruption is caught")
def corruption_is_caught(trial: Trial) -> Found:
    """Single bits flipped anywhere in a version's files; it must not be read, nor be promoted."""
    dice, times, refused, by_luck = trial.dice, trial.times(200, 1000), Counter[str](), Counter[str]()
    store = _made(trial.folder)
    version = store.publish(Draft(_weights(1.0), "worker", 0, (0.0,), query_ids=("q1", "q2"))).version
    files = sorted(path for path in (store.folder / f"v{version:04d}").iterdir())
    for number in range(times):
        path = files[number % len(files)]
        whole = path.read_bytes()
        place = dice.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            store.weights(version)
        except StoreError:
            refused[path.name] += 1
        except Exception as error:  # by luck, further on: nobody is prepared for it
            by_luck[type(error).__name__] += 1
        path.write_bytes(whole)
    store.promote(version)
    return Found(refused.total() == times, f"{refused.total()} of {times} refused ({dict(refused | by_luck)})")


@promise("A6", "adapters that do not fit are refused before the swap")
def misfits_are_refused(trial: Trial) -> Found:
    """Whole by their digests, but not what this model can serve, or not what was probed where they were made."""
    settings = Settings(home=trial.folder, serve_threads=1)
    policy = load_policy(settings, SLOTS, 1)
    store = open_store(settings, policy)
    good = policy.zero_weights()
    key = next(name for name in good if ".lora_B." in name)
    policy.use(SLOTS[0])
    policy.load(SLOTS[0], good)
    probe = policy.probe()
    misfits = {
        "NaN": good | {key: torch.full_like(good[key], float("nan"))},
        "infinite": good | {key: torch.full_like(good[key], float("inf"))},
        "rank": {
            name: value[:4] if ".lora_A." in name else value[:, :4].contiguous() for name, value in good.items()
        },
        "a key missing": {name: value for name, value in good.items() if name != key},
        "a key too many": good | {f"{key}.more": good[key].clone()},
        "another shape": good | {key: torch.zeros(3, 3)},
        "a hundred times as large": {n: v + 100 * torch.randn_like(v) for n, v in good.items()},
    }
    engine = Engine(Stage(policy, settings), store, settings)
    served = [
        name for name, weights in misfits.items() if _is_served(engine, store, Draft(weights, "worker", 0, probe))
    ]
    try:
        AdapterStore(trial.folder / "store").initialise(good, policy.peft_config(), "sha256:another", probe)
        served.append("another base")
    except StoreError:
        pass
    engine.stage._thread.shutdown()
    engine.stage._loader.shutdown()
    return Found(not served, f"{len(misfits) + 1 - len(served)} of {len(misfits) + 1} refused {served}")


def _is_served(engine: Engine, store: AdapterStore, draft: Draft) -> bool:
    """Whether a version that is promoted gets past the engine."""
    version = store.publish(draft).version
    store.promote(version)
    try:
        return asyncio.run(engine.refresh()) == version
    except Exception:  # the engine refuses in good order, or it is not prepared for this
        return True


@promise("A7", "rollback and reset are exact and quick", timed=True)
def the_way_back_is_exact(trial: Trial) -> Found:
    """Under load, `live` goes back and forth; each answer is to the bit the one that its version gave before."""
    times, wrong, slowest = trial.times(10, 100), 0, 0.0
    with Product(trial.folder / "home", worker=False) as product, product.client() as client:
        store = AdapterStore(product.home / "store")
        learned = store.publish(_changed(store)).version
        images = [picture(number) for number in range(4)]

        def answers(choice: str) -> list[tuple[tuple[str | None, float], ...]]:
            found = [client.recognize(image, LABELS, adapter=choice, adapt=False) for image in images]
            return [tuple((one.label, one.score) for one in each.candidates) for each in found]

        base, other = answers("base"), answers(f"v{learned:04d}")
        assert base != other, "the two versions answer alike: nothing could be told"
        for number in range(times):
            began = time.monotonic()
            if number % 3 == 0:
                client.adapters.promote(f"v{learned:04d}")
            elif number % 3 == 1:
                client.adapters.reset()
            else:
                client.adapters.rollback("base")
            client.recognize(images[0], LABELS, adapt=False)
            slowest = max(slowest, time.monotonic() - began)
            wrong += answers("live") != (other if number % 3 == 0 else base)
    return Found(wrong == 0 and slowest <= 1, f"{times - wrong} of {times} exact, slowest {slowest:.2f} s")


def _changed(store: AdapterStore) -> Draft:
    weights = {
        name: value + 0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
        if ".lora_B." in name
        else value
        for name, value in store.weights(0).items()
    }
    policy = Policy(Family.load(str(checkpoint("nano"))), LoraSpec(), ("made",))
    policy.load("made", weights)
    policy.use("made")
    return Draft(weights, "worker", 0, policy.probe())
