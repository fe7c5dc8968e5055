"""Parts of a benchmark, each in a process of its own, for time on a GPU is dear: what goes wrong costs one row.

A part may raise, hang, or leave its process or the device's context broken, as a kernel that has never run may. None of
that reaches the next part, which gets a fresh process and a fresh context.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any

Row = dict[str, Any]
PROCESSES = multiprocessing.get_context("forkserver")  # CUDA cannot be used in a fork of a process that has used it


class Parts:
    """Runs the parts one after another and keeps their rows.

    found: the rows so far, nested by the names of the parts; that of a part without result is {"error": why}.
    failed: the names of the rows that hold an error.
    """

    def __init__(self, say: Callable[[str], None], *, seconds: float, part_seconds: float) -> None:
        """seconds: what all parts may take together. part_seconds: what one of them may take."""
        self.found, self.failed = dict[str, Any](), list[str]()
        self._say, self._part_seconds = say, part_seconds
        self._end, self._why = time.monotonic() + seconds, "the time for all parts was over"

    def measure(self, part: Callable[[], Row], *names: str) -> Row:
        """Run one part, picklable, and put what it returns under its names."""
        try:
            row = self._row(part)
        except Exception as error:  # whatever a machine that has no process left to give may raise
            row = _error(error)
        rows = self.found
        for name in names[:-1]:
            rows = rows.setdefault(name, {})
        rows[names[-1]] = row
        if "error" in row:
            self.failed.append(", ".join(names))
        self._say(f"{', '.join(names)}: {json.dumps(row)}")
        return row

    def _row(self, part: Callable[[], Row]) -> Row:
        if time.monotonic() >= self._end:
            return {"error": f"not begun: {self._why}"}
        receiver, sender = Pipe(duplex=False)
        process = PROCESSES.Process(target=_send, args=(sender, part), daemon=True)
        process.start()
        sender.close()
        end = time.monotonic() + self._part_seconds
        try:
            while not receiver.poll(0.1):  # a signal may bring the end of all forward meanwhile
                if time.monotonic() >= self._end:
                    return {"error": f"stopped: {self._why}"}
                if time.monotonic() >= end:
                    return {"error": f"stopped after the {self._part_seconds} s that a part may take"}
            row = json.loads(receiver.recv())
            process.join(timeout=5)
            return row
        except EOFError:
            process.join(timeout=5)
            return {"error": f"its process ended with exit code {process.exitcode}"}
        finally:
            process.kill()
            process.join(timeout=5)  # a process whose driver hangs may stay longer

    def report(self, measure_all: Callable[[Parts], None]) -> int:
        """Measure, and print what was found as one JSON object; 0 if nothing failed.

        SIGINT and SIGTERM stop the part that runs, and no other begins. An error between the parts ends the measuring,
        but not before that is printed.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        try:
            measure_all(self)
        finally:
            print(json.dumps({**self.found, "failed": self.failed}, allow_nan=False), flush=True)
        return 1 if self.failed else 0

    def _stop(self, number: int, _: object) -> None:
        self._end, self._why = time.monotonic(), f"interrupted by {signal.Signals(number).name}"


def _send(sender: Connection, part: Callable[[], Row]) -> None:
    """Run a part in its own process and send its row as JSON, which has no NaN."""
    os.dup2(2, 1)  # what a part prints must not come between the lines of the report
    try:
        row = json.dumps(part(), allow_nan=False)
    except Exception as error:  # whatever a peer, a driver or a kernel that never ran raises
        traceback.print_exc()
        row = json.dumps(_error(error))
    sender.send(row)


def _error(error: Exception) -> Row:
    return {"error": f"{type(error).__name__}: {error}"}
