"""The losses of passes without an SAE, which are the same for every SAE of a cache: files below CACHE/log/losses.

A file holds the sums of one pass and the key under which they are looked for: everything on which their bits depend.
The files are no part of the cache. They may differ between equal caches, and may be deleted.
"""

import errno
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from actcache.errors import ManifestError
from actcache.files import NoFile, contents, is_writable, refuse_links, write_atomically
from actcache.format.seal import MALFORMED, seal, unseal
from actcache.store.cache import Cache

LOSSES = "log/losses"  # below a cache


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossSums:
    """Sums over the tokens that count of what one kind of pass predicts, in nats, float64.

    Attributes:
        ce: the cross entropy at each position, summed over sequences. The last position predicts nothing and is left
            out.
        kl: KL(original || this pass), summed over sequences and positions.
    """

    ce: Float64[Tensor, " position"]
    kl: float

    def merge(self, other: "LossSums") -> "LossSums":
        """The sums over the sequences of both."""
        return LossSums(ce=self.ce + other.ce, kl=self.kl + other.kl)


def read_sums(cache: Cache, key: Mapping[str, Any]) -> LossSums | None:
    """The sums that an earlier call stored under the key; None if there are none, or they are damaged."""
    try:
        values = unseal(contents(_path(cache, key)), _path(cache, key))
        ce, kl = [float(each) for each in values["ce"]], float(values["kl"])
    except (NoFile, ManifestError, *MALFORMED):
        return None
    if values.get("key") != key or len(ce) != cache.context_size - 1:
        return None
    return LossSums(ce=torch.tensor(ce, dtype=torch.float64), kl=kl)


def store_sums(cache: Cache, key: Mapping[str, Any], sums: LossSums) -> None:
    """Write the sums, whole or not at all. Nothing is written if a sum overflowed, or if the cache is read-only.

    Raises ManifestError if they would be written elsewhere, through a link.
    """
    if not math.isfinite(sums.kl) or not bool(sums.ce.isfinite().all()):
        return
    if is_writable(_path(cache, key)):
        refuse_links(cache.path)
    try:
        write_atomically(_path(cache, key), [seal({"key": key, "ce": sums.ce.tolist(), "kl": sums.kl})])
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise


def _path(cache: Cache, key: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    name = f"mean-{key['mean_ablated']}" if "mean_ablated" in key else key["zero_ablated"] or "original"
    return cache.path / LOSSES / f"{name}-{digest[:16]}.json"
