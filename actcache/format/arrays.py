"""The arrays of a cache, and how large their shards and chunks are."""

from __future__ import annotations

from dataclasses import dataclass

from actcache.format.codecs import Codec
from actcache.format.dtypes import STORAGE_DTYPE
from actcache.format.int8 import BLOCK_CHANNELS
from actcache.format.records import HookSpec

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


def sequence_arrays(context_size: int) -> list[ArraySpec]:
    """The arrays of the packed sequences; a row is a sequence, and each of their shards is one chunk of about 1 MiB."""
    rows = max(1, SEQUENCE_SHARD_TOKENS // context_size)
    return [ArraySpec(path=path, dtype="int32", width=context_size, chunk_rows=rows) for path in SEQUENCE_ARRAYS]


def _floor_power_of_two(n: int) -> int:
    return 1 << max(n.bit_length() - 1, 0)
