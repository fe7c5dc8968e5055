"""Folders that `datasets` saved, whole and as a stranger may change them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import pytest

from actcache.text.data_files import DataFault
from actcache.text.saved import INFO, STATE, load_saved


@pytest.fixture
def folder(tmp_path) -> Path:
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_dataset_is_loaded_also_behind_the_links_of_the_hub(folder, tmp_path):
    assert load_saved(folder)["text"][:] == ["a", "b"]
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("..", "blobs", str(number)))
    assert load_saved(folder)["text"][:] == ["a", "b"]


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: None], ids=["pipe", "folder", "nothing"])
@pytest.mark.parametrize("name", [STATE, INFO, "data-00000-of-00001.arrow"])
def test_a_pipe_is_not_waited_for(folder, name, make):
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises(DataFault, match=f"{folder / name} "):
        load_saved(folder)


def test_no_file_outside_of_the_folder_is_read(folder):
    state = json.loads((folder / STATE).read_text())
    (folder / "data-00000-of-00001.arrow").rename(folder.parent / "secret.arrow")
    for name in ("../secret.arrow", str(folder.parent / "secret.arrow"), "", 3, ["x"], "a\0b"):
        (folder / STATE).write_text(json.dumps(state | {"_data_files": [{"filename": name}]}))
        with pytest.raises(DataFault, match=r"state\.json names .*, which is no file of its folder|cannot be read"):
            load_saved(folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *((name, text) for name in (STATE, INFO) for text in ("[]", "{", "[" * 100_000, "3", '"x"')),
        (INFO, '{"features": "x"}'),
        (INFO, '{"features": {"text": "x"}}'),
        (INFO, '{"features": {"text": {"_type": "Value", "dtype": 3}}}'),
        (INFO, '{"features": {"text": {"_type": "no such"}}}'),
        (STATE, '{"_data_files": "x"}'),
        (STATE, '{"_data_files": [3]}'),
    ],
    ids=lambda each: each[:40],
)
def test_json_of_a_stranger_is_one_short_line(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(DataFault) as raised:
        load_saved(folder)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600
