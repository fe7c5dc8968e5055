"""Every command with little memory does its work, or says in one line what it wanted and what there is."""

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from support.command_line import actcache
from support.every_command import FINISHED_HARVEST, NAMES, TRAIN, Places, all_commands, commands_of, words_of
from support.forked_commands import Commands, join_group, leave_address_space
from support.places import CHILD
from support.surroundings import control_group
from support.tiny_models import make_model, make_tokenizer

pytestmark = pytest.mark.faults

MIB = 1 << 20
# {mine} is a folder with copies of {runs}, {damaged} and {cache}, if the line speaks of them
LINES = [
    f"{FINISHED_HARVEST} --out {{mine}}/new",
    f"{FINISHED_HARVEST} --codec int8 --out {{mine}}/new",
    f"{FINISHED_HARVEST} --out {{cache}}",
    f"{FINISHED_HARVEST} --dry-run --out {{mine}}/new",
    "info {cache} --json",
    "verify {cache}",
    "verify {cache} --sample-model --sequences 2 --device cpu",
    "repair {cache}",
    "repair {mine}/damaged --device cpu",
    "relabel {mine}/cache --native-bf16",
    "import-cache {arrow} --model {model} --out {mine}/new",
    "export-cache {cache} --out {mine}/new",
    f"train {{cache}} {TRAIN} --k 4 --out {{mine}}/new",
    f"train {{cache}} {TRAIN} --k 4 --out {{mine}}/new --dry-run",
    "eval {mine}/runs --device cpu",
    "report {runs} --out {mine}/report.html",
    "features {mine}/runs/topk-k1-d32 --device cpu",
    "features {run} --feature 3",
    "features {run} --text cat --device cpu --json",
    "steer {run} --feature 3 --text cat --strength 4 --tokens 3 --device cpu --json",
    "similar {run} {plain} --json",
    "stability {run} {plain} --json",
    f"import {{sae}} --out {{mine}}/new {NAMES}",
    "export {run} --out {mine}/new",
    "export {run} --format neuronpedia --out {mine}/new",
    "demo --out {mine}/new",
]
ADDRESS_SPACE = (1, 2, 4, 8, 16, 32, 64, 128, 512)  # MiB beside what a process has when it has imported everything
CONTROL_GROUP = (16, 64, 68, 80, 128, 512)  # the same
NEW_PROCESS = (100, 240, 320, 420)  # MiB in all


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> Commands:
    return Commands(tmp_path_factory.mktemp("said"))


def test_every_command_is_tested_here():
    assert commands_of(LINES) == all_commands()


@pytest.mark.parametrize("line", LINES)
def test_little_address_space(line, places, commands, tmp_path):
    codes = {}
    for n_mib in steps(line, ADDRESS_SPACE):
        here = with_copies(line, places, tmp_path / str(n_mib))
        code, said = commands.run(words_of(line, here), partial(leave_address_space, n_mib * MIB))
        codes[n_mib] = checked(code, said)
    assert codes.get(512, 0) == 0


@pytest.mark.parametrize("line", LINES)
def test_a_small_control_group(line, places, commands, tmp_path):
    """Its limit kills, so that it must not be reached."""
    codes = {}
    for n_mib in steps(line, CONTROL_GROUP):
        here = with_copies(line, places, tmp_path / str(n_mib))
        with control_group(n_mib * MIB) as group:
            code, said = commands.run(words_of(line, here), partial(join_group, group))
        codes[n_mib] = checked(code, said)
    assert codes[16] == 1
    assert codes.get(512, 0) == 0


def test_logits_that_do_not_fit_are_refused_before_the_cache_is_read(places, commands, tmp_path):
    """A model with a vocabulary of a million tokens, of which the tiny tokenizer knows 512. Its weights do fit."""
    wide, runs = make_model("gpt2", 1 << 20), tmp_path / "runs"
    wide.save_pretrained(tmp_path / "wide")
    make_tokenizer().save_pretrained(tmp_path / "wide")
    here = {**places, "model": tmp_path / "wide", "cache": tmp_path / "cache"}
    for line in (f"{FINISHED_HARVEST} --out {{cache}}", f"train {{cache}} {TRAIN} --k 4 --out {runs}"):
        actcache(*words_of(line, here))
    with control_group(512 * MIB) as group:
        asked = words_of(f"eval {runs} --model {{model}} --device cpu", here)
        code, said = commands.run(asked, partial(join_group, group))
    assert checked(code, said) == 1
    assert re.search(r"out of memory \(the logits of [\d,]+ tokens may take \d\.\d\d GB\)", said), said
    assert "rows" not in said


@pytest.mark.parametrize("line", ["info {cache}", f"{FINISHED_HARVEST} --out {{mine}}/new"])
def test_a_new_process_in_a_small_control_group(line, places, tmp_path):
    """What it imports counts too."""
    code = "import os, sys; open(sys.argv.pop(1), 'w').write(str(os.getpid())); import cli; cli.main()"
    for n_mib in NEW_PROCESS:
        with control_group(n_mib * MIB) as group:
            words = words_of(line, {**places, "mine": tmp_path})
            asked = [sys.executable, "-c", code, str(group / "cgroup.procs"), *words]
            done = subprocess.run(asked, capture_output=True, text=True, env=CHILD)
        checked(done.returncode, done.stderr)


def steps(line: str, every: Sequence[int]) -> Sequence[int]:
    """The demo takes minutes where there is memory for it."""
    return every[:-1] if line.startswith("demo") else every


def checked(code: int, said: str) -> int:
    """The exit code. If it is not 0, the one error comes last and says what was asked for and what there is."""
    lines = said.splitlines()
    errors = [each for each in lines if each.startswith(("error", "Traceback", "Process "))]
    assert code in (0, 1), f"{code}: {said}"
    assert errors == lines[-1:] * code, said
    assert not code or re.match(r"error: out of .+ \(.+\): .*[\d.]+ GB are left of the [\d.]+ GB of ", errors[0]), said
    return code


def with_copies(line: str, places: Places, mine: Path) -> Places:
    mine.mkdir()
    for name in ("runs", "damaged", "cache"):
        if f"{{mine}}/{name}" in line:
            shutil.copytree(places[name], mine / name)
    return {**places, "mine": mine}
