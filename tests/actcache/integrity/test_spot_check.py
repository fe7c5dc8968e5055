"""Stored rows against the model that made them: to the bit where it runs as it ran, else within what rounding does."""

import shutil
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.damages import CACHE, HOOK, JOURNAL, TRAIN
from support.tiny_caches import HOOKS, harvest_tiny
from support.tiny_models import D_MODEL

from actcache.errors import CacheMismatch, ConfigError
from actcache.format.codecs import codec
from actcache.format.seal import seal, unseal
from actcache.integrity.spot_check import _chosen, sample_model
from actcache.integrity.verify import verify
from actcache.store.cache import Cache, open_cache

CHUNK_ROWS = 32
SETTINGS = {"tokens": 30 * 24, "context_size": 24, "holdout": 0.3, "hook_names": HOOKS[:2]}  # 24 does not divide 128


@pytest.fixture(scope="module", autouse=True)
def _small_chunks():
    """Several chunks in a shard."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actcache.format.arrays.MAX_CHUNK_BYTES", CHUNK_ROWS * 2 * D_MODEL)
        yield


@pytest.fixture(scope="module")
def sound(tiny_model, tiny_texts, tmp_path_factory, _small_chunks):
    """codec -> a cache in which sequences cross the borders of shards; do not change them."""
    folder = tmp_path_factory.mktemp("sound")
    return {
        name: harvest_tiny(tiny_model, tiny_texts, folder / name, codec=name, **SETTINGS)
        for name in ("lossless", "raw", "int8")
    }


@pytest.fixture(scope="module")
def eager_model(tiny_llama_dir):
    from actcache.models.load import load_model

    return load_model(str(tiny_llama_dir), device="cpu", attention="eager")


def n_rows(cache):
    return sum(cache.n_rows(split) for split in ("train", "validation"))


@pytest.mark.parametrize("name", ["lossless", "raw", "int8"])
def test_every_row_of_every_hook_is_what_the_model_gives(tiny_model, sound, name):
    cache = sound[name]
    assert cache.manifest.shard_rows % cache.context_size, "sequences cross borders"
    report = sample_model(cache, tiny_model, 10**6)
    assert (report.problems, report.notes) == ((), ())
    assert report.n_sequences == n_rows(cache) // cache.context_size
    assert report.n_rows == len(HOOKS[:2]) * n_rows(cache), "each once"


def test_a_sample_is_as_many_sequences_as_asked(tiny_model, sound):
    report = sample_model(sound["lossless"], tiny_model, 5)
    assert (report.n_sequences, report.n_rows) == (5, 5 * 24 * 2)
    assert report.problems == ()


def changed_row(cache, root, row):
    """A copy of a raw or int8 cache with one element of a row changed, and all checksums that would tell."""
    shutil.copytree(cache.path, root)
    shard, number = divmod(row, cache.manifest.shard_rows)
    array = "q8" if cache.identity["codec"] == "int8" else "acts"
    path = root / TRAIN / HOOK / array / "c" / str(shard) / "0"
    content = bytearray(path.read_bytes())
    values = np.frombuffer(content, dtype=np.int8 if array == "q8" else np.uint16, count=128 * D_MODEL)
    changed = values.reshape(-1, D_MODEL)[number]
    if array == "q8":
        changed[np.abs(changed).argmax()] *= -1
    else:
        changed[(changed & 0x7FFF).argmax()] ^= 0x8000  # the sign of the largest bfloat16
    path.write_bytes(content)
    row_bytes = changed.nbytes
    chunk = number // CHUNK_ROWS
    stored = memoryview(content)[chunk * CHUNK_ROWS * row_bytes : (chunk + 1) * CHUNK_ROWS * row_bytes]
    checksum = codec("raw").checksum(stored)
    manifest = root / CACHE
    sealed = unseal(manifest.read_bytes(), manifest)
    sealed["shards"]["train"][shard]["arrays"][f"{HOOK}/{array}"]["checksums"][chunk] = checksum
    manifest.write_bytes(seal(sealed))
    lines = [unseal(line, root / JOURNAL) for line in (root / JOURNAL).read_bytes().splitlines(keepends=True)]
    for line in lines:
        if (line["split"], line["index"]) == ("train", shard):
            line["arrays"][f"{HOOK}/{array}"]["checksums"][chunk] = checksum
    (root / JOURNAL).write_bytes(b"".join(map(seal, lines)))
    assert {problem.message for problem in verify(root).problems} <= {
        "is not what the partial statistics of its shards come to"
    }
    return open_cache(root), path


@pytest.mark.parametrize("name", ["raw", "int8"])
@pytest.mark.parametrize("kernel", ["same", "other"])
def test_a_row_that_the_model_does_not_give_is_found(tiny_model, eager_model, sound, tmp_path, name, kernel):
    row = 128 + 70
    cache, path = changed_row(sound[name], tmp_path / "c", row)
    report = sample_model(cache, {"same": tiny_model, "other": eager_model}[kernel], 10**6)
    (problem,) = report.problems
    assert (problem.path, problem.split, problem.shard) == (str(path), "train", 1)
    assert (problem.chunk, problem.rows) == (70 // CHUNK_ROWS, (row, row + 1))
    assert problem.message.startswith("1 of 128 sampled rows are not what the model gives")


@pytest.mark.parametrize("name", ["lossless", "int8"])
def test_another_kernel_is_noted_and_allowed_for(eager_model, sound, name):
    report = sample_model(sound[name], eager_model, 10**6)
    assert report.problems == ()
    (note,) = report.notes
    assert note.startswith("the model was run with another attention (sdpa; now eager)")
    assert f"{eager_model.tolerance():.1e} of their norm" in note


def test_the_tolerance_lies_between_rounding_and_another_token(tiny_model, tiny_llama_dir, sound):
    """Both distances from the same model in float64: of its float32 rows, and of the rows of the tokens beside them."""
    from transformers import AutoModelForCausalLM

    sequences = torch.from_numpy(sound["lossless"].sequences("train")[:8])
    exact = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float64).eval()
    with torch.no_grad():
        wanted = exact(sequences.long(), output_hidden_states=True).hidden_states[1]
    x = tiny_model.activations(sequences, [HOOK])[HOOK].double()
    norm = wanted.norm(dim=-1)
    assert ((x - wanted).norm(dim=-1) / norm).max() < tiny_model.tolerance()
    beside = (wanted[:, 1:] - wanted[:, :-1]).norm(dim=-1) / norm[:, 1:]
    assert beside.min() > 100 * tiny_model.tolerance()


def test_hooks_are_run_in_the_batches_of_each(tiny_model, tiny_texts, tmp_path):
    settings = {**SETTINGS, "batch_size": 1, "hook_names": HOOKS[:1]}
    harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", **settings)
    settings = {**SETTINGS, "batch_size": 4, "hook_names": HOOKS[1:]}
    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", **settings)
    report = sample_model(cache, tiny_model, 10**6)
    assert (report.problems, report.notes) == ((), ())
    assert report.n_rows == 3 * n_rows(cache)


def test_another_model_is_refused(tiny_gpt2_dir, sound):
    from actcache.models.load import load_model

    with pytest.raises(CacheMismatch, match=r"was harvested from .*tiny_llama.*, the model is .*tiny_gpt2"):
        sample_model(sound["raw"], load_model(str(tiny_gpt2_dir), device="cpu"), 1)


def test_no_sequence_is_no_sample(tiny_model, sound):
    with pytest.raises(ConfigError, match="at least 1 sequence to sample, got 0"):
        sample_model(sound["raw"], tiny_model, 0)


def test_a_choice_among_many_sequences_takes_a_number_for_each(sound):
    """Ten million took a gigabyte."""
    manifest = sound["raw"].manifest
    counts = {"train": 900_000, "validation": 100_000}
    sequences = {split: replace(manifest.plan.sequences[split], n_sequences=n) for split, n in counts.items()}
    many = Cache(sound["raw"].path, replace(manifest, plan=replace(manifest.plan, sequences=sequences)), "")
    tracemalloc.start()
    chosen = _chosen(many, 1000, 7)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 * sum(counts.values())
    picked = np.random.default_rng(7).permutation(1_000_000)[:1000]
    assert chosen["train"] == sorted(i for i in picked.tolist() if i < 900_000)
    assert chosen["validation"] == sorted(i - 900_000 for i in picked.tolist() if i >= 900_000)
