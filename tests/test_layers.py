"""The shape of the program: a module imports only from lower levels, and each outside library has its homes."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = [
    [
        "actcache.bundled",
        "actcache.format",
        "actcache.harvesting",
        "actcache.integrity",
        "actcache.interop",
        "actcache.loading",
        "actcache.models",
        "actcache.store",
        "actcache.text",
        "trainer.commands",
        "trainer.config",
        "trainer.evaluation",
        "trainer.features",
        "trainer.formats",
        "trainer.interventions",
        "trainer.kernels",
        "trainer.publish",
        "trainer.report",
        "trainer.sae",
        "trainer.training",
    ],
    [
        "actcache.errors",
        "actcache.loading.order",
        "actcache.format.stats",
        "actcache.flow",
        "actcache.bundled.documents",
        "actcache.format.bfloat16",
    ],
    ["actcache.models.hook_names"],
    [
        "actcache.format.codecs",
        "actcache.models.families",
        "actcache.models.identity",
        "actcache.models.compiled",
        "actcache.models.pretrained",
    ],
    ["actcache.models.unembedding"],
    ["actcache.format.manifest"],
    ["actcache.store.zarr_metadata", "actcache.text.tokenise", "actcache.models.load"],
    ["actcache.store.reader", "actcache.store.journal", "actcache.models.batch_size"],
    ["actcache.store.cache"],
    [
        "actcache.harvesting.plan",
        "actcache.harvesting.finalise",
        "actcache.loading.buffers",
        "actcache.integrity.relabel",
    ],
    ["actcache.harvesting.window", "actcache.harvesting.estimate", "actcache.loading.filters"],
    ["actcache.harvesting.encoder", "actcache.integrity.verify", "actcache.loading.stream"],
    ["actcache.harvesting.run", "actcache.integrity.expected", "actcache.loading.loader"],
    [
        "actcache.harvesting.notebook",
        "actcache.integrity.repair",
        "actcache.integrity.spot_check",
        "actcache.loading.mixture",
        "actcache.interop.arrow_import",
    ],
    ["actcache"],
    ["trainer.config.settings", "trainer.sae.activations", "trainer.sae.metrics", "trainer.kernels.triton_kernels"],
    ["trainer.config.presets"],
    [
        "trainer.config.sweep",
        "trainer.kernels.sparse",
        "trainer.formats.saelens",
        "trainer.evaluation.pca",
        "trainer.training.loggers",
    ],
    ["trainer.sae.architectures"],
    ["trainer.sae.losses", "trainer.training.optimiser", "trainer.features.feature_acts"],
    ["trainer.training.step"],
    ["trainer.training.checkpoint", "trainer.training.plan", "trainer.training.validation"],
    ["trainer.training.run"],
    ["trainer.features.features"],
    ["trainer.evaluation.downstream_loss"],
    ["trainer.training.sweep", "trainer.evaluation.evaluate", "trainer.run_folder"],
    ["trainer.features.attribution"],
    ["trainer.interventions.steering", "trainer.features.token_strings"],
    ["trainer.report.figures", "trainer.report.feature_pages", "trainer.publish.neuronpedia"],
    ["trainer.report.page"],
    ["trainer.report.report"],
    ["trainer.formats.sparsify", "trainer.commands.lines"],
    ["trainer.formats.imports"],
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
    "zarr": {
        "actcache.format.bfloat16",
        "actcache.format.codecs",
        "actcache.store.zarr_metadata",
        "actcache.integrity.verify",
        "benchmarks.bench_read",
    }
    | {"benchmarks.bench_write"},
    "numcodecs": {"actcache.format.codecs"},
    "crc32c": {"actcache.format.codecs"},
    "datasets": {
        "actcache.text.tokenise",
        "actcache.harvesting.notebook",
        "benchmarks.stream",
        "benchmarks.bench_harvest",
    }
    | {"benchmarks.peers", "benchmarks.named_features", "actcache.interop.arrow_import"},
    "pyarrow": {"actcache.interop.arrow_import"},
    "transformers": {
        "actcache.models.load",
        "actcache.models.families",
        "actcache.models.identity",
        "actcache.models.pretrained",
    }
    | {"actcache.text.tokenise", "actcache.harvesting.notebook", "benchmarks.stream", "benchmarks.train_demo_model"},
    "accelerate": {"actcache.models.load", "actcache.models.identity"},
    "transformer_lens": {"actcache.models.load"},
    "tokenizers": {"benchmarks.train_demo_model"},
    "triton": {"trainer.kernels.triton_kernels"},
    "plotly": {"trainer.report.page"},
    "yaml": {"trainer.config.sweep"},
    "psutil": {"trainer.training.plan"},
    "wandb": {"trainer.training.loggers"},
    "trackio": {"trainer.training.loggers"},
    "tensorboard": {"trainer.training.loggers"},
    "typer": {"cli"},
    "tqdm": {"cli"},
    "sae_lens": {"benchmarks.bench_shuffle", "benchmarks.bench_harvest", "benchmarks.peers"}
    | {"benchmarks.bench_features", "benchmarks.bench_eval", "trainer.formats.imports"},
    "dictionary_learning": {"benchmarks.peers"},
    "sparsify": {"benchmarks.peers"},
}
MODULES = [
    ROOT / "cli.py",
    *sorted(path for package in ("actcache", "trainer", "benchmarks") for path in (ROOT / package).rglob("*.py")),
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
            assert not {"transformers", "actcache.models.load", "actcache.harvesting.run"} & set(imported(path))
