"""The identity of a cache. Two caches are the same cache if their identities are equal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from actcache.arguments import shown
from actcache.errors import ManifestError
from actcache.format.arrays import MAX_CONTEXT_SIZE, MAX_SHARD_ROWS
from actcache.format.codecs import CODECS
from actcache.format.dtypes import ACTIVATION_DTYPES
from actcache.format.records import whole_number

FORMAT_VERSION = 1


def check_identity(identity: dict[str, Any]) -> None:
    """Raise unless this program can read a cache of this identity.

    Raises:
        ManifestError: the format version, codec, dtype or a size is not one that this program reads, or another value
            has another type.
        KeyError, TypeError, ValueError, AttributeError: the values are malformed (see seal.MALFORMED).
    """
    named = isinstance(identity["model"], dict) and isinstance(identity["model"].get("name"), str)
    _require(named, identity, "model", "a name, and what tells it from others")
    _check_model(identity["model"])
    version = identity.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ManifestError(f"cache: this program reads format version {FORMAT_VERSION}, got {shown(version)}")
    if identity.get("codec") not in CODECS:
        raise ManifestError(f"cache: codec must be one of {', '.join(CODECS)}, got {shown(identity.get('codec'))}")
    if identity.get("dtype") not in ACTIVATION_DTYPES:
        raise ManifestError(f"cache: dtype must be one of {ACTIVATION_DTYPES}, got {shown(identity.get('dtype'))}")
    shard_rows = whole_number("shard_rows", identity.get("shard_rows"), 1, MAX_SHARD_ROWS)
    chunk_rows = whole_number("chunk_rows", identity.get("chunk_rows"), 1, shard_rows)
    if shard_rows.bit_count() != 1 or shard_rows % chunk_rows:
        raise ManifestError(f"cache: {shard_rows=} must be a power of two, and {chunk_rows=} must divide it")
    whole_number("context_size", identity.get("context_size"), 1, MAX_CONTEXT_SIZE)
    _require(isinstance(identity["special_token_ids"], list), identity, "special_token_ids", "a list")
    for token_id in identity["special_token_ids"]:
        whole_number("special_token_ids", token_id, highest=(1 << 31) - 1)
    texts = isinstance(identity["dataset"], dict) and all(
        isinstance(each, str | None) for each in identity["dataset"].values()
    )
    _require(texts and isinstance(identity["dataset"]["name"], str), identity, "dataset", "a name, and texts or nulls")
    for key in ("tokenizer_sha256", "separator"):
        _require(isinstance(identity[key], str | None), identity, key, "a text or null")
    seed, holdout = identity["seed"], identity["holdout"]
    _require(isinstance(identity["prepend_bos"], bool | None), identity, "prepend_bos", "true, false or null")
    _require(type(seed) is int and seed >= 0, identity, "seed", "a whole number of at least 0")
    _require(type(holdout) in (int, float) and 0 <= holdout < 1, identity, "holdout", "a number in [0, 1)")


def _require(is_so: bool, identity: dict[str, Any], key: str, must: str) -> None:
    if not is_so:
        raise ManifestError(f"cache: {key} must be {must}, got {shown(identity[key])}")


def is_imported(model: Mapping[str, Any]) -> bool:
    """Whether nothing but the name of a cache's model is known. model: of its identity."""
    return not (model.get("content_sha256") or model.get("weights_sha256"))


def _check_model(model: dict[str, Any]) -> None:
    """Raise one of seal.MALFORMED unless a model can be compared with this identity of one."""
    for key in ("config_sha256", "weights_sha256", "content_sha256", "code_sha256"):
        if not isinstance(model.get(key), str | None):
            raise ValueError(f"{key} must be a str, got {shown(model[key])}")
    if model.get("content_sha256") and not isinstance(model["config"], dict):
        raise ValueError(f"the config of its model must be an object, got {shown(model['config'])}")
    for part in ("stream", "logits"):
        for row in model.get("probe", {}).get(part) or ():
            if row is not None and not (row and all(map(math.isfinite, row))):
                raise ValueError(f"{part} of the probe must be finite, got {shown(row)}")
