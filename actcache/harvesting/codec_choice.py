"""`choose_codec`: the codec with the smallest files that costs no speed, found by measurement."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from actcache.files import write_atomically
from actcache.format.codecs import CODECS, codec
from actcache.format.dtypes import TORCH_DTYPE, storage_view
from actcache.harvesting.estimate import (
    PROBE_TOKENS,
    encoder_threads,
    probe_tokens,
    seconds_of,
    spare_cores,
    tokens_per_second,
)
from actcache.models.language_model import LanguageModel
from actcache.store.locks import refuse_unwritable

PROBE_BYTES = 64 << 20
TOLERATED = 0.95  # a smaller cache is worth 5 % of the speed


def choose_codec(
    model: LanguageModel, hook_names: Sequence[str], context_size: int, batch_size: int, dtype: str, root: Path
) -> tuple[str, str]:
    """Choose among the profiles without error: the one with the smallest files whose rate is within 5 % of the fastest.

    A harvest is as fast as the slowest of model, encoder threads and disk. If the model leaves no core free, model and
    encoder threads take turns, and their times add up.

    Args:
        model: the model that will run.
        hook_names: the hooks that will be harvested.
        context_size: tokens of a sequence.
        batch_size: sequences of a forward pass.
        dtype: of the stored values.
        root: the folder of the cache; its disk is measured.

    Returns:
        the name of the profile, and a line for a person that says why.
    """
    rate = tokens_per_second(model, hook_names, context_size, batch_size)
    x = model.activations(probe_tokens(model, PROBE_TOKENS // context_size or 1, context_size), hook_names)
    sample = torch.cat([rows.flatten(0, 1) for rows in x.values()], dim=1).to("cpu", TORCH_DTYPE[dtype])
    disk = _disk_bytes_per_second(root)
    seconds = {
        name: _seconds_per_token(sample, name, 1 / rate, disk, model.device)
        for name in CODECS
        if not codec(name).quantised
    }
    fastest = min(seconds.values())
    chosen = next(name for name, s in seconds.items() if s * TOLERATED <= fastest)
    rates = ", ".join(f"{name} {1 / s:,.0f}" for name, s in seconds.items())
    return chosen, f"model {rate:,.0f} tokens/s, disk {disk / 1e9:.2g} GB/s; with encoding and writing: {rates}"


def _seconds_per_token(sample: Tensor, name: str, model: float, disk: float, device: torch.device) -> float:
    rows = storage_view(sample.contiguous())
    encode = seconds_of(lambda: codec(name).encode(rows)) / len(rows) / encoder_threads(device)
    write = len(codec(name).encode(rows)[0]) / len(rows) / disk
    return max(model, encode, write) if spare_cores(device) else max(model + encode, write)


def _disk_bytes_per_second(root: Path) -> float:
    refuse_unwritable(root)
    with tempfile.TemporaryDirectory(dir=next(f for f in (root, *root.absolute().parents) if f.exists())) as folder:
        payload = os.urandom(PROBE_BYTES)
        return PROBE_BYTES / seconds_of(lambda: write_atomically(Path(folder) / "probe", [payload]))
