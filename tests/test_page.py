"""The live page in a real browser: what it shows, what it does, that everyone can use it, and that it holds on."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn

from tests.fakes import ADMIN, ADMIN_KEY, USER_KEY, World
from tests.redis_servers import eventually, running
from tests.test_live import free_port, serving

CHROMIUM = shutil.which("chromium")
PICTURE = Path(__file__).parents[1] / "examples/images/fluent-emoji-flat/airplane.png"
WITHIN_MS = 10_000
WIDE, NARROW = {"width": 1280, "height": 1500}, {"width": 360, "height": 800}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH")
playwright = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@dataclass
class Site:
    """A server that can be killed and started again, and what its worker would tell."""

    home: Path
    port: int
    redis_url: str
    process: subprocess.Popen[str] = field(init=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def tell(self, kind: str, **data: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps([kind, data]) + "\n")
        self.process.stdin.flush()

    def step(self, number: int) -> None:
        share = min(0.95, 0.5 + number / 100)
        self.tell(
            "step",
            step=number,
            seconds=0.4,
            groups=16,
            informative=16 - number % 5,
            reward=share - 0.1,
            majority=share,
            entropy=1 - share,
            kl=number / 200,
            valid=1.0,
            prequential=share - 0.05,
            grad_norm=1.0,
        )

    def learn(self) -> None:
        """What a worker tells in a few minutes."""
        for number in range(1, 25):
            self.step(number)
            if number % 8 == 0:
                gate = {"kl_step": number / 100, "kl_base": number / 60, "valid": 1.0}
                self.tell("verdict", accepted=True, early=False, reasons=[], metrics=gate, step=number)
                version, parent = f"v{number // 8:04d}", f"v{number // 8 - 1:04d}"
                metrics = {"reward": 0.5 + number / 100, "kl": number / 200}
                self.tell("publish", version=version, parent=parent, num_queries=16, metrics=metrics, gate=gate)
                self.tell("swap", version=version, previous=parent, seconds=0.1)
        self.tell(
            "verdict", accepted=False, early=False, reasons=["kl_step 0.412 is above 0.3"], metrics={}, step=24
        )

    @contextmanager
    def up(self) -> Iterator[None]:
        with serving(self.home, self.port, self.redis_url) as self.process:
            yield


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with running(folder / "valkey") as valkey:
        made = Site(folder / "home", free_port(), valkey.url)
        with made.up():
            made.learn()
            yield made
            # the last test may have put another process in its place


class Visit:
    """A page that is open, and what it complained of or asked others for."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        self.may_fail = False
        page.set_default_timeout(WITHIN_MS)
        page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self._check(request.url, url.partition("?")[0]))
        page.goto(url)

    def _check(self, asked: str, home: str) -> None:
        if not asked.startswith((home, "blob:", "data:")):
            self.elsewhere.append(asked)

    def see(self, selector: str, text: str | None = None) -> Any:
        """What is there, once it is there with this text."""
        found = self.page.locator(selector)
        playwright.expect(found).to_be_visible(timeout=WITHIN_MS)
        if text is not None:
            playwright.expect(found).to_contain_text(text, timeout=WITHIN_MS)
        return found

    def unlock(self, key: str = ADMIN_KEY) -> None:
        self.page.click("#open-keys")
        self.page.fill("#admin-key", key)
        self.page.click("#keys button[value=save]")


@pytest.fixture
def visit(browser: Any, site: Site) -> Iterator[Visit]:
    with visiting(browser, site.url) as made:
        made.see("#connection", "live")
        yield made


@contextmanager
def visiting(browser: Any, url: str, **options: Any) -> Iterator[Visit]:
    context = browser.new_context(**{"viewport": WIDE, **options})
    try:
        made = Visit(context.new_page(), url)
        yield made
        assert made.elsewhere == [], "it works offline"
        if not made.may_fail:
            assert made.complaints == []
    finally:
        context.close()


# --- another adapter -----------------------------------------------------------------------------------


def test_the_page_of_another_adapter_is_about_it_alone(browser: Any, site: Site) -> None:
    made = httpx2.post(f"{site.url}v1/adapters", json={"name": "camera-7"}, headers=ADMIN)
    assert made.status_code in (201, 409)
    with visiting(browser, f"{site.url}?adapter=camera-7") as visit:
        visit.see("#connection", "live")
        visit.see("#what", "camera-7")
        visit.see("#empty", "Nothing was learned yet")
        visit.page.set_input_files("#image", PICTURE)
        visit.page.fill("#labels", "airplane, rocket")
        visit.page.click("#submit")
        assert visit.see("[data-fact=version]").inner_text() == "v0000"
        playwright.expect(visit.page.locator("#which")).to_be_hidden()
        visit.unlock()
        assert visit.see("#which").input_value() == "camera-7"
        visit.page.click("[data-act=pause]")
        visit.page.click("#confirm-yes")
        visit.see("[data-act=resume]")
        paused = {
            name: httpx2.get(f"{site.url}v1/adaptation?adapter={name}", headers=ADMIN).json()["paused"]
            for name in ("default", "camera-7")
        }
        assert paused == {"default": False, "camera-7": True}
        visit.page.select_option("#which", "default")
        visit.see("#what", "default")
        playwright.expect(visit.page.locator("#empty")).to_be_hidden(timeout=WITHIN_MS)


def test_an_adapter_that_is_not_there_is_told(browser: Any, site: Site) -> None:
    with visiting(browser, f"{site.url}?adapter=nobody") as visit:
        visit.may_fail = True  # the browser complains of what it is refused
        visit.see("#connection", "no such adapter")


# --- try it ------------------------------------------------------------------------------------------


def test_a_picture_is_recognised_and_one_sees_what_becomes_of_the_query(visit: Visit) -> None:
    page = visit.page
    page.set_input_files("#image", PICTURE)
    visit.see("#preview")
    page.fill("#labels", "airplane, rocket\nsailboat, airplane")
    page.click("#submit")
    visit.see("#answer .said", "airplane")
    assert page.locator("#answer .bars th").all_inner_texts() == ["airplane", "rocket", "sailboat"]
    assert page.locator("#answer .bars td").all_inner_texts()[1] == "33.3 %"
    share = page.locator("#answer .bar").first.evaluate("each => each.style.getPropertyValue('--share')")
    assert float(share) == pytest.approx(1 / 3)
    assert visit.see("[data-fact=version]").inner_text().startswith("v")
    visit.see("[data-fact=kept]", "queued to learn from")
    page.uncheck("#adapt")
    page.fill("#labels", "")
    page.fill("#question", "What is this?")
    page.press("#question", "Enter")
    visit.see("#answer .said", "a thing")
    visit.see("[data-fact=kept]", "not kept, as you wished")


def test_what_is_missing_is_said_and_can_be_given(visit: Visit) -> None:
    visit.page.click("#submit")
    visit.see("#answer .problem", "Choose an image first")
    visit.page.set_input_files("#image", PICTURE)
    visit.page.click("#submit")
    visit.see("#answer .problem", "Ask a question")
    visit.page.fill("#labels", "airplane")
    visit.page.click("#submit")
    visit.see("#answer .problem", "at least two labels")


PICTURES = """
async () => {
  const canvas = document.createElement("canvas");
  canvas.width = 3000;
  canvas.height = 20;
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  const files = new DataTransfer();
  files.items.add(new File([blob], "wide.png", { type: "image/png" }));
  KIND
}
"""
DROP = (
    'document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: files, bubbles: true }));'
)
PASTE = 'document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData: files, bubbles: true }));'


@pytest.mark.parametrize("kind", [DROP, PASTE])
def test_pictures_are_dropped_and_pasted_and_not_sent_larger_than_they_are_read(visit: Visit, kind: str) -> None:
    visit.page.evaluate(PICTURES.replace("KIND", kind))
    visit.see("#preview")
    natural = "each => each.decode().then(() => [each.naturalWidth, each.naturalHeight, each.alt])"
    assert visit.page.locator("#preview").evaluate(natural) == [2048, 14, "Your image: wide.png"]


# --- watch it learn ----------------------------------------------------------------------------------


def test_it_draws_what_was_learned_and_goes_on_with_what_is(visit: Visit, site: Site) -> None:
    page = visit.page
    drawn = page.locator("#charts figure:not([hidden])")
    playwright.expect(drawn).to_have_count(9)
    assert page.locator("#charts canvas").count() == 9
    visit.see("[data-chart=majority] output")
    label = page.locator("[data-chart=reward] .canvas").get_attribute("aria-label")
    assert label.startswith("Reward: 0.64 at the last of ")
    visit.see("[data-chart=gate] output", "refused")
    visit.see("[data-chart=served] output", "v0003")
    assert page.locator("#empty").is_hidden()
    before = int(label.rpartition("of ")[2].split()[0])
    site.step(40)
    visit.see("[data-chart=majority] output", "90 %")
    after = page.locator("[data-chart=reward] .canvas").get_attribute("aria-label")
    assert int(after.rpartition("of ")[2].split()[0]) == before + 1
    page.click("#axis >> text=time")
    visit.see("[data-chart=majority] output", "90 %")
    page.click("summary >> text=Numbers of the last steps")
    assert page.locator("#numbers thead th").all_inner_texts()[:3] == ["Time", "Reward", "Vote share"]
    assert page.locator("#numbers tbody tr").count() == 20


def test_it_says_how_things_stand(visit: Visit) -> None:
    visit.see("[data-vital=Serving] dd", "v")
    visit.see("[data-vital=Mode] dd", "learning")
    visit.see("[data-vital=Steps] dd", "48")
    visit.see("[data-vital=Buffer] dd", "%")
    visit.see("[data-vital=Age] dd")
    visit.see("#verdict", "refused. kl_step 0.412 is above 0.3")
    playwright.expect(visit.page.locator("#serving figure:not([hidden])").first).to_be_visible()


def test_a_version_opens_with_what_changed(visit: Visit) -> None:
    page = visit.page
    page.locator("#marks li[data-kind=publish] button", has_text="v0003 published").click()
    visit.see("#detail-title", "v0003 published")
    rows = page.locator("#detail table").first.locator("tbody tr").all_inner_texts()
    assert [row.split() for row in rows] == [["kl", "0.12", "0.08", "+0.04"], ["reward", "0.74", "0.66", "+0.08"]]
    visit.see("#detail", "The manifest is shown with the admin key")
    page.keyboard.press("Escape")
    playwright.expect(page.locator("#detail")).to_be_hidden()
    visit.see("#marks li[data-kind=verdict]", "candidate refused").locator("button").click()
    visit.see("#detail", "kl_step 0.412 is above 0.3")
    assert "null" not in page.locator("#detail").inner_text()
    page.keyboard.press("Escape")
    served = page.locator("#marks li[data-kind=publish] .more").first.inner_text()
    assert "served" in served, "a swap is told with what it is of"


# --- act ---------------------------------------------------------------------------------------------


def test_acts_are_confirmed_told_and_undone(visit: Visit) -> None:
    page = visit.page
    playwright.expect(page.locator("#acts")).to_be_hidden()
    visit.unlock()
    visit.see("#acts")
    page.click("[data-act=promote]")
    page.select_option("#confirm select", "v0001")
    page.click("#confirm button[value=cancel]")
    visit.see("[data-vital=Serving] dd", "v0002")
    page.click("[data-act=promote]")
    page.select_option("#confirm select", "v0001")
    page.click("#confirm-yes")
    visit.see("#done", "v0001 is live")
    visit.see("#marks li[data-kind=promote]", "v0001 promoted")
    visit.see("[data-vital=Serving] dd", "v0001")
    page.click("#done >> text=Undo")
    visit.see("#done", "v0002 is live again")
    page.click("[data-act=pause]")
    page.click("#confirm-yes")
    visit.see("[data-act=resume]")
    visit.see("[data-vital=Mode] dd", "paused")
    page.click("#done >> text=Undo")
    visit.see("[data-act=pause]")
    page.click("[data-act=snapshot]")
    page.fill("#confirm input", "before-fair")
    page.click("#confirm-yes")
    visit.see("#done", "“before-fair”")
    row = visit.see("#marks li[data-kind=snapshot]", "before-fair")
    row.locator("button").click()
    visit.see("#detail", "before-fair")
    page.click("#detail summary")
    visit.see("#detail pre", '"origin": "snapshot"')
    page.keyboard.press("Escape")
    page.click("[data-act=pin]")
    page.select_option("#confirm select", "v0001")
    page.click("#confirm-yes")
    visit.see("#done", "v0001 is pinned")
    visit.see("#marks li[data-kind=pin]", "v0001 pinned")
    page.click("#done >> text=Undo")
    visit.see("#done", "v0001 is no longer pinned")
    visit.see("#marks li[data-kind=unpin]", "v0001 unpinned")
    page.click("[data-act=reset]")
    visit.see("#confirm", "No version is lost")
    page.click("#confirm-yes")
    visit.see("#done", "is the base again")
    page.click("#done >> text=Undo")
    visit.see("#done", "v0002 is live again")
    page.click("[data-act=rollback]")
    page.select_option("#confirm select", "v0001")
    page.click("#confirm-yes")
    visit.see("#done", "Rolled back to v0001")
    page.click("#done >> text=Undo")
    visit.see("#done", "v0002 is live again")


def test_a_key_stays_in_its_tab_and_a_wrong_one_opens_nothing(visit: Visit) -> None:
    visit.may_fail = True  # a refusal is an error in the browser's console
    page = visit.page
    visit.unlock("sta_nobody.0000000000000000")
    visit.see("#done", "not this server's")
    playwright.expect(page.locator("#acts")).to_be_hidden()
    visit.unlock()
    visit.see("#acts")
    assert page.evaluate("JSON.stringify(localStorage) + document.cookie") == "{}"
    assert ADMIN_KEY not in page.content()
    page.reload()
    visit.see("#acts")
    with page.context.expect_page() as opened:
        page.evaluate("open('./', '_blank', 'noopener')")
    playwright.expect(opened.value.locator("#connection")).to_contain_text("live", timeout=WITHIN_MS)
    playwright.expect(opened.value.locator("#acts")).to_be_hidden()


def test_where_a_key_is_needed_it_is_asked_for(browser: Any, tmp_path: Path) -> None:
    world = World(tmp_path, user_keys=(USER_KEY,))
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(world.app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        eventually(lambda: server.started)
        with visiting(browser, f"http://127.0.0.1:{port}/") as made:
            made.may_fail = True
            made.see("#connection", "a key is needed")
            made.see("#keys")
            made.page.fill("#user-key", USER_KEY)
            made.page.click("#keys button[value=save]")
            made.see("#connection", "live")
            made.see("[data-vital=Serving] dd", "v0002")
    finally:
        server.should_exit = True
        world.history.end()
        thread.join(20)


# --- is it helping me? ---------------------------------------------------------------------------------


def ask(site: Site, *questions: str) -> list[str]:
    """Questions that are kept, and the ids of their queries."""
    asked = [
        httpx2.post(f"{site.url}v1/answer", data={"question": each}, files={"image": PICTURE.read_bytes()})
        for each in questions
    ]
    return [reply.json()["adaptation"]["query_id"] for reply in asked]


def forget(site: Site) -> None:
    """Erase what was kept."""
    httpx2.post(f"{site.url}v1/adapters/default/reset", json={"purge_buffer": True}, headers=ADMIN)
    httpx2.post(f"{site.url}v1/adapters/default/promote", json={"version": "v0002"}, headers=ADMIN)


def test_an_answer_is_called_right_or_wrong(visit: Visit) -> None:
    page = visit.page
    page.set_input_files("#image", PICTURE)
    page.fill("#question", "What is this?")
    page.click("#submit")
    visit.see("#answer .said", "a thing")
    page.click("[data-correct=false]")
    visit.see("#answer .feedback", "Counted as wrong.")
    visit.see("[data-vital=Feedback] dd", "0 right · 1 wrong")


def test_pairs_are_judged_blind_by_mouse_and_by_keyboard(visit: Visit, site: Site) -> None:
    page = visit.page
    forget(site)
    visit.see("#review-locked", "needs the admin key")
    visit.unlock()
    visit.see("#reviewing")
    page.click("#review-form button")
    visit.see("#review-told", "No queries are kept")
    questions = [f"What is number {number}?" for number in range(4)]
    ask(site, *questions)
    page.click("#review-form button")
    seen = []
    for number in range(4):
        visit.see("#pair")
        playwright.expect(page.locator("#pair")).to_be_focused(timeout=WITHIN_MS)
        seen.append(page.locator("#pair-question").inner_text())
        said = page.locator("#pair-choices .said span").all_inner_texts()
        assert sorted(said) == ["a bird", "a thing"]
        assert "v000" not in page.locator("#pair").inner_text()
        assert page.locator("#pair-images img").evaluate("each => each.decode().then(() => each.naturalWidth)") > 0
        place = said.index("a thing")
        if number % 2:
            page.locator("#pair-choices .said").nth(place).click()
        else:
            page.keyboard.press(str(place + 1))
        playwright.expect(page.locator("#review-result")).to_contain_text(f"{number + 1} of these judged")
    assert sorted(seen) == questions
    visit.see("#review-told", "all that differ are judged")
    visit.see("#review-result", "It helps: +100 %")
    visit.see("#review-result", "v0002 is right in that many more of the compared queries than v0000")
    page.focus("#review-form button")
    page.keyboard.press("1")
    playwright.expect(page.locator("#review-result")).to_contain_text("4 of these judged")


def test_a_query_that_was_erased_meanwhile_is_passed_over(visit: Visit, site: Site) -> None:
    visit.may_fail = True  # a refusal is an error in the browser's console
    forget(site)
    ids = ask(site, "What is one?", "What is two?")
    visit.unlock()
    visit.see("#reviewing")
    visit.page.click("#review-form button")
    shown = visit.see("#pair-question").inner_text()
    gone = ids[0] if "one" in shown else ids[1]
    httpx2.post(f"{site.url}v1/adaptation/erase", json={"query_ids": [gone]}, headers=ADMIN)
    visit.page.keyboard.press("3")
    visit.see("#pair-question", "two" if "one" in shown else "one")


def test_two_versions_are_laid_side_by_side_and_one_click_goes_back(visit: Visit, site: Site) -> None:
    page = visit.page
    forget(site)
    ask(site, "What is this then?")
    visit.unlock()
    visit.see("#acts")
    page.locator("#marks li[data-kind=publish] button", has_text="v0001 published").click()
    page.select_option("#versus-other", "v0002")
    page.click("#versus button")
    visit.see("#versus-result", "1 of 1 recent queries are answered differently")
    assert page.locator("#versus-result .changed p").inner_text().split("\n") == [
        "What is this then?",
        "v0001: an old thing",
        "v0002: a thing",
    ]
    visit.see("#versus-result table", "parent")
    page.click("#versus-back")
    visit.see("#confirm", "Roll back?")
    assert page.locator("#confirm select").input_value() == "v0001"
    page.click("#confirm-yes")
    visit.see("#done", "Rolled back to v0001")
    page.click("#done >> text=Undo")
    visit.see("#done", "v0002 is live again")


# --- for everyone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("look", ["light", "dark", "narrow"])
def test_it_is_accessible(browser: Any, site: Site, look: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    options = {
        "viewport": NARROW if look == "narrow" else WIDE,
        "color_scheme": "dark" if look == "dark" else "light",
    }
    with visiting(browser, site.url, **options, reduced_motion="reduce") as made:
        made.see("#connection", "live")
        made.see("[data-vital=Serving] dd")
        assert faults(axe, made.page) == []
        made.page.locator("#marks li[data-kind=publish] button").first.click()
        made.see("#detail table >> nth=0")
        assert faults(axe, made.page) == []
        made.page.keyboard.press("Escape")
        ask(site, f"Is this {look}?")
        made.unlock()
        made.see("#reviewing")
        made.page.click("#review-form button")
        made.see("#pair")
        assert faults(axe, made.page) == []
        made.page.locator("#marks li[data-kind=publish] button", has_text="v0001 published").click()
        made.page.click("#versus button")
        made.see("#versus-back")
        assert faults(axe, made.page) == []
        made.page.keyboard.press("Escape")
        made.page.click("#open-keys")
        assert faults(axe, made.page) == []
        made.page.keyboard.press("Escape")
        width = made.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert width[0] <= width[1], "nothing is cut off at the side"


def faults(axe: Any, page: Any) -> list[str]:
    found = axe.run(page).response["violations"]
    return [f"{each['id']}: {[node['target'] for node in each['nodes'][:3]]}" for each in found]


def test_everything_is_reached_by_keyboard(visit: Visit) -> None:
    page = visit.page
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        focused = "document.activeElement.id || document.activeElement.name || document.activeElement.className"
        reached.add(page.evaluate(focused))
    assert {"open-keys", "image", "question", "labels", "adapt", "adapter", "submit", "axis", "unlock"} <= reached
    page.focus("#open-keys")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "user-key"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "open-keys", "a dialog gives the focus back"


# --- it holds on; last, for it puts another server in the place of the first -----------------------------


def test_the_page_outlives_the_server(visit: Visit, site: Site) -> None:
    visit.may_fail = True
    marks = visit.page.locator("#marks li")
    before = marks.count()
    site.process.kill()
    site.process.wait()
    visit.see("#connection", "reconnecting")
    with site.up():
        site.tell("rollback", by="worker", version="v0001", reasons=["valid 0.2 is below 0.9"])
        visit.see("#connection", "live")
        visit.see("#marks li[data-by=worker]", "rolled back to v0001")
        playwright.expect(marks).to_have_count(before + 1)
