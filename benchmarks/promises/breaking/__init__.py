"""The product broken on purpose, so that each check is seen to fail: in this process and in its children."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from unittest import mock

from benchmarks.promises.breaking.mutations import MUTATIONS, replace

__all__ = ["MUTATIONS", "breaking", "environment"]
HERE = Path(__file__).parent


def environment(*names: str) -> dict[str, str]:
    """What makes a process and its children break in some ways, beside those that are in force."""
    if not names:
        return {}
    paths = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    in_force = (os.environ.get("SERVETUNE_BREAK", ""), *names)
    return {"SERVETUNE_BREAK": " ".join(filter(None, in_force)), "PYTHONPATH": paths}


@contextmanager
def breaking(row: str) -> Iterator[None]:
    """Break what the check of a row is for, until the block ends; nothing where `row` is empty."""
    if not row:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment(row)))
        for mutation in MUTATIONS[row]:
            stack.callback(replace(import_module(mutation.module), mutation))
        yield
