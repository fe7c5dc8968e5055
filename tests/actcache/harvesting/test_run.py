"""The harvest against transformers' own numbers, against an uninterrupted run, and against wrong use."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from support.places import CHILD
from support.tiny_caches import HOOKS, harvest_tiny, promised_files

from actcache.errors import CacheLocked, CacheMismatch, ConfigError, DatasetError, ManifestError, NonFiniteActivations
from actcache.harvesting import loop
from actcache.harvesting.window import Window
from actcache.integrity.verify import verify
from actcache.models.huggingface import HuggingFaceModel
from actcache.store.cache import open_cache
from actcache.store.journal import Journal

BATCH_SIZE = 8
JOURNAL = "manifest/writer-00.jsonl"


def transformers_outputs(model_dir: Path, token_ids: np.ndarray) -> dict[str, torch.Tensor]:
    """Block outputs by plain hooks on the transformers module; nothing of actcache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    found = {}
    keep = {
        HOOKS[0]: model.model.layers[0],
        HOOKS[1]: model.model.layers[1].self_attn,
        HOOKS[2]: model.model.layers[1],
    }
    for name, module in keep.items():
        module.register_forward_hook(
            lambda m, args, out, name=name: found.update({name: out[0] if isinstance(out, tuple) else out})
        )
    with torch.no_grad():
        model(torch.from_numpy(token_ids).long())
    return found


def oracle(model_dir: Path, group: zarr.Group, split: str, shard_rows: int) -> dict[str, torch.Tensor]:
    """hook -> [sequence, position, d_in] in bfloat16, from the same forward batches, which restart at each shard."""
    sequences = group[f"{split}/sequences/id"][:]
    per_shard = shard_rows // sequences.shape[1]
    batches = []
    for first in range(0, len(sequences), per_shard):
        shard = sequences[first : first + per_shard]
        batches += [shard[i : i + BATCH_SIZE] for i in range(0, len(shard), BATCH_SIZE)]
    outputs = [transformers_outputs(model_dir, batch) for batch in batches]
    return {name: torch.cat([out[name] for out in outputs]).bfloat16() for name in HOOKS}


@pytest.mark.parametrize("split", ["train", "validation"])
def test_rows_equal_transformers_bit_for_bit(tiny_cache, tiny_llama_dir, split):
    group = zarr.open_group(tiny_cache.path / "acts.zarr", mode="r")
    expected = oracle(tiny_llama_dir, group, split, tiny_cache.manifest.shard_rows)
    sequence, position = group[f"{split}/tokens/sequence"][:], group[f"{split}/tokens/position"][:]
    assert np.array_equal(group[f"{split}/tokens/id"][:], group[f"{split}/sequences/id"][:][sequence, position])
    flat = sequence.astype(np.int64) * tiny_cache.context_size + position
    assert sorted(flat.tolist()) == list(range(tiny_cache.n_rows(split))), "every position once"
    for name in HOOKS:
        stored = torch.from_numpy(group[f"{split}/{name}/acts"][:]).view(torch.bfloat16)
        assert torch.equal(stored, expected[name][sequence, position])


def test_rows_are_scattered_over_their_shard(tiny_cache):
    reader = tiny_cache.token_reader("train", "sequence")
    sequence = reader.read(0, tiny_cache.manifest.shard_rows)
    assert (np.diff(sequence) == 0).mean() < 0.2


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes_store_what_the_model_gave(tiny_model, tiny_texts, tmp_path, dtype):
    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", dtype=dtype, tokens=1000, codec="raw")
    sequences = torch.from_numpy(cache.sequences("train")[:BATCH_SIZE])
    x = tiny_model.activations(sequences, [HOOKS[2]])[HOOKS[2]].to(getattr(torch, dtype))
    group = zarr.open_group(cache.path / "acts.zarr", mode="r")["train"]
    sequence, position = group["tokens/sequence"][:], group["tokens/position"][:]
    first = sequence < BATCH_SIZE
    assert np.array_equal(group[f"{HOOKS[2]}/acts"][:][first], x.numpy()[sequence[first], position[first]])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_int8_stores_blocks_of_the_lossless_rows(tiny_model, tiny_texts, tmp_path, dtype):
    settings = {"dtype": dtype, "tokens": 1000, "hook_names": HOOKS[:1]}
    lossless = harvest_tiny(tiny_model, tiny_texts, tmp_path / "lossless", **settings)
    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "int8", codec="int8", **settings)
    x = lossless.hook_reader("train", HOOKS[0]).read(0, lossless.n_rows())
    group = zarr.open_group(cache.path / "acts.zarr", mode="r")["train"]
    q8 = torch.from_numpy(group[f"{HOOKS[0]}/q8"][:])
    scale = torch.from_numpy(group[f"{HOOKS[0]}/scale"][:]).view(torch.bfloat16)
    product = q8.double() * scale.double().repeat_interleave(32, dim=1)
    assert ((product - x.double()).abs() <= scale.double().repeat_interleave(32, dim=1) / 2 * (1 + 2.0**-16)).all()
    assert torch.equal(cache.hook_reader("train", HOOKS[0]).read(0, cache.n_rows()), product.to(getattr(torch, dtype)))
    mean = cache.statistics(HOOKS[0], row_filter="all").mean
    stored = product.to(getattr(torch, dtype)).double().numpy()
    np.testing.assert_allclose(mean, stored.mean(0), rtol=0, atol=len(stored) * 2.0**-52 * np.abs(stored).max())
    assert verify(cache.path).problems == ()


def test_statistics_are_those_of_the_stored_rows(tiny_cache):
    group = zarr.open_group(tiny_cache.path / "acts.zarr", mode="r")["train"]
    x = torch.from_numpy(group[f"{HOOKS[2]}/acts"][:]).view(torch.bfloat16).double().numpy()
    plain = ~np.isin(group["tokens/id"][:], tiny_cache.special_token_ids)
    for row_filter, rows in (("all", x), ("no_special_tokens", x[plain])):
        statistics = tiny_cache.statistics(HOOKS[2], row_filter=row_filter)
        assert statistics.n_rows == len(rows)
        # sums of n terms in float64, of values far from cancelling
        np.testing.assert_allclose(statistics.variance, rows.var(0), rtol=len(rows) * 2.0**-52)
        assert statistics.mean_square_norm == pytest.approx((rows**2).sum(1).mean(), rel=len(rows) * 2.0**-52)
        away = rows - statistics.geometric_median
        unit = away / np.linalg.norm(away, axis=1, keepdims=True)
        assert np.linalg.norm(unit.sum(0)) < 0.05 * len(rows), "of a sample of the rows, so near their own median"


def test_the_same_harvest_gives_the_same_bytes(tiny_model, tiny_texts, tiny_cache, tmp_path):
    again = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c")
    assert promised_files(again.path) == promised_files(tiny_cache.path)
    assert again.fingerprint == tiny_cache.fingerprint


KILLER = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)  # the process forks below
from support.tiny_caches import harvest_tiny
from actcache import load_model
model_dir, texts, out, points = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4].split(",")

def die_at(point):
    name, count = point.split(":")
    real, calls = getattr(os, name), [0]
    def patched(*args, **kwargs):
        calls[0] += 1
        if calls[0] == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(os, name, patched)

for point in [*points, None]:
    child = os.fork()
    if child == 0:
        if point:
            die_at(point)
        harvest_tiny(load_model(model_dir, device="cpu"), texts, out)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(point, "killed" if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status), flush=True)
"""
# fsync and replace are called for every sequence file, the plan, each array of each shard, partial statistics, journal
# lines, and at finalise for statistics, metadata and the manifest: the first points lie in the packing, the next in the
# shards (about nine replaces each), the last in finalise, which takes some forty replaces and starts over each time.
POINTS = ["fsync:1", "replace:2", "fsync:9", "replace:5", "replace:34", "fsync:55", "replace:47", "fsync:71"]
POINTS += ["replace:58", "fsync:64", "replace:66", "replace:40", "replace:30", "replace:20", "replace:3", "fsync:5"]


def test_kills_at_every_kind_of_write_leave_no_trace(tiny_llama_dir, tiny_texts, tiny_cache, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLER, tiny_llama_dir, tiny_texts, tmp_path / "c", ",".join(POINTS)],
        capture_output=True,
        text=True,
        env={**CHILD, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    outcomes = done.stdout.split("\n")
    assert sum(line.endswith("killed") for line in outcomes) >= 12, done.stdout
    assert "None 0" in outcomes
    assert promised_files(tmp_path / "c") == promised_files(tiny_cache.path)
    assert not list((tmp_path / "c").rglob("*.partial"))


def test_a_torn_line_and_a_lost_line_are_redone(tiny_model, tiny_texts, tiny_cache, tmp_path):
    root = tmp_path / "c"
    shutil.copytree(tiny_cache.path, root)
    (root / "manifest" / "cache.json").unlink()
    lines = (root / JOURNAL).read_bytes().splitlines(keepends=True)
    (root / JOURNAL).write_bytes(b"".join(lines[:-3]) + lines[-3][:40])
    with pytest.raises(ManifestError, match="unfinished; run the same command again"):
        open_cache(root)
    harvest_tiny(tiny_model, tiny_texts, root)
    assert promised_files(root) == promised_files(tiny_cache.path)


def test_a_damaged_line_is_an_error(tiny_model, tiny_texts, tiny_cache, tmp_path):
    root = tmp_path / "c"
    shutil.copytree(tiny_cache.path, root)
    damaged = bytearray((root / JOURNAL).read_bytes())
    damaged[100] ^= 1
    (root / JOURNAL).write_bytes(damaged)
    with pytest.raises(ManifestError, match="line 1 is damaged"):
        harvest_tiny(tiny_model, tiny_texts, root)


def test_a_finished_cache_is_reused_without_running_the_model(tiny_model, tiny_texts, tiny_cache, monkeypatch):
    def run(*args: object) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(HuggingFaceModel, "_forward", run)
    before = promised_files(tiny_cache.path)
    assert harvest_tiny(tiny_model, tiny_texts, tiny_cache.path).fingerprint == tiny_cache.fingerprint
    harvest_tiny(tiny_model, tiny_texts, tiny_cache.path, hook_names=HOOKS[:1])
    assert promised_files(tiny_cache.path) == before


def test_an_added_hook_equals_one_harvested_with_the_rest(tiny_model, tiny_texts, tiny_cache, tmp_path):
    harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", hook_names=HOOKS[:2])
    grown = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", hook_names=HOOKS[2:])
    assert grown.hook_names == tuple(sorted(HOOKS))
    ours, theirs = promised_files(grown.path), promised_files(tiny_cache.path)
    assert ours == theirs


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("seed", 1, "seed is 0 there, 1 here"),
        ("context_size", 8, "context_size is 16 there, 8 here"),
        ("codec", "raw", "codec is 'lossless' there, 'raw' here"),
    ],
)
def test_another_configuration_is_refused(tiny_model, tiny_texts, tiny_cache, setting, value, message):
    with pytest.raises(CacheMismatch, match=message):
        harvest_tiny(tiny_model, tiny_texts, tiny_cache.path, **{setting: value})


def test_another_model_is_refused(tiny_gpt2_dir, tiny_texts, tiny_cache):
    from actcache.models.load import load_model

    other = load_model(str(tiny_gpt2_dir), device="cpu")
    with pytest.raises(CacheMismatch, match=r"model is .*tiny_llama.* there, .*tiny_gpt2.* here"):
        harvest_tiny(other, tiny_texts, tiny_cache.path)


def test_a_folder_of_something_else_is_left_alone(tiny_model, tiny_texts, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CacheMismatch, match=r"holds thesis\.tex"):
        harvest_tiny(tiny_model, tiny_texts, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_writers_get_one_clear_line(tiny_model, tiny_texts, tmp_path):
    with Journal(tmp_path / "c"), pytest.raises(CacheLocked, match="another process is writing"):
        harvest_tiny(tiny_model, tiny_texts, tmp_path / "c")


def test_more_tokens_than_there_are_says_how_many(tiny_model, tiny_texts, tiny_cache, tmp_path):
    available = tiny_cache.n_rows("train") + tiny_cache.n_rows("validation")
    with pytest.raises(DatasetError, match=f"it holds {available} .*pass --tokens {available} or fewer"):
        harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=available + 16)
    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=available)
    assert sum(cache.n_rows(split) for split in ("train", "validation")) == available


def test_tokens_are_rounded_down_to_whole_sequences(tiny_model, tiny_texts, tmp_path):
    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=1000)
    assert cache.n_rows("train") + cache.n_rows("validation") == 1000 // 16 * 16


def test_empty_text_is_refused(tiny_model, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n{"text": "a"}\n')
    with pytest.raises(DatasetError, match="no text that fills a sequence of 16 tokens"):
        harvest_tiny(tiny_model, tmp_path / "empty.jsonl", tmp_path / "c")


def test_overflow_of_the_stored_dtype_stops_with_the_token_range(tiny_model, tiny_texts, tmp_path, monkeypatch):
    real = HuggingFaceModel.run_until

    def loud(self, token_ids, hook_names, on_activation):
        real(self, token_ids, hook_names, lambda name, x: on_activation(name, x * 1e6))

    monkeypatch.setattr(HuggingFaceModel, "run_until", loud)
    with pytest.raises(NonFiniteActivations, match=r"as float16 for \d+ tokens between \d+ and \d+ of train"):
        harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", dtype="float16")


def test_a_full_disk_stops_cleanly_and_resumes(tiny_model, tiny_texts, tiny_cache, tmp_path, monkeypatch):
    from actcache import files

    real, calls = files.write_atomically, []

    def full(path, parts):
        calls.append(path)
        if len(calls) == 40:
            raise OSError(28, "No space left on device")
        return real(path, parts)

    for module in ("actcache.store.shard_file", "actcache.store.zarr_metadata", "actcache.harvesting.run"):
        monkeypatch.setattr(sys.modules[module], "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        harvest_tiny(tiny_model, tiny_texts, tmp_path / "c")
    monkeypatch.undo()
    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c")
    assert promised_files(cache.path) == promised_files(tiny_cache.path)


def test_other_compute_is_warned_about(tiny_model, tiny_texts, tiny_cache, tmp_path, caplog):
    shutil.copytree(tiny_cache.path, tmp_path / "c")
    (tmp_path / "c" / "manifest" / "cache.json").unlink()
    with caplog.at_level("WARNING", logger="actcache"):
        harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", batch_size=4)
    assert "another batch_size (8; now 4)" in caplog.text


@pytest.mark.parametrize(
    "bad",
    [
        {"hook_names": ()},
        {"hook_names": ("../x",)},
        {"context_size": 1},
        {"tokens": 3},
        {"dtype": "int8"},
        {"codec": "zip"},
        {"holdout": 1.0},
        {"seed": -1},
        {"separator": "comma"},
        {"batch_size": 0},
    ],
    ids=str,
)
def test_bad_settings_are_named(tiny_model, tiny_texts, tmp_path, bad):
    with pytest.raises(ConfigError, match="hook name" if "../x" in str(bad) else next(iter(bad))):
        harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", **bad)
    assert not (tmp_path / "c").exists()


def test_harvest_from_python_takes_a_loaded_model(tiny_llama_dir, tiny_texts, tiny_cache, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import actcache

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    texts = [json.loads(line)["text"] for line in tiny_texts.read_text().splitlines()]
    settings = {"context_size": 16, "holdout": 0.2, "batch_size": 8}
    cache = actcache.harvest(model, tokenizer, texts, HOOKS, tmp_path / "c", **settings)
    assert cache.identity["model"] == tiny_cache.identity["model"]
    ours, theirs = (zarr.open_group(c.path / "acts.zarr", mode="r")["train"] for c in (cache, tiny_cache))
    assert np.array_equal(ours[f"{HOOKS[1]}/acts"][:], theirs[f"{HOOKS[1]}/acts"][:])


def test_reading_imports_no_language_model():
    code = "import sys, actcache; actcache.Loader; print([m for m in ('transformers', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=CHILD)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(("cores", "n_windows"), [(1, 1), (2, 2)])
def test_a_model_that_leaves_no_core_has_one_window_and_the_same_bytes(
    tiny_model, tiny_texts, tiny_cache, tmp_path, monkeypatch, cores, n_windows
):
    """torch runs on one thread here."""
    made = []
    monkeypatch.setattr(loop, "Window", lambda *args: made.append(Window(*args)) or made[-1])
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c")
    assert len(made) == n_windows
    assert promised_files(cache.path) == promised_files(tiny_cache.path)
