"""A folder of runs as it lies there: what is read of it, what is refused, and which cache it remembers."""

import json
import os
import re
from pathlib import Path

import pytest
from support.faults import renames_that_stop
from support.hostile_json import TEXTS, nested
from support.strangers import NOBODY, as_another_user, copy_of_another_user, only_root
from support.surroundings import address_space
from support.tiny_reports import add_baseline, add_logs, evaluation
from support.tiny_saes import make_config, make_run

from actcache.errors import CacheLocked, CacheMismatch, ConfigError, ManifestError
from trainer.checksums import checksums_of, sealed
from trainer.run_folder import (
    MOST_LEVELS,
    RUNS_LOCK,
    check_folder,
    check_out,
    finite,
    is_over,
    json_values,
    only_writer,
    read_harvests,
    read_json,
    read_run_json,
    read_runs,
    run_folders,
    whole_lines,
    write_run_json,
)
from trainer.trained_on import remembered_cache

MODEL = {"name": "tiny", "revision": "abc123"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs", make_config("topk", name="b"), MODEL)


def test_runs_come_by_name_and_baselines_last(run: Path) -> None:
    add_baseline(run.parent)
    make_run(run.parent, make_config("topk", name="z"), MODEL)
    (run / "eval.json").write_text(json.dumps(evaluation()))
    add_logs(run, n=2)
    (run / "failed.json").write_text(json.dumps({"step": 3, "error": "the loss became NaN"}))
    found = read_runs(run.parent)
    assert [(each.name, each.is_baseline) for each in found] == [
        ("b", False),
        ("z", False),
        ("pca-k4-blocks.1.hook_resid_post", True),
    ]
    b, z, pca = found
    assert (b.error, b.evaluation["l0"], b.sae["k"]) == ("the loss became NaN", 4.25, 5)
    assert [line["step"] for line in b.metrics] == [line["step"] for line in b.timing] == [10, 20], "whole lines alone"
    assert (b.about("model", "name"), b.about("model", "size"), pca.about("model", "name")) == ("tiny", None, None)
    assert (z.evaluation, z.metrics, z.timing, z.error) == ({}, [], [], None)
    assert (pca.sae["k"], pca.sae["architecture"]) == (4, "pca")
    assert [each.name for each in read_runs(run)] == ["b"], "one run is a folder of one"


def test_harvests_are_read_once_a_cache_by_time(run: Path, tmp_path: Path, caplog) -> None:
    log = tmp_path / "cache" / "log"
    log.mkdir(parents=True)
    for number, (finished, n_tokens) in enumerate((("2026-01-02", 30), ("2026-01-01", 20), ("2026-01-03", 0))):
        seconds = {"n_tokens": n_tokens, "model_busy": 1.5, "total": 2.0}
        (log / f"harvest-{number}.json").write_text(json.dumps({"finished": finished, "seconds": seconds}))
    other = make_run(run.parent, make_config("topk", name="other"), MODEL)
    for each in (run, other):
        config = json.loads((each / "config.json").read_text())
        config["cache"]["path"] = str(tmp_path / "cache")
        (each / "config.json").write_text(json.dumps(config))
    found = read_harvests(read_runs(run.parent))
    assert [(time.finished, time.n_tokens) for time in found] == [("2026-01-01", 20), ("2026-01-02", 30)]
    assert (found[0].total_seconds, found[0].model_seconds) == (2.0, 1.5)
    (log / "harvest-1.json").write_text('{"finished": "2026-01-01"}')
    (log / "harvest-3.json").write_text("{")
    assert [time.n_tokens for time in read_harvests(read_runs(run))] == [30], "a run may name any folder as its cache"
    for message in (r"harvest-1\.json: must be the log of a harvest, it lacks 'seconds'", r"harvest-3\.json: must be"):
        assert re.search(f"without a log of a harvest: .*{message}", caplog.text)


@only_root
def test_logs_of_a_harvest_that_are_closed_to_us_are_left_out_and_that_is_said(run: Path, tmp_path, caplog) -> None:
    (tmp_path / "cache" / "log").mkdir(parents=True)
    with copy_of_another_user(tmp_path / "cache") as theirs:
        write_run_json(run, "config.json", {"cache": {"path": str(theirs)}})
        found = read_runs(run)
        os.chown(theirs / "log", 0, 0)
        (theirs / "log").chmod(0o700)
        with as_another_user():
            assert read_harvests(found) == []
    (message,) = caplog.messages
    assert message.startswith(f"{theirs}: its logs cannot be read (Permission denied")


def test_what_is_a_finite_number() -> None:
    assert [finite(value) for value in (3, -0.5, 0)] == [3, -0.5, 0]
    for value in (True, None, "3", [3], float("nan"), float("inf"), 10**400, -(10**400)):
        assert finite(value) is None
    assert [type(finite(value)) for value in ((1 << 63) - 1, 1 << 63, -(10**300))] == [int, float, float]


def test_json_is_parsed_up_to_a_depth_that_can_be_printed() -> None:
    assert json_values(b'{"a": [NaN, -Infinity, 1.5]}') == {"a": [None, None, 1.5]}
    for number in (b"1e999", b"-1e999", b"[[2.5, 1" + b"0" * 400 + b".5]]"):
        with pytest.raises(ValueError, match="a number that is larger than any float"):
            json_values(b'{"a": [1, "b"], "c": {"d": %s}}' % number)
    deepest = nested(MOST_LEVELS)
    assert json_values(json.dumps(deepest).encode()) == deepest
    with pytest.raises(ValueError, match="lists and objects nested more than 64 deep"):
        json_values(json.dumps([deepest]).encode())


def test_json_that_does_not_fit_is_not_read(run: Path) -> None:
    """Eight megabytes took 210, and a file may have 256."""
    dense = b'{"x":[' + b"{}," * 1_000_000 + b"{}]}"
    (run / "config.json").write_bytes(dense)
    (run / "metrics.jsonl").write_bytes((b'{"step":1,"x":[' + b"{}," * 10_000 + b"{}]}\n") * 100)
    for read in (
        lambda: json_values(dense),
        lambda: read_json(run / "config.json"),
        lambda: whole_lines(run / "metrics.jsonl"),
    ):
        with address_space(128 << 20), pytest.raises(MemoryError, match=r"^reading .* may take 0\.4"):
            read()


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_json_of_a_stranger_is_one_line(text: bytes, run: Path) -> None:
    for name in ("config.json", "eval.json", "failed.json", "metrics.jsonl"):
        kept = (run / name).read_bytes() if (run / name).exists() else None
        (run / name).write_bytes(text + b"\n")
        with pytest.raises(ManifestError, match=rf"{name}: (line 1: )?must") as raised:
            read_runs(run)
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 1000
        with pytest.raises(ManifestError, match=rf"{name}: must"):
            read_json(run / name)
        assert whole_lines(run / name) == []
        if kept is None:
            (run / name).unlink()
        else:
            (run / name).write_bytes(kept)


def test_a_pipe_is_no_file(run: Path) -> None:
    os.mkfifo(run / "eval.json")
    with pytest.raises(ManifestError, match=r"eval\.json: must be readable JSON, is no file \(no regular file\)"):
        read_json(run / "eval.json")


@pytest.mark.parametrize(
    ("name", "values", "match"),
    [
        ("config.json", {"sae": [1]}, "sae must be an object, got \\[1\\]"),
        ("failed.json", {"error": ["x" * 10**6]}, "error must be a text, got"),
        ("eval.json", {"feature_density": 3}, "feature_density must be an object, got 3"),
        ("eval.json", {"feature_density": {"counts": [1]}}, "feature_density.log10_edges must be a list of numbers"),
        ("eval.json", {"feature_density": {"log10_edges": [0], "counts": [1]}}, "must be one number more than counts"),
        ("eval.json", {"feature_density": {"log10_edges": [0, 10**400], "counts": [1]}}, "a list of numbers"),
        ("eval.json", {"ce_loss_by_position": {"with_sae": [1], "without_sae": []}}, "must be lists of one length"),
        ("eval.json", {"ce_loss_by_position": {"with_sae": "ab", "without_sae": []}}, "with_sae must be a list of num"),
    ],
    ids=str,
)
def test_a_field_of_another_type_is_named(name: str, values: object, match: str, run: Path) -> None:
    (run / name).write_text(json.dumps(values))
    with pytest.raises(ManifestError, match=rf"{name}: {match}|{name}: .*{match}") as raised:
        read_runs(run)
    assert len(str(raised.value)) < 1000


def test_logs_of_harvests_with_other_types_are_named(run: Path, tmp_path: Path, caplog) -> None:
    (tmp_path / "cache" / "log").mkdir(parents=True)
    log, config = tmp_path / "cache" / "log" / "harvest-0.json", json.loads((run / "config.json").read_text())
    config["cache"]["path"] = str(tmp_path / "cache")
    (run / "config.json").write_text(json.dumps(config))
    seconds = {"n_tokens": 1, "total": 2.0, "model_busy": 1.0}
    for values, match in (
        ({"finished": 3, "seconds": seconds}, "finished must be a time, got 3"),
        ({"finished": "now", "seconds": seconds | {"n_tokens": "1"}}, "seconds must be of numbers"),
        ({"finished": "now", "seconds": seconds | {"total": 10**400}}, "seconds must be of numbers"),
        ({"finished": "now", "seconds": [1]}, "it lacks"),
    ):
        log.write_text(json.dumps(values))
        assert read_harvests(read_runs(run)) == []
        assert re.search(rf"harvest-0\.json.* {match}", caplog.text)
    for path in ("a" * 10**5, "a\0b", "\ud800"):
        config["cache"]["path"] = path
        (run / "config.json").write_text(json.dumps(config))
        assert read_harvests(read_runs(run)) == []


def test_a_config_of_a_stranger_is_compared_in_little_memory_and_one_line(run: Path) -> None:
    """Its one key of 60 kB stands above 7,500 others, and a text is long."""
    config = {"k" * 60_000: {str(i): 0 for i in range(7500)}, "text": "x" * 10**6}
    (run / "config.json").write_text(json.dumps(config))
    with (
        address_space(96 << 20),
        pytest.raises(CacheMismatch, match=r"holds another run: .*; 7497 more; pass") as raised,
    ):
        check_folder(run, {"sae": 1})
    assert len(str(raised.value)) < 2000


def test_runs_go_into_an_empty_folder_or_beside_other_runs(run: Path, tmp_path: Path) -> None:
    check_out(tmp_path / "nowhere", {"a"})
    check_out(run.parent, {"a"})
    (tmp_path / "empty").mkdir()
    check_out(tmp_path / "empty", {"a"})
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    with pytest.raises(CacheMismatch, match=r"must be empty or hold runs, holds thesis\.tex; pass another --out"):
        check_out(tmp_path / "thesis", {"a"})
    with pytest.raises(CacheMismatch, match="must be a folder for runs, is a file"):
        check_out(tmp_path / "thesis" / "thesis.tex", {"a"})


def test_a_lock_that_a_killed_process_left_makes_no_folder_of_runs(tmp_path: Path) -> None:
    (tmp_path / RUNS_LOCK).touch()
    check_out(tmp_path, {"a"})


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with (
        only_writer(folder, RUNS_LOCK, "is training there", "pass another --out"),
        pytest.raises(CacheLocked, match=r"new: another process is training there; wait for it"),
        only_writer(folder, RUNS_LOCK, "is training there", "pass another --out"),
    ):
        pass
    with only_writer(folder, RUNS_LOCK, "is training there", "pass another --out"):
        pass


def test_nothing_is_written_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "runs" / "topk").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for link in ("runs/topk/checkpoint", "runs/other"):
        (tmp_path / link).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ManifestError, match=f"{link}: is a link to .*, and nothing is read or written"):
            only_writer(tmp_path / "runs", RUNS_LOCK, "trains", "no").__enter__()
        (tmp_path / link).unlink()
    (tmp_path / "runs" / RUNS_LOCK).symlink_to(tmp_path / "elsewhere" / "new")
    with pytest.raises(ManifestError, match=f"{RUNS_LOCK}: is a link"):
        only_writer(tmp_path / "runs", RUNS_LOCK, "trains", "no").__enter__()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named_and_no_hidden_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match=r"tmp|file") as caught,
        only_writer(tmp_path / "file", RUNS_LOCK, "trains", "pass another --out"),
    ):
        pass
    assert caught.value.filename == str(tmp_path / "file")


def test_a_folder_is_of_this_very_run(run: Path, tmp_path: Path) -> None:
    here = read_json(run / "config.json")
    check_folder(tmp_path / "nowhere", here)
    check_folder(run, here)
    moved = {**here, "cache": {**here["cache"], "path": "elsewhere"}, "train": {**here["train"], "keep_checkpoints": 9}}
    check_folder(run, moved)
    other = {**here, "sae": {**here["sae"], "lr": 0.5}, "model": {**here["model"], "name": "big"}}
    with pytest.raises(
        CacheMismatch, match=r"another run: model\.name is 'tiny' there, 'big' here; sae\.lr is 0\.001 there, 0\.5 here"
    ):
        check_folder(run, other)
    (tmp_path / "aside").mkdir()
    (tmp_path / "aside" / ".config.json.partial").write_text("{")
    check_folder(tmp_path / "aside", here)
    (tmp_path / "aside" / "notes.txt").write_text("mine")
    with pytest.raises(CacheMismatch, match=r"must be a run or absent, it has no config\.json"):
        check_folder(tmp_path / "aside", here)


def test_a_run_is_over_when_it_has_an_sae_or_has_failed(run: Path, tmp_path: Path) -> None:
    assert is_over(run)
    assert not is_over(tmp_path)
    (tmp_path / "failed.json").write_text("{}")
    assert is_over(tmp_path)


def test_lines_are_read_up_to_the_first_torn_one(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    assert whole_lines(log) == []
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "n_tok')
    assert whole_lines(log) == [{"step": 1}, {"step": 2}]
    log.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    assert whole_lines(log) == [{"step": 1}], "what follows a torn line is not trusted"
    for line in ("[1]", "{}", '{"step": "1"}', "null", "3", "[" * 10**5):
        log.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
        assert whole_lines(log) == [{"step": 1}], "nor is one that no training wrote"


def test_json_is_written_canonically_and_read_back(tmp_path: Path) -> None:
    write_run_json(tmp_path, "a.json", {"b": 1, "a": [0.5]})
    assert (tmp_path / "a.json").read_text() == '{\n "a": [\n  0.5\n ],\n "b": 1\n}\n'
    assert read_json(tmp_path / "a.json") == {"a": [0.5], "b": 1}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_run_json(tmp_path, "a.json", {"b": float("nan")})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "crc32c.json"], "nothing is left aside"
    assert read_run_json(tmp_path, "a.json") == {"a": [0.5], "b": 1}
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ManifestError, match=r"a\.json: must be a JSON object, got list"):
        read_json(tmp_path / "a.json")
    with pytest.raises(ManifestError, match=r"b\.json: must be readable JSON, is no file \(No such file"):
        read_json(tmp_path / "b.json")


def test_a_file_of_a_run_is_what_was_written_or_is_named(tmp_path: Path) -> None:
    write_run_json(tmp_path, "config.json", {"a": 1})
    for name in ("eval.json", "failed.json"):
        write_run_json(tmp_path, name, {"b": 1})
    assert [read_run_json(tmp_path, name) for name in ("config.json", "eval.json")] == [{"a": 1}, {"b": 1}]
    for name in ("config.json", "eval.json", "failed.json"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text.replace("1", "3"))
        says = rf"{name}: is damaged: .* if you changed it yourself, remove .*crc32c\.json"
        with pytest.raises(ManifestError, match=says):
            read_run_json(tmp_path, name)
        with pytest.raises(ManifestError, match=says):
            read_runs(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(ManifestError, match=rf"{name}: is missing"):
            read_runs(tmp_path)
        (tmp_path / name).write_text(text)
    assert read_runs(tmp_path)[0].evaluation == {"b": 1}
    (tmp_path / "config.json").write_text('{"a": 2}')
    (tmp_path / "crc32c.json").unlink()
    assert read_run_json(tmp_path, "config.json") == {"a": 2}, "as older versions wrote it"


@pytest.mark.parametrize("n_renames", [0, 1, 2])
def test_a_kill_while_a_file_is_written_anew_makes_no_damage(n_renames: int, tmp_path: Path, monkeypatch) -> None:
    write_run_json(tmp_path, "config.json", {})
    write_run_json(tmp_path, "eval.json", {"b": 1})
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", renames_that_stop(n_renames))
        with pytest.raises(KeyboardInterrupt):
            write_run_json(tmp_path, "eval.json", {"b": 2})
    assert read_runs(tmp_path)[0].evaluation == {"b": 2 if n_renames == 2 else 1}
    write_run_json(tmp_path, "eval.json", {"b": 3})
    assert read_run_json(tmp_path, "eval.json") == {"b": 3}


def test_what_a_killed_import_left_is_no_run(run: Path) -> None:
    run.rename(run.with_name(".b.partial"))
    with pytest.raises(ManifestError, match=r"must be a folder of runs, it holds no config\.json"):
        read_runs(run.parent)
    make_run(run.parent, make_config("topk", name="z"), MODEL)
    assert [each.name for each in read_runs(run.parent)] == ["z"]
    assert run_folders(run.parent) == [run.parent / "z"]


def test_a_run_that_lost_its_config_is_not_left_out(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run_json(tmp_path / name, "config.json", {"name": name})
    (tmp_path / "a" / "config.json").unlink()
    for runs in (tmp_path, tmp_path / "a"):
        with pytest.raises(ManifestError, match=r"a/config\.json: is missing"):
            read_runs(runs)


def test_a_log_is_what_was_written_up_to_the_last_checkpoint(tmp_path: Path) -> None:
    lines = [b'{"step": 1}\n', b'{"step": 2}\n', b'{"st']
    (tmp_path / "crc32c.json").write_bytes(sealed(checksums_of({"metrics.jsonl": lines[0] + lines[1]})))
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(b"".join(lines))
    assert whole_lines(log) == [{"step": 1}, {"step": 2}]
    for damage in (b"", lines[0], lines[1] + lines[0], b'{"step": 3}\n' + lines[1]):
        log.write_bytes(damage)
        with pytest.raises(ManifestError, match=r"metrics\.jsonl: is damaged: .*; restore it; if you changed it"):
            whole_lines(log)
    log.unlink()
    with pytest.raises(ManifestError, match=r"metrics\.jsonl: is missing"):
        whole_lines(log)


def test_a_log_that_is_no_text_is_torn_there(tmp_path: Path) -> None:
    """Older versions wrote no checksums."""
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "a": "\xff"}\n{"stop": 3}\n')
    assert whole_lines(tmp_path / "metrics.jsonl") == [{"step": 1}]
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"stop": 2}\n')
    assert whole_lines(tmp_path / "metrics.jsonl") == [{"step": 1}]


@only_root
def test_what_cannot_be_read_is_no_missing_run(tmp_path: Path) -> None:
    """A folder that is closed to us is not one that holds no runs."""
    write_run_json(tmp_path / "runs" / "a", "config.json", {"name": "a"})
    with copy_of_another_user(tmp_path) as folder:
        runs = folder / "runs"
        for path in (runs / "a" / "config.json", runs / "a", runs):
            os.chown(path, 0, 0)
            path.chmod(0o700)
            with as_another_user():
                for look in (read_runs, run_folders, remembered_cache, lambda runs: check_out(runs, set())):
                    if path.is_dir() or look in (read_runs, remembered_cache):
                        with pytest.raises(PermissionError, match=f"run as a user who has it: '{path}"):
                            look(runs)
                with pytest.raises(PermissionError, match=f"run as a user who has it: '{path}"):
                    read_json(runs / "a" / "config.json")
            os.chown(path, NOBODY, NOBODY)


def test_the_cache_of_the_first_run_that_remembers_one(run: Path, tmp_path: Path) -> None:
    (run.parent / "a").mkdir()
    (run.parent / "a" / "config.json").write_text("{}")
    assert remembered_cache(run) == remembered_cache(run.parent) == Path("cache")
    with pytest.raises(ManifestError, match="holds no run that remembers its cache; train first, or pass --cache"):
        remembered_cache(tmp_path)


def addressed(cache):
    """Every function of trainer that takes a path, called with an address."""
    import trainer
    from trainer.features.words import has_words, read_words

    address = "gs://bucket/run"
    run = {"name": "a", "architecture": "topk", "hook_name": "blocks.0.hook_resid_post", "k": 1, "d_sae": 2}
    config = trainer.SweepConfig.from_dict({"runs": [run]})
    yield lambda: trainer.train(cache, config, address)
    yield lambda: trainer.plan(cache, config, address)
    yield lambda: trainer.SweepConfig.from_yaml(address)
    yield lambda: trainer.build_features(address, cache)
    yield lambda: trainer.evaluate(address, cache)
    yield lambda: trainer.evaluate_runs(address, cache)
    yield lambda: trainer.export_neuronpedia(address, "out")
    yield lambda: trainer.export_neuronpedia("run", address)
    yield lambda: trainer.export_sae(address, "out")
    yield lambda: trainer.import_release(address, "id", "out")
    yield lambda: trainer.import_release("release", "id", address)
    yield lambda: trainer.import_sae(address, "out")
    yield lambda: trainer.import_sae("folder", address)
    yield lambda: trainer.write_report(address, "out")
    yield lambda: trainer.write_report("runs", address)
    for function in (trainer.load_sae, trainer.open_features, has_words, read_words):
        yield lambda function=function: function(address)


def test_no_function_takes_an_address(tiny_cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, call in enumerate(addressed(tiny_cache)):
        with pytest.raises(ConfigError, match="no address is read or written"):
            call()
        assert not list(tmp_path.iterdir()), number
