"""`import_cache`: makes a cache of SAELens' Arrow cache.

An Arrow cache is a folder that `datasets` saved. A row is a sequence. The column `token_ids` is int32 [context_size].
Each hook has a column of its name, float32 or float16 [context_size, d_in]. Such a cache does not tell its model, its
dataset, where documents end, or which tokens are special.

In an imported cache each row counts as a document, so that a split consists of whole rows. The hashes of model and
tokenizer are null in its identity.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int32, Int64, Shaped
from torch import Tensor

from actcache.arguments import local_path, type_fields_
from actcache.errors import CacheLocked, DatasetError
from actcache.files import NOT_THERE, name_, write_atomically
from actcache.flow import SPLITS, ActivationBatch
from actcache.format.codecs import codec
from actcache.format.identity import FORMAT_VERSION
from actcache.format.manifest import Plan
from actcache.format.paths import ORIGIN
from actcache.format.records import HookSpec, ShardRecord, merge_records
from actcache.harvesting.config import HarvestConfig
from actcache.harvesting.encoder import ShardEncoder
from actcache.harvesting.estimate import encoder_threads, expected_bytes, refuse_small_disk
from actcache.harvesting.finalise import finalise
from actcache.harvesting.plan import already_there, settle_plan, warn_of_empty_splits
from actcache.harvesting.tasks import claim_slot, finished_cache, missing_shards, refuse_foreign_folder
from actcache.harvesting.window import Window, window_bytes, windows_that_fit
from actcache.machine.limits import require_memory
from actcache.models.hook_names import hooks_of
from actcache.models.pretrained import name_of
from actcache.store.cache import Cache, open_cache, sequence_reader
from actcache.store.journal import active_writers, read_journals, writers
from actcache.store.kept import CacheFiles
from actcache.store.locks import exclusive, remove_abandoned
from actcache.store.shard import Shard
from actcache.text.data_files import DataFault
from actcache.text.packing import PackedSequence, split_of
from actcache.text.saved import load_saved
from actcache.text.sources import DatasetSource

TOKEN_IDS = "token_ids"
DTYPES = ("float32", "float16")  # of the columns; an Arrow cache cannot have bfloat16
BATCH_BYTES = 64 << 20  # of activations read or written at once

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrowImport:
    """What an Arrow cache does not say, and how it is to be stored.

    model: the name or folder of the model that it was made with. special_token_ids: of BOS, EOS and other tokens whose
    rows training leaves out. dtype: of the stored values; None keeps that of the columns. codec, seed, holdout: as for
    a harvest; here the documents are the rows.

    Raises ConfigError for a value of another type.
    """

    model: str
    special_token_ids: tuple[int, ...] = ()
    codec: str = "lossless"
    dtype: str | None = None
    seed: int = 0
    holdout: float = 0.01

    def __post_init__(self) -> None:
        type_fields_("import-cache", self)


def import_cache(
    source: Path | str, config: ArrowImport, out: Path | str, *, progress: Progress | None = None
) -> Cache:
    """Write SAELens' Arrow cache at `source` as a cache at `out`. It has everything that a harvested cache has.

    After a kill, the same call goes on at the first unfinished shard. A finished cache of the same data is opened as it
    is. This takes the memory of one shard of every hook, BATCH_BYTES, and that of the encoder threads.

    Args:
        source: the folder of the Arrow cache.
        config: what the Arrow cache does not say, and how it is stored.
        out: the folder of the cache.
        progress: called with (rows done, rows in all) after every shard.

    Returns:
        the finished cache, opened.

    Raises:
        DatasetError: `source` is no Arrow cache, or a row of it is incomplete.
        CacheMismatch: `out` holds something else; the message lists the differences.
        ConfigError, CacheLocked, DiskTooSmall, NonFiniteActivations: as for a harvest.
    """
    root, arrow = local_path(out), ArrowRows(local_path(source), config.model)
    refuse_foreign_folder(root)
    dtype = config.dtype or arrow.dtype
    settings = HarvestConfig(
        hook_names=tuple(arrow.widths),
        context_size=arrow.context_size,
        codec=config.codec,
        dtype=dtype,
        seed=config.seed,
        holdout=config.holdout,
    )
    hooks = [HookSpec(hook_name=name, d_in=d_in, dtype=dtype) for name, d_in in arrow.widths.items()]
    cache = already_there(root, _identity(arrow, config, settings), settings.tokens, hooks)
    if cache is not None:
        remove_abandoned(root)
        return cache
    journal, plan = claim_slot(root, 0, partial(_begun, root, arrow, config, settings))
    with journal:
        if finished_cache(root, plan, hooks) is None:
            origin = os.path.abspath(config.model) if os.path.isdir(config.model) else config.model
            write_atomically(root / ORIGIN, [json.dumps({"model": origin, "revision": None, "dataset": None}).encode()])
            _write_shards(root, plan, hooks, arrow, settings, journal.append, progress)
            with exclusive(root, "finalises"):
                finalise(root, plan, read_journals(root))
        remove_abandoned(root)
    return open_cache(root)


def _is_of_activations(feature: object) -> bool:
    """Whether a column may hold activations, of [context_size, d_in] in each row. A stranger says what it holds."""
    if not isinstance(feature, datasets.Array2D) or not isinstance(feature.dtype, str):
        return False
    return len(feature.shape) == 2 and all(type(size) is int and 0 <= size < 1 << 31 for size in feature.shape)


class ArrowRows:
    """An opened Arrow cache. Rows are read when they are asked for."""

    def __init__(self, path: Path, model: str):
        """Open the folder. A column named after a submodule of `model` gets TransformerLens' hook name.

        Raises DatasetError unless there are token ids and activations, all of one context size and one dtype.
        """
        self.path = path
        require_memory(0, f"reading {path} with pyarrow")  # whose threads end the process where they get none
        try:
            dataset = load_saved(path)
        except (OSError, DataFault) as error:
            if isinstance(error, OSError) and error.errno is not None and error.errno not in NOT_THERE:
                name_(error, path)  # the system does not let us read it, which says nothing about what it holds
                raise
            raise DatasetError(f"import-cache: {path} must be a folder that datasets saved, got {error}") from error
        found = dict(dataset.features) if isinstance(dataset, datasets.Dataset) else {}
        columns = {name: each for name, each in found.items() if _is_of_activations(each)}
        kinds = {(each.shape[0], each.dtype) for each in columns.values()}
        if TOKEN_IDS not in found or len(kinds) != 1 or not all(size and dtype in DTYPES for size, dtype in kinds):
            said = "; ".join(f"{name} {each}" for name, each in found.items())
            raise DatasetError(
                f"import-cache: {path} must have a column {TOKEN_IDS} and for each hook one of (context_size, d_in) "
                f"{' or '.join(DTYPES)}, it has {said or 'none'}; make it with SAELens' CacheActivationsRunner"
            )
        ((self.context_size, self.dtype),) = kinds
        self._n_rows = len(dataset)
        names = {_hook_name(name, model): name for name in columns} | {TOKEN_IDS: TOKEN_IDS}
        self._columns: dict[str, Any] = {
            name: dataset.with_format("arrow", columns=[column]) for name, column in names.items()
        }
        self.widths: dict[str, int] = {_hook_name(name, model): each.shape[1] for name, each in columns.items()}

    def sequences(self, *, seed: int, holdout: float) -> Iterator[PackedSequence]:
        """Every row as a sequence.

        All its tokens belong to one document, the row; seed and holdout decide its split.
        """
        step = max(1, BATCH_BYTES // (4 * self.context_size))
        for start in range(0, self._n_rows, step):
            token_ids = self._token_ids(slice(start, start + step))
            for row, ids in enumerate(token_ids, start):
                document = np.full(self.context_size, row, dtype=np.int32)
                yield PackedSequence(split_of(row, seed=seed, holdout=holdout), ids, document)

    def activations(self, hook_name: str, rows: Sequence[int]) -> Float[Tensor, "row position d_in"]:
        """The activations of some rows at a hook, in the dtype of the columns. Raises DatasetError."""
        shape = (self.context_size, self.widths[hook_name])
        return torch.from_numpy(self._values(hook_name, rows, shape))

    def _token_ids(self, rows: slice) -> Int32[np.ndarray, "row position"]:
        token_ids = self._values(TOKEN_IDS, rows, (self.context_size,))
        if token_ids.min() < 0 or token_ids.max() >= 1 << 31:
            raise DatasetError(f"import-cache: {self.path}: {TOKEN_IDS} must be in [0, 2^31), got {token_ids.min()}")
        return token_ids.astype(np.int32)

    def _values(self, name: str, rows: slice | Sequence[int], shape: tuple[int, ...]) -> Shaped[np.ndarray, "row ..."]:
        """A copy of some rows of a column, [row, *shape]. Raises DatasetError if a row is null or incomplete."""
        (column,) = self._columns[name][rows].columns
        parts = []
        for chunk in column.chunks:
            values = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
            for _ in shape:
                values = values.flatten()  # drops null rows
            parts.append(values)
        if sum(map(len, parts)) != len(column) * math.prod(shape) or any(part.null_count for part in parts):
            raise DatasetError(f"import-cache: {self.path}: every row of {name} must be whole, of shape {shape}")
        return np.concatenate([part.to_numpy() for part in parts]).reshape(len(column), *shape)


def _hook_name(column: str, model: str) -> str:
    hooks = hooks_of(column, model)
    return column if hooks is None else hooks[1]


def _begun(root: Path, arrow: ArrowRows, config: ArrowImport, settings: HarvestConfig) -> Plan:
    """Settle the plan. Raises CacheLocked if other processes write."""
    if others := active_writers(root) - {0}:
        raise CacheLocked(f"{root}: other processes write this cache ({writers(root, others)}); wait for them")
    sequences = arrow.sequences(seed=config.seed, holdout=config.holdout)
    plan = settle_plan(root, _identity(arrow, config, settings), sequences, settings, max(arrow.widths.values()))
    warn_of_empty_splits(root, plan)
    return plan


def _identity(arrow: ArrowRows, config: ArrowImport, settings: HarvestConfig) -> dict[str, Any]:
    """The identity of the cache, as a harvest makes it. What an Arrow cache does not say is null."""
    return {
        "format_version": FORMAT_VERSION,
        "model": {"name": name_of(config.model), "revision": None, "config_sha256": None, "weights_sha256": None},
        "tokenizer_sha256": None,
        "special_token_ids": sorted(set(config.special_token_ids)),
        "dataset": DatasetSource(path=str(arrow.path), column=TOKEN_IDS).identity(),
        "context_size": settings.context_size,
        "prepend_bos": None,
        "separator": None,
        "dtype": settings.dtype,
        "codec": settings.codec,
        "seed": settings.seed,
        "holdout": settings.holdout,
    }


def _compute(settings: HarvestConfig) -> dict[str, Any]:
    """How the activations were computed.

    It is not known, so choices have the defaults by which a model would be loaded.
    """
    unknown = dict.fromkeys(("device", "torch", "transformers"), "unknown")
    choices = {"backend": "hf", "model_dtype": "auto", "attention": "auto", "compiled": False}
    return {**unknown, **choices, "batch_size": settings.batch_sequences}


def _write_shards(
    root: Path,
    plan: Plan,
    hooks: Sequence[HookSpec],
    arrow: ArrowRows,
    settings: HarvestConfig,
    written: Callable[[ShardRecord], None],
    progress: Progress | None,
) -> None:
    """Write every shard that is not recorded yet.

    Args:
        root: the folder of the cache.
        plan: its plan.
        hooks: the hooks that every shard holds.
        arrow: the Arrow cache.
        settings: the import as the settings of a harvest.
        written: called with the record of each shard after its files were written.
        progress: called with (rows done, rows in all) after every shard.

    Raises:
        DiskTooSmall, DatasetError, NonFiniteActivations: as for `import_cache`.
    """
    pending = list(missing_shards(plan, merge_records(read_journals(root)), hooks))
    n_rows, n_left = sum(map(plan.n_rows, SPLITS)), sum(plan.rows_of(*task[:2]) for task in pending)
    refuse_small_disk(root, expected_bytes(n_left, hooks, settings.codec))
    device, largest = torch.device("cpu"), max((plan.rows_of(*task[:2]) for task in pending), default=0)
    profile = codec(settings.codec)
    windows_that_fit(1, window_bytes(hooks, profile, largest))
    window = Window(hooks, profile, largest, device)
    encoder = ShardEncoder(root, plan, device, _compute(settings), encoder_threads(device))
    with closing(encoder):
        for split, index, missing_hooks, revision in pending:
            shard = Shard.of(CacheFiles(root=root), plan, split, index, missing_hooks, revision)
            _fill(window, shard, arrow, _documents(root, plan, shard))
            written(encoder.write(shard, window, with_tokens=True, ready=None))
            n_left -= shard.n_rows
            if progress is not None:
                progress(n_rows - n_left, n_rows)


def _documents(root: Path, plan: Plan, shard: Shard) -> Int64[np.ndarray, " sequence"]:
    """For each sequence of a shard, the number of its row in the Arrow cache."""
    first, last = shard.first_sequence, shard.first_sequence + len(shard.sequences)
    reader = sequence_reader(CacheFiles(root=root), plan, shard.split, "document")
    return reader.read(first, last)[:, 0].astype(np.int64)


def _fill(window: Window, shard: Shard, arrow: ArrowRows, rows: Int64[np.ndarray, " sequence"]) -> None:
    """Gather the rows of a shard in the window. rows: the row of the Arrow cache of each sequence."""
    permutation = torch.from_numpy(shard.permutation)
    for hook in shard.hooks:
        row_bytes = arrow.context_size * hook.d_in * np.dtype(arrow.dtype).itemsize
        for tokens in shard.token_batches(max(1, BATCH_BYTES // row_bytes)):
            start = tokens.first_sequence - shard.first_sequence
            x = arrow.activations(hook.hook_name, rows[start : start + len(tokens.token_ids)].tolist())
            first_token = tokens.first_sequence * arrow.context_size
            batch = ActivationBatch(hook_name=hook.hook_name, x=x, first_token=first_token)
            window.add(batch, shard.first_token, permutation)
