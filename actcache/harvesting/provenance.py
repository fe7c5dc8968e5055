"""Where activations come from: the identity of a cache, its origin, and how activations were computed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from actcache.errors import CacheMismatch
from actcache.format.identity import FORMAT_VERSION, is_imported
from actcache.format.manifest import Plan
from actcache.harvesting.config import HarvestConfig
from actcache.models.language_model import LanguageModel
from actcache.models.names import same_name
from actcache.text.sources import DatasetSource, Source
from actcache.text.tokenise import tokenizer_hash

KEPT = "kept"  # how an identity says that rows of token ids are sequences as they are
SIZES = ("shard_rows", "chunk_rows")  # parts of an identity that are chosen when the cache is created


def refuse_other_identity(root: Path, held: Plan, wanted: Mapping[str, Any]) -> None:
    """Raise CacheMismatch if the plan of a cache has another identity; SIZES may differ.

    Args:
        root: the folder of the cache, for the message.
        held: its plan.
        wanted: the identity, without SIZES.

    Raises:
        CacheMismatch: the identities differ; the message lists the differences.
    """
    wanted = {**wanted, **{size: held.identity[size] for size in SIZES}}
    if same_name(held.identity["model"]["name"], wanted["model"]["name"]):
        wanted["model"] = {**wanted["model"], "name": held.identity["model"]["name"]}
    differences = [
        f"{key} is {held.identity.get(key)!r} there, {wanted.get(key)!r} here"
        for key in sorted({*held.identity, *wanted})
        if held.identity.get(key) != wanted.get(key)
    ]
    if differences:
        raise CacheMismatch(f"{root}: holds another cache: {'; '.join(differences)}; pass another --out")


def refuse_other_model(root: Path, identity: Mapping[str, Any], model: LanguageModel) -> None:
    """Raise CacheMismatch unless `model` is the model of a cache, wherever its files lie, with the same tokenizer.

    An imported cache has no hashes, so only the name is compared.

    Args:
        root: the folder of the cache, for the message.
        identity: of the cache.
        model: the loaded model.

    Raises:
        CacheMismatch: the models differ; the message lists the differences.
    """
    there = identity["model"]
    differences = model.differences(there)
    if not is_imported(there) and identity["tokenizer_sha256"] != _tokenizer_hash(model):
        differences.append("its tokenizer is another")
    if differences:
        code = " and with --trust-remote-code" if there.get("code_sha256") else ""
        raise CacheMismatch(
            f"{root}: was harvested from {there['name']!r}, the model is {model.identity['name']!r}: "
            f"{'; '.join(differences)}; pass that model, loaded in the same dtype{code}"
        )


def identity_of(model: LanguageModel, source: Source, config: HarvestConfig) -> dict[str, Any]:
    """The identity of the cache of this harvest, without SIZES. config: as `as_packed` gives it."""
    identity = {
        "format_version": FORMAT_VERSION,
        "model": {**model.identity, "probe": model.probe()},
        "tokenizer_sha256": _tokenizer_hash(model),
        "special_token_ids": sorted(set(model.tokenizer.all_special_ids)) if model.tokenizer else [],
        "dataset": source.identity(),
        "context_size": config.context_size,
        "prepend_bos": config.prepend_bos,
        "separator": config.separator,
        **({} if config.repack else {"rows": KEPT}),  # formerly all were packed, and no such key was written
        "dtype": config.dtype,
        "codec": config.codec,
        "seed": config.seed,
        "holdout": config.holdout,
    }
    return json.loads(json.dumps(identity))  # as it reads back, so that it compares equal


def _tokenizer_hash(model: LanguageModel) -> str | None:
    """The hash of a model's tokenizer; None if it has none."""
    return None if model.tokenizer is None else tokenizer_hash(model.tokenizer)


def worded_as_held(root: Path, held: Plan | None, wanted: Mapping[str, Any], model: LanguageModel) -> Mapping[str, Any]:
    """The identity with its model in the words of the cache, which another version or device may have written.

    Args:
        root: the folder of the cache, for the message.
        held: its plan; None if there is none yet.
        wanted: what `identity_of` gives of the model.
        model: the loaded model.

    Raises:
        CacheMismatch: it is another model; the message says what differs.
    """
    if held is None:
        return wanted
    there = held.identity["model"]
    if differences := model.differences(there):
        raise CacheMismatch(
            f"{root}: holds another cache: its model is {there['name']!r} there, {model.identity['name']!r} here: "
            f"{'; '.join(differences)}; pass another --out"
        )
    return {**wanted, "model": there}


def compute_of(model: LanguageModel, batch_size: int) -> dict[str, Any]:
    """How activations are computed. Together with the identity of the cache this decides their last bits."""
    return {
        "device": model.device.type,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "backend": model.backend,
        "model_dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.attention_kernel,
        "compiled": model.compiled,
        "batch_size": batch_size,
    }


def other_compute(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """What differs between two results of `compute_of`, in words; None if nothing does."""
    differing = [key for key, value in here.items() if there.get(key) != value]
    theirs = ", ".join(str(there.get(key)) for key in differing)
    ours = ", ".join(str(here[key]) for key in differing)
    return f"{', '.join(differing)} ({theirs}; now {ours})" if differing else None


def origin_of(model: LanguageModel, source: Source) -> dict[str, Any]:
    """Where model and dataset can be loaded from again, as `read_origin` gives it."""
    dataset = None
    if isinstance(source, DatasetSource):
        path = os.path.abspath(source.path) if os.path.exists(source.path) else source.path
        dataset = asdict(replace(source, path=path))
    origin = {"model": model.source, "revision": model.identity["revision"], "dataset": dataset}
    if model.adapter is not None:
        origin |= {"adapter": model.adapter.source, "adapter_revision": model.adapter.revision}
    return origin
