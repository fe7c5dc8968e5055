"""Safetensors files, read by Python's own calls.

The library's reader says of every file that it cannot open that it is missing. Here a malformed file is a ValueError, a
missing one is NoFile, and one that cannot be read is any other OSError.
"""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from actcache.arguments import shown
from actcache.files import opened
from actcache.format.seal import MALFORMED
from actcache.machine.limits import require_memory_for_array
from trainer.checksums import MappedFile

LENGTH_BYTES = 8  # of the header's length, at the start of the file
MOST_HEADER_BYTES = 100_000_000
MOST_DIMENSIONS = 64  # as numpy has them
MOST_ELEMENTS = 1 << 63
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
NUMPY_DTYPES = {"I64": "<i8", "I32": "<i4", "F32": "<f4"}  # of what is mapped


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a tensor lies: its dtype, its shape, and its bytes [start, stop) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """An open safetensors file, whose tensors are read one by one. `opened_tensors` makes it.

    metadata: what the file says beside its tensors.
    """

    def __init__(self, file: BinaryIO):
        """Read the header. Raises ValueError if it does not describe the whole file."""
        self._file = file
        size = os.fstat(file.fileno()).st_size
        header = file.read(_header_bytes(file.read(LENGTH_BYTES), size))
        self._places, self.metadata = _layout(header, size)

    @property
    def names(self) -> list[str]:
        """The names of the tensors, in the order of their bytes."""
        return [*self._places]

    def read(self, name: str) -> Tensor:
        """A tensor.

        Raises KeyError if there is none of this name, ValueError if the file became shorter, MemoryError if there is no
        room for it.
        """
        place = self._places[name]
        require_memory_for_array(place.stop - place.start, f"{name} of {self._file.name}")
        data = torch.empty(place.stop - place.start, dtype=torch.uint8)
        self._file.seek(place.start)
        if self._file.readinto(data.numpy()) != len(data):  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError(f"ends within {name}")
        return data.view(DTYPES[place.dtype]).reshape(place.shape)


@contextmanager
def opened_tensors(path: Path) -> Iterator[TensorFile]:
    """A safetensors file, open for reading. Raises ValueError, NoFile and OSError as this module says."""
    with opened(path) as file:
        yield TensorFile(file)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file. Raises ValueError, NoFile and OSError as this module says."""
    with opened_tensors(path) as file:
        return {name: file.read(name) for name in file.names}


def mapped_arrays(file: MappedFile) -> dict[str, np.ndarray]:
    """The arrays of a mapped safetensors file, which are parts of `file.bytes`. Only the header is checked.

    Raises:
        ValueError: the file is malformed, or holds another dtype than NUMPY_DTYPES.
        ManifestError: the header does not match its checksum.
    """
    length = file.bytes[:LENGTH_BYTES]
    file.check(length)
    stop = LENGTH_BYTES + _header_bytes(length.tobytes(), len(file.bytes))
    file.check(file.bytes[:stop])
    places, _ = _layout(file.bytes[LENGTH_BYTES:stop].tobytes(), len(file.bytes))
    strange = [place.dtype for place in places.values() if place.dtype not in NUMPY_DTYPES]
    if strange:
        raise ValueError(f"dtype {strange[0]}")
    return {
        name: file.bytes[place.start : place.stop].view(NUMPY_DTYPES[place.dtype]).reshape(place.shape)
        for name, place in places.items()
    }


def _header_bytes(length: bytes, size: int) -> int:
    n_bytes = int.from_bytes(length, "little")
    if len(length) < LENGTH_BYTES or n_bytes > min(size - LENGTH_BYTES, MOST_HEADER_BYTES):
        raise ValueError(f"{size} bytes cannot hold its header")
    return n_bytes


def _layout(header: bytes, size: int) -> tuple[dict[str, _Place], dict[str, Any]]:
    """(the place of each tensor, metadata), by a header. Raises ValueError unless the tensors fill the file."""
    try:
        values = json.loads(header)
        metadata, first = dict(values.pop("__metadata__", {})), LENGTH_BYTES + len(header)
        places = [(str(name), _place(about, first)) for name, about in values.items()]
    except MALFORMED as error:
        raise ValueError(f"its header is malformed ({type(error).__name__}: {error})") from error
    places.sort(key=lambda each: (each[1].start, each[1].stop))
    ends = [first, *(place.stop for _, place in places)]
    if [place.start for _, place in places] != ends[:-1] or ends[-1] != size:
        raise ValueError(f"its header must describe {size} bytes, describes {ends[-1]}")
    return dict(places), metadata


def _place(about: dict[str, Any], first: int) -> _Place:
    start, stop = about["data_offsets"]
    shape = about["shape"]
    if len(shape) > MOST_DIMENSIONS or not all(type(size) is int and 0 <= size < MOST_ELEMENTS for size in shape):
        raise ValueError(f"shape {shown(shape)}")
    place = _Place(dtype=about["dtype"], shape=tuple(about["shape"]), start=first + start, stop=first + stop)
    if stop - start != math.prod(place.shape) * DTYPES[place.dtype].itemsize:
        raise ValueError(f"{stop - start} bytes for {place.dtype} {list(place.shape)}")
    return place
