"""T: nobody gets in who should not, and what administrators do is on record."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import fmean, median, variance

import httpx2

from benchmarks.promises.delivery import QUICK
from benchmarks.promises.product import LABELS, Product, eventually, picture
from benchmarks.promises.rows import Found, Trial, promise
from servetune.adapters.store import AdapterStore
from servetune.server.access import Access
from servetune.server.audit import AuditLog
from servetune.server.cipher import Cipher, Unreadable, load_key
from servetune.server.errors import ServiceError
from servetune.server.quota import BURST_S
from servetune.server.settings import Settings

JSON = {"Content-Type": "application/json"}
OPEN = {"/", "/livez", "/readyz", "/health", "/healthz"}  # the page at / is static and holds no data
ADMIN = re.compile(r"/v1/(adapters|adaptation(?!/(events|series))|audit)\b")
USER_KEY = "stu_somebody.fedcba9876543210fedcba9876543210"


@promise("T1", "every route is guarded")
def every_route_is_guarded(trial: Trial) -> Found:
    """Every route of the API's own description without a key, with a wrong one, a user's, the administrator's."""
    wrong, routes = [], 0
    with Product(trial.folder / "home", worker=False, api_keys=json.dumps([USER_KEY])) as product:
        admin_key = (product.home / "admin.key").read_text().strip()
        keys = {"none": "", "wrong": f"{USER_KEY[:-1]}x", "user": USER_KEY, "admin": admin_key}
        with httpx2.Client(base_url=product.url, timeout=20) as http:
            bearer = {"Authorization": f"Bearer {admin_key}"}
            described = http.get("/openapi.json", headers=bearer).json()["paths"]
            for path, methods in described.items():
                for method in methods:
                    routes += 1
                    for name, key in keys.items():
                        headers = {"Authorization": f"Bearer {key}"} if key else {}
                        filled = re.sub(r"\{.*?\}", "default", path)
                        with http.stream(method.upper(), filled, headers=headers) as reply:  # some never end
                            status = reply.status_code
                        if (status in (401, 403)) != (name in _shut_out(path)):
                            wrong.append(f"{method} {path} with {name}: {status}")
    return Found(
        not wrong and routes > 15, f"{routes} routes with {len(keys)} keys each, {len(wrong)} wrong {wrong[:3]}"
    )


@promise("T6", "images go when promised")
def images_go(trial: Trial) -> Found:
    """Opted out, expired, and erased, one after a version learned from it; then Redis' files are searched.

    Every stored query is sealed, so what is looked for is what the key still opens.
    """
    left: dict[str, int] = {}
    settings = QUICK | {"buffer_ttl_s": 5}
    with Product(trial.folder / "a", worker=False, **settings) as product, product.client() as client:
        for number in range(4):
            client.recognize(picture(number), LABELS, adapt=False)
        left["opted out"] = len(_readable(product.home))
        kept = [client.recognize(picture(number), LABELS).adaptation for number in range(4)]
        stored = len(_readable(product.home))
        with suppress(TimeoutError):
            eventually(lambda: not _readable(product.home), 20)
        left["expired"] = len(_readable(product.home))
    with Product(trial.folder / "b", **QUICK) as product, product.client() as client:
        store = AdapterStore(product.home / "store")
        ids = [client.recognize(picture(number), LABELS).adaptation.query_id or "" for number in range(16)]
        eventually(lambda: store.live().version > 0, 300)
        taught = next(iter(store.manifest(1).query_ids))
        gone = client.adaptation.erase([taught, ids[-1]])
        with suppress(TimeoutError):
            eventually(lambda: ids[-1] not in _readable(product.home), 20)
        left["erased"] = len(_readable(product.home) & {taught, ids[-1]})
        named = sum(taught in path.read_text() for path in store.folder.rglob("manifest.json"))
        served = client.recognize(picture(99), LABELS, adapt=False).adapter.version
    left["erased"] += named + (1 not in {int(name[1:]) for name in gone.dropped}) + (served in gone.dropped)
    good = not any(left.values()) and stored == len(kept) == 4
    figure = f"left of opted out, expired, erased: {[*left.values()]}; {stored} of {len(kept)} were there before"
    return Found(good, figure)


@promise("T7", "logs hold no user data")
def logs_hold_no_user_data(trial: Trial) -> Found:
    """Canary words in all that can be sent, through answers and through errors; then the log is searched."""
    word, key = "canary7f3a", f"stu_somebody.{'k' * 40}"
    with Product(trial.folder / "home", api_keys=json.dumps([key]), **QUICK) as product:
        admin_key = (product.home / "admin.key").read_text().strip()
        with httpx2.Client(base_url=product.url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as http:
            for number in range(trial.times(3, 50)):
                body = {"image": IMAGE, "question": f"{word} {number}", "metadata": {word: word}}
                http.post("/answer", json=body, headers={"Idempotency-Key": f"{word}-{number}", "X-Note": word})
                http.post("/answer", json={"image": IMAGE, "candidate_labels": [word, f"{word} two"]})
                http.post("/answer", json=body | {"n": word})
                http.post("/answer", json=body | {"image": word})
                http.post("/answer", files={"image": (f"{word}.png", word.encode())}, data={"question": word})
                http.post("/answer", content=f'{{"question": "{word}'.encode(), headers=JSON)
                http.post("/answer", json=body, headers={"Authorization": f"Bearer {word}"})
                http.get(f"/v1/adapters/{word}", headers={"Authorization": f"Bearer {admin_key}"})
                http.get(f"/{word}?q={word}")
        log = product.log()
    forbidden = {"words": word, "image": IMAGE[:60], "user key": key, "admin key": admin_key}
    found = [name for name, text in forbidden.items() if text in log]
    return Found(
        not found and log.count("request_id") > 20, f"{len(forbidden) - len(found)} of 4 kinds absent {found}"
    )


def _welch(first: list[int], second: list[int]) -> float:
    """p of Welch's test that two large samples have one mean; the slowest hundredth is other processes'."""
    kept = [sorted(each)[: int(0.99 * len(each))] for each in (first, second)]
    error = math.sqrt(sum(variance(each) / len(each) for each in kept))
    return math.erfc(abs(fmean(kept[0]) - fmean(kept[1])) / error / math.sqrt(2))


def _readable(home: Path) -> set[str]:
    """The sealed queries in Redis' files that the key of the home still opens."""
    cipher = Cipher(load_key(Settings(home=home)))
    files = [path for path in (home / "valkey").rglob("*") if path.suffix in (".aof", ".rdb")]
    data = b"".join(path.read_bytes() for path in files)
    found = set()
    for match in re.finditer(rb"blob:(q_\w+)", data):
        place = data.find(b"sealed", match.end(), match.end() + 200)
        with suppress(Unreadable, ValueError, IndexError):
            found.add(cipher.open(match[1].decode(), _value(data, place + len(b"sealed"))).id)
    return found


def _value(data: bytes, place: int) -> bytes:
    """The string at a place, as a command (RESP) or a dump (RDB) has it."""
    if command := re.compile(rb"\r\n\$(\d+)\r\n").match(data, place):
        return data[command.end() : command.end() + int(command[1])]
    kind, size = data[place] >> 6, data[place] & 63
    if kind == 0:
        return data[place + 1 : place + 1 + size]
    if kind == 1:
        return data[place + 2 : place + 2 + (size << 8 | data[place + 1])]
    return data[place + 5 : place + 5 + int.from_bytes(data[place + 1 : place + 5], "big")]


def _encoded() -> str:
    file = io.BytesIO()
    picture(0).resize((64, 64)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


IMAGE = _encoded()


def _shut_out(path: str) -> set[str]:
    """The keys with which a route must refuse."""
    if path in OPEN:
        return set()
    return {"none", "wrong", "user"} if ADMIN.match(path) else {"none", "wrong"}


@promise("T3", "keys are safe at rest and in time", timed=True)
def keys_are_safe(trial: Trial) -> Found:
    """Does any file but its own have a key? Is a key that begins right refused later than another?"""
    user_key = f"stu_somebody.{'k' * 40}"
    with Product(trial.folder / "home", api_keys=json.dumps([user_key]), **QUICK) as product:
        admin_key = (product.home / "admin.key").read_text().strip()
        for key in (user_key, admin_key, f"{user_key[:-1]}x"):
            httpx2.post(f"{product.url}/answer", json={}, headers={"Authorization": f"Bearer {key}"})
        files = [path for path in product.home.rglob("*") if path.is_file() and path.name != "admin.key"]
        telling = [
            path.name for path in files for key in (user_key, admin_key) if key.encode() in path.read_bytes()
        ]
    access = Access([user_key])
    tries: dict[str, list[int]] = {f"Bearer {user_key[:-1]}x": [], f"Bearer {'x' * len(user_key)}": []}
    for _ in range(trial.times(4000, 20_000)):
        for header, spent in tries.items():
            began = time.perf_counter_ns()
            with suppress(ServiceError):
                access.authorize(header, "user")
            spent.append(time.perf_counter_ns() - began)
    near, far = tries.values()
    apart, chance = abs(median(near) - median(far)) / median(far), _welch(near, far)
    figure = f"{len(telling)} files tell a key, medians differ by {apart:.2%}, p {chance:.2f}"
    return Found(not telling and apart <= 0.01 and chance > 0.01, figure)


@promise("T4", "limits are fair", timed=True)
def limits_are_fair(trial: Trial) -> Found:
    """One key asks as fast as it can, another at half of what it may."""
    seconds, per_minute = trial.times(6, 60), 240
    keys = [f"stu_client{letter}.{letter * 40}" for letter in "ab"]
    found: dict[str, Counter[int]] = {key: Counter() for key in keys}
    silent = 0
    settings = {"api_keys": json.dumps(keys), "requests_per_minute": per_minute, "queue_wait_s": 60}
    with Product(trial.folder / "home", worker=False, **settings) as product:

        def ask(key: str, pause_s: float) -> None:
            nonlocal silent
            body = {"image": IMAGE, "question": "what is this?", "adapt": False}
            headers = {"Authorization": f"Bearer {key}"}
            with httpx2.Client(base_url=product.url, headers=headers, timeout=60) as http:
                while time.monotonic() < until:
                    reply = http.post("/answer", json=body)
                    found[key][reply.status_code] += 1
                    silent += reply.status_code == 429 and "retry-after" not in reply.headers
                    time.sleep(pause_s)

        until = time.monotonic() + seconds
        threads = [threading.Thread(target=ask, args=(keys[0], 0.0)) for _ in range(4)]
        threads.append(threading.Thread(target=ask, args=(keys[1], 120 / per_minute)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    most = per_minute / 60 * (seconds + BURST_S)
    greedy, modest = found[keys[0]], found[keys[1]]
    good = 0 < greedy[200] <= 1.01 * most and greedy[429] > greedy[200] and modest[429] == silent == 0
    figure = f"{greedy[200]} of {greedy.total()} answered (at most {most:.0f}), "
    figure += f"the other's {modest[200]} of {modest.total()}"
    return Found(good, figure)


@promise("T5", "what administrators do is on record")
def acts_are_on_record(trial: Trial) -> Found:
    """Acts with the server killed in between; then every byte that is changed in the trail must show."""
    lives, each = trial.times(2, 10), trial.times(10, 50)
    dice, acknowledged = trial.dice, []
    product = Product(trial.folder / "home", worker=False)
    for life in range(lives):
        product.start()
        with product.client() as client:
            for number in range(each):
                label = f"act-{life}-{number}"
                client.adapters.snapshot(label)
                acknowledged.append(label)
        product.kill("all" if life < lives - 1 else "worker")
    product.stop()
    log = AuditLog(product.home / "audit.jsonl")
    on_record = {entry.details.get("label") for entry in _entries(log)}
    whole, missing = log.first_broken() is None, set(acknowledged) - on_record
    text, times, noticed = bytearray(log.path.read_bytes()), trial.times(60, 1000), 0
    for _ in range(times):
        place = dice.randrange(text.rindex(b"\n", 0, len(text) - 1))  # the newest line has nobody after it
        changed = bytearray(text)
        changed[place] ^= 1 << dice.randrange(8)
        log.path.write_bytes(changed)
        noticed += log.first_broken() is not None
    found = len(acknowledged) - len(missing)
    figure = f"{found} of {len(acknowledged)} on record, {noticed} of {times} changes noticed"
    return Found(whole and not missing and noticed == times, figure)


def _entries(log: AuditLog) -> Iterator[object]:
    cursor = None
    while True:
        entries, cursor = log.page(cursor, 200)
        yield from entries
        if cursor is None:
            return
