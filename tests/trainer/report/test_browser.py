"""The report as a reader meets it, in headless Chromium: it opens silently, draws, searches, sorts, and fits a phone.

Screenshots of each page are left in $SCREENSHOTS, if that is set, for whoever wants to look.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.tiny_reports import add_baseline, add_run_with_features

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed; make test-browser installs it")
LAPTOP, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 740}
OWN = ("file:", "data:", "blob:")
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

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


def test_it_opens_silently_and_draws_every_plot(browser, report):
    with Reader(browser, report) as page:
        plots = page.locator("#sweep .plot")
        assert plots.count() == 8
        for plot in plots.all():
            box = plot.locator("svg.main-svg").first.bounding_box()
            assert box is not None
            assert min(box["width"], box["height"]) > 200
            assert plot.locator(".trace path").count() > 0, plot.get_attribute("id")
        assert page.locator("#plot-ev .points path").count() == 4, "three SAEs and the baseline"
        keep(page, "sweep")


def test_a_press_on_a_mark_opens_the_sae(browser, report):
    with Reader(browser, report) as page:
        box = page.locator("#plot-ev .points path").last.bounding_box()
        assert box is not None
        page.locator("#plot-ev").scroll_into_view_if_needed()
        box = page.locator("#plot-ev .points path").nth(0).bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x, y)
        page.locator(".hoverlayer text").first.wait_for()
        assert "d_sae 48" in page.locator("#plot-ev .hoverlayer").text_content(), "the settings"
        page.mouse.click(x, y)
        page.locator("#sae h1").wait_for()
        assert page.locator("#sae h1").text_content() == "a-topk"
        assert not page.locator("#sweep").is_visible()
        page.go_back()
        page.locator("#sweep h1").wait_for()
        assert not page.locator("#sae").is_visible()


def test_the_table_sorts_and_filters(browser, report):
    names = "#runs tbody tr:not([hidden]) a"
    with Reader(browser, report) as page:
        page.get_by_role("button", name="L0").click()
        assert page.locator(names).all_text_contents()[1:] == ["a-topk", f"b {EVIL}", "c-plain"], "4.0, 4.2, 12, 30"
        page.get_by_role("button", name="L0").click()
        assert page.locator(names).all_text_contents()[:3] == ["c-plain", f"b {EVIL}", "a-topk"]
        page.locator("#filter").fill("TOPK b")
        assert page.locator(names).all_text_contents() == [f"b {EVIL}"]
        assert page.locator("#filtered").text_content() == "1 of 4"
        assert page.locator("#plot-ev .points path").count() == 1, "what is left out is not drawn"
        page.locator("#filter").fill("")
        assert page.locator("#plot-ev .points path").count() == 4
        page.locator(".key button").first.click()
        assert page.locator("#plot-loss .trace").count() == 2


def data_of(page: Page, index: int) -> dict:
    """What the page holds of an SAE's features."""
    return json.loads(gzip.decompress(base64.b64decode(page.locator(f"#features-{index}").text_content())))


def test_features_are_found_by_id_and_by_token(browser, report):
    with Reader(browser, report, "#/a-topk") as page:
        data = data_of(page, 0)
        listed = page.locator("#feature-list b")
        assert listed.all_text_contents() == [str(latent["latent"]) for latent in data["latents"]]
        latent = data["latents"][3]
        page.locator("#search").fill(str(latent["latent"]))
        assert str(latent["latent"]) in listed.all_text_contents()
        page.locator(f"#feature-list a[href$='/{latent['latent']}']").click()
        assert page.locator("#feature-title").text_content() == f"Latent {latent['latent']}"
        assert page.url.endswith(f"#/a-topk/{latent['latent']}")

        word = " keeper"
        page.locator("#search").fill(word)
        places = {place for place, text in enumerate(data["tokens"]) if word in text}
        fires_on_it = {
            str(each["latent"])
            for each in data["latents"]
            for context in [*each["top"], *(context for band in each["bands"] for context in band["contexts"])]
            for place, act in zip(context["tokens"], context["acts"], strict=True)
            if act and place in places
        }
        assert fires_on_it
        assert set(listed.all_text_contents()) == fires_on_it
        page.locator("#search").fill("47")
        page.locator("#search").fill("999")
        assert "Latent 999 is not among those shown" in page.locator("#found").text_content()


def test_a_feature_shows_its_contexts_as_they_are(browser, report):
    with Reader(browser, report, "#/a-topk") as page:
        data = data_of(page, 0)
        latent = data["latents"][0]
        lines = page.locator("#feature .contexts").first.locator(".text")
        texts = ["".join(data["tokens"][place] for place in context["tokens"]) for context in latent["top"]]
        shown = [text.replace("\n", "⏎").replace("\t", "⇥") for text in texts]
        assert lines.all_text_contents() == shown
        peak = page.locator("#feature .peak").first
        peak.hover()
        assert page.locator("#tip").text_content().endswith(f"  {latent['top'][0]['acts'][latent['top'][0]['peak']]}")
        alpha = "e => getComputedStyle(e).backgroundColor"
        assert peak.evaluate(alpha) != "rgba(0, 0, 0, 0)"
        assert page.locator("#plot-histogram .bars path").count() > 0
        assert page.locator(".lens tbody tr").count() == 20
        keep(page, "features")


def test_an_address_shows_its_latent_in_the_list_too(browser, report):
    with Reader(browser, report, "#/a-topk") as page:
        last = data_of(page, 0)["latents"][-1]["latent"]
    with Reader(browser, report, f"#/a-topk/{last}") as page:
        current = page.locator("#feature-list a[aria-current]")
        current.wait_for()
        assert current.locator("b").text_content() == str(last)
        row, listed = current.bounding_box(), page.locator(".browser nav").bounding_box()
        assert row is not None
        assert listed is not None
        assert listed["y"] <= row["y"]
        assert row["y"] + row["height"] <= listed["y"] + listed["height"]


def test_hostile_words_stay_words(browser, report):
    with Reader(browser, report) as page:
        page.get_by_role("link", name="b <img").click()
        page.locator("#feature .text").first.wait_for()
        assert EVIL in page.locator("#feature .text").first.text_content()
        assert page.locator("img").count() == 0


def test_an_sae_without_features_says_how_to_get_them(browser, report):
    with Reader(browser, report, "#/c-plain") as page:
        assert "actcache features RUN" in page.locator("#no-features").text_content()
        assert page.locator("#metrics dd").all_text_contents()[0] == "30.0"


def test_a_browser_too_old_to_unpack_says_so(browser, report):
    with Reader(browser, report) as page:
        page.add_init_script("delete window.DecompressionStream")
        page.goto(f"{report.as_uri()}#/a-topk")
        page.reload()
        assert "This browser cannot unpack features" in page.locator("#no-features").text_content()
        assert page.locator("#metrics dd").count() > 0


@pytest.mark.parametrize("address", ["", "#/a-topk"])
def test_it_fits_a_phone_and_the_dark(browser, report, address):
    with Reader(browser, report, address, viewport=PHONE, color_scheme="dark", is_mobile=True, has_touch=True) as page:
        page.locator("main:visible h1").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        ink, paper = (page.evaluate(f"getComputedStyle(document.body).{what}") for what in ("color", "backgroundColor"))
        assert brightness(ink) > 200
        assert brightness(paper) < 50
        keep(page, f"phone{address.replace('/', '-')}")


def brightness(colour: str) -> float:
    """The mean of red, green and blue of rgb(r, g, b)."""
    return sum(float(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")) / 3
