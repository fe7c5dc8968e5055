"""Features of an SAE: equality with the whole dense matrix, kills at every write, bounded memory, and refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from support.feature_cases import (
    D_IN,
    PLANTED_HOOK,
    Dense,
    as_stored,
    assert_same,
    dense,
    double_run,
    planted_run,
)
from support.places import CHILD, SUPPORT
from support.tiny_caches import HOOKS, harvest_tiny
from support.tiny_models import make_tokenizer
from support.tiny_saes import ARCHITECTURES, make_config, make_run, make_weights
from transformers import GPT2Config, GPT2LMHeadModel

from actcache.errors import CacheLocked, CacheMismatch, CorruptShard, DatasetError, ManifestError, NonFiniteActivations
from actcache.harvesting.config import HarvestConfig
from actcache.harvesting.run import harvest
from actcache.models.load import wrap_model
from actcache.store.cache import Cache, open_cache
from actcache.text.sources import LoadedDataset
from trainer.features.build import build_features
from trainer.features.read import open_features


def test_what_is_built_is_read_back_and_not_built_again(planted_cache, tmp_path):
    run, calls = planted_run(tmp_path, planted_cache), []
    built = build_features(run, planted_cache, progress=lambda *call: calls.append(call))
    n_rows = planted_cache.n_rows("validation")
    assert [call for call in calls if call[1] != n_rows] == []
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert (calls[0], calls[-1]) == ((0, n_rows), (n_rows, n_rows))
    before = {path: path.stat().st_mtime_ns for path in (run / "features").iterdir()}
    calls.clear()
    again = build_features(str(run), planted_cache, progress=lambda *call: calls.append(call))
    assert {path: path.stat().st_mtime_ns for path in (run / "features").iterdir()} == before
    assert calls == []
    for features in (again, open_features(run), open_features(str(run))):
        assert features.top(0) == built.top(0)
        assert features.bands(1) == built.bands(1)
    with pytest.raises(ValueError, match="read-only"):
        built.codes[0].act[0] = 1.0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_equal_the_dense_matrix(architecture, tiny_cache, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.features.feature_acts.MAX_ROWS", 50)
    monkeypatch.setattr("trainer.features.build.FILE_ENTRIES", 900)
    run = double_run(tmp_path, tiny_cache, architecture)
    got, acts = build_features(run, tiny_cache), dense(run, tiny_cache)
    assert len(got.codes) > len(tiny_cache.manifest.shards["validation"]) > 1, "files end within shards"
    assert sum(len(codes.act) for codes in got.codes) == int((acts != 0).sum()) < acts.size
    expected = Dense(as_stored(got, acts), tiny_cache.sequences("validation"))
    assert_same(got, expected, list(range(0, 40, 9)))


# --- kills -----------------------------------------------------------------------------------------------------------


def stored(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "features").iterdir() if path.name != "lock"}


RENAMES_BEFORE_CODES = 3  # checksums, rows.json, source.json; each file of codes comes after the checksums once more


def build_and_die(run: Path, cache: Path, n_files: int) -> None:
    """In a process of its own: killed just before the file after `n_files` gets its name."""
    child = os.fork()
    if child == 0:
        replace, left = os.replace, [n_files]

        def replace_or_die(*paths: Path, **folders: int) -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*paths, **folders)

        os.replace = replace_or_die
        try:
            build_features(run, open_cache(cache))
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_killed_build_goes_on_and_ends_the_same(tiny_cache, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.features.feature_acts.MAX_ROWS", 50)
    monkeypatch.setattr("trainer.features.build.FILE_ENTRIES", 400)
    whole, killed = (double_run(tmp_path / name, tiny_cache, "topk") for name in ("whole", "killed"))
    build_features(whole, tiny_cache)
    n_codes = sum(name.startswith("codes-") for name in stored(whole))
    assert n_codes > 4
    for n_renames in (0, 1, 2, RENAMES_BEFORE_CODES, 1, 2, 2 * (n_codes - 3) + 1, 1, 2, 3):
        build_and_die(killed, tiny_cache.path, n_renames)
        assert any(name.endswith(".partial") for name in stored(killed)), "the lock of the killed one is free again"
        with pytest.raises(ManifestError, match=r"must be built, (only a part|there is no features/)"):
            open_features(killed)
    calls = []
    build_features(killed, tiny_cache, progress=lambda *call: calls.append(call))
    assert calls == [(tiny_cache.n_rows("validation"),) * 2], "only the last file was missing"
    assert stored(killed) == stored(whole)


def test_a_file_that_was_damaged_after_a_kill_is_named(tiny_cache, tmp_path, monkeypatch):
    """Its checksum is older than the damage. Else the rest would be built on it, and all of it summed."""
    monkeypatch.setattr("trainer.features.build.FILE_ENTRIES", 400)
    monkeypatch.setattr("trainer.features.feature_acts.MAX_ROWS", 50)
    run = double_run(tmp_path, tiny_cache, "topk")
    build_and_die(run, tiny_cache.path, RENAMES_BEFORE_CODES + 3 * 2)
    held = sorted((run / "features").glob("codes-*"))
    assert len(held) == 3
    for path in (held[1], run / "features" / "source.json"):
        whole = path.read_bytes()
        path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 4]) + whole[-2:])
        with pytest.raises(ManifestError, match=rf"{path.name}: .*damaged.*; remove .*features and build it anew"):
            build_features(run, tiny_cache)
        path.write_bytes(whole)
    assert build_features(run, tiny_cache).n_fired.any()


def test_a_resumed_build_begins_where_it_was_killed(tiny_cache, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.features.build.FILE_ENTRIES", 400)
    monkeypatch.setattr("trainer.features.feature_acts.MAX_ROWS", 50)
    run, calls = double_run(tmp_path, tiny_cache, "jumprelu"), []
    build_and_die(run, tiny_cache.path, RENAMES_BEFORE_CODES + 3 * 2)
    done = sum(codes.name.startswith("codes-") for codes in (run / "features").iterdir())
    assert done == 3
    build_features(run, tiny_cache, progress=lambda *call: calls.append(call))
    fourth = sorted((run / "features").glob("codes-*"))[3]
    assert calls[0] == (int(fourth.stem[6:]), tiny_cache.n_rows("validation"))
    assert calls[1][0] > calls[0][0] > 0


@pytest.mark.parametrize("is_old", [False, True], ids=["rows named", "older source.json"])
def test_a_hook_that_is_added_changes_nothing(is_old, tiny_model, tiny_texts, tmp_path):
    how = {"tokens": 1000, "holdout": 0.4}
    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "cache", hook_names=HOOKS[:2], **how)
    run = double_run(tmp_path, cache, "topk")
    build_features(run, cache)
    if is_old:
        for name in ("rows.json", "crc32c.json"):
            (run / "features" / name).unlink()
    more = harvest_tiny(tiny_model, tiny_texts, tmp_path / "cache", **how)
    assert more.fingerprint != cache.fingerprint
    calls = []
    assert build_features(run, more, progress=lambda *call: calls.append(call)).n_fired.any()
    assert calls == []
    grown = harvest_tiny(tiny_model, tiny_texts, tmp_path / "cache", tokens=2000, holdout=0.4)
    with pytest.raises(CacheMismatch, match=r"of another cache or SAE: cache_fingerprint is .* there, .* here"):
        build_features(run, grown)


def test_finished_features_are_looked_up_without_a_lock(tiny_cache, tmp_path):
    run = double_run(tmp_path, tiny_cache, "topk")
    build_features(run, tiny_cache)
    (run / "features" / "lock").unlink()
    (run / "features" / "lock").symlink_to(tmp_path / "nowhere" / "lock")
    assert build_features(run, tiny_cache).n_fired.any(), "a lock that cannot be opened is not asked for"


def test_one_process_builds_at_a_time(tiny_cache, tmp_path):
    run = double_run(tmp_path, tiny_cache, "topk")
    with pytest.raises(CacheLocked, match="another process is building these features; wait for it"):
        build_features(run, tiny_cache, progress=lambda *_: build_features(run, tiny_cache))
    assert build_features(run, tiny_cache).n_fired.any(), "the lock ends with its holder"


# --- memory ----------------------------------------------------------------------------------------------------------


def peak_memory(run: Path, cache: Path) -> tuple[int, int]:
    """(anonymous bytes at the peak of a build, bytes that its docstring allows), in a process of its own."""
    script = SUPPORT / "peak_memory_of_features.py"
    settings = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment = {**CHILD, **settings}
    command = [sys.executable, str(script), str(run), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    peak, allowed = done.stdout.split()
    return int(peak), int(allowed)


def wide_cache(out: Path, n_rows: int) -> Cache:
    """A cache of an embedding, 256 wide, nearly all of it held out."""
    tokenizer = make_tokenizer()
    config = GPT2Config(n_embd=256, n_layer=1, n_head=1, n_positions=128, vocab_size=len(tokenizer))
    config.bos_token_id = tokenizer.bos_token_id
    model = wrap_model(GPT2LMHeadModel(config).eval(), tokenizer, name="wide")
    documents = [[2 + (row * 7 + i) % 300 for i in range(127)] for row in range(n_rows // 128)]
    source = LoadedDataset(Dataset.from_dict({"input_ids": documents}))
    asked = HarvestConfig(hook_names=(PLANTED_HOOK,), context_size=128, holdout=0.99, codec="lossless")
    return harvest(model, source, asked, out)


@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_memory_is_as_stated_however_long_the_split(architecture, tmp_path):
    """standard fires on everything: a shard then has more entries than a file."""
    peaks, d_sae = [], 256
    weights = make_weights(architecture, 256, d_sae)
    if architecture == "standard":
        weights["b_enc"] += 1e4
    for n_rows in (16_384, 65_536):
        cache = wide_cache(tmp_path / f"{n_rows}", n_rows)
        config = make_config(architecture, hook_name=PLANTED_HOOK, d_in=256, d_sae=d_sae)
        run = make_run(tmp_path / f"runs-{n_rows}", config, cache.identity["model"], weights=weights)
        peaks.append(peak_memory(run, cache.path))
        features = open_features(run)
        assert int(features.n_fired.sum()) == features.n_tokens * (config.k or d_sae)
    noise = 16 << 20  # interpreter, allocator, and what is held of each file that is mapped
    assert peaks[1][0] <= peaks[1][1] + noise
    assert peaks[1][0] - peaks[0][0] <= peaks[1][1] - peaks[0][1] + noise


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_is_no_finished_run_is_named(planted_cache, tmp_path):
    run = planted_run(tmp_path, planted_cache)
    with pytest.raises(ManifestError, match=r"there is no features/; run `actcache features .*planted`"):
        open_features(run)
    with pytest.raises(ManifestError, match=r"sae must be a RUN folder, it has no config.json.*`actcache import`"):
        build_features(run / "sae", planted_cache)
    (run / "failed.json").write_text(json.dumps({"step": 3, "error": "the loss became NaN"}))
    with pytest.raises(ManifestError, match=r"planted diverged: the loss became NaN; pass another run"):
        build_features(run, planted_cache)
    (run / "failed.json").unlink()
    for model in (None, "planted", {"revision": None}, {"name": []}, {"name": "planted", "revision": []}):
        (run / "config.json").write_text(json.dumps({"model": model}))
        with pytest.raises(ManifestError, match=r"config.json: model must be an object with the name and the revision"):
            build_features(run, planted_cache)
    shutil.rmtree(run / "sae")
    with pytest.raises(ManifestError, match=r"finish the training of that run"):
        build_features(run, planted_cache)
    assert not (run / "features").exists()


def test_the_wrong_cache_is_named(planted_cache, tiny_cache, tiny_model, tiny_texts, tmp_path):
    run = planted_run(tmp_path, planted_cache)
    with pytest.raises(CacheMismatch, match=r"trained on activations of 'planted' .* holds those of 'tiny_llama"):
        build_features(run, tiny_cache)
    config = make_config("topk", hook_name="blocks.7.hook_resid_post", d_in=D_IN)
    with pytest.raises(CacheMismatch, match=r"blocks\.7"):
        build_features(make_run(tmp_path, config, tiny_cache.identity["model"]), tiny_cache)
    config = make_config("topk", name="narrow", hook_name=HOOKS[0])
    narrow = make_run(tmp_path, config, tiny_cache.identity["model"])
    with pytest.raises(CacheMismatch, match=r"of width 16, .* holds 32; pass the cache that it was trained on"):
        build_features(narrow, tiny_cache)

    run = double_run(tmp_path, tiny_cache, "topk")
    build_features(run, tiny_cache)
    other = harvest_tiny(tiny_model, tiny_texts, tmp_path / "other", seed=5)
    with pytest.raises(
        CacheMismatch, match=r"of another cache or SAE: cache_fingerprint is .* there, .* here; remove it"
    ):
        build_features(run, other)
    save_again = make_weights("topk", D_IN, 40, seed=8)
    make_run(
        tmp_path,
        make_config("topk", name=run.name, hook_name=HOOKS[0], d_in=D_IN, d_sae=40),
        {"name": "x", "revision": None},
        weights=save_again,
    )
    with pytest.raises(CacheMismatch, match=r"of another cache or SAE: sae_crc32c is "):
        open_features(run)


def test_no_token_to_encode_is_named(tiny_model, tiny_texts, tmp_path):
    empty = harvest_tiny(tiny_model, tiny_texts, tmp_path / "empty", holdout=0.0)
    run = double_run(tmp_path, empty, "topk")
    with pytest.raises(DatasetError, match=r"no token in its validation split that is not special \(holdout 0.0\)"):
        build_features(run, empty)


def test_activations_that_are_not_finite_are_named(planted_cache, tmp_path):
    """In float16 32 * 3e4 is beyond what it holds, and infinity less infinity is NaN."""
    for sign in (1.0, -1.0):
        weights = {name: tensor.half() for name, tensor in make_weights("standard", D_IN, 5).items()}
        weights["W_enc"].zero_()
        weights["W_enc"][3, 3], weights["b_enc"][3] = 6e4, 6e4
        weights["W_enc"][3, 2] = sign * 6e4
        config = make_config(
            "standard", name=f"half{sign}", hook_name=PLANTED_HOOK, d_in=D_IN, d_sae=5, input_scale=1.0
        )
        run = make_run(tmp_path, config, planted_cache.identity["model"], weights=weights)
        with pytest.raises(
            NonFiniteActivations, match=r"must be finite, got NaN or infinity from torch.float16 weights"
        ):
            build_features(run, planted_cache)


def test_a_damaged_chunk_is_named_and_ends_the_build(tiny_cache, tmp_path):
    cache = open_cache(shutil.copytree(tiny_cache.path, tmp_path / "c"))
    path = tmp_path / "c" / "acts.zarr" / "validation" / HOOKS[0] / "acts" / "c" / "2" / "0"
    damaged = bytearray(path.read_bytes())
    damaged[20] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CorruptShard, match="does not match its checksum"):
        build_features(double_run(tmp_path, tiny_cache, "topk"), cache)
