import itertools
import os

import pytest
import torch

from benchmarks.measure import bytes_read, forget, interleaved_seconds, machine, peak_resident_bytes


@pytest.mark.parametrize("uncounted", [0, 1, 2])
def test_rounds_turn_round_and_only_the_counted_ones_count(uncounted):
    calls = []
    turns = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = interleaved_seconds(turns, 3, uncounted)
    assert {name: len(spent) for name, spent in seconds.items()} == {"a": 3, "b": 3}
    rounds = ["".join(calls[i : i + 2]) for i in range(0, len(calls), 2)]
    assert len(rounds) == 3 + uncounted
    assert all(a != b for a, b in itertools.pairwise(rounds)), "each round is turned against the last"


def test_a_forgotten_file_is_read_from_the_disk_again(tmp_path):
    path, n_bytes = tmp_path / "file", 1 << 22
    path.write_bytes(os.urandom(n_bytes))
    os.sync()
    forget([path])
    before = bytes_read()
    path.read_bytes()
    if bytes_read() == before:
        pytest.skip("this folder is not on a disk")
    assert n_bytes <= bytes_read() - before <= 1.1 * n_bytes + (1 << 20)  # read-ahead, and what Python reads beside it


def test_the_peak_is_never_forgotten():
    held = torch.ones(1 << 24)
    peak = peak_resident_bytes()
    assert peak >= held.nbytes
    del held
    assert peak_resident_bytes() >= peak - (1 << 20)  # each thread's pages are counted in batches


def test_the_machine_says_what_it_multiplies_and_what_was_set(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    found = machine()
    assert found["set"]["MALLOC_ARENA_MAX"] == "1"
    assert set(found["bf16_products"]) <= {"avx512_bf16", "amx_tile", "amx_bf16"}
