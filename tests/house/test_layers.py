"""The shape of the program: rooms that import downward only, no circle in a room, one home for each outside library."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from support.places import CHILD, ROOT

# What each room may import of ours, from the bottom to the top; a module beside the rooms counts as one.
LOWEST = {
    "actcache.errors",
    "actcache.arguments",
    "actcache.flow",
    "actcache.files",
    "actcache.machine",
}
CACHE = {*LOWEST, "actcache.format", "actcache.store", "actcache.loading"}
ALLOWED: dict[str, set[str]] = {
    "actcache.errors": set(),
    "actcache.arguments": {"actcache.errors"},
    "actcache.flow": set(),
    "actcache.files": {"actcache.errors", "actcache.machine"},
    "actcache.machine": {"actcache.errors"},
    "actcache.lazy": set(),
    "actcache.bundled": set(),
    "actcache.format": LOWEST,
    "actcache.text": LOWEST,
    "actcache.models": LOWEST,
    "actcache.store": LOWEST | {"actcache.format"},
    "actcache.loading": CACHE - {"actcache.loading"},
    "actcache.harvesting": CACHE - {"actcache.loading"} | {"actcache.text", "actcache.models"},
    "actcache.integrity": CACHE | {"actcache.text", "actcache.models", "actcache.harvesting"},
    "actcache.interop": CACHE | {"actcache.text", "actcache.models", "actcache.harvesting"},
    "trainer.checksums": LOWEST | {"actcache.format"},
    "trainer.tensor_file": LOWEST | {"actcache.format", "trainer.checksums"},
    "trainer.run_folder": LOWEST | {"actcache.store", "trainer.checksums"},
    "trainer.config": LOWEST | {"actcache.interop"},
    "trainer.trained_on": LOWEST | {"actcache.format", "actcache.store", "trainer.config", "trainer.run_folder"},
    "trainer.kernels": set(),
    "trainer.targets": set(),
    "trainer.sae": {"actcache.errors", "actcache.models", "trainer.config", "trainer.kernels"},
}
FILES_OF_RUNS = {"trainer.checksums", "trainer.tensor_file", "trainer.run_folder"}
ALLOWED["trainer.formats"] = LOWEST | FILES_OF_RUNS | {"actcache.models", "trainer.config", "trainer.sae"}
SAES = {*CACHE, *FILES_OF_RUNS, "trainer.trained_on", "trainer.config", "trainer.kernels"}
SAES |= {"trainer.sae", "trainer.formats"}
ALLOWED |= {
    "trainer.training": SAES,
    "trainer.evaluation": SAES | {"actcache.models"},
    "trainer.features": SAES | {"actcache.models"},
    "trainer.interventions": SAES | {"actcache.models", "trainer.features"},
    "trainer.publish": SAES | {"actcache.models", "trainer.features"},
    "trainer.report": SAES | {"trainer.features", "trainer.targets"},
}
ACTCACHE = {room for room in ALLOWED if room.startswith("actcache.")} | {"actcache"}
EVERYTHING = {*ALLOWED, "actcache", "trainer", "actcache.commands", "trainer.commands"}
ALLOWED |= {
    "actcache": ACTCACHE - {"actcache"},
    "trainer": {room for room in ALLOWED if room.startswith("trainer.")} | {"actcache.lazy"},
    "actcache.commands": ACTCACHE,
    "trainer.commands": EVERYTHING - {"trainer.commands"},
    "benchmarks": EVERYTHING,
    "cli": EVERYTHING | {"benchmarks"},
}
HOMES = {
    "zarr": {"actcache.format", "actcache.store", "actcache.integrity", "benchmarks"},
    "numcodecs": {"actcache.format"},
    "crc32c": {"actcache.format"},
    "datasets": {"actcache.text", "actcache.harvesting", "actcache.interop", "benchmarks"},
    "pyarrow": {"actcache.text", "actcache.interop"},
    "transformers": {"actcache.models", "actcache.text", "actcache.harvesting", "benchmarks"},
    "accelerate": {"actcache.models"},
    "transformer_lens": {"actcache.models"},
    "tokenizers": {"benchmarks"},
    "triton": {"trainer.kernels", "benchmarks"},
    "plotly": {"trainer.report"},
    "yaml": {"actcache.interop"},
    "wandb": {"trainer.training"},
    "trackio": {"trainer.training"},
    "tensorboard": {"trainer.training"},
    "typer": {"cli", "actcache.commands", "trainer.commands"},
    "tqdm": {"actcache.commands", "trainer.commands"},
    "sae_lens": {"trainer.formats", "benchmarks"},
    "dictionary_learning": {"benchmarks"},
    "sparsify": {"benchmarks"},
}
# methods of a class that open files: the readers and writers, which make the class, are imported when they are called
FILES_OF_A_CLASS = {"trainer.sae.sae": {"trainer.formats.pretrained", "trainer.formats.saelens"}}
OURS = ("actcache", "trainer", "benchmarks")
PATHS = [ROOT / "cli.py", *sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The folder below the package, the module beside the folders, or the package itself."""
    parts = module.split(".")
    return parts[0] if parts[0] in ("benchmarks", "cli") else ".".join(parts[:2])


MODULES = {name_of(path): path for path in PATHS}


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, in functions too; `from a import b` counts as a.b where that is a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module not in FILES_OF_A_CLASS.get(name_of(path), ()):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)


def test_every_room_has_its_line():
    assert {room_of(module) for module in MODULES} == set(ALLOWED)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    me = room_of(module)
    for name in imported(MODULES[module]):
        top = name.split(".")[0]
        if top in (*OURS, "cli") and room_of(name) != me:
            assert room_of(name) in ALLOWED[me], f"{module} must not import {name}: {me} is not above {room_of(name)}"
        assert top not in HOMES or me in HOMES[top], f"{top} is imported by {sorted(HOMES[top])}, not by {module}"


@pytest.mark.parametrize("room", ALLOWED)
def test_no_circle_in_a_room(room):
    graph = {
        module: {name for name in imported(MODULES[module]) if name in MODULES and room_of(name) == room} - {module}
        for module in MODULES
        if room_of(module) == room
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"{room}: {' -> '.join(error.args[1])}")


def test_no_room_is_above_itself():
    TopologicalSorter({room: allowed - {room} for room, allowed in ALLOWED.items()}).prepare()


@pytest.mark.parametrize(
    "modules",
    ["actcache.store.cache, actcache.loading.loader", "trainer.training.sweep, trainer.config.sweep"],
    ids=["reading a cache", "training"],
)
def test_no_language_model_is_imported_for(modules):
    late = {"transformers", "datasets", "transformer_lens"}
    code = f"import sys, {modules}; print(sorted({late} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=CHILD, check=False)
    assert done.stdout == "[]\n", done.stderr


LIGHT = {f"actcache.models.{module}" for module in ("hook_names", "live", "names", "unembedding")}  # names and numbers


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("trainer.")])
def test_the_trainer_imports_no_language_model(module):
    """Models are handed to it; only its commands load one."""
    if room_of(module) != "trainer.commands":
        of_models = {name for name in imported(MODULES[module]) if name.startswith("actcache.models")}
        assert of_models <= LIGHT, f"{module} must be given a model, and import none"


@pytest.mark.parametrize("package", ["actcache", "trainer"])
def test_there_are_few_rooms_on_few_floors(package):
    rooms = [room for room in ALLOWED if room.startswith(f"{package}.")]
    used = {room: {room_of(n) for m, p in MODULES.items() if room_of(m) == room for n in imported(p)} for room in rooms}
    floors: dict[str, int] = {}
    for room in TopologicalSorter({room: (used[room] & {*rooms}) - {room} for room in rooms}).static_order():
        floors[room] = 1 + max((floors[below] for below in used[room] & {*floors}), default=0)
    assert len(rooms) <= 16, rooms
    assert max(floors.values()) <= 7, floors
