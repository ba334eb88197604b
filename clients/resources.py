"""The nouns of the clients: `client.adapters` and `client.adaptation`, with the admin key.

`client.adaptation.events` and `.series` take a user key as well.
"""

from __future__ import annotations

from servetune.clients import admin, history
from servetune.clients import review as reviews
from servetune.clients.drivers import (
    Awaiting,
    Blocking,
    awaiting,
    awaiting_each,
    awaiting_events,
    blocking,
    blocking_each,
    blocking_events,
)


class Adapters(Blocking):
    """Named lines of versions; `live` is the alias that answers."""

    list = blocking(admin.list_adapters)
    create = blocking(admin.create)
    get = blocking(admin.get_adapter)
    settings = blocking(admin.settings)
    probe_sets = blocking(admin.probe_sets)
    upload_probes = blocking(admin.upload_probes)
    remove_probes = blocking(admin.remove_probes)
    configure = blocking(admin.configure)
    versions = blocking_each(admin.versions)
    version = blocking(admin.get_version)
    snapshot = blocking(admin.snapshot)
    promote = blocking(admin.promote)
    rollback = blocking(admin.rollback)
    reset = blocking(admin.reset)
    export = blocking(admin.export)
    diff = blocking(reviews.diff)
    review = blocking(reviews.review)
    next_pair = blocking(reviews.next_pair)
    judge = blocking(reviews.judge)
    import_adapter = blocking(admin.import_adapter)
    pin = blocking(admin.pin)
    unpin = blocking(admin.unpin)


class AsyncAdapters(Awaiting):
    """Named lines of versions; `live` is the alias that answers."""

    list = awaiting(admin.list_adapters)
    create = awaiting(admin.create)
    get = awaiting(admin.get_adapter)
    settings = awaiting(admin.settings)
    probe_sets = awaiting(admin.probe_sets)
    upload_probes = awaiting(admin.upload_probes)
    remove_probes = awaiting(admin.remove_probes)
    configure = awaiting(admin.configure)
    versions = awaiting_each(admin.versions)
    version = awaiting(admin.get_version)
    snapshot = awaiting(admin.snapshot)
    promote = awaiting(admin.promote)
    rollback = awaiting(admin.rollback)
    reset = awaiting(admin.reset)
    export = awaiting(admin.export)
    diff = awaiting(reviews.diff)
    review = awaiting(reviews.review)
    next_pair = awaiting(reviews.next_pair)
    judge = awaiting(reviews.judge)
    import_adapter = awaiting(admin.import_adapter)
    pin = awaiting(admin.pin)
    unpin = awaiting(admin.unpin)


class Adaptation(Blocking):
    """Learning from the queries, and the record of who changed what."""

    status = blocking(admin.status)
    pause = blocking(admin.pause)
    erase = blocking(admin.erase)
    resume = blocking(admin.resume)
    audit = blocking_each(admin.audit)
    events = blocking_events(history.events)
    series = blocking(history.series)


class AsyncAdaptation(Awaiting):
    """Learning from the queries, and the record of who changed what."""

    status = awaiting(admin.status)
    pause = awaiting(admin.pause)
    erase = awaiting(admin.erase)
    resume = awaiting(admin.resume)
    audit = awaiting_each(admin.audit)
    events = awaiting_events(history.events)
    series = awaiting(history.series)
