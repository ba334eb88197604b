"""The pictures of docs/page.md: `python -m docs.screenshots`.

A server with the embedded model is asked until it has published some versions, which takes some minutes; then the
page is photographed.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from benchmarks.promises.product import Product
from servetune import Client

ROOT = Path(__file__).parents[1]
PICTURES = sorted((ROOT / "examples/images/fluent-emoji-flat").glob("*.png"))
LABELS = [path.stem.replace("-", " ") for path in PICTURES][::3]
VERSIONS = 3
LOOKS: dict[str, dict[str, Any]] = {
    "light": {"viewport": {"width": 1280, "height": 900}},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "narrow": {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2},
}


def main() -> None:
    """Learn, act, and look."""
    with tempfile.TemporaryDirectory() as home, Product(Path(home)) as product, product.client() as client:
        ask_until(client, VERSIONS)
        client.adapters.snapshot("before-fair")
        key = (product.home / "admin.key").read_text().strip()
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for look, options in LOOKS.items():
                page = browser.new_context(**options).new_page()
                page.goto(product.url)
                visit(page, key)
                page.screenshot(path=ROOT / f"docs/images/page-{look}.png", full_page=look != "narrow")
                if look == "light":
                    page.locator("#marks li[data-kind=publish] button").first.click()
                    page.wait_for_selector("#detail table")
                    page.locator("#detail").screenshot(path=ROOT / "docs/images/page-version.png")


def visit(page: Any, key: str) -> None:
    """Ask a question, give the admin key, and let some seconds pass."""
    page.set_input_files("#image", next(path for path in PICTURES if path.stem == "airplane"))
    page.fill("#labels", "airplane, rocket, helicopter, sailboat, kite")
    page.click("#submit")
    page.wait_for_selector("#answer .said")
    page.click("#open-keys")
    page.fill("#admin-key", key)
    page.click("#keys button[value=save]")
    page.wait_for_selector("#acts:not([hidden])")
    time.sleep(15)
    page.evaluate("document.activeElement.blur()")


def ask_until(client: Client, versions: int) -> None:
    """Ask about ever other pictures, in the pace of a small site, until so many versions were published."""
    for number in itertools.count():
        image = Image.open(PICTURES[number % len(PICTURES)]).convert("RGB")
        turned = image.rotate(number // len(PICTURES) * 7 % 30 - 15, fillcolor="white")
        client.recognize(turned, LABELS)
        time.sleep(0.1)
        if number % 20 == 0:
            published = [each for each in client.adapters.versions() if each.origin == "worker"]
            print(f"{number} questions, {len(published)} versions", flush=True)
            if len(published) >= versions:
                return


if __name__ == "__main__":
    main()
