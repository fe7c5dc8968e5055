"""A wheel built from a clean clone holds every sub-package and asset, and works where nothing else of ours is."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from support.places import ROOT

PACKAGES = ("actcache/", "trainer/", "benchmarks/")
NOT_PACKED = ("benchmarks/results/",)  # documents for who reads the repository


def run(*command: object, cwd: Path) -> str:
    """What a command prints; no PYTHONPATH leads it to the repository."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a clone, in which there is nothing but what git has."""
    folder = tmp_path_factory.mktemp("wheel")
    run("git", "clone", "--quiet", ROOT, "clone", cwd=folder)
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        folder,
        folder / "clone",
        cwd=folder,
    )
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of the wheel alone; its dependencies, but nothing of ours, are those of this Python."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    packages = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    python = folder / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=folder,
    )
    # a folder on the path, whose own .pth files are not read: what is installed there as editable is not found
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_it_holds_what_git_has(wheel):
    tracked = run("git", "ls-files", *PACKAGES, "cli.py", cwd=ROOT).split("\n")
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in tracked if name and not name.startswith(NOT_PACKED)} <= packed
    assert any(name.endswith("licenses/LICENSE") for name in packed)


def test_it_says_what_a_package_index_shows(environment):
    (folder,) = environment.rglob("actcache-*.dist-info")
    metadata = PathDistribution(folder).metadata
    shown = ("Name", "Version", "Summary", "License-Expression", "Author", "Requires-Python", "Keywords", "Classifier")
    assert all(metadata[field] for field in shown)
    assert metadata.get_payload().startswith("# actcache")


def test_the_command_finds_its_packages_and_assets(environment, tmp_path):
    actcache = environment / "bin" / "actcache"
    assert run(actcache, "--version", cwd=tmp_path).startswith("actcache ")
    code = "import actcache, trainer, cli; print(actcache.__file__, trainer.__file__, cli.__file__, cli.DEMO_SWEEP)"
    found = run(environment / "bin" / "python", "-c", code, cwd=tmp_path).split()
    assert all(Path(path).is_file() and Path(path).is_relative_to(environment) for path in found)


@pytest.mark.long
def test_the_demo_runs_outside_of_the_repository(environment, tmp_path):
    run(environment / "bin" / "actcache", "demo", "--out", "demo", cwd=tmp_path)
    assert (tmp_path / "demo" / "report.html").stat().st_size > 1 << 20
