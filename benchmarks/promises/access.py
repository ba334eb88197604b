"""T: nobody gets in who should not, and what administrators do is on record."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import httpx2

from benchmarks.promises.product import Product
from benchmarks.promises.rows import Found, Trial, promise
from servetune.server.audit import AuditLog

OPEN = {"/livez", "/readyz", "/health", "/healthz"}
ADMIN = re.compile(r"/v1/(adapters|adaptation|audit)\b")
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
                        reply = http.request(method.upper(), re.sub(r"\{.*?\}", "default", path), headers=headers)
                        if (reply.status_code in (401, 403)) != (name in _shut_out(path)):
                            wrong.append(f"{method} {path} with {name}: {reply.status_code}")
    return Found(
        not wrong and routes > 15, f"{routes} routes with {len(keys)} keys each, {len(wrong)} wrong {wrong[:3]}"
    )


def _shut_out(path: str) -> set[str]:
    """The keys with which a route must refuse."""
    if path in OPEN:
        return set()
    return {"none", "wrong", "user"} if ADMIN.match(path) else {"none", "wrong"}


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
