"""What a harvest will take: bytes, free disk, seconds, and how many encoder threads it gets."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from actcache.errors import DiskTooSmall
from actcache.format.codecs import codec
from actcache.format.dtypes import TORCH_DTYPE
from actcache.format.int8 import BLOCK_CHANNELS
from actcache.format.records import HookSpec
from actcache.machine.limits import cores
from actcache.models.language_model import LanguageModel

# The smallest compression ratio measured on trained models, Gaussians and streams with outliers.
SMALLEST_RATIO = {
    "lossless": {"bfloat16": 1.40, "float16": 1.12, "float32": 1.12},
    "fast": {"bfloat16": 1.20, "float16": 1.0, "float32": 1.0},
}
TOKEN_BYTES = 5 * 4  # a row's id, sequence and position, and in its sequence the id and the document; uncompressed
PROBE_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a harvest still has to do. seconds: of its forward passes; None if they were not measured."""

    n_rows: int
    n_bytes: int
    free_bytes: int
    seconds: float | None


def expected_bytes(n_rows: int, hooks: Sequence[HookSpec], codec_name: str) -> int:
    """The most bytes that rows take on disk, tokens included.

    Args:
        n_rows: how many rows.
        hooks: what is stored of each row.
        codec_name: the profile; SMALLEST_RATIO says how well it compresses.
    """
    row_bytes = float(TOKEN_BYTES)
    for hook in hooks:
        if codec(codec_name).quantised:
            row_bytes += hook.d_in + 2 * -(-hook.d_in // BLOCK_CHANNELS)
        else:
            ratio = SMALLEST_RATIO.get(codec_name, {}).get(hook.dtype, 1.0)
            row_bytes += hook.d_in * TORCH_DTYPE[hook.dtype].itemsize / ratio
    return round(n_rows * row_bytes)


def free_bytes(root: Path) -> int:
    """Free bytes on the disk of `root`, which need not exist yet."""
    return shutil.disk_usage(next(folder for folder in (root, *root.absolute().parents) if folder.exists())).free


def refuse_small_disk(root: Path, n_bytes: int) -> None:
    """Raise DiskTooSmall if the disk has less room than `n_bytes`."""
    free = free_bytes(root)
    if n_bytes > free:
        raise DiskTooSmall(
            f"{root}: the shards will take about {n_bytes / 1e9:.3g} GB, the disk has {free / 1e9:.3g} GB free; free "
            "some, pass fewer --tokens or hooks, --codec int8, or another --out"
        )


def tokens_per_second(model: LanguageModel, hook_names: Sequence[str], context_size: int, batch_size: int) -> float:
    """Tokens per second of a forward pass of at most about 512 tokens, which follows one pass to warm up."""
    n_sequences = max(1, min(batch_size, PROBE_TOKENS // context_size))
    token_ids = probe_tokens(model, n_sequences, context_size)
    model.activations(token_ids, hook_names)
    return token_ids.numel() / seconds_of(lambda: _run(model, token_ids, hook_names))


def spare_cores(device: torch.device) -> int:
    """How many of our cores a model leaves free: all of them on a GPU, and on a CPU those without a torch thread."""
    return max(0, cores() - torch.get_num_threads()) if device.type == "cpu" else cores()


def encoder_threads(device: torch.device) -> int:
    """How many encoder threads: one for each free core, or for every core if none is free; at most eight."""
    return min(8, spare_cores(device) or cores())


def probe_tokens(model: LanguageModel, n_sequences: int, context_size: int) -> Tensor:
    """Token ids to measure with, [n_sequences, context_size]."""
    ids = torch.arange(n_sequences * context_size) % model.n_embeddings
    return ids.view(n_sequences, context_size)


def _run(model: LanguageModel, token_ids: Tensor, hook_names: Sequence[str]) -> None:
    for x in model.activations(token_ids, hook_names).values():
        if x.is_cuda:
            torch.cuda.synchronize(x.device)


def seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
