"""Attempts to install, made as libraries make them: refused inside a block, and free again after it."""

import logging
import os
import runpy
import shutil
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from support.wheels import offer_wheel

from actcache.machine.installs import no_installs

PIP = [sys.executable, "-m", "pip", "install", "tinywheel", "-q"]


@pytest.fixture
def target(tmp_path, monkeypatch) -> Path:
    return offer_wheel("tinywheel", tmp_path, monkeypatch)


def as_library() -> None:
    """pip inside this process, as `python -m pip` runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pip", "install", "tinywheel", "-q"])
        runpy.run_module("pip", run_name="__main__", alter_sys=True)


ROUTES = {
    "check_call": lambda: subprocess.check_call(PIP),
    "a path and bytes": lambda: subprocess.check_call([Path(sys.executable), b"-mpip", "install", "tinywheel"]),
    "Popen with another name": lambda: subprocess.Popen(["python", *PIP[1:]], executable=sys.executable),
    "a shell": lambda: subprocess.run(f"cd / && {' '.join(PIP)}", shell=True, check=True),
    "os.system": lambda: os.system(" ".join(PIP)),
    "os.popen": lambda: os.popen(" ".join(PIP)),
    "posix_spawn": lambda: os.waitpid(os.posix_spawn(sys.executable, PIP, os.environ), 0),
    "exec": lambda: os.execv(sys.executable, PIP),
    "code": lambda: subprocess.check_call([sys.executable, "-c", "import pip; pip.main(['install', 'tinywheel'])"]),
    "pip as a library": as_library,
}


@pytest.mark.parametrize("route", ROUTES)
def test_pip_installs_nothing_by_any_route(route, target, caplog):
    with no_installs("somelib"), pytest.raises(PermissionError, match=r"somelib wanted to run `.*pip.*install"):
        ROUTES[route]()
    assert not target.exists()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "nothing was installed" in caplog.text
    assert "run it yourself" in caplog.text


def test_what_a_library_swallows_is_said_once(target, caplog):
    with no_installs("somelib"):
        for _ in range(2):
            with suppress(Exception):
                subprocess.check_call(PIP)
    assert not target.exists()
    assert caplog.text.count("somelib wanted to run") == 1


def test_threads_of_a_library_are_meant_too_and_the_innermost_block_is_named():
    seen = []

    def install() -> None:
        with pytest.raises(PermissionError) as error:
            subprocess.check_call(PIP)
        seen.append(str(error.value))

    with no_installs("outer"):
        with no_installs("inner"):
            thread = threading.Thread(target=install)
            thread.start()
            thread.join()
        install()
    assert [line.split()[0] for line in seen] == ["inner", "outer"]


@pytest.mark.parametrize(
    "command",
    [
        "pip3.11 install x",
        "/usr/bin/pip uninstall -y torch",
        "uv pip install torchvision -q",
        "uv add x",
        "uvx ruff",
        "uv run --with x y",
        "conda install -y x",
        "conda env create -f x.yml",
        "sudo apt-get install -y gcc",
        "python -m ensurepip",
        "python setup.py install",
        "bash -c 'yes | pip install x'",
        "env A=b python3 -m pip --quiet install x",
    ],
)
def test_other_package_managers_are_known(command):
    with no_installs("somelib"), pytest.raises(PermissionError, match="wanted to run"):
        os.system(command)


@pytest.mark.parametrize(
    "command",
    [
        "true pip list",
        "true pip freeze",
        "true git clone https://example.org/pip /tmp/install",
        "true git remote add origin https://example.org/pip",
        "true ldconfig -p",
        "true gcc -I/opt/conda/include -I/x/pip/y a.c -o install",
        "true nvcc --version",
        "true ninja install",
    ],
)
def test_other_programs_start_as_ever(command):
    with no_installs("somelib"):
        assert os.system(command) == 0
        assert subprocess.run(command.split(), check=False).returncode == 0


def test_a_compiler_and_git_work():
    with no_installs("somelib"):
        for program in ("git", "gcc"):
            if shutil.which(program):
                subprocess.run([program, "--version"], check=True, stdout=subprocess.DEVNULL)


def test_after_the_block_and_after_an_error_in_it_anything_may_be_installed(target):
    with pytest.raises(ZeroDivisionError), no_installs("somelib"):
        raise ZeroDivisionError
    subprocess.check_call(PIP)
    assert (target / "tinywheel.py").is_file()
