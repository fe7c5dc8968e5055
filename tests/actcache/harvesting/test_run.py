"""A harvest from end to end: killed, full, resumed, grown by a hook, asked for again."""

import sys

import pytest
from support.forked_commands import Commands
from support.killed_forks import harvest_after_kills
from support.tiny_caches import HOOKS, harvest_tiny, promised_files

from actcache.models.huggingface import HuggingFaceModel


def test_the_same_harvest_gives_the_same_bytes(tiny_model, tiny_texts, tiny_cache, tmp_path):
    again = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c")
    assert promised_files(again.path) == promised_files(tiny_cache.path)
    assert again.fingerprint == tiny_cache.fingerprint


# fsync and replace are called for every sequence file, the plan, each array of each shard, partial statistics, journal
# lines, and at finalise for statistics, metadata and the manifest: the first points lie in the packing, the next in the
# shards (about nine replaces each), the last in finalise, which takes some forty replaces and starts over each time.
POINTS = ["fsync:1", "replace:2", "fsync:9", "replace:5", "replace:34", "fsync:55", "replace:47", "fsync:71"]
POINTS += ["replace:58", "fsync:64", "replace:66", "replace:40", "replace:30", "replace:20", "replace:3", "fsync:5"]


def test_kills_at_every_kind_of_write_leave_no_trace(tiny_llama_dir, tiny_texts, tiny_cache, tmp_path):
    asked = [tiny_llama_dir, tiny_texts, tmp_path / "c", *POINTS]
    exit_code, said = Commands(tmp_path).run(asked, int, harvest_after_kills)
    assert exit_code == 0, said
    outcomes = said.split("\n")
    assert sum(line.endswith("killed") for line in outcomes) >= 12, said
    assert "None 0" in outcomes
    assert promised_files(tmp_path / "c") == promised_files(tiny_cache.path)
    assert not list((tmp_path / "c").rglob("*.partial"))


def test_a_finished_cache_is_reused_without_running_the_model(tiny_model, tiny_texts, tiny_cache, monkeypatch):
    def run(*args: object) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(HuggingFaceModel, "run_until", run)  # the sixteen tokens of its probe run otherwise
    before = promised_files(tiny_cache.path)
    assert harvest_tiny(tiny_model, tiny_texts, tiny_cache.path).fingerprint == tiny_cache.fingerprint
    harvest_tiny(tiny_model, tiny_texts, tiny_cache.path, hook_names=HOOKS[:1])
    assert promised_files(tiny_cache.path) == before


def test_an_added_hook_equals_one_harvested_with_the_rest(tiny_model, tiny_texts, tiny_cache, tmp_path):
    harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", hook_names=HOOKS[:2])
    grown = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", hook_names=HOOKS[2:])
    assert grown.hook_names == tuple(sorted(HOOKS))
    ours, theirs = promised_files(grown.path), promised_files(tiny_cache.path)
    assert ours == theirs


def test_a_full_disk_stops_cleanly_and_resumes(tiny_model, tiny_texts, tiny_cache, tmp_path, monkeypatch):
    from actcache import files

    real, calls = files.write_atomically, []

    def full(path, parts):
        calls.append(path)
        if len(calls) == 40:
            raise OSError(28, "No space left on device")
        return real(path, parts)

    for module in ("actcache.store.shard_file", "actcache.store.zarr_metadata", "actcache.harvesting.run"):
        monkeypatch.setattr(sys.modules[module], "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        harvest_tiny(tiny_model, tiny_texts, tmp_path / "c")
    monkeypatch.undo()
    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c")
    assert promised_files(cache.path) == promised_files(tiny_cache.path)
