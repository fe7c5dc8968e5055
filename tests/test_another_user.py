"""Every command on a cache and runs of another user: what may be read is as for the owner, and what has to be written
is refused before any work, in one line, while nothing changes.
"""

import re
import shutil
from importlib import import_module
from pathlib import Path

import pytest
from support.command_line import actcache
from support.every_command import (
    FINISHED_HARVEST,
    GROWING_HARVEST,
    HARVEST,
    HOOK,
    NAMES,
    TRAIN,
    Places,
    all_commands,
    commands_of,
    words_of,
)
from support.strangers import as_another_user, given, only_root
from support.tiny_caches import HOOKS

pytestmark = only_root

# {mine} is a folder of one's own, with a copy of {runs}; all other places are theirs
READ = [
    "info {cache} --json",
    "verify {cache} --sample-model --model {model} --sequences 2 --device cpu",
    "info {growing}",
    "verify {growing}",
    "repair {cache}",
    "relabel {cache} --no-native-bf16",
    f"{FINISHED_HARVEST} --out {{cache}}",
    f"{FINISHED_HARVEST} --dry-run --out {{cache}}",
    "import-cache {arrow} --model {model} --out {back}",
    "import-cache {arrow} --model {model} --out {mine}/back",
    "export-cache {cache} --out {arrow}",
    "export-cache {cache} --out {mine}/arrow",
    f"train {{cache}} {TRAIN} --k 4 --out {{runs}}",
    f"train {{cache}} {TRAIN} --k 4 --out {{runs}} --dry-run",
    f"train {{cache}} {TRAIN} --k 4 --out {{mine}}/new",
    f"train {{growing}} {TRAIN} --k 4 --out {{mine}}/new",
    "eval {mine}/runs --model {model} --device cpu",
    "report {runs} --out {mine}/report.html",
    "features {run} --top 3",
    "features {run} --feature 3 --json",
    "features {run} --text cat --model {model} --device cpu --json",
    "features {mine}/runs/topk-k1-d32 --model {model} --device cpu",
    "steer {run} --feature 3 --text cat --strength 4 --tokens 3 --temperature 0 --model {model} --device cpu --json",
    "similar {run} {plain} --json",
    "stability {run} {plain} --json",
    f"import {{sae}} --out {{imported}} {NAMES}",
    f"import {{sae}} --out {{mine}}/imported {NAMES}",
    "export {run} --out {sae}",
    "export {run} --out {mine}/sae",
    "export {run} --format neuronpedia --out {mine}/pages",
]
# what has to be written is at --out; no model is at /none, and no row of {damaged} can be read
WRITE_OUT = [
    f"{HARVEST} --model /none {HOOK} --tokens 1600 --out {{cache}}",
    f"{HARVEST} --model /none --hook {HOOKS[1]} --tokens 1024 --out {{cache}}",
    f"{GROWING_HARVEST} --out {{growing}}",
    f"{HARVEST} --model /none {HOOK} --out {{root}}/a/new",
    "import-cache {arrow} --model {model} --out {root}/new",
    "export-cache {damaged} --out {root}/a/new",
    f"train {{damaged}} {TRAIN} --k 3 --out {{runs}}",
    f"train {{damaged}} {TRAIN} --k 3 --out {{root}}/a/new",
    "report {runs} --out {root}/new.html",
    "report {runs} --out {root}/a/new.html",
    f"import {{sae}} {NAMES} --out {{root}}/new",
    "export {run} --out {root}/a/new",
    "export {run} --format neuronpedia --out {root}/new",
    "demo --out {root}/new",
]
RUNS_COPY, CACHE = "pass a copy of the runs", "this has to write the cache"
# a line, what it ends with, and the place that it names
WRITE = [
    *((line, "pass another --out", line.split()[-1]) for line in WRITE_OUT),
    ("repair {damaged} --model /none", CACHE, "{damaged}"),
    ("relabel {cache} --native-bf16", CACHE, "{cache}"),
    ("eval {runs} --cache {damaged} --model /none", RUNS_COPY, "{runs}"),
    ("eval {run} --cache {damaged} --model /none", RUNS_COPY, "{run}"),
    ("features {plain} --cache {damaged} --device cpu", "pass a copy of the run", "{plain}/features"),
]


@pytest.fixture(scope="module")
def theirs(places, tiny_llama_dir) -> Places:
    import_module("actcache.bundled.documents")  # now: another user may be unable to read this Python's library
    for file in tiny_llama_dir.iterdir():  # transformers writes weights for their owner alone
        file.chmod(0o644)
    return places


def call(line: str, places: Places, code: int = 0) -> str:
    """What a line prints, with the folder {mine} left out."""
    done = actcache(*words_of(line, places), code=code)
    return (done.stdout + done.stderr).replace(str(places.get("mine")), "")


def state(folder: Path) -> dict[Path, tuple]:
    """Path -> inode, mode, time and bytes of all that is in a folder."""
    found = {path: path.stat() for path in (folder, *folder.rglob("*"))}
    return {
        path: (seen.st_ino, seen.st_mode, seen.st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path, seen in found.items()
    }


def test_every_command_is_tested_here():
    assert commands_of([*READ, *(line for line, *_ in WRITE)]) == all_commands()


@pytest.mark.parametrize("line", READ)
def test_what_has_nothing_to_write_there_is_as_for_the_owner(line, theirs, tmp_path):
    owner, stranger = (shutil.copytree(theirs["runs"], tmp_path / name / "runs").parent for name in "ab")
    expected = call(line, {**theirs, "mine": owner})
    before = state(theirs["root"])
    with as_another_user(theirs["root"], theirs["model"], theirs["texts"], given(stranger).parent):
        found = call(line, {**theirs, "mine": stranger})
    assert without_times(found, line) == without_times(expected, line)
    assert state(theirs["root"]) == before


def without_times(said: str, line: str) -> str:
    """What was said, without numbers where some of them tell of seconds or of what is free."""
    tells = line.startswith(("train", "features {mine}")) or "--dry-run" in line
    return re.sub(r"[\d.,]+", "", said) if tells else said


@pytest.mark.parametrize(("line", "words", "named"), WRITE)
def test_what_has_to_write_there_is_refused_before_any_work(line, words, named, theirs):
    before = state(theirs["root"])
    with as_another_user(theirs["root"], theirs["model"], theirs["texts"]):
        said = call(line, theirs, code=1).splitlines()
    assert [each for each in said if each.startswith(("error", "Traceback"))] == [said[-1]]
    assert said[-1].startswith("error: [Errno 13] Permission denied: ")
    way_out = "ask its owner for the permission, or run as a user who has it"
    assert said[-1].endswith(f"{words}; {way_out}: '{named.format(**theirs)}'")
    assert state(theirs["root"]) == before


def test_features_without_words_are_shown_as_they_are(theirs):
    before = state(theirs["root"])
    with as_another_user(theirs["root"], theirs["model"]):
        remembered, first, second, *_ = call("features {wordless} --model /none", theirs).splitlines()
    assert remembered == f"{theirs['wordless']}: was trained on the cache {theirs['cache']}"
    assert first.startswith(f"{theirs['wordless']}: a report cannot show its features, for this user may not write")
    assert second.startswith("32 features on ")
    assert state(theirs["root"]) == before
