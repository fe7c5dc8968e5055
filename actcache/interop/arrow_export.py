"""`export_cache`: writes a split of a cache as SAELens' Arrow cache."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from actcache.arguments import local_path
from actcache.errors import CacheMismatch, DatasetError
from actcache.files import naming, new_folder, write_atomically
from actcache.format.dtypes import TORCH_DTYPE
from actcache.format.records import ShardRecord
from actcache.format.scatter import shard_permutation
from actcache.interop.arrow_import import BATCH_BYTES, TOKEN_IDS, Progress
from actcache.store.cache import Cache

INFO_FILE, STATE_FILE = "dataset_info.json", "state.json"


def export_cache(cache: Cache, out: Path | str, *, split: str = "train", progress: Progress | None = None) -> Path:
    """Write a split of a cache as SAELens' Arrow cache at `out`, in the order of its sequences.

    The folder appears as a whole or not at all. bfloat16 becomes float32, which is exact; other dtypes stay. This takes
    the memory of one shard of every hook, one more shard, and BATCH_BYTES. The same call again does nothing.

    Args:
        cache: the opened cache.
        out: the folder to write; it must be new or empty.
        split: "train" or "validation".
        progress: called with (rows done, rows in all) after every shard.

    Returns:
        `out`; SAELens takes it as `CacheActivationsRunnerConfig.new_cached_activations_path`.

    Raises:
        ConfigError: there is no such split.
        DatasetError: the split has no rows.
        CacheMismatch: `out` holds something else.
        CacheLocked: another process is writing `out`.
        CorruptShard: a chunk is damaged.
    """
    out, fingerprint = local_path(out).absolute(), f"{cache.fingerprint}-{split}"
    if cache.n_rows(split) == 0:
        raise DatasetError(f"export-cache: {split} of {cache.path} holds no rows; export the other split")
    if _is_exported(out, fingerprint):
        return out
    with new_folder(out) as aside:
        features = _features(cache)
        files = list(_write_arrow_files(cache, split, features, aside, progress))
        datasets.DatasetInfo(features=features).write_to_directory(str(aside))
        info = (aside / INFO_FILE).read_bytes()
        for name, data in ((INFO_FILE, info), (STATE_FILE, json.dumps(_state(files, fingerprint), indent=2).encode())):
            write_atomically(aside / name, [data])  # `datasets` wrote it without fsync
    return out


def _is_exported(out: Path, fingerprint: str) -> bool:
    """Whether `out` holds this export already. Raises CacheMismatch if it holds something else."""
    if out.exists() and not out.is_dir():
        raise CacheMismatch(f"export-cache: {out} must be a folder, is a file; pass another --out")
    held = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if STATE_FILE in held and f'"_fingerprint": "{fingerprint}"' in (out / STATE_FILE).read_text():
        return True
    if held:
        raise CacheMismatch(
            f"export-cache: {out} must be new or empty, it holds {', '.join(held[:5])}; pass another --out"
        )
    return False


def _features(cache: Cache) -> datasets.Features:
    hooks = cache.manifest.hooks
    dtype = "float32" if cache.identity["dtype"] == "bfloat16" else cache.identity["dtype"]
    columns = {hook.hook_name: datasets.Array2D(shape=(cache.context_size, hook.d_in), dtype=dtype) for hook in hooks}
    return datasets.Features(
        {**columns, TOKEN_IDS: datasets.Sequence(datasets.Value("int32"), length=cache.context_size)}
    )


def _state(files: Sequence[str], fingerprint: str) -> dict[str, Any]:
    """The state.json that `Dataset.save_to_disk` writes for an unformatted dataset in these files."""
    return {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": fingerprint,
        **dict.fromkeys(("_format_columns", "_format_type", "_split")),
        "_format_kwargs": {},
        "_output_all_columns": False,
    }


def _write_arrow_files(
    cache: Cache, split: str, features: datasets.Features, folder: Path, progress: Progress | None
) -> Iterator[str]:
    """Write, for each shard, a file of the sequences that end in it; yields its name. Rows of a cut sequence wait."""
    waiting = {
        hook.hook_name: torch.empty(0, hook.d_in, dtype=TORCH_DTYPE[hook.dtype]) for hook in cache.manifest.hooks
    }
    for shard in cache.manifest.shards[split]:
        path = folder / f"data-{shard.index:05d}.arrow"
        waiting = _write_arrow_file(path, features.arrow_schema, cache, shard, waiting)
        if path.exists():
            yield path.name
        if progress is not None:
            progress(shard.first_token + shard.n_rows, cache.n_rows(split))


def _write_arrow_file(
    path: Path, schema: pa.Schema, cache: Cache, shard: ShardRecord, waiting: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Write the sequences that end in a shard, if there are any.

    Args:
        path: the file to write.
        schema: of the file.
        cache, shard: where the rows are.
        waiting: what this returned for the shard before.

    Returns:
        hook name -> the rows of the last sequence of the shard, if that sequence does not end in it.
    """
    columns = {name: _in_token_order(cache, shard, name, before) for name, before in waiting.items()}
    first, last = (token // cache.context_size for token in (shard.first_token, shard.first_token + shard.n_rows))
    n_rows = (last - first) * cache.context_size
    waiting = {name: column[n_rows:].clone() for name, column in columns.items()}
    if n_rows:
        token_ids = cache.sequence_reader(shard.split, "id").read(first, last)
        columns[TOKEN_IDS] = torch.from_numpy(token_ids).flatten()
        row_bytes = sum(4 * column[0].numel() for column in columns.values())
        step = max(1, BATCH_BYTES // (row_bytes * cache.context_size)) * cache.context_size
        batches = (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))
        with naming(path), open(path, "wb") as file:
            with pa.ipc.new_stream(file, schema) as stream:
                for batch in batches:
                    arrays = [_arrow_array(columns[f.name][batch], f.type, cache.context_size) for f in schema]
                    stream.write_batch(pa.record_batch(arrays, schema=schema))
            file.flush()
            os.fsync(file.fileno())
    return waiting


def _in_token_order(
    cache: Cache, shard: ShardRecord, hook_name: str, before: Float[Tensor, "waiting d_in"]
) -> Float[Tensor, "token d_in"]:
    """The rows that wait, and after them the rows of a shard in the order of their tokens.

    before: the rows that wait.
    """
    stored = cache.hook_reader(shard.split, hook_name).read(shard.first_token, shard.first_token + shard.n_rows)
    permutation = shard_permutation(shard.n_rows, seed=cache.identity["seed"], split=shard.split, index=shard.index)
    rows = stored.new_empty(len(before) + shard.n_rows, before.shape[1])
    rows[: len(before)] = before
    torch.index_select(stored, 0, torch.from_numpy(permutation), out=rows[len(before) :])
    return rows


def _arrow_array(column: Tensor, kind: pa.DataType, context_size: int) -> pa.Array:
    """A column of whole sequences: token ids, or activations as the lists of lists of an Array2D."""
    if column.ndim == 1:
        return pa.FixedSizeListArray.from_arrays(pa.array(column.numpy()), context_size)
    values = (column.float() if column.dtype == torch.bfloat16 else column).contiguous().numpy()
    n_tokens, d_in = values.shape
    rows = pa.ListArray.from_arrays(_ends(n_tokens, d_in), pa.array(values.reshape(-1)))
    sequences = pa.ListArray.from_arrays(_ends(n_tokens // context_size, context_size), rows)
    return pa.ExtensionArray.from_storage(kind, sequences)


def _ends(n_lists: int, length: int) -> pa.Array:
    """The offsets of `n_lists` lists of one length: where each begins, and where the last one ends."""
    return pa.array(np.arange(n_lists + 1, dtype=np.int32) * length)
