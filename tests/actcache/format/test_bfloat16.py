"""bfloat16 of zarr-python against tensorstore, which has it natively, in both directions."""

import json
import subprocess
import sys
from importlib.metadata import entry_points

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr
from zarr.codecs import BloscCodec, BytesCodec

from actcache.format.bfloat16 import BFloat16

EVERY_BITS = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
FILL_VALUES = [  # in zarr.json, bits
    (0.0, 0x0000),
    (-0.0, 0x8000),
    (3, 0x4040),
    (1.5, 0x3FC0),
    ("NaN", 0x7FC0),
    ("Infinity", 0x7F80),
    ("-Infinity", 0xFF80),
    ("0x7fc1", 0x7FC1),
    ("0xffc0", 0xFFC0),
    ("0x3f80", 0x3F80),
]


def bits_of(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).view(np.uint16)  # in native byte order


def in_tensorstore(path, **metadata):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    if metadata:
        spec |= {"metadata": {"data_type": "bfloat16", **metadata}, "create": True}
    return tensorstore.open(spec).result()


@pytest.mark.parametrize("shards", [None, (64, 256)], ids=["plain", "sharded"])
@pytest.mark.parametrize("endian", ["little", "big"])
def test_tensorstore_reads_what_zarr_writes(endian, shards, tmp_path):
    array = zarr.create_array(
        tmp_path,
        shape=EVERY_BITS.shape,
        chunks=(16, 256),
        shards=shards,
        dtype=ml_dtypes.bfloat16,
        serializer=BytesCodec(endian=endian),
        compressors=BloscCodec(),
        config={"write_empty_chunks": True},
    )
    array[:] = EVERY_BITS.view(ml_dtypes.bfloat16)
    theirs = in_tensorstore(tmp_path)
    assert theirs.dtype.name == "bfloat16"
    assert np.array_equal(bits_of(theirs.read().result()), EVERY_BITS)
    assert np.array_equal(bits_of(np.asarray(zarr.open_array(tmp_path, mode="r")[:])), EVERY_BITS)


@pytest.mark.parametrize("endian", ["little", "big"])
def test_zarr_reads_what_tensorstore_writes(endian, tmp_path):
    codecs = [
        {"name": "bytes", "configuration": {"endian": endian}},
        {"name": "blosc", "configuration": {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "typesize": 2}},
    ]
    theirs = in_tensorstore(tmp_path, shape=[256, 256], fill_value=0.0, codecs=codecs)
    theirs.write(EVERY_BITS.view(ml_dtypes.bfloat16)).result()
    array = zarr.open_array(tmp_path, mode="r")
    assert array.dtype == ml_dtypes.bfloat16
    assert np.array_equal(bits_of(np.asarray(array[:])), EVERY_BITS)


@pytest.mark.parametrize(("said", "bits"), FILL_VALUES)
def test_fill_values_of_tensorstore(said, bits, tmp_path):
    theirs = in_tensorstore(tmp_path, shape=[2], fill_value=said)
    array = zarr.open_array(tmp_path, mode="r")
    assert bits_of(theirs.read().result()).tolist() == bits_of(np.asarray(array[:])).tolist() == [bits, bits]
    written = json.dumps(json.loads((tmp_path / "zarr.json").read_text())["fill_value"])
    assert json.dumps(array.metadata.to_dict()["fill_value"]) == written


@pytest.mark.parametrize(("said", "bits"), FILL_VALUES)
def test_fill_values_of_zarr(said, bits, tmp_path):
    fill_value = np.uint16(bits).view(ml_dtypes.bfloat16)
    zarr.create_array(tmp_path, shape=2, dtype="bfloat16", fill_value=fill_value)
    for read in (in_tensorstore(tmp_path).read().result(), np.asarray(zarr.open_array(tmp_path, mode="r")[:])):
        assert bits_of(read).tolist() == [bits, bits]


def test_what_is_no_fill_value_is_refused():
    for said in ("0x7fc", "0x7fc00000", "0xnope", "seven"):
        with pytest.raises((ValueError, TypeError), match=said):
            BFloat16().from_json_scalar(said, zarr_format=3)
    with pytest.raises(TypeError, match="Cannot convert"):
        BFloat16().cast_scalar([1.0])


def test_format_2_is_refused():
    with pytest.raises(ValueError, match="got zarr_format=2"):
        zarr.create_array({}, shape=2, dtype=ml_dtypes.bfloat16, zarr_format=2)


def test_the_entry_point_names_the_data_type():
    (found,) = entry_points(group="zarr.data_type", name="bfloat16")
    assert found.load() is BFloat16


def test_the_entry_point_does_not_import_torch():
    """zarr-python loads it in every process that opens an array."""
    script = (
        "import sys, actcache.format.bfloat16; print(sorted({'torch', 'datasets', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
