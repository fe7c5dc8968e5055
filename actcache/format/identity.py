"""The identity of a cache. Two caches are the same cache if their identities are equal."""

from __future__ import annotations

from typing import Any

from actcache.errors import ManifestError
from actcache.format.arrays import MAX_CONTEXT_SIZE, MAX_SHARD_ROWS
from actcache.format.codecs import CODECS
from actcache.format.dtypes import ACTIVATION_DTYPES
from actcache.format.records import whole_number

FORMAT_VERSION = 1


def check_identity(identity: dict[str, Any]) -> None:
    """Raise unless this program can read a cache of this identity.

    Raises:
        ManifestError: the format version, codec, dtype or a size is not one that this program reads.
        KeyError, TypeError, ValueError, AttributeError: the values are malformed (see seal.MALFORMED).
    """
    version = identity.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ManifestError(f"cache: this program reads format version {FORMAT_VERSION}, got {version!r}")
    if identity.get("codec") not in CODECS:
        raise ManifestError(f"cache: codec must be one of {', '.join(CODECS)}, got {identity.get('codec')!r}")
    if identity.get("dtype") not in ACTIVATION_DTYPES:
        raise ManifestError(f"cache: dtype must be one of {ACTIVATION_DTYPES}, got {identity.get('dtype')!r}")
    shard_rows = whole_number("shard_rows", identity.get("shard_rows"), 1, MAX_SHARD_ROWS)
    chunk_rows = whole_number("chunk_rows", identity.get("chunk_rows"), 1, shard_rows)
    if shard_rows.bit_count() != 1 or shard_rows % chunk_rows:
        raise ManifestError(f"cache: {shard_rows=} must be a power of two, and {chunk_rows=} must divide it")
    whole_number("context_size", identity.get("context_size"), 1, MAX_CONTEXT_SIZE)
    for token_id in identity["special_token_ids"]:
        whole_number("special_token_ids", token_id, highest=(1 << 31) - 1)
