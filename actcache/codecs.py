"""Codec profile -> Zarr v3 codec pipeline, and the same pipeline applied to one chunk without zarr.

| profile  | inner codecs                                                        | error |
|----------|---------------------------------------------------------------------|-------|
| lossless | bytes, blosc(zstd level 1, byte shuffle, blocksize 1 MiB), crc32c   | none  |
| raw      | bytes                                                               | none  |

The blocksize is explicit because blosc's own choice costs a seventh of the ratio and two thirds of the decode speed
on bfloat16. `raw` keeps no checksum beside its chunks, so that the shard's prefix is the plain row-major array.
"""

from __future__ import annotations

from dataclasses import dataclass

import google_crc32c
import numpy as np
import torch
from numcodecs import blosc  # pyright: ignore[reportAttributeAccessIssue]: a C extension without stubs
from zarr.codecs import BloscCodec, Crc32cCodec

from actcache.errors import ConfigError, CorruptShard

blosc.use_threads = False  # the threaded encoder's output differs from run to run, and equal caches must be equal bytes

BLOCK_BYTES = 1 << 20
CHECKSUM_BYTES = 4

STORAGE_DTYPE = {"bfloat16": "uint16", "float16": "float16", "float32": "float32", "int32": "int32"}
TORCH_DTYPE = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "int32": torch.int32}
ACTIVATION_DTYPES = ("bfloat16", "float16", "float32")


def crc32c(payload: bytes | memoryview | np.ndarray) -> int:
    """CRC-32C (RFC 3720, Castagnoli) of the bytes."""
    if isinstance(payload, bytes):
        return google_crc32c.value(payload)
    return google_crc32c.value(np.frombuffer(payload, dtype=np.uint8))  # the C function wants a contiguous buffer


@dataclass(frozen=True, slots=True)
class Codec:
    """One lossless profile: what happens to the bytes of an inner chunk."""

    name: str
    compressed: bool

    def zarr_compressors(self, itemsize: int) -> list[BloscCodec | Crc32cCodec]:
        """The inner codecs after `bytes`, as zarr-python objects, for elements of `itemsize` bytes."""
        if not self.compressed:
            return []
        compressor = BloscCodec(typesize=itemsize, cname="zstd", clevel=1, shuffle="shuffle", blocksize=BLOCK_BYTES)
        return [compressor, Crc32cCodec()]

    def encode(self, chunk: np.ndarray) -> tuple[bytes | memoryview, int]:
        """(stored bytes, checksum) of one C-contiguous chunk; the checksum leaves the crc32c codec's out."""
        if not self.compressed:
            payload = chunk.data.cast("B")
            return payload, crc32c(payload)
        payload = blosc.compress(chunk, b"zstd", 1, blosc.SHUFFLE, BLOCK_BYTES, chunk.itemsize)
        checksum = crc32c(payload)
        return payload + checksum.to_bytes(CHECKSUM_BYTES, "little"), checksum

    def checksum(self, stored: memoryview) -> int:
        """Checksum of a stored chunk, to hold against the manifest's."""
        return crc32c(stored[:-CHECKSUM_BYTES] if self.compressed else stored)

    def decode_into(self, stored: memoryview, out: np.ndarray) -> None:
        """Decode one stored chunk into `out`, C-contiguous and exactly as large as the chunk. Raises CorruptShard."""
        if not self.compressed:
            flat = out.reshape(-1).view(np.uint8)
            if len(stored) != flat.nbytes:
                raise CorruptShard(f"raw chunk must hold {flat.nbytes} bytes, got {len(stored)}")
            flat[:] = np.frombuffer(stored, dtype=np.uint8)
            return
        declared = int.from_bytes(stored[4:8], "little")  # blosc header: uncompressed size at byte 4
        if declared != out.nbytes:
            raise CorruptShard(f"blosc chunk must decode to {out.nbytes} bytes, its header says {declared}")
        try:
            blosc.decompress(stored[:-CHECKSUM_BYTES], out)
        except (RuntimeError, ValueError) as error:
            raise CorruptShard(f"blosc cannot decode a chunk: {error}") from error


CODECS = {"lossless": Codec("lossless", compressed=True), "raw": Codec("raw", compressed=False)}


def codec(name: str) -> Codec:
    """The profile of that name. Raises ConfigError."""
    if name not in CODECS:
        raise ConfigError(f"codec: must be one of {', '.join(CODECS)}; got {name!r}")
    return CODECS[name]


def storage_view(x: torch.Tensor) -> np.ndarray:
    """The stored form of a CPU tensor, sharing its memory: bfloat16 as uint16, every other dtype as itself."""
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def tensor_view(stored: np.ndarray, dtype: str) -> torch.Tensor:
    """The logical form of stored elements, sharing their memory; the inverse of `storage_view`."""
    x = torch.from_numpy(stored)
    return x.view(torch.bfloat16) if dtype == "bfloat16" else x


def float32_values(stored: np.ndarray, dtype: str) -> np.ndarray:
    """The stored numbers as float32 (exact for all three activation dtypes), without touching torch's threads."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)
