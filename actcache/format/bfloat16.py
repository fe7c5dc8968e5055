"""bfloat16 as a data type of zarr-python, which has none of its own.

Importing this module registers the data type. Then zarr-python opens arrays whose zarr.json says
`"data_type": "bfloat16"`, with numpy dtype ml_dtypes.bfloat16. zarr-python 3.4.1 and later import this module when they
first look up a data type, through the entry point `bfloat16` of the group `zarr.data_type` (pyproject.toml); so it must
stay quick to import. Earlier versions of zarr-python collect that entry point and never load it.

The name and the fill values are those of zarr-extensions (data-types/bfloat16). tensorstore and zarrs write the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import ml_dtypes
import numpy as np
from zarr.core.dtype.npy.float import BaseFloat
from zarr.dtype import data_type_registry

NAN_BITS = 0x7FC0  # the only NaN that is written "NaN"
HEX_STRING = re.compile("0x[0-9a-fA-F]{4}")


@dataclass(frozen=True, kw_only=True)
class BFloat16(BaseFloat):
    """The upper half of a float32: 1 sign, 8 exponent and 7 mantissa bits; either byte order; Zarr format 3 only.

    zarr-python does not write chunks that equal the fill value, and -0.0 equals 0.0. Where the sign of zeros matters,
    write through zarr-python with `array.write_empty_chunks` on.
    """

    dtype_cls = type(np.dtype(ml_dtypes.bfloat16))
    _zarr_v3_name = "bfloat16"
    _zarr_v2_names: ClassVar[tuple[str, ...]] = ()

    @property
    def item_size(self) -> int:
        """Bytes of an element."""
        return 2

    def to_json(self, zarr_format: Literal[2, 3]) -> Any:
        """The name of the data type. Raises ValueError for Zarr format 2, which has none for it."""
        if zarr_format == 2:
            raise ValueError("bfloat16: Zarr format 2 has no such data type, got zarr_format=2; use zarr_format=3")
        return self._zarr_v3_name

    def from_json_scalar(self, data: Any, *, zarr_format: Literal[2, 3]) -> np.generic:
        """A fill value from a number, "NaN", "Infinity", "-Infinity" or the bits ("0x7fc1"). Raises ValueError."""
        if isinstance(data, str) and data.startswith("0x"):
            if not HEX_STRING.fullmatch(data):
                raise ValueError(f"bfloat16: a hex string needs 4 digits, got {data!r}")
            return np.uint16(int(data, 16)).view(ml_dtypes.bfloat16)
        return super().from_json_scalar(data, zarr_format=zarr_format)

    def to_json_scalar(self, data: object, *, zarr_format: Literal[2, 3]) -> float | str:
        """A fill value as a number, "Infinity", "-Infinity", "NaN" for 0x7fc0, or the bits of any other NaN."""
        value = self.cast_scalar(data)
        bits = int(value.view(np.uint16))
        if np.isnan(value) and bits != NAN_BITS:
            return f"0x{bits:04x}"
        return super().to_json_scalar(value, zarr_format=zarr_format)


data_type_registry.register(BFloat16._zarr_v3_name, BFloat16)
