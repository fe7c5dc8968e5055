"""Cores and memory under real limits of this process, and under control groups as the kernel describes them."""

import json
import mmap
import os
import resource
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.places import CHILD
from support.surroundings import address_space, control_group, limited

from actcache.machine import limits as machine
from actcache.machine.limits import cores, lacked, memory_room, thread_limits

GIB = 1 << 30


def test_cores_are_those_that_the_process_may_run_on():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert 1 <= cores() <= len(before)


@pytest.mark.parametrize(
    ("which", "field", "words"),
    [(resource.RLIMIT_AS, "VmSize", "ulimit -v"), (resource.RLIMIT_DATA, "VmData", "ulimit -d")],
)
def test_what_ulimit_leaves_is_what_can_be_mapped(which: int, field: str, words: str):
    lines = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    with limited(which, used + GIB // 4):
        room = memory_room()
        with pytest.raises(OSError, match="Cannot allocate memory"):
            mmap.mmap(-1, room.n_bytes + (8 << 20), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mmap.mmap(-1, room.n_bytes - (8 << 20), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    assert words in str(room)
    assert room.limit_bytes == used + GIB // 4
    assert memory_room().limit_bytes != room.limit_bytes


def test_without_a_limit_it_is_what_the_machine_has_available():
    available = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    assert memory_room().n_bytes <= 1.2 * available


def described(folder: Path, groups: str, mounts: str, files: dict[str, str]) -> None:
    """Lay out what the kernel would say below `folder`; {top} in the mounts stands for `folder`."""
    (folder / "proc").mkdir()
    (folder / "proc" / "cgroup").write_text(groups)
    (folder / "proc" / "mountinfo").write_text(mounts.format(top=folder))
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


ONE_TREE = "30 23 0:26 / {top}/sys rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
IN_A_CONTAINER = "30 23 0:26 /docker/ab {top}/sys ro,nosuid - cgroup2 cgroup ro\n"
TREES = (
    "30 23 0:26 / {top}/sys/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
    "31 23 0:27 / {top}/sys/memory rw - cgroup cgroup rw,memory\n"
)
MEBI = 1 << 20
GROUPS = {
    "a job of Slurm": (
        "0::/slurm/job_7/step_0\n",
        ONE_TREE,
        {
            "sys/slurm/job_7/memory.max": f"{400 * MEBI}\n",
            "sys/slurm/job_7/memory.current": f"{300 * MEBI}\n",
            "sys/slurm/job_7/memory.stat": f"anon 7\ninactive_file {50 * MEBI}\nactive_file {10 * MEBI}\n",
            "sys/slurm/job_7/step_0/memory.max": "max\n",
            "sys/slurm/job_7/step_0/memory.current": f"{300 * MEBI}\n",
            "sys/slurm/job_7/cpu.max": "100000 100000\n",
            "sys/slurm/job_7/step_0/cpu.max": "max 100000\n",
        },
        160 * MEBI,
    ),
    "a soft limit": (
        "0::/\n",
        ONE_TREE,
        {"sys/memory.high": f"{300 * MEBI}\n", "sys/memory.current": f"{100 * MEBI}", "sys/cpu.max": "50000 100000\n"},
        200 * MEBI,
    ),
    "a container that sees its own group": (
        "0::/docker/ab/app\n",
        IN_A_CONTAINER,
        {
            "sys/memory.max": f"{256 * MEBI}\n",
            "sys/memory.current": f"{56 * MEBI}\n",
            "sys/cpu.max": "10000 100000\n",
        },
        200 * MEBI,
    ),
    "a tree for each controller": (
        "4:memory:/job\n3:cpu,cpuacct:/job\n0::/\n",
        TREES,
        {
            "sys/memory/job/memory.limit_in_bytes": f"{400 * MEBI}\n",
            "sys/memory/job/memory.usage_in_bytes": f"{300 * MEBI}\n",
            "sys/memory/job/memory.stat": f"active_file 5\ntotal_active_file {60 * MEBI}\ntotal_inactive_file 0\n",
            "sys/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/cpu/job/cpu.cfs_quota_us": "100000\n",
            "sys/cpu/job/cpu.cfs_period_us": "100000\n",
            "sys/cpu/cpu.cfs_quota_us": "-1\n",
        },
        160 * MEBI,
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_control_groups_limit_memory_and_cores(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The group of the process and every one above it count. Pages of files can be had back."""
    groups, mounts, files, left = GROUPS[name]
    described(tmp_path, groups, mounts, files)
    monkeypatch.setattr(machine, "PROCESS", tmp_path / "proc")
    assert memory_room().n_bytes == left
    assert str(tmp_path / "sys") in memory_room().limit
    assert cores() == 1


def test_a_system_without_control_groups_has_no_such_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected = memory_room().limit
    monkeypatch.setattr(machine, "PROCESS", tmp_path / "none")
    assert memory_room().limit == expected
    assert cores() == len(os.sched_getaffinity(0))


def test_a_process_in_a_small_control_group_has_little_room():
    code = (
        "import sys; open(sys.argv[1], 'w').write('0')\n"
        "from actcache.machine.limits import memory_room\n"
        "room = memory_room()\n"
        "print(room.limit_bytes, room.n_bytes, room.limit)"
    )
    with control_group(64 * MEBI) as group:
        asked = [sys.executable, "-c", code, str(group / "cgroup.procs")]
        done = subprocess.run(asked, capture_output=True, text=True, env=CHILD, check=True)
    limit_bytes, n_bytes, limit = done.stdout.split(maxsplit=2)
    assert int(limit_bytes) == 64 * MEBI
    assert 16 * MEBI < int(n_bytes) < 64 * MEBI
    assert str(group) in limit


def test_the_peak_is_of_what_came_after_it_was_forgotten():
    def touch(n_bytes: int) -> None:
        with mmap.mmap(-1, n_bytes) as fresh:  # an allocator may have pages left from before
            fresh[:: mmap.PAGESIZE] = bytes(n_bytes // mmap.PAGESIZE)

    touch(64 << 20)
    before, _ = machine.resident_bytes(forget_peak=True)
    touch(32 << 20)
    _, peak = machine.resident_bytes()
    assert 30 << 20 < peak - before < 50 << 20


def test_work_that_may_not_fit_is_refused_before_it_begins():
    room = memory_room().n_bytes
    machine.require_memory(0, "little")
    with pytest.raises(MemoryError, match=r"tokenising may take \d+\.\d\d GB"):
        machine.require_memory(room + GIB, "tokenising")


def test_a_large_array_is_refused_and_a_small_one_is_not_looked_at():
    with address_space(96 * MEBI):
        machine.require_memory_for_array(64 * MEBI, "rows")
        with pytest.raises(MemoryError, match=r"^rows may take 0\.17 GB$"):
            machine.require_memory_for_array(100 * MEBI, "rows")


def test_limits_that_refuse_memory_end_no_process():
    before = machine.room_to_live()
    with address_space(64 * MEBI):
        assert machine.room_to_live().limit == before.limit
        assert machine.memory_room().n_bytes < 64 * MEBI + 1


def test_a_pool_has_no_thread_that_memory_is_too_short_for():
    """Under a real limit: of two threads one, and then none. A thread without memory would be waited for for ever."""
    for room, n_threads in ((machine.THREAD_BYTES * 3 // 2, 1), (GIB, 2)):
        with address_space(room), machine.thread_pool(2, "test") as pool:
            assert pool._max_workers == n_threads
            assert list(pool.map(abs, [-1, -2])) == [1, 2]
    with address_space(machine.THREAD_BYTES // 2), pytest.raises(MemoryError, match="a thread"):
        machine.thread_pool(2, "test")


def test_limits_on_threads_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    described(tmp_path, "0::/job\n", ONE_TREE, {"sys/job/pids.max": "100\n", "sys/pids.max": "max\n"})
    monkeypatch.setattr(machine, "PROCESS", tmp_path / "proc")
    with limited(resource.RLIMIT_NPROC, 12345):
        assert thread_limits() == (
            "ulimit -u allows 12345 threads of this user",
            f"{tmp_path}/sys/job allows 100 threads",
        )


def start_a_huge_thread() -> None:
    before = threading.stack_size(1 << 46)
    try:
        threading.Thread(target=print).start()
    finally:
        threading.stack_size(before)


HUGE = 1 << 46
TOO_MUCH: dict[str, Callable[[], object]] = {
    "python": lambda: bytearray(HUGE),
    "numpy": lambda: np.empty(HUGE, dtype=np.uint8),
    "torch": lambda: torch.empty(HUGE, dtype=torch.uint8),
    "mmap": lambda: mmap.mmap(-1, HUGE),
    "thread": start_a_huge_thread,
}


@pytest.mark.parametrize("what", TOO_MUCH)
def test_errors_of_every_library_are_known(what: str):
    with pytest.raises(Exception, match=r".*") as caught:
        TOO_MUCH[what]()
    assert lacked(caught.value) is caught.value
    wrapped, suppressed = ValueError("cannot be read"), ValueError("cannot be read")
    wrapped.__cause__, suppressed.__context__ = caught.value, caught.value
    assert lacked(wrapped) is lacked(suppressed) is caught.value


@pytest.mark.parametrize(
    "error", [ValueError("k must be at most 5"), FileNotFoundError(2, "No such file"), RuntimeError("diverged")]
)
def test_other_errors_are_no_lack(error: Exception):
    error.__context__ = error  # a circle ends
    assert lacked(error) is None


DENSE = [
    "{},",
    "[],",
    '{"":{}},',
    '{"a":{"b":1}},',
    "[[[[]]]],",
    "[0],",
    "1e9,",
    "1234567890,",
    '"ab",',
    '"a\\u1234bc",',
]


@pytest.mark.parametrize("values", [*DENSE, '{"a":1,"b":2,"cdefgh":0.5},'])
def test_the_values_of_a_text_take_no_more_than_is_said(values):
    text = f"[{values * 10_000}0]".encode()
    tracemalloc.start()
    held = json.loads(text)
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(held) == 10_001
    assert taken <= machine.json_memory(text) < 8 * taken
