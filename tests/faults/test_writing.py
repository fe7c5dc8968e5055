"""Writers that are killed, interrupted or out of room: what they leave is whole, and the same command goes on."""

import itertools
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fault_scenarios import FEW_TOKENS, NEW, OLD, TOKENS, errors_of
from support.faulty_writers import Fault
from support.forked_commands import Forked
from support.tiny_caches import HOOKS, promised_files

from actcache.store.cache import open_cache

STOP = signal.SIGSTOP
ACTS = f"{HOOKS[0]}/acts/c"
JOURNAL = "manifest/writer-00.jsonl"


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_stopped(writer: Forked) -> bool:
    """By SIGSTOP; a writer that ends before it gets there is an error."""
    assert writer.is_alive(), writer.said
    return Path(f"/proc/{writer.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


# command, what it had come to when it was killed, and what a reader gets then
POINTS = [
    ("begin", "opening manifest/settling.lock", 1, None),  # the folder manifest/ is there, and nothing else
    ("begin", "opening manifest/writer-00.jsonl", 1, None),
    ("begin", "writing acts.zarr/train/sequences/id/c/1/0", 1, None),
    ("begin", f"writing {JOURNAL}", 2, None),
    ("begin", "opening stats/train/*", 1, None),
    ("begin", "replaced acts.zarr/train/zarr.json", 1, None),
    ("begin", "replacing manifest/cache.json", 1, None),
    ("begin", "replaced manifest/cache.json", 1, NEW),
    ("add", f"writing {JOURNAL}", 3, OLD),
    ("add", "replaced acts.zarr/zarr.json", 1, OLD),
    ("grow", "replaced acts.zarr/train/sequences/id/c/2/0", 1, OLD),
    ("grow", "linked manifest/cache.json", 1, OLD),
    ("grow", f"linked acts.zarr/train/{ACTS}/*", 1, OLD),
    ("grow", "folder kept", 2, OLD),  # all is kept, and nothing is replaced
    ("grow", "replaced acts.zarr/train/sequences/id/c/0/0", 1, OLD),
    ("grow", "replaced manifest/plan.json", 1, OLD),
    ("grow", f"replaced acts.zarr/train/{ACTS}/*", 1, OLD),
    ("grow", f"writing {JOURNAL}", 2, OLD),
    ("grow", "replaced stats/train/*", 1, OLD),
    ("grow", "replaced acts.zarr/train/tokens/id/zarr.json", 1, OLD),
    ("grow", "replacing manifest/cache.json", 1, OLD),
    ("grow", "replaced manifest/cache.json", 1, NEW),
]


@pytest.mark.parametrize(("name", "event", "count", "opened"), POINTS, ids=str)
def test_killed_at(scenarios, name, event, count, opened):
    root = scenarios.copy(name)
    code, said = scenarios.run(name, root, fault=Fault(event=event, count=count))
    assert code == -signal.SIGKILL, said
    assert scenarios.opened(name, root) == opened
    scenarios.finish(name, root)


def test_a_killed_worker_leaves_nothing_aside_though_another_goes_on(scenarios):
    """It cannot sweep when it starts again, for it might sweep what the other is writing; the last to go does."""
    root = scenarios.copy("begin")
    other = scenarios.start("begin", root, "--worker", "0/2", fault=Fault(event=f"writing {JOURNAL}", action=STOP))
    wait_until(lambda: is_stopped(other))
    killed = scenarios.start("begin", root, "--worker", "1/2", fault=Fault(event=f"synced acts.zarr/train/{ACTS}/*"))
    assert killed.wait() == -signal.SIGKILL
    assert list((root / "acts.zarr" / "train" / ACTS).rglob("*.partial")), "the stopped one may have others"
    code, said = scenarios.run("begin", root, "--worker", "1/2")
    assert (code, "other workers owe" in said) == (0, True), said
    os.kill(other.pid, signal.SIGCONT)
    assert other.wait() == 0, other.said
    scenarios.check_finished("begin", root)


def test_a_second_writer_gets_one_line_while_the_first_goes_on(scenarios):
    root = scenarios.copy("add")
    first = scenarios.start("add", root, fault=Fault(event=f"writing {JOURNAL}", action=STOP))
    wait_until(lambda: is_stopped(first))
    for more in ((), ("--worker", "0/2")):
        code, said = scenarios.run("add", root, *more)
        (line,) = errors_of(said)
        assert re.fullmatch(
            rf"error: {root}: process {first.pid} on \S+ \(harvests, since .*\) is writing this cache as worker 0; "
            "wait for it",
            line,
        )
        assert code == 1
    assert scenarios.opened("add", root) == OLD
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait() == 0, first.said
    scenarios.check_finished("begin", root)


def test_a_cache_does_not_grow_while_another_process_writes(scenarios):
    root = scenarios.copy("add")
    fault = Fault(event="writing manifest/writer-01.jsonl", action=STOP)
    other = scenarios.start("add", root, "--worker", "1/2", fault=fault)
    wait_until(lambda: is_stopped(other))
    code, said = scenarios.writers.run(root, HOOKS[:1], TOKENS + 100, "--worker", "0/2")
    (line,) = errors_of(said)
    assert line.startswith(f"error: {root}: other processes write this cache (process ")
    assert line.endswith("); wait for them before it grows")
    assert code == 1
    assert scenarios.opened("add", root) == OLD
    os.kill(other.pid, signal.SIGCONT)
    assert other.wait() == 0, other.said
    scenarios.finish("add", root)


def test_workers_that_start_together_grow_the_cache_together(scenarios):
    """Who has yet to read the plan is no obstacle to growth."""
    root = scenarios.copy("grow")
    fault = Fault(event="opening manifest/settling.lock", action=STOP)
    waiting = scenarios.start("grow", root, "--worker", "1/2", fault=fault)
    wait_until(lambda: is_stopped(waiting))
    code, said = scenarios.run("grow", root, "--worker", "0/2")
    assert (code, "other workers owe" in said) == (0, True), said
    os.kill(waiting.pid, signal.SIGCONT)
    assert waiting.wait() == 0, waiting.said
    scenarios.check_finished("begin", root)


def test_everything_is_durable_before_it_is_relied_on(scenarios, tmp_path):
    """A power failure spares a file that was synced before it got its name, in a folder synced after it did."""
    root = scenarios.copy("begin")
    code, said = scenarios.run("begin", root, events=tmp_path / "events")
    assert code == 0, said
    events = (tmp_path / "events").read_text().splitlines()
    for number, event in enumerate(events):
        kind, _, path = event.partition(" ")
        if kind == "replacing":
            assert events[number - 1] == f"synced {path}"
        if kind == "replaced":
            assert events[number + 1] == f"folder {os.path.dirname(path)}"
        if kind == "writing" and path == JOURNAL:
            assert events[number + 1 : number + 3] == [f"syncing {path}", f"synced {path}"]
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        name = os.path.relpath(folder, root)
        below = "opening " if folder == root else f"opening {name}/"
        first = next(number for number, event in enumerate(events) if event.startswith(below))
        before = list(itertools.takewhile(lambda event: event.startswith("folder "), reversed(events[:first])))
        assert f"folder {os.path.relpath(folder.parent, root)}" in before, f"{name} is not durable"


@pytest.mark.parametrize(
    ("name", "event", "opened"),
    [
        ("begin", "writing acts.zarr/train/sequences/id/c/1/0", None),
        ("begin", f"writing {JOURNAL}", None),
        ("grow", "replacing manifest/cache.json", OLD),
    ],
)
def test_ctrl_c_gives_one_line_and_the_same_command_goes_on(scenarios, name, event, opened):
    root = scenarios.copy(name)
    code, said = scenarios.run(name, root, fault=Fault(event=event, action=signal.SIGINT))
    assert (code, errors_of(said)) == (130, ["error: interrupted; the same command goes on from here"])
    assert not list(root.rglob("*.partial"))
    assert scenarios.opened(name, root) == opened
    scenarios.finish(name, root)


def test_sigterm_ends_it_and_the_same_command_goes_on(scenarios):
    root = scenarios.copy("begin")
    fault = Fault(event=f"synced acts.zarr/train/{ACTS}/*", action=signal.SIGTERM)
    code, said = scenarios.run("begin", root, fault=fault)
    assert (code, errors_of(said)) == (-signal.SIGTERM, [])
    scenarios.finish("begin", root)


@pytest.mark.parametrize(
    ("file_bytes", "where"),
    [(300, "sequences"), (12000, JOURNAL), (17000, "manifest/cache.json")],
)
def test_a_file_that_must_not_grow_stops_it_cleanly(scenarios, file_bytes, where):
    """As a full disk does, at every stage, without the right to mount one."""
    root = scenarios.copy("many")
    code, said = scenarios.run("many", root, file_bytes=file_bytes)
    (error,) = errors_of(said)
    assert (code, "File too large: " in error, where in error) == (1, True, True), said
    assert not list(root.rglob("*.partial"))
    assert scenarios.opened("many", root) is None
    journal = b"".join(path.read_bytes() for path in root.glob(JOURNAL))
    n_kept = journal.count(b"\n")
    assert n_kept == len(journal.splitlines()), "no line is torn"
    assert (n_kept > 0) == (where != "sequences")
    said = scenarios.finish("many", root)
    n_shards = sum(len(shards) for shards in open_cache(root).manifest.shards.values())
    assert (f"{n_shards - n_kept} shards, " in said) == (n_kept < n_shards), "nothing finished is done again"


@pytest.mark.parametrize("out", ["/proc/cache", "{file}/cache", "{file}"])
def test_an_unwritable_place_is_one_line(scenarios, tiny_texts, out):
    root = Path(out.format(file=tiny_texts))
    code, said = scenarios.run("begin", root)
    (error,) = errors_of(said)
    assert (code, str(root) in error) == (1, True), said


@pytest.mark.parametrize("name", ["many", "grow", "add"])
def test_two_workers_killed_at_random(scenarios, name):
    assert scenarios.kill_at_random(name, random.Random(name), n_kills=2) >= 1


@pytest.mark.parametrize(
    ("name", "event"),
    [("begin", "opening manifest/plan.json"), ("grow", "replaced acts.zarr/train/sequences/id/c/2/0")],
)
def test_killed_for_many_tokens_it_can_still_have_few(scenarios, name, event):
    """Before there is a plan for the many, nothing binds."""
    few = scenarios.command("grow").states[OLD]
    root = scenarios.copy(name)
    assert scenarios.run(name, root, fault=Fault(event=event))[0] == -signal.SIGKILL
    code, said = scenarios.writers.run(root, HOOKS[:2], FEW_TOKENS)
    assert code == 0, said
    assert promised_files(root) == few


def test_a_plan_that_cannot_be_written_leaves_a_cache_that_can_be_begun(scenarios):
    """The packed sequences are there by then: this is no folder of something else."""
    root = scenarios.copy("begin")
    fault = Fault(event="opening manifest/plan.json", action=signal.SIGINT)
    code, said = scenarios.run("begin", root, fault=fault)
    assert code == 130, said
    scenarios.finish("begin", root)
