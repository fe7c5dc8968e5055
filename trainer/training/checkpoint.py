"""Checkpoints: a `TrainState` as one safetensors file, which is written aside, fsynced and renamed.

The file holds the tensors weights/<name>, optimizer/<name>/<what> (such as Adam's exp_avg), average/<name> and
tokens_since_fired. Its metadata has one key, `state`, because safetensors writes several keys in no fixed order. The
value is the JSON object {step, n_tokens, config_sha256, optimizer}; `optimizer` holds the numbers of each parameter
group. Nothing is pickled. step-XXXXXXXX.crc32c.json beside it holds its checksums; it is written before the file.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from actcache.arguments import shown
from actcache.errors import CacheMismatch, ManifestError
from actcache.files import NoFile, is_file, listed, remove_leftovers, write_atomically
from actcache.format.seal import MALFORMED
from trainer.checksums import CHECKSUMS_FILE, check_file, checksums_of, read_checksums, sealed
from trainer.config.settings import SAEConfig
from trainer.tensor_file import TensorFile, opened_tensors
from trainer.training.optimizer import new_optimizer
from trainer.training.step import TrainState, initial_state

MOST_OF_A_NUMBER = 1 << 63
_FILE_NAME = re.compile(r"step-(\d{8,})\.safetensors")


def latest_checkpoint(folder: Path) -> Path | None:
    """The file with the highest step in a checkpoint folder; None if there is no file or no folder."""
    return max(_checkpoints(folder), key=checkpoint_step, default=None)


def checkpoint_step(path: Path) -> int:
    """The step in the name of a checkpoint file. Raises ManifestError for another name."""
    named = _FILE_NAME.fullmatch(path.name)
    if named is None:
        raise ManifestError(f"{path}: a checkpoint is named step-XXXXXXXX.safetensors")
    return int(named[1])


def save_checkpoint(state: TrainState, folder: Path, *, keep: int = 1) -> Path:
    """Write the state, and once it is durable remove all checkpoints but the last `keep`. Returns the file.

    Raises OSError if the write fails; then no checkpoint is removed.
    """
    path = folder / f"step-{state.step:08d}.safetensors"
    counters = {
        "step": state.step,
        "n_tokens": state.n_tokens,
        "config_sha256": config_sha256(state.config),
        "optimizer": [_numbers(group) for group in state.optimizer.param_groups],
    }
    data = save(_tensors(state), {"state": json.dumps(counters)})
    write_atomically(_checksums_file(path), [sealed(checksums_of({path.name: data}))])
    write_atomically(path, [data])
    others = [other for other in _checkpoints(folder) if other != path]
    for older in sorted(others, key=checkpoint_step, reverse=True)[keep - 1 :]:
        older.unlink()
    for stray in listed(folder):  # of the files just removed, or of a killed writer
        if stray.match(f"step-*.{CHECKSUMS_FILE}") and not is_file(_file_of(stray)):
            stray.unlink()
    return path


def load_checkpoint(config: SAEConfig, path: Path, device: torch.device | str = "cpu") -> TrainState:
    """Read the state of a checkpoint, bit for bit, and remove what killed writers left beside it.

    Args:
        config: the config that the state was trained with.
        path: the checkpoint.
        device: where the state is put.

    Raises:
        ManifestError: the file is damaged. The message names the last checkpoint that is not.
        CacheMismatch: it is a checkpoint of another config.
        OSError: it cannot be read.
    """
    remove_leftovers(path.parent)
    state = initial_state(config, torch.zeros(config.d_out, device=device))
    try:
        _check(path, warns=True)
        with opened_tensors(path) as file:
            counters = json.loads(file.metadata["state"])
            if counters["config_sha256"] != config_sha256(config):
                raise CacheMismatch(f"{path}: is a checkpoint of another config; remove {path.parent} or change --out")
            state.step, state.n_tokens = int(counters["step"]), int(counters["n_tokens"])
            if state.step != checkpoint_step(path):
                raise ValueError(f"it is of step {state.step}")
            _fill(state, file, counters["optimizer"])
    except ManifestError as error:
        raise ManifestError(error.what, path=error.path, way_out=error.way_out or _way_out(path)) from error
    except (NoFile, *MALFORMED) as error:
        what = f"cannot be read as a checkpoint ({type(error).__name__}: {error})"
        raise ManifestError(what, path=path, way_out=_way_out(path)) from error
    return state


def _check(path: Path, *, warns: bool = False) -> None:
    """Raise ManifestError if the bytes of a checkpoint are not those that were written. An old one has no checksums."""
    check_file(path, read_checksums(_checksums_file(path), warns=warns), "")


def _way_out(path: Path) -> str:
    """What to do about a damaged checkpoint: to remove it, and what training then goes on from."""
    older = [each for each in _checkpoints(path.parent) if checkpoint_step(each) < checkpoint_step(path)]
    for each in sorted(older, key=checkpoint_step, reverse=True):
        try:
            _check(each)
            with opened_tensors(each):
                return f"remove it to go on from {each.name}, the last good one"
        except (ManifestError, NoFile, ValueError):
            continue
    return "remove it to train from the start: there is no good one before it"


def config_sha256(config: SAEConfig) -> str:
    """SHA-256 of the config's canonical JSON."""
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in listed(folder) if _FILE_NAME.fullmatch(path.name) and is_file(path)]


def _checksums_file(path: Path) -> Path:
    return path.with_name(f"{path.stem}.{CHECKSUMS_FILE}")


def _file_of(checksums_file: Path) -> Path:
    return checksums_file.with_name(checksums_file.name.removesuffix(CHECKSUMS_FILE) + "safetensors")


def _numbers(group: Mapping[str, Any]) -> dict[str, float | int | bool]:
    """The numbers of an optimizer's parameter group."""
    return {name: value for name, value in group.items() if isinstance(value, float | int)}


def _tensors(state: TrainState) -> dict[str, Tensor]:
    tensors = {"tokens_since_fired": state.tokens_since_fired}
    for name, weight in state.weights.items():
        tensors[f"weights/{name}"] = weight.detach()
        for what, tensor in state.optimizer.state[weight].items():
            tensors[f"optimizer/{name}/{what}"] = tensor
    return tensors | {f"average/{name}": average for name, average in state.average.items()}


def _fill(state: TrainState, file: TensorFile, groups: Sequence[Mapping[str, Any]]) -> None:
    """Copy the stored tensors and numbers into a fresh state. Raises ValueError unless its optimizer can take them."""
    _copy_(state.tokens_since_fired, file, "tokens_since_fired")
    stepped_groups, stepped = _stepped(state)
    for name, weight in state.weights.items():
        with torch.no_grad():
            _copy_(weight, file, f"weights/{name}")
        prefix = f"optimizer/{name}/"
        held = {key.removeprefix(prefix) for key in file.names if key.startswith(prefix)}
        if held and held != {*stepped[name]}:
            raise ValueError(f"{prefix} must hold {', '.join(stepped[name])}, holds {', '.join(sorted(held))}")
        state.optimizer.state[weight] = {
            what: _fitting(file, prefix + what, weight, stepped[name][what]) for what in stepped[name] if held
        }
        if f"average/{name}" in file.names:
            state.average[name] = _fitting(file, f"average/{name}", weight, weight)
    for group, like, numbers in zip(state.optimizer.param_groups, stepped_groups, groups, strict=True):
        group.update(_fitting_numbers(numbers, like))


def _stepped(state: TrainState) -> tuple[list[dict[str, Any]], dict[str, dict[str, Tensor]]]:
    """What the state's optimizer holds after a step: its groups, and by the name of a weight what it holds of that.

    The step is done with weights of one element.
    """
    weights = {
        name: torch.zeros([1] * weight.ndim, dtype=weight.dtype, requires_grad=True)
        for name, weight in state.weights.items()
    }
    optimizer = new_optimizer(state.config, weights)
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    return optimizer.param_groups, {name: optimizer.state[weight] for name, weight in weights.items()}


def _copy_(tensor: Tensor, file: TensorFile, name: str) -> None:
    stored = file.read(name)
    if stored.shape != tensor.shape:
        raise ValueError(f"{name} must have shape {tuple(tensor.shape)}, got {tuple(stored.shape)}")
    tensor.copy_(stored)


def _fitting(file: TensorFile, name: str, weight: Tensor, like: Tensor) -> Tensor:
    """A stored tensor on the weight's device. `like` has its dtype, and is a scalar if it is one.

    Raises ValueError unless it is so, and unless it has the weight's shape if it is no scalar.
    """
    tensor, shape = file.read(name), weight.shape if like.ndim else like.shape
    if (tensor.shape, tensor.dtype) != (shape, like.dtype):
        raise ValueError(f"{name} must be {like.dtype} {tuple(shape)}, got {tensor.dtype} {tuple(tensor.shape)}")
    return tensor.to(weight.device)


def _fitting_numbers(stored: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, float | int]:
    """The stored numbers that a group has too. What is true or false follows from the config.

    Raises ValueError for one that is no number, or that torch cannot take.
    """
    numbers = {name: stored.get(name, value) for name, value in _numbers(group).items() if not isinstance(value, bool)}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < MOST_OF_A_NUMBER:
            raise ValueError(f"{name} of the optimizer must be a number below 2^63, got {shown(value)}")
    return numbers
