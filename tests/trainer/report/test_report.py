"""The report of one run, written twice, and of folders that hold none or damaged files."""

import pytest
from support.report_pages import page_of

from actcache.errors import ManifestError
from trainer.report.report import write_report
from trainer.run_folder import read_runs


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
    with pytest.raises(ManifestError, match=r"metrics\.jsonl: line 2: must be readable JSON"):
        read_runs(runs)
    (runs / "b-done" / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(ManifestError, match="line 1: must be a JSON object, got list"):
        read_runs(runs)
    (runs / "b-done" / "metrics.jsonl").unlink()
    (runs / "b-done" / "eval.json").write_text("")
    with pytest.raises(ManifestError, match=r"eval\.json: must be readable JSON"):
        write_report(runs, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
