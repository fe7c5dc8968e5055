"""Help that is quick and whole, --debug at any place, memory that is out, and which process of several this is."""

import json
import logging
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from support.command_line import actcache
from support.places import CHILD
from support.strangers import given, only_root
from support.surroundings import control_group
from support.tiny_caches import HOOKS
from typer.testing import CliRunner

from actcache.commands.lines import cache_lines
from actcache.commands.terminal import MOST_OF_AN_ERROR, PlainRecord, fail, say
from actcache.errors import ConfigError
from actcache.store.cache import Cache

COMMANDS = (
    *("harvest", "info", "verify", "repair", "relabel", "train", "eval", "report", "features", "steer", "similar"),
    *("stability", "import", "export", "import-cache", "export-cache", "demo", "bench"),
)
HEAVY = ("torch", "numpy", "zarr", "pyarrow", "transformers", "datasets", "yaml", "plotly")


def test_every_command_is_tested_here():
    from cli import app

    assert {command.name or command.callback.__name__ for command in app.registered_commands} == {*COMMANDS}


def test_help_imports_nothing_heavy():
    """It is what makes help quick; how quick it is, is a measurement and no test."""
    code = f"""
import json, sys
from typer.testing import CliRunner
import cli
for command in {COMMANDS}:
    assert CliRunner().invoke(cli.app, [command, "--help"]).exit_code == 0
print(json.dumps([name for name in {HEAVY} if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=CHILD, check=False)
    assert json.loads(done.stdout) == [], done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_cuts_nothing_at_80_columns(command):
    from typer.main import get_command

    from cli import app

    shown = CliRunner(env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}).invoke(app, [command, "--help"]).output
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    parameters = get_command(app).commands[command].params  # pyright: ignore[reportAttributeAccessIssue]
    words = {word for line in shown.splitlines() for word in line.replace("│", " ").replace(",", " ").split()}
    for parameter in parameters:
        names = [*parameter.opts, *parameter.secondary_opts] if parameter.param_type_name == "option" else []
        assert {*names} <= words


@pytest.mark.parametrize("arguments", [["--debug", "info", "there"], ["info", "there", "--debug"]])
def test_debug_is_taken_before_and_after_the_command(arguments, tmp_path):
    asked = [str(tmp_path / "none") if argument == "there" else argument for argument in arguments]
    plain = actcache(*(argument for argument in asked if argument != "--debug"), code=1).stderr
    debugged = actcache(*asked, code=1).stderr
    assert "Traceback" not in plain
    assert debugged.startswith("Traceback")
    assert debugged.endswith(plain)


FAILING = """
import mmap, threading, typer
from actcache.commands.terminal import Commands
from actcache.errors import DatasetError
app = typer.Typer(cls=Commands, pretty_exceptions_enable=False)
@app.callback()
def settings(debug: bool = False): ...
@app.command()
def python(): bytearray(1 << 46)
@app.command()
def mapping(): mmap.mmap(-1, 1 << 46)
@app.command()
def thread():
    threading.stack_size(1 << 40)
    threading.Thread(target=print).start()
@app.command()
def wrapped():
    try:
        bytearray(1 << 46)
    except MemoryError as error:
        raise DatasetError("the dataset is damaged; get another") from error
@app.command()
def small():
    held = []
    while True:
        held.append(tuple(held[-3:]))
@app.command()
def strange():
    held = []
    try:
        while True:
            held.append(bytearray(1 << 20))
    except MemoryError:
        pass
    raise SystemError("error return without exception set") from None
@app.command()
def mistake(): raise AttributeError("a mistake of ours")
app()
"""


@pytest.mark.parametrize("command", ["python", "mapping", "thread", "wrapped", "small", "strange"])
def test_memory_that_is_out_is_one_line(command):
    """Under a real limit. It names the limit, also where code in between or a library calls it something else."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({300 << 20}, -1))"
    asked = [sys.executable, "-c", f"{limit}\n{FAILING}", command]
    done = subprocess.run(asked, capture_output=True, text=True, env=CHILD, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: out of ")
    assert "0.31 GB of address space (ulimit -v)" in line
    assert "allow more" in line


def test_nothing_follows_the_last_line():
    """What libraries do at the end of Python fails too where memory is out."""
    code = """
import atexit, resource, sys, cli
atexit.register(lambda: 1 / 0)
resource.setrlimit(resource.RLIMIT_AS, (300 << 20, -1))
sys.argv = ["actcache", "info", "cache"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=CHILD, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: out of memory (libtorch")


def test_a_control_group_that_is_too_small_is_told_before_anything_is_imported():
    """There the kernel ends a process without a word."""
    code = "import os, sys; open(sys.argv.pop(1), 'w').write(str(os.getpid())); import cli; cli.main()"
    with control_group(100 << 20) as group:
        asked = [sys.executable, "-c", code, str(group / "cgroup.procs"), "info", "cache"]
        done = subprocess.run(asked, capture_output=True, text=True, env=CHILD, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: out of memory (importing torch and room to work may take 0.23 GB): 0.")
    assert f"GB of the control group {group}" in line


def test_memory_that_is_out_where_none_is_left_to_say_where():
    from actcache.commands.terminal import lack_line

    assert lack_line(MemoryError()).startswith("out of memory (MemoryError): ")


def test_a_mistake_of_ours_is_no_lack_of_memory():
    asked = [sys.executable, "-c", FAILING, "mistake"]
    done = subprocess.run(asked, capture_output=True, text=True, env=CHILD, check=False)
    assert done.stderr.endswith("AttributeError: a mistake of ours\n")


def test_debug_shows_where_memory_was_out():
    asked = [sys.executable, "-c", FAILING, "--debug", "python"]
    done = subprocess.run(asked, capture_output=True, text=True, env=CHILD, check=False)
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1].startswith("error: out of memory")


WITH_A_DEVICE = ("harvest", "verify", "repair", "train", "eval", "features", "steer", "similar", "stability")


@pytest.mark.parametrize("command", WITH_A_DEVICE)
@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("mps", "got 'mps'; nothing here runs on mps; pass cpu"),
        ("xpu", "got 'xpu'; nothing here runs on xpu; pass cpu"),
        ("gpu", "device must be auto, cpu, cuda or cuda:0, cuda:1, ..., got 'gpu'"),
        ("cuda:99", "device 'cuda:99' asked for"),
    ],
)
def test_a_device_that_is_none_is_one_line_before_any_work(command, device, says):
    done = actcache(command, "--device", device, code=2)
    assert done.stderr.startswith("error: --device: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_these_are_all_the_commands_with_a_device():
    from typer.main import get_command

    from cli import app

    commands = get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    assert {name for name, command in commands.items() if any(p.name == "device" for p in command.params)} == {
        *WITH_A_DEVICE
    }


def test_what_stands_behind_two_dashes_is_no_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "Traceback" not in actcache("info", "--", "--debug", code=1).stderr


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version

    import actcache as package

    assert actcache("--version").stdout == f"actcache {package.__version__}\n"
    assert package.__version__ == version("actcache")


def test_the_shell_completes_commands():
    environment = {**CHILD, "_ACTCACHE_COMPLETE": "complete_bash", "COMP_WORDS": "actcache ex", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['actcache']; import cli; cli.app(prog_name='actcache')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.split() == ["export", "export-cache"], done.stderr


STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
NO_STEPS = ("", "batch", "extern", "4294967290", "4294967291", "4294967292")  # interactive, batch script, extern


@pytest.mark.parametrize(
    ("share", "environment", "worker"),
    [
        (None, {}, (0, 1)),
        ("2/4", {"RANK": "0", "WORLD_SIZE": "8"}, (2, 4)),
        (None, {"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        (None, {"RANK": "3"}, (0, 1)),
        (None, {"RANK": "3", **STEP}, (1, 2)),
        (None, STEP, (1, 2)),
        (None, {**STEP, "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2"}, (1, 2)),
        (None, {"RANK": "0", "WORLD_SIZE": "1", **STEP}, (0, 1)),
        *((None, {**STEP, "SLURM_STEP_ID": step}, (0, 1)) for step in NO_STEPS),
        (None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, (0, 1)),  # a batch script
    ],
    ids=str,
)
def test_the_worker_is_the_option_or_what_the_launcher_says(share, environment, worker, monkeypatch, capsys):
    from actcache.commands.terminal import this_worker

    _set_environment(monkeypatch, environment)
    found = this_worker(share)
    assert (found.index, found.count) == worker
    said = capsys.readouterr().err
    assert ("worker {} of {} (".format(*worker) in said) == (worker[1] > 1)
    assert ("srun did not start this process: it takes every shard" in said) == (
        share is None and worker == (0, 1) and "SLURM_NTASKS" in environment and "WORLD_SIZE" not in environment
    )


@pytest.mark.parametrize(
    ("title", "worker"),
    [("slurmstepd: [7.batch]", (0, 1)), ("slurmstepd: [7.0]", (1, 2)), ("bash", (1, 2))],
)
def test_a_batch_script_that_a_step_submitted_is_no_part_of_that_step(title, worker, monkeypatch):
    """It inherits the step's numbers. Slurm's process that starts a script, here a shell, has a title of its own."""
    from actcache.commands.terminal import this_worker

    with keeper(title) as task:
        _set_environment(monkeypatch, {**STEP, "SLURM_TASK_PID": str(task)})
        found = this_worker(None)
    assert (found.index, found.count) == worker


@contextmanager
def keeper(title: str) -> Iterator[int]:
    """A process with a title; gives the id of its child, which lives as long."""
    asked = [title, "-c", "(read) <&0 & echo $!; wait"]
    with subprocess.Popen(asked, executable="/bin/bash", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield int(process.stdout.readline())


@pytest.mark.parametrize(
    ("environment", "device"),
    [
        ({}, "auto"),
        ({"LOCAL_RANK": "3"}, "cuda:1"),
        ({"LOCAL_RANK": "x"}, "auto"),
        ({"SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}, "cuda:1"),
        *(({"SLURM_LOCALID": "1", "SLURM_STEP_ID": step}, "auto") for step in NO_STEPS),
        ({"SLURM_LOCALID": "1"}, "auto"),
    ],
    ids=str,
)
def test_each_process_that_a_launcher_started_takes_a_gpu_of_its_own(environment, device, monkeypatch):
    import torch

    from actcache.commands.terminal import local_device

    _set_environment(monkeypatch, environment)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert local_device("auto", None) == device
    assert local_device("cpu", None) == "cpu"
    assert local_device("auto", "auto") == "auto"


def _set_environment(monkeypatch, environment):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("share", ["4/4", "1", "1/", "a/b", "-1/2"])
def test_a_worker_that_is_none_is_refused(share):
    from actcache.commands.terminal import this_worker

    with pytest.raises(ConfigError, match=r"harvest: .*worker"):
        this_worker(share)


HOSTILE = "x\x1b[2J\x1b]0;title\x07\rmodel        forged\nmodel        forged\u2028\u202etxt.exe\x9b31m\udc80\x7f"


def test_what_strangers_named_cannot_move_the_cursor(tiny_cache, tmp_path, capsys):
    """A model's name with escapes, line ends and marks that turn the text round, in what `info` says and in errors."""
    identity = {**tiny_cache.identity, "model": {**tiny_cache.identity["model"], "name": HOSTILE}}
    plan = replace(tiny_cache.manifest.plan, identity=identity)
    said = cache_lines(Cache(tiny_cache.path, replace(tiny_cache.manifest, plan=plan), "f"))
    say(*said)
    with pytest.raises(typer.Exit):
        fail(f"{HOSTILE}: is damaged", 1)
    print(PlainRecord("actcache", logging.WARNING, "", 0, "%s is odd", (HOSTILE,), None).getMessage(), file=sys.stderr)
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == len(said) + 2
    assert all(line.isprintable() for line in printed.split("\n"))
    assert printed.count("\\x1b[2J") == 3
    assert sum(line.startswith("model ") for line in printed.splitlines()) == 1


def test_what_people_write_is_said_as_it_is(capsys):
    say("größe 模型 مرحبا café ▁▂▃ ⏎ 🙂")
    assert capsys.readouterr().err == "größe 模型 مرحبا café ▁▂▃ ⏎ 🙂\n"


def test_a_message_of_a_library_keeps_its_lines():
    record = PlainRecord("transformers.x", logging.WARNING, "", 0, "one\n\x1b[2J%s", ("two",), None)
    assert record.getMessage() == "one\n\\x1b[2Jtwo"


def test_what_a_library_says_of_a_model_cannot_move_the_cursor(tiny_llama_dir, tiny_texts, tmp_path):
    """transformers has a handler of its own, and quotes what config.json holds."""
    folder = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"use_return_dict": "\x1b[2Jforged"}))
    words = ("--dataset", tiny_texts, "--context-size", 16, "--tokens", 64, "--device", "cpu", "--dry-run")
    run = subprocess.run(
        [sys.executable, "-m", "cli", "harvest", "--model", folder, *map(str, words), "--hook", HOOKS[0], "--out", "c"],
        capture_output=True,
        text=True,
        env=CHILD,
    )
    assert "forged" in run.stderr, run.stderr
    assert all(line.isprintable() for line in run.stderr.replace("\r", "\n").split("\n"))


@only_root
def test_a_command_that_writes_says_first_whose_folder_it_is(tiny_cache, tmp_path):
    """Root may write into folders of anybody."""
    cache = given(shutil.copytree(tiny_cache.path, tmp_path / "cache"))
    said = actcache("repair", cache, "--device", "cpu").stderr.splitlines()
    assert said[0].startswith(f"{cache}: belongs to user ")
    assert said[0].endswith(f", and is written by user 0 ({pwd.getpwuid(0).pw_name})")
    runs = tmp_path / "runs"
    runs.mkdir()
    given(runs)
    trains = ("train", cache, "--hook", HOOKS[2], "--d-sae", 64, "--k", 4, "--tokens", 100, "--batch-tokens", 50)
    assert actcache(*trains, "--dry-run", "--out", runs).stderr.startswith(f"{runs}: belongs to user ")
    mine = shutil.copytree(tiny_cache.path, tmp_path / "mine")
    assert "belongs to" not in actcache("repair", mine, "--device", "cpu").stderr


@pytest.mark.parametrize("n_letters", [10, MOST_OF_AN_ERROR, MOST_OF_AN_ERROR + 1, 5_000_000])
def test_an_error_that_quotes_a_stranger_is_no_longer_than_a_page(capsys, n_letters):
    with pytest.raises(typer.Exit):
        fail(f"a{'x' * (n_letters - 2)}z", 1)
    said = capsys.readouterr().err
    assert len(said) < MOST_OF_AN_ERROR + 20
    assert (said.startswith("error: ax"), said.endswith("xz\n")) == (True, True), "the way out stands at the end"
    assert (" ... " in said) == (n_letters > MOST_OF_AN_ERROR)
