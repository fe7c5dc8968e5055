"""The page: self-contained, every string escaped, every number of the files in it, blanks where one is missing."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.tiny_reports import add_baseline, add_logs, evaluation
from support.tiny_saes import make_config, make_run

from actcache.errors import ManifestError
from trainer.report.figures import MOST_POINTS
from trainer.report.report import write_report
from trainer.run_folder import read_runs

MODEL = {"name": "tiny", "revision": "abc123"}
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that elements nest, and gathers attributes, texts by element, and the rows of each table."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))
        if {"th", "td"} & set(self.open):
            self.tables[-1][-1][-1] += data

    @property
    def rows(self) -> list[list[str]]:
        return self.tables[0]

    def text(self, element: str) -> str:
        return "".join(data for tag, data in self.texts if tag == element)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """An evaluated run, one that is not evaluated, and a baseline."""
    runs = tmp_path / "runs"
    done = make_run(runs, make_config("topk", name="b-done"), MODEL)
    (done / "eval.json").write_text(json.dumps(evaluation()))
    add_logs(done)
    make_run(runs, make_config("jumprelu", name="a-training"), MODEL)
    add_baseline(runs, explained_variance=0.5, l0=4.0)
    return runs


def page_of(runs: Path, out: Path) -> tuple[str, Page]:
    text = write_report(runs, out / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def figures(page: Page) -> list[dict]:
    return json.loads(next(data for _, data in page.texts if data.startswith('{"title"')))["runs"]


def test_every_number_is_in_the_table(runs, tmp_path):
    _, page = page_of(runs, tmp_path)
    header, *rows = page.rows
    assert header[:3] == ["Name", "Architecture", "Latents"]
    by_name = {row[0]: row[1:] for row in rows}
    assert list(by_name) == ["a-training", "b-done", "pca-k4-blocks.1.hook_resid_post"], "runs by name, then baselines"
    assert by_name["b-done"] == ["topk", "48", "4.2", "0.8125", "0.9688", "0.9375", "12.5%", "5,000"]
    assert by_name["a-training"] == ["jumprelu", "48", *["\u2013"] * 6], "no eval.json yet: blanks"
    assert by_name["pca-k4-blocks.1.hook_resid_post"][:4] == ["pca", "4", "4.0", "0.5000"]
    assert {len(row) for row in page.rows} == {len(header)}
    facts = page.text("dd")
    for fact in ("tiny", "abc123", "blocks.1.hook_resid_post", "0123456789abcdef", "12,345", "6,789"):
        assert fact in facts
    assert page.text("p").startswith("2 sparse autoencoders, 1 evaluated on held-out tokens, 1 PCA baseline.")


def test_the_pictures_show_what_the_files_say(runs, tmp_path):
    _, page = page_of(runs, tmp_path)
    training, done, pca = figures(page)
    assert (done["l0"], done["explained_variance"], done["ce_loss_score"]) == (4.25, 0.8125, 0.96875)
    assert done["curves"]["tokens"] == [1000, 2000, 3000, 4000, 5000]
    assert done["curves"]["loss"] == [100.0 / i for i in range(1, 6)]
    assert done["curves"]["dead"] == [i / 48 for i in range(1, 6)]
    assert done["density"] == {"log10": [-2.0, -1.0, -1.0, 0.0], "latents": [40, 40, 2, 2]}
    assert done["added_loss"] == {"position": [1, 2], "nats": [0.25, 0.125]}
    assert done["speed"] == {"tokens": [1000, 2000, 3000, 4000, 5000], "rate": [2000.0] * 5}
    assert "k 5" in done["hover"]
    assert "d_sae 48" in done["hover"]
    assert (pca["baseline"], pca["explained_variance"]) == (True, 0.5)
    assert (training["l0"], training["curves"]["tokens"], training["density"]["log10"]) == (None, [], [])
    assert (training["added_loss"]["nats"], pca["added_loss"]["nats"]) == ([], [0.25, 0.125])
    plots = {name.removeprefix("plot-") for name in page.ids if name.startswith("plot-")}
    assert plots == {"ev", "ce", "loss", "explained", "dead", "density", "position", "speed"}


def test_throughput_is_that_of_the_logs_with_its_share_of_the_bound(runs, tmp_path):
    _, page = page_of(runs, tmp_path)
    training = ["Training", "1 SAE, each of them on every token", "4,000", "steps that never wait for data", "97.0%"]
    assert page.tables[1][1:] == [training]
    log = tmp_path / "cache" / "log"
    log.mkdir(parents=True)
    for number, n_tokens in enumerate((3000, 0)):  # the second call found nothing to do
        seconds = {"n_tokens": n_tokens, "model_busy": 1.5, "total": 2.0}
        text = json.dumps({"finished": "2026-01-01T00:00:00Z", "seconds": seconds})
        (log / f"harvest-{number}.json").write_text(text)
    config = json.loads((runs / "b-done" / "config.json").read_text())
    config["cache"]["path"] = str(tmp_path / "cache")
    (runs / "b-done" / "config.json").write_text(json.dumps(config))
    _, page = page_of(runs, tmp_path)
    harvest = ["Harvest", "3,000 tokens, 2026-01-01T00:00:00Z", "1,500", "the model alone", "75.0%"]
    assert page.tables[1][1:] == [harvest, training]
    (log / "harvest-0.json").write_text("{}")
    with pytest.raises(ManifestError, match="must be the log of a harvest, it lacks 'seconds'; remove it"):
        write_report(runs, tmp_path / "report.html")


def test_it_is_one_file_that_asks_for_nothing(runs, tmp_path):
    text, page = page_of(runs, tmp_path)
    assert text.startswith("<!DOCTYPE html>")
    loading = {"src", "href", "action", "data", "srcset", "poster", "background"}
    assert all(value.startswith("#/") for _, name, value in page.attributes if name in loading)
    style = page.text("style")
    assert "url(" not in style
    assert "@import" not in style
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and value.startswith("default-src"))
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert "Plotly" in page.text("script")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.html"]


def test_it_can_be_read_without_a_mouse_or_colours(runs, tmp_path):
    _, page = page_of(runs, tmp_path)
    attributes = set(page.attributes)
    assert ("html", "lang", "en") in attributes
    assert ("meta", "name", "viewport") in attributes
    n_columns, n_rows = (sum(part(table) for table in page.tables) for part in (lambda t: len(t[0]), len))
    assert sum(entry == ("th", "scope", "col") for entry in page.attributes) == n_columns
    assert sum(entry == ("th", "scope", "row") for entry in page.attributes) == n_rows - len(page.tables)
    assert page.text("caption")
    assert page.text("label").startswith("Filter"), "the field is named"
    n_plots = sum(name.startswith("plot-") for name in page.ids)
    assert sum(name == "role" and value == "img" for _, name, value in page.attributes) == n_plots == 8
    assert "prefers-color-scheme: dark" in page.text("style")
    assert "prefers-color-scheme: dark" in page.text("script"), "the plots follow the scheme too"
    assert len(page.ids) == len(set(page.ids))


EVIL = '</script><script>alert(1)</script><img src="http://x" onerror=alert(2)>&"\''


def test_every_string_of_a_file_is_escaped(runs, tmp_path):
    config = json.loads((runs / "b-done" / "config.json").read_text())
    config["sae"] |= {"architecture": EVIL, "hook_name": EVIL, "normalize_activations": EVIL}
    config["model"] = {"name": EVIL, "revision": EVIL}
    config["cache"] = {"path": EVIL, "fingerprint": EVIL}
    (runs / "b-done" / "config.json").write_text(json.dumps(config))
    (runs / "b-done" / "failed.json").write_text(json.dumps({"error": EVIL}))
    evil_name = "x<img src=x onerror=alert(3)>&\"'"
    shutil.move(runs / "a-training", runs / evil_name)
    evil_runs = tmp_path / "<b>runs & co"
    shutil.move(runs, evil_runs)

    text, page = page_of(evil_runs, tmp_path)
    tags = [tag for tag, _, _ in page.attributes]
    assert "img" not in tags
    assert "onerror" not in [name for _, name, _ in page.attributes]
    assert text.count("<script") == 4
    assert page.text("h1") == "<b>runs & co"
    rows = {row[0]: row for row in page.rows}
    assert evil_name in rows
    assert rows["b-donediverged"][1] == EVIL
    assert ("span", "title", EVIL) in page.attributes
    assert EVIL in page.text("dd")
    for run in figures(page):  # Plotly reads a little HTML in hover texts
        assert "<img" not in run["name"] + run["hover"]


def test_long_logs_are_thinned_and_keep_their_end(runs, tmp_path):
    add_logs(runs / "b-done", n=3 * MOST_POINTS + 1)
    _, page = page_of(runs, tmp_path)
    tokens = figures(page)[1]["curves"]["tokens"]
    assert MOST_POINTS / 2 < len(tokens) <= MOST_POINTS
    assert tokens[-1] == 1000 * (3 * MOST_POINTS + 1)


def test_what_is_not_there_is_not_drawn(runs, tmp_path):
    shutil.rmtree(runs / "b-done")
    shutil.rmtree(runs / "pca-k4-blocks.1.hook_resid_post")
    _, page = page_of(runs, tmp_path)
    assert not [name for name in page.ids if name.startswith("plot-")]
    assert page.text("p").startswith("1 sparse autoencoder, 0 evaluated on held-out tokens.")


def test_without_a_model_there_is_no_ce_picture(runs, tmp_path):
    for run in ("b-done", "pca-k4-blocks.1.hook_resid_post"):
        (runs / run / "eval.json").write_text(json.dumps(evaluation(ce_loss_score=None, kl_div_score=None)))
    _, page = page_of(runs, tmp_path)
    assert "plot-ev" in page.ids
    assert "plot-ce" not in page.ids


def test_a_number_that_is_not_finite_or_huge_stays_readable(runs, tmp_path):
    (runs / "b-done" / "eval.json").write_text(json.dumps(evaluation(explained_variance=-5.9e12, l0=float("nan"))))
    _, page = page_of(runs, tmp_path)
    row = next(row for row in page.rows if row[0] == "b-done")
    assert row[3:5] == ["\u2013", "-5.90e+12"]
    assert figures(page)[1]["l0"] is None


def test_one_run_and_a_second_writing(runs, tmp_path):
    _, page = page_of(runs / "b-done", tmp_path)
    assert [row[0] for row in page.rows[1:]] == ["b-done"]
    first = (tmp_path / "report.html").read_bytes()
    page_of(runs / "b-done", tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first


def test_nothing_to_report_or_damaged_files(runs, tmp_path):
    with pytest.raises(ManifestError, match=r"must be a folder of runs, it holds no config\.json; train first"):
        write_report(tmp_path / "nowhere", tmp_path / "report.html")
    (runs / "b-done" / "metrics.jsonl").write_text('{"step": 1}\nnot json\n')
    with pytest.raises(ManifestError, match=r"metrics\.jsonl must be JSON"):
        read_runs(runs)
    (runs / "b-done" / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(ManifestError, match="must hold JSON objects, got list"):
        read_runs(runs)
    (runs / "b-done" / "metrics.jsonl").unlink()
    (runs / "b-done" / "eval.json").write_text("")
    with pytest.raises(ManifestError, match=r"eval\.json must be JSON"):
        write_report(runs, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
