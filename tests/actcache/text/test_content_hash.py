import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from support.io_counts import bytes_read_and_written

from actcache.text.content_hash import SETTLED_SECONDS, content_hash

OLD = Path(json.__file__).parent  # files that were there long before


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A folder for what this user's programs remember; the file in it that is meant."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "actcache" / "content_hashes.jsonl"


def settled(*files: Path) -> None:
    """Wait until the hashes of files that were just written may be remembered."""
    while max(file.stat().st_ctime for file in files) > time.time() - SETTLED_SECONDS:
        time.sleep(0.05)


def test_the_hash_is_frozen(tmp_path, own_cache):
    """Caches of another day have it in their identities."""
    (tmp_path / "d" / "b").mkdir(parents=True)
    (tmp_path / "d" / "a.txt").write_text("Größe")
    (tmp_path / "d" / "b" / "c.jsonl").write_bytes(b"")
    expected = hashlib.sha256("a.txt:7\nGrößeb/c.jsonl:0\n".encode()).hexdigest()
    assert content_hash(tmp_path / "d") == expected
    assert content_hash(tmp_path / "d" / "a.txt") == hashlib.sha256(".:7\nGröße".encode()).hexdigest()


def test_bytes_are_read_once_while_nothing_changes(own_cache):
    first = content_hash(OLD)
    n_read, n_written = bytes_read_and_written(lambda: content_hash(OLD))
    assert content_hash(OLD) == first
    assert n_read < 2000 < sum(file.stat().st_size for file in OLD.rglob("*.py"))
    assert n_written < 500


def test_a_file_that_is_replaced_with_the_same_size_and_time_is_noticed(tmp_path, own_cache):
    """As `cp -p`, `tar` and layers of images do; in place too, where the inode stays."""
    file, other = tmp_path / "a.txt", tmp_path / "other.txt"
    file.write_text("old text")
    other.write_text("new text")
    for each in (file, other):
        os.utime(each, ns=(10**18, 10**18))
    settled(file, other)
    old = content_hash(file)
    assert "a.txt" in own_cache.read_text()
    shutil.copy2(other, file)
    assert file.stat().st_mtime_ns == 10**18
    assert content_hash(file) == hashlib.sha256(b".:8\nnew text").hexdigest() != old
    settled(file)
    content_hash(file)
    with open(file, "r+b") as stream:
        stream.write(b"old")
    os.utime(file, ns=(10**18, 10**18))
    assert content_hash(file) == old


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, own_cache):
    """It may change again within one tick of the clock of its file system."""
    (tmp_path / "a.txt").write_text("text")
    content_hash(tmp_path / "a.txt")
    assert not own_cache.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"5\n", b'["a", 1, 2]\n', b'["a"]\n', b"\xff", b"null\n", None])
def test_what_cannot_be_remembered_is_computed(own_cache, content):
    own_cache.parent.mkdir(parents=True)
    if content is None:
        own_cache.mkdir()
    else:
        own_cache.write_bytes(content)
    assert content_hash(OLD) == content_hash(OLD)
    assert content is None or str(OLD) in own_cache.read_text()
