"""One SAE of a sweep: when it is logged and saved, what ends it, and where it goes on after a kill."""

import dataclasses
import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.faults import renames_that_stop
from support.surroundings import FailingCalls, open_descriptors
from support.sweep_cases import BATCH, EVERY_2, HOOKS, TOKENS, a_config, batches, log_lines, new_states
from support.training_cases import assert_same_state

from actcache.errors import ManifestError
from actcache.flow import Batch
from trainer.config.settings import SAEConfig, TrainConfig
from trainer.kernels import active
from trainer.kernels.active import Workspace
from trainer.training import run
from trainer.training.checkpoint import latest_checkpoint, load_checkpoint
from trainer.training.run import Run, saved_step, stored_record
from trainer.training.sweep import sweep


@pytest.mark.parametrize("due", ["log_every", "checkpoint_every", "LOOK_EVERY"])
def test_a_loss_that_is_looked_at_later_stops_its_sae_and_nothing_is_written(
    due: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where looking means to wait. The fifth batch is infinite; a look is due after the eighth step.

    standard, as dense as it begins, for on CUDA sparse sums are Triton's.
    """
    monkeypatch.setattr(active, "on_cuda", lambda _: True)
    monkeypatch.setattr(run, "LOOK_EVERY", 8 if due == "LOOK_EVERY" else 100)
    settings = {"log_every": 100, "checkpoint_every": 100} | ({due: 8} if due != "LOOK_EVERY" else {})

    def poisoned() -> Iterator[Batch]:
        for batch in batches():
            x = {hook: x * torch.inf if batch.step == 4 else x for hook, x in batch.x.items()}
            yield dataclasses.replace(batch, x=x)

    (state,) = new_states([a_config("standard")])
    records = sweep(poisoned(), [state], TrainConfig(batch_tokens=BATCH, **settings), tmp_path)
    assert "got nan at step 4; lower lr" in str(records["a-standard"].error)
    assert state.step == 8
    assert sorted(each.name for each in (tmp_path / "a-standard").iterdir()) == [
        "crc32c.json",
        "failed.json",
        "metrics.jsonl",
        "timing.jsonl",
    ]
    assert log_lines(tmp_path / "a-standard") == []


def test_looking_later_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = new_states([a_config("standard"), a_config("standard")])
    sweep(batches(), states[:1], EVERY_2, tmp_path / "at once")
    monkeypatch.setattr(active, "on_cuda", lambda _: True)
    records = sweep(batches(), states[1:], EVERY_2, tmp_path / "later")
    assert_same_state(*states)
    assert log_lines(tmp_path / "at once" / "a-standard") == log_lines(tmp_path / "later" / "a-standard")
    assert records["a-standard"].seconds > 0


def a_run(folder: Path, config: SAEConfig | None = None, settings: TrainConfig = EVERY_2) -> Run:
    (state,) = new_states([config or a_config("topk")])
    return Run(state, folder, settings, Workspace(), ())


def test_lines_and_checkpoints_are_due_every_so_many_steps_and_at_the_end(tmp_path: Path) -> None:
    with a_run(tmp_path) as run:
        due = []
        for batch in batches():
            x = batch.x[HOOKS[1]].float()[: TOKENS - run.state.n_tokens]
            run.step(x, x)
            due.append([run.is_due(every) for every in (5, 100, None)])
            run.write(lambda: {"tokens_per_second": 7.0})
    assert [step for step, each in enumerate(due, 1) if each[0]] == [5, 10, 12]
    assert [step for step, each in enumerate(due, 1) if each[1]] == [12], "the last step at least"
    assert not any(each[2] for each in due)
    assert run.is_over
    assert (run.state.step, run.state.n_tokens) == (12, TOKENS)
    assert [line["step"] for line in log_lines(tmp_path)] == [2, 4, 6, 8, 10, 12]
    timing = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    assert timing[-1] == {"step": 12, "step_seconds": run.seconds, "tokens_per_second": 7.0}
    assert saved_step(tmp_path) == 12
    assert run.record().metrics == log_lines(tmp_path)[-1]
    stored = stored_record(run.config, tmp_path)
    assert (stored.metrics, stored.seconds, stored.error) == (run.record().metrics, 0.0, None)


def test_what_was_logged_after_the_checkpoint_is_cut_off(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step}) + "\n" for step in (0, 2, 4)]
    for name in ("metrics.jsonl", "timing.jsonl"):
        (tmp_path / name).write_text("".join(lines) + '{"step": 6, "n_tok')
    assert saved_step(tmp_path) == 0, "no checkpoint"
    with a_run(tmp_path) as run:
        assert run.metrics == {"step": 0}
    assert [(tmp_path / name).read_text() for name in ("metrics.jsonl", "timing.jsonl")] == lines[:1] * 2


def stepped(folder: Path, n_steps: int, settings: TrainConfig = EVERY_2) -> None:
    """A run that goes on from its last checkpoint until so many steps are done, and is killed then."""
    checkpoint, (state,) = latest_checkpoint(folder / "checkpoint"), new_states([a_config("topk")])
    if checkpoint is not None:
        state = load_checkpoint(state.config, checkpoint)
    with Run(state, folder, settings, Workspace(), ()) as run:
        for batch in batches(run.state.step):
            if batch.step == n_steps:
                return
            x = batch.x[HOOKS[1]].float()[: TOKENS - run.state.n_tokens]
            run.step(x, x)
            run.write(lambda: {"tokens_per_second": 7.0})


def test_a_line_that_was_changed_is_named_before_anything_is_written(tmp_path: Path) -> None:
    """It would otherwise end the log there, and every line after it would be lost."""
    stepped(tmp_path / "run", 7)
    for name in ("metrics.jsonl", "timing.jsonl"):
        log = tmp_path / "run" / name
        text = log.read_bytes()
        for damage in (text.replace(b'"step"', b'"st\xffp"', 1), text.replace(b"2", b"3", 1), text[:40], b""):
            log.write_bytes(damage)
            before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
            with pytest.raises(ManifestError, match=rf"{name}: is damaged: .* if you changed it yourself, remove"):
                stepped(tmp_path / "run", 12)
            assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        log.write_bytes(text)
    stepped(tmp_path / "run", 12)
    stepped(tmp_path / "whole", 12)
    for name in ("metrics.jsonl", "checkpoint/step-00000012.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_kill_while_the_logs_are_cut_back_makes_no_damage(tmp_path: Path, monkeypatch) -> None:
    """The last checkpoint is removed, so that the logs and their checksums are ahead of the one before it."""
    keeps = dataclasses.replace(EVERY_2, keep_checkpoints=2)
    stepped(tmp_path / "whole", 12, keeps)
    for n_renames in range(3):  # of the checksums, then of each log
        folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / str(n_renames)))
        (folder / "checkpoint" / "step-00000012.safetensors").unlink()
        with monkeypatch.context() as patch:
            patch.setattr("os.replace", renames_that_stop(n_renames))
            with pytest.raises(KeyboardInterrupt):
                stepped(folder, 12, keeps)
        stepped(folder, 12, keeps)
        assert (folder / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_a_log_that_cannot_be_opened_leaves_no_other_open(tmp_path: Path) -> None:
    stepped(tmp_path, 7)
    before = open_descriptors()
    with FailingCalls(tmp_path / "timing.jsonl")() as calls:
        stepped(tmp_path, 7)
    for number in range(calls.n_calls):
        with FailingCalls(tmp_path / "timing.jsonl", number)(), pytest.raises(OSError, match=r"check the disk.*timing"):
            stepped(tmp_path, 7)
        assert open_descriptors() == before, number


def test_a_full_disk_names_the_log(tmp_path: Path, monkeypatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with a_run(tmp_path) as run:
        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(OSError, match=rf"free space on this disk.*: '{tmp_path}/metrics\.jsonl'"):
            run.save()


def test_held_out_metrics_that_are_not_finite_end_a_run(tmp_path: Path) -> None:
    with a_run(tmp_path, settings=TrainConfig(batch_tokens=BATCH, log_every=1)) as run:
        x = next(batches()).x[HOOKS[1]].float()
        run.step(x, x)
        run.add_to_line({"validation/l0": 3.0, "validation/mse": float("inf")})
        run.write(dict)
        run.save()
    says = "a-topk: held-out metrics must stay finite, got inf for validation/mse after step 1; lower lr=0.01"
    assert run.record().error == stored_record(run.config, tmp_path).error == says
    assert run.is_over
    assert json.loads((tmp_path / "failed.json").read_text()) == {"error": says, "step": 1}
    assert log_lines(tmp_path) == []
    assert not (tmp_path / "checkpoint").exists()
