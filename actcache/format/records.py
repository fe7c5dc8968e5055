"""The records that journals and manifests hold: of a hook, an array, a shard, and the packed sequences of a split."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from actcache.arguments import shown
from actcache.errors import ManifestError
from actcache.flow import SPLITS

HOOK_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
MAX_BATCH_SIZE, MAX_COMPUTE_TEXT = 1 << 20, 200


@dataclass(frozen=True, slots=True, kw_only=True)
class HookSpec:
    """One hook of a cache: its width and its logical dtype."""

    hook_name: str
    d_in: int
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayRecord:
    """One shard file of one array: its size in bytes and the CRC-32C of each chunk."""

    n_bytes: int
    checksums: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """One finished shard, which holds the tokens [first_token, first_token + n_rows) of a split in sequence order.

    hooks: the hooks whose arrays are stored. arrays: path below the split -> the shard file of that array. partials:
    path below the cache -> CRC-32C, for each file of the shard's partial statistics. compute: how the activations were
    computed, which decides the last bits of a value. revision: how often the shard was written anew because it had
    grown or was damaged. If several lines describe one shard, the line with the highest revision is valid.
    """

    split: str
    index: int
    first_token: int
    n_rows: int
    hooks: tuple[HookSpec, ...]
    arrays: dict[str, ArrayRecord]
    partials: dict[str, int]
    compute: dict[str, Any]
    revision: int = 0

    def merge(self, other: ShardRecord) -> ShardRecord:
        """This record with what a later record of the same shard adds or replaces."""
        return ShardRecord(
            split=self.split,
            index=self.index,
            first_token=other.first_token,
            n_rows=other.n_rows,
            hooks=tuple({hook.hook_name: hook for hook in (*self.hooks, *other.hooks)}.values()),
            arrays={**self.arrays, **other.arrays},
            partials={**self.partials, **other.partials},
            compute=other.compute,
            revision=other.revision,
        )

    def to_json(self) -> dict[str, Any]:
        """The record as journals and manifest/cache.json hold it. There the key of `revision` is "attempt"."""
        values = asdict(self)
        values["attempt"] = values.pop("revision")
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class SequencesRecord:
    """The packed sequences of one split: their number, and for each array path the records of its shard files."""

    n_sequences: int
    arrays: dict[str, tuple[ArrayRecord, ...]]


def shard_record(values: dict[str, Any]) -> ShardRecord:
    """The record in one line of a journal. Raises ManifestError or one of MALFORMED for malformed values."""
    if values["split"] not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {shown(values['split'])}")
    arrays = {path: _array_record(array) for path, array in values["arrays"].items()}
    for name in (*arrays, *values["partials"]):
        _check_path(name)
    return ShardRecord(
        split=values["split"],
        index=whole_number("index", values["index"]),
        first_token=whole_number("first_token", values["first_token"]),
        n_rows=whole_number("n_rows", values["n_rows"]),
        hooks=tuple(hook_spec(hook) for hook in values["hooks"]),
        arrays=arrays,
        partials={name: _checksum(checksum) for name, checksum in values["partials"].items()},
        compute=_compute(values["compute"]),
        revision=whole_number("attempt", values["attempt"]),
    )


def whole_number(name: str, value: object, lowest: int = 0, highest: int = (1 << 63) - 1) -> int:
    """`value`, if it is an int in [lowest, highest].

    Args:
        name: what the number is, for the message.
        value: any JSON value; True, 1.0 and "1" are no whole numbers.
        lowest, highest: the range, both included.

    Raises:
        ManifestError: `value` is another kind of value, or out of range.
    """
    if type(value) is not int or not lowest <= value <= highest:
        raise ManifestError(f"manifest: {name} must be a whole number in [{lowest}, {highest}], got {shown(value)}")
    return value


def hook_spec(values: dict[str, Any]) -> HookSpec:
    """The checked spec of a hook. Raises ManifestError or one of MALFORMED for malformed values."""
    hook = HookSpec(**values)
    if not HOOK_NAME.fullmatch(hook.hook_name):
        raise ManifestError(f"manifest: hook_name must be dotted words, got {shown(hook.hook_name)}")
    whole_number("d_in", hook.d_in, lowest=1)
    return hook


def sequences_record(values: dict[str, Any]) -> SequencesRecord:
    """The checked record of a split's sequences. Raises ManifestError or one of MALFORMED for malformed values."""
    n_sequences = whole_number("n_sequences", values["n_sequences"])
    arrays = {path: tuple(_array_record(shard) for shard in shards) for path, shards in values["arrays"].items()}
    return SequencesRecord(n_sequences=n_sequences, arrays=arrays)


def _compute(values: dict[str, Any]) -> dict[str, Any]:
    """How activations were computed: short texts and numbers, for a model is loaded by them and messages quote them."""
    whole_number("compute.batch_size", values["batch_size"], 1, MAX_BATCH_SIZE)
    for key, value in values.items():
        short = isinstance(value, bool | int | None) or (isinstance(value, str) and len(value) <= MAX_COMPUTE_TEXT)
        if not short or len(key) > MAX_COMPUTE_TEXT:
            raise ManifestError(f"manifest: compute must hold short texts and numbers, got {shown(value)}")
    return dict(values)


def merge_records(records: Iterable[ShardRecord]) -> dict[tuple[str, int], ShardRecord]:
    """(split, index) -> one record made of all those of a shard. A record of a grown shard replaces those before it."""
    merged: dict[tuple[str, int], ShardRecord] = {}
    for record in sorted(records, key=lambda record: record.revision):
        key = (record.split, record.index)
        held = merged.get(key)
        merged[key] = held.merge(record) if held and held.n_rows == record.n_rows else record
    return merged


def _checksum(value: object) -> int:
    return whole_number("checksum", value, highest=(1 << 32) - 1)


def _array_record(values: dict[str, Any]) -> ArrayRecord:
    checksums = tuple(_checksum(checksum) for checksum in values["checksums"])
    return ArrayRecord(n_bytes=whole_number("n_bytes", values["n_bytes"]), checksums=checksums)


def _check_path(path: str) -> None:
    parts = path.split("/")
    if not all(re.fullmatch(r"[A-Za-z0-9_.\-]+", part) and part.strip(".") for part in parts):
        raise ValueError(f"a path must stay below the cache's folder, got {shown(path)}")
