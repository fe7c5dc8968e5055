"""The page: self-contained, every string escaped, every number of the files in it, blanks where one is missing."""

import copy
import json
import os
import shutil

import pytest
from support.hostile_json import VALUES
from support.report_pages import figures, page_of
from support.tiny_reports import evaluation

from actcache.errors import ManifestError


def test_every_number_is_in_the_table(runs, tmp_path):
    _, page = page_of(runs, tmp_path)
    header, *rows = page.rows
    assert header[:3] == ["Name", "Architecture", "Latents"]
    by_name = {row[0]: row[1:] for row in rows}
    assert list(by_name) == ["a-training", "b-done", "pca-k4-blocks.1.hook_resid_post"], "runs by name, then baselines"
    model = ["0.9688 good", "0.9531", "0.2500", "0.9375", "0.1250", "75.0%"]
    measured = ["4.2 low", "0.8125 low", *model, "12.5% high", "12,345"]
    assert by_name["b-done"] == ["topk", "48", *measured, "5,000"]
    assert by_name["a-training"] == ["jumprelu", "48", *["\u2013"] * 11], "no eval.json yet: blanks"
    assert by_name["pca-k4-blocks.1.hook_resid_post"][:5] == ["pca", "4", "4.0", "0.5000", "0.9688"], "it is not judged"
    assert {len(row) for row in page.rows} == {len(header)}
    facts = page.text("dd")
    for fact in ("tiny", "abc123", "blocks.1.hook_resid_post", "0123456789abcdef", "12,345", "6,789"):
        assert fact in facts
    assert page.text("p").startswith("2 sparse autoencoders, 1 evaluated on held-out tokens, 1 baseline.")


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
    assert "L0 50 to 200, Expl. variance >= 0.9, CE score >= 0.8, Dead <= 0.05" in page.text("caption")
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
    assert row[3:5] == ["\u2013", "-5.90e+12 low"]
    assert figures(page)[1]["l0"] is None


def lies_about(values: dict) -> list[dict]:
    """The same JSON with hostile values in each place, one at a time."""
    lies = []
    for key, value in values.items():
        lies += [values | {key: lie} for lie in [*VALUES, *(lies_about(value) if isinstance(value, dict) else [])]]
    return lies


@pytest.mark.parametrize("name", ["eval.json", "metrics.jsonl", "timing.jsonl", "failed.json"])
def test_a_value_that_nobody_means_is_left_out_or_named(name, runs, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.report.page.get_plotlyjs", str)  # 5 MB that are the same in every page
    path, refused = runs / "b-done" / name, []
    (runs / "b-done" / "failed.json").write_text('{"step": 1, "error": "a loss is NaN"}')
    whole = path.read_bytes().split(b"\n")
    for values in lies_about(json.loads(path.read_bytes() if len(whole) == 1 else whole[0]))[::4]:
        path.write_bytes(b"\n".join([json.dumps(values).encode(), *whole[1:]]))
        try:
            text, page = page_of(runs, tmp_path)
        except ManifestError as error:
            refused.append(str(error))
        else:
            assert text.count("<script") == 4
            assert len(figures(page)) == 3
    assert all(name in error and len(error) < 1000 for error in refused)


STRANGE = ["\u2028", "\u202egnp.exe", "]]>-->", "&lt;", "a" * 10**6, "\ud800", "\r\n\t", "\\u003c/script>"]


def test_strange_names_are_shown_and_end_nothing(runs, tmp_path):
    config = json.loads((runs / "b-done" / "config.json").read_text())
    os.rename(runs / "a-training", os.fsencode(runs) + b"/\xff\xe2\x80\xa8</script>".replace(b"/s", b"s"))
    for name in STRANGE:
        changed = copy.deepcopy(config)
        changed["sae"] |= {"architecture": name, "hook_name": name}
        changed["model"]["name"] = changed["cache"]["fingerprint"] = name
        (runs / "b-done" / "config.json").write_text(json.dumps(changed))
        text, page = page_of(runs, tmp_path)
        assert text.count("<script") == text.count("</script>") == 4
        shown = name.encode(errors="backslashreplace").decode().replace("\r\n", "\n")
        assert next(row for row in page.rows if row[0] == "b-done")[1] == shown
        assert figures(page)[0]["architecture"].encode(errors="backslashreplace").decode() == (
            name.encode(errors="backslashreplace").decode()
        )
    assert any(row[0].startswith("\\udcff") for row in page.rows), "a byte that is no text"
