"""The README and the pages of docs/ are held against the code: what they show runs, what they list is what there is."""

import contextlib
import dataclasses
import inspect
import json
import math
import re
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support.places import CHILD, ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(name: str) -> str:
    return (DOCS / name).read_text()


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language ("" for those that name none)."""
    return [body for name, body in FENCE.findall(text) if name == language]


def section(text: str, heading: str) -> str:
    """What stands under a heading, down to the next one of its level or above; headings below it included."""
    found = re.search(rf"^(#+) {re.escape(heading)}$\n(.*)", text, re.DOTALL | re.MULTILINE)
    assert found, f"there is no heading {heading!r}"
    return re.split(rf"^#{{1,{len(found[1])}}} ", found[2], maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of every row of every table, without heads."""
    tables = re.findall(r"^\|.*\n\|[-|]+\|\n((?:\|.*\n?)*)", text, re.MULTILINE)
    lines = [line for table in tables for line in table.splitlines()]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def names(cell: str) -> list[str]:
    """What a cell has in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def first_column(text: str) -> list[str]:
    return [name for row in rows(text) for name in names(row[0])]


# --- what a reader of the pages has in his folder --------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of twelve blocks under its hub name, texts and a sweep file."""
    from support.tiny_caches import write_texts
    from support.tiny_models import D_MODEL, make_tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("fresh")
    tokenizer = make_tokenizer()
    sizes = {"n_embd": D_MODEL, "n_layer": 12, "n_head": 4, "n_positions": 256, "n_ctx": 256}
    config = GPT2Config(**sizes, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, initializer_range=0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder / "openai-community" / "gpt2")
    tokenizer.save_pretrained(folder / "openai-community" / "gpt2")
    write_texts(folder / "texts.jsonl", 200)
    sweep = {
        "batch_tokens": 1024,
        "tokens": 4096,
        "base": {"hook_name": "blocks.8.hook_resid_post", "d_sae": 64},
        "runs": [
            {"name": "topk-32", "architecture": "topk", "k": 32},
            {"name": "topk-32-seed1", "architecture": "topk", "k": 32, "seed": 1},
        ],
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    return folder


@pytest.fixture(scope="module")
def prepared(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with what the commands of the README leave, and with a small demo."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import actcache
    import trainer
    from actcache.bundled.documents import bundled_model_path

    folder = tmp_path_factory.mktemp("prepared") / "here"
    shutil.copytree(fresh, folder)
    gpt2_hooks = ["blocks.6.hook_resid_post", "blocks.8.hook_resid_post"]
    demo_run = {"name": "topk-8", "hook_name": "blocks.2.hook_resid_post", "architecture": "topk", "d_sae": 64, "k": 8}
    with contextlib.chdir(folder):
        sweep = trainer.SweepConfig.from_yaml("sweep.yaml")
        demo_sweep = trainer.SweepConfig(train=sweep.train, runs=(demo_run,))
        for name, hooks, trained, out in (
            ("openai-community/gpt2", gpt2_hooks, sweep, Path()),
            (bundled_model_path(), [demo_run["hook_name"]], demo_sweep, Path("demo")),
        ):
            model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
            cache = actcache.harvest(model, tokenizer, "texts.jsonl", hooks, out / "cache", holdout=0.1)
            trainer.train(cache, trained, out / "runs")
    return folder


# --- every page ------------------------------------------------------------------------------------------------------

WITH_PYTHON = [page for page in PAGES if blocks(page.read_text(), "python")]


@pytest.mark.filterwarnings(r"ignore:\s*This SAE has non-empty model_from_pretrained_kwargs")  # as the page says
@pytest.mark.parametrize("page", WITH_PYTHON, ids=page_id)
def test_python_runs(page, fresh, prepared, tmp_path):
    """The blocks of a page, in order, in one namespace; the README begins with a model and texts, the others later."""
    shutil.copytree(fresh if page == ROOT / "README.md" else prepared, tmp_path / "here")
    namespace: dict[str, object] = {"__name__": "__main__"}
    text = page.read_text()
    with contextlib.chdir(tmp_path / "here"):
        for found in FENCE.finditer(text):
            if found[1] == "python":
                line = text[: found.start(2)].count("\n")  # so that a traceback names the line of the page
                exec(compile("\n" * line + found[2], str(page), "exec"), namespace)


def commands(page: Path) -> Iterator[str]:
    """What stands after `actcache` in the page's blocks of commands and in its inline code."""
    text = page.read_text()
    for block in blocks(text, ""):
        for line in block.replace("\\\n", " ").splitlines():
            if found := re.search(r"(?:^|\s)actcache (\S.*)", line.split(" #")[0]):
                yield found[1]
    yield from re.findall(r"`actcache ([^`]+)`", FENCE.sub("", text))


COMMANDS = sorted({(page_id(page), command) for page in PAGES for command in commands(page)})


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_and_their_options_exist(page, command):
    import typer
    from typer.main import get_command

    from cli import app

    group = get_command(app)
    words = command.replace("|", " ").rstrip("& ").split()
    while words and words[0].startswith("--"):
        assert words.pop(0) in {"--help", *(option for parameter in group.params for option in parameter.opts)}
    if not words or words[0].isupper():
        return  # any command
    found = group.get_command(typer.Context(group), words[0])
    assert found is not None, f"there is no command {words[0]}"
    known = {option for parameter in found.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_options_named_in_passing_are_options_of_a_command(page):
    import typer
    from typer.main import get_command

    from cli import app

    group = get_command(app)
    every = [
        group,
        *(group.get_command(typer.Context(group), name) for name in group.list_commands(typer.Context(group))),
    ]
    known = {
        option for each in every for parameter in each.params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    assert set(re.findall(r"`(--[\w-]+)", FENCE.sub("", page.read_text()))) <= known | {"--help"}


def anchors(page: Path) -> set[str]:
    """The headings of a page as a code host makes anchors of them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        assert "://" not in link, f"{link}: pages link to each other alone"
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), f"{link}: there is no such file"
        assert not anchor or anchor in anchors(target), f"{link}: {target.name} has no such heading"


def test_the_index_names_every_page_once():
    index = text_of("README.md")
    linked = [(DOCS / name).resolve() for name in re.findall(r"^- \[.*?\]\(([^)]+)\)", index, re.MULTILINE)]
    assert len(linked) == len(set(linked))
    assert set(linked) == {*PAGES} - {ROOT / "README.md", DOCS / "README.md"}


def test_the_page_of_the_command_line_is_what_the_command_line_says(tmp_path):
    page = tmp_path / "command-line.md"
    asked = ["cli", "utils", "docs", "--name", "actcache", "--title", "The command line", "--output", page]
    subprocess.run([sys.executable, "-m", "typer", *map(str, asked)], check=True, capture_output=True, env=CHILD)
    assert text_of("reference/command-line.md") == page.read_text(), "make docs writes it anew"


@pytest.mark.parametrize("package", ["actcache", "trainer"])
def test_the_house_has_the_rooms_of_its_page(package):
    (drawn,) = blocks(text_of("explanation/the-house.md"), "text")
    listed = section_of_tree(drawn, package)
    folders = {f"{path.parent.name}/" for path in (ROOT / package).glob("*/__init__.py")}
    assert listed == folders | {path.name for path in (ROOT / package).glob("[!_]*.py")}


def section_of_tree(tree: str, folder: str) -> set[str]:
    """What stands, indented, below a folder of a drawn tree."""
    below = tree.split(f"{folder}/\n")[1].split("\n\n")[0]
    return set(re.findall(r"^  (\w[\w.]*/?)", below, re.MULTILINE))


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_sweep_files_are_valid(page, tmp_path):
    from trainer.config.sweep import SweepConfig

    for sweep in blocks(page.read_text(), "yaml"):
        (tmp_path / "sweep.yaml").write_text(sweep)
        assert SweepConfig.from_yaml(tmp_path / "sweep.yaml").runs


# --- the cache format ------------------------------------------------------------------------------------------------

FORMAT = text_of("reference/cache-format.md")


def test_the_example_of_bytes_is_what_the_writer_writes(tmp_path):
    from actcache.format.arrays import ArraySpec
    from actcache.format.codecs import codec
    from actcache.format.dtypes import storage_view
    from actcache.store.shard_file import chunk_slices, write_shard

    (example,) = [block for block in blocks(FORMAT, "text") if block.startswith("00  ")]
    expected = bytes.fromhex("".join(re.findall(r"^\d0  ((?:[0-9a-f]{2} )*[0-9a-f]{2})", example, re.MULTILINE)))
    array = ArraySpec(path="h/acts", dtype="bfloat16", width=2, chunk_rows=2)
    x = storage_view(torch.tensor([[1.0, -2.0], [0.5, 3.0], [100.0, 0.0]]).bfloat16())
    record = write_shard(tmp_path / "0", array, codec("raw"), (x[rows] for rows in chunk_slices(array, 3)), 4)
    assert (tmp_path / "0").read_bytes() == expected
    assert all(f"`{checksum:08x}`" in FORMAT for checksum in record.checksums)


def test_the_example_of_a_seal():
    from actcache.format.seal import seal

    assert f"`{seal({'a': 1}).decode().strip()}`" in FORMAT


def test_the_permutation_by_the_text_alone():
    import hashlib

    from actcache.format.scatter import shard_permutation

    key = np.frombuffer(hashlib.sha256(b"scatter:5:train:2").digest()[:16], dtype="<u8")
    by_text = np.argsort(np.random.Philox(key=key).random_raw(100), kind="stable")
    assert np.array_equal(shard_permutation(100, seed=5, split="train", index=2), by_text)


def test_the_sizes_by_the_text_alone():
    from actcache.format import arrays

    assert (arrays.MAX_SHARD_ROWS, arrays.MAX_SHARD_BYTES, arrays.MAX_CHUNK_BYTES) == (2**18, 2**30, 9 * 2**18)
    assert (arrays.MIN_CHUNK_ROWS, arrays.MIN_SHARDS, arrays.WINDOW_BYTES) == (32, 16, 8 * 2**30)
    assert (arrays.TOKEN_CHUNK_ROWS, arrays.SEQUENCE_SHARD_TOKENS) == (4096, 2**18)


def test_the_folders_of_a_cache_are_those_listed(tiny_cache):
    (listing,) = [block for block in blocks(FORMAT, "text") if block.startswith("CACHE/")]
    for path in tiny_cache.path.rglob("*"):
        if path.is_file():
            relative = path.relative_to(tiny_cache.path)
            assert relative.parts[0] + "/" in listing, relative
            if relative.parts[0] == "manifest" and len(relative.parts) == 2:
                assert str(relative) in listing


def test_the_identity_has_the_keys_listed(tiny_cache):
    keys = first_column(section(FORMAT, "Identity"))
    assert sorted(keys) == sorted(tiny_cache.identity)
    for row in rows(section(FORMAT, "Identity")):
        for key in names(row[0]):
            if isinstance(tiny_cache.identity[key], dict):
                assert set(names(row[1])) == set(tiny_cache.identity[key])


def test_the_codecs_are_those_listed():
    from actcache.format.codecs import CODECS

    assert first_column(section(FORMAT, "Codecs")) == list(CODECS)


# --- the sweep file and the SAEs -------------------------------------------------------------------------------------

SWEEP, VARIANTS = text_of("reference/sweep-file.md"), text_of("reference/sae-variants.md")
SAE_SECTIONS = ("What it is", "Sparsity", "Input and initial weights", "Optimizer", "Schedule")


def value_of(text: str) -> object:
    """What YAML makes of it, and a sweep file: 1e-8 is a number."""
    value = yaml.safe_load(text)
    with contextlib.suppress(TypeError, ValueError):
        return float(value) if isinstance(value, str) else value
    return value


def default(cell: str) -> object:
    """A default of a table; `...` where it is not a value."""
    return value_of(names(cell)[0]) if names(cell) else ...


def test_what_all_saes_share_is_listed_with_its_defaults():
    from trainer.config.settings import TrainConfig

    listed = {names(row[0])[0]: default(row[1]) for row in rows(section(SWEEP, "What all SAEs share"))}
    assert listed == dataclasses.asdict(TrainConfig())


def sae_rows() -> dict[str, object]:
    """Key of one SAE -> its default."""
    found = [row for heading in SAE_SECTIONS for row in rows(section(SWEEP, heading))]
    assert len({row[0] for row in found}) == len(found)
    return {names(row[0])[0]: default(row[1]) for row in found}


def test_every_setting_of_an_sae_is_listed():
    from actcache.errors import ConfigError
    from trainer.config.sweep import SweepConfig

    with pytest.raises(ConfigError, match="known: ") as error:
        SweepConfig.from_dict({"runs": [{"name": "x", "qqqq": 1}]})
    assert set(sae_rows()) == set(str(error.value).partition("known: ")[2].split(", "))


def smallest_runs() -> dict[str, dict[str, object]]:
    """A run of each architecture with what it needs and nothing else."""
    from trainer.config.settings import TOPK_FAMILY, TRANSCODERS, Architecture

    one, two = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
    runs: dict[str, dict[str, object]] = {}
    for architecture in typing.get_args(Architecture):
        hooks = {"hook_names": [one, two]} if architecture == "crosscoder" else {"hook_name": one}
        more = {"hook_name_out": two} if architecture in TRANSCODERS else {}
        sparsity = {"k": 4} if architecture in TOPK_FAMILY else {"sparsity_coefficient": 1.0}
        runs[architecture] = {"name": architecture, "architecture": architecture, "d_sae": 64} | hooks | more | sparsity
    return runs


def test_the_defaults_of_an_sae_are_those_listed(tiny_cache):
    from trainer.config.sweep import SweepConfig

    runs = smallest_runs()
    for config in SweepConfig.from_dict({"runs": list(runs.values())}).expand(tiny_cache, 4096):
        for key, value in sae_rows().items():
            if value is not ... and key not in runs[config.architecture]:
                assert getattr(config, key) == value, (config.architecture, key)


def test_the_architectures_are_those_listed():
    from trainer.config.settings import TOPK_FAMILY, Architecture

    listed = rows(section(VARIANTS, "Architectures"))
    assert [names(row[0])[0] for row in listed] == list(typing.get_args(Architecture))
    assert {names(row[0])[0] for row in listed if row[2].startswith("AuxK")} == set(TOPK_FAMILY)
    modes = {names(row[0])[0] for row in rows(section(VARIANTS, "Losses")) if names(row[0])}
    assert modes == {"step", "quadratic", "tanh"}


def preset_rows() -> dict[str, tuple[list[str], str]]:
    """Preset -> its architectures, and the cell of its settings."""
    before_common = section(VARIANTS, "Presets").split("### Common defaults")[0]
    return {names(row[0])[0]: (names(row[1]), row[2]) for row in rows(before_common)}


def preset_values(preset: str, sizes: dict[str, int]) -> dict[str, object]:
    """What a preset's cell says, its formulas computed."""
    cell = preset_rows()[preset][1]
    base = re.match(r"as `(\w+)`", cell)
    said = preset_values(base[1], sizes) if base else {}
    formulas = dict(re.findall(r"`(\w+) = ([^`]+)`", cell))
    known = {"sqrt": math.sqrt, "log2": math.log2, "min": min, "round": round, **sizes}
    return said | {key: eval(formula, {"__builtins__": {}}, known) for key, formula in formulas.items()}


@pytest.mark.parametrize(("d_in", "d_sae", "n_steps"), [(768, 16384, 464), (2304, 65536, 200_000)])
def test_the_presets_are_those_listed(d_in, d_sae, n_steps):
    from trainer.config.presets import PRESETS, Facts, HookFacts, preset_settings

    hook = HookFacts(d_in=d_in, mean_norm=1.0, mean_square_norm=1.0, total_variance=1.0)
    facts = Facts(inputs=(hook,), outputs=(hook,), training_tokens=4096 * n_steps, n_steps=n_steps)
    common = {
        key: value_of(value)
        for row in rows(section(VARIANTS, "Common defaults"))
        for key, value in zip(names(row[0]), names(row[1]), strict=True)
    }
    elsewhere = {key: value for key, value in sae_rows().items() if value is not ...}
    assert list(preset_rows()) == list(PRESETS)
    for name, preset in PRESETS.items():
        assert preset_rows()[name][0] == list(preset.architectures)
        said = elsewhere | common | preset_values(name, {"d_in": d_in, "d_sae": d_sae, "n_steps": n_steps})
        settings = preset_settings(name, d_sae, facts)
        assert settings.pop("dead_window") == min(10_000_000, facts.training_tokens // 10)
        assert {key: said.get(key, ...) for key in settings} == {
            key: pytest.approx(value) if isinstance(value, float) else value for key, value in settings.items()
        }


# --- what is measured and written ------------------------------------------------------------------------------------

METRICS, RUN_FOLDER = text_of("reference/metrics.md"), text_of("reference/run-folder.md")


@pytest.fixture(scope="module")
def runs(tiny_cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each architecture, and one of each way that a line of metrics.jsonl may look."""
    import trainer

    sweep = {"batch_tokens": 128, "tokens": 256, "log_every": 1, "eval_every": 1}
    tanh = {"name": "tanh", "preset": "anthropic_january", "sparsity_coefficient": 1.0, "d_sae": 64}
    tanh["hook_name"] = "blocks.0.hook_resid_post"
    config = trainer.SweepConfig.from_dict(sweep | {"runs": [*smallest_runs().values(), tanh]})
    trainer.train(tiny_cache, config, out := tmp_path_factory.mktemp("runs"))
    return out


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
def test_the_keys_of_a_log_are_those_listed(runs, name):
    written = {
        key for path in runs.glob(f"*/{name}") for line in path.read_text().splitlines() for key in json.loads(line)
    }
    assert sorted(first_column(section(METRICS, name))) == sorted(written)


def test_the_targets_are_those_of_the_program():
    from trainer.targets import TARGETS

    found = {names(row[0])[0]: row[1] for row in rows(text_of("how-to/is-my-sae-good.md"))}
    assert found == {key: target.words for key, target in TARGETS.items()}


def test_the_keys_of_an_evaluation_are_those_listed(runs, tiny_cache, tiny_model):
    import trainer

    row = trainer.evaluate(runs / "topk", tiny_cache, tiny_model)
    assert sorted(first_column(section(METRICS, "eval.json"))) == sorted(row)
    for key in ("feature_density", "ce_loss_by_position"):
        (cell,) = [row[1] for row in rows(section(METRICS, "eval.json")) if names(row[0]) == [key]]
        assert set(names(cell)) == set(row[key])


def test_the_files_of_a_run_are_those_listed(runs, tiny_cache, tiny_model):
    import trainer
    from trainer.features.build import build_features
    from trainer.features.words import write_words

    listing = "".join(block for block in blocks(RUN_FOLDER, "text") if block.startswith("RUNS/"))
    trainer.evaluate_runs(runs, tiny_cache, tiny_model)
    build_features(runs / "topk", tiny_cache)
    write_words(runs / "topk", tiny_cache, tiny_model)
    files = [path.relative_to(runs / "topk") for path in (runs / "topk").rglob("*") if path.is_file()]
    assert {path.parts[0] for path in files} > {"config.json", "eval.json", "features", "sae", "checkpoint"}
    for path in files:
        assert re.sub(r"\d+", "#", path.name) in re.sub(r"\d+", "#", listing), path
    blocks_of_config = set(json.loads((runs / "topk" / "config.json").read_text()))
    assert set(first_column(section(RUN_FOLDER, "config.json"))) == blocks_of_config


# --- lists of names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["actcache", "trainer"])
def test_the_public_names_are_those_of_the_page(package):
    public = set(__import__(package).__all__)
    page = FENCE.sub("", text_of("reference/python-api.md"))
    described = "\n".join([*re.findall(r"^### .*", page, re.MULTILINE), *(row[0] for row in rows(page))])
    assert set(re.findall(rf"\b{package}\.(\w+)", described)) == public


def test_the_signatures_of_the_page_are_those_of_the_code():
    import actcache
    import trainer

    page = FENCE.sub("", text_of("reference/python-api.md"))
    found = set()
    for name, arguments in re.findall(r"`(?:\w+\.)?(\w+)\(([^`]*)\)(?: -> [^`]*)?`", page):
        called = getattr(actcache, name, None) or getattr(trainer, name, None)
        if called is None or "..." in arguments:
            continue  # a method of a table
        found.add(name)
        known = inspect.signature(called).parameters
        for part in re.split(r",\s*(?![^()]*\))", arguments):
            said, _, value = part.strip().partition("=")
            assert said == "*" or said in known, (name, said)
            if value:
                assert eval(value) == known[said].default, (name, said)
    assert found > {"harvest", "Loader", "load_model", "train", "evaluate", "steer", "write_report"}


def test_every_field_of_saelens_has_its_line():
    """That the tables of the code hold every field is a test of theirs."""
    from actcache.interop import saelens_fields

    page = text_of("tutorial/from-saelens.md")
    for heading, table in (
        ("LanguageModelSAERunnerConfig", saelens_fields.RUNNER),
        ("The SAE's config", saelens_fields.SAE),
        ("The logger", saelens_fields.LOGGER),
        ("SAELens 0 to 5", saelens_fields.FLAT),
        ("CacheActivationsRunnerConfig", saelens_fields.ACTIVATIONS),
    ):
        listed = [[f"`{name.removeprefix('sae.')}`", here] for name, here in table.items()]
        assert rows(section(page, heading)) == listed, heading


def test_the_sweep_file_of_saelens_page_says_what_its_config_says():
    pytest.importorskip("sae_lens")
    from support.config_cases import Hooks

    import trainer

    page = text_of("tutorial/from-saelens.md")
    (python,), (listed,) = blocks(page, "python"), blocks(page, "yaml")
    exec(python, namespace := {})
    sweep, of_file = namespace["sweep"], trainer.SweepConfig.from_dict(yaml.safe_load(listed))
    assert sweep.train == of_file.train
    hooks = Hooks(d_in=768, hook_name="blocks.8.hook_resid_post")
    assert sweep.expand(hooks, 2_000_000) == of_file.expand(hooks, 2_000_000)


def test_the_settings_that_saelens_is_translated_to_exist():
    from trainer.config.settings import TrainConfig

    page = text_of("tutorial/from-saelens.md")
    shared = {field.name for field in dataclasses.fields(TrainConfig)}
    for row in rows(page):
        for kind, known in (("SAE", set(sae_rows())), ("sweep", shared)):
            for said in re.findall(rf"\b{kind} ((?:`[^`]+`(?:, )?)+)", row[1]):
                assert {name.partition(":")[0] for name in names(said)} <= known, row


def test_the_disk_that_a_harvest_needs():
    from actcache.format.records import HookSpec
    from actcache.harvesting.estimate import expected_bytes

    page = text_of("how-to/disk-space.md")
    cases = (
        ("two hooks of 768", 2_000_000, 2, 768),
        ("one hook of 2,304", 100_000_000, 1, 2304),
        ("one hook of 4,096", 1_000_000_000, 1, 4096),
    )
    for what, n_rows, n_hooks, d_in in cases:
        (row,) = [row for row in rows(page) if what in row[0]]
        hooks = [HookSpec(hook_name=f"h{i}", d_in=d_in, dtype="bfloat16") for i in range(n_hooks)]
        for cell, codec in zip(row[1:], ("lossless", "int8"), strict=True):
            said = float(cell.removesuffix(" GB").replace(",", ""))
            assert said == pytest.approx(expected_bytes(n_rows, hooks, codec) / 1e9, rel=0.01)
