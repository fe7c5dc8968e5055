import google_crc32c
import numpy as np
import pytest
import torch
from numcodecs import Blosc
from support.heavy_tails import activations

from actcache.errors import ConfigError, CorruptShard
from actcache.format.codecs import CODECS, codec, crc32c, stored_tensors, values
from actcache.format.dtypes import storage_view

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


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
