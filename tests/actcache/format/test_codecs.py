import os
import resource

import google_crc32c
import numpy as np
import pytest
import torch
from numcodecs import Blosc
from support.heavy_tails import activations
from support.surroundings import mapped_bytes

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


@pytest.mark.parametrize("name", ["lossless", "fast"])
def test_without_memory_it_is_an_error_and_no_segfault(name):
    """In forks, with ever more address space: blosc's shuffle of bits ends a process that gets no memory."""
    profile, stored = codec(name), np.random.default_rng(0).integers(0, 1000, 1 << 20, dtype=np.uint16)
    payload, out = memoryview(bytes(profile.encode(stored)[0])), np.empty_like(stored)
    for use in (lambda: profile.decoded(payload, out), lambda: profile.encode(stored)):
        found = []
        for kib in (0, 256, 512, 1024, 2048, 4096, 65536):
            pid = os.fork()
            if pid == 0:
                resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes() + (kib << 10), resource.RLIM_INFINITY))
                try:
                    use()
                except (OSError, MemoryError):
                    os._exit(1)
                except BaseException:
                    os._exit(2)
                os._exit(0)
            found.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        assert {*found} <= {0, 1}, found
        assert found[-1] == 0
