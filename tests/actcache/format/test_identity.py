import pytest

from actcache.errors import ManifestError
from actcache.format.identity import FORMAT_VERSION, check_identity
from actcache.format.manifest import Manifest
from actcache.format.seal import MALFORMED


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
        ({"special_token_ids": {}}, "special_token_ids must be a list, got {}"),
        ({"model": "x"}, "model must be a name, and what tells it from others, got 'x'"),
        ({"model": {"name": None}}, "model must be a name"),
        ({"dataset": {"name": "x", "split": float("inf")}}, "dataset must be a name, and texts or nulls"),
        ({"dataset": {"name": "x", "more": []}}, "dataset must be a name"),
        ({"tokenizer_sha256": 1}, "tokenizer_sha256 must be a text or null, got 1"),
        ({"separator": []}, "separator must be a text or null"),
        ({"prepend_bos": 1}, "prepend_bos must be true, false or null, got 1"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"seed": 0.0}, "seed must be a whole number"),
        ({"holdout": 1}, r"holdout must be a number in \[0, 1\), got 1"),
        ({"holdout": float("nan")}, "holdout must be a number"),
        ({"holdout": True}, "holdout must be a number"),
    ],
    ids=str,
)
def test_what_this_program_cannot_read_is_named(tiny_cache, changed, message):
    with pytest.raises(ManifestError, match=message):
        check_identity({**tiny_cache.identity, **changed})


def test_whatever_an_identity_lacks_is_malformed(tiny_cache):
    values = tiny_cache.manifest.to_json()
    for key in tiny_cache.identity:
        lacking = {name: value for name, value in tiny_cache.identity.items() if name != key}
        with pytest.raises(ManifestError):
            Manifest.from_json({**values, "plan": {**values["plan"], "identity": lacking}})


@pytest.mark.parametrize("got", [{"codec": "x" * 10**6}, {"dtype": ["x"] * 10**6}, {"format_version": "1" * 10**6}])
def test_what_is_quoted_is_short(tiny_cache, got):
    with pytest.raises(ManifestError) as raised:
        check_identity({**tiny_cache.identity, **got})
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    "changed",
    [
        *[{"content_sha256": 3}, {"config": []}, {"probe": 3}, {"probe": {"stream": 3}}],
        *[{"probe": {"stream": [3]}}, {"probe": {"stream": [["x"]]}}, {"probe": {"logits": [[float("nan")]]}}],
    ],
    ids=str,
)
def test_a_model_that_cannot_be_compared_is_malformed(tiny_cache, changed):
    with pytest.raises(MALFORMED):
        check_identity({**tiny_cache.identity, "model": {**tiny_cache.identity["model"], **changed}})
