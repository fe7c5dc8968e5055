"""Writers killed at every step they take and at random, on disks that are full: minutes, so `make test-faults`."""

import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fault_scenarios import NEW, OLD, Scenarios, errors_of
from support.faulty_writers import BALLAST, FILL, Fault
from support.places import ROOT
from support.tiny_caches import HOOKS, promised_files

pytestmark = pytest.mark.faults

JOURNAL = "manifest/writer-00.jsonl"
STEPS = ("opening", "writing", "synced", "replaced", "folder", "unlinked")
DISK_BYTES = 4 << 20
FULL_DISK = re.compile(r"No space left on device.*: '/")  # it names the file


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of DISK_BYTES."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", tmp_path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"mount is not permitted: {mounted.stderr.decode().strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def resize(disk: Path, n_bytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={n_bytes}", disk], check=True)


def steps_of(scenarios: Scenarios, name: str, events: Path) -> list[str]:
    """What an uninterrupted run goes through; of steps that differ in hook, split or number the one in the middle."""
    code, said = scenarios.run(name, scenarios.copy(name), events=events)
    assert code == 0, said
    alike: dict[str, list[tuple[int, str]]] = {}
    for number, event in enumerate(dict.fromkeys(events.read_text().splitlines())):
        if event.partition(" ")[0] in STEPS and ".." not in event:
            kind = re.sub(r"\d+|train|validation", "#", event.replace(HOOKS[0], "#").replace(HOOKS[1], "#"))
            alike.setdefault(kind, []).append((number, re.sub(r"\d{9,}", "*", event)))
    return [event for _, event in sorted(found[len(found) // 2] for found in alike.values())]


@pytest.mark.parametrize("name", ["begin", "grow", "add"])
def test_killed_at_every_step(scenarios, name, tmp_path):
    """Each run is killed one step later than the one before it, which left off there."""
    steps, root, n_killed, seen = steps_of(scenarios, name, tmp_path / "events"), scenarios.copy(name), 0, []
    for step in steps:
        code, said = scenarios.run(name, root, fault=Fault(event=step))
        if code == 0:  # the runs before have taken this step
            scenarios.check_finished(name, root)
            root = scenarios.copy(name)
            continue
        assert code == -signal.SIGKILL, said
        n_killed += 1
        seen.append(scenarios.opened(name, root))
    scenarios.finish(name, root)
    print(f"{name}: {n_killed} kills at {len(steps)} steps")
    assert n_killed >= 0.9 * len(steps)


@pytest.mark.parametrize(("name", "n_kills"), [("many", 30), ("grow", 15), ("add", 15)])
def test_two_workers_killed_at_random(scenarios, name, n_kills):
    seed = time.time_ns() % 2**32
    print(f"{name}: seed {seed}")
    n_caches = scenarios.kill_at_random(name, random.Random(seed), n_kills)
    print(f"{name}: {n_kills} kills or more of two workers on {n_caches} caches")


# command, when the disk is full, and what a reader gets then
FULL = [
    ("begin", "writing acts.zarr/train/sequences/id/c/1/0", 1, None),
    ("begin", "opening manifest/plan.json", 1, None),
    ("begin", "writing acts.zarr/train/*/acts/c/1/0", 1, None),
    *(("begin", f"appending {JOURNAL}", count, None) for count in range(1, 7)),  # some need another block of the disk
    ("begin", "opening stats/train/*", 1, None),
    ("begin", "opening acts.zarr/train/zarr.json", 1, None),
    ("begin", "writing manifest/cache.json", 1, None),
    ("begin", "opening log/*", 2, NEW),
    ("grow", "opening acts.zarr/train/sequences/id/c/2/0", 1, OLD),
    ("grow", "linking acts.zarr/train/*/acts/c/*", 1, OLD),
    ("grow", "opening manifest/plan.json", 1, OLD),
    ("grow", "writing acts.zarr/train/*/acts/c/*", 1, OLD),
    ("grow", "writing manifest/cache.json", 1, OLD),
    ("add", "writing acts.zarr/train/*/acts/c/1/0", 1, OLD),
    ("add", "writing manifest/cache.json", 1, OLD),
]


@pytest.mark.parametrize(("name", "event", "count", "opened"), FULL, ids=str)
def test_a_full_disk(scenarios, disk, name, event, count, opened):
    root = scenarios.copy(name, disk)
    code, said = scenarios.run(name, root, fault=Fault(event=event, count=count, action=FILL))
    (error,) = errors_of(said)
    assert (code, bool(FULL_DISK.search(error))) == (1, True), said
    assert not list(root.rglob("*.partial"))
    assert scenarios.opened(name, root) == opened
    again, said = scenarios.run(name, root)
    assert (again, len(errors_of(said))) == ((0, 0) if opened == NEW else (1, 1)), f"it is still full: {said}"
    (root.parent / BALLAST).unlink()
    scenarios.finish(name, root)


def test_a_disk_that_gets_room_little_by_little(scenarios, disk):
    root, codes, errors = scenarios.copy("many", disk), [1], []
    for n_bytes in range(64 << 10, DISK_BYTES, 96 << 10):
        resize(disk, n_bytes)
        code, said = scenarios.run("many", root)
        errors += errors_of(said)
        codes.append(code)
        if code == 0:
            break
        scenarios.opened("many", root)
    assert codes == [1] * (len(codes) - 1) + [0]
    assert len(errors) == len(codes) - 2
    assert any("the disk has" in error for error in errors)
    assert any(FULL_DISK.search(error) for error in errors)
    scenarios.check_finished("many", root)


def test_a_disk_for_reading_only_is_one_line(scenarios, disk):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    code, said = scenarios.writers.run(disk / "c", HOOKS[:1], None)
    (error,) = errors_of(said)
    assert (code, "Read-only file system" in error) == (1, True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_from_the_terminal(scenarios, tmp_path, number, code):
    """To a process that is not forked from anything, while it harvests."""
    arguments = scenarios.writers.arguments(tmp_path / "c", HOOKS, None)
    command = [sys.executable, "-m", "cli", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "c" / JOURNAL
    while process.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.005)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == code, said
    assert len(errors_of(said)) == (number == signal.SIGINT)
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    whole = tmp_path / "whole"
    subprocess.run(
        [*command[:3], *scenarios.writers.arguments(whole, HOOKS, None)], cwd=ROOT, check=True, capture_output=True
    )
    assert promised_files(tmp_path / "c") == promised_files(whole)
