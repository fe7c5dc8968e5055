"""What a cache is: its identity, hooks, rows, shards and checksums, and how they are written down and believed.

Three sealed files under CACHE/manifest say it. `plan.json` holds the identity and the packed sequences, before the
first forward pass; `writer-00.jsonl` grows by one line per finished shard; `cache.json` is written once everything is
there, the sorted union of both. Readers trust `cache.json` alone. Nothing in them is executed, and no name in them can
lead out of the cache's folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actcache.errors import CacheMismatch, ManifestError
from actcache.flow import SPLITS
from actcache.format.codecs import (
    ACTIVATION_DTYPES,
    BLOCK_CHANNELS,
    CODECS,
    STORAGE_DTYPE,
    TORCH_DTYPE,
    Codec,
    codec,
    crc32c,
)

FORMAT_VERSION = 1
MAX_SHARD_ROWS = 1 << 18
MAX_SHARD_BYTES = 1 << 30
MAX_CHUNK_BYTES = 9 << 18  # 2.25 MiB: a chunk of 2304 channels is then whole blocks of 256 KiB, which zstd likes
MIN_CHUNK_ROWS = 32
MIN_SHARDS = 16
WINDOW_BYTES = 8 << 30  # two windows of every hook fit in this much memory
TOKEN_CHUNK_ROWS = 4096
TOKEN_ARRAYS = ("tokens/id", "tokens/sequence", "tokens/position")
SEQUENCE_ARRAYS = ("sequences/id", "sequences/document")
SEQUENCE_SHARD_TOKENS = 1 << 18
HOOK_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, RecursionError)  # what malformed JSON values raise
SEAL = re.compile(rb'(\{.*),"crc32c":"([0-9a-f]{8})"\}\n', re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class HookSpec:
    """One hook of a cache: its width and its logical dtype."""

    hook_name: str
    d_in: int
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySpec:
    """One sharded array of a split: path below the split, logical dtype, row width, rows of an inner chunk."""

    path: str
    dtype: str
    width: int | None
    chunk_rows: int

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row: (width,) for activations, () for token arrays."""
        return () if self.width is None else (self.width,)

    @property
    def storage_dtype(self) -> str:
        """The Zarr (and numpy) data type of the stored elements: bfloat16 lies in uint16."""
        return STORAGE_DTYPE[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayRecord:
    """What is stored of one array in one shard: file size in bytes and each chunk's CRC-32C."""

    n_bytes: int
    checksums: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """One finished shard: flat tokens [first_token, first_token + n_rows) of a split, per array what is stored.

    hooks: those whose arrays are stored. compute: what decides the last bits of a value beside the identity.
    partials: file name below manifest/partials -> CRC-32C, the statistics of the shard. attempt: how often the shard
    was written anew because it had grown or was damaged; of several lines the one of the last attempt is true.
    """

    split: str
    index: int
    first_token: int
    n_rows: int
    hooks: tuple[HookSpec, ...]
    arrays: dict[str, ArrayRecord]
    partials: dict[str, int]
    compute: dict[str, Any]
    attempt: int = 0

    def merge(self, other: ShardRecord) -> ShardRecord:
        """This record with the arrays of another line about the same shard; the later line wins."""
        return ShardRecord(
            split=self.split,
            index=self.index,
            first_token=other.first_token,
            n_rows=other.n_rows,
            hooks=tuple({hook.hook_name: hook for hook in (*self.hooks, *other.hooks)}.values()),
            arrays={**self.arrays, **other.arrays},
            partials={**self.partials, **other.partials},
            compute=other.compute,
            attempt=other.attempt,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SequencesRecord:
    """The packed sequences of one split: how many, and array path -> what is stored of each of its shards."""

    n_sequences: int
    arrays: dict[str, tuple[ArrayRecord, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a harvest set out to do: the identity of the cache, the tokens asked (None: all), the packed sequences.

    hooks: those that were finished before the cache grew, and have to grow with it; none in manifest/cache.json.
    """

    identity: dict[str, Any]
    tokens: int | None
    sequences: dict[str, SequencesRecord]
    hooks: tuple[HookSpec, ...] = ()

    def n_rows(self, split: str) -> int:
        """Rows that the split will have."""
        return self.sequences[split].n_sequences * self.identity["context_size"]

    def n_shards(self, split: str) -> int:
        """Shards that the split will have; the last may be partial."""
        return -(-self.n_rows(split) // self.identity["shard_rows"])

    def rows_of(self, split: str, index: int) -> int:
        """Rows that a shard will have."""
        rows = self.identity["shard_rows"]
        return min(rows, self.n_rows(split) - index * rows)

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
        """Read back and check what `to_json` gave. Raises ManifestError."""
        try:
            check_identity(values["identity"])
            sequences = {split: _sequences_record(values["sequences"][split]) for split in SPLITS}
            hooks = tuple(_hook_spec(hook) for hook in values["hooks"])
            tokens = None if values["tokens"] is None else _whole_number("tokens", values["tokens"])
        except MALFORMED as error:
            raise ManifestError(f"plan: malformed ({type(error).__name__}: {error})") from error
        plan = Plan(identity=values["identity"], tokens=tokens, sequences=sequences, hooks=hooks)
        for array in sequence_arrays(plan.identity["context_size"]):
            for split, record in sequences.items():
                shards = record.arrays.get(array.path, ())
                whole = len(shards) == -(-record.n_sequences // array.chunk_rows)
                if not whole or any(len(shard.checksums) != 1 for shard in shards):
                    raise ManifestError(f"plan: {split} lacks {array.path} or some of its shards, of one chunk each")
        return plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A whole, finished cache: the plan, its hooks, and the shards of each split in order."""

    plan: Plan
    hooks: tuple[HookSpec, ...]
    shards: dict[str, tuple[ShardRecord, ...]]

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that two caches must share to be the same cache."""
        return self.plan.identity

    @property
    def shard_rows(self) -> int:
        """S: rows of every shard but the last of a split."""
        return self.identity["shard_rows"]

    @property
    def chunk_rows(self) -> int:
        """C: rows of an inner chunk, the same for every hook."""
        return self.identity["chunk_rows"]

    def n_rows(self, split: str) -> int:
        """Rows of a split, the same for every hook."""
        return self.plan.n_rows(split)

    def hook(self, hook_name: str) -> HookSpec:
        """The spec of a hook. Raises CacheMismatch, listing the hooks there are."""
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
            "shards": {split: [asdict(shard) for shard in shards] for split, shards in self.shards.items()},
        }

    @staticmethod
    def from_json(values: dict[str, Any]) -> Manifest:
        """Read back and check what `to_json` gave. Raises ManifestError."""
        try:
            manifest = Manifest(
                plan=Plan.from_json(values["plan"]),
                hooks=tuple(_hook_spec(hook) for hook in values["hooks"]),
                shards={split: tuple(shard_record(line) for line in values["shards"][split]) for split in SPLITS},
            )
            _check_hooks(manifest)
            for split in SPLITS:
                _check_shards(manifest, split)
        except MALFORMED as error:
            raise ManifestError(f"manifest: malformed ({type(error).__name__}: {error})") from error
        if not any(manifest.shards.values()):
            raise ManifestError("manifest: holds no rows")
        return manifest


def seal(values: Mapping[str, Any]) -> bytes:
    """Canonical JSON (sorted keys, no spaces) with its own CRC-32C as the last key, and a newline."""
    body = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)[:-1].encode()
    return body + f',"crc32c":"{crc32c(body):08x}"}}\n'.encode()


def unseal(sealed: bytes, source: Path) -> dict[str, Any]:
    """The values of a sealed line or file. Raises ManifestError naming `source` if a byte differs."""
    match = SEAL.fullmatch(sealed)
    if match is None or crc32c(match[1]) != int(match[2], 16):
        raise ManifestError(f"{source}: its checksum does not match its bytes; restore the file or harvest again")
    try:
        return json.loads(match[1] + b"}")
    except (ValueError, RecursionError) as error:  # no JSON, or nested too deeply, under a seal that is right
        raise ManifestError(f"{source}: cannot be read as JSON ({type(error).__name__}); harvest again") from error


def shard_record(values: dict[str, Any]) -> ShardRecord:
    """One line of a writer's manifest, checked. Raises ManifestError or one of MALFORMED for malformed values."""
    if values["split"] not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {values['split']!r}")
    arrays = {path: _array_record(array) for path, array in values["arrays"].items()}
    for name in (*arrays, *values["partials"]):
        _check_path(name)
    return ShardRecord(
        split=values["split"],
        index=_whole_number("index", values["index"]),
        first_token=_whole_number("first_token", values["first_token"]),
        n_rows=_whole_number("n_rows", values["n_rows"]),
        hooks=tuple(_hook_spec(hook) for hook in values["hooks"]),
        arrays=arrays,
        partials={name: _checksum(checksum) for name, checksum in values["partials"].items()},
        compute=dict(values["compute"]),
        attempt=_whole_number("attempt", values["attempt"]),
    )


def _whole_number(name: str, value: object, lowest: int = 0, highest: int = (1 << 63) - 1) -> int:
    """`value` if it is a whole number in range; neither True nor 1.0 nor "1" is one."""
    if type(value) is not int or not lowest <= value <= highest:
        got = reprlib.repr(value)  # cut short: it may be long or nested
        raise ManifestError(f"manifest: {name} must be a whole number in [{lowest}, {highest}], got {got}")
    return value


def _checksum(value: object) -> int:
    return _whole_number("checksum", value, highest=(1 << 32) - 1)


def _hook_spec(values: dict[str, Any]) -> HookSpec:
    hook = HookSpec(**values)
    if not HOOK_NAME.fullmatch(hook.hook_name):
        raise ManifestError(f"manifest: hook_name must be dotted words, got {hook.hook_name!r}")
    _whole_number("d_in", hook.d_in, lowest=1)
    return hook


def _array_record(values: dict[str, Any]) -> ArrayRecord:
    checksums = tuple(_checksum(checksum) for checksum in values["checksums"])
    return ArrayRecord(n_bytes=_whole_number("n_bytes", values["n_bytes"]), checksums=checksums)


def _sequences_record(values: dict[str, Any]) -> SequencesRecord:
    n_sequences = _whole_number("n_sequences", values["n_sequences"])
    arrays = {path: tuple(_array_record(shard) for shard in shards) for path, shards in values["arrays"].items()}
    return SequencesRecord(n_sequences=n_sequences, arrays=arrays)


def merge_records(records: Iterable[ShardRecord]) -> dict[tuple[str, int], ShardRecord]:
    """(split, index) -> one record with the arrays of all its lines; a line of a grown shard replaces those before."""
    merged: dict[tuple[str, int], ShardRecord] = {}
    for record in sorted(records, key=lambda record: record.attempt):
        key = (record.split, record.index)
        held = merged.get(key)
        merged[key] = held.merge(record) if held and held.n_rows == record.n_rows else record
    return merged


def check_identity(identity: dict[str, Any]) -> None:
    """Raises ManifestError, or one of MALFORMED, unless this program can read a cache of this identity."""
    version = identity.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ManifestError(f"cache: this program reads format version {FORMAT_VERSION}, got {version!r}")
    if identity.get("codec") not in CODECS:
        raise ManifestError(f"cache: codec must be one of {', '.join(CODECS)}, got {identity.get('codec')!r}")
    if identity.get("dtype") not in ACTIVATION_DTYPES:
        raise ManifestError(f"cache: dtype must be one of {ACTIVATION_DTYPES}, got {identity.get('dtype')!r}")
    shard_rows = _whole_number("shard_rows", identity.get("shard_rows"), 1, MAX_SHARD_ROWS)
    chunk_rows = _whole_number("chunk_rows", identity.get("chunk_rows"), 1, shard_rows)
    if shard_rows.bit_count() != 1 or shard_rows % chunk_rows:
        raise ManifestError(f"cache: {shard_rows=} must be a power of two, and {chunk_rows=} must divide it")
    _whole_number("context_size", identity.get("context_size"), 1, MAX_SHARD_BYTES // TORCH_DTYPE["int32"].itemsize)
    for token_id in identity["special_token_ids"]:
        _whole_number("special_token_ids", token_id, highest=(1 << 31) - 1)


def shard_rows(d_in: int, itemsize: int, *, n_hooks: int, n_rows: int, batch_tokens: int) -> int:
    """S: rows of a shard, from the widest hook when a cache is created; frozen afterwards.

    The largest power of two with at most 2^18 rows and 1 GiB, halved while the windows of all hooks take more than
    8 GiB or `n_rows`, the rows of the larger split, would make fewer than 16 shards; but not below `batch_tokens`, the
    tokens of a forward pass (or 32 rows), since forward passes restart at each shard.
    """
    rows = min(MAX_SHARD_ROWS, _floor_power_of_two(MAX_SHARD_BYTES // (d_in * itemsize)))
    smallest = max(MIN_CHUNK_ROWS, _floor_power_of_two(batch_tokens))
    while rows > smallest and (
        2 * n_hooks * rows * d_in * itemsize > WINDOW_BYTES or rows * (MIN_SHARDS - 1) >= n_rows
    ):
        rows //= 2
    return rows


def chunk_rows(d_in: int, itemsize: int, shard_rows: int) -> int:
    """C: rows of an inner chunk, from the widest hook when a cache is created; frozen afterwards.

    The largest power of two within 2.25 MiB, at least 32 and at most the shard. One number for every hook, so that the
    order of the rows does not depend on which hooks are read.
    """
    return min(max(MIN_CHUNK_ROWS, _floor_power_of_two(MAX_CHUNK_BYTES // (d_in * itemsize))), shard_rows)


def hook_arrays(hook: HookSpec, codec: Codec, chunk_rows: int) -> list[ArraySpec]:
    """The sharded arrays that hold a hook: `acts`, or `q8` and `scale` if the codec quantises."""
    if not codec.quantised:
        return [ArraySpec(path=f"{hook.hook_name}/acts", dtype=hook.dtype, width=hook.d_in, chunk_rows=chunk_rows)]
    blocks = -(-hook.d_in // BLOCK_CHANNELS)
    return [
        ArraySpec(path=f"{hook.hook_name}/q8", dtype="int8", width=hook.d_in, chunk_rows=chunk_rows),
        ArraySpec(path=f"{hook.hook_name}/scale", dtype="bfloat16", width=blocks, chunk_rows=chunk_rows),
    ]


def token_arrays(shard_rows: int) -> list[ArraySpec]:
    """The sharded int32 arrays that say which token each row is."""
    rows = min(TOKEN_CHUNK_ROWS, shard_rows)
    return [ArraySpec(path=path, dtype="int32", width=None, chunk_rows=rows) for path in TOKEN_ARRAYS]


def aligned_arrays(manifest: Manifest) -> list[ArraySpec]:
    """Every row-aligned array of a split: the hooks' and the tokens'."""
    profile = codec(manifest.identity["codec"])
    hooks = [array for hook in manifest.hooks for array in hook_arrays(hook, profile, manifest.chunk_rows)]
    return [*hooks, *token_arrays(manifest.shard_rows)]


def sequence_arrays(context_size: int) -> list[ArraySpec]:
    """The arrays of the packed sequences; a row is a sequence, and each of their shards is one chunk of about 1 MiB."""
    rows = max(1, SEQUENCE_SHARD_TOKENS // context_size)
    return [ArraySpec(path=path, dtype="int32", width=context_size, chunk_rows=rows) for path in SEQUENCE_ARRAYS]


def shard_key(array: ArraySpec, index: int) -> str:
    """Path of a shard's file below its split, by Zarr's default chunk key encoding."""
    return f"{array.path}/c/{index}" + ("" if array.width is None else "/0")


def fingerprint(sealed_manifest: bytes) -> str:
    """What a run remembers of the cache it was trained on: sha256 of manifest/cache.json, 16 hex digits."""
    return hashlib.sha256(sealed_manifest).hexdigest()[:16]


def _check_hooks(manifest: Manifest) -> None:
    if not 0 < len({hook.hook_name for hook in manifest.hooks}) == len(manifest.hooks):
        raise ManifestError("manifest: must hold at least one hook, and each once")
    for hook in manifest.hooks:
        row_bytes = hook.d_in * TORCH_DTYPE[manifest.identity["dtype"]].itemsize
        if hook.dtype != manifest.identity["dtype"] or not 1 <= row_bytes * manifest.chunk_rows <= MAX_SHARD_BYTES:
            raise ManifestError(f"manifest: {hook.hook_name} has an impossible dtype or width: {hook}")


def _check_shards(manifest: Manifest, split: str) -> None:
    rows, shards = manifest.shard_rows, manifest.shards[split]
    wanted = {a.path: a for a in aligned_arrays(manifest)}
    for index, shard in enumerate(shards):
        last = index == len(shards) - 1
        whole = 1 <= shard.n_rows <= rows if last else shard.n_rows == rows
        if (shard.index, shard.first_token, shard.split) != (index, index * rows, split) or not whole:
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


def _check_path(path: str) -> None:
    parts = path.split("/")
    if not all(re.fullmatch(r"[A-Za-z0-9_.\-]+", part) and part.strip(".") for part in parts):
        raise ValueError(f"a path must stay below the cache's folder, got {path!r}")


def _floor_power_of_two(n: int) -> int:
    return 1 << max(n.bit_length() - 1, 0)
