import numpy as np
import pytest
import torch

from actcache.format.codecs import CODECS
from actcache.format.dtypes import storage_view
from benchmarks.bench_codecs import Benched, entropy, entropy_limits, squared_error


def test_entropy_of_known_shares():
    assert entropy(np.array([[7, 7], [7, 7]], dtype=np.uint16)) == 0
    assert entropy(np.array([[0, 1, 2, 3]], dtype=np.uint16)) == 2
    assert entropy(np.array([[5, 5, 9, 200]], dtype=np.uint16)) == 1.5


def test_every_bit_pattern_leaves_nothing_to_gain():
    every = np.arange(1 << 16, dtype=np.uint16)
    for dtype, stored in (("bfloat16", every), ("float16", every.view(np.float16))):
        assert entropy_limits(stored.reshape(-1, 64), dtype) == {"fields": 1, "planes": 1}


def test_an_exponent_is_one_field_and_lies_in_two_planes():
    """1 and 2 differ in every bit of the exponent, 0111_1111 and 1000_0000: one bit, which both bytes show."""
    x = torch.tensor([[1.0, 2.0]]).repeat(4, 8)
    assert entropy_limits(storage_view(x.bfloat16()), "bfloat16") == {"fields": 16, "planes": 8}
    assert entropy_limits(storage_view(x), "float32") == {"fields": 32, "planes": 16}


def test_a_sign_and_a_mantissa_bit_cost_a_bit_each():
    x = torch.tensor([[1.0, -1.0, 1.5, -1.5]]).repeat(4, 4)
    assert entropy_limits(storage_view(x.bfloat16()), "bfloat16") == {"fields": 8, "planes": 8}
    assert entropy_limits(storage_view(x.half()), "float16")["fields"] == 8


def test_squared_error_is_by_row():
    x, x_hat = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 3.0], [0.0, 0.0]])
    assert squared_error(x, x_hat).tolist() == [1 / 25, 1]


@pytest.mark.parametrize("name", CODECS)
def test_a_benched_profile_decodes_what_it_stored(name):
    x = torch.randn(64, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    benched = Benched(CODECS[name], x, "bfloat16", chunk_rows=16)
    assert torch.equal(benched.decode(), benched.decoded()[-16:])
    if name == "int8":
        assert benched.ratio == 40 * 2 / (40 + 2 * 2)  # two scales a row
        assert 0 < squared_error(x, benched.decoded()).max() < 1
    else:
        assert torch.equal(benched.decoded(), x)
        assert name != "raw" or benched.ratio == 1
