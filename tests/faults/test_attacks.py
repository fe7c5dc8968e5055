"""Caches, runs and SAE folders of a stranger who means harm: whoever opens them gets the right result or one line.

Whole trees are changed at random: links, pipes, holes of 100 GB, other files in their place, values of sealed JSON.
Meanwhile nothing outside of the tree may be written or removed, no code may run, and each command has 20 seconds and
2 GiB of memory.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.forked_commands import Commands, leave_address_space
from support.repairs import changed, stamps
from support.tiny_caches import harvest_tiny
from support.tiny_reports import add_run_with_features

from actcache.format.seal import seal, unseal

pytestmark = pytest.mark.faults

N_ATTACKS = 300
SECONDS, BYTES = 20, 2 << 30
NEW_HOOK = "blocks.0.hook_mlp_out"
TEXTS = (
    "$(touch CANARY)",
    "../../victim",
    "/etc/passwd",
    "x\x1b[2J\nmodel        forged",
    "",
    "x" * 100_000,
    "\ud800",
    "a\0b",
)
NUMBERS = (None, True, -1, 0, 1 << 40, 1 << 62, 10**4000, 1e308, float("nan"), [], {}, [[]], {"a": {}})


def limited() -> None:
    """In the process of the command."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    leave_address_space(BYTES)
    signal.alarm(SECONDS)


@pytest.fixture(scope="module")
def sound(tiny_model, tiny_texts, tmp_path_factory) -> Path:
    """A cache, a run with features and an SAE folder, which nobody has touched."""
    inside = tmp_path_factory.mktemp("sound") / "inside"
    cache = harvest_tiny(tiny_model, tiny_texts, inside / "cache", tokens=1600, holdout=0.4)
    add_run_with_features(inside / "runs", "topk", cache, tiny_model)
    return inside


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> Commands:
    return Commands(tmp_path_factory.mktemp("said"))


def uses(inside: Path, out: Path, model: Path, texts: Path) -> dict[str, list[object]]:
    """What somebody does with the folders, as it is typed."""
    cache, runs = inside / "cache", inside / "runs"
    run, on = runs / "topk", ("--device", "cpu")
    harvested = ("--model", model, "--dataset", texts, "--context-size", 16, "--holdout", 0.4, "--tokens", 1600)
    return {
        "info": ["info", cache],
        "verify": ["verify", cache],
        "sample": ["verify", cache, "--sample-model", "--sequences", 2, *on],
        "repair": ["repair", cache, *on],
        "harvest": ["harvest", *harvested, "--hook", NEW_HOOK, "--out", cache, *on],
        "relabel": ["relabel", cache, "--native-bf16"],
        "export-cache": ["export-cache", cache, "--out", out / "arrow"],
        "eval": ["eval", runs, "--cache", cache, *on],
        "features": ["features", run, "--cache", cache, *on],
        "report": ["report", runs, "--out", out / "report.html"],
        "export": ["export", run, "--out", out / "sae"],
        "neuronpedia": ["export", run, "--format", "neuronpedia", "--out", out / "np"],
        "similar": ["similar", run, run, *on],
        "import": ["import", run / "sae", "--out", out / "imported"],
    }


def paths_of(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a tree of JSON values."""
    yield path
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, below in items:
        yield from paths_of(below, (*path, key))


def replaced(values: Any, path: tuple[Any, ...], value: object) -> Any:
    if not path:
        return value
    copy = dict(values) if isinstance(values, dict) else list(values)
    copy[path[0]] = replaced(copy[path[0]], path[1:], value)
    return copy


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def change_json(path: Path, rng: random.Random) -> str:
    """One value of a JSON file, or of a line of it, becomes a hostile one; its seal is right."""
    lines = path.read_bytes().splitlines(keepends=True)
    number = rng.randrange(len(lines)) if path.suffix == ".jsonl" else None
    text = path.read_bytes() if number is None else lines[number]
    is_sealed = b'"crc32c":"' in text
    values = unseal(text, path) if is_sealed else json.loads(text)
    where, value = rng.choice([*paths_of(values)]), rng.choice([*TEXTS, *NUMBERS])
    hostile = replaced(values, where, value)
    if rng.random() < 0.1:
        new, value = nested(100_000).encode() + b"\n", "nested"
    elif is_sealed and isinstance(hostile, dict):
        try:
            new = seal(hostile)
        except (ValueError, TypeError):  # what no seal can have
            new = json.dumps(hostile).encode() + b"\n"
    else:
        new = json.dumps(hostile).encode() + b"\n"
    path.write_bytes(new if number is None else b"".join([*lines[:number], new, *lines[number + 1 :]]))
    return f"{where} = {value!r:.60}"


def attack(inside: Path, world: Path, rng: random.Random) -> str:
    """Change one or more things in the tree; says what."""
    files = sorted(
        path for path in inside.rglob("*") if path.is_file() and not path.is_symlink() and path.stat().st_size
    )
    path, said = rng.choice(files), []
    kinds = [
        "symlink",
        "hard link",
        "pipe",
        "device",
        "hole",
        "cut",
        "bytes",
        "swap",
        "folder link",
        "folder",
        *["json"] * 8,
    ]
    for _ in range(rng.choice([1, 1, 2])):
        kind = rng.choice(kinds)
        if kind == "json":
            path = rng.choice([each for each in files if each.suffix in (".json", ".jsonl") and each.is_file()])
            try:
                said.append(f"{path.relative_to(inside)}: {change_json(path, rng)}")
            except (ValueError, OSError, RecursionError):  # it was changed before
                continue
            continue
        path = rng.choice(files)
        if not path.is_file():
            continue
        said.append(f"{kind}: {path.relative_to(inside)}")
        if kind == "symlink":
            path.unlink()
            path.symlink_to(world / "victim")
        elif kind == "hard link":
            path.unlink()
            os.link(world / "victim", path)
        elif kind == "pipe":
            path.unlink()
            os.mkfifo(path)
        elif kind == "device":
            path.unlink()
            path.symlink_to("/dev/zero")
        elif kind == "hole":
            os.truncate(path, 100 << 30)
        elif kind == "cut":
            os.truncate(path, rng.randrange(path.stat().st_size + 1))
        elif kind == "bytes":
            path.write_bytes(rng.randbytes(rng.randrange(1, 5000)))
        elif kind == "swap":
            shutil.copy(rng.choice([each for each in files if each.is_file() and each.stat().st_size < 1 << 30]), path)
        elif kind == "folder":
            path.unlink()
            (path / "x").mkdir(parents=True)
        else:
            folder = rng.choice([path.parent, *path.parent.parents][: len(path.relative_to(inside).parts) - 1])
            shutil.rmtree(folder)
            folder.symlink_to(world / "elsewhere")
    return "; ".join(said)


def test_what_a_stranger_gives_harms_nobody(sound, commands, tiny_llama_dir, tiny_texts, tmp_path):
    seed = time.time_ns() % 2**32
    rng, wrong, codes = random.Random(seed), [], {0: 0, 1: 0, 2: 0}
    world = tmp_path / "world"
    for number in range(N_ATTACKS):
        shutil.rmtree(world, ignore_errors=True)
        (world / "elsewhere").mkdir(parents=True)
        (world / "elsewhere" / "cfg.json").write_text("{}")
        (world / "victim").write_text('{"export PATH": 1}\n')
        shutil.copytree(sound, world / "inside")
        what = attack(world / "inside", world, rng)
        name, arguments = rng.choice([*uses(world / "inside", world / "out", tiny_llama_dir, tiny_texts).items()])
        outside = watched(world)
        code, said = commands.run(arguments, limited)
        case = f"seed {seed}, {number}: {name} after {what}: {code}: {said[-300:]}"
        if changed(outside, watched(world)) or [*Path().rglob("CANARY")] or [*world.rglob("CANARY")]:
            wrong.append(f"wrote outside: {case}")
        elif code not in codes or "Traceback" in said:
            wrong.append(case)
        elif code and sum(line.startswith("error: ") for line in said.splitlines()) != 1:
            wrong.append(f"not one line: {case}")
        else:
            codes[code] += 1
        if any(not line.isprintable() for line in said.replace("\r", "\n").split("\n")):
            wrong.append(f"unprintable: {case}")
    print(f"seed {seed}: exit codes {codes}")
    assert not wrong, f"{len(wrong)} of {N_ATTACKS}:\n" + "\n".join(wrong)


def watched(world: Path) -> dict[Path, Any]:
    """All outside of the tree and of what the command is to write."""
    folders = {path for path in world.iterdir() if path.is_dir() and path.name not in ("inside", "out")}
    return {path: path.read_bytes() for path in world.iterdir() if path.is_file()} | {
        path: found for folder in folders for path, found in stamps(folder).items()
    }
