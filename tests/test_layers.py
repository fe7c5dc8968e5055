"""The shape of the program: a module imports only from lower levels, and each outside library has its homes."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = [
    ["actcache.errors", "actcache.order", "actcache.stats", "actcache.flow", "actcache.bundled", "actcache.bfloat16"],
    ["actcache.hooks"],
    ["actcache.codecs", "actcache.families", "actcache.identity", "actcache.compiled", "actcache.pretrained"],
    ["actcache.unembedding"],
    ["actcache.manifest"],
    ["actcache.writer", "actcache.tokens", "actcache.models"],
    ["actcache.reader", "actcache.journal", "actcache.batch_size"],
    ["actcache.cache"],
    ["actcache.plan", "actcache.finalise", "actcache.groups", "actcache.relabel"],
    ["actcache.window", "actcache.estimate", "actcache.filters"],
    ["actcache.encoder", "actcache.verify", "actcache.stream"],
    ["actcache.harvester", "actcache.ledger", "actcache.loader"],
    ["actcache.notebook", "actcache.repair", "actcache.sample", "actcache.mixture", "actcache.arrow"],
    ["actcache"],
    ["trainer.config", "trainer.functional", "trainer.metrics", "trainer.triton_kernels"],
    ["trainer.presets"],
    ["trainer.sweep_file", "trainer.kernels", "trainer.saelens", "trainer.pca", "trainer.loggers"],
    ["trainer.architectures"],
    ["trainer.losses", "trainer.optimiser", "trainer.codes"],
    ["trainer.train"],
    ["trainer.checkpoint", "trainer.plan", "trainer.validation"],
    ["trainer.runs"],
    ["trainer.features"],
    ["trainer.model_losses"],
    ["trainer.sweep", "trainer.evaluate", "trainer.run_files"],
    ["trainer.analysis"],
    ["trainer.steering", "trainer.labels"],
    ["trainer.figures", "trainer.feature_pages", "trainer.neuronpedia"],
    ["trainer.page"],
    ["trainer.report"],
    ["trainer.formats", "trainer.lines"],
    ["trainer.interop"],
    ["trainer"],
    ["benchmarks"],
    ["benchmarks.measure", "benchmarks.stream", "benchmarks.peers", "benchmarks.train_demo_model"],
    ["benchmarks.roofline"],
    ["benchmarks.bench_harvest", "benchmarks.bench_read", "benchmarks.bench_train", "benchmarks.bench_shuffle"],
    ["benchmarks.bench_codecs", "benchmarks.bench_write", "benchmarks.bench_feed", "benchmarks.bench_kernels"],
    ["benchmarks.gpu_kernels"],
    ["benchmarks.gpu", "benchmarks.bench_features", "benchmarks.bench_eval"],
    ["benchmarks.bench_sweep", "benchmarks.bench_quality", "benchmarks.named_features"],
    ["cli"],
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
HOMES = {
    "zarr": {"actcache.bfloat16", "actcache.codecs", "actcache.writer", "actcache.verify", "benchmarks.bench_read"}
    | {"benchmarks.bench_write"},
    "numcodecs": {"actcache.codecs"},
    "crc32c": {"actcache.codecs"},
    "datasets": {"actcache.tokens", "actcache.notebook", "benchmarks.stream", "benchmarks.bench_harvest"}
    | {"benchmarks.peers", "benchmarks.named_features", "actcache.arrow"},
    "pyarrow": {"actcache.arrow"},
    "transformers": {"actcache.models", "actcache.families", "actcache.identity", "actcache.pretrained"}
    | {"actcache.tokens", "actcache.notebook", "benchmarks.stream", "benchmarks.train_demo_model"},
    "accelerate": {"actcache.models", "actcache.identity"},
    "transformer_lens": {"actcache.models"},
    "tokenizers": {"benchmarks.train_demo_model"},
    "triton": {"trainer.triton_kernels"},
    "plotly": {"trainer.page"},
    "yaml": {"trainer.sweep_file"},
    "psutil": {"trainer.plan"},
    "wandb": {"trainer.loggers"},
    "trackio": {"trainer.loggers"},
    "tensorboard": {"trainer.loggers"},
    "typer": {"cli"},
    "tqdm": {"cli"},
    "sae_lens": {"benchmarks.bench_shuffle", "benchmarks.bench_harvest", "benchmarks.peers"}
    | {"benchmarks.bench_features", "benchmarks.bench_eval", "trainer.interop"},
    "dictionary_learning": {"benchmarks.peers"},
    "sparsify": {"benchmarks.peers"},
}
MODULES = [
    ROOT / "cli.py",
    *sorted(path for package in ("actcache", "trainer", "benchmarks") for path in (ROOT / package).glob("*.py")),
]
OURS = ("actcache", "trainer", "benchmarks", "cli")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> list[str]:
    """Every module that a file imports, in functions too; `from a import b` counts as a.b where that is a module."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in LEVEL else node.module for a in node.names
            ]
    return names


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    me = name_of(path)
    assert me in LEVEL, f"{me} has no level; add it to LEVELS"
    for name in imported(path):
        if name.split(".")[0] in OURS:
            assert LEVEL[name] < LEVEL[me], f"{me} must not import {name}: same level or above"
        homes = HOMES.get(name.split(".")[0])
        assert homes is None or me in homes, f"{name} is imported only by {sorted(homes or ())}, not by {me}"


def test_every_level_exists():
    gone = set(LEVEL) - {name_of(path) for path in MODULES}
    assert not gone, f"LEVELS names modules that are gone: {sorted(gone)}"


def test_the_trainer_never_imports_a_language_model():
    for path in MODULES:
        if name_of(path).startswith("trainer"):
            assert not {"transformers", "actcache.models", "actcache.harvester"} & set(imported(path))
