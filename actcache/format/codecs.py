"""Codec profile -> Zarr v3 codec pipeline, and the same pipeline applied to one chunk without zarr.

| profile  | inner codecs                                                      | error                              |
|----------|-------------------------------------------------------------------|------------------------------------|
| lossless | bytes, blosc(zstd level 1, byte shuffle, blocksize 1 MiB), crc32c | none                               |
| fast     | bytes, blosc(lz4 level 1, bit shuffle, blocksize 1 MiB), crc32c   | none                               |
| raw      | bytes                                                             | none                               |
| int8     | bytes, of int8 and one bfloat16 scale for every 32 channels       | at most scale / 2 and one rounding |

The error is relative to the stored dtype. The blocksize is explicit because blosc's own choice costs a seventh of the
compression ratio and two thirds of the decoding speed on bfloat16. `raw` and `int8` store no checksum beside their
chunks, so that a shard file begins with the plain row-major array.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import crc32c as castagnoli
import numpy as np
from jaxtyping import Float, Float32, Shaped
from numcodecs import blosc  # pyright: ignore[reportAttributeAccessIssue]: a C extension without stubs
from torch import Tensor
from zarr.codecs import BloscCodec, Crc32cCodec

from actcache.errors import ConfigError, CorruptShard
from actcache.format.dtypes import TORCH_DTYPE, widened
from actcache.format.int8 import dequantise, float32_dequantised, quantise

blosc.use_threads = False  # the threaded encoder's output differs from run to run, and equal caches must be equal bytes

BLOCK_BYTES = 1 << 20
CHECKSUM_BYTES = 4


def crc32c(payload: bytes | memoryview | np.ndarray, before: int = 0) -> int:
    """CRC-32C (RFC 3720, Castagnoli) of the bytes. Other threads can run while it is computed.

    before: that of the bytes that come before these, if there are any.
    """
    return castagnoli.crc32c(payload.data if isinstance(payload, np.ndarray) else payload, before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """One profile: how rows become elements, and how the elements of an inner chunk become bytes.

    compressor, shuffle: the names that blosc gives them; without a compressor the bytes are plain. quantised: rows
    first become int8 with one scale for each block.
    """

    name: str
    compressor: Literal["zstd", "lz4"] | None
    shuffle: Literal["shuffle", "bitshuffle"]
    quantised: bool = False

    def zarr_compressors(self, itemsize: int) -> list[BloscCodec | Crc32cCodec]:
        """The inner codecs after `bytes`, as zarr-python objects, for elements of `itemsize` bytes."""
        if self.compressor is None:
            return []
        compressor = BloscCodec(
            typesize=itemsize, cname=self.compressor, clevel=1, shuffle=self.shuffle, blocksize=BLOCK_BYTES
        )
        return [compressor, Crc32cCodec()]

    def encode(self, chunk: np.ndarray) -> tuple[bytes | memoryview, int]:
        """(stored bytes, CRC-32C) of one C-contiguous chunk. The CRC-32C excludes the 4 bytes of the crc32c codec."""
        if self.compressor is None:
            payload = chunk.data.cast("B")
            return payload, crc32c(payload)
        shuffle = {"shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}[self.shuffle]
        self._require_room(chunk.nbytes, "encode")
        payload = blosc.compress(chunk, self.compressor.encode(), 1, shuffle, BLOCK_BYTES, chunk.itemsize)
        checksum = crc32c(payload)
        return payload + checksum.to_bytes(CHECKSUM_BYTES, "little"), checksum

    def checksum(self, stored: memoryview) -> int:
        """CRC-32C of a stored chunk, as `encode` gives it and the manifest records it."""
        return crc32c(stored if self.compressor is None else stored[:-CHECKSUM_BYTES])

    def is_sound(self, stored: memoryview, checksum: int) -> bool:
        """Whether a stored chunk has the CRC-32C that `encode` gave.

        The 4 bytes of the crc32c codec must say so too: we go without them, but other Zarr readers trust them.
        """
        said = checksum.to_bytes(CHECKSUM_BYTES, "little")
        return self.checksum(stored) == checksum and (self.compressor is None or stored[-CHECKSUM_BYTES:] == said)

    def decode_into(self, stored: memoryview, out: np.ndarray) -> None:
        """Decode one stored chunk into `out`, which is C-contiguous and exactly as large as the chunk.

        Raises CorruptShard if the bytes cannot be decoded.
        """
        decoded = self.decoded(stored, out)
        if decoded is not out:
            np.copyto(out, decoded)

    def decoded(self, stored: memoryview, buffer: np.ndarray) -> np.ndarray:
        """The elements of one stored chunk.

        Args:
            stored: the chunk's bytes in its shard file.
            buffer: C-contiguous and exactly as large as the chunk; compressed bytes are decoded into it.

        Returns:
            `buffer`, or a view of `stored` if the bytes are plain.

        Raises:
            CorruptShard: the bytes are too few, too many, or cannot be decoded.
            OSError: there is no memory to decode them (ENOMEM).
        """
        if self.compressor is None:
            if len(stored) != buffer.nbytes:
                raise CorruptShard(f"raw chunk must hold {buffer.nbytes} bytes, got {len(stored)}")
            return np.frombuffer(stored, dtype=buffer.dtype).reshape(buffer.shape)
        # The header of blosc holds the decoded size at byte 4 and the encoded size at byte 12; blosc trusts both.
        decoded, encoded = (int.from_bytes(stored[at : at + 4], "little") for at in (4, 12))
        if (decoded, encoded) != (buffer.nbytes, len(stored) - CHECKSUM_BYTES):
            raise CorruptShard(
                f"blosc chunk must decode {len(stored) - CHECKSUM_BYTES} bytes to {buffer.nbytes}, its header says "
                f"{encoded} to {decoded}"
            )
        self._require_room(0, "decode")
        try:
            blosc.decompress(stored[:-CHECKSUM_BYTES], buffer)
        except (RuntimeError, ValueError):
            _decode_again(stored[:-CHECKSUM_BYTES], buffer)
        return buffer

    def _require_room(self, n_bytes: int, what: str) -> None:
        """Raise OSError (ENOMEM) if there is no memory for `n_bytes` and for blosc's own blocks.

        Where its shuffle of bits gets none, blosc ends the process by a segfault.
        """
        if self.shuffle == "bitshuffle":
            _try_memory(n_bytes + 4 * BLOCK_BYTES, what)


def _try_memory(n_bytes: int, what: str) -> None:
    """Raise OSError (ENOMEM) if there is no memory to `what` a chunk."""
    try:
        np.empty(n_bytes, dtype=np.uint8)
    except MemoryError:
        raise OSError(errno.ENOMEM, f"no {n_bytes} bytes of memory to {what} a chunk") from None


def _decode_again(payload: memoryview, buffer: np.ndarray) -> None:
    """Decode what blosc could not. It says the same of bytes that are wrong and of memory that it did not get.

    Raises OSError (ENOMEM) if there is no memory, CorruptShard if the bytes are wrong.
    """
    _try_memory(4 * (BLOCK_BYTES + buffer.nbytes), "decode")  # more than blosc asks for
    try:
        blosc.decompress(payload, buffer)
    except (RuntimeError, ValueError) as error:
        raise CorruptShard(f"blosc cannot decode a chunk: {error}") from error


CODECS = {
    profile.name: profile
    for profile in (
        Codec(name="lossless", compressor="zstd", shuffle="shuffle"),
        Codec(name="fast", compressor="lz4", shuffle="bitshuffle"),
        Codec(name="raw", compressor=None, shuffle="shuffle"),
        Codec(name="int8", compressor=None, shuffle="shuffle", quantised=True),
    )
}


def codec(name: str) -> Codec:
    """The profile of that name. Raises ConfigError for an unknown name."""
    if name not in CODECS:
        raise ConfigError(f"codec: must be one of {', '.join(CODECS)}; got {name!r}")
    return CODECS[name]


def stored_tensors(x: Float[Tensor, "row d_in"], dtype: str, codec: Codec) -> tuple[Tensor, ...]:
    """The elements that are stored of these rows.

    Args:
        x: activations, [row, d_in].
        dtype: the logical dtype of the hook; the rows are rounded to it first.
        codec: decides whether the rows are quantised.

    Returns:
        one tensor for each array of the hook: (values as `dtype`,), or (q8, scale) of a quantising codec.
    """
    values = x.to(TORCH_DTYPE[dtype])
    return quantise(values) if codec.quantised else (values,)


def values(stored: Sequence[Tensor], dtype: str) -> Float[Tensor, "row d_in"]:
    """The activations as `dtype`, [row, d_in], from the tensors of a hook's arrays."""
    if len(stored) == 1:
        return stored[0]
    q8, scale = stored
    return dequantise(q8, scale, TORCH_DTYPE[dtype])


def float32_values(stored: Sequence[Shaped[np.ndarray, "row _"]], dtype: str) -> Float32[np.ndarray, "row d_in"]:
    """The same numbers as `values`, in float32, from the stored elements. numpy computes them without threads."""
    x, *scale = stored
    if scale:
        return float32_dequantised(x, scale[0], dtype)
    return widened(x) if dtype == "bfloat16" else x.astype(np.float32, copy=False)
