"""No secret in what is committed, no known vulnerability in what is installed: `make audit`.

Advisories come from PyPI. Where it does not tell (no network, a mirror without them), this says so and passes:
a check that cannot be made is no reason to stop work, and no proof of anything.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TOOLS = Path(sys.executable).parent
ROOT = Path(__file__).parents[1]


def secrets() -> list[str]:
    """What looks like a secret, as file:line; a line that ends in `pragma: allowlist secret` was looked at."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    scanned = _json([str(TOOLS / "detect-secrets"), "scan", *files])
    assert scanned is not None, "detect-secrets said nothing"
    return [
        f"{name}:{each['line_number']}: {each['type']}"
        for name, all_of in scanned["results"].items()
        for each in all_of
    ]


def vulnerabilities() -> list[str]:
    """Advisories on installed packages."""
    command = [
        str(TOOLS / "pip-audit"),
        "--local",
        "--skip-editable",
        "--format",
        "json",
        "--progress-spinner",
        "off",
    ]
    found = _json(command)
    audited = [each for each in found["dependencies"] if "vulns" in each] if found else []
    print(f"dependencies audited: {len(audited)} of {len(found['dependencies']) if found else 'none reachable'}")
    return [
        f"{each['name']} {each['version']}: {advisory['id']}, fixed in {advisory['fix_versions'] or 'none'}"
        for each in audited
        for advisory in each["vulns"]
    ]


def _json(command: list[str]) -> Any:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout)
    except json.JSONDecodeError:
        print(f"{Path(command[0]).name}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None


if __name__ == "__main__":
    problems = secrets() + vulnerabilities()
    print(*problems, sep="\n", end="\n" if problems else "")
    sys.exit(bool(problems))
