"""Found by every Python process whose PYTHONPATH names this folder, and run before its program.

Breaks the modules of servetune that SERVETUNE_BREAK has a mutation for, as each is imported.
"""

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from mutations import MUTATIONS, replace

IN_FORCE = [mutation for name in os.environ.get("SERVETUNE_BREAK", "").split() for mutation in MUTATIONS[name]]


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        self._inside = False

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        mine = [mutation for mutation in IN_FORCE if mutation.module == fullname]
        if self._inside or not mine:
            return None
        self._inside = True
        try:
            spec = find_spec(fullname)
        finally:
            self._inside = False
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                for mutation in mine:
                    replace(module, mutation)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if IN_FORCE:
    sys.meta_path.insert(0, _Finder())
