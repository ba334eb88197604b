"""I: whatever is sent, the server answers or refuses, cheaply, and says nothing of its inside."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
from PIL import Image, PngImagePlugin

from benchmarks.promises.contract import the_description_is_true
from benchmarks.promises.product import Product, picture
from benchmarks.promises.rows import Found, Trial, promise

MB = 2**20
KERNEL_MB = 8  # that buffers of the kernel, on both ends of a connection, take without anybody reading
LEAKS = re.compile(r"0x[0-9a-f]{6,}|Traceback|/home|/root|/tmp/|site-packages|\.py\b|st[au]_[a-z0-9]+\.")
JSON = {"Content-Type": "application/json"}
FORMATS = ("GIF", "BMP", "TIFF", "ICO", "PPM", "TGA", "PCX", "SGI", "JPEG2000", "PDF", "EPS", "AVIF", "MSP", "DIB")
SECRET = "canary-3f2a"  # pragma: allowlist secret - a word in questions that no reply may repeat


@contextmanager
def asking(trial: Trial, **settings: object) -> Iterator[tuple[Product, httpx2.Client]]:
    """A server without a worker, and a client of it."""
    product = Product(trial.folder / "home", **{"worker": False} | settings)
    with product, httpx2.Client(base_url=product.url, timeout=60) as http:
        yield product, http


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@promise("I1", "malformed input never crashes us")
def malformed_input(trial: Trial) -> Found:
    """Damaged images as files and as base64, and JSON that is not what it should be; the server outlives all.

    The long form begins with all that schemathesis makes of the OpenAPI document, see row I10.
    """
    asked = None if trial.short else the_description_is_true(replace(trial, folder=trial.folder / "asked"))
    dice, times = trial.dice, trial.times(120, 5000)
    good = [
        encoded(picture(number).resize((64, 64)), kind) for number in range(4) for kind in ("PNG", "JPEG", "WEBP")
    ]
    statuses: Counter[int] = Counter()
    with asking(trial) as (product, http):
        for number in range(times):
            damaged = _damaged(dice.choice(good), dice)
            if number % 2:
                reply = http.post(
                    "/answer", files={"image": ("i.png", damaged)}, data={"question": SECRET, "adapt": "false"}
                )
            else:
                body = {"image": base64.b64encode(damaged).decode(), "question": SECRET, "adapt": False}
                reply = http.post("/answer", json=body)
            statuses[reply.status_code] += 1
        for _ in range(times):
            text = _odd_json(dice)
            statuses[
                http.post("/answer", content=text.encode("utf-8", "surrogatepass"), headers=JSON).status_code
            ] += 1
        alive = http.get("/readyz").status_code == 200 and product.pid("server") is not None
        reply = http.post("/answer", files={"image": ("i.png", good[0])}, data={"question": "what is this?"})
    failed = sum(count for status, count in statuses.items() if status >= 500)
    figure = f"{failed} of {statuses.total()} answers 5xx {dict(sorted(statuses.items()))}"
    kept = failed == 0 and alive and reply.status_code == 200
    return Found(kept and asked.kept, f"{figure}; {asked.figure}") if asked else Found(kept, figure)


def _damaged(data: bytes, dice: random.Random) -> bytes:
    """Bits flipped, cut, lengthened, or with another beginning."""
    made = bytearray(data)
    for _ in range(dice.randint(1, 12)):
        made[dice.randrange(len(made))] ^= 1 << dice.randrange(8)
    kind = dice.randrange(5)
    if kind == 0:
        return bytes(made[: dice.randrange(len(made))])
    if kind == 1:
        return bytes(dice.getrandbits(8) for _ in range(8)) + bytes(made[8:])
    if kind == 2:
        return bytes(made) + bytes(made[-dice.randrange(1, 500) :])
    return bytes(made)


def _odd_json(dice: random.Random) -> str:
    """A request in which some values are anything, or the text is no JSON at all."""
    odd: list[Any] = [
        None,
        True,
        -1,
        0,
        1e308,
        2**70,
        "",
        "x" * 5000,
        "\0",
        "\ud800",
        [],
        {},
        [[]],
        {"a": {"a": {}}},
        "é" * 300,
    ]
    names = ["image", "images", "question", "candidate_labels", "task", "top_k", "n", "max_tokens", "temperature"]
    names += ["seed", "adapter", "adapt", "deadline_s", "stream", "metadata", "unknown"]
    body: dict[str, Any] = {"image": "aGk=", "question": SECRET, "adapt": False}
    for name in dice.sample(names, dice.randint(1, 4)):
        body[name] = dice.choice(odd)
    text = json.dumps(body)
    if dice.random() < 0.2:
        place = dice.randrange(len(text))
        text = text[:place] + dice.choice(["}", '"', "\\", "NaN", "[" * 2000, ""]) + text[place + 1 :]
    return text


@promise("I2", "bombs are cheap", timed=True)
def bombs_are_cheap(trial: Trial) -> Found:
    bombs = list(_bombs())
    times, slow, taken = trial.times(2, 40), 0.0, 0
    statuses: Counter[int] = Counter()
    with asking(trial) as (product, http):
        http.post(
            "/answer", files={"image": ("i.png", encoded(picture(0), "PNG"))}, data={"question": "what is this?"}
        )
        before = _resident(product)
        for _ in range(times):
            for bomb in bombs:
                began = time.monotonic()
                reply = http.post(
                    "/answer", files={"image": ("i.png", bomb)}, data={"question": "x", "adapt": "false"}
                )
                slow = max(slow, time.monotonic() - began)
                statuses[reply.status_code] += 1
                taken += reply.status_code == 200
        grown = (_resident(product) - before) / MB
    refused = all(400 <= status < 500 for status in statuses)
    num = statuses.total()
    figure = f"{num - taken} of {num} refused, slowest {1e3 * slow:.0f} ms, RSS +{grown:.0f} MB"
    return Found(refused and slow <= 0.1 and grown <= 32, figure)


def _bombs() -> Iterator[bytes]:
    yield encoded(Image.new("L", (13_300, 13_300)), "PNG")
    yield encoded(Image.new("L", (16_000, 4_000)), "WEBP")
    small = encoded(Image.new("RGB", (8, 8)), "PNG")
    for width, height in ((2**31 - 1, 2**31 - 1), (2**31 - 1, 1), (1, 2**31 - 1), (65_535, 65_535)):
        yield small[:16] + width.to_bytes(4, "big") + height.to_bytes(4, "big") + small[24:]
    texts = PngImagePlugin.PngInfo()
    for number in range(40):
        texts.add_text(f"k{number}", "x" * 2 * MB, zip=True)
    yield encoded(Image.new("RGB", (8, 8)), "PNG", pnginfo=texts)


def _resident(product: Product) -> int:
    status = Path(f"/proc/{product.pid('server')}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) * 1024


@promise("I3", "only JPEG, PNG and WebP reach a decoder")
def three_formats(trial: Trial) -> Found:
    refused, taken = [], []
    with asking(trial) as (_, http):
        for kind in FORMATS:
            image = Image.new("1" if kind == "MSP" else "RGB", (32, 32), 1)
            with suppress(OSError, KeyError, ValueError):  # a library that this Pillow was built without
                data = encoded(image, kind)
                reply = http.post(
                    "/answer", files={"image": ("i.png", data)}, data={"question": "x", "adapt": "false"}
                )
                (refused if 400 <= reply.status_code < 500 else taken).append(kind)
    return Found(
        not taken and len(refused) >= 10, f"{len(refused)} of {len(refused) + len(taken)} refused {taken}"
    )


@promise("I4", "the body cap holds whatever is promised")
def the_cap_holds(trial: Trial) -> Found:
    """Bodies without an end, with lying lengths, and forms of too many parts, over a plain socket."""
    found: dict[str, tuple[int, int]] = {}
    with asking(trial, max_body_bytes=MB) as (product, http):
        http.post("/answer", json={"image": "aGk="})
        before = _resident(product)
        address = product.url.removeprefix("http://").split(":")
        for name, head, piece in _floods():
            found[name] = _flood((address[0], int(address[1])), head, piece)
        grown = (_resident(product) - before) / MB
        alive = http.get("/livez").status_code == 200
    most = max(sent for _, sent in found.values()) / MB
    refused = all(status in (400, 413, 0) for status, _ in found.values())
    statuses = {name: status for name, (status, _) in found.items()}
    figure = f"{statuses}, at most {most:.1f} MB taken, RSS +{grown:.0f} MB"
    return Found(refused and alive and most <= 2 + KERNEL_MB and grown <= 16, figure)


def _floods() -> Iterator[tuple[str, str, bytes]]:
    piece = b"x" * 65_536
    chunk = f"{len(piece):x}\r\n".encode() + piece + b"\r\n"
    yield "long", "Content-Type: application/json\r\nContent-Length: 200000000", piece
    yield "chunked", "Content-Type: application/json\r\nTransfer-Encoding: chunked", chunk
    yield "negative", "Content-Type: application/json\r\nContent-Length: -5", piece
    yield "two lengths", "Content-Type: application/json\r\nContent-Length: 5\r\nContent-Length: 500000", piece
    form = "Content-Type: multipart/form-data; boundary=b\r\nTransfer-Encoding: chunked"
    part = b'--b\r\nContent-Disposition: form-data; name="f"\r\n\r\nx\r\n' * 1000
    yield "parts", form, f"{len(part):x}\r\n".encode() + part + b"\r\n"
    header = b"--b\r\nX-Long: " + b"y" * 65_536
    yield "part header", form, f"{len(header):x}\r\n".encode() + header + b"\r\n"


def _flood(address: tuple[str, int], head: str, piece: bytes, most: int = 64 * MB) -> tuple[int, int]:
    """The status, 0 where the connection was cut without one, and how many bytes went out."""
    sent, reply = 0, b""
    with socket.create_connection(address, timeout=10) as wire:
        wire.sendall(f"POST /answer HTTP/1.1\r\nHost: 127.0.0.1\r\n{head}\r\n\r\n".encode())
        wire.settimeout(0.2)
        with suppress(OSError):
            while sent < most:
                sent += wire.send(piece)
                with suppress(TimeoutError):
                    wire.setblocking(False)
                    with suppress(BlockingIOError):
                        reply += wire.recv(65_536)
                        if reply:
                            break
                wire.settimeout(0.5)
        wire.settimeout(5)
        with suppress(OSError):
            reply = reply or wire.recv(65_536)
    status = reply.split(b" ")[1:2]
    return (int(status[0]) if status else 0), sent


@promise("I5", "slow clients are cut", timed=True)
def slow_clients_are_cut(trial: Trial) -> Found:
    """Connections that trickle a head or a body, beside a client who asks as usual."""
    num, patience_s = trial.times(40, 200), 45.0
    usual: list[float] = []
    with asking(trial) as (product, http):
        host, port = product.url.removeprefix("http://").split(":")
        ask = partial(http.post, "/answer", json={"image": _small(), "question": "what is this?", "adapt": False})
        alone = sorted(_timed(ask) for _ in range(20))
        wires = [socket.create_connection((host, int(port)), timeout=5) for _ in range(num)]
        began, open_wires = time.monotonic(), dict(enumerate(wires))
        for number, wire in open_wires.items():
            head = "" if number % 2 else "Content-Length: 1000\r\nContent-Type: application/json\r\n\r\n"
            wire.sendall(f"POST /answer HTTP/1.1\r\nHost: 127.0.0.1\r\n{head}".encode())
        while open_wires and time.monotonic() - began < patience_s:
            usual.append(_timed(ask))
            for number, wire in list(open_wires.items()):
                if _is_cut(wire, b"x" if number % 2 == 0 else b"X-A: b\r\n"):
                    del open_wires[number]
            time.sleep(0.5)
        last_s = time.monotonic() - began
        for wire in wires:
            wire.close()
    slower = sorted(usual)[int(0.99 * len(usual))] / alone[-1]
    figure = (
        f"{num - len(open_wires)} of {num} cut, the last after {last_s:.0f} s; p99 of the other {slower:.1f} times"
    )
    return Found(not open_wires and last_s <= 35 and slower <= 2, figure)


def _timed(ask: Callable[[], httpx2.Response]) -> float:
    began = time.monotonic()
    ask().raise_for_status()
    return time.monotonic() - began


def _is_cut(wire: socket.socket, more: bytes) -> bool:
    """Send a little more; whether the server has closed, or answered."""
    try:
        wire.sendall(more)
        wire.settimeout(0.001)
        return wire.recv(1024) is not None
    except TimeoutError:
        return False
    except OSError:
        return True


def _small() -> str:
    return base64.b64encode(encoded(picture(0).resize((64, 64)), "PNG")).decode()


@promise("I6", "no request makes the server dial into its own network")
def no_inner_address(trial: Trial) -> Found:
    """Hostile addresses, with hosts allowed that resolve to this machine; a listener here counts who comes."""
    visitors: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def accept() -> None:
            with suppress(OSError):
                while True:
                    visitors.append(listener.accept())

        threading.Thread(target=accept, daemon=True).start()
        hosts = json.dumps(
            ["images.example", "localhost", "127.0.0.1", "localhost.localdomain", "2130706433", "::1"]
        )
        wordings: dict[bool, set[str]] = {True: set(), False: set()}  # by what the address itself says
        urls = list(_hostile_urls(port))
        with asking(trial, image_hosts=hosts) as (_, http):
            for url in urls:
                reply = http.post("/answer", json={"image": {"url": url}, "question": "x", "adapt": False})
                body = reply.json()
                said = f"{reply.status_code} {body.get('code')} {body.get('detail')}"
                wordings[url.lower().startswith("http")].add(said)
    refused = all(said.startswith("422 image_url_refused") for each in wordings.values() for said in each)
    alike = all(len(each) == 1 for each in wordings.values())
    figure = f"{len(visitors)} connections, {len(urls)} refusals, alike for all web addresses: {alike}"
    return Found(not visitors and refused and alike, figure)


def _hostile_urls(port: int) -> Iterator[str]:
    hosts = [
        "127.0.0.1",
        "localhost",
        "2130706433",
        "0x7f.1",
        "127.1",
        "0177.0.0.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
    ]
    hosts += [
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "0.0.0.0",
        "169.254.169.254",
        "100.64.0.1",
        "localhost.localdomain",
    ]
    hosts += ["①②⑦.⓪.⓪.①", "127.0.0.1.nip.io", "images.example@127.0.0.1", "user:pass@localhost"]
    for host in hosts:
        yield from (
            f"http://{host}:{port}/",
            f"https://{host}:{port}/",
            f"https://{host}/",
            f"HTTPS://{host}:443/x",
        )
    yield from (f"http://images.example\\@127.0.0.1:{port}/", f"https://images.example\\@127.0.0.1:{port}/")
    yield from (
        "file:///etc/passwd",
        "gopher://127.0.0.1/",
        "https://",
        "https:///x",
        "//127.0.0.1/",
        "ftp://localhost/",
    )


@promise("I7", "errors leak nothing")
def errors_leak_nothing(trial: Trial) -> Found:
    """All that refusals say, headers included, searched for addresses, paths, traces, keys and the question."""
    dice, bodies = trial.dice, []
    good = encoded(picture(0).resize((64, 64)), "PNG")
    with asking(trial) as (product, http):
        key = (product.home / "admin.key").read_text().strip()
        for _ in range(trial.times(60, 1000)):
            files = {"image": ("i.png", _damaged(good, dice))}
            replies = [
                http.post("/answer", files=files, data={"question": SECRET, "n": "many", "adapt": "false"}),
                http.post("/answer", content=_odd_json(dice).encode("utf-8", "surrogatepass"), headers=JSON),
                http.post("/answer", files=files, data={"question": "x", "adapt": "false"}),
                http.get(f"/v1/adapters/{dice.choice(['default', 'other', '..', 'x' * 300])}"),
                http.get("/v1/adaptation", headers={"Authorization": f"Bearer {key[:-1]}"}),
                http.request(dice.choice(["PUT", "GET", "DELETE"]), "/answer"),
            ]
            bodies += [f"{reply.text} {dict(reply.headers)}" for reply in replies if reply.status_code >= 400]
        leaks = [body for body in bodies if LEAKS.search(body) or SECRET in body or key in body]
    return Found(not leaks and len(bodies) > 100, f"{len(leaks)} of {len(bodies)} refusals leak {leaks[:1]}")
