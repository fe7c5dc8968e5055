"""The arrays of a cache, and how large their shards and chunks are."""

from __future__ import annotations

from dataclasses import dataclass

from actcache.format.codecs import Codec
from actcache.format.dtypes import STORAGE_DTYPE
from actcache.format.int8 import BLOCK_CHANNELS
from actcache.format.records import HookSpec

MAX_SHARD_ROWS = 1 << 18
MAX_SHARD_BYTES = 1 << 30
MAX_CHUNK_BYTES = 9 << 18  # 2.25 MiB: a chunk of 2304 channels is then whole blocks of 256 KiB, good for zstd
LARGEST_CHUNK_BYTES = MAX_CHUNK_BYTES  # what a reader accepts, whatever a writer is told
MIN_CHUNK_ROWS = 32
MAX_WIDTH = 1 << 18  # of a hook: the widest of today's models has 65,536 channels
MAX_CONTEXT_SIZE = 1 << 22  # a sequence is never cut, so a chunk of the sequences has at least one
MIN_SHARDS = 16
MAX_SHARDS = 1 << 19  # of both splits: the lines of more make a manifest that is too long to be read
WINDOW_BYTES = 8 << 30  # two windows of every hook fit in this much memory
TOKEN_CHUNK_ROWS = 4096
TOKEN_ARRAYS = ("tokens/id", "tokens/sequence", "tokens/position")
SEQUENCE_ARRAYS = ("sequences/id", "sequences/document")
SEQUENCE_SHARD_TOKENS = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySpec:
    """One sharded array of a split.

    path: below the split. dtype: the logical one. width: elements of a row, None for one number a row. chunk_rows: rows
    of an inner chunk.
    """

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
        """The Zarr (and numpy) data type of the stored elements; bfloat16 is stored as uint16."""
        return STORAGE_DTYPE[self.dtype]


def shard_rows(d_in: int, itemsize: int, *, n_hooks: int, n_rows: int, batch_tokens: int) -> int:
    """S, the rows of a shard. It is chosen when a cache is created and never changes afterwards.

    S starts as the largest power of two of at most 2^18 rows and 1 GiB. It is halved while two windows of every hook
    take more than 8 GiB, or while the larger split would have fewer than 16 shards. It stays at least the tokens of a
    forward pass (rounded down to a power of two) and at least 32, because forward passes restart at each shard.

    Args:
        d_in: width of the widest hook.
        itemsize: bytes of a stored element.
        n_hooks: hooks that are harvested together.
        n_rows: rows of the larger split.
        batch_tokens: tokens of a forward pass.

    Returns:
        rows, a power of two.
    """
    rows = min(MAX_SHARD_ROWS, _floor_power_of_two(MAX_SHARD_BYTES // (d_in * itemsize)))
    smallest = max(MIN_CHUNK_ROWS, _floor_power_of_two(batch_tokens))
    while rows > smallest and (
        2 * n_hooks * rows * d_in * itemsize > WINDOW_BYTES or rows * (MIN_SHARDS - 1) >= n_rows
    ):
        rows //= 2
    return rows


def chunk_rows(d_in: int, itemsize: int, shard_rows: int) -> int:
    """C, the rows of an inner chunk. It is chosen when a cache is created and never changes afterwards.

    C is the largest power of two whose rows fit into 2.25 MiB, at least 32 and at most the rows of a shard. Every hook
    has the same C, so that the order of the rows does not depend on which hooks are read.

    Args:
        d_in: width of the widest hook.
        itemsize: bytes of a stored element.
        shard_rows: rows of a shard.

    Returns:
        rows, a power of two that divides `shard_rows`.
    """
    return min(max(MIN_CHUNK_ROWS, _floor_power_of_two(MAX_CHUNK_BYTES // (d_in * itemsize))), shard_rows)


def hook_arrays(hook: HookSpec, codec: Codec, chunk_rows: int) -> list[ArraySpec]:
    """The sharded arrays that hold a hook.

    Args:
        hook: name, width and logical dtype.
        codec: decides whether there is one array, `acts`, or two, `q8` and `scale`.
        chunk_rows: rows of an inner chunk.

    Returns:
        the arrays, in the order in which `stored_tensors` gives their elements.
    """
    if not codec.quantised:
        return [ArraySpec(path=f"{hook.hook_name}/acts", dtype=hook.dtype, width=hook.d_in, chunk_rows=chunk_rows)]
    blocks = -(-hook.d_in // BLOCK_CHANNELS)
    return [
        ArraySpec(path=f"{hook.hook_name}/q8", dtype="int8", width=hook.d_in, chunk_rows=chunk_rows),
        ArraySpec(path=f"{hook.hook_name}/scale", dtype="bfloat16", width=blocks, chunk_rows=chunk_rows),
    ]


def token_arrays(shard_rows: int) -> list[ArraySpec]:
    """The sharded int32 arrays that give each row's token id, sequence and position."""
    rows = min(TOKEN_CHUNK_ROWS, shard_rows)
    return [ArraySpec(path=path, dtype="int32", width=None, chunk_rows=rows) for path in TOKEN_ARRAYS]


def sequence_arrays(context_size: int) -> list[ArraySpec]:
    """The arrays of the packed sequences. A row is a sequence; each shard is one chunk of about 1 MiB."""
    rows = max(1, SEQUENCE_SHARD_TOKENS // context_size)
    return [ArraySpec(path=path, dtype="int32", width=context_size, chunk_rows=rows) for path in SEQUENCE_ARRAYS]


def _floor_power_of_two(n: int) -> int:
    return 1 << max(n.bit_length() - 1, 0)
