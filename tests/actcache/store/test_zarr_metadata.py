import json

import numpy as np
import pytest
from support.stored_arrays import N_ROWS, SHARD_ROWS, reader
from support.surroundings import address_space

from actcache.format.codecs import codec
from actcache.machine.limits import THREAD_BYTES
from actcache.store.zarr_metadata import make_store, write_metadata


def test_zarr_is_not_called_where_its_thread_has_no_room():
    """It would wait for the thread for ever."""
    with address_space(THREAD_BYTES // 2), pytest.raises(MemoryError, match="a thread may take"):
        make_store({}, {}, codec("lossless"))


def test_metadata_never_touches_shards(written):
    store, array, codec_name, x, records = written
    write_metadata(store, {"again": 1}, {f"train/{array.path}": (array, N_ROWS, SHARD_ROWS)}, codec(codec_name))
    assert np.array_equal(reader(store, array, codec_name, records).read(0, N_ROWS), x)
    assert json.loads((store / "zarr.json").read_text())["attributes"] == {"again": 1}
