"""What the tests of the report share: a folder of runs, and a page that is taken apart."""

import json
from html.parser import HTMLParser
from pathlib import Path

from support.tiny_reports import add_baseline, add_logs, evaluation
from support.tiny_saes import make_config, make_run
from trainer.report.report import write_report

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


def make_runs(runs: Path) -> Path:
    """An evaluated run, one that is not evaluated, and a baseline."""
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
