import errno
import fcntl
import os
import platform
import shutil
import threading
import time
from pathlib import Path

import pytest
from support.no_locks import forbid_locks
from support.repairs import stamps
from support.strangers import as_another_user, only_root
from support.tiny_caches import harvest_tiny

from actcache.errors import ActcacheError, LocksMissing, ManifestError
from actcache.integrity.relabel import relabel
from actcache.integrity.repair import repair
from actcache.store.locks import (
    PROBE_SECONDS,
    exclusive,
    holder,
    is_at,
    is_held,
    may_write,
    note_holder,
    refuse_unwritable,
    try_lock,
    without_locks,
)


def test_settling_waits_for_the_one_before(tmp_path):
    (tmp_path / "manifest").mkdir()
    order = []
    with exclusive(tmp_path):
        thread = threading.Thread(target=lambda: order.append(_settled(tmp_path)))
        thread.start()
        thread.join(0.2)
        assert order == [], "still waiting"
    thread.join(10)
    assert order == [True]


def _settled(root: Path) -> bool:
    with exclusive(root):
        return True


def test_who_waited_for_a_lock_file_that_is_gone_takes_the_new_one(tmp_path):
    """Whoever settled before may have removed the folder, and the lock with it."""
    order = []
    with exclusive(tmp_path):
        thread = threading.Thread(target=lambda: order.append(_settled(tmp_path)))
        thread.start()
        thread.join(0.2)
        (tmp_path / "manifest" / "settling.lock").unlink()
    thread.join(10)
    assert order == [True]
    assert (tmp_path / "manifest" / "settling.lock").exists()


@pytest.fixture
def two(tmp_path):
    """A file opened twice, as two processes have it: locks of one open file say nothing of another's."""
    path = tmp_path / "lock"
    with open(path, "ab") as first, open(path, "ab") as second:
        yield path, first.fileno(), second.fileno()


def test_a_lock_that_another_holds_is_not_got(two):
    path, mine, theirs = two
    assert not is_held(path)
    assert try_lock(theirs, fcntl.LOCK_EX)
    assert is_held(path)
    started = time.monotonic()
    assert not try_lock(mine, fcntl.LOCK_EX)
    assert time.monotonic() - started >= PROBE_SECONDS, "it may have been a probe"
    fcntl.flock(theirs, fcntl.LOCK_UN)
    assert try_lock(mine, fcntl.LOCK_EX)


def test_a_probe_is_waited_for(two):
    _, mine, theirs = two
    fcntl.flock(theirs, fcntl.LOCK_SH)
    probe = threading.Timer(0.05, lambda: fcntl.flock(theirs, fcntl.LOCK_UN))
    probe.start()
    assert try_lock(mine, fcntl.LOCK_EX)
    probe.join()


def test_a_file_that_was_replaced_or_removed_is_another(two):
    path, mine, _ = two
    assert is_at(path, mine)
    (path.parent / "other").touch()
    os.replace(path.parent / "other", path)
    assert not is_at(path, mine)
    path.unlink()
    assert not is_at(path, mine)


def test_whoever_waits_says_once_for_whom(tmp_path, caplog):
    order = []
    with exclusive(tmp_path, "repairs it"):
        thread = threading.Thread(target=lambda: order.append(_settled(tmp_path)))
        thread.start()
        thread.join(0.5)
        assert caplog.messages == [], "it may be over in a moment"
        thread.join(1.5)
    thread.join(10)
    (line,) = caplog.messages
    lock = tmp_path / "manifest" / "settling.lock"
    assert line.startswith(f"{lock}: waits for process {os.getpid()} on {platform.node()} (repairs it, since 2")
    assert order == [True]


def test_a_note_is_of_the_last_holder_and_never_fails(tmp_path):
    path = tmp_path / "lock"
    with open(path, "ab") as file:
        assert holder(path) == "another process"
        for what in ("does something that takes long to say", "trains"):
            note_holder(file.fileno(), what)
        assert f"process {os.getpid()} on " in holder(path)
        assert holder(path).count("process") == 1
    with open(path, "rb") as file:
        note_holder(file.fileno(), "may not write")
    assert "(trains, since" in holder(path)
    path.write_bytes(b"\xff\x00" * 1000)
    assert len(holder(path)) < 1000
    assert holder(tmp_path / "missing") == "another process"


NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


@pytest.fixture(params=NO_LOCKS, ids=errno.errorcode.get)
def no_locks(request, monkeypatch, tmp_path):
    """A file system that has no locks."""
    forbid_locks(monkeypatch, tmp_path, request.param)
    return os.strerror(request.param)


def test_where_there_are_no_locks_it_is_said_and_the_way_out(tmp_path, no_locks):
    line = rf"^{tmp_path}/\S+: the file system must have locks, it says: {no_locks}; pass --no-lock .* no other process"
    with pytest.raises(LocksMissing, match=line), exclusive(tmp_path):
        pytest.fail("not locked")
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(LocksMissing, match=line):
        is_held(path)
    with open(path, "ab") as file, pytest.raises(LocksMissing, match=line):
        try_lock(file.fileno(), fcntl.LOCK_EX)


def test_nothing_is_locked_for_who_knows_that_nobody_else_writes(tmp_path, no_locks):
    path = tmp_path / "file"
    path.touch()
    with without_locks(), exclusive(tmp_path), open(path, "ab") as file:
        assert try_lock(file.fileno(), fcntl.LOCK_EX)
        assert not is_held(path)
    with pytest.raises(LocksMissing):
        is_held(path)


def test_another_error_of_a_lock_stays_what_it_is(tmp_path, monkeypatch):
    forbid_locks(monkeypatch, tmp_path, errno.EIO)
    with (
        pytest.raises(OSError, match=rf"put error; .*{tmp_path}/manifest/settling\.lock"),
        exclusive(tmp_path),
    ):
        pytest.fail("not locked")


@only_root
@pytest.mark.parametrize("made", ["", "manifest", "manifest/settling.lock"])
def test_a_cache_of_another_user_is_refused_by_its_name(tmp_path, made):
    if made:
        (tmp_path / "manifest").mkdir()
    if made.endswith("lock"):
        (tmp_path / made).touch()
    line = rf"\[Errno 13\] Permission denied: this has to write the cache; ask its owner .*: '{tmp_path}'$"
    assert may_write(tmp_path)
    with as_another_user(tmp_path):
        with pytest.raises(PermissionError, match=line), exclusive(tmp_path):
            pytest.fail("not locked")
        for folder in (tmp_path, tmp_path / "not" / "there"):
            with pytest.raises(PermissionError, match=rf"write the cache; pass another --out; ask .*: '{folder}'$"):
                refuse_unwritable(folder)


@pytest.mark.parametrize("name", ["stats", "acts.zarr/train/tokens", "manifest", "manifest/partials", "log"])
def test_nothing_is_written_through_a_folder_that_is_a_link(tiny_model, tiny_texts, tiny_cache, tmp_path, name):
    """Repair and harvest of a cache whose folder lies elsewhere: what is there stays as it is."""
    root, elsewhere = Path(shutil.copytree(tiny_cache.path, tmp_path / "c")), tmp_path / "elsewhere"
    shutil.move(root / name, elsewhere)
    (root / name).symlink_to(elsewhere)
    for path in sorted(elsewhere.rglob("*.*"))[:3]:
        path.write_bytes(b"damaged")
    before = stamps(tmp_path)
    for write in (
        lambda: repair(root, lambda _: tiny_model),
        lambda: harvest_tiny(tiny_model, tiny_texts, root, hook_names=("blocks.0.hook_mlp_out",)),
        lambda: relabel(root, native=True),
    ):
        with pytest.raises(ActcacheError):
            write()
    assert stamps(tmp_path) == before


def test_a_lock_that_is_a_link_makes_no_file(tmp_path):
    (tmp_path / "manifest").mkdir()
    (tmp_path / "manifest" / "settling.lock").symlink_to(tmp_path / "new")
    with pytest.raises(ManifestError, match="is a link, and no link is followed there"), exclusive(tmp_path):
        raise AssertionError
    assert not (tmp_path / "new").exists()


def test_a_pipe_in_the_place_of_a_lock_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "writer-00.jsonl")
    with pytest.raises(FileNotFoundError, match="no regular file"):
        is_held(tmp_path / "writer-00.jsonl")
