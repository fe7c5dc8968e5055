import pytest

from actcache.errors import ManifestError
from actcache.format.identity import FORMAT_VERSION, check_identity


def test_the_identity_of_a_real_cache_is_readable(tiny_cache):
    check_identity(tiny_cache.identity)
    assert FORMAT_VERSION == 1, "another version is another format: old caches must still be read"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format_version": 2}, "reads format version 1, got 2"),
        ({"format_version": True}, "reads format version 1, got True"),
        ({"format_version": "1"}, "reads format version 1, got '1'"),
        ({"format_version": None}, "reads format version 1, got None"),
        ({"codec": "auto"}, "codec must be one of lossless, fast, raw, int8, got 'auto'"),
        ({"dtype": "int8"}, "dtype must be one of .*got 'int8'"),
        ({"shard_rows": 0}, "shard_rows"),
        ({"shard_rows": 1 << 40}, "shard_rows"),
        ({"chunk_rows": 1.0}, "chunk_rows"),
        ({"shard_rows": 96, "chunk_rows": 32}, "must be a power of two"),
        ({"context_size": 0}, "context_size"),
        ({"special_token_ids": [1 << 31]}, "special_token_ids"),
    ],
    ids=str,
)
def test_what_this_program_cannot_read_is_named(tiny_cache, changed, message):
    with pytest.raises(ManifestError, match=message):
        check_identity({**tiny_cache.identity, **changed})
