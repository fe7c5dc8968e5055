"""The command line on streams that cannot be written: what is said decides nothing, a result that is lost does.

The faults are real: /dev/full, descriptors that are closed, pipes whose reader is gone.
"""

import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from support.places import CHILD, ROOT
from support.tiny_caches import HOOKS

from actcache.commands.streams import standard_streams

# A command that says what a real one says, and writes what it has done to the file that it is given.
WORK = """
import ctypes, logging, sys, warnings
from pathlib import Path
from tqdm import tqdm
import typer
from actcache.commands.streams import standard_streams
from actcache.commands.terminal import Bar, Commands, fail, print_json, say

app = typer.Typer(cls=Commands)

@app.callback()
def settings(debug: bool = False): pass

@app.command()
def work(done: Path, code: int = 0, result: bool = False):
    say("a line of a person")
    logging.getLogger("actcache").warning("a remark")
    warnings.warn("a warning")
    bar = Bar("work", "tok")
    with open(done, "w") as file:
        number = file.fileno()
        for i in range(3):
            bar(i, 3)
            for shown in tqdm(range(2)):
                say("x" * 10_000)
            ctypes.CDLL(None).write(2, b"of C\\n", 5)
        bar.close()
        if result:
            print_json({"rows": list(range(100_000))})  # more than a pipe holds
        file.write(f"done {number > 2}")
    if code:
        raise OSError("the command's own failure")

with standard_streams():
    logging.basicConfig(format="%(message)s")
    app()
"""


def worked(tmp_path: Path, *options: str, shell: str = "") -> subprocess.CompletedProcess[str]:
    """Run WORK in a shell, with `shell` behind it; it must have done all of its work."""
    (tmp_path / "work.py").write_text(WORK)
    done = tmp_path / "done"
    command = f"set -o pipefail; {sys.executable} {tmp_path}/work.py work {done} {' '.join(options)} {shell}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=CHILD, check=False)
    assert done.read_text() == "done True", found.stderr
    done.unlink()
    return found


CLOSED_PIPE = "2> >(exec true)"


@pytest.mark.parametrize("stderr", ["2>/dev/full", "2>&-", CLOSED_PIPE, "2>/dev/null"])
def test_what_is_said_decides_nothing(stderr, tmp_path):
    found = worked(tmp_path, "--result", shell=stderr)
    assert (found.returncode, found.stderr) == (0, "")
    assert json.loads(found.stdout) == {"rows": list(range(100_000))}, "and nothing else comes to stdout"
    assert worked(tmp_path, "--code", "1", shell=stderr).returncode == 1


@pytest.mark.parametrize(("stdout", "reason"), [(">/dev/full", "No space left on device"), (">&-", "Bad file desc")])
def test_a_result_that_is_lost_is_a_failure_of_one_line(stdout, reason, tmp_path):
    found = worked(tmp_path, "--result", shell=stdout)
    assert (found.returncode, found.stdout) == (1, "")
    last = found.stderr.splitlines()[-1]
    assert last.startswith(f"error: stdout cannot be written ({reason}")
    assert "Traceback" not in found.stderr
    assert "Exception ignored" not in found.stderr


@pytest.mark.parametrize("stdout", [">/dev/full", ">&-", "| true"])
def test_a_stdout_that_is_not_used_decides_nothing(stdout, tmp_path):
    assert worked(tmp_path, shell=stdout).returncode == 0


def test_a_reader_that_goes_ends_it_as_it_ends_cat(tmp_path):
    (tmp_path / "long").write_text("x\n" * 1_000_000)
    cat = subprocess.run(
        ["bash", "-c", f"set -o pipefail; cat {tmp_path}/long | head -c 1"], capture_output=True, text=True, check=False
    )
    found = worked(tmp_path, "--result", shell="2>/dev/null | head -c 1")
    assert (found.returncode, found.stdout, found.stderr) == (cat.returncode, "{", "")
    shown = worked(tmp_path, "--result", shell="| true")
    assert "roken pipe" not in shown.stderr
    assert "error" not in shown.stderr


def test_an_own_failure_is_told_first(tmp_path):
    for stdout in (">/dev/full", "| true"):
        found = worked(tmp_path, "--result", "--code", "1", shell=stdout)
        assert found.returncode == 1
        assert found.stderr.splitlines()[-1] == "error: the command's own failure"


@pytest.mark.parametrize("arguments", ["--version", "--help", "info --help"])
def test_help_and_version_end_as_quietly(arguments):
    program = f"set -o pipefail; {sys.executable} -m cli {arguments}"
    gone = subprocess.run(["bash", "-c", f"{program} | true"], capture_output=True, text=True, env=CHILD, cwd=ROOT)
    assert (gone.returncode in (0, 141), gone.stderr) == (True, "")
    full = subprocess.run(["bash", "-c", f"{program} >/dev/full"], capture_output=True, text=True, env=CHILD, cwd=ROOT)
    assert (full.returncode, full.stderr.count("\n")) == (1, 1)


def test_streams_of_somebody_else_are_left_alone():
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err), standard_streams():
        assert (sys.stdout, sys.stderr) == (out, err)
        print("x")
    assert out.getvalue() == "x\n"


@pytest.mark.faults
@pytest.mark.parametrize("stderr", ["2>/dev/full", "2>&-", CLOSED_PIPE])
def test_harvest_train_and_looking_up_end_as_if_nothing_was_said(stderr, tiny_llama_dir, tiny_texts, tmp_path):
    program, device = f"{sys.executable} -m cli", "--device cpu"
    cache, runs = tmp_path / "cache", tmp_path / "runs"
    harvest = f"--model {tiny_llama_dir} --dataset {tiny_texts} --hook {HOOKS[0]} --context-size 16 --holdout 0.2"
    one = f"--hook {HOOKS[0]} --d-sae 32 --k 4 --tokens 512 --batch-tokens 128"
    for command in (f"harvest {harvest} --out {cache}", f"train {cache} {one} --out {runs}", f"eval {runs}"):
        done = subprocess.run(["bash", "-c", f"{program} {command} {device} {stderr}"], env=CHILD, cwd=ROOT)
        assert done.returncode == 0, command
    (run,) = (path.parent for path in runs.glob("*/sae"))
    assert len((run / "metrics.jsonl").read_text().splitlines()) > 0
    assert (run / "eval.json").is_file()
    looked = f"set -o pipefail; {program} features {run} {device} --json"
    gone = subprocess.run(["bash", "-c", f"{looked} | true"], capture_output=True, text=True, env=CHILD, cwd=ROOT)
    assert (gone.returncode in (0, 141), "roken pipe" in gone.stderr) == (True, False)
    full = subprocess.run(["bash", "-c", f"{looked} > /dev/full"], capture_output=True, text=True, env=CHILD, cwd=ROOT)
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1].startswith("error: stdout cannot be written")


@pytest.mark.parametrize("unbuffered", ["", "1"])  # with "1" Python by itself loses it too
def test_a_full_pipe_that_must_not_block_loses_what_is_said(unbuffered):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    code = "import sys\nfrom actcache.commands.streams import standard_streams\n"
    code += "with standard_streams():\n    print('x' * (1 << 20), file=sys.stderr)\n"
    environment = {**CHILD, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run([sys.executable, "-c", code], stderr=writing, env=environment, check=False)
    os.close(reading)
    os.close(writing)
    assert done.returncode == 0
