"""A file system without locks."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest


def forbid_locks(monkeypatch: pytest.MonkeyPatch, folder: Path, code: int = errno.ENOLCK) -> None:
    """Let flock say of every file below `folder` that there are none."""
    real = fcntl.flock

    def flock(file: object, kind: int) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_relative_to(folder):
            raise OSError(code, os.strerror(code))
        real(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
