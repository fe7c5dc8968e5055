import google_crc32c
import numpy as np
import pytest
import torch
from numcodecs import Blosc

from actcache.errors import ConfigError, CorruptShard
from actcache.format.codecs import CODECS, codec, crc32c, float32_values, stored_tensors, values
from actcache.format.dtypes import storage_view, tensor_view
from actcache.format.int8 import BLOCK_CHANNELS, dequantise, quantise

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def activations(dtype: torch.dtype) -> torch.Tensor:
    """Heavy-tailed rows with a massive channel, zeros, subnormals and the largest finite number."""
    x = torch.randn(256, 48, generator=torch.Generator().manual_seed(0)) ** 3
    x[:, 7] *= 900
    x[3] = 0
    x[4, 0] = torch.finfo(dtype).max
    x[4, 1] = torch.finfo(dtype).tiny / 2
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CODECS)
def test_round_trip_is_exact(name, dtype):
    stored = storage_view(activations(dtype))
    payload, checksum = codec(name).encode(stored)
    out = np.empty_like(stored)
    codec(name).decode_into(memoryview(payload), out)
    assert out.tobytes() == stored.tobytes()
    assert codec(name).checksum(memoryview(payload)) == checksum


@pytest.mark.parametrize("name", ["lossless", "fast"])
def test_a_compressed_chunk_is_blosc_with_its_checksum_behind(name):
    stored = storage_view(activations(torch.bfloat16))
    payload, checksum = codec(name).encode(stored)
    assert payload[-4:] == google_crc32c.value(payload[:-4]).to_bytes(4, "little") == checksum.to_bytes(4, "little")
    assert Blosc().decode(payload[:-4]) == stored.tobytes()
    assert len(payload) < stored.nbytes


@pytest.mark.parametrize("name", CODECS)
def test_encoding_is_deterministic(name):
    stored = storage_view(activations(torch.bfloat16))
    assert len({bytes(codec(name).encode(stored)[0]) for _ in range(20)}) == 1


@pytest.mark.parametrize("name", ["lossless", "fast", "raw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_profiles_without_error_keep_every_bit(name, dtype):
    x, logical = activations(dtype), str(dtype).removeprefix("torch.")
    stored = stored_tensors(x, logical, codec(name))
    assert [part.dtype for part in stored] == [dtype]
    assert torch.equal(values(stored, logical), x)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float32_values_are_the_logical_numbers(dtype):
    x = activations(dtype)
    name = str(dtype).removeprefix("torch.")
    assert torch.equal(tensor_view(storage_view(x), name), x)
    assert np.array_equal(float32_values([storage_view(x)], name), x.float().numpy())


def test_a_payload_of_another_size_is_refused():
    stored = storage_view(activations(torch.bfloat16))
    for name in CODECS:
        payload, _ = codec(name).encode(stored)
        with pytest.raises(CorruptShard, match=str(stored.nbytes // 2)):
            codec(name).decode_into(memoryview(payload), np.empty(stored.nbytes // 2, dtype=np.uint8))


def test_crc32c_is_the_standard_one():
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    assert crc32c(memoryview(b"123456789")) == 0xE3069283


def test_unknown_profile_is_refused():
    with pytest.raises(ConfigError, match="got 'zip'"):
        codec("zip")
