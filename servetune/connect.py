"""Commands that talk to a server: the options they share, the keys they find, the errors they explain."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from servetune.clients import (
    APIConnectionError,
    AsyncClient,
    AuthenticationError,
    Client,
    PermissionDeniedError,
    ServetuneError,
)
from servetune.clients.client import DEFAULT_BASE_URL
from servetune.clients.session import is_loopback
from servetune.render import Output, show

F = TypeVar("F", bound=Callable[..., Any])

REFUSED, USAGE, UNREACHABLE = 1, 2, 3  # exit codes

OutputOption = Annotated[Output, typer.Option("--output", "-o", help="json: one JSON document on stdout.")]
UrlOption = Annotated[str, typer.Option(envvar="SERVETUNE_BASE_URL", help="Where the server is.")]
ApiKeyOption = Annotated[
    str | None, typer.Option(envvar="SERVETUNE_API_KEY", help="Better given in the environment.")
]
AdminKeyOption = Annotated[
    str | None,
    typer.Option(
        envvar="SERVETUNE_ADMIN_KEY",
        help="For a server on this machine, by default admin.key in $SERVETUNE_HOME.",
    ),
]


def command(group: typer.Typer, name: str | None = None, epilog: str | None = None) -> Callable[[F], F]:
    """Register `act(client, ...)` as a command: it gets a client, and what it returns is shown."""

    def register(act: F) -> F:
        def run(
            output: OutputOption = Output.table,
            base_url: UrlOption = DEFAULT_BASE_URL,
            api_key: ApiKeyOption = None,
            admin_key: AdminKeyOption = None,
            **given: Any,
        ) -> None:
            with explained(base_url), connect(base_url, api_key, admin_key) as client:
                show(act(client, **given), output)

        own = list(inspect.signature(act, eval_str=True).parameters.values())[1:]
        shared = list(inspect.signature(run, eval_str=True).parameters.values())[:-1]
        run.__signature__ = inspect.Signature(own + shared)  # type: ignore[attr-defined]
        group.command(name or act.__name__.replace("_", "-"), help=act.__doc__, epilog=epilog)(run)
        return act

    return register


def connect(base_url: str, api_key: str | None, admin_key: str | None) -> Client:
    """A client with the admin key given, or with the one this machine's server has left in its home."""
    # Only to this machine: another host has no business with this machine's key.
    if admin_key is None and is_loopback(base_url):
        admin_key = _stored_admin_key()
    return Client(base_url, api_key=api_key, admin_key=admin_key)


def connect_async(base_url: str, api_key: str | None) -> AsyncClient:
    """A client for many questions at once, which asks none of them again."""
    return AsyncClient(base_url, api_key=api_key, max_retries=0)


@contextmanager
def explained(base_url: str) -> Iterator[None]:
    """Turn errors into one line on stderr and an exit code: 1 refused, 2 usage, 3 no connection."""
    try:
        yield
    except APIConnectionError as error:
        fail(f"{error}\nIs a server running there? `servetune serve` starts one.", UNREACHABLE)
    except (AuthenticationError, PermissionDeniedError) as error:
        fail(f"{error}\nGive --api-key or, for adapters and learning, --admin-key.", REFUSED)
    except (ValueError, OSError) as error:  # ahead of ServetuneError: an ImageError is the user's to mend
        fail(str(error), USAGE)
    except ServetuneError as error:
        fail(str(error), REFUSED)


def fail(message: str, code: int) -> NoReturn:
    """Say why on stderr and exit."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def _stored_admin_key() -> str | None:
    """The file admin.key in the home, found as the server's platformdirs finds it on Linux."""
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    home = Path(os.environ.get("SERVETUNE_HOME") or data / "servetune")
    try:
        return (home / "admin.key").read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None
