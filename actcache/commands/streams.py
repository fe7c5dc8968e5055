"""`standard_streams`: stdout and stderr of the command line, on which a write never fails where it stands.

What is said on stderr is for a person. A full disk or a reader that has gone must not end the work that it speaks of,
so an error there is left out. What is printed on stdout is the result. An error there is kept until the command has
ended, and decides its exit code.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

FAILED, READER_GONE = 1, 141  # 141 is what a shell tells of `cat` whose reader has gone
OPEN_AS = {0: os.O_RDONLY, 1: os.O_RDONLY, 2: os.O_WRONLY}  # so that a write to a closed stdout stays an error


@contextmanager
def standard_streams() -> Iterator[None]:
    """Run the command line with such streams, and raise SystemExit with its exit code.

    The code is that of the command. If the command is well but its result could not be written, it is READER_GONE
    without a word for a closed pipe, and FAILED with one line for everything else. Streams that somebody has put in
    place of the process's own stay as they are.
    """
    _fill_closed_descriptors()
    output = _Unfailing(1, "w", closefd=False) if sys.stdout is sys.__stdout__ else None
    if output is not None:
        sys.stdout = _text(output, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(_Unfailing(2, "w", closefd=False), sys.stderr)
    try:
        yield
    except SystemExit as ended:
        if ended.code or output is None:
            raise
    if output is None:
        return
    sys.stdout.flush()
    if isinstance(output.error, BrokenPipeError):
        raise SystemExit(READER_GONE)
    if output.error is not None:
        print(f"error: stdout cannot be written ({output.error.strerror}); send it elsewhere", file=sys.stderr)
        raise SystemExit(FAILED)
    raise SystemExit(0)


class _Unfailing(io.FileIO):
    """A descriptor that takes every write. error: the first one that failed."""

    error: OSError | None = None

    def write(self, b: Any, /) -> int:
        try:
            written = super().write(b)
        except OSError as error:
            self.error = self.error or error
            written = None  # also what a pipe says that must not block and is full
        return memoryview(b).nbytes if written is None else written


def _text(raw: _Unfailing, like: TextIO | None) -> io.TextIOWrapper:
    """A text stream over the descriptor, set up like the one that it replaces, which is None if it was closed."""
    errors = like.errors if like is not None else "backslashreplace"
    encoding = like.encoding if like is not None else "utf-8"
    lines = raw.fileno() == 2 or raw.isatty()
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors=errors, line_buffering=lines)


def _fill_closed_descriptors() -> None:
    """Open what was closed (`2>&-`): else the next file that is opened gets its number, and what is said is in it."""
    for descriptor, flags in OPEN_AS.items():
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, flags)  # takes the lowest number that is free, which is this one
