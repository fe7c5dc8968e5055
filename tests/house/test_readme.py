"""The README's format section is normative: what it says is held against the code."""

import re

import numpy as np
import pytest
import torch
import yaml
from support.places import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language ("" for those that name none)."""
    return [
        body
        for name, body in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
        if name == language
    ]


def test_the_example_of_bytes_is_what_the_writer_writes(tmp_path):
    from actcache.format.arrays import ArraySpec
    from actcache.format.codecs import codec
    from actcache.format.dtypes import storage_view
    from actcache.store.shard_file import chunk_slices, write_shard

    (example,) = [block for block in blocks("") if block.startswith("00  ")]
    expected = bytes.fromhex("".join(re.findall(r"^\d0  ((?:[0-9a-f]{2} )*[0-9a-f]{2})", example, re.MULTILINE)))
    array = ArraySpec(path="h/acts", dtype="bfloat16", width=2, chunk_rows=2)
    x = storage_view(torch.tensor([[1.0, -2.0], [0.5, 3.0], [100.0, 0.0]]).bfloat16())
    record = write_shard(tmp_path / "0", array, codec("raw"), (x[rows] for rows in chunk_slices(array, 3)), 4)
    assert (tmp_path / "0").read_bytes() == expected
    assert all(f"`{checksum:08x}`" in README for checksum in record.checksums)


def test_the_example_of_a_seal():
    from actcache.format.seal import seal

    assert f"`{seal({'a': 1}).decode().strip()}`" in README


def test_the_permutation_by_the_text_alone():
    import hashlib

    from actcache.format.scatter import shard_permutation

    key = np.frombuffer(hashlib.sha256(b"scatter:5:train:2").digest()[:16], dtype="<u8")
    by_text = np.argsort(np.random.Philox(key=key).random_raw(100), kind="stable")
    assert np.array_equal(shard_permutation(100, seed=5, split="train", index=2), by_text)


def test_the_sizes_by_the_text_alone():
    from actcache.format import arrays

    assert (arrays.MAX_SHARD_ROWS, arrays.MAX_SHARD_BYTES, arrays.MAX_CHUNK_BYTES) == (2**18, 2**30, 9 * 2**18)
    assert (arrays.MIN_CHUNK_ROWS, arrays.MIN_SHARDS, arrays.WINDOW_BYTES) == (32, 16, 8 * 2**30)
    assert (arrays.TOKEN_CHUNK_ROWS, arrays.SEQUENCE_SHARD_TOKENS) == (4096, 2**18)


def test_the_folders_of_a_cache_are_those_listed(tiny_cache):
    listing = next(block for block in blocks("") if block.startswith("CACHE/"))
    for path in tiny_cache.path.rglob("*"):
        if path.is_file():
            relative = path.relative_to(tiny_cache.path)
            assert relative.parts[0] + "/" in listing, relative
            if relative.parts[0] == "manifest" and len(relative.parts) == 2:
                assert str(relative) in listing


def test_the_tree_names_every_module():
    (tree,) = [block for block in blocks("") if block.startswith("cli.py")]
    named = set(re.findall(r"[a-z0-9_]+\.py\b", tree))
    modules = {path.name for package in ("actcache", "trainer", "benchmarks") for path in (ROOT / package).glob("*.py")}
    assert named - {"test_layers.py", "test_readme.py", "reference.py"} == modules - {"__init__.py"} | {"cli.py"}


def test_the_sweep_file_is_valid():
    from trainer.config.sweep import SweepConfig

    (sweep,) = blocks("yaml")
    assert len(SweepConfig.from_dict(yaml.safe_load(sweep)).runs) == 4


COMMANDS = [
    line
    for block in blocks("")
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("actcache ") and "#" not in line.split()[1]
]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_and_their_options_exist(line):
    import typer
    from typer.main import get_command

    from cli import app

    name, *words = line.split("#")[0].split()[1:]
    group = get_command(app)
    command = group.get_command(typer.Context(group), name)
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_no_marker_is_left():
    assert "@@" not in README
