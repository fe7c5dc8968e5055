import json

import numpy as np
from support.stored_arrays import N_ROWS, SHARD_ROWS, reader

from actcache.format.codecs import codec
from actcache.store.zarr_metadata import write_metadata


def test_metadata_never_touches_shards(written):
    store, array, codec_name, x, records = written
    write_metadata(store, {"again": 1}, {f"train/{array.path}": (array, N_ROWS, SHARD_ROWS)}, codec(codec_name))
    assert np.array_equal(reader(store, array, codec_name, records).read(0, N_ROWS), x)
    assert json.loads((store / "zarr.json").read_text())["attributes"] == {"again": 1}
