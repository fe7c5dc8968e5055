import pytest

from actcache.files import remove_leftovers, write_atomically


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def parts():
        yield b"new"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, parts())
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert target.read_bytes() == b"old"


def test_partials_of_killed_writers_are_removed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".0.abc.partial").write_bytes(b"torn")
    (tmp_path / "a" / "0").write_bytes(b"whole")
    remove_leftovers(tmp_path)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["0"]
