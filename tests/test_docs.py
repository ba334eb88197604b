"""The pages that are written from what they describe."""

from __future__ import annotations

import pytest

from docs import generate


@pytest.mark.parametrize("name", ["http.md", "cli.md", "settings.md"])
def test_the_reference_is_current(name: str) -> None:
    written = (generate.FOLDER / name).read_text()
    assert generate.pages()[name] == written, "run `make reference` and commit what it writes"


def test_every_route_command_and_setting_is_told() -> None:
    pages = generate.pages()
    assert "`POST /answer`, `POST /v1/answer`" in pages["http.md"]
    assert "Needs the admin key." in pages["http.md"].partition("## `POST /v1/adaptation/pause`")[2][:200]
    assert "### AnswerRequest" in pages["http.md"]
    assert "## `servetune adapters promote`" in pages["cli.md"]
    assert "| `queue_wait_s` | number | `2.0` |" in pages["settings.md"]
