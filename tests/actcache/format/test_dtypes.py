import numpy as np
import pytest
import torch
from support.heavy_tails import activations

from actcache.format.codecs import float32_values
from actcache.format.dtypes import STORAGE_DTYPE, TORCH_DTYPE, storage_view, tensor_view, widened

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float32_values_are_the_logical_numbers(dtype):
    x = activations(dtype)
    name = str(dtype).removeprefix("torch.")
    assert torch.equal(tensor_view(storage_view(x), name), x)
    assert np.array_equal(float32_values([storage_view(x)], name), x.float().numpy())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_share_memory_and_keep_every_bit(dtype):
    x = activations(dtype)
    stored = storage_view(x)
    name = str(dtype).removeprefix("torch.")
    assert stored.dtype.name == STORAGE_DTYPE[name]
    assert TORCH_DTYPE[name] == dtype
    assert stored.ctypes.data == x.data_ptr() == tensor_view(stored, name).data_ptr()


def test_every_bfloat16_is_widened_to_its_float32():
    """All 65,536, those that are no numbers too."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    expected = torch.from_numpy(bits).view(torch.bfloat16).float().numpy()
    assert np.array_equal(widened(bits), expected, equal_nan=True)
