"""What this process may use of its machine: cores, memory and threads.

The machine itself is only the widest limit. A container, or a scheduler such as Slurm, gives a job some of the cores
and a control group (cgroup) with less memory. A shell may limit a process too (`ulimit -v`, `ulimit -d`, `ulimit -u`).
A process that goes beyond is refused memory or threads, or is killed.
"""

from __future__ import annotations

import errno
import functools
import math
import os
import re
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROCESS = Path("/proc/self")
SCARCE_BYTES = 64 << 20  # with less room than this, an error of any kind may be for want of memory
NO_LIMIT = 1 << 60  # version 1 of control groups says so by a number near 2^63
THREAD_BYTES = 16 << 20  # a thread's stack of 8 MiB, and what it takes to begin
# What libraries say where they run out of memory or threads, in errors of many types.
_OUT_OF = re.compile(
    "can't start new thread|can.?t allocate memory|cannot allocate memory|not enough memory|out of memory|bad_alloc|"
    "failed to map segment from shared object|failed to allocate|unable to allocate|pthread_create",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRoom:
    """How much more memory this process may take.

    Attributes:
        n_bytes: bytes that it may still take.
        limit_bytes: bytes that all whom the limit holds may have together; the process alone under `ulimit`.
        limit: what sets the limit, in words.
    """

    n_bytes: int
    limit_bytes: int
    limit: str

    def __str__(self) -> str:
        return f"{self.n_bytes / 1e9:.2f} GB are left of the {self.limit_bytes / 1e9:.2f} GB of {self.limit}"


def cores() -> int:
    """How many cores this process may use: those that it may run on, or fewer if its control group gives less time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min([allowed or 1, *(max(1, math.ceil(quota)) for quota in _core_quotas())])


def memory_room() -> MemoryRoom:
    """The room under the limit that is reached first."""
    return _least(_machine_room(), *_group_rooms(), *_process_rooms())


def room_to_live() -> MemoryRoom:
    """The room before the kernel ends a process without a word. Under `ulimit` it refuses memory, which is an error."""
    return _least(_machine_room(), *_group_rooms())


def resident_bytes(*, forget_peak: bool = False) -> tuple[int, int]:
    """(now, at most until now): the memory that this process takes, what it maps included.

    forget_peak: let what later calls tell be the most from now on, where the kernel does so.
    """
    if forget_peak:
        with suppress(OSError):
            (PROCESS / "clear_refs").write_text("5")
    found = _fields(PROCESS / "status")
    return found.get("VmRSS", 0), found.get("VmHWM", 0)


def require_memory(n_bytes: int, what: str) -> None:
    """Raise MemoryError if there is less room than n_bytes and SCARCE_BYTES.

    It stands before libraries that end the whole process where they get no memory.

    Args:
        n_bytes: what the work takes.
        what: the work, for the message.
    """
    if memory_room().n_bytes < n_bytes + SCARCE_BYTES:
        raise MemoryError(f"{what} may take {(n_bytes + SCARCE_BYTES) / 1e9:.2f} GB")


def require_memory_for_array(n_bytes: int, what: str) -> None:
    """Raise MemoryError if there is no room for an array, unless it is small.

    Its memory is taken as it is filled. If there is none then, the kernel ends the process without a word.

    Args:
        n_bytes: the size of the array.
        what: what it holds, for the message.
    """
    if n_bytes > SCARCE_BYTES:
        require_memory(n_bytes, what)


def json_memory(text: bytes) -> int:
    """Bytes that the values of a JSON text take at most, by what it opens and parts: `{},` is three, and takes 72."""
    sizes = {b"[": 96, b"{": 248, b",": 80, b":": 160}
    return 2 * len(text) + sum(size * text.count(mark) for mark, size in sizes.items())


def threads_that_fit(n_threads: int) -> int:
    """`n_threads`, or fewer where memory is short. Raises MemoryError if there is no room for one.

    Python and libraries wait for ever for a thread that got no memory to begin. So there must be room for each.
    """
    n_fit = memory_room().n_bytes // THREAD_BYTES
    if n_fit == 0:
        raise MemoryError(f"a thread may take {THREAD_BYTES / 1e9:.2f} GB")
    return min(n_threads, n_fit)


def thread_pool(n_threads: int, name: str) -> ThreadPoolExecutor:
    """A pool of as many threads as fit. Raises MemoryError if none does."""
    return ThreadPoolExecutor(threads_that_fit(n_threads), name)


def thread_limits() -> tuple[str, ...]:
    """The limits on the number of threads, in words."""
    user, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    groups = [(folder, _number(folder / "pids.max")) for folder in _group_folders("pids")]
    ours = () if user == resource.RLIM_INFINITY else (f"ulimit -u allows {user} threads of this user",)
    return (*ours, *(f"{folder} allows {limit} threads" for folder, limit in groups if limit is not None))


def lacked(error: BaseException) -> BaseException | None:
    """The first error, among those that led to `error`, which says that memory or threads ran out; None if none does.

    Libraries tell it in errors of many types, and code between wraps these.
    """
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__ or link.__context__
    return next(filter(_says_lack, reversed(links)), None)


def _says_lack(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or _OUT_OF.search(str(error)) is not None


def _least(*rooms: MemoryRoom) -> MemoryRoom:
    return min(rooms, key=lambda room: room.n_bytes)


def _machine_room() -> MemoryRoom:
    found = _fields(Path("/proc/meminfo"))
    total = found.get("MemTotal", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return MemoryRoom(n_bytes=found.get("MemAvailable", total), limit_bytes=total, limit="this machine")


def _process_rooms() -> Iterator[MemoryRoom]:
    """What `ulimit` leaves. Both count memory that is reserved, touched or not."""
    for number, field, limit in (
        (resource.RLIMIT_AS, "VmSize", "address space (ulimit -v)"),
        (resource.RLIMIT_DATA, "VmData", "data (ulimit -d)"),
    ):
        allowed, _ = resource.getrlimit(number)
        if allowed != resource.RLIM_INFINITY:
            used = _fields(PROCESS / "status").get(field, 0)
            yield MemoryRoom(n_bytes=max(0, allowed - used), limit_bytes=allowed, limit=limit)


def _group_rooms() -> Iterator[MemoryRoom]:
    """What the control groups leave. Pages of files count as free, because the kernel drops them when it must."""
    for folder in _group_folders("memory"):
        found = {name: _number(folder / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")}
        limits = {name: allowed for name, allowed in found.items() if allowed is not None and allowed < NO_LIMIT}
        if not limits:  # most groups: what they use, which takes longer to read, does not matter
            continue
        usage = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        pages = _fields(folder / "memory.stat")
        of_files = sum(pages.get(f"total_{name}", pages.get(name, 0)) for name in ("inactive_file", "active_file"))
        for name, allowed in limits.items():
            left = max(0, min(allowed, allowed - usage + of_files))
            yield MemoryRoom(n_bytes=left, limit_bytes=allowed, limit=f"the control group {folder} ({name})")


def _core_quotas() -> Iterator[float]:
    """How many cores' time each control group gives, where it gives less than all."""
    for folder in _group_folders("cpu"):
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        both = _text(folder / "cpu.max").split()
        if len(both) == 2 and both[0] != "max":
            quota, period = map(int, both)
        if quota is not None and quota > 0 and period:
            yield quota / period


def _group_folders(controller: str) -> Iterator[Path]:
    """The folders of the control groups that hold this process: of its own and, upward, of all that can be seen.

    Version 1 has a tree for each controller, version 2 one tree for all. In a container the top of the tree that is
    mounted may be the container's own group.
    """
    yield from _folders_of(controller, _text(PROCESS / "cgroup"), _text(PROCESS / "mountinfo"))


@functools.lru_cache(maxsize=8)
def _folders_of(controller: str, cgroup: str, mountinfo: str) -> tuple[Path, ...]:
    """What `_group_folders` yields, by the text of the kernel's two files."""
    groups = {
        name: path
        for _, names, path in (line.split(":", 2) for line in cgroup.splitlines())
        for name in names.split(",")
    }
    found: list[Path] = []
    for line in mountinfo.splitlines():
        mount, _, kind = line.partition(" - ")
        is_one_tree = kind.startswith("cgroup2 ")
        path = groups.get("" if is_one_tree else controller)
        if path is None or not (is_one_tree or (kind.startswith("cgroup ") and controller in re.split("[ ,]", kind))):
            continue
        top, folder = (PurePosixPath(part) for part in mount.split()[3:5])
        inside = PurePosixPath(path).relative_to(top).parts if PurePosixPath(path).is_relative_to(top) else ()
        if ".." not in inside:
            found += [Path(folder, *inside[:depth]) for depth in range(len(inside), -1, -1)]
    return tuple(found)


def _fields(path: Path) -> dict[str, int]:
    """The numbers of a file of the kernel that has a name and a number on each line. In bytes, where it says kB."""
    lines = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {
        words[0]: int(words[1]) * (1024 if words[-1] == "kB" else 1)
        for words in lines
        if len(words) > 1 and words[1].isdigit()
    }


def _number(path: Path) -> int | None:
    """The number that a file holds; None if there is no file, or if it holds none, such as `max`."""
    text = _text(path).strip()
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _text(path: Path) -> str:
    """What a file of the kernel says; nothing if it is missing or closed to us."""
    try:
        return path.read_text()
    except OSError:
        return ""
