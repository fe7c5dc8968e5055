import google_crc32c
import numpy as np
import pytest
import torch
from numcodecs import Blosc

from actcache.codecs import CODECS, codec, crc32c, float32_values, storage_view, tensor_view
from actcache.errors import ConfigError, CorruptShard

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


def test_lossless_is_blosc_with_its_checksum_behind():
    stored = storage_view(activations(torch.bfloat16))
    payload, checksum = codec("lossless").encode(stored)
    assert payload[-4:] == google_crc32c.value(payload[:-4]).to_bytes(4, "little") == checksum.to_bytes(4, "little")
    assert Blosc().decode(payload[:-4]) == stored.tobytes()
    assert len(payload) < stored.nbytes


def test_encoding_is_deterministic():
    stored = storage_view(activations(torch.bfloat16))
    assert len({bytes(codec("lossless").encode(stored)[0]) for _ in range(20)}) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float32_values_are_the_logical_numbers(dtype):
    x = activations(dtype)
    name = str(dtype).removeprefix("torch.")
    assert torch.equal(tensor_view(storage_view(x), name), x)
    assert np.array_equal(float32_values(storage_view(x), name), x.float().numpy())


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
