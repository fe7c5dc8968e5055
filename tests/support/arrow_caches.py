"""SAELens' Arrow caches as `datasets` saves them, and what they and ours hold."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Array2D, Dataset, Features, Sequence, Value
from torch import Tensor

from actcache.interop.arrow_import import ArrowImport
from actcache.store.cache import Cache

CONTEXT, D_IN, N_ROWS = 16, 24, 300
HOOK, OTHER_HOOK = "blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"
BOS = 0


def arrow_folder(
    path: Path, *, dtype: str = "float32", n_rows: int = N_ROWS, hooks: tuple[str, ...] = (HOOK, OTHER_HOOK)
) -> Path:
    """Such a cache as `datasets` saves it, in several files; every value is a bit pattern of its own."""
    rng = np.random.default_rng(3)
    columns: dict[str, Any] = {
        hook: rng.standard_normal((n_rows, CONTEXT, D_IN + 8 * i)).astype(dtype) for i, hook in enumerate(hooks)
    }
    features: dict[str, Any] = {hook: Array2D(shape=x.shape[1:], dtype=dtype) for hook, x in columns.items()}
    columns["token_ids"] = rng.integers(1, 500, (n_rows, CONTEXT)).astype(np.int32)
    columns["token_ids"][:, 0] = BOS
    features["token_ids"] = Sequence(Value("int32"), length=CONTEXT)
    rows = Dataset.from_dict({name: list(x) for name, x in columns.items()}, features=Features(features))
    rows.save_to_disk(str(path), num_shards=3)
    return path


def column(path: Path, name: str) -> np.ndarray:
    """What `datasets` itself reads of a column."""
    return np.stack([np.asarray(row[name]) for row in datasets.load_from_disk(str(path)).with_format("numpy")])


def in_token_order(cache: Cache, split: str, hook_name: str) -> Tensor:
    """Every row of a split, [sequence, position, d_in], by the numbers stored beside the rows."""
    n_rows = cache.n_rows(split)
    sequence, position = (cache.token_reader(split, name).read(0, n_rows) for name in ("sequence", "position"))
    order = np.argsort(sequence.astype(np.int64) * cache.context_size + position)
    return (
        cache.hook_reader(split, hook_name)
        .read(0, n_rows)[order]
        .view(-1, cache.context_size, cache.hook(hook_name).d_in)
    )


def config(**changes: Any) -> ArrowImport:
    return ArrowImport(**{"model": "tiny", "special_token_ids": (BOS,), "holdout": 0.2, **changes})
