"""The nouns of the clients: `client.adapters` and `client.adaptation`, both with the admin key."""

from __future__ import annotations

from servetune.clients import calls
from servetune.clients.drivers import Awaiting, Blocking, awaiting, awaiting_each, blocking, blocking_each


class Adapters(Blocking):
    """Named lines of versions; `live` is the alias that answers."""

    list = blocking(calls.list_adapters)
    get = blocking(calls.get_adapter)
    versions = blocking_each(calls.versions)
    version = blocking(calls.get_version)
    snapshot = blocking(calls.snapshot)
    promote = blocking(calls.promote)
    rollback = blocking(calls.rollback)
    reset = blocking(calls.reset)
    export = blocking(calls.export)


class AsyncAdapters(Awaiting):
    """Named lines of versions; `live` is the alias that answers."""

    list = awaiting(calls.list_adapters)
    get = awaiting(calls.get_adapter)
    versions = awaiting_each(calls.versions)
    version = awaiting(calls.get_version)
    snapshot = awaiting(calls.snapshot)
    promote = awaiting(calls.promote)
    rollback = awaiting(calls.rollback)
    reset = awaiting(calls.reset)
    export = awaiting(calls.export)


class Adaptation(Blocking):
    """Learning from the queries, and the record of who changed what."""

    status = blocking(calls.status)
    pause = blocking(calls.pause)
    resume = blocking(calls.resume)
    audit = blocking_each(calls.audit)


class AsyncAdaptation(Awaiting):
    """Learning from the queries, and the record of who changed what."""

    status = awaiting(calls.status)
    pause = awaiting(calls.pause)
    resume = awaiting(calls.resume)
    audit = awaiting_each(calls.audit)
