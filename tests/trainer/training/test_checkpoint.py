"""Checkpoints: bit for bit, replaced whole, refused when damaged or of another run."""

import dataclasses
import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from support.strangers import as_another_user, copy_of_another_user, only_root
from support.surroundings import FailingCalls, descriptors
from support.tiny_saes import ARCHITECTURES
from support.training_cases import assert_same_state, new_state, rows, step
from torch import Tensor

from actcache.errors import CacheMismatch, ManifestError
from trainer.tensor_file import opened_tensors
from trainer.training.checkpoint import checkpoint_step, latest_checkpoint, load_checkpoint, save_checkpoint
from trainer.training.step import TrainState


def trained(architecture: str, n_steps: int = 3, **changes: object) -> TrainState:
    state = new_state(architecture, lr_warm_up_steps=2, lr_decay_steps=4, dead_window=40, **changes)
    for seed in range(n_steps):
        step(state, rows(24, seed=seed))
    return state


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_restored_state_goes_on_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    state = trained(architecture)
    path = save_checkpoint(state, tmp_path)
    restored = load_checkpoint(state.config, path)
    assert_same_state(state, restored)
    for seed in range(3, 6):
        for each in (state, restored):
            step(each, rows(24, seed=seed))
    assert_same_state(state, restored)


OPTIMISED = [
    {"optimizer": "adamw", "weight_decay": 0.1},
    {"optimizer": "signum", "momentum": 0.9},
    {"optimizer": "muon", "momentum": 0.95},
    {"optimizer": "schedule_free"},
    {"ema_decay": 0.9},
    {"k_anneal_start": 20, "k_anneal_steps": 5},
]


@pytest.mark.parametrize("changes", OPTIMISED, ids=str)
def test_every_optimizer_goes_on_bit_for_bit(changes: dict[str, object], tmp_path: Path) -> None:
    state = trained("topk", **changes)
    restored = load_checkpoint(state.config, save_checkpoint(state, tmp_path))
    for seed in range(3, 6):
        for each in (state, restored):
            step(each, rows(24, seed=seed))
    assert_same_state(state, restored)


def test_a_state_before_its_first_step_can_be_saved(tmp_path: Path) -> None:
    state = trained("topk", n_steps=0)
    restored = load_checkpoint(state.config, save_checkpoint(state, tmp_path))
    for each in (state, restored):
        step(each, rows(24))
    assert_same_state(state, restored)


def test_the_newest_replaces_the_older(tmp_path: Path) -> None:
    state = trained("topk")
    save_checkpoint(state, tmp_path)
    step(state, rows(24))
    path = save_checkpoint(state, tmp_path)
    held = ["step-00000004.crc32c.json", "step-00000004.safetensors"]
    assert sorted(each.name for each in tmp_path.iterdir()) == held
    assert latest_checkpoint(tmp_path) == path
    assert checkpoint_step(path) == 4


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    state = trained("topk", n_steps=0)
    (tmp_path / "step-notes.safetensors").write_bytes(b"not a checkpoint")
    seen = []
    for keep in (3, 3, 3, 3, 2, 1):
        save_checkpoint(state, tmp_path, keep=keep)
        seen.append(sorted(checkpoint_step(each) for each in tmp_path.glob("step-0*.safetensors")))
        assert len(list(tmp_path.glob("*.crc32c.json"))) == len(seen[-1])
        step(state, rows(24))
    assert seen == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [3, 4], [5]]
    assert (tmp_path / "step-notes.safetensors").exists()


def test_a_damaged_newest_one_is_named_and_the_one_before_serves_once_it_is_gone(tmp_path: Path) -> None:
    state = trained("topk")
    save_checkpoint(state, tmp_path, keep=2)
    step(state, rows(24))
    newest = save_checkpoint(state, tmp_path, keep=2)
    newest.write_bytes(newest.read_bytes()[:-1])
    assert latest_checkpoint(tmp_path) == newest
    with pytest.raises(
        ManifestError,
        match=r"step-00000004\.safetensors: is damaged.* remove it to go on from step-00000003\.safetensors, the last",
    ):
        load_checkpoint(state.config, newest)
    newest.unlink()
    assert_same_state(load_checkpoint(state.config, latest_checkpoint(tmp_path)), trained("topk"))


@pytest.mark.parametrize("at", [0.0, 0.3, 0.6, 0.99])
def test_changed_bytes_are_named_and_the_last_good_one_too(at: float, tmp_path: Path) -> None:
    state = trained("topk", n_steps=0)
    for seed in range(3):
        save_checkpoint(state, tmp_path, keep=3)
        step(state, rows(24, seed=seed))
    first, second, third = sorted(tmp_path.glob("*.safetensors"))
    for damaged, good in ((third, second.name), (second, first.name), (first, None)):
        data = bytearray(damaged.read_bytes())
        start = int(at * len(data))
        data[start : start + 64] = bytes(byte ^ 0xFF for byte in data[start : start + 64])
        damaged.write_bytes(data)
        for each in [each for each in (third, second) if good is not None and each >= damaged]:
            with pytest.raises(ManifestError, match=rf"is damaged: bytes .* remove it to go on from {good}, the last"):
                load_checkpoint(state.config, each)
    with pytest.raises(ManifestError, match="remove it to train from the start: there is no good one before it"):
        load_checkpoint(state.config, third)


def test_a_checkpoint_without_checksums_is_read(tmp_path: Path) -> None:
    """As older versions wrote them."""
    state = trained("topk")
    path = save_checkpoint(state, tmp_path)
    (tmp_path / "step-00000003.crc32c.json").unlink()
    assert_same_state(load_checkpoint(state.config, path), state)


def test_a_kill_between_the_checksums_and_the_checkpoint_does_no_harm(tmp_path: Path) -> None:
    state = trained("topk")
    path = save_checkpoint(state, tmp_path)
    (tmp_path / "step-00000004.crc32c.json").write_bytes(b"of a file that never came")
    assert_same_state(load_checkpoint(state.config, path), state)
    save_checkpoint(state, tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["step-00000003.crc32c.json", path.name]


def test_of_two_the_newest_counts_and_leftovers_do_not(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "absent") is None
    state = trained("topk")
    path = save_checkpoint(state, tmp_path)
    (tmp_path / "step-00000002.safetensors").write_bytes(b"an older one that a kill left")
    (tmp_path / ".step-00000009.safetensors.0123456789abcdef0123456789abcdef.partial").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) == path
    load_checkpoint(state.config, path)
    assert sorted(each.name for each in tmp_path.glob("*.safetensors")) == ["step-00000002.safetensors", path.name]
    assert not list(tmp_path.glob(".*"))


def test_what_is_no_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-00000001.safetensors").mkdir()
    (tmp_path / "step-00000009.safetensors").mkdir()
    path = save_checkpoint(trained("topk"), tmp_path)
    assert latest_checkpoint(tmp_path) == path


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = trained("topk")
    path = save_checkpoint(state, tmp_path)
    step(state, rows(24))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(state, tmp_path)
    assert [each.name for each in tmp_path.glob("*.safetensors")] == [path.name]
    assert_same_state(load_checkpoint(state.config, path), trained("topk"))


@pytest.mark.parametrize("keep", [0, 5, 100, -1], ids=["empty", "five_bytes", "header_cut", "one_byte_short"])
def test_a_torn_file_is_refused(keep: int, tmp_path: Path) -> None:
    state = trained("topk")
    path = save_checkpoint(state, tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ManifestError, match=r"step-00000003\.safetensors: is damaged: it must be \d+ bytes long"):
        load_checkpoint(state.config, path)
    (tmp_path / "step-00000003.crc32c.json").unlink()
    with pytest.raises(ManifestError, match=r"step-00000003\.safetensors: cannot be read as a checkpoint"):
        load_checkpoint(state.config, path)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path: Path) -> None:
    state = trained("topk")
    path = save_checkpoint(state, tmp_path)
    (tmp_path / "step-00000003.crc32c.json").unlink()
    other = path.rename(tmp_path / "step-00000004.safetensors")
    with pytest.raises(
        ManifestError, match=r"step-00000004\.safetensors: cannot be read .*it is of step 3\); remove it"
    ):
        load_checkpoint(state.config, other)


def test_a_step_that_is_no_number_is_refused(tmp_path: Path) -> None:
    """JSON has numbers that are infinite as a float, and no int."""
    state = trained("topk")
    path = save_checkpoint(state, tmp_path)
    (tmp_path / "step-00000003.crc32c.json").unlink()
    with opened_tensors(path) as file:
        tensors, said = {name: file.read(name) for name in file.names}, file.metadata["state"]
    path.write_bytes(save(tensors, {"state": said.replace('"step": 3', '"step": 1e999')}))
    with pytest.raises(ManifestError, match=r"cannot be read as a checkpoint \(OverflowError: .* remove it"):
        load_checkpoint(state.config, path)


def test_what_cannot_be_read_is_no_damage(tmp_path: Path) -> None:
    """Nobody may be told to remove a sound checkpoint."""
    state = trained("topk")
    path = save_checkpoint(state, tmp_path / "checkpoint")
    for number in range(5):
        with FailingCalls(path, number, errno.EMFILE)(), pytest.raises(OSError, match="ulimit -n") as raised:
            load_checkpoint(state.config, path)
        assert (type(raised.value), raised.value.filename) == (OSError, str(path))
    with descriptors(3), pytest.raises(OSError, match="ulimit -n"):
        load_checkpoint(state.config, path)


@only_root
def test_a_folder_that_is_closed_to_us_is_not_without_a_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(trained("topk"), tmp_path / "checkpoint")
    with copy_of_another_user(tmp_path) as folder:
        os.chown(folder / "checkpoint", 0, 0)
        (folder / "checkpoint").chmod(0o700)
        with (
            as_another_user(),
            pytest.raises(PermissionError, match=f"who has it: '{folder}/checkpoint'"),
        ):
            latest_checkpoint(folder / "checkpoint")


def test_a_sound_checkpoint_is_read_without_a_look_at_the_older_ones(tmp_path: Path) -> None:
    state = trained("topk")
    older = save_checkpoint(state, tmp_path, keep=2)
    step(state, rows(24))
    path = save_checkpoint(state, tmp_path, keep=2)
    with FailingCalls(older, 0)() as calls:
        assert_same_state(load_checkpoint(state.config, path), state)
    assert calls.failed == ""


def test_an_old_checkpoint_that_is_torn_is_not_called_good(tmp_path: Path) -> None:
    """Older versions wrote no checksums."""
    state = trained("topk")
    torn = save_checkpoint(state, tmp_path, keep=2)
    step(state, rows(24))
    newest = save_checkpoint(state, tmp_path, keep=2)
    (tmp_path / "step-00000003.crc32c.json").unlink()
    for path in (torn, newest):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ManifestError, match="there is no good one before it"):
        load_checkpoint(state.config, newest)


HOSTILE_NUMBERS = [
    *({"eps": value} for value in (None, "x", [], {}, True, 10**30, -(10**400), math.nan, math.inf)),
    {"weight_decay": "x"},
]


def changed(path: Path, changes: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """Change tensors and numbers of a checkpoint in place. It has no checksums then."""
    with opened_tensors(path) as file:
        tensors, counters = {name: file.read(name) for name in file.names}, json.loads(file.metadata["state"])
    changes(tensors, counters)
    path.with_suffix(".crc32c.json").unlink()
    path.write_bytes(save(tensors, {"state": json.dumps(counters)}))


@pytest.mark.parametrize("numbers", HOSTILE_NUMBERS, ids=str)
def test_numbers_that_the_optimizer_cannot_take_are_refused(numbers: dict[str, object], tmp_path: Path) -> None:
    state = trained("topk")
    path = save_checkpoint(state, tmp_path)
    changed(path, lambda _, counters: counters["optimizer"][0].update(numbers))
    with pytest.raises(ManifestError, match=r"must be a number below 2\^63"):
        load_checkpoint(state.config, path)


SETTINGS = [{"params": None}, {"betas": 3}, {"amsgrad": True}, {"maximize": "x"}, {"differentiable": True}, {"new": []}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_optimizer_is_set_by_the_config_alone(settings: dict[str, object], tmp_path: Path) -> None:
    state = trained("topk")
    path = save_checkpoint(state, tmp_path)
    changed(path, lambda _, counters: counters["optimizer"][0].update(settings))
    restored = load_checkpoint(state.config, path)
    for each in (state, restored):
        step(each, rows(24, seed=3))
    assert_same_state(state, restored)


@pytest.mark.parametrize("changes", [{}, *OPTIMISED[:5]], ids=str)
@pytest.mark.parametrize("fault", ["missing", "more", "scalar", "dtype"])
def test_tensors_that_the_optimizer_cannot_take_are_refused(
    fault: str, changes: dict[str, object], tmp_path: Path
) -> None:
    state = trained("topk", **changes)
    path = save_checkpoint(state, tmp_path)

    def spoil(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        kind = "average" if "ema_decay" in changes and fault in ("scalar", "dtype") else "optimizer"
        name = next(name for name, each in tensors.items() if name.startswith(f"{kind}/W_dec") and each.ndim)
        tensor = tensors.pop(name)
        if fault == "missing":
            tensors.update({f"optimizer/W_dec/{len(name)}": tensor})
        else:
            tensors[name] = {"more": tensor, "scalar": torch.tensor(1.0), "dtype": tensor.to(torch.int64)}[fault]
        if fault == "more":
            tensors["optimizer/W_dec/x"] = torch.tensor(1.0)

    changed(path, spoil)
    with pytest.raises(ManifestError, match="cannot be read as a checkpoint"):
        load_checkpoint(state.config, path)


def test_a_checkpoint_of_another_config_is_refused(tmp_path: Path) -> None:
    state = trained("topk")
    path = save_checkpoint(state, tmp_path)
    with pytest.raises(CacheMismatch, match="is a checkpoint of another config"):
        load_checkpoint(dataclasses.replace(state.config, lr=0.5), path)


def test_a_name_without_a_step_is_refused() -> None:
    with pytest.raises(ManifestError, match="is named step-"):
        checkpoint_step(Path("last.safetensors"))
