"""Fixtures of the store's tests. actcache is imported in the fixtures: its shapes are checked only from then on."""

import pytest

CODECS, DTYPES = ("lossless", "fast", "raw", "int8"), ("bfloat16", "float16", "float32", "int32")


@pytest.fixture(params=[(name, dtype) for name in CODECS for dtype in DTYPES], ids=str)
def written(request, tmp_path):
    """Folder, array, codec, values and the records of the three shards that hold them."""
    from support.stored_arrays import ARRAYS, values, write

    codec_name, dtype = request.param
    array = ARRAYS[dtype]
    x = values(array)
    return tmp_path, array, codec_name, x, write(tmp_path, array, codec_name, x)
