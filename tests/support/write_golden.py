"""Write tests/golden: caches and runs as the code of one commit leaves them. Refuses to write any of it twice.

    python tests/support/write_golden.py

Everything is made by the command line in /tmp/golden, for its path ends up in log/origin.json and config.json.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from actcache.bundled.documents import bundled_model_path
from support.golden import (
    ENVIRONMENT,
    EXPECTED,
    GOLDEN,
    INPUTS,
    MODEL,
    SPLITS,
    digest,
    files,
    rows,
    served_order,
    skeletons,
    this_platform,
)

ROOT = GOLDEN.parent.parent
WORK = Path("/tmp/golden")
STREAM, MLP = "blocks.2.hook_resid_post", "blocks.1.hook_mlp_out"
HARVEST = f"harvest --model {MODEL} --dataset texts.jsonl --context-size 16 --batch-size 4 --holdout 0.25 --seed 8"
TRAIN = "train lossless sweep.yaml --device cpu --out"
COMMANDS = {
    "lossless": f"{HARVEST} --device cpu --hook {STREAM} --hook {MLP} --tokens 736 --out lossless",
    "fast": f"{HARVEST} --device cpu --hook {STREAM} --tokens 368 --codec fast --dtype float16 --out fast",
    "raw": f"{HARVEST} --device cpu --hook {STREAM} --tokens 368 --codec raw --dtype float32 --out raw",
    "int8": f"{HARVEST} --device cpu --hook {STREAM} --tokens 368 --codec int8 --out int8",
    "killed": f"{HARVEST} --device cpu --hook {STREAM} --hook {MLP} --tokens 736 --out killed",
    "smaller": f"{HARVEST} --device cpu --hook {STREAM} --tokens 400 --out smaller",
    "grow": f"{HARVEST} --device cpu --hook {STREAM} --tokens 736 --out smaller",
    "add": f"{HARVEST} --device cpu --hook {MLP} --tokens 736 --out smaller",
    "finished": f"{TRAIN} finished",
    "stopped": f"{TRAIN} stopped",
    "eval": f"eval finished --cache lossless --model {MODEL} --device cpu",
    "features": f"features finished/topk --cache lossless --model {MODEL} --device cpu",
}
CACHES = ("lossless", "fast", "raw", "int8", "smaller")
KILLED_AT = f"train/{MLP}/acts/c/5/0"
KILL = f"""
import os, signal, sys

def kill(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith({KILLED_AT!r}):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
import cli
cli.main()
"""
STOPPED_AFTER = 150  # steps of 200
ASKED = ("--top 10", "--feature 0", "--feature 7", "--feature 15")  # of features


def main() -> None:
    """Write every golden file, or nothing."""
    changed = _git("status", "--porcelain", "--", "actcache", "trainer", "cli.py")
    if changed:
        raise SystemExit(f"write_golden: the code must be that of a commit, changed are:\n{changed}")
    WORK.mkdir()
    try:
        shutil.copytree(bundled_model_path(), WORK / MODEL)
        for name in INPUTS:
            shutil.copy(GOLDEN / name, WORK)
        expected = {"commit": _git("rev-parse", "HEAD"), "platforms": [this_platform()], "commands": COMMANDS}
        expected |= _caches() | _runs() | _grown()
        with open(EXPECTED, "x") as file:
            file.write(json.dumps(expected, indent=1, sort_keys=True) + "\n")
    finally:
        shutil.rmtree(WORK)


def _caches() -> dict[str, Any]:
    """Finished caches of every codec, and a killed harvest; returns what a reader gets of them."""
    for name in CACHES:
        _actcache(COMMANDS[name])
    assert _started("-c", KILL, *COMMANDS["killed"].split()).wait() == -signal.SIGKILL
    _tear_last_line(WORK / "killed" / "manifest" / "writer-00.jsonl")
    for name in (*CACHES, "killed"):
        _pack(name)
    found = {
        name: {split: {of: digest(x) for of, x in rows(WORK / name, split).items()} for split in SPLITS}
        for name in CACHES
    }
    infos = {name: json.loads(_actcache(f"info {name} --json")) for name in CACHES}
    return {"rows": found, "info": infos, "order": served_order(WORK / "lossless")}


def _runs() -> dict[str, Any]:
    """A finished sweep, and one stopped in the middle; returns what its features answer."""
    _actcache(COMMANDS["finished"])
    _actcache(COMMANDS["eval"])
    _actcache(COMMANDS["features"])
    _stop(COMMANDS["stopped"], WORK / "stopped" / "standard" / "metrics.jsonl")
    _pack("finished")
    _pack("stopped")
    return {"features": {asked: json.loads(_actcache(f"{COMMANDS['features']} {asked} --json")) for asked in ASKED}}


def _grown() -> dict[str, Any]:
    """The smaller cache once it has grown; with the other hook added it is the lossless one."""
    _actcache(COMMANDS["grow"])
    return {"grown": {"files": files(WORK / "smaller"), "skeletons": skeletons(WORK / "smaller")}}


def _stop(command: str, metrics: Path) -> None:
    """Send SIGINT once so many steps are logged."""
    process = _started("-m", "cli", *command.split())
    while not metrics.exists() or metrics.read_text().count("\n") * 10 < STOPPED_AFTER:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130, "it was too fast, try again"


def _tear_last_line(journal: Path) -> None:
    """Cut the last line in half, as a power cut can and a kill hardly ever does."""
    whole = journal.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    journal.write_bytes(whole[: -(len(last) // 2)])


def _pack(name: str) -> None:
    """Write a folder as tests/golden/<name>.tar.gz. Nothing in it may tell of this machine."""
    for path in (WORK / name).rglob("*"):
        foreign = path.is_file() and any(str(p).encode() in path.read_bytes() for p in (ROOT, Path.home()))
        assert not foreign, f"{path} names a path of this machine"
    with tarfile.open(GOLDEN / f"{name}.tar.gz", "x:gz") as archive:
        archive.add(WORK / name, name, filter=_anonymous)


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def _actcache(command: str) -> str:
    """What a command prints on stdout."""
    process = _started("-m", "cli", *command.split())
    stdout, _ = process.communicate()
    assert process.returncode == 0, command
    return stdout


def _started(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, *arguments], cwd=WORK, env=environment, stdout=subprocess.PIPE, text=True)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
