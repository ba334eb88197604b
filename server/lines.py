"""The adapters of one server: for each its versions, what answers with them, and the queries it may learn from.

An adapter is a folder of the store. It is opened when it is first asked for, and all of them share the model, the
connections to Redis, and the room of the buffer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from servetune.adapters.store import AdapterStore
from servetune.adapters.versions import ForeignStore, NameTaken
from servetune.server.buffer import QueryBuffer
from servetune.server.engine import Engine
from servetune.server.errors import ServiceError
from servetune.server.model import Stores
from servetune.server.settings import Settings
from servetune.server.stage import Stage

REBASE = (
    "This adapter was made for another base model. Its operator begins it again on the present one with "
    "`servetune adapters rebase NAME`, or serves the model that it was made for."
)
AT = "@"  # between an adapter and one of its aliases or versions


@dataclass(frozen=True, slots=True)
class Line:
    """One adapter of this server."""

    store: AdapterStore
    engine: Engine
    buffer: QueryBuffer

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.store.name


class Lines:
    """All adapters of this server. Its methods run on the event loop's thread.

    Args:
        buffer: of the adapter that the settings name; the others' are like it.
        make_engine: from an adapter's store; by default one on the stage.
    """

    def __init__(
        self,
        settings: Settings,
        stage: Stage,
        stores: Stores,
        buffer: QueryBuffer,
        make_engine: Callable[[AdapterStore], Engine] | None = None,
    ) -> None:
        self._stage = stage
        self._stores = stores
        self._make_engine = make_engine or (lambda store: Engine(stage, store, settings))
        self._opening = asyncio.Lock()
        store = stores.open(settings.adapter)
        self.first = Line(store, self._make_engine(store), buffer)
        """The adapter of whoever names none."""
        self._open = {self.first.name: self.first}
        self._hear: list[Callable[[Line], None]] = []

    async def start(self) -> None:
        """Be ready to answer with the first adapter."""
        await self._share()
        await self.first.engine.start()

    async def stop(self) -> None:
        """End what runs and keep what is being stored."""
        for line in self._open.values():
            line.engine.stop()
        await self._stage.stop()
        for line in self._open.values():
            await line.buffer.close()

    async def names(self) -> list[str]:
        """Of all adapters, whether they are in use or not."""
        return await asyncio.to_thread(self._stores.names)

    async def foreign(self) -> list[str]:
        """Of the adapters that the home holds for another base model."""
        return await asyncio.to_thread(self._stores.foreign)

    def on_open(self, hear: Callable[[Line], None]) -> None:
        """Tell of every adapter that is in use, and of those that will be before they are asked."""
        self._hear.append(hear)
        for line in self._open.values():
            hear(line)

    def in_use(self) -> list[Line]:
        """Those that were asked for since the server started."""
        return list(self._open.values())

    def look(self, name: str) -> tuple[AdapterStore, Engine | None]:
        """An adapter as it lies there, and its engine where it is in use."""
        line = self._open.get(name)
        return (line.store, line.engine) if line else (self._stores.at(name), None)

    async def find(self, name: str) -> Line:
        """An adapter. Raises ServiceError `adapter_not_found`, `adapter_incompatible` for one of another base."""
        if name not in self._open:
            if name not in await self.names():
                if name in await self.foreign():
                    raise ServiceError("adapter_incompatible", REBASE)
                raise ServiceError("adapter_not_found", "This server has no adapter of that name.")
            await self._open_line(name)
        return self._open[name]

    async def create(self, name: str) -> Line:
        """A new adapter, which changes nothing yet. Raises NameTaken."""
        if name in await self.names():
            raise NameTaken("there is an adapter of that name: choose another")
        try:
            await self._open_line(name)
        except ForeignStore:
            raise NameTaken("there is an adapter of that name for another model: choose another") from None
        await self._share()
        return self._open[name]

    async def _open_line(self, name: str) -> None:
        async with self._opening:
            if name not in self._open:
                store = await asyncio.to_thread(self._stores.open, name)
                line = Line(store, self._make_engine(store), self.first.buffer.of(name))
                for hear in self._hear:
                    hear(line)
                await line.engine.start()
                self._open[name] = line

    async def _share(self) -> None:
        self.first.buffer.share_among(len(await self.names()))


def chosen(wanted: str, own: str) -> tuple[str, str]:
    """The adapter, and its alias or version, that `[ADAPTER@]CHOICE` names; `own` is meant where none is named."""
    name, _, choice = wanted.rpartition(AT)
    return name or own, choice
