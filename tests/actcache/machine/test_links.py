"""Nothing is read or written where a link within a cache or a run leads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.strangers import as_another_user, only_root

from actcache.arguments import local_path
from actcache.errors import ManifestError
from actcache.files import contents, make_folder, opened, sync_folder, write_atomically
from actcache.machine.links import folder_of, open_unlinked, own_file


def test_no_file_that_has_another_place_is_opened_to_be_changed(tmp_path):
    """A link, a hard link, a link to nothing, a pipe and a folder, each under the name of a log of ours."""
    victim, log = tmp_path / "victim", tmp_path / "log"
    victim.write_text("of the user\n")
    makers = {
        "is a link": lambda: log.symlink_to(victim),
        "is a link,": lambda: log.symlink_to(tmp_path / "new"),
        "has another name too": lambda: os.link(victim, log),
        "is no regular file": lambda: os.mkfifo(log),
    }
    for mode in ("ab", "a+b", "r+b"):
        for said, make in makers.items():
            make()
            with pytest.raises(ManifestError, match=f"{log}: {said}.*; remove it, or put a copy"):
                open(log, mode, opener=own_file).close()
            log.unlink()
    assert victim.read_text() == "of the user\n"
    assert not (tmp_path / "new").exists()
    with open(log, "ab", opener=own_file) as file:
        file.write(b"ours")
    assert log.read_bytes() == b"ours"


def test_a_folder_on_the_way_that_is_a_link_is_refused(tmp_path):
    """To readers and to writers, wherever it is."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "b").mkdir(parents=True)
    (elsewhere / "b" / "file").write_bytes(b"of the user")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a").symlink_to(elsewhere)
    path = tmp_path / "root" / "a" / "b" / "file"
    uses = (
        lambda: contents(path),
        lambda: open(path, "ab", opener=own_file).close(),
        lambda: write_atomically(path, [b"ours"]),
        lambda: make_folder(path.parent / "c" / "d"),
        lambda: make_folder(tmp_path / "root" / "a"),
        lambda: sync_folder(path.parent),
    )
    for use in uses:
        with pytest.raises(ManifestError, match=rf"root/a: is a link to {elsewhere}, and nothing is read or written"):
            use()
    assert [each.name for each in elsewhere.rglob("*")] == ["b", "file"]
    assert (elsewhere / "b" / "file").read_bytes() == b"of the user"


def test_a_file_that_is_a_link_is_not_read_and_is_replaced(tmp_path):
    victim, link = tmp_path / "victim", tmp_path / "link"
    victim.write_bytes(b"of the user")
    link.symlink_to(victim)
    with pytest.raises(ManifestError, match="is a link, and no link is followed there; put a copy"), opened(link):
        pass
    write_atomically(link, [b"ours"])
    assert (link.is_symlink(), link.read_bytes(), victim.read_bytes()) == (False, b"ours", b"of the user")


def test_links_that_the_user_names_are_followed(tmp_path, monkeypatch):
    (tmp_path / "disk" / "cache").mkdir(parents=True)
    (tmp_path / "disk" / "cache" / "file").write_bytes(b"x")
    (tmp_path / "home").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "mine").symlink_to("cache")
    monkeypatch.chdir(tmp_path / "disk")
    for named in (tmp_path / "home" / "mine", "mine", "../home/cache", "./mine/../mine/"):
        assert contents(local_path(named) / "file") == b"x"
    for plain in ("cache", "../disk/cache", "."):
        assert str(local_path(plain)) == plain, "as the user calls it"


def test_a_relative_path_begins_at_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path in ("a/b/file", "./a/./b//file", Path("a/b/file"), "a/../a/b/file", tmp_path / "a/b/file"):
        with folder_of(path) as (folder, name):
            assert (os.path.samestat(os.fstat(folder), os.stat("a/b")), name) == (True, "file")
    with folder_of("file") as (folder, name):
        assert os.path.samestat(os.fstat(folder), os.stat("."))
    with open("new", "xb", opener=open_unlinked) as file:
        assert os.path.samestat(os.fstat(file.fileno()), os.stat(tmp_path / "new"))


@pytest.mark.parametrize("path", ["missing/file", "file/file", "missing"])
def test_the_error_of_a_missing_folder_names_the_file(tmp_path, path):
    (tmp_path / "file").touch()
    with pytest.raises((FileNotFoundError, NotADirectoryError), match=f"'{tmp_path / path}'$"):
        open(tmp_path / path, "rb", opener=open_unlinked).close()


@only_root
def test_the_error_of_a_closed_folder_names_it(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o700)
    with as_another_user(tmp_path):
        for use in (lambda: sync_folder(tmp_path / "closed"), lambda: make_folder(tmp_path / "new")):
            with pytest.raises(PermissionError, match=rf"'{tmp_path}/(closed|new)'$"):
                use()
