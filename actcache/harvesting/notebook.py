"""`harvest` for a notebook or a script: a model that is loaded already and plain arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path

import datasets
from torch import nn
from transformers import PreTrainedTokenizerBase

from actcache.arguments import names
from actcache.errors import DatasetError
from actcache.harvesting.config import HarvestConfig
from actcache.harvesting.loop import Progress
from actcache.harvesting.run import harvest as run_harvest
from actcache.models.load import wrap_model
from actcache.store.cache import Cache
from actcache.text.sources import DatasetSource, LoadedDataset, Source


def harvest(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    dataset: str | Path | Sequence[str] | datasets.Dataset | DatasetSource,
    hook_names: str | Sequence[str],
    out: str | Path,
    *,
    tokens: int | None = None,
    context_size: int = 128,
    codec: str = "lossless",
    dtype: str = "bfloat16",
    batch_size: int | None = None,
    prepend_bos: bool = True,
    separator: str = "bos",
    repack: bool = False,
    seed: int = 0,
    holdout: float = 0.01,
    progress: Progress | None = None,
) -> Cache:
    """Harvest the hooks of a loaded transformers model (plain, quantised or adapted) into the cache at `out`.

    Args:
        model: a transformers model in evaluation mode; it is neither changed nor moved.
        tokenizer: the tokenizer of the model; None if the dataset holds token ids.
        dataset: a path or hub name, a list of texts, a `datasets.Dataset`, or a DatasetSource.
        hook_names: one hook or several.
        out: the folder of the cache.
        progress: called with (rows done, rows in all) after every forward batch.
        tokens and all others: as for HarvestConfig.

    Returns:
        the finished cache, opened.

    Raises:
        ConfigError: a setting is out of range.
        CacheMismatch, CacheLocked, DiskTooSmall, DatasetError, ModelError, NonFiniteActivations: as for
            `actcache.harvesting.run.harvest`.
    """
    config = HarvestConfig(
        hook_names=names("harvest", "hook_names", hook_names),
        tokens=tokens,
        context_size=context_size,
        codec=codec,
        dtype=dtype,
        batch_size=batch_size,
        prepend_bos=prepend_bos,
        separator=separator,
        repack=repack,
        seed=seed,
        holdout=holdout,
    )
    return run_harvest(wrap_model(model, tokenizer), _source(dataset), config, out, progress=progress)


_WHY_NOT = {
    "IterableDataset": "nothing identifies before it is read to its end; pass DatasetSource(path=..., streaming=True), "
    "or datasets.Dataset.from_list(list(stream.take(n)))",
    "DatasetDict": "holds several splits; pass one of them",
    "IterableDatasetDict": "holds several splits; pass one of them",
}


def _source(dataset: str | Path | Sequence[str] | datasets.Dataset | DatasetSource) -> Source:
    if isinstance(dataset, DatasetSource):
        return dataset
    if isinstance(dataset, str | Path):
        return DatasetSource(path=str(dataset))
    if isinstance(dataset, datasets.Dataset):
        return LoadedDataset(dataset)
    if isinstance(dataset, Mapping | Set) or not hasattr(dataset, "__len__"):
        raise DatasetError(
            f"dataset: must be a path, a list of texts or a datasets.Dataset, got {type(dataset).__name__}, which "
            f"{_WHY_NOT.get(type(dataset).__name__, 'has no order of texts that is known before it is read')}"
        )
    try:
        return LoadedDataset(datasets.Dataset.from_dict({"text": list(dataset)}))
    except (ValueError, TypeError) as error:
        said = str(error).splitlines()[0]
        raise DatasetError(f"dataset: a list must hold texts of whole Unicode characters ({said})") from error
