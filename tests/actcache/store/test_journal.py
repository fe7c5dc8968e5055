import os
import platform
import shutil
from pathlib import Path

import pytest
from support.damages import JOURNAL, flip
from support.repairs import stamps
from support.strangers import as_another_user, copy_of_another_user, only_root
from support.tiny_caches import harvest_tiny, promised_files

from actcache.errors import ActcacheError, CacheLocked, ManifestError
from actcache.integrity.repair import repair
from actcache.store import journal as journal_module
from actcache.store.cache import open_cache
from actcache.store.journal import Journal, active_writers, read_journals, was_begun
from actcache.store.locks import exclusive


@only_root
def test_a_folder_that_may_not_be_listed_is_not_one_without_journals(tiny_cache):
    with copy_of_another_user(tiny_cache.path) as root:
        (root / "manifest").chmod(0o311)
        with as_another_user(), pytest.raises(PermissionError, match=f"run as a user who has it: '{root}/manifest'"):
            read_journals(root)


def test_a_torn_line_and_a_lost_line_are_redone(tiny_model, tiny_texts, tiny_cache, tmp_path):
    root = tmp_path / "c"
    shutil.copytree(tiny_cache.path, root)
    (root / "manifest" / "cache.json").unlink()
    lines = (root / JOURNAL).read_bytes().splitlines(keepends=True)
    (root / JOURNAL).write_bytes(b"".join(lines[:-3]) + lines[-3][:40])
    with pytest.raises(ManifestError, match="unfinished; run the same command again"):
        open_cache(root)
    harvest_tiny(tiny_model, tiny_texts, root)
    assert promised_files(root) == promised_files(tiny_cache.path)


def test_a_damaged_line_is_an_error(tiny_model, tiny_texts, tiny_cache, tmp_path):
    root = tmp_path / "c"
    shutil.copytree(tiny_cache.path, root)
    damaged = bytearray((root / JOURNAL).read_bytes())
    damaged[100] ^= 1
    (root / JOURNAL).write_bytes(damaged)
    with pytest.raises(ManifestError, match="line 1 is damaged"):
        harvest_tiny(tiny_model, tiny_texts, root)


def test_two_writers_get_one_clear_line(tiny_model, tiny_texts, tmp_path):
    holder = rf"process {os.getpid()} on {platform.node()} \(harvests, since 2[-0-9: +]+\)"
    line = rf"{tmp_path}/c: {holder} is writing this cache as worker 0; wait for it"
    with Journal(tmp_path / "c"), pytest.raises(CacheLocked, match=f"^{line}$"):
        harvest_tiny(tiny_model, tiny_texts, tmp_path / "c")


def test_a_lock_on_a_journal_that_was_replaced_is_no_lock(tmp_path, monkeypatch):
    """Opened before a repair put another file in its place, locked after."""
    import fcntl

    from actcache.files import write_atomically

    path, real = tmp_path / JOURNAL, fcntl.flock

    def replaced_meanwhile(descriptor, kind):
        monkeypatch.setattr(fcntl, "flock", real)
        write_atomically(path, [path.read_bytes()])
        return real(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", replaced_meanwhile)
    with pytest.raises(CacheLocked, match="as worker 0"):
        Journal(tmp_path)
    with Journal(tmp_path) as journal:
        assert os.path.samefile(journal.path, path)


def test_a_damaged_journal_that_is_being_written_is_left_alone(copied):
    from actcache.store.journal import salvage

    with Journal(copied):
        flip(copied / JOURNAL)
        before = stamps(copied)
        with pytest.raises(CacheLocked, match="writes this damaged journal; wait for it"):
            salvage(copied)
        assert stamps(copied) == before


def test_what_is_not_named_as_a_journal_is_none(tiny_cache, tmp_path):
    root = shutil.copytree(tiny_cache.path, tmp_path / "c")
    strays = ("00.bak", "0", "007", "-1", "x", "00 (1)", "\u0661\u0662", "")
    for stray in strays:
        (root / "manifest" / f"writer-{stray}.jsonl").write_bytes(b"not a line\nof a journal\n")
    (root / "manifest" / "._writer-00.jsonl").touch()
    assert read_journals(root) == read_journals(tiny_cache.path)
    assert active_writers(root) == set()
    with Journal(root, 123), Journal(root, 7):
        assert active_writers(root) == {7, 123}


def test_a_journal_and_its_note_go_where_nothing_was_begun(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / ".DS_Store").touch()
    assert not was_begun(tmp_path / "c")
    with exclusive(tmp_path / "c"), Journal(tmp_path / "c") as journal:
        assert was_begun(tmp_path / "c")
        journal.discard()
    assert [path.name for path in (tmp_path / "c").iterdir()] == [".DS_Store"]


def test_a_cache_that_was_killed_at_once_was_begun(tmp_path):
    for name in ("settling.lock", "writer-00.lock"):
        (tmp_path / "manifest").mkdir(exist_ok=True)
        (tmp_path / "manifest" / name).touch()
        assert was_begun(tmp_path)


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symlink", "hard link"])
def test_a_journal_that_is_another_file_too_is_refused(tiny_model, tiny_texts, tiny_cache, tmp_path, link):
    """A shell profile, in place of the journal: a repair would have cut it and filled it with lines."""
    root, victim = Path(shutil.copytree(tiny_cache.path, tmp_path / "c")), tmp_path / "profile"
    victim.write_text("export PATH=$PATH")
    journal = root / "manifest" / "writer-00.jsonl"
    journal.unlink()
    link(victim, journal)
    for write in (
        lambda: repair(root, lambda _: tiny_model),
        lambda: harvest_tiny(tiny_model, tiny_texts, root, hook_names=("blocks.0.hook_mlp_out",)),
    ):
        with pytest.raises(ActcacheError, match=str(journal)):
            write()
        assert victim.read_text() == "export PATH=$PATH"


def test_a_folder_with_a_foreign_journal_was_not_begun(tmp_path):
    (tmp_path / "manifest").mkdir()
    (tmp_path / "thesis.txt").touch()
    assert not was_begun(tmp_path)
    (tmp_path / "thesis.txt").unlink()
    (tmp_path / "manifest" / "writer-00.jsonl").touch()
    assert was_begun(tmp_path)
    (tmp_path / "manifest" / "writer-00.jsonl").write_text("{}\n")
    assert not was_begun(tmp_path)


def test_a_plan_that_another_worker_settles_meanwhile_is_seen(tmp_path, monkeypatch):
    """It comes after the first look at the folder, and with it what only a begun harvest has."""
    (tmp_path / "manifest").mkdir()
    look = journal_module.entries

    def settled_meanwhile(folder: Path) -> list[Path]:
        if folder == tmp_path / "manifest":
            (folder / "plan.json").write_text("{}\n")
            (folder / "writer-00.jsonl").write_text("{}\n")
        return look(folder)

    monkeypatch.setattr(journal_module, "entries", settled_meanwhile)
    assert was_begun(tmp_path)
