import errno
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.no_locks import forbid_locks
from support.places import CHILD
from support.strangers import as_another_user, copy_of_another_user, given, only_root
from support.surroundings import ERRNOS, FailingCalls, address_space, descriptors

from actcache.arguments import can_only_be_a_path, local_path
from actcache.errors import CacheLocked, CacheMismatch, ConfigError, ManifestError
from actcache.files import (
    NoFile,
    contents,
    contents_of_any_size,
    file_bytes,
    files_below,
    is_file,
    is_folder,
    is_writable,
    listed,
    name_,
    new_folder,
    refuse_links,
    remove_leftovers,
    require_writable,
    write_atomically,
)


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
    (tmp_path / "a" / f".0.{'1f' * 16}.partial").write_bytes(b"torn")
    (tmp_path / "a" / "0").write_bytes(b"whole")
    remove_leftovers(tmp_path)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["0"]


def test_files_of_a_user_that_look_like_ours_stay(tmp_path):
    mark = f".{'1f' * 16}.partial"
    (tmp_path / ".git").mkdir()
    (tmp_path / f".folder{mark}").mkdir()
    (tmp_path / "elsewhere").touch()
    (tmp_path / f".link{mark}").symlink_to(tmp_path / "elsewhere")
    for name in (".mine.partial", f"mine{mark}", f".mine{mark}.txt", f".git/.mine{mark}", f".{'1f' * 16}.partial"):
        (tmp_path / name).touch()
    before = sorted(tmp_path.rglob("*"))
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_is_a_link_is_refused_wherever_it_is(tmp_path):
    root = tmp_path / "c"
    (root / "a" / "b").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere.txt").touch()
    (root / "a" / "file").symlink_to(tmp_path / "elsewhere.txt")
    refuse_links(root)
    refuse_links(tmp_path / "missing")
    for link in (root / "link", root / "a" / "b" / "link"):
        link.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(
            ManifestError, match=rf"{link}: is a link to {tmp_path}/elsewhere, and nothing is read or written"
        ):
            refuse_links(root)
        link.unlink()
    (tmp_path / "short").symlink_to(root)
    refuse_links(tmp_path / "short")  # how the user calls the cache


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
            (folder / ".0.0123456789abcdef0123456789abcdef.partial").touch()
            (folder / ".0.0123456789abcdef0123456789abcdef.partial").unlink(missing_ok=True)
            folder.rmdir()
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not ended.is_set() and writer.is_alive():
        remove_leftovers(tmp_path)
    writer.join()
    assert len(list((tmp_path / "log").iterdir())) == 300


def test_what_is_no_leftover_stays(tmp_path):
    (tmp_path / ".folder.0123456789abcdef0123456789abcdef.partial").mkdir()
    (tmp_path / ".link.0123456789abcdef0123456789abcdef.partial").symlink_to("/nowhere")
    os.mkfifo(tmp_path / ".pipe.0123456789abcdef0123456789abcdef.partial")
    (tmp_path / "thesis.partial").touch()
    before = sorted(tmp_path.iterdir())
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_files_are_written_and_leftovers_go_only_where_nobody_else_writes(tmp_path, monkeypatch, code):
    forbid_locks(monkeypatch, tmp_path, code)
    write_atomically(tmp_path / "file", [b"whole"])
    (tmp_path / ".0.0123456789abcdef0123456789abcdef.partial").touch()
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"file", ".0.0123456789abcdef0123456789abcdef.partial"}
    remove_leftovers(tmp_path, alone=True)
    assert {p.name for p in tmp_path.iterdir()} == {"file"}


def written(path: Path, text: str, **how: bool) -> dict[str, str]:
    """What the folder holds after somebody wrote a file in it."""
    with new_folder(path, **how) as aside:
        (aside / "file").write_text(text)
    return {file.name: file.read_text() for file in path.iterdir()}


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):

    def fail(aside: Path) -> None:
        (aside / "file").touch()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a" / "out") as aside:
        fail(aside)
    assert list((tmp_path / "a").iterdir()) == []
    (tmp_path / "a" / "out").mkdir()
    assert written(tmp_path / "a" / "out", "first") == {"file": "first"}
    with pytest.raises(CacheMismatch, match=r"out: another process has written it meanwhile; pass another --out"):
        written(tmp_path / "a" / "out", "second")
    assert written(tmp_path / "a" / "out", "second", replace=True) == {"file": "second"}
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "a" / "empty").mkdir()
    (tmp_path / "a" / "link").symlink_to("empty")
    assert written(local_path(tmp_path / "link" / "link"), "third") == {"file": "third"}
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["empty", "link", "out"]


def test_one_process_at_a_time_writes_a_folder(tmp_path):
    out = tmp_path / "out"
    with new_folder(out) as aside:
        with pytest.raises(CacheLocked, match=r"/out: another process is writing it; wait for it, or pass another"):
            written(out, "second")
        assert written(tmp_path / "out.2", "beside") == {"file": "beside"}
        assert written(tmp_path / "o*", "beside") == {"file": "beside"}
        (aside / "file").write_text("first")
    assert (out / "file").read_text() == "first"


def test_what_a_killed_writer_left_of_a_folder_goes_and_nothing_else(tmp_path):
    left = [f".out.{'0' * 32}.partial", f".other.{'0' * 32}.partial", ".out.mine.partial", f".out.{'1' * 32}"]
    for name in left:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / f".out.{'2' * 32}.partial").touch()
    written(tmp_path / "out", "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", *left[1:], f".out.{'2' * 32}.partial"}


def test_without_locks_two_writers_of_a_folder_harm_nothing(tmp_path, monkeypatch):
    forbid_locks(monkeypatch, tmp_path)
    with (
        pytest.raises(CacheMismatch, match="out: another process has written it meanwhile"),
        new_folder(tmp_path / "out"),
    ):
        assert written(tmp_path / "out", "second") == {"file": "second"}
    assert {path.name: path.is_dir() for path in tmp_path.iterdir()} == {"out": True}
    assert (tmp_path / "out" / "file").read_text() == "second"


@only_root
def test_an_error_names_the_file_and_not_the_one_aside(tmp_path):
    with as_another_user(tmp_path), pytest.raises(PermissionError, match=r"denied; .*: '[^']*/losses\.json'$"):
        write_atomically(tmp_path / "losses.json", [b""])
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=r"'[^']*/folder'$"):
        write_atomically(tmp_path / "folder", [b""])
    with as_another_user(tmp_path), pytest.raises(PermissionError, match=r"denied: .*: '[^']*/new'$"):
        written(tmp_path / "new", "")


@only_root
def test_where_somebody_may_write(tmp_path):
    (tmp_path / "mine").mkdir()
    mine = given(tmp_path / "mine")
    (mine / "closed").touch()
    with as_another_user(tmp_path):
        for path in (mine, mine / "new", mine / "a" / "b"):
            assert is_writable(path)
            require_writable(mine, path, "it cannot be written; take another")
        for path in (mine / "closed", tmp_path, tmp_path / "new", tmp_path / "a" / "b"):
            assert not is_writable(path)
            with pytest.raises(PermissionError, match=rf"denied: it .* take another; ask its owner .*: '{mine}'$"):
                require_writable(mine, path, "it cannot be written; take another")


@only_root
def test_nobody_may_write_where_the_file_system_is_for_reading_only(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        with pytest.raises(OSError, match=rf"its file system .* reading only; .*: '{tmp_path}'$") as raised:
            require_writable(tmp_path, tmp_path / "new", "it cannot be written; take another")
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert raised.value.errno == errno.EROFS


ADDRESSES = [
    "s3://bucket/cache",
    "gs://bucket/cache",
    "hf://datasets/owner/name",
    "file:///tmp/cache",
    "https://host/cache",
    "abfss://fs@account/cache",
    "S3://bucket",
    "simplecache::s3://bucket/cache",
    "dbfs:/mnt/cache",
    Path("s3://bucket/cache"),  # a Path has lost one of the slashes
]


@pytest.mark.parametrize("address", ADDRESSES, ids=str)
def test_an_address_is_no_path(address):
    with pytest.raises(ConfigError, match=r"no address is read or written; mount or copy .* pass a path of this"):
        local_path(address)


@pytest.mark.parametrize("path", ["cache", "/a:b/c", "./s3/x", "a:b", "run-12:30", "C:/x", "cache/s3:x", "../x"])
def test_every_other_path_is_taken_as_it_is(path):
    assert local_path(path) == Path(path)


def test_the_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/her")
    assert local_path("~/cache") == local_path(Path("~/cache")) == Path("/home/her/cache")
    assert local_path("~nobody-of-this-name/cache") == Path("~nobody-of-this-name/cache")


def test_what_can_only_be_a_path():
    paths = ["./a", "../a/b", "/a", "~/a", "a/b/c", "texts.jsonl", "owner/texts.JSONL"]
    names = ["gpt2", "owner/model-0.5b", "owner/model-v1.5", "EleutherAI/pythia-70m"]
    assert [can_only_be_a_path(name, {".jsonl"}) for name in (*paths, *names)] == [True] * len(paths) + [False] * 4


def addressed(model, texts, cache):
    """Every function of actcache that takes a path, called with an address."""
    from actcache.harvesting.config import HarvestConfig
    from actcache.harvesting.run import dry_run, harvest
    from actcache.integrity.relabel import relabel
    from actcache.integrity.repair import repair
    from actcache.integrity.verify import verify
    from actcache.interop.arrow_export import export_cache
    from actcache.interop.arrow_import import ArrowImport, import_cache
    from actcache.models.load import load_model
    from actcache.store.cache import open_cache, read_manifest
    from actcache.text.sources import DatasetSource

    out, config = "s3://bucket/cache", HarvestConfig(hook_names=("a.b",))
    yield lambda: harvest(model, DatasetSource(path=str(texts)), config, out)
    yield lambda: dry_run(model, DatasetSource(path=str(texts)), config, Path(out))
    yield lambda: import_cache("arrow", ArrowImport(model="gpt2"), out)
    yield lambda: import_cache(out, ArrowImport(model="gpt2"), "cache")
    yield lambda: export_cache(cache, out)
    yield lambda: load_model(out)
    yield lambda: DatasetSource(path=out)
    for function in (open_cache, read_manifest, verify, lambda p: relabel(p, native=True), lambda p: repair(p, print)):
        yield lambda function=function: function(out)


def test_no_function_takes_an_address(tiny_model, tiny_texts, tiny_cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for number, call in enumerate(addressed(tiny_model, tiny_texts, tiny_cache)):
        with pytest.raises(ConfigError, match="no address is read or written"):
            call()
        assert not list(tmp_path.iterdir()), number


def not_there(folder):
    """Name -> a path where there is no regular file."""
    (folder / "file").write_bytes(b"x")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "nowhere").symlink_to("none")
    (folder / "device").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(folder / "socket"))
    names = ("none", "folder", "pipe", "loop", "nowhere", "device", "socket", "file/below", "x" * 300)
    return [folder / name for name in names]


def test_where_there_is_no_file_that_is_said(tmp_path):
    for path in not_there(tmp_path):
        error, said = (ManifestError, ": is a link, and no link") if os.path.islink(path) else (NoFile, "")
        with pytest.raises(error, match=re.escape(f"{path}{said}")):
            contents(path)
        assert file_bytes(path) is None
        assert not is_file(path)
        assert is_folder(path) == (path.name == "folder")
    assert (contents(tmp_path / "file"), file_bytes(tmp_path / "file")) == (b"x", 1)
    assert is_file(tmp_path / "file")
    assert not is_folder(tmp_path / "file")


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
@pytest.mark.parametrize("read", [contents, contents_of_any_size, file_bytes, is_file, is_folder])
def test_what_the_surroundings_refuse_is_told_as_what_it_is(tmp_path, read, number):
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with FailingCalls(tmp_path)() as calls:
        read(path)
    for call in range(calls.n_calls):
        with FailingCalls(tmp_path, call, number)() as calls, pytest.raises(OSError, match="; ") as raised:
            read(path)
        assert (type(raised.value), raised.value.errno) == (type(OSError(number, "")), number), calls.failed
        assert str(raised.value).startswith(f"[Errno {number}] {os.strerror(number)}; ")
        assert str(raised.value).endswith(f": '{path}'")
    assert calls.n_calls > 0


def test_what_is_refused_to_a_writer_is_told_and_leaves_nothing_aside(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with FailingCalls(tmp_path)() as calls:
        write_atomically(tmp_path / "file", [b"old"])
    assert calls.n_calls > 3
    for call in range(calls.n_calls):
        with FailingCalls(tmp_path, call)() as calls, pytest.raises(OSError, match="check the disk") as raised:
            write_atomically(tmp_path / "file", [b"old"])
        assert (raised.value.errno, str(tmp_path) in str(raised.value)) == (errno.EIO, True), calls.failed
        assert ".partial" not in str(raised.value)
        assert [path.name for path in tmp_path.iterdir()] == ["file"], calls.failed


def test_the_way_out_is_said_once(tmp_path):
    error = OSError(errno.EIO, "Input/output error")
    name_(error, tmp_path)
    once = str(error)
    name_(error, tmp_path / "other")
    assert str(error) == once


@only_root
def test_a_file_of_another_user_is_no_missing_file(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "file").write_bytes(b"x")
    with copy_of_another_user(tmp_path / "c") as root:
        os.chown(root / "file", 0, 0)
        (root / "file").chmod(0o600)
        with as_another_user():
            assert file_bytes(root / "file") == 1
            with pytest.raises(PermissionError, match=rf"run as a user who has it: '{root}/file'"):
                contents(root / "file")
        os.chown(root, 0, 0)
        root.chmod(0o700)
        with as_another_user():
            for look, path in (
                *((look, root / "file") for look in (file_bytes, is_file, is_folder)),
                *((look, root) for look in (listed, lambda root: list(files_below(root)))),
            ):
                with pytest.raises(PermissionError, match=str(root)):
                    look(path)


def test_no_descriptor_is_left_for_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with descriptors(3), pytest.raises(OSError, match="ulimit -n") as raised:
        contents(tmp_path / "file")
    assert raised.value.errno == errno.EMFILE


def test_what_a_folder_holds(tmp_path):
    not_there(tmp_path)
    (tmp_path / "folder" / "b").touch()
    (tmp_path / "folder" / "a").touch()
    (tmp_path / "elsewhere").symlink_to("folder")
    assert listed(tmp_path / "folder") == [tmp_path / "folder" / "a", tmp_path / "folder" / "b"]
    assert listed(tmp_path / "none") == listed(tmp_path / "file") == []
    found = [str(path.relative_to(tmp_path)) for path in files_below(tmp_path)]
    assert found == ["device", "file", "folder/a", "folder/b", "loop", "nowhere", "pipe", "socket"]


def test_a_file_of_100_gigabytes_is_not_read(tmp_path):
    """It takes no room on the disk: a hole."""
    with open(tmp_path / "cache.json", "wb") as file:
        file.truncate(100 << 30)
    with pytest.raises(ManifestError, match=r"cache\.json: must have at most 268,435,456 bytes"):
        contents(tmp_path / "cache.json")


def test_a_link_that_leads_nowhere_is_refused_and_one_within_the_folder_is_not(tmp_path):
    """A new folder would be made where it leads. wandb links its last run within its folder."""
    root = tmp_path / "run"
    (root / "wandb" / "run-1").mkdir(parents=True)
    (root / "wandb" / "latest-run").symlink_to("run-1")
    (root / "wandb" / "debug.log").symlink_to("run-1/logs/debug.log")
    refuse_links(root)
    (root / "sae").symlink_to(tmp_path / "autostart")
    with pytest.raises(ManifestError, match=f"{root}/sae: is a link to {tmp_path}/autostart"):
        refuse_links(root)
    with pytest.raises(ManifestError, match=f"{root}/sae: is a link to"), new_folder(root / "sae"):
        pass
    assert not (tmp_path / "autostart").exists()


def test_a_file_that_does_not_fit_is_not_read(tmp_path: Path) -> None:
    """A hole of any size is small on disk."""
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(1 << 29)
    with address_space(128 << 20), pytest.raises(MemoryError, match=rf"^reading {tmp_path}/hole may take 0\.60 GB$"):
        contents_of_any_size(tmp_path / "hole")
