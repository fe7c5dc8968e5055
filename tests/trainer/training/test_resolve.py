"""A run keeps to the rows it began with: a hook may be added and the cache may grow, and other rows are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.sweep_cases import Stop, stop_after
from support.tiny_caches import HOOKS, harvest_tiny

from actcache.errors import CacheMismatch
from actcache.store.cache import open_cache
from trainer.config.sweep import SweepConfig
from trainer.training.sweep import plan, train

SMALL, LARGE = 1024, 2048
FILES = ("sae/*", "metrics.jsonl", "checkpoint/*.safetensors")
RUNS = [
    {"name": "topk", "architecture": "topk", "k": 4},
    {"name": "mean", "architecture": "standard", "sparsity_coefficient": 0.5, "b_dec_init": "mean"},
    {"name": "batchtopk", "architecture": "batchtopk", "k": 4},
]


def the_sweep(**changes: Any) -> SweepConfig:
    base = {"hook_name": HOOKS[1], "d_sae": 48, "lr": 0.003}
    shared = {"batch_tokens": 128, "log_every": 3, "checkpoint_every": 4, "epochs": 2}
    return SweepConfig.from_dict({**shared, "base": base, "runs": RUNS, **changes})


@pytest.fixture(scope="module")
def caches(tiny_model, tiny_texts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One cache again and again: of one hook, with two more hooks, and twice as large. Its shards are full, or not."""
    folder, found = tmp_path_factory.mktemp("caches"), {}
    for shape, tokens, holdout in (("full", SMALL, 0.0), ("partial", SMALL + 48, 0.2)):
        steps = {"one": (HOOKS[1:2], tokens), "hooks": (HOOKS, tokens), "grown": (HOOKS, LARGE)}
        root = folder / "now"
        for step, (hooks, n_tokens) in steps.items():
            cache = harvest_tiny(tiny_model, tiny_texts, root, hook_names=hooks, tokens=n_tokens, holdout=holdout)
            found[f"{shape}-{step}"] = Path(shutil.copytree(root, folder / f"{shape}-{step}"))
            is_full = cache.n_rows() % cache.manifest.shard_rows == 0
            assert is_full == (shape == "full") or step == "grown"
        shutil.rmtree(root)
    return found


def begun(cache: Path, out: Path, n_steps: int, **changes: Any) -> Path:
    with pytest.raises(Stop):
        train(open_cache(cache), the_sweep(**changes), out, progress=stop_after(n_steps))
    return out


def outcome(out: Path) -> dict[str, bytes]:
    """What became of the three runs."""
    files = [path for run in RUNS for name in FILES for path in (out / str(run["name"])).glob(name)]
    assert len(files) == 4 * len(RUNS)
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def without_rows(out: Path) -> None:
    """As older versions wrote config.json: with the fingerprint of the whole cache alone, and without a checksum."""
    for path in out.glob("*/config.json"):
        path.with_name("crc32c.json").unlink()
        config = json.loads(path.read_text())
        config["cache"] = {name: config["cache"][name] for name in ("path", "fingerprint")}
        path.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def whole(caches, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shape of the cache -> RUNS that nothing interrupted."""
    found = {}
    for shape in ("full", "partial"):
        found[shape] = tmp_path_factory.mktemp(shape)
        train(open_cache(caches[f"{shape}-one"]), the_sweep(), found[shape])
    return found


@pytest.mark.parametrize("is_old", [False, True], ids=["rows named", "older config.json"])
@pytest.mark.parametrize("shape", ["full", "partial"])
def test_a_hook_that_is_added_changes_nothing(shape: str, is_old: bool, caches, whole, tmp_path: Path) -> None:
    out = begun(caches[f"{shape}-one"], tmp_path, 6)
    if is_old:
        without_rows(out)
    cache = open_cache(caches[f"{shape}-hooks"])
    assert cache.fingerprint != open_cache(caches[f"{shape}-one"]).fingerprint
    train(cache, the_sweep(), out)
    assert outcome(out) == outcome(whole[shape])
    assert plan(cache, the_sweep(), out).passes == ()


@pytest.mark.parametrize("shape", ["full", "partial"])
def test_a_run_goes_on_bit_for_bit_in_a_cache_that_grew(shape: str, caches, whole, tmp_path: Path) -> None:
    out, cache = begun(caches[f"{shape}-one"], tmp_path, 6), open_cache(caches[f"{shape}-grown"])
    assert cache.n_rows() > open_cache(caches[f"{shape}-one"]).n_rows()
    train(cache, the_sweep(), out)
    assert outcome(out) == outcome(whole[shape])


def test_a_run_with_evaluations_goes_on_with_the_former_validation_rows(caches, tmp_path: Path) -> None:
    settings = {"eval_every": 3}
    train(open_cache(caches["partial-one"]), the_sweep(**settings), tmp_path / "whole")
    out = begun(caches["partial-one"], tmp_path / "runs", 6, **settings)
    train(open_cache(caches["partial-grown"]), the_sweep(**settings), out)
    assert outcome(out) == outcome(tmp_path / "whole")


def test_runs_that_began_before_and_after_growth_train_side_by_side(caches, whole, tmp_path: Path) -> None:
    out, cache = begun(caches["full-one"], tmp_path, 6), open_cache(caches["full-grown"])
    more = the_sweep(runs=[*RUNS, {"name": "new", "architecture": "topk", "k": 4, "seed": 3}])
    planned = plan(cache, more, out)
    assert [[each.name for each in one] for one in planned.passes] == [["topk", "mean", "batchtopk"], ["new"]]
    old, new = planned.passes[0][0], planned.passes[1][0]
    assert new.training_tokens > old.training_tokens
    train(cache, more, out)
    assert outcome(out) == outcome(whole["full"])


@pytest.mark.parametrize("shape", ["full", "partial"])
def test_finished_runs_stay_finished_when_the_cache_grows(shape: str, caches, whole, tmp_path: Path) -> None:
    out = Path(shutil.copytree(whole[shape], tmp_path / "runs"))
    cache, before = open_cache(caches[f"{shape}-grown"]), outcome(out)
    assert plan(cache, the_sweep(), out).passes == ()
    assert all(record.error is None and record.seconds == 0 for record in train(cache, the_sweep(), out))
    assert outcome(out) == before
    with pytest.raises(CacheMismatch, match=r"topk: holds another run: sae\.lr is 0\.003 there, 0\.004 here; pass"):
        plan(cache, the_sweep(base={"hook_name": HOOKS[1], "d_sae": 48, "lr": 0.004}), out)


def test_an_unfinished_run_whose_rows_are_gone_is_refused_in_one_line(caches, tmp_path: Path) -> None:
    out = begun(caches["partial-one"], tmp_path / "runs", 6)
    cache = Path(shutil.copytree(caches["partial-grown"], tmp_path / "cache"))
    shutil.rmtree(cache / "kept")
    with pytest.raises(
        CacheMismatch, match=r"topk: is unfinished, and .* has changed since, from [\d,]+ train rows to"
    ):
        train(open_cache(cache), the_sweep(), out)


def test_a_run_without_a_checkpoint_begins_with_the_rows_that_are_there(caches, tmp_path: Path) -> None:
    out, cache = begun(caches["partial-one"], tmp_path / "runs", 2), open_cache(caches["partial-grown"])
    assert not list(out.glob("*/checkpoint/*.safetensors"))
    train(cache, the_sweep(), out)
    train(cache, the_sweep(), tmp_path / "alone")
    assert outcome(out) == outcome(tmp_path / "alone")
    assert json.loads((out / "mean" / "config.json").read_text())["cache"]["n_rows"]["train"] == cache.n_rows()


def test_evaluations_of_other_rows_are_refused(caches, tmp_path: Path) -> None:
    out, cache = begun(caches["partial-one"], tmp_path, 6, eval_every=3), open_cache(caches["partial-hooks"])
    config = json.loads((out / "topk" / "config.json").read_text())
    other = json.loads(json.dumps(config))
    other["cache"]["hooks"][HOOKS[1]]["validation"]["rows"] = "0123456789abcdef"
    (out / "topk" / "crc32c.json").unlink()
    (out / "topk" / "config.json").write_text(json.dumps(other))
    with pytest.raises(
        CacheMismatch,
        match=r"topk: is unfinished, and .* has changed since, from [\d,]+ train and [\d,]+ validation rows",
    ):
        train(cache, the_sweep(eval_every=3), out)
    (out / "topk" / "config.json").write_text(json.dumps(config))
    train(cache, the_sweep(eval_every=3), out)


@pytest.mark.parametrize("is_old", [False, True], ids=["rows named", "older config.json"])
def test_other_rows_are_refused(is_old: bool, caches, whole, tiny_model, tiny_texts, tmp_path: Path) -> None:
    out = Path(shutil.copytree(whole["full"], tmp_path / "runs"))
    if is_old:
        without_rows(out)
    other = harvest_tiny(tiny_model, tiny_texts, tmp_path / "other", tokens=SMALL, holdout=0.0, context_size=32)
    with pytest.raises(CacheMismatch, match="topk: holds another run: "):
        train(other, the_sweep(), out)
