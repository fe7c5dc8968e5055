"""SAELens' Arrow caches: as its runner writes them and as its store reads them, to the last bit and back."""

import json
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, Features, Sequence, Value
from support.tiny_caches import HOOKS, harvest_tiny, promised_files
from support.tiny_models import make_model, make_tokenizer
from support.tiny_saes import make_config, make_run
from torch import Tensor

from actcache.errors import CacheMismatch, ConfigError, CorruptShard, DatasetError, NonFiniteActivations
from actcache.integrity.repair import repair
from actcache.integrity.spot_check import sample_model
from actcache.integrity.verify import verify
from actcache.interop.arrow_export import export_cache
from actcache.interop.arrow_import import ArrowImport, ArrowRows, import_cache
from actcache.models.load import wrap_model
from actcache.store.cache import Cache, open_cache
from actcache.text.packing import split_of

CONTEXT, D_IN, N_ROWS = 16, 24, 300
HOOK, OTHER_HOOK = "blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"
BOS = 0


def arrow_folder(
    path: Path, *, dtype: str = "float32", n_rows: int = N_ROWS, hooks: tuple[str, ...] = (HOOK, OTHER_HOOK)
) -> Path:
    """Such a cache as `datasets` saves it, in several files; every value is a bit pattern of its own."""
    rng = np.random.default_rng(3)
    columns: dict[str, Any] = {
        hook: rng.standard_normal((n_rows, CONTEXT, D_IN + 8 * i)).astype(dtype) for i, hook in enumerate(hooks)
    }
    features: dict[str, Any] = {hook: Array2D(shape=x.shape[1:], dtype=dtype) for hook, x in columns.items()}
    columns["token_ids"] = rng.integers(1, 500, (n_rows, CONTEXT)).astype(np.int32)
    columns["token_ids"][:, 0] = BOS
    features["token_ids"] = Sequence(Value("int32"), length=CONTEXT)
    rows = Dataset.from_dict({name: list(x) for name, x in columns.items()}, features=Features(features))
    rows.save_to_disk(str(path), num_shards=3)
    return path


def column(path: Path, name: str) -> np.ndarray:
    """What `datasets` itself reads of a column."""
    return np.stack([np.asarray(row[name]) for row in datasets.load_from_disk(str(path)).with_format("numpy")])


def in_token_order(cache: Cache, split: str, hook_name: str) -> Tensor:
    """Every row of a split, [sequence, position, d_in], by the numbers stored beside the rows."""
    n_rows = cache.n_rows(split)
    sequence, position = (cache.token_reader(split, name).read(0, n_rows) for name in ("sequence", "position"))
    order = np.argsort(sequence.astype(np.int64) * cache.context_size + position)
    return (
        cache.hook_reader(split, hook_name)
        .read(0, n_rows)[order]
        .view(-1, cache.context_size, cache.hook(hook_name).d_in)
    )


def config(**changes: Any) -> ArrowImport:
    return ArrowImport(**{"model": "tiny", "special_token_ids": (BOS,), "holdout": 0.2, **changes})


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


# --- export ---


def store_of(path: Path, hook_name: str, d_in: int, context_size: int, n_tokens: int) -> Any:
    """SAELens' store over an Arrow cache, in reads of 4 sequences."""
    from sae_lens import ActivationsStore, CacheActivationsRunnerConfig

    settings = CacheActivationsRunnerConfig(
        dataset_path="in memory",
        model_name="in memory",
        model_batch_size=4,
        hook_name=hook_name,
        d_in=d_in,
        training_tokens=n_tokens,
        context_size=context_size,
        new_cached_activations_path=str(path),
        device="cpu",
    )
    return ActivationsStore.from_cache_activations(None, settings)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_saelens_store_reads_every_row_of_an_export(split, tiny_cache, tmp_path):
    out = export_cache(tiny_cache, tmp_path / "arrow", split=split)
    n_rows = tiny_cache.n_rows(split)
    for hook_name in HOOKS:
        store = store_of(out, hook_name, 32, tiny_cache.context_size, n_rows)
        expected = in_token_order(tiny_cache, split, hook_name).flatten(0, 1).float()
        n_reads = n_rows // (4 * tiny_cache.context_size)
        parts = [store.get_raw_llm_batch() for _ in range(n_reads)]
        assert torch.equal(torch.cat([x for x, _ in parts]), expected[: n_reads * 4 * tiny_cache.context_size])
        token_ids = torch.cat([ids for _, ids in parts])
        whole = torch.from_numpy(tiny_cache.sequences(split)).flatten()[: len(token_ids)]
        assert torch.equal(token_ids.long(), whole.long())


def test_saelens_trains_from_an_export(tiny_cache, tmp_path):
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    out = export_cache(tiny_cache, tmp_path / "arrow")
    store = store_of(out, HOOKS[2], 32, tiny_cache.context_size, tiny_cache.n_rows())
    store.train_batch_size_tokens, store.n_batches_in_buffer = 64, 16
    settings = SAETrainerConfig(
        total_training_samples=640,
        train_batch_size_samples=64,
        lr=1e-2,
        lr_end=1e-3,
        lr_warm_up_steps=0,
        lr_decay_steps=0,
        dead_feature_window=10,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
    )
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=32, d_sae=64, k=4))
    x = in_token_order(tiny_cache, "train", HOOKS[2]).flatten(0, 1).float()
    with torch.no_grad():
        before = (sae(x) - x).square().sum()
    SAETrainer(cfg=settings, sae=sae, data_provider=store).fit()
    with torch.no_grad():
        assert (sae(x) - x).square().sum() < before


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_arrow_to_cache_to_arrow_changes_no_bit(dtype, tmp_path):
    source = arrow_folder(tmp_path / "arrow", dtype=dtype)
    cache = import_cache(source, config(holdout=0.0), tmp_path / "cache")
    out = export_cache(cache, tmp_path / "back")
    there, back = (datasets.load_from_disk(str(path)) for path in (source, out))
    assert back.features == there.features.__class__({name: there.features[name] for name in back.column_names})
    for name in there.column_names:
        assert np.array_equal(column(source, name).view(np.uint8), column(out, name).view(np.uint8))


@pytest.mark.parametrize("codec", ["lossless", "int8"])
def test_cache_to_arrow_to_cache_changes_no_value(codec, tiny_model, tiny_texts, tmp_path):
    """bfloat16 through float32 columns; of int8, the values that are read."""
    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "cache", codec=codec, tokens=1024)
    out = export_cache(cache, tmp_path / "arrow")
    back = import_cache(out, config(dtype="bfloat16", holdout=0.0), tmp_path / "back")
    assert np.array_equal(back.sequences("train"), cache.sequences("train"))
    for hook_name in HOOKS:
        assert torch.equal(in_token_order(back, "train", hook_name), in_token_order(cache, "train", hook_name))


def test_sequences_that_end_in_the_next_shard_are_whole(tiny_model, tiny_texts, tmp_path):
    """Contexts of 24 in shards of 128 rows: every shard begins inside a sequence but the first of three."""
    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "cache", context_size=24, batch_size=5, tokens=1200)
    assert cache.manifest.shard_rows % 24
    assert len(cache.manifest.shards["train"]) > 2
    calls: list[tuple[int, int]] = []
    out = export_cache(cache, tmp_path / "arrow", progress=lambda *call: calls.append(call))
    expected = in_token_order(cache, "train", HOOKS[0]).float().numpy()
    assert np.array_equal(column(out, HOOKS[0]).astype(np.float32), expected)
    assert np.array_equal(column(out, "token_ids"), cache.sequences("train"))
    assert calls[-1] == (cache.n_rows(), cache.n_rows())


def test_an_export_is_there_whole_or_not_at_all_and_once(tiny_cache, tmp_path):
    def kill(*_: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        export_cache(tiny_cache, tmp_path / "arrow", progress=kill)
    assert not (tmp_path / "arrow").exists()
    out = export_cache(tiny_cache, tmp_path / "arrow")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arrow"]
    assert {"dataset_info.json", "state.json"} < {path.name for path in out.iterdir()}
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert export_cache(tiny_cache, out) == out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    with pytest.raises(CacheMismatch, match=r"must be new or empty, it holds data-00000\.arrow"):
        export_cache(tiny_cache, out, split="validation")
    with pytest.raises(CacheMismatch, match="must be a folder, is a file"):
        export_cache(tiny_cache, out / "state.json")


def test_an_empty_split_has_nothing_to_export(tmp_path):
    cache = import_cache(arrow_folder(tmp_path / "arrow"), config(holdout=0.0), tmp_path / "cache")
    with pytest.raises(DatasetError, match=r"validation of .* holds no rows"):
        export_cache(cache, tmp_path / "out", split="validation")


def test_info_and_state_are_what_datasets_writes(tiny_cache, tmp_path):
    out = export_cache(tiny_cache, tmp_path / "arrow")
    rows = datasets.load_from_disk(str(out))
    rows.save_to_disk(str(tmp_path / "theirs"))
    ours, theirs = (json.loads((path / "state.json").read_text()) for path in (out, tmp_path / "theirs"))
    assert set(ours) == set(theirs)
    for key in set(theirs) - {"_data_files", "_fingerprint"}:
        assert ours[key] == theirs[key]
    assert rows.features == datasets.load_from_disk(str(tmp_path / "theirs")).features
