"""How many bytes a call reads and writes, by any system call of this process."""

from collections.abc import Callable
from pathlib import Path


def bytes_read_and_written(call: Callable[[], object]) -> tuple[int, int]:
    """The bytes that reads and writes of this process moved while `call` ran, page cache or not (Linux)."""
    before = _counts()
    call()
    after = _counts()
    return after["rchar"] - before["rchar"], after["wchar"] - before["wchar"]


def _counts() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}
