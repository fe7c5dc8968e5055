"""What a damaged cache should be: its plan, its manifest and its journals, each held against the others."""

import shutil
from pathlib import Path

import pytest
from support.damages import CACHE, JOURNAL, PLAN, cut, drop, flip, lose_a_line
from support.repairs import SETTINGS, changed, no_model, repaired, stamps
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
