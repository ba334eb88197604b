"""I8, K1, T2: what a client is given, by whatever way it asks, however often it has to, whoever asks beside it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2
from PIL import Image

from benchmarks.promises.delivery import QUICK
from benchmarks.promises.inputs import encoded
from benchmarks.promises.product import LABELS, Product, picture
from benchmarks.promises.rows import Found, Trial, promise
from servetune import Client

# --- ways --------------------------------------------------------------------------------------------

HOST = "images.example"  # its pictures are files in the home: the fault `pictures-at-hand`
ORIENTATION = 0x0112
LAID_DOWN = {  # what a camera has done that writes such an orientation
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
RAISED = {each: each for each in LAID_DOWN.values() if each is not None}  # what undoes it: mostly itself
RAISED |= {
    Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
    Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
}
WAYS = ("upload", "base64", "address")


@promise("I8", "the same pixels by every route")
def the_same_pixels(trial: Trial) -> Found:
    """Each picture as a file, as base64 and by address; the engine notes a digest of what it was given."""
    golden, wrong, odd = list(_golden()), [], []
    home, hosts = trial.folder / "home", json.dumps([HOST])
    with (
        Product(home, "pictures-at-hand", "notes-pixels", worker=False, image_hosts=hosts) as product,
        httpx2.Client(base_url=product.url, timeout=60) as http,
    ):
        for name, data, upright in golden:
            for way in WAYS:
                (home / "seen").unlink(missing_ok=True)
                reply = _send(product, http, way, data)
                seen = (home / "seen").read_text() if reply.status_code == 200 else ""
                if seen != _digest(upright):
                    wrong.append(f"{name} by {way}: {reply.status_code}")
        for size in ((1, 1), (1, 10_000)):
            odd += [_send(product, http, way, encoded(Image.new("RGB", size), "PNG")).status_code for way in WAYS]
    num = len(WAYS) * len(golden)
    figure = f"{num - len(wrong)} of {num} as they should be {wrong[:2]}; 1x1 and 1x10000: {sorted({*odd})}"
    return Found(not wrong and num == 72 and {*odd} <= {200, 422}, figure)


def _send(product: Product, http: httpx2.Client, way: str, data: bytes) -> httpx2.Response:
    asked = {"question": "what is this?", "max_tokens": 1, "adapt": False}
    if way == "upload":
        fields = {name: str(value).lower() for name, value in asked.items()}
        return http.post("/answer", files={"image": ("i", data)}, data=fields)
    if way == "base64":
        return http.post("/answer", json=asked | {"image": base64.b64encode(data).decode()})
    (product.home / "picture").write_bytes(data)
    return http.post("/answer", json=asked | {"image": {"url": f"https://{HOST}/picture"}})


def _golden() -> Iterator[tuple[str, bytes, Image.Image]]:
    """Files, and the pixels that somebody sees who looks at them; only those of a JPEG are Pillow's word."""
    upright = picture(1).resize((96, 64))
    for number, lay_down in LAID_DOWN.items():
        exif = Image.Exif()
        exif[ORIENTATION] = number
        turned = upright if lay_down is None else upright.transpose(lay_down)
        yield f"PNG {number}", encoded(turned, "PNG", exif=exif), upright
        photo = encoded(turned, "JPEG", exif=exif)
        decoded = Image.open(io.BytesIO(photo)).convert("RGB")
        yield f"JPEG {number}", photo, decoded if lay_down is None else decoded.transpose(RAISED[lay_down])
    inked = encoded(upright.convert("CMYK"), "JPEG")
    yield "CMYK", inked, Image.open(io.BytesIO(inked)).convert("RGB")
    palette = upright.quantize(64)
    yield "palette", encoded(palette, "PNG"), palette.convert("RGB")
    two = upright.convert("1")
    yield "two colours", encoded(two, "PNG"), two.convert("RGB")
    grey = upright.convert("L")
    deep = Image.new("I;16", grey.size)
    deep.putdata([value * 257 for value in grey.tobytes()])
    yield "16 bits", encoded(deep, "PNG"), grey.convert("RGB")
    mask = Image.new("L", upright.size)
    mask.paste(255, (20, 10, 60, 50))
    clear = upright.copy()
    clear.putalpha(mask)
    shown = Image.composite(upright, Image.new("RGB", upright.size, "white"), mask)
    yield "alpha PNG", encoded(clear, "PNG"), shown
    yield "alpha WebP", encoded(clear, "WEBP", lossless=True, exact=True), shown
    others = [picture(number).resize(upright.size) for number in (2, 3)]
    for kind in ("PNG", "WEBP"):
        data = encoded(upright, kind, save_all=True, append_images=others, lossless=True)
        yield f"animated {kind}", data, upright


def _digest(image: Image.Image) -> str:
    """As the fault `notes-pixels` has it."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


# --- the SDK -----------------------------------------------------------------------------------------

FAULTS = ("cut", "cut after", "429", "503", "slow")
PATIENCE_S, SLOW_S, RETRY_AFTER_S = 2.0, 3.0, 1
KEY = "stu_somebody.fedcba9876543210fedcba9876543210"


class Unreliable(ThreadingHTTPServer):
    """A proxy before the product in which at most two attempts of a call fail, each in another way.

    Args:
        upstream: the product.
        elsewhere: another host, to which the proxy points where the key begins with that word.
    """

    daemon_threads = True

    def __init__(self, upstream: str, elsewhere: str, dice: random.Random) -> None:
        super().__init__(("127.0.0.1", 0), _Attempt)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.product = httpx2.Client(base_url=upstream, timeout=60)
        self.elsewhere = elsewhere
        self.failed: Counter[str] = Counter()
        self.too_early = 0
        self._dice = dice
        self._lock = threading.Lock()
        self._to_come: dict[str, list[str]] = {}  # by idempotency key
        self._not_before: dict[str, float] = {}

    def fault(self, key: str) -> str:
        """What goes wrong with this attempt; nothing: empty."""
        with self._lock:
            self.too_early += time.monotonic() < self._not_before.pop(key, 0)
            if key.startswith("elsewhere"):
                return "elsewhere"
            if key not in self._to_come:
                self._to_come[key] = self._dice.sample(FAULTS, self._dice.randrange(3))
            fault = self._to_come[key].pop() if self._to_come[key] else ""
            if fault in ("429", "503"):
                self._not_before[key] = time.monotonic() + RETRY_AFTER_S
            self.failed[fault] += 1
            return fault

    @contextmanager
    def running(self) -> Iterator[Unreliable]:
        thread = threading.Thread(target=self.serve_forever)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            self.server_close()
            self.product.close()


class _Attempt(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Unreliable

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        fault = self.server.fault(self.headers["Idempotency-Key"])
        if fault == "cut":
            self.close_connection = True
        elif fault == "elsewhere":
            self._reply(307, {"Location": f"{self.server.elsewhere}{self.path}"}, b"")
        elif fault in ("429", "503"):
            self._reply(int(fault), {"Retry-After": str(RETRY_AFTER_S)}, b"")
        else:
            passed = ("Authorization", "Content-Type", "Idempotency-Key")
            reply = self.server.product.post(
                self.path, content=body, headers={name: self.headers[name] for name in passed}
            )
            time.sleep(SLOW_S if fault == "slow" else 0)
            self.close_connection = fault in ("cut after", "slow")
            if fault != "cut after":
                self._reply(reply.status_code, {"Content-Type": reply.headers["Content-Type"]}, reply.content)

    def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        with suppress(OSError):  # who was too slow speaks to nobody
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: its words are not those of the check."""


@promise("K1", "the SDK is safe to retry")
def retries_are_safe(trial: Trial) -> Found:
    """Calls through a proxy that cuts, refuses and delays; and some that are sent to another host."""
    num, told, errors, visitors = trial.times(48, 1000), [], [], []
    settings = QUICK | {"worker": False, "api_keys": json.dumps([KEY]), "buffer_wait_s": 10}
    with (
        Product(trial.folder / "home", **settings) as product,
        _listening(visitors) as elsewhere,
        Unreliable(product.url, elsewhere, trial.dice).running() as proxy,
        _all_that_is_logged() as logged,
        Client(proxy.url, api_key=KEY, timeout=PATIENCE_S, max_retries=5) as client,
    ):

        def call(number: int) -> None:
            own = "elsewhere" if number % 12 == 0 else "mine" if number % 2 else None  # else the SDK makes one
            try:
                key = own and f"{own}-{number}"
                told.append(client.recognize(picture(number), LABELS, idempotency_key=key))
            except Exception as error:
                errors.append((own, str(error)))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(call, range(num)))
        with product.client() as admin:
            acked = admin.adaptation.status().buffer.ledger["acked"]
        texts = [logged.getvalue(), product.log(), *(text for _, text in errors), repr(client)]
    expected = num - (num + 11) // 12
    once = sum(answer.adaptation.status == "queued" for answer in {answer.id: answer for answer in told}.values())
    led = sum(own != "elsewhere" for own, _ in errors)
    leaks = sum(KEY in text or KEY.partition(".")[2] in text for text in texts)
    good = len(told) == once == acked == expected and not (led or leaks or visitors or proxy.too_early)
    figure = (
        f"{len(told)} of {expected} answered, {once} of them once, {acked} queued, {proxy.too_early} retried too "
    )
    figure += f"early, {len(visitors)} led elsewhere, {leaks} texts with the key; {dict(proxy.failed)}"
    return Found(good and proxy.failed.total() > num, figure)


@contextmanager
def _listening(visitors: list[Any]) -> Iterator[str]:
    """The address of a host that counts who comes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    visitors.append(listener.accept())

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://localhost:{listener.getsockname()[1]}"


@contextmanager
def _all_that_is_logged() -> Iterator[io.StringIO]:
    """By any library of this process, at any level."""
    texts = io.StringIO()
    handler, root = logging.StreamHandler(texts), logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield texts
    finally:
        root.setLevel(before)
        root.removeHandler(handler)


# --- tenants -----------------------------------------------------------------------------------------


@dataclass
class Tenant:
    """One client, and what it must be told if it were alone."""

    name: str
    http: httpx2.Client
    kept: dict[str, str] = field(default_factory=dict)  # what was asked -> the id it is kept under
    used: dict[str, tuple[str, str]] = field(default_factory=dict)  # idempotency key -> what was asked, its answer

    def ask(self, asked: str, image: str, question: str, key: str) -> str | None:
        """Ask; what differs from what it is owed, if anything."""
        body = {"image": image, "question": question}
        reply = self.http.post("/answer", json=body, headers={"Idempotency-Key": key} if key else {})
        before = self.used.get(key)
        if before and before[0] != asked:
            return None if reply.status_code == 422 else f"{reply.status_code} and not a mismatch"
        if reply.status_code != 200:
            return f"{reply.status_code} {reply.json().get('code')}"
        answer = reply.json()
        if before:
            return None if answer["id"] == before[1] else "another answer for a key of its own"
        if "idempotency-replayed" in reply.headers:
            return "an answer to somebody else"
        if key:
            self.used[key] = (asked, answer["id"])
        kept = answer["adaptation"]
        told, due = kept["reason"] or kept["status"], "duplicate" if asked in self.kept else "queued"
        if told == "queued":
            self.kept[asked] = kept["query_id"]
        return None if told == due else f"{told} and not {due}"


@promise("T2", "tenants are walls")
def tenants_are_walls(trial: Trial) -> Found:
    """Three clients do the same things at random; each must be told what it would be told alone.

    There is one adapter for all: what they teach is shared, and is not looked at here.
    """
    dice, wrong, times = trial.dice, [], trial.times(150, 10_000)
    images = [base64.b64encode(encoded(picture(number), "PNG")).decode() for number in range(6)]
    keys = [f"stu_tenant{letter}.{letter * 40}" for letter in "abc"]
    settings = QUICK | {"worker": False, "api_keys": json.dumps(keys), "buffer_wait_s": 10}
    with Product(trial.folder / "home", **settings) as product, product.client() as admin:
        tenants = [Tenant(key[:11], _as(product, key)) for key in keys]
        for number in range(times):
            tenant, other = dice.sample(tenants, 2)
            if number % 10 == 9 and other.kept:
                wrong += _acts(tenant, dice.choice([*other.kept.values()]))
            if number % 25 == 24 and other.kept:
                asked = dice.choice([*other.kept])
                wrong += [] if admin.adaptation.erase([other.kept.pop(asked)]).withdrawn == 1 else ["it was gone"]
            image, question = dice.randrange(len(images)), f"question {dice.randrange(2 + number // 20)}"
            key = dice.choice(["", "", "one", "two", f"key-{number // 8}"])
            found = tenant.ask(f"{image} {question}", images[image], question, key)
            wrong += [f"{tenant.name}: {found}"] if found else []
        waiting = admin.adaptation.status().buffer.waiting
        for tenant in tenants:
            tenant.http.close()
    kept = sum(len(tenant.kept) for tenant in tenants)
    figure = f"{len(wrong)} of {times} acts show another client {wrong[:2]}; {waiting} of {kept} kept"
    return Found(not wrong and waiting == kept > 20, figure)


def _as(product: Product, key: str) -> httpx2.Client:
    return httpx2.Client(base_url=product.url, timeout=60, headers={"Authorization": f"Bearer {key}"})


def _acts(tenant: Tenant, foreign: str) -> list[str]:
    """What a client learns by acting on another's query that it would not by acting on none."""
    replies = []
    for query_id in (foreign, "q_01" + "0" * len(foreign[4:])):
        reply = tenant.http.post("/v1/adaptation/erase", json={"query_ids": [query_id]})
        replies.append((reply.status_code, reply.json()["detail"]))
    return [] if replies[0] == replies[1] and replies[0][0] == 403 else [f"{tenant.name}: {replies}"]
