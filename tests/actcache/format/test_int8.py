import numpy as np
import pytest
import torch
from support.heavy_tails import activations

from actcache.format.codecs import codec, float32_values, stored_tensors, values
from actcache.format.dtypes import storage_view
from actcache.format.int8 import BLOCK_CHANNELS, dequantise, quantise, rounded_up

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("d_in", [1, 31, 32, 33, 48, 96])
def test_int8_is_within_half_a_step_of_its_block(d_in):
    x = activations(torch.float32)[:, :48].repeat(1, 2)[:, :d_in]
    x[4] = 0  # the largest float32, which has a test of its own
    q8, scale = quantise(x)
    assert (q8.dtype, scale.dtype) == (torch.int8, torch.bfloat16)
    assert (q8.shape, scale.shape) == (x.shape, (len(x), -(-d_in // BLOCK_CHANNELS)))
    step = scale.double().repeat_interleave(BLOCK_CHANNELS, dim=1)[:, :d_in]
    error = (q8.double() * step - x.double()).abs()
    assert (error <= step / 2 * (1 + 127 * 2.0**-23)).all()  # the division before the rounding is float32
    for start in range(0, d_in, BLOCK_CHANNELS):
        peak = x[:, start : start + BLOCK_CHANNELS].double().abs().amax(dim=1)
        assert (step[:, start] >= peak / 127 * (1 - 2.0**-23)).all()
        assert (step[:, start] <= torch.clamp(peak / 127, min=2.0**-126) * (1 + 2.0**-7)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_values_are_the_product_rounded_once(dtype):
    logical = str(dtype).removeprefix("torch.")
    q8, scale = stored = stored_tensors(activations(dtype), logical, codec("int8"))
    product = q8.double() * scale.double().repeat_interleave(BLOCK_CHANNELS, dim=1)[:, : q8.shape[1]]
    largest = torch.finfo(dtype).max
    expected = product.clamp(-largest, largest).to(dtype)
    assert torch.equal(values(stored, logical), expected)
    assert torch.equal(dequantise(q8, scale, dtype), expected)
    assert np.array_equal(float32_values([storage_view(part) for part in stored], logical), expected.float().numpy())
    assert values(stored, logical).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_int8_does_not_hide_what_is_not_finite(bad):
    x = torch.ones(2, 64)
    x[1, 40] = bad
    finite = values(stored_tensors(x, "float32", codec("int8")), "float32").isfinite()
    assert finite.all(dim=1).tolist() == [True, False]


NANS = [0x7FFFFFFF, 0x7FFF0001, 0x7FFF0000, 0x7F800001, 0x7FC00000, 0xFFFFFFFF, 0xFF800001]  # the first is CUDA's
INFINITIES = [0x7F800000, 0xFF800000]


@pytest.mark.parametrize("bits", [*NANS, *INFINITIES], ids=hex)
def test_a_scale_that_is_not_finite_makes_its_whole_block_nan(bits):
    step = torch.from_numpy(np.array([[bits, 0x3F800000]], dtype=np.uint32).view(np.float32))
    scale = rounded_up(step)
    assert scale.isnan().tolist() == [[True, False]]
    any_integers = torch.tensor([[0, 1, -128, 127]], dtype=torch.int8)  # a device may make any integer of NaN
    q8 = any_integers.repeat(1, 2 * BLOCK_CHANNELS // 4)
    for dtype in DTYPES:
        assert dequantise(q8, scale, dtype).isnan()[0].tolist() == [True] * BLOCK_CHANNELS + [False] * BLOCK_CHANNELS


def test_scales_are_rounded_up_to_bfloat16():
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 0x7F7F0000, 4096, dtype=np.uint32).view(np.float32))
    up = rounded_up(x)
    below = (up.view(torch.int16) - 1).view(torch.bfloat16)
    assert (up.float() >= x).all()
    assert (below.float() < x)[x > 0].all()
