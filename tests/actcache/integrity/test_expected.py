"""What a damaged cache should be: its plan, its manifest and its journals, each held against the others."""

import shutil
from pathlib import Path

import pytest
from support.damages import CACHE, JOURNAL, PLAN, cut, drop, flip, lose_a_line
from support.hostile_caches import changed as with_lie
from support.hostile_caches import sealed, unsealed
from support.repairs import SETTINGS, changed, no_model, repaired, stamps
from support.surroundings import address_space
from support.tiny_caches import HOOKS, harvest_tiny, promised_files

from actcache.errors import CacheMismatch, ManifestError
from actcache.store.journal import read_journals

pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.mark.parametrize("how", [flip, drop, cut])
def test_the_manifest_is_made_from_plan_and_journal(sound, copied, how):
    how(copied / CACHE)
    before = stamps(copied)
    repaired(copied)
    assert promised_files(copied) == promised_files(sound["lossless"])
    assert changed(before, stamps(copied)) == {copied / CACHE}


@pytest.mark.parametrize("how", [lambda path: flip(path, 5000), lose_a_line, cut])
def test_without_the_manifest_shards_of_lost_lines_are_made_again(tiny_model, sound, copied, how):
    drop(copied / CACHE)
    n_lines = len(read_journals(copied))
    how(copied / JOURNAL)
    before = stamps(copied)
    report = repaired(copied, lambda compute: tiny_model)
    assert promised_files(copied) == promised_files(sound["lossless"])
    shards = {Path(p.path).parts[-2:] for p in report.found if "no line of a journal is left" in p.message}
    assert shards
    rewritten = {path for path in changed(before, stamps(copied)) if "acts" in path.parts}
    assert len(rewritten) == len(HOOKS), "one line was lost, of one shard"
    assert len(read_journals(copied)) == n_lines + 1, "tokens and activations apart"


def test_a_harvest_of_no_shard_is_left_to_harvest(copied):
    from actcache.integrity.repair import repair

    drop(copied / CACHE)
    (copied / JOURNAL).write_bytes(b"")
    with pytest.raises(ManifestError, match="no finished shard is recorded; run the same `actcache harvest` again"):
        repair(copied, no_model)


def test_both_manifests_gone_is_the_end(copied):
    from actcache.integrity.repair import repair

    flip(copied / CACHE)
    flip(copied / PLAN)
    before = stamps(copied)
    with pytest.raises(ManifestError, match=r"plan\.json.*cache\.json.*restore one of them, or harvest again"):
        repair(copied, no_model)
    assert stamps(copied) == before


def test_manifests_of_two_caches_are_told_apart_from_damage(tiny_model, tiny_texts, copied, tmp_path):
    from actcache.integrity.repair import repair

    other = harvest_tiny(tiny_model, tiny_texts, tmp_path / "other", seed=1, **SETTINGS).path
    shutil.copy(other / PLAN, copied / PLAN)
    with pytest.raises(CacheMismatch, match="are of two caches"):
        repair(copied, no_model)


@pytest.mark.parametrize("outdated", [CACHE, PLAN])
@pytest.mark.parametrize("first", [16 * 16 * 2, 700])
def test_a_manifest_from_before_the_cache_grew_is_outdated(tiny_model, tiny_texts, sound, tmp_path, outdated, first):
    """Whichever of the two it is, and even if its last shard was whole, the rows that came later are not lost."""
    root = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", **{**SETTINGS, "tokens": first}).path
    old = (root / outdated).read_bytes()
    harvest_tiny(tiny_model, tiny_texts, root, **SETTINGS)
    (root / outdated).write_bytes(old)
    before = stamps(root)
    repaired(root)
    assert promised_files(root) == promised_files(sound["lossless"])
    assert changed(before, stamps(root)) == {root / outdated}


ARRAY = "arrays.tokens/id"


@pytest.mark.parametrize(
    ("place", "lie", "message"),
    [
        ("hooks", [{"hook_name": "a", "d_in": 1 << 40, "dtype": "bfloat16"}], "a has an impossible dtype or width"),
        ("hooks", [{"hook_name": "a", "d_in": 32, "dtype": "float64"}], "a has an impossible dtype or width"),
        ("hooks.0.d_in", 16, "must hold each hook once"),
    ],
)
def test_a_line_that_names_an_impossible_hook_is_told(copied, place, lie, message):
    from actcache.integrity.repair import repair

    drop(copied / CACHE)
    lines = (copied / JOURNAL).read_bytes().splitlines(keepends=True)
    (copied / "line").write_bytes(lines[0])
    lines[0] = sealed(with_lie(unsealed(copied / "line"), place, lie))
    (copied / JOURNAL).write_bytes(b"".join(lines))
    with pytest.raises(ManifestError, match=message):
        repair(copied, no_model)


@pytest.mark.parametrize("lie", [[], [0] * 3, [0] * 1000])
@pytest.mark.parametrize("lost", [[CACHE], []])
def test_a_line_of_another_number_of_chunks_counts_as_lost(tiny_model, sound, copied, lie, lost):
    for file in lost:
        drop(copied / file)
    lines = (copied / JOURNAL).read_bytes().splitlines(keepends=True)
    (copied / "line").write_bytes(lines[0])
    lines[0] = sealed(with_lie(unsealed(copied / "line"), f"{ARRAY}.checksums", lie))
    (copied / JOURNAL).write_bytes(b"".join(lines))
    repaired(copied, lambda compute: tiny_model)
    assert promised_files(copied) == promised_files(sound["lossless"])


def test_a_short_plan_of_many_shards_asks_for_their_memory_first(copied):
    """A line of a journal and a plan of less than a kilobyte took more than a gigabyte."""
    from actcache.integrity.repair import repair

    plan = unsealed(copied / PLAN)
    for split, n_arrays in (("train", 1024), ("validation", 0)):
        arrays = {
            name: [{"n_bytes": 1, "checksums": [0]}] * n_arrays for name in ("sequences/id", "sequences/document")
        }
        plan["sequences"][split] = {"n_sequences": 256 * n_arrays, "arrays": arrays}
    for size in ("shard_rows", "chunk_rows", "context_size"):
        plan["identity"][size] = 1
    (copied / PLAN).write_bytes(sealed(plan))
    drop(copied / CACHE)
    with address_space(256 << 20), pytest.raises(MemoryError, match=rf"^what {copied} should hold may take \d"):
        repair(copied, no_model)
