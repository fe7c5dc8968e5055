"""The report as a reader meets it, in headless Chromium: it opens silently, draws, searches, sorts, and fits a phone.

The page draws and unpacks in its own time. So every check waits until it holds, and fails where it still does not
after TIMEOUT.

Screenshots of each page are left in $SCREENSHOTS, if that is set, for whoever wants to look.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from support.tiny_reports import add_baseline, add_run_with_features

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed; make test-browser installs it")
LAPTOP, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 740}
OWN = ("file:", "data:", "blob:")
EVIL = "<img src=x onerror=alert(1)>"
TIMEOUT = 30_000  # milliseconds, as of Playwright's own actions; expect's 5 s are few on a busy machine
expect.set_options(timeout=TIMEOUT)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory, tiny_cache, tiny_model) -> Path:
    """The page of two SAEs with features, one without, and a baseline; one token of the words is hostile."""
    from trainer.report.report import write_report

    runs = tmp_path_factory.mktemp("sweep") / "runs"
    add_run_with_features(runs, "a-topk", tiny_cache, tiny_model)
    named = add_run_with_features(runs, "b", tiny_cache, tiny_model, l0=12.0, explained_variance=0.9)
    evil = named.rename(runs / f"b {EVIL}")
    words = evil / "features" / "tokens.json"
    words.write_text(json.dumps(dict.fromkeys(json.loads(words.read_text()), EVIL)))
    plain = add_run_with_features(runs, "c-plain", tiny_cache, tiny_model, l0=30.0, explained_variance=0.95)
    shutil.rmtree(plain / "features")
    add_baseline(runs, explained_variance=0.5, l0=4.0)
    return write_report(runs, runs.parent / "report.html")


class Reader:
    """A tab that has opened the report, and everything that must not happen in it."""

    def __init__(self, browser: Browser, report: Path, address: str = "", **settings: object):
        self.faults: list[str] = []
        self.page: Page = browser.new_page(**{"viewport": LAPTOP, **settings})
        self.page.set_default_timeout(TIMEOUT)
        self.page.on("console", lambda message: self._note(message.type in ("error", "warning"), message.text))
        self.page.on("pageerror", lambda error: self._note(True, str(error)))
        self.page.on("dialog", lambda dialog: self._note(True, dialog.message))
        self.page.on("request", lambda request: self._note(not request.url.startswith(OWN), request.url))
        self.page.goto(report.as_uri() + address)

    def _note(self, is_fault: bool, text: str) -> None:
        if is_fault:
            self.faults.append(text)

    def __enter__(self) -> Page:
        return self.page

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.page.close()
        if kind is None:
            assert self.faults == []


def keep(page: Page, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


IS_LARGE = """plot => {
    const {width, height} = plot.querySelector("svg.main-svg").getBoundingClientRect();
    return Math.min(width, height) > 200;
}"""


def test_it_opens_silently_and_draws_every_plot(browser, report):
    with Reader(browser, report) as page:
        plots = page.locator("#sweep .plot")
        expect(plots).to_have_count(8)
        for plot in plots.all():
            expect(plot.locator(".trace path").first, plot.get_attribute("id")).to_be_attached()
            page.wait_for_function(IS_LARGE, arg=plot.element_handle())
        expect(page.locator("#plot-ev .points path"), "three SAEs and the baseline").to_have_count(4)
        keep(page, "sweep")


def test_a_press_on_a_mark_opens_the_sae(browser, report):
    with Reader(browser, report) as page:
        mark = page.locator("#plot-ev .points path").first
        mark.hover(force=True)  # plotly lays a sheet over its marks, which takes the pointer
        expect(page.locator("#plot-ev .hoverlayer"), "the settings").to_contain_text("d_sae 48")
        mark.click(force=True)
        expect(page.locator("#sae h1")).to_have_text("a-topk")
        expect(page.locator("#sweep")).to_be_hidden()
        page.go_back()
        expect(page.locator("#sweep h1")).to_be_visible()
        expect(page.locator("#sae")).to_be_hidden()


def test_the_table_sorts_and_filters(browser, report):
    by_l0 = ["pca-k4-blocks.1.hook_resid_post", "a-topk", f"b {EVIL}", "c-plain"]  # 4.0, 4.2, 12, 30
    with Reader(browser, report) as page:
        names = page.locator("#runs tbody tr:not([hidden]) a")
        marks = page.locator("#plot-ev .points path")
        page.get_by_role("button", name="L0").click()
        expect(names).to_have_text(by_l0)
        page.get_by_role("button", name="L0").click()
        expect(names).to_have_text(by_l0[::-1])
        page.locator("#filter").fill("TOPK b")
        expect(names).to_have_text([f"b {EVIL}"])
        expect(page.locator("#filtered")).to_have_text("1 of 4")
        expect(marks, "what is left out is not drawn").to_have_count(1)
        page.locator("#filter").fill("")
        expect(marks).to_have_count(4)
        page.locator(".key button").first.click()
        expect(page.locator("#plot-loss .trace")).to_have_count(2)


def data_of(page: Page, index: int) -> dict:
    """What the page holds of an SAE's features."""
    return json.loads(gzip.decompress(base64.b64decode(page.locator(f"#features-{index}").text_content())))


def strength_on(places: set[int], latent: dict) -> float:
    """How strong a latent is at most on a token at these places, in the contexts shown; 1 is its maximum."""
    contexts = [*latent["top"], *(context for band in latent["bands"] for context in band["contexts"])]
    acts = [
        abs(act)
        for context in contexts
        for place, act in zip(context["tokens"], context["acts"], strict=True)
        if place in places
    ]
    return max(acts, default=0) / latent["max_act"]


def test_features_are_found_by_id_and_by_token(browser, report):
    with Reader(browser, report, "#/a-topk") as page:
        data = data_of(page, 0)
        listed = page.locator("#feature-list b")
        expect(listed).to_have_text([str(latent["latent"]) for latent in data["latents"]])
        number = str(data["latents"][3]["latent"])
        page.locator("#search").fill(number)
        expect(listed.first).to_have_text(number)
        page.locator(f"#feature-list a[href$='/{number}']").click()
        expect(page.locator("#feature-title")).to_have_text(f"Latent {number}")
        expect(page).to_have_url(re.compile(rf"#/a-topk/{number}$"))

        word = " keeper"
        page.locator("#search").fill(word)
        places = {place for place, text in enumerate(data["tokens"]) if word in text}
        fires_on_it = [latent for latent in data["latents"] if strength_on(places, latent) > 0]
        assert fires_on_it
        fires_on_it.sort(key=lambda latent: strength_on(places, latent), reverse=True)
        expect(listed).to_have_text([str(latent["latent"]) for latent in fires_on_it])
        page.locator("#search").fill("47")
        page.locator("#search").fill("999")
        expect(page.locator("#found")).to_contain_text("Latent 999 is not among those shown")


def test_a_feature_shows_its_contexts_as_they_are(browser, report):
    with Reader(browser, report, "#/a-topk") as page:
        data = data_of(page, 0)
        latent = data["latents"][0]
        lines = page.locator("#feature .contexts").first.locator(".text")
        expect(lines).to_have_count(len(latent["top"]))
        for line, context in zip(lines.all(), latent["top"], strict=True):
            text = "".join(data["tokens"][place] for place in context["tokens"])
            shown = text.replace("\n", "⏎").replace("\t", "⇥")
            expect(line).to_have_js_property("textContent", shown)  # every space counts, unlike in to_have_text
        peak = page.locator("#feature .peak").first
        peak.hover()
        act = latent["top"][0]["acts"][latent["top"][0]["peak"]]
        expect(page.locator("#tip")).to_have_text(re.compile(rf"  {re.escape(str(act))}$"))
        expect(peak).not_to_have_css("background-color", "rgba(0, 0, 0, 0)")
        expect(page.locator("#plot-histogram .bars path").first).to_be_attached()
        expect(page.locator(".lens tbody tr")).to_have_count(20)
        keep(page, "features")


IS_INSIDE_THE_LIST = """row => {
    const {top, bottom} = row.getBoundingClientRect(), list = row.closest("nav").getBoundingClientRect();
    return list.top <= top && bottom <= list.bottom;
}"""


def test_an_address_shows_its_latent_in_the_list_too(browser, report):
    with Reader(browser, report, "#/a-topk") as page:
        last = data_of(page, 0)["latents"][-1]["latent"]
    with Reader(browser, report, f"#/a-topk/{last}") as page:
        current = page.locator("#feature-list a[aria-current]")
        expect(current.locator("b")).to_have_text(str(last))
        page.wait_for_function(IS_INSIDE_THE_LIST, arg=current.element_handle())


def test_hostile_words_stay_words(browser, report):
    with Reader(browser, report) as page:
        page.get_by_role("link", name="b <img").click()
        expect(page.locator("#feature .text").first).to_contain_text(EVIL)
        expect(page.locator("img")).to_have_count(0)


def test_an_sae_without_features_says_how_to_get_them(browser, report):
    with Reader(browser, report, "#/c-plain") as page:
        expect(page.locator("#no-features")).to_contain_text("actcache features RUN")
        expect(page.locator("#metrics dd").first).to_have_text("30.0")


def test_a_browser_too_old_to_unpack_says_so(browser, report):
    with Reader(browser, report) as page:
        page.add_init_script("delete window.DecompressionStream")
        page.goto(f"{report.as_uri()}#/a-topk")
        page.reload()
        expect(page.locator("#no-features")).to_contain_text("This browser cannot unpack features")
        expect(page.locator("#metrics dd").first).to_be_visible()


IS_LIGHT_ON_DARK = """() => {
    const brightness = rgb => rgb.match(/[0-9]+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 3;
    const {color, backgroundColor} = getComputedStyle(document.body);
    return brightness(color) > 200 && brightness(backgroundColor) < 50;
}"""


@pytest.mark.parametrize(("address", "shown"), [("", "#sweep"), ("#/a-topk", "#sae")])
def test_it_fits_a_phone_and_the_dark(browser, report, address, shown):
    with Reader(browser, report, address, viewport=PHONE, color_scheme="dark", is_mobile=True, has_touch=True) as page:
        expect(page.locator(f"{shown} h1")).to_be_visible()
        expect(page.locator(f"{shown} .plot .main-svg").last).to_be_visible()
        page.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=PHONE["width"])
        page.wait_for_function(IS_LIGHT_ON_DARK)
        keep(page, f"phone{address.replace('/', '-')}")
