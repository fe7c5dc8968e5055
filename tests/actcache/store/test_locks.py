import fcntl
import os
import threading
import time
from pathlib import Path

import pytest

from actcache.store.locks import PROBE_SECONDS, exclusive, is_at, is_held, try_lock


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
