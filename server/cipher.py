"""Seals queries for storage: AES-256-GCM over a small header and re-encoded images.

Owns the buffer's key. Knows nothing about Redis. Nothing it returns lets a reader of the store see or guess
a question, an image or a client.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import os
import secrets
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from PIL import Image

from servetune.adapters.types import Query
from servetune.server.settings import Settings

KEY_BYTES = 32
NONCE_BYTES = 12
LOSSLESS_PIXELS = 512 * 512
"""Images up to this size are kept as PNG; PNG takes 90 ms a megapixel where JPEG takes 3."""


class Unreadable(Exception):
    """A sealed query that this key does not open or whose content is damaged."""


def load_key(settings: Settings) -> bytes:
    """The key in the settings or else in `home/buffer.key`, which is created on first use.

    Raises ValueError if it is not the base64 form of 32 bytes.
    """
    if settings.buffer_key is not None:
        text = settings.buffer_key.get_secret_value()
    else:
        text = _read_or_create(settings.path("buffer.key"))
    try:
        key = base64.b64decode(text, validate=True)
    except binascii.Error:
        key = b""
    if len(key) != KEY_BYTES:
        raise ValueError(f"the buffer key must be the base64 form of {KEY_BYTES} bytes")
    return key


def _read_or_create(path: Path) -> str:
    """The text of the key file. Processes that race to create it all get the same key, never half of one."""
    if not path.exists():
        draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(base64.b64encode(secrets.token_bytes(KEY_BYTES)))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            pass  # another process was first: its key counts
        finally:
            draft.unlink()
        _sync_folder(path.parent)
    return path.read_text().strip()


def _sync_folder(folder: Path) -> None:
    """Make new names in `folder` survive a power cut: without its key every stored query is lost."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Cipher:
    """Seals and opens queries, and turns what identifies them into marks that mean nothing without the key."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._aead = AESGCM(key)
        self.fingerprint = self.mark("key", b"")

    def mark(self, purpose: str, *parts: bytes) -> str:
        """A keyed hash of `parts`, different for each purpose (at most 16 bytes)."""
        digest = hashlib.blake2b(key=self._key, person=purpose.encode(), digest_size=16)
        for part in parts:
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
        return digest.hexdigest()

    def digest(self, query: Query) -> str:
        """The mark under which a repeated image, question and label set is recognised."""
        texts = json.dumps([query.question, query.labels]).encode()
        images = (part for image in query.images for part in (repr(image.size).encode(), image.tobytes()))
        return self.mark("query", texts, *images)

    def seal(self, query: Query) -> bytes:
        """The query as ciphertext bound to its id. Metadata of the images is left out."""
        images = [_encode(image) for image in query.images]
        fields = {"question": query.question, "labels": query.labels, "sizes": [len(image) for image in images]}
        header = json.dumps(fields | ({"trace": query.trace} if query.trace else {})).encode()
        plain = b"".join([len(header).to_bytes(4, "big"), header, *images])
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._aead.encrypt(nonce, plain, query.id.encode())

    def open(self, query_id: str, sealed: bytes) -> Query:
        """The query that was sealed. Raises Unreadable."""
        try:
            plain = self._aead.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], query_id.encode())
            return _parse(query_id, plain)
        except (InvalidTag, ValueError, KeyError, TypeError, OSError) as error:
            raise Unreadable(query_id) from error


def _parse(query_id: str, plain: bytes) -> Query:
    body = 4 + int.from_bytes(plain[:4], "big")
    header = json.loads(plain[4:body])
    images = []
    for size in header["sizes"]:
        images.append(_decode(plain[body : body + size]))
        body += size
    return Query(query_id, tuple(images), header["question"], tuple(header["labels"]), header.get("trace"))


def _encode(image: Image.Image) -> bytes:
    image = image.convert("RGB")  # a copy, so that the caller's metadata stays his
    image.info = {}
    file = io.BytesIO()
    if image.width * image.height <= LOSSLESS_PIXELS:
        image.save(file, "PNG", compress_level=1)
    else:
        image.save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def _decode(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
        return image.convert("RGB")
