"""servetune: serve a vision-language model that learns from the unlabeled questions it is asked."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from servetune.clients import AsyncClient, Client

__all__ = ["AsyncClient", "Client", "__version__"]
__version__ = version("servetune")


def __getattr__(name: str) -> Any:
    """The clients, imported when asked for: a worker process needs no HTTP client."""
    if name in ("AsyncClient", "Client"):
        from servetune import clients

        return getattr(clients, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
