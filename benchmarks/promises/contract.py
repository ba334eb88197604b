"""I10: what the OpenAPI document says is what a server does; schemathesis asks it, with either key.

schemathesis is installed into an environment of its own (`envs.py`), so the test suite, which may reach no
registry, leaves this row out.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from benchmarks import envs
from benchmarks.promises.product import Product
from benchmarks.promises.rows import Found, Skip, Trial, promise

USER_KEY = f"stu_somebody.{'u' * 40}"
PATIENCE_S = 1800.0

# Names and versions that exist are sent often enough to get behind the 404. No description says that a string must
# be an image, or which fields of a question go together: of these routes a refusal of what fits the schema is
# no finding.
CONFIG = """hooks = "{hooks}"
[dictionaries.names]
values = ["default"]
[dictionaries.versions]
values = ["base", "live", "latest", "last-good", "v0000", "v0001"]
[parameters]
"path.name" = {{ dictionary = "names", probability = 0.9 }}
"path.version" = {{ dictionary = "versions", probability = 0.8 }}
[[operations]]
include-path = ["/answer", "/v1/answer", "/v1/chat/completions"]
checks.positive_data_acceptance.expected-statuses = ["2xx", 401, 403, 404, 409, 415, 422, 429]
"""
# It sends one Idempotency-Key with body after body, which is rightly refused: each gets a key of its own. A
# request from which a header is left out on purpose must not be touched, or that header comes back.
HOOKS = r"""import itertools
import re

import schemathesis

NUMBERS = itertools.count()


@schemathesis.hook
def before_call(context, case, kwargs):
    key = str(case.headers.get("Idempotency-Key")) if case.headers else ""
    scenario = case.meta and getattr(case.meta.phase.data, "scenario", None)
    if scenario != "missing_parameter" and re.fullmatch(r"[!-~]{1,255}", key):
        case.headers["Idempotency-Key"] = f"key-{next(NUMBERS)}"
"""


@promise("I10", "the OpenAPI document is true")
def the_description_is_true(trial: Trial) -> Found:
    """Every route with the admin key and with a user key: statuses, types, schemas and keys as described."""
    st = schemathesis()
    with Product(trial.folder / "home", worker=False, api_keys=json.dumps([USER_KEY])) as product:
        admin = (product.home / "admin.key").read_text().strip()
        reports = [_asked(st, trial, product, key) for key in (admin, USER_KEY)]
    num = sum(report["test_cases"]["generated"] for report in reports)
    found = sorted({_said(finding) for report in reports for finding in report["failures"] + report["errors"]})
    complete = all(report["complete"] and not report["operations"]["errored"] for report in reports)
    enough = num >= trial.times(300, 5000)
    return Found(not found and complete and enough, f"{len(found)} findings in {num} requests {found[:3]}")


def schemathesis() -> Path:
    """Its command. Raises Skip where it is not there and cannot be installed."""
    try:
        return envs.python("schemathesis").absolute().with_name("st")
    except subprocess.CalledProcessError:
        raise Skip("schemathesis cannot be installed") from None


def _asked(st: Path, trial: Trial, product: Product, key: str) -> dict[str, Any]:
    """The report of one run."""
    trial.folder.mkdir(exist_ok=True)
    hooks, config, report = (trial.folder / name for name in ("hooks.py", "schemathesis.toml", "report.json"))
    hooks.write_text(HOOKS)
    config.write_text(CONFIG.format(hooks=hooks))
    command = [str(st), "--config-file", str(config), "run", f"{product.url}/openapi.json"]
    command += ["-H", f"Authorization: Bearer {key}", "--checks", "all", "--phases", "examples,coverage,fuzzing"]
    command += ["-n", str(trial.times(4, 200)), "--seed", str(trial.seed), "--generation-database", "none"]
    command += ["--exclude-path", "/v1/adaptation/events"]  # it has no end
    command += ["--continue-on-failure", "--report", "json", "--report-json-path", str(report)]
    report.unlink(missing_ok=True)
    subprocess.run(command, cwd=trial.folder, capture_output=True, timeout=PATIENCE_S)
    found: dict[str, Any] = json.loads(report.read_bytes())
    return found


def _said(finding: dict[str, Any]) -> str:
    first, *more = finding.get("operations") or ["?"]
    also = f" and {len(more)} more" if more else ""
    return f"{finding.get('title') or finding.get('type')}: {first}{also}"
