"""Runs the snippets of one document in their order, as a reader would who copies them one after the other.

Standard input: a JSON list of {"where", "language", "text"}. Python snippets share their names; the first one that
fails ends it, and is named on standard error.
"""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from typing import Any


def main() -> int:
    """The exit code: 0 when all of them ran."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for snippet in json.load(sys.stdin):
        print(f"--- {snippet['where']}", flush=True)
        try:
            if snippet["language"] == "python":
                exec(compile(snippet["text"], snippet["where"], "exec"), names)
            else:
                subprocess.run(["bash", "-euo", "pipefail", "-c", snippet["text"]], check=True)
        except Exception:
            traceback.print_exc()
            print(f"{snippet['where']} fails:\n{snippet['text']}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
