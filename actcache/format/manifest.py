"""`Plan` and `Manifest`: what a harvest set out to do, what a finished cache holds, and which files that implies.

Sealed files under CACHE/manifest hold them. `plan.json` is written before the first forward pass and holds the identity
and the packed sequences. `writer-NN.jsonl`, the journal of one writer, grows by one line for each finished shard.
`cache.json` is written last; it holds what both say, in a fixed order. Readers trust `cache.json` alone. Nothing in
these files is executed, and no name in them can lead out of the cache's folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from actcache.arguments import one_of, shown
from actcache.errors import CacheMismatch, ManifestError
from actcache.flow import SPLITS
from actcache.format.arrays import (
    LARGEST_CHUNK_BYTES,
    MAX_SHARDS,
    MAX_WIDTH,
    MIN_CHUNK_ROWS,
    ArraySpec,
    hook_arrays,
    sequence_arrays,
    token_arrays,
)
from actcache.format.codecs import codec
from actcache.format.dtypes import TORCH_DTYPE
from actcache.format.identity import check_identity
from actcache.format.paths import CACHE_MANIFEST, STORE, shard_key, statistics_key
from actcache.format.records import (
    HookSpec,
    SequencesRecord,
    ShardRecord,
    hook_spec,
    sequences_record,
    shard_record,
    whole_number,
)
from actcache.format.seal import MALFORMED


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a harvest set out to do.

    identity: of the cache. tokens: how many were asked for, None for all. sequences: split -> the packed sequences.
    hooks: the hooks that were finished before the cache grew and have to grow with it; empty in manifest/cache.json.
    """

    identity: dict[str, Any]
    tokens: int | None
    sequences: dict[str, SequencesRecord]
    hooks: tuple[HookSpec, ...] = ()

    def n_rows(self, split: str) -> int:
        """Rows that the split will have: one for each token of its sequences. Raises ConfigError: no such split."""
        return self.sequences[known_split(split)].n_sequences * self.identity["context_size"]

    def n_shards(self, split: str) -> int:
        """Shards that the split will have; the last one may have fewer rows."""
        return -(-self.n_rows(split) // self.identity["shard_rows"])

    def rows_of(self, split: str, index: int) -> int:
        """Rows that a shard will have."""
        shard_rows = self.identity["shard_rows"]
        return min(shard_rows, self.n_rows(split) - index * shard_rows)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; `from_json` is the inverse."""
        return {
            "identity": self.identity,
            "tokens": self.tokens,
            "sequences": {split: asdict(s) for split, s in self.sequences.items()},
            "hooks": [asdict(hook) for hook in self.hooks],
        }

    @staticmethod
    def from_json(values: dict[str, Any]) -> Plan:
        """Read back and check what `to_json` gave. Raises ManifestError if it is malformed or incomplete."""
        try:
            check_identity(values["identity"])
            sequences = {split: sequences_record(values["sequences"][split]) for split in SPLITS}
            hooks = tuple(hook_spec(hook) for hook in values["hooks"])
            tokens = None if values["tokens"] is None else whole_number("tokens", values["tokens"])
        except MALFORMED as error:
            raise ManifestError(f"plan: malformed ({type(error).__name__}: {error})") from error
        plan = Plan(identity=values["identity"], tokens=tokens, sequences=sequences, hooks=hooks)
        for array in sequence_arrays(plan.identity["context_size"]):
            for split, record in sequences.items():
                shards = record.arrays.get(array.path, ())
                whole = len(shards) == -(-record.n_sequences // array.chunk_rows)
                if not whole or any(len(shard.checksums) != 1 for shard in shards):
                    raise ManifestError(f"plan: {split} lacks {array.path} or some of its shards, of one chunk each")
        if (n_shards := sum(map(plan.n_shards, SPLITS))) > MAX_SHARDS:
            raise ManifestError(f"plan: must make at most {MAX_SHARDS:,} shards, it makes {n_shards:,}")
        check_hooks(plan, hooks)
        return plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A finished cache: its plan, its hooks, and the shards of each split in order."""

    plan: Plan
    hooks: tuple[HookSpec, ...]
    shards: dict[str, tuple[ShardRecord, ...]]

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that must be equal for two caches to be the same cache."""
        return self.plan.identity

    @property
    def shard_rows(self) -> int:
        """S: rows of a shard; the last shard of a split may have fewer."""
        return self.identity["shard_rows"]

    @property
    def chunk_rows(self) -> int:
        """C: rows of an inner chunk, the same for every hook."""
        return self.identity["chunk_rows"]

    def n_rows(self, split: str) -> int:
        """Rows of a split, the same for every hook. Raises ConfigError: no such split."""
        return self.plan.n_rows(split)

    def hook(self, hook_name: str) -> HookSpec:
        """The spec of a hook. Raises CacheMismatch if the cache lacks it; the message lists the hooks there are."""
        for hook in self.hooks:
            if hook.hook_name == hook_name:
                return hook
        raise CacheMismatch(
            f"cache: holds {[hook.hook_name for hook in self.hooks]}, got hook_name={hook_name!r}; "
            "pass one of them or harvest that hook"
        )

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; `from_json` is the inverse."""
        return {
            "plan": self.plan.to_json(),
            "hooks": [asdict(hook) for hook in self.hooks],
            "shards": {split: [shard.to_json() for shard in shards] for split, shards in self.shards.items()},
        }

    @staticmethod
    def from_json(values: dict[str, Any]) -> Manifest:
        """Read back and check what `to_json` gave. Raises ManifestError if it is malformed or incomplete."""
        try:
            manifest = Manifest(
                plan=Plan.from_json(values["plan"]),
                hooks=tuple(hook_spec(hook) for hook in values["hooks"]),
                shards={split: tuple(shard_record(line) for line in values["shards"][split]) for split in SPLITS},
            )
            if not manifest.hooks:
                raise ManifestError("manifest: must hold at least one hook")
            check_hooks(manifest.plan, manifest.hooks)
            for split in SPLITS:
                _check_shards(manifest, split)
        except MALFORMED as error:
            raise ManifestError(f"manifest: malformed ({type(error).__name__}: {error})") from error
        if not any(manifest.shards.values()):
            raise ManifestError("manifest: holds no rows")
        return manifest


def known_split(split: object) -> str:
    """`split`, if it is "train" or "validation". Raises ConfigError."""
    return one_of("cache", "split", split, SPLITS)


def aligned_arrays(manifest: Manifest) -> list[ArraySpec]:
    """Every array of a split that has one entry for each row: those of the hooks, and those of the tokens."""
    profile = codec(manifest.identity["codec"])
    hooks = [array for hook in manifest.hooks for array in hook_arrays(hook, profile, manifest.chunk_rows)]
    return [*hooks, *token_arrays(manifest.shard_rows)]


def store_arrays(manifest: Manifest) -> dict[str, tuple[ArraySpec, int, int]]:
    """For every array: path below the store -> (array, rows of the array, rows of one of its shards)."""
    arrays = {
        f"{split}/{array.path}": (array, manifest.n_rows(split), manifest.shard_rows)
        for split in SPLITS
        for array in aligned_arrays(manifest)
    }
    for split, record in manifest.plan.sequences.items():
        for array in sequence_arrays(manifest.identity["context_size"]):
            arrays[f"{split}/{array.path}"] = (array, record.n_sequences, array.chunk_rows)
    return arrays


def stored_files(manifest: Manifest) -> dict[str, int]:
    """For every shard file of the cache: path below acts.zarr -> its size in bytes."""
    files = {
        f"{split}/{shard_key(array, shard.index)}": shard.arrays[array.path].n_bytes
        for split in SPLITS
        for shard in manifest.shards[split]
        for array in aligned_arrays(manifest)
    }
    for split, record in manifest.plan.sequences.items():
        for array in sequence_arrays(manifest.identity["context_size"]):
            for index, stored in enumerate(record.arrays[array.path]):
                files[f"{split}/{shard_key(array, index)}"] = stored.n_bytes
    return files


def replaced_by_growth(manifest: Manifest) -> list[str]:
    """The files, as paths below the cache, that are written anew when the cache grows.

    These are the last shards, unless they are whole, and all that depends on the number of rows.
    """
    keys = [CACHE_MANIFEST, *(f"{STORE}/{path}/zarr.json" for path in store_arrays(manifest))]
    for split in SPLITS:
        for hook in manifest.hooks:
            keys.append(statistics_key(split, hook.hook_name))
        for shard in manifest.shards[split][-1:]:
            if shard.n_rows < manifest.shard_rows:
                keys += [f"{STORE}/{split}/{shard_key(array, shard.index)}" for array in aligned_arrays(manifest)]
                keys += shard.partials
        n_sequences = manifest.plan.sequences[split].n_sequences
        for array in sequence_arrays(manifest.identity["context_size"]):
            if n_sequences % array.chunk_rows:
                keys.append(f"{STORE}/{split}/{shard_key(array, n_sequences // array.chunk_rows)}")
    return keys


def rows_fingerprint(manifest: Manifest, split: str, hook_name: str, n_shards: int | None = None) -> str:
    """16 hex digits that name the rows of one hook in a split: what they hold, their order, and whose they are.

    They depend on the identity of the cache, and on the checksums of the hook's arrays and of the tokens beside them.
    Another hook that is added changes nothing, nor does growth change the first whole shards.

    Args:
        manifest: of the cache.
        split: "train" or "validation".
        hook_name: a hook of the cache.
        n_shards: how many shards to name, from the first; None for all.

    Raises:
        ConfigError: there is no such split.
        CacheMismatch: the cache lacks the hook.
    """
    hook, split = manifest.hook(hook_name), known_split(split)
    arrays = hook_arrays(hook, codec(manifest.identity["codec"]), manifest.chunk_rows)
    paths = [array.path for array in (*arrays, *token_arrays(manifest.shard_rows))]
    digest = hashlib.sha256(json.dumps([manifest.identity, asdict(hook), split], sort_keys=True).encode())
    for shard in manifest.shards[split][:n_shards]:
        digest.update(json.dumps([shard.n_rows, [asdict(shard.arrays[path]) for path in paths]]).encode())
    return digest.hexdigest()[:16]


def check_hooks(plan: Plan, hooks: Sequence[HookSpec]) -> None:
    """Raise ManifestError unless each hook stands once, and is one that a cache of this plan can hold."""
    if len({hook.hook_name for hook in hooks}) != len(hooks):
        raise ManifestError("manifest: must hold each hook once")
    dtype, chunk_rows = plan.identity["dtype"], plan.identity["chunk_rows"]
    for hook in hooks:
        row_bytes = hook.d_in * TORCH_DTYPE[dtype].itemsize
        if hook.dtype != dtype or hook.d_in > MAX_WIDTH:
            raise ManifestError(f"manifest: {hook.hook_name} has an impossible dtype or width: {shown(hook)}")
        if chunk_rows > MIN_CHUNK_ROWS and row_bytes * chunk_rows > LARGEST_CHUNK_BYTES:
            raise ManifestError(
                f"manifest: a chunk must be of at most {MIN_CHUNK_ROWS} rows or {LARGEST_CHUNK_BYTES} bytes, those of "
                f"{hook.hook_name} are of {chunk_rows} rows of {row_bytes} bytes"
            )


def _check_shards(manifest: Manifest, split: str) -> None:
    shard_rows, shards = manifest.shard_rows, manifest.shards[split]
    wanted = {a.path: a for a in aligned_arrays(manifest)}
    for index, shard in enumerate(shards):
        last = index == len(shards) - 1
        whole = 1 <= shard.n_rows <= shard_rows if last else shard.n_rows == shard_rows
        if (shard.index, shard.first_token, shard.split) != (index, index * shard_rows, split) or not whole:
            raise ManifestError(f"manifest: shard {index} of {split} is missing or has a wrong size")
        for path, array in wanted.items():
            stored = shard.arrays.get(path)
            if stored is None or len(stored.checksums) != -(-shard.n_rows // array.chunk_rows):
                raise ManifestError(f"manifest: shard {index} of {split} lacks {path} or some of its chunks")
    n_rows = sum(shard.n_rows for shard in shards)
    if n_rows != manifest.n_rows(split):
        raise ManifestError(
            f"manifest: {split} has {n_rows} rows in its shards, {manifest.n_rows(split)} in its sequences"
        )
