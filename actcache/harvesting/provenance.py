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
from actcache.format.identity import FORMAT_VERSION
from actcache.format.manifest import Plan
from actcache.harvesting.config import HarvestConfig
from actcache.models.language_model import LanguageModel
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
    differences = [
        f"{key} is {held.identity.get(key)!r} there, {wanted.get(key)!r} here"
        for key in sorted({*held.identity, *wanted})
        if held.identity.get(key) != wanted.get(key)
    ]
    if differences:
        raise CacheMismatch(f"{root}: holds another cache: {'; '.join(differences)}; pass another --out")


def refuse_other_model(root: Path, identity: Mapping[str, Any], model: LanguageModel) -> None:
    """Raise CacheMismatch unless `model` is the model of a cache, wherever its files lie, with the same tokenizer.

    Hashes are compared if both have them, else name and revision. An imported cache has no hashes, so only the name is
    compared.

    Args:
        root: the folder of the cache, for the message.
        identity: of the cache.
        model: the loaded model.

    Raises:
        CacheMismatch: the models differ; the message lists the differences.
    """
    there = {**identity["model"], "tokenizer_sha256": identity["tokenizer_sha256"]}
    here = {**model.identity, "tokenizer_sha256": _tokenizer_hash(model)}
    hashes = [key for key in ("config_sha256", "weights_sha256") if there.get(key) and here.get(key)]
    code = ["code_sha256"] if there.get("code_sha256") else []  # only a model that brought code has it
    keys = [*(hashes or ("name", "revision")), *code, "tokenizer_sha256"]
    if identity["tokenizer_sha256"] is None and not there.get("weights_sha256"):
        keys = ["name"]
    differing = [key for key in keys if there.get(key) != here.get(key)]
    if differing:
        differences = "; ".join(f"{key} is {there.get(key)} there, {here.get(key)} here" for key in differing)
        raise CacheMismatch(
            f"{root}: was harvested from {there['name']!r}, the model is {here['name']!r}: {differences}; pass that "
            f"model, loaded in the same dtype{' and with --trust-remote-code' if code else ''}"
        )


def identity_of(
    model: LanguageModel, source: Source, config: HarvestConfig, held: Plan | None = None
) -> dict[str, Any]:
    """The identity of the cache of this harvest, without SIZES.

    Args:
        model, source: what is harvested.
        config: as `as_packed` gives it.
        held: the plan of the cache, if it was begun. The revision of the model stays as it says, if the model has the
            same hashes: a commit may change other files, and the commit was not always known.
    """
    begun = {} if held is None else held.identity["model"]
    same = {**begun, "revision": None} == {**model.identity, "revision": None}
    identity = {
        "format_version": FORMAT_VERSION,
        "model": begun if same else model.identity,
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
    """Where model and dataset can be loaded from again. "dataset" is None if the dataset was in memory."""
    dataset = None
    if isinstance(source, DatasetSource):
        path = os.path.abspath(source.path) if os.path.exists(source.path) else source.path
        dataset = asdict(replace(source, path=path))
    return {"model": model.source, "revision": model.identity["revision"], "dataset": dataset}
