import errno
import fcntl
import os
import subprocess
import sys
import threading

import pytest
from support.places import CHILD
from support.strangers import as_another_user, only_root

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


SLOW_WRITER = """
import sys
from pathlib import Path
from actcache.files import write_atomically

def parts():
    yield b"first "
    print("writing", flush=True)
    sys.stdin.readline()
    yield b"second"

write_atomically(Path(sys.argv[1]), parts())
"""


@pytest.fixture
def slow_writer(tmp_path):
    """Another process in the middle of writing tmp_path/log/losses.json."""
    command = [sys.executable, "-c", SLOW_WRITER, tmp_path / "log" / "losses.json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=CHILD) as process:
        assert process.stdout.readline() == "writing\n"
        yield process
        process.kill()


def test_a_file_that_another_process_is_writing_stays(tmp_path, slow_writer):
    remove_leftovers(tmp_path)
    slow_writer.communicate("go on\n", timeout=60)
    assert slow_writer.returncode == 0
    assert [p.name for p in (tmp_path / "log").iterdir()] == ["losses.json"]
    assert (tmp_path / "log" / "losses.json").read_bytes() == b"first second"


def test_a_file_goes_as_soon_as_its_writer_is_killed(tmp_path, slow_writer):
    slow_writer.kill()
    slow_writer.wait()
    assert len(list((tmp_path / "log").iterdir())) == 1
    remove_leftovers(tmp_path)
    assert not list((tmp_path / "log").iterdir())


def test_files_that_are_renamed_and_folders_that_vanish_meanwhile_fail_nothing(tmp_path):
    """One thread writes, and makes and removes folders; another cleans up."""
    ended = threading.Event()

    def write():
        for number in range(300):
            write_atomically(tmp_path / "log" / f"{number}", [b"x"])
            folder = tmp_path / f"folder-{number}"
            folder.mkdir()
            (folder / ".0.abc.partial").touch()
            (folder / ".0.abc.partial").unlink(missing_ok=True)
            folder.rmdir()
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not ended.is_set() and writer.is_alive():
        remove_leftovers(tmp_path)
    writer.join()
    assert len(list((tmp_path / "log").iterdir())) == 300


def test_what_is_no_leftover_stays(tmp_path):
    (tmp_path / ".folder.partial").mkdir()
    (tmp_path / ".link.partial").symlink_to("/nowhere")
    os.mkfifo(tmp_path / ".pipe.partial")
    (tmp_path / "thesis.partial").touch()
    before = sorted(tmp_path.iterdir())
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_files_are_written_and_leftovers_go_only_where_nobody_else_writes(tmp_path, monkeypatch, code):
    def no_locks(descriptor, kind):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    write_atomically(tmp_path / "file", [b"whole"])
    (tmp_path / ".0.abc.partial").touch()
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"file", ".0.abc.partial"}
    remove_leftovers(tmp_path, alone=True)
    assert {p.name for p in tmp_path.iterdir()} == {"file"}


@only_root
def test_an_error_names_the_file_and_not_the_one_aside(tmp_path):
    with as_another_user(tmp_path), pytest.raises(PermissionError, match=r"denied: '[^']*/losses\.json'$"):
        write_atomically(tmp_path / "losses.json", [b""])
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=r"'[^']*/folder'$"):
        write_atomically(tmp_path / "folder", [b""])
