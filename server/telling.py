"""An answer that is told while it grows: what has been said so far, then what became of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Generic, TypeAlias, TypeVar

T = TypeVar("T")
Ask: TypeAlias = Callable[[Callable[[str], None] | None], Coroutine[Any, Any, T]]
"""Asks something, and is given what to call with the text so far; None for one who is told at the end alone."""


class Telling(Generic[T]):
    """Asks, and hears the answer grow, if it does."""

    def __init__(self, ask: Ask[T], grows: bool = True) -> None:
        self._heard: asyncio.Queue[str] = asyncio.Queue()
        self._asking = asyncio.create_task(ask(self._heard.put_nowait if grows else None))

    async def next(self) -> str | None:
        """What has been said so far, as soon as there is more; None when all is said. Raises what went wrong."""
        hearing = asyncio.create_task(self._heard.get())
        await asyncio.wait({hearing, self._asking}, return_when=asyncio.FIRST_COMPLETED)
        if hearing.done():
            return hearing.result()
        hearing.cancel()
        with suppress(asyncio.CancelledError):
            await hearing
        self._asking.result()
        return None

    async def begin(self) -> str | None:
        """The first of it, before which whatever goes wrong is an ordinary error, and nobody is asked any more."""
        try:
            return await self.next()
        except BaseException:
            self.cancel()
            raise

    @property
    def result(self) -> T:
        """What became of it, when all is said."""
        return self._asking.result()

    def cancel(self) -> None:
        """Nobody wants to know any more."""
        self._asking.cancel()


def settled(text: str) -> str:
    """What of an unfinished text will not be taken back, as half a character would."""
    return text.rstrip("\ufffd")
