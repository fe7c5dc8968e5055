"""SAELens' Arrow caches as its runner writes them: every value arrives, to the last bit."""

import json
import os
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, Features, Sequence, Value
from support.arrow_caches import CONTEXT, HOOK, N_ROWS, OTHER_HOOK, arrow_folder, column, config, in_token_order
from support.strangers import as_another_user, copy_of_another_user, only_root
from support.tiny_caches import promised_files
from support.tiny_models import make_model, make_tokenizer
from support.tiny_saes import make_config, make_run

from actcache.errors import CacheMismatch, ConfigError, CorruptShard, DatasetError, NonFiniteActivations
from actcache.integrity.repair import repair
from actcache.integrity.spot_check import sample_model
from actcache.integrity.verify import verify
from actcache.interop.arrow_import import ArrowRows, import_cache
from actcache.models.load import wrap_model
from actcache.store.cache import Cache, open_cache
from actcache.text.packing import split_of

# --- import ---


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_value_arrives_bit_for_bit_in_its_split(dtype, tmp_path):
    source = arrow_folder(tmp_path / "arrow", dtype=dtype)
    calls: list[tuple[int, int]] = []
    cache = import_cache(source, config(), tmp_path / "cache", progress=lambda *call: calls.append(call))
    assert cache.identity["dtype"] == dtype
    assert set(cache.hook_names) == {HOOK, OTHER_HOOK}
    splits = np.array([split_of(row, seed=0, holdout=0.2) for row in range(N_ROWS)])
    assert 0 < (splits == "validation").sum() < N_ROWS / 2
    token_ids = column(source, "token_ids")
    for split in ("train", "validation"):
        rows = np.flatnonzero(splits == split)
        assert np.array_equal(cache.sequences(split), token_ids[rows])
        assert np.array_equal(cache.documents(split), np.repeat(rows[:, None], CONTEXT, axis=1))
        for hook_name in (HOOK, OTHER_HOOK):
            bits = f"uint{np.dtype(dtype).itemsize * 8}"
            stored = in_token_order(cache, split, hook_name).numpy()
            expected = np.stack([np.asarray(x, dtype=dtype) for x in column(source, hook_name)[rows]])
            assert np.array_equal(stored.view(bits), expected.view(bits))
    assert calls == sorted(calls)
    assert calls[-1] == (N_ROWS * CONTEXT, N_ROWS * CONTEXT)


def test_it_is_a_whole_cache(tmp_path):
    cache = import_cache(arrow_folder(tmp_path / "arrow"), config(), tmp_path / "cache")
    report = verify(cache.path)
    assert (report.problems, report.notes) == ((), ())
    x = in_token_order(cache, "train", HOOK).double()
    plain = x[:, 1:].flatten(0, 1)  # BOS is at position 0 alone
    statistics = cache.statistics(HOOK)
    assert statistics.n_rows == len(plain)
    error = len(plain) * 2.0**-53 * float(plain.abs().max())  # of sums in float64
    assert np.abs(statistics.mean - plain.mean(0).numpy()).max() <= error
    identity = cache.identity
    assert identity["model"] == {"name": "tiny", "revision": None, "config_sha256": None, "weights_sha256": None}
    assert (identity["tokenizer_sha256"], identity["prepend_bos"], identity["separator"]) == (None, None, None)
    assert identity["dataset"]["name"] == "arrow"
    assert len(identity["dataset"]["content_sha256"]) == 64
    assert cache.origin == {"model": "tiny", "revision": None, "dataset": None}


def test_bfloat16_on_request_is_rounded_once(tmp_path):
    source = arrow_folder(tmp_path / "arrow")
    cache = import_cache(source, config(dtype="bfloat16", holdout=0.0), tmp_path / "cache")
    expected = torch.from_numpy(column(source, HOOK).astype(np.float32)).bfloat16()
    assert torch.equal(in_token_order(cache, "train", HOOK), expected)
    assert cache.n_rows("validation") == 0


def test_equal_imports_are_equal_to_the_byte_and_done_once(tmp_path):
    source = arrow_folder(tmp_path / "arrow")
    first, second = (import_cache(source, config(), tmp_path / name).path for name in ("a", "b"))
    assert promised_files(first) == promised_files(second)
    times = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.suffix in ("", ".json")}
    calls: list[tuple[int, int]] = []
    import_cache(source, config(), first, progress=lambda *call: calls.append(call))
    assert calls == []
    assert {path: path.stat().st_mtime_ns for path in times if path.is_file()} == {
        path: time for path, time in times.items() if path.is_file()
    }


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 2, 5])
def test_a_killed_import_goes_on_where_it_was(after, tmp_path, monkeypatch):
    """In shards of 256 rows; whatever the kill left, the files come out as those of an import that was not killed."""
    monkeypatch.setattr("actcache.harvesting.config.BATCH_TOKENS", 256)
    source = arrow_folder(tmp_path / "arrow")
    whole = import_cache(source, config(), tmp_path / "whole").path
    calls: list[tuple[int, int]] = []

    def kill(*call: int) -> None:
        calls.append(call)
        if len(calls) == after:
            raise Killed

    with pytest.raises(Killed):
        import_cache(source, config(), tmp_path / "cache", progress=kill)
    n_done = calls[-1][0]
    with pytest.raises(Exception, match="unfinished"):
        open_cache(tmp_path / "cache")
    import_cache(source, config(), tmp_path / "cache", progress=lambda *call: calls.append(call))
    assert calls[after][0] > n_done, "what was done is not done again"
    assert promised_files(tmp_path / "cache") == promised_files(whole)


def test_another_import_into_the_same_folder_lists_what_differs(tmp_path):
    source = arrow_folder(tmp_path / "arrow")
    import_cache(source, config(), tmp_path / "cache")
    with pytest.raises(CacheMismatch, match=r"holdout is 0\.2 there, 0\.5 here"):
        import_cache(source, config(holdout=0.5), tmp_path / "cache")
    other = arrow_folder(tmp_path / "other" / "arrow", n_rows=N_ROWS - 1)
    with pytest.raises(CacheMismatch, match="dataset is "):
        import_cache(other, config(), tmp_path / "cache")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear")
    with pytest.raises(CacheMismatch, match=r"must be empty or a cache, holds diary\.txt"):
        import_cache(source, config(), tmp_path / "mine")
    with pytest.raises(ConfigError, match="codec"):
        import_cache(source, config(codec="zip"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_is_no_such_cache_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="must be a folder that datasets saved"):
        import_cache(tmp_path / "nowhere", config(), tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="must be a folder that datasets saved"):
        import_cache(tmp_path / "empty", config(), tmp_path / "cache")
    Dataset.from_dict({"token_ids": [[1, 2]]}).save_to_disk(str(tmp_path / "tokens"))
    with pytest.raises(DatasetError, match="must have a column token_ids and for each hook one"):
        import_cache(tmp_path / "tokens", config(), tmp_path / "cache")
    no_tokens = datasets.load_from_disk(str(arrow_folder(tmp_path / "arrow"))).remove_columns("token_ids")
    no_tokens.save_to_disk(str(tmp_path / "no_tokens"))
    with pytest.raises(DatasetError, match="must have a column token_ids"):
        import_cache(tmp_path / "no_tokens", config(), tmp_path / "cache")
    rows = {HOOK: [[[1.0, 2.0]], None], "token_ids": [[1], [2]]}
    features = Features({HOOK: Array2D(shape=(1, 2), dtype="float32"), "token_ids": Sequence(Value("int32"), length=1)})
    Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "torn"))
    with pytest.raises(DatasetError, match=r"every row of blocks.1.hook_resid_post must be whole, of shape"):
        ArrowRows(tmp_path / "torn", "tiny").activations(HOOK, [0, 1])


@only_root
def test_a_cache_that_cannot_be_read_is_not_another_folder(tmp_path):
    with copy_of_another_user(arrow_folder(tmp_path / "arrow")) as source:
        for path in source.glob("*.arrow"):
            os.chown(path, 0, 0)
            path.chmod(0o600)
        with as_another_user(), pytest.raises(PermissionError, match=f"run as a user who has it: '{source}"):
            ArrowRows(source, "tiny")


def test_values_that_a_dtype_cannot_hold_stop_it(tmp_path):
    x = np.full((4, 2, 2), 1e6, dtype=np.float32)
    features = Features({HOOK: Array2D(shape=(2, 2), dtype="float32"), "token_ids": Sequence(Value("int32"), length=2)})
    rows = Dataset.from_dict({HOOK: list(x), "token_ids": [[1, 2]] * 4}, features=features)
    rows.save_to_disk(str(tmp_path / "arrow"))
    with pytest.raises(NonFiniteActivations, match="infinite as float16"):
        import_cache(tmp_path / "arrow", config(dtype="float16", holdout=0.0), tmp_path / "cache")


def test_a_damaged_import_is_not_repaired_with_a_guess(tmp_path):
    cache = import_cache(arrow_folder(tmp_path / "arrow"), config(), tmp_path / "cache")
    shard = next((cache.path / "acts.zarr" / "train" / HOOK / "acts" / "c" / "0").iterdir())
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptShard):
        cache.hook_reader("train", HOOK).read(0, 10)
    with pytest.raises(CacheMismatch, match=r"was imported, and does not know which weights .* import it again"):
        repair(cache.path, lambda _: pytest.fail("no model is asked for"))


# --- SAELens' own ---


@pytest.fixture(scope="module")
def saelens_cache(tiny_gpt2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What its CacheActivationsRunner writes of the tiny GPT-2, whose modules it calls by transformers' names."""
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    ids = np.random.default_rng(0).integers(2, 400, (64, CONTEXT))
    out = tmp_path_factory.mktemp("saelens") / "arrow"
    settings = CacheActivationsRunnerConfig(
        dataset_path="in memory",
        model_name=str(tiny_gpt2_dir),
        model_class_name="AutoModelForCausalLM",
        model_batch_size=8,
        hook_name="transformer.h.1",
        d_in=32,
        training_tokens=ids.size,
        context_size=CONTEXT,
        new_cached_activations_path=str(out),
        shuffle=False,
        buffer_size_gb=(ids.size // 4 + 1) * 32 * 4 / 1e9,
        device="cpu",
        prepend_bos=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CacheActivationsRunner(settings, override_dataset=Dataset.from_dict({"input_ids": ids.tolist()})).run()
    return out


@pytest.fixture(scope="module")
def imported(saelens_cache: Path, tiny_gpt2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    out = tmp_path_factory.mktemp("imported") / "cache"
    return import_cache(saelens_cache, config(model=str(tiny_gpt2_dir), special_token_ids=()), out)


@pytest.fixture(scope="module")
def gpt2(tiny_gpt2_dir: Path):
    tokenizer = make_tokenizer()
    return wrap_model(make_model("gpt2", len(tokenizer)), tokenizer, tiny_gpt2_dir.name)


def test_what_saelens_cached_is_what_the_model_gives(imported, saelens_cache, gpt2):
    assert imported.hook_names == (HOOK,), "transformer.h.1 under TransformerLens' name"
    assert np.array_equal(
        imported.documents("validation")[:, 0],
        [r for r in range(64) if split_of(r, seed=0, holdout=0.2) == "validation"],
    )
    sampled = sample_model(imported, gpt2, 8)
    assert (sampled.problems, sampled.n_sequences) == ((), 8)
    assert "rows may lie" in sampled.notes[0]
    stored = column(saelens_cache, "transformer.h.1")[imported.documents("train")[:, 0]]
    assert np.array_equal(in_token_order(imported, "train", HOOK).numpy(), stored.astype(np.float32))


def test_evaluation_goes_by_the_name_and_says_so(imported, gpt2, tiny_model, tmp_path):
    from trainer.evaluation.evaluate import evaluate_runs

    run = make_run(tmp_path, make_config("topk", hook_name=HOOK, d_in=32), imported.identity["model"])
    (row,) = evaluate_runs(run, imported, gpt2, model_tokens=64)
    assert row["ce_loss_score"] is not None
    says = (
        r"was imported and knows no weights and no tokenizer of its model, only the name .* import the cache again with"
    )
    with pytest.raises(CacheMismatch, match=says):
        evaluate_runs(run, imported, tiny_model)
    assert evaluate_runs(run, imported)[0]["l0"] <= 5, "without a model there is nothing to doubt"


def test_training_from_an_imported_cache(imported, tmp_path):
    from trainer.config.sweep import SweepConfig
    from trainer.training.sweep import train

    sweep = SweepConfig.from_dict(
        {"batch_tokens": 64, "runs": [{"architecture": "topk", "hook_name": HOOK, "d_sae": 64, "k": 4, "lr": 1e-3}]}
    )
    (record,) = train(imported, sweep, tmp_path / "runs")
    assert record.error is None


@pytest.mark.parametrize("size", [{"dtype": "int32", "_type": "Value"}, "2", -1, 1 << 62, None])
def test_a_shape_that_a_stranger_says_is_one_line(tmp_path, size):
    features = Features({HOOK: Array2D(shape=(1, 2), dtype="float32"), "token_ids": Sequence(Value("int32"), length=1)})
    rows = {HOOK: [[[0.0, 1.0]]], "token_ids": [[1]]}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "arrow")
    info = json.loads((tmp_path / "arrow" / "dataset_info.json").read_text())
    info["features"][HOOK]["shape"][0] = size
    (tmp_path / "arrow" / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DatasetError, match=r"must (have a column|be a folder)"):
        import_cache(tmp_path / "arrow", config(), tmp_path / "c")
