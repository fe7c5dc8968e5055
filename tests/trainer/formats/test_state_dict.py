"""State dicts of strangers: what torch.save wrote is read, and no file asks for more memory than it has bytes."""

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.surroundings import address_space

from actcache.errors import ManifestError
from trainer.formats.state_dict import MOST_PICKLE_BYTES, read_state_dict

HEADROOM = 256 << 20  # bytes of address space; every attack asks for more
SIDE = 1 << 16  # of a square of 17 GB


def written(path: Path, *, compression: int = zipfile.ZIP_STORED, **changes: Any) -> Path:
    """A state dict as torch.save writes it, with other bytes in some of its parts."""
    saved = io.BytesIO()
    torch.save({"a": torch.arange(4.0)}, saved)
    with zipfile.ZipFile(saved) as archive, zipfile.ZipFile(path, "w", compression) as copy:
        for name in archive.namelist():
            copy.writestr(name, changes.get(Path(name).stem, archive.read(name)))
    return path


def refuses(path: Path, match: str) -> None:
    with address_space(HEADROOM), pytest.raises(ManifestError, match=match) as raised:
        read_state_dict(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "weights_only" not in str(raised.value)
    assert len(str(raised.value)) < 1000


def pickled(call: bytes) -> bytes:
    """A pickle of {"a": what the opcodes `call` leave}."""
    return b"\x80\x02}X\x01\x00\x00\x00a" + call + b"s."


def doubled(part: bytes, opens: bytes, closes: bytes) -> bytes:
    """The opcodes for a dict with a part, and above it one that holds the part twice, and so on 60 times.

    `opens` and `closes` stand around the two. The last one is left above the dict.
    """
    twice = (b"%sh%ch%c%sq%c" % (opens, i, i, closes, i + 1) for i in range(60))
    return b"}K\x05(" + part + b"q\x00" + b"".join(twice) + b"tsh\x3c"


def test_what_torch_saves_is_read_bit_for_bit(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    tensors = {
        **{str(dtype): whole.to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64)},
        **{"matrix": whole.view(3, 4).T, "part": whole[3:5], "scalar": torch.tensor(2.5), "none": torch.empty(0, 3)},
        "parameter": torch.nn.Parameter(whole),
    }
    torch.save(tensors, tmp_path / "ae.pt")
    found = read_state_dict(tmp_path / "ae.pt")
    assert {*found} == {*tensors}
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.detach())
        assert (found[name].dtype, found[name].requires_grad) == (tensor.dtype, False)


def test_a_tensor_that_repeats_its_elements_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(SIDE, SIDE)}, tmp_path / "ae.pt")
    assert (tmp_path / "ae.pt").stat().st_size < 1 << 12
    refuses(tmp_path / "ae.pt", r"'a' of shape \[65536, 65536\] in \d+ bytes")


def test_a_compressed_part_is_refused(tmp_path: Path) -> None:
    refuses(written(tmp_path / "ae.pt", compression=zipfile.ZIP_DEFLATED), "a zip with compressed parts")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "ae.pt")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data.pkl", b"")
    refuses(path, "a zip with two parts of one name")


def test_parts_that_lie_on_each_other_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "ae.pt", **{"0": bytes(1 << 12)})
    data = path.read_bytes()
    directory = data.index(b"PK\x01\x02")
    entry = data[directory : data.index(b"PK\x01\x02", directory + 4)]
    with zipfile.ZipFile(path) as archive:
        large = next(member for member in archive.infolist() if member.file_size == 1 << 12)
    sizes, offset = large.file_size.to_bytes(4, "little") * 2, large.header_offset.to_bytes(4, "little")
    again = entry[:20] + sizes + entry[28:42] + offset + entry[46:]
    end = data[-22:]
    n_bytes = len(data) - 22 - directory + len(again)
    path.write_bytes(
        data[:-22] + again + end[:8] + (int.from_bytes(end[8:10], "little") + 1).to_bytes(2, "little") * 2
        + n_bytes.to_bytes(4, "little") + end[16:]
    )  # fmt: skip
    refuses(path, "a zip with")


@pytest.mark.parametrize(
    ("call", "match"),
    {
        "bytes of nothing": (b"c__builtin__\nbytearray\nJ\x00\x00\x00\x7f\x85R", "a pickle that holds more"),
        "a storage of nothing": (
            b"ctorch._utils\n_rebuild_tensor_v2\n(ctorch\nFloatStorage\nJ\x00\x00\x00\x01\x85RK\x00K\x01\x85K\x01\x85"
            b"\x89ccollections\nOrderedDict\n)RtR",
            "got TypeError",
        ),
        "a quantised tensor of nothing": (b"ctorch._utils\n_rebuild_qtensor\n)R", "a pickle that holds more"),
        "a program": (b"cos\nsystem\nX\x04\x00\x00\x00true\x85R", "a pickle that holds more, and could run any code"),
        "long": (b"]" * (MOST_PICKLE_BYTES + 1), "a pickle of 32,7"),
        "deep": (b"}K\x01" + b"\x85" * (1 << 18) + b"K\x01s", "a pickle of 262,1"),
        "a key that is hashed for ever": (doubled(b")", b"", b"\x86") + b"K\x01s", "repeats its parts 121 t"),
        "lists that are printed for ever": (doubled(b"]", b"](", b"e") + b")R", "repeats its parts 121 times"),
    }.values(),
    ids=["bytearray", "storage", "quantised", "program", "long", "deep", "hashed", "printed"],
)
def test_what_is_no_tensor_of_the_file_is_refused(call: bytes, match: str, tmp_path: Path) -> None:
    refuses(written(tmp_path / "ae.pt", data=pickled(call)), match)


def test_what_is_no_zip_of_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ae.pt"
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    refuses(path, "must be a state dict of tensors, got BadZipFile")
    path.write_bytes(pickle.dumps({"a": 1}))
    refuses(path, "got BadZipFile")
    torch.save([torch.zeros(3)], path)
    refuses(path, "got ValueError: a list")
    path.unlink()
    refuses(path, "got no file")
    os.mkfifo(path)
    refuses(path, "got no file")


def test_every_changed_byte_is_refused_or_changes_no_size(tmp_path: Path) -> None:
    path, draw = written(tmp_path / "ae.pt"), np.random.default_rng(0)
    whole = path.read_bytes()
    for at in draw.choice(len(whole), 300, replace=False).tolist():
        data = bytearray(whole)
        data[at] ^= 1 << draw.integers(8)
        path.write_bytes(data)
        try:
            found = read_state_dict(path)
        except ManifestError:
            continue
        assert all(tensor.nbytes <= 16 for tensor in found.values()), at
