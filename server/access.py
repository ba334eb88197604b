"""Who may do what: keys, the two scopes, and where a server without keys may listen.

Keys are compared as HMAC digests, all of them and without an early exit, so that neither the time taken nor a
copy of the process' key table tells anything about a key.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

from starlette.requests import Request

from servetune.server.errors import ServiceError
from servetune.server.settings import Settings

Scope = Literal["open", "user", "admin"]
_KEY_ID = re.compile(r"(st[au]_[a-z0-9]{4,16})\.\S{16,}")
_CHALLENGE = {"WWW-Authenticate": "Bearer"}


class UnsafeBind(ValueError):
    """A server without user keys was asked to listen beyond this machine."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: the public id of a key, or `local` where none is needed."""

    id: str
    admin: bool = False
    adapter: str | None = None  # the only one that the key is for


LOCAL = Principal("local")


class Forbidden(ServiceError):
    """A known key asked for more than its scope allows."""

    def __init__(self, principal: Principal) -> None:
        super().__init__("forbidden", "This needs the admin key.")
        self.principal = principal


class Access:
    """The keys of one server."""

    def __init__(
        self,
        user_keys: Sequence[str] = (),
        admin_key: str | None = None,
        adapter_keys: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._salt = secrets.token_bytes(32)
        adapter_keys = adapter_keys or {}
        self.has_user_keys = bool(user_keys or adapter_keys)
        self.has_admin_key = admin_key is not None
        known = [(Principal(_key_id(key, f"user{n}")), key) for n, key in enumerate(user_keys, 1)]
        for adapter, keys in adapter_keys.items():
            for n, key in enumerate(keys, 1):
                known.append((Principal(_key_id(key, f"{adapter}:{n}"), adapter=adapter), key))
        if admin_key is not None:
            known.append((Principal(_key_id(admin_key, "admin"), admin=True), admin_key))
        if any(not key for _, key in known):
            raise ValueError("an access key must not be empty")
        self._known = [(principal, self._digest(key)) for principal, key in known]

    @classmethod
    def from_settings(cls, settings: Settings) -> Access:
        """The configured keys; without an admin key, the one in the home, made on the first start."""
        if settings.admin_key is not None:
            admin_key = settings.admin_key.get_secret_value()
        else:
            admin_key = read_or_create_key(settings.path("admin.key"))
        confined = {name: [key.get_secret_value() for key in keys] for name, keys in settings.adapter_keys.items()}
        return cls([key.get_secret_value() for key in settings.api_keys], admin_key, confined)

    def authorize(self, authorization: str | None, scope: Scope) -> Principal:
        """Who sent this Authorization header.

        Raises:
            ServiceError: `unauthorized`, without a known key.
            Forbidden: the key's scope is too small.
        """
        if scope == "open" or (scope == "user" and not self.has_user_keys):
            return LOCAL
        principal = self._identify(authorization or "")
        if principal is None:
            raise ServiceError("unauthorized", "Send a key: 'Authorization: Bearer …'.", headers=_CHALLENGE)
        if scope == "admin" and not principal.admin:
            raise Forbidden(principal)
        return principal

    def _identify(self, authorization: str) -> Principal | None:
        scheme, _, key = authorization.partition(" ")
        digest = self._digest(key.strip())
        matches = [principal for principal, known in self._known if hmac.compare_digest(known, digest)]
        return matches[-1] if matches and scheme.lower() == "bearer" else None

    def _digest(self, key: str) -> bytes:
        return hmac.digest(self._salt, key.encode("utf-8", "surrogatepass"), hashlib.sha256)


class Require:
    """A route's declared scope, as a dependency. A known key that asks for too much is audited."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    async def __call__(self, request: Request) -> Principal:
        services = request.app.state.services
        try:
            principal: Principal = services.access.authorize(request.headers.get("authorization"), self.scope)
        except Forbidden as error:
            details = {"method": request.method, "path": request.url.path[:200]}
            request_id = request.state.request_id
            append = services.audit.append
            await asyncio.to_thread(append, "access_refused", error.principal.id, request_id, details)
            raise
        return principal


def _key_id(key: str, fallback: str) -> str:
    """The public part of a key of our own form; of any other key nothing is shown."""
    match = _KEY_ID.fullmatch(key)
    return match[1] if match else fallback


def new_key(kind: Literal["a", "u"] = "a") -> str:
    """A fresh key `sta_<id>.<256 random bits>` (`stu_` for users)."""
    return f"st{kind}_{secrets.token_hex(4)}.{secrets.token_urlsafe(32)}"


def read_or_create_key(path: Path) -> str:
    """The key in a file only its owner can read; made once even when several processes start together."""
    with contextlib.suppress(FileExistsError):
        if not path.exists():
            _place_key(path)
    key = path.read_text(encoding="ascii").strip()
    if not key:
        raise ValueError(f"{path} is empty: delete it to have a new key made")
    return key


def _place_key(path: Path) -> None:
    # Linked into place when complete: no reader meets an empty file, and no existing key is replaced.
    staging = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    handle = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(new_key() + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(staging, path)
    finally:
        staging.unlink()


def is_loopback(host: str) -> bool:
    """Does this bind address stay on the machine? Names other than `localhost` are not resolved."""
    try:
        return host == "localhost" or ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(host: str, has_keys: bool) -> None:
    """Raises UnsafeBind when a server without user keys would listen beyond this machine."""
    if not has_keys and not is_loopback(host):
        raise UnsafeBind(
            f"refusing to listen on {host!r} without keys: anyone could ask and teach the model. "
            "Set SERVETUNE_API_KEYS, or listen on 127.0.0.1"
        )
