"""Sealed JSON: canonical JSON whose last key is the CRC-32C of every byte before that key."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actcache.errors import ManifestError
from actcache.format.codecs import crc32c
from actcache.machine.limits import json_memory, require_memory_for_array

# what malformed JSON values raise
MALFORMED = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError)
SEAL = re.compile(rb'(\{.*),"crc32c":"([0-9a-f]{8})"\}\n', re.DOTALL)


def seal(values: Mapping[str, Any]) -> bytes:
    """Canonical JSON (sorted keys, no spaces) with its own CRC-32C as the last key, and a newline."""
    body = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)[:-1].encode()
    return body + f',"crc32c":"{crc32c(body):08x}"}}\n'.encode()


def unseal(sealed: bytes, source: Path) -> dict[str, Any]:
    """The values of a sealed line or file.

    Raises ManifestError, naming `source`, if the checksum does not match or the JSON cannot be read, MemoryError if
    there is no room for the values.
    """
    match = SEAL.fullmatch(sealed)
    if match is None or crc32c(match[1]) != int(match[2], 16):
        what, way_out = "its checksum does not match its bytes", "restore the file or harvest again"
        raise ManifestError(what, path=source, way_out=way_out)
    require_memory_for_array(json_memory(sealed), f"reading {source}")
    try:
        return json.loads(match[1] + b"}")
    except (ValueError, RecursionError) as error:  # the checksum is right, but this is no JSON or is nested too deeply
        what = f"cannot be read as JSON ({type(error).__name__})"
        raise ManifestError(what, path=source, way_out="harvest again") from error


def fingerprint(sealed_manifest: bytes) -> str:
    """The first 16 hex digits of the sha256 of manifest/cache.json. A run stores them to name its cache."""
    return hashlib.sha256(sealed_manifest).hexdigest()[:16]
