"""Safetensors files as we read them: the same tensors as by the library, damage named, and the system's errors kept."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.surroundings import address_space, descriptors

from actcache.files import NoFile
from trainer.checksums import MappedFile
from trainer.tensor_file import DTYPES, mapped_arrays, opened_tensors, read_tensors


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of a tensor of every dtype, of a scalar, and of an empty tensor."""
    tensors = {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "file", {"state": "so"})
    return tmp_path / "file"


def test_a_tensor_that_does_not_fit_is_refused_before_its_memory_is_taken(path: Path) -> None:
    """Where a control group is the limit, the kernel would end the process."""
    save_file({"W_dec": torch.zeros(25 << 20)}, path)
    with address_space(96 << 20), pytest.raises(MemoryError, match=rf"^W_dec of {path} may take 0\.17 GB$"):
        read_tensors(path)


def test_tensors_are_those_that_the_library_reads(path: Path) -> None:
    expected = load_file(path)
    found = read_tensors(path)
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with opened_tensors(path) as file:
        assert file.metadata == {"state": "so"}
        assert sorted(file.names) == sorted(expected)
        with pytest.raises(KeyError):
            file.read("another")


def test_arrays_are_mapped(tmp_path: Path) -> None:
    tensors = {"ids": torch.arange(5), "act": torch.rand(2, 3), "latent": torch.arange(4, dtype=torch.int32)}
    save_file(tensors, tmp_path / "file")
    arrays = mapped_arrays(MappedFile(tmp_path / "file", {}, ""))
    assert {name: array.tolist() for name, array in arrays.items()} == {n: x.tolist() for n, x in tensors.items()}
    with pytest.raises(ValueError, match="read-only"):
        arrays["ids"][0] = 1
    save_file({"half": torch.rand(3).half()}, tmp_path / "file")
    with pytest.raises(ValueError, match="dtype F16"):
        mapped_arrays(MappedFile(tmp_path / "file", {}, ""))


def file_of(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


PLACE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
MALFORMED = {
    "empty": b"",
    "seven bytes": bytes(7),
    "longer header than file": (1 << 40).to_bytes(8, "little") + b"{}",
    "no JSON": file_of(b"{", b""),
    "no object": file_of([1], b""),
    "no offsets": file_of({"x": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "unknown dtype": file_of({"x": {**PLACE, "dtype": "F31"}}, bytes(8)),
    "another shape": file_of({"x": {**PLACE, "shape": [3]}}, bytes(8)),
    "a negative shape": file_of({"x": {**PLACE, "shape": [-2, -1]}}, bytes(8)),
    **{
        f"the shape {name}": file_of({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}, b"")
        for name, shape in {
            **{"of more than memory": [0, 2**64], "of a truth": [True, 0], "of a float": [0.0], "of a text": "0"},
            **{"of a million sizes": [9] * 10**6, "of a hundred sizes": [0] * 100},
        }.items()
    },
    "a gap": file_of({"x": PLACE, "y": {**PLACE, "data_offsets": [12, 20]}}, bytes(20)),
    "an overlap": file_of({"x": PLACE, "y": {**PLACE, "data_offsets": [4, 12]}}, bytes(12)),
    "cut off": file_of({"x": PLACE}, bytes(7)),
    "too long": file_of({"x": PLACE}, bytes(9)),
    "of another type": file_of({"x": {**PLACE, "data_offsets": ["0", "8"]}}, bytes(8)),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_file_is_a_value_error(what: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(MALFORMED[what])
    with pytest.raises(ValueError, match=r"header|bytes for|cannot mmap"):
        read_tensors(tmp_path / "file")
    with pytest.raises(ValueError, match=r"header|bytes for|cannot mmap"):
        mapped_arrays(MappedFile(tmp_path / "file", {}, ""))


def test_every_changed_byte_of_the_header_is_a_value_error_or_says_what_it_said(tmp_path: Path) -> None:
    """Or names another tensor, which its reader misses."""
    save_file({"x": torch.arange(4.0), "y": torch.arange(3)}, tmp_path / "file")
    whole, expected = (tmp_path / "file").read_bytes(), read_tensors(tmp_path / "file")
    for at in range(8 + int.from_bytes(whole[:8], "little")):
        data = bytearray(whole)
        data[at] ^= 1 << np.random.default_rng(at).integers(8)
        (tmp_path / "file").write_bytes(data)
        try:
            found = read_tensors(tmp_path / "file")
        except ValueError:
            continue
        if {*found} == {*expected}:
            assert all(x.numpy().tobytes() == expected[name].numpy().tobytes() for name, x in found.items()), at


def test_what_is_missing_or_cannot_be_opened_is_two_things(path: Path) -> None:
    with descriptors(3), pytest.raises(OSError, match="ulimit -n") as raised:
        read_tensors(path)
    assert (raised.value.errno, raised.value.filename) == (errno.EMFILE, str(path))
    path.unlink()
    with pytest.raises(NoFile):
        read_tensors(path)


def test_a_file_that_becomes_shorter_while_it_is_read_is_a_value_error(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1 << 16)}, tmp_path / "file")
    with opened_tensors(tmp_path / "file") as file:
        os.truncate(tmp_path / "file", 1 << 17)
        with pytest.raises(ValueError, match="ends within x"):
            file.read("x")
