"""The cache that a run remembers is the one that it was trained on, or has grown from it; any other is refused."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from support.tiny_caches import HOOKS, harvest_tiny

from actcache.errors import CacheMismatch, ManifestError
from actcache.store.cache import open_cache
from trainer.config.sweep import SweepConfig
from trainer.trained_on import cache_with_rows, open_trained_on, rows_state
from trainer.training.sweep import train


@pytest.fixture(scope="module")
def begun(tiny_model, tiny_texts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache of one hook, and RUNS of one SAE."""
    folder = tmp_path_factory.mktemp("begun")
    cache = harvest_tiny(tiny_model, tiny_texts, folder / "cache", hook_names=HOOKS[1:2], tokens=1200)
    base = {"hook_name": HOOKS[1], "d_sae": 48, "architecture": "topk", "k": 4, "name": "topk"}
    train(cache, SweepConfig.from_dict({"batch_tokens": 128, "base": base}), folder / "runs")
    return folder


@pytest.fixture(params=["rows named", "older config.json"])
def folder(request, begun: Path, tmp_path: Path) -> Path:
    """A copy of it that remembers its own cache; older versions wrote the fingerprint of the whole cache alone."""
    copy = Path(shutil.copytree(begun, tmp_path / "copy"))
    path = copy / "runs" / "topk" / "config.json"
    config = json.loads(path.read_text())
    config["cache"]["path"] = str(copy / "cache")
    (path.parent / "crc32c.json").unlink()
    if request.param == "older config.json":
        config["cache"] = {name: config["cache"][name] for name in ("path", "fingerprint")}
    path.write_text(json.dumps(config))
    return copy


def test_the_cache_of_a_run_is_opened(folder: Path) -> None:
    for runs in (folder / "runs", folder / "runs" / "topk"):
        assert open_trained_on(runs).path == folder / "cache"


def test_a_hook_that_is_added_changes_nothing(folder: Path, tiny_model, tiny_texts, caplog) -> None:
    before = open_cache(folder / "cache").fingerprint
    harvest_tiny(tiny_model, tiny_texts, folder / "cache", hook_names=HOOKS, tokens=1200)
    caplog.clear()
    assert open_trained_on(folder / "runs").fingerprint != before
    assert caplog.messages == []


LIES: tuple[tuple[str, object], ...] = (
    ("", "x"),
    ("", [1]),
    ("path", 3),
    ("path", "a\0b"),
    ("path", "\ud800"),
    ("fingerprint", []),
    ("n_rows", 3),
    ("n_rows", {"train": "x", "validation": 1}),
    ("n_rows", {"train": 10**400, "validation": 1}),
    ("hooks", "x"),
    ("hooks", {}),
    ("hooks", {HOOKS[1]: 3}),
    ("hooks", {HOOKS[1]: {"d_in": 32}}),
)


@pytest.mark.parametrize(("field", "lie"), LIES, ids=lambda value: repr(value)[:30])
def test_a_block_that_is_none_is_named(begun: Path, field, lie, tmp_path: Path) -> None:
    """Whether the run is read, or goes on."""
    copy = Path(shutil.copytree(begun, tmp_path / "copy"))
    path = copy / "runs" / "topk" / "config.json"
    config = json.loads(path.read_text())
    (path.parent / "crc32c.json").unlink()
    config["cache"] = {**config["cache"], field: lie} if field else lie
    path.write_text(json.dumps(config))
    base = {"hook_name": HOOKS[1], "d_sae": 48, "architecture": "topk", "k": 4, "name": "topk"}
    sweep = SweepConfig.from_dict({"batch_tokens": 128, "base": base})
    named = rf"config\.json: cache{'.' if field else ''}{field}.* must be .*; restore the file, or pass --cache"
    with pytest.raises(ManifestError, match=named):
        open_trained_on(copy / "runs")
    with pytest.raises(ManifestError, match=named):
        train(open_cache(copy / "cache"), sweep, copy / "runs")


def test_settings_that_are_none_are_of_other_rows(begun: Path, tmp_path: Path) -> None:
    """A run of an older program is compared by its settings; these are a stranger's."""
    copy = Path(shutil.copytree(begun, tmp_path / "copy"))
    path = copy / "runs" / "topk" / "config.json"
    config = json.loads(path.read_text())
    (path.parent / "crc32c.json").unlink()
    config["cache"] = {"path": str(copy / "cache"), "fingerprint": "0" * 16}
    for lie in ({"output_scale": 1e300}, {"normalize_activations": []}, {"lr": 10**400}):
        path.write_text(json.dumps(config | {"sae": config["sae"] | lie}))
        with pytest.raises(CacheMismatch, match="was trained on other rows"):
            open_trained_on(copy / "runs")


def test_another_cache_at_its_path_is_refused(folder: Path, tiny_model, tiny_texts) -> None:
    """Of the same model and hook, with other rows."""
    shutil.rmtree(folder / "cache")
    harvest_tiny(tiny_model, tiny_texts, folder / "cache", hook_names=HOOKS[1:2], tokens=1200, context_size=32)
    with pytest.raises(
        CacheMismatch, match=r"topk: was trained on other rows than .*cache holds now .* or --cache .*cache to use this"
    ):
        open_trained_on(folder / "runs")


def test_a_cache_without_the_hook_is_refused(folder: Path, tiny_model, tiny_texts) -> None:
    shutil.rmtree(folder / "cache")
    harvest_tiny(tiny_model, tiny_texts, folder / "cache", hook_names=HOOKS[2:], tokens=1200)
    with pytest.raises(CacheMismatch, match=r"cache: holds .*, got hook_name='blocks\.1\.hook_attn_out'"):
        open_trained_on(folder / "runs")


def test_what_a_cache_that_grew_has_more_is_said(begun: Path, tiny_model, tiny_texts, tmp_path: Path, caplog) -> None:
    folder = Path(shutil.copytree(begun, tmp_path / "copy"))
    path = folder / "runs" / "topk" / "config.json"
    config = json.loads(path.read_text())
    config["cache"]["path"] = str(folder / "cache")
    (path.parent / "crc32c.json").unlink()
    path.write_text(json.dumps(config))
    old = open_cache(folder / "cache")
    assert rows_state(config["cache"], old, "train") == rows_state(config["cache"], old, "validation") == "same"
    grown = harvest_tiny(tiny_model, tiny_texts, folder / "cache", hook_names=HOOKS[1:2], tokens=2000)
    assert rows_state(config["cache"], grown, "train") == "grown"
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        open_trained_on(folder / "runs")
    (said,) = caplog.messages
    assert f"has grown since, from {old.n_rows('validation')} to {grown.n_rows('validation')} rows" in said


def test_the_rows_of_a_run_are_found_in_what_the_cache_has_grown_from(begun, tiny_model, tiny_texts, tmp_path) -> None:
    """Twice grown, with a hook added between."""
    root = Path(shutil.copytree(begun / "cache", tmp_path / "cache"))
    block = json.loads((begun / "runs" / "topk" / "config.json").read_text())["cache"]
    for hooks, tokens in ((HOOKS[1:2], 1500), (HOOKS[:2], 1500), (HOOKS[:2], 2000)):
        now = harvest_tiny(tiny_model, tiny_texts, root, hook_names=hooks, tokens=tokens)
    old, found = open_cache(begun / "cache"), cache_with_rows(block, now, ("train", "validation"))
    assert now.fingerprint != found.fingerprint == old.fingerprint
    for split in ("train", "validation"):
        readers = [cache.hook_reader(split, HOOKS[1]) for cache in (old, found)]
        assert torch.equal(*(reader.read(0, reader.n_rows) for reader in readers))
    assert cache_with_rows({**block, "hooks": {"of another model": {}}}, now, ("train",)) is None


def test_a_folder_that_remembers_no_cache_says_so(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="holds no run that remembers its cache"):
        open_trained_on(tmp_path)
