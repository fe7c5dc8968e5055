"""Loggers for real: what TensorBoard, wandb (offline) and trackio (a local folder) hold is what metrics.jsonl holds.

A test is skipped where its logger is not installed; `.[trackio,tensorboard]` brings what `.[dev]` lacks.
"""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.logger_cases import CONFIGS, stopped_and_resumed
from support.places import CHILD
from support.sweep_cases import N_STEPS, log_lines

from actcache.errors import ConfigError, ManifestError
from trainer.training.loggers import ID_FILE, _run_id, check_loggers


def assert_untouched(runs: Path, tmp_path: Path) -> None:
    """The same files of metrics and the same last checkpoint as without a logger."""
    plain = stopped_and_resumed(tmp_path / "plain", None)
    for config in CONFIGS:
        for file in ("metrics.jsonl", f"checkpoint/step-{N_STEPS:08d}.safetensors"):
            assert (runs / config.name / file).read_bytes() == (plain / config.name / file).read_bytes()


def test_tensorboard_reads_back_what_the_file_holds(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs = stopped_and_resumed(tmp_path / "runs", "tensorboard")
    for config in CONFIGS:
        held = EventAccumulator(str(runs / config.name), size_guidance={"scalars": 0}).Reload()
        lines = log_lines(runs / config.name)
        assert [line["step"] for line in lines] == [2, 4, 5, 6, 8, 10, 12]
        keys = {key for line in lines for key in line} - {"step"}
        assert set(held.Tags()["scalars"]) == keys
        for key in keys:  # TensorBoard holds float32
            expected = [(line["step"], float(np.float32(line[key]))) for line in lines if key in line]
            assert [(event.step, event.value) for event in held.Scalars(key)] == expected
    assert_untouched(runs, tmp_path)


def wandb_records(path: Path) -> Iterator[Any]:
    """Every record of a .wandb file: LevelDB's log format after a header of seven bytes, with protobuf inside."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(parts)
            parts = b""


def wandb_lines(records: list[Any]) -> list[dict[str, Any]]:
    items = [record.history.item for record in records if record.HasField("history")]
    lines = [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in line} for line in items]
    return [{key: value for key, value in line.items() if not key.startswith("_")} for line in lines]


def test_wandb_writes_one_offline_run_an_sae_under_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    runs = stopped_and_resumed(tmp_path / "runs", "wandb")
    wandb.teardown()  # its process writes a moment longer than `finish` waits
    ids = set()
    for config in CONFIGS:
        run_id = (runs / config.name / "logger_id").read_text()
        ids.add(run_id)
        files = sorted((runs / config.name / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
        records = [list(wandb_records(file)) for file in files]
        for of_file in records:
            run = next(record.run for record in of_file if record.HasField("run"))
            assert (run.run_id, run.display_name, run.run_group) == (run_id, config.name, "runs")
            assert run.project == "actcache"
        first, second = map(wandb_lines, records)
        lines = log_lines(runs / config.name)
        assert first == [line for line in lines if line["step"] <= 7]
        assert second == [line for line in lines if line["step"] > 4]  # from the checkpoint on
    assert len(ids) == len(CONFIGS)
    assert_untouched(runs, tmp_path)


LOGGED = """
import sys
from pathlib import Path
from support.logger_cases import stopped_and_resumed
stopped_and_resumed(Path(sys.argv[1]), sys.argv[2])
"""


def in_a_process(runs: Path, logger: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The training in a process of its own: wandb and trackio read their environment once."""
    return subprocess.run(
        [sys.executable, "-c", LOGGED, str(runs), logger],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(runs.parent),
            "PYTHONPATH": CHILD["PYTHONPATH"],
            "OMP_NUM_THREADS": "1",  # as here, for the order of a sum depends on it
            **environment,
        },
        cwd=runs.parent,
        capture_output=True,
        text=True,
    )


def test_wandb_without_an_account_is_one_clear_error(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    nobody = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "2"}
    done = in_a_process(tmp_path / "runs", "wandb", **nobody)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith("actcache.errors.ActcacheError: train: wandb must start a run for one, got "), done.stderr
    assert last.endswith("see `wandb login`, or set WANDB_MODE=offline")


def test_trackio_holds_the_lines_in_its_folder(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    runs, folder = tmp_path / "runs", tmp_path / "trackio"
    done = in_a_process(runs, "trackio", TRACKIO_DIR=str(folder))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    with sqlite3.connect(folder / "actcache.db") as database:
        for config in CONFIGS:
            name = f"{config.name}-{(runs / config.name / 'logger_id').read_text()}"
            rows = database.execute(
                "SELECT run_id, step, metrics FROM metrics WHERE run_name = ? ORDER BY id", [name]
            ).fetchall()
            lines = log_lines(runs / config.name)
            again = [line for line in lines if 4 < line["step"] <= 7]  # between the checkpoint and the stop: done twice
            sent = [line for line in lines if line["step"] <= 7] + again + [line for line in lines if line["step"] > 7]
            assert [{"step": step, **json.loads(metrics)} for _, step, metrics in rows] == sent
            assert len({run_id for run_id, *_ in rows}) == 1
    assert_untouched(runs, tmp_path)


@pytest.mark.parametrize(
    ("name", "module"),
    [("wandb", "wandb"), ("trackio", "trackio"), ("tensorboard", "torch.utils.tensorboard")],
)
def test_a_package_that_is_missing_is_named(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    with pytest.raises(ConfigError, match=rf"logger {name} needs a package .* pip install 'actcache\[{name}\]'"):
        check_loggers([name])


def test_an_unknown_logger_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="must be one of wandb, trackio, tensorboard, got 'mlflow'"):
        check_loggers(["mlflow"])


@pytest.mark.parametrize("held", [b"x\x1b[2J", b"\xff", b"0123456789ab0", b"mine", b""])
def test_an_id_that_we_did_not_make_is_refused(held, tmp_path):
    """The lines would be added to another run of the user's."""
    (tmp_path / ID_FILE).write_bytes(held)
    with pytest.raises(ManifestError, match="must be 12 hex digits; remove it"):
        _run_id(tmp_path)
