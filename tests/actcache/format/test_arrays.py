import pytest

from actcache.format.arrays import chunk_rows, hook_arrays, sequence_arrays, shard_rows, token_arrays
from actcache.format.codecs import codec
from actcache.format.records import HookSpec

GIB = 1 << 30


@pytest.mark.parametrize(
    ("d_in", "c", "s"),
    [(64, 16384, 262144), (384, 2048, 262144), (768, 1024, 262144), (2304, 512, 131072), (4096, 256, 131072)],
)
def test_sizes_of_large_bfloat16_caches(d_in, c, s):
    rows = shard_rows(d_in, 2, n_hooks=1, n_rows=10**9, batch_tokens=4096)
    assert (rows, chunk_rows(d_in, 2, rows)) == (s, c)


def test_small_caches_have_at_least_sixteen_shards():
    for n_rows in (3000, 50_000, 10**6):
        rows = shard_rows(128, 2, n_hooks=1, n_rows=n_rows, batch_tokens=128)
        assert -(-n_rows // rows) >= 16
        assert -(-n_rows // (2 * rows)) < 16 or rows == 2**18, "no smaller than it must be"


def test_shards_hold_a_forward_pass_and_windows_fit():
    assert shard_rows(128, 2, n_hooks=1, n_rows=1000, batch_tokens=2048) == 2048
    assert 2 * 40 * 4096 * 2 * shard_rows(4096, 2, n_hooks=40, n_rows=10**9, batch_tokens=4096) <= 8 * GIB


def test_a_quantised_hook_is_two_arrays_of_equal_rows():
    """32 channels share a scale, so 70 channels have three."""
    hook = HookSpec(hook_name="blocks.0.hook_mlp_out", d_in=70, dtype="float16")
    (acts,) = hook_arrays(hook, codec("lossless"), 64)
    assert (acts.path, acts.dtype, acts.row_shape) == ("blocks.0.hook_mlp_out/acts", "float16", (70,))
    q8, scale = hook_arrays(hook, codec("int8"), 64)
    assert (q8.path, q8.dtype, q8.row_shape) == ("blocks.0.hook_mlp_out/q8", "int8", (70,))
    assert (scale.path, scale.storage_dtype, scale.row_shape) == ("blocks.0.hook_mlp_out/scale", "uint16", (3,))
    assert {acts.chunk_rows, q8.chunk_rows, scale.chunk_rows} == {64}


def test_token_and_sequence_arrays():
    assert [array.path for array in token_arrays(128)] == ["tokens/id", "tokens/sequence", "tokens/position"]
    assert {(array.row_shape, array.chunk_rows) for array in token_arrays(128)} == {((), 128)}
    assert {array.chunk_rows for array in token_arrays(1 << 18)} == {4096}
    for context_size, rows in ((128, 2048), (1 << 18, 1), (1 << 20, 1)):
        ids, documents = sequence_arrays(context_size)
        assert (ids.path, documents.path) == ("sequences/id", "sequences/document")
        assert (ids.row_shape, ids.chunk_rows) == (documents.row_shape, documents.chunk_rows) == ((context_size,), rows)
