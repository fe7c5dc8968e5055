"""The command line, called as a person would."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

import pytest


def actcache(*args: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command's `main` here, for a process spends seconds on imports; its exit code must be `code`."""
    import cli

    argv = ["actcache", *map(str, args)]
    stdout, stderr = io.StringIO(), io.StringIO()
    streams = redirect_stdout(stdout), redirect_stderr(stderr)
    with mock.patch.object(sys, "argv", argv), streams[0], streams[1], pytest.raises(SystemExit) as ended:
        cli.main()
    done = subprocess.CompletedProcess(argv, ended.value.code or 0, stdout.getvalue(), stderr.getvalue())
    assert done.returncode == code, done.stderr
    return done
