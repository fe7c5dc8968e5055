"""Another user of the same machine, who may read what everybody may, and has some files of his own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NOBODY = 65534
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@contextmanager
def as_another_user(*folders: Path) -> Iterator[None]:
    """Be that user meanwhile. The folders above `folders` may be entered, and these may be read and not written.

    Those above stay open: another worker of the same run of pytest may be here, and need them.
    """
    for path in {above for folder in folders for above in folder.parents}:
        path.chmod(path.stat().st_mode | 0o055)
    modes = {folder: folder.stat().st_mode for folder in folders}
    for folder, mode in modes.items():
        folder.chmod(mode | 0o055)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        for folder, mode in modes.items():
            folder.chmod(mode)


def given(folder: Path) -> Path:
    """The folder, which belongs to that user from now on with all that it holds."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    return folder


@contextmanager
def copy_of_another_user(folder: Path) -> Iterator[Path]:
    """A copy that belongs to that user, where that user may go."""
    with tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o755)
        yield given(shutil.copytree(folder, Path(home) / "c"))
