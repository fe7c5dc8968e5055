"""Features of an SAE: planted answers, equality with the whole dense matrix, kills at every write, and refusals."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from support import naive_loader
from support.places import CHILD, SUPPORT
from support.tiny_caches import HOOKS, harvest_tiny
from support.tiny_models import make_tokenizer
from support.tiny_saes import ARCHITECTURES, TRANSCODERS, make_config, make_run, make_weights
from transformers import GPT2Config, GPT2LMHeadModel

from actcache.errors import (
    CacheLocked,
    CacheMismatch,
    ConfigError,
    CorruptShard,
    DatasetError,
    ManifestError,
    NonFiniteActivations,
)
from actcache.harvesting.config import HarvestConfig
from actcache.harvesting.run import harvest
from actcache.models.load import wrap_model
from actcache.store.cache import Cache, open_cache
from actcache.text.sources import LoadedDataset
from trainer.features.build import build_features
from trainer.features.feature_acts import SparseEncoder
from trainer.features.read import BINS, Context, Features, open_features
from trainer.formats.saelens import load_sae

CONTEXT_SIZE, D_IN, PLANTED_HOOK = 16, 32, "blocks.0.hook_resid_pre"
A, B = 10, 11  # the tokens that planted latents fire on


class Dense:
    """The answers by their definitions, from the whole matrix of activations [token of the split, d_sae], float64.

    Special tokens have rows of zeros.
    """

    def __init__(self, acts: np.ndarray, sequences: np.ndarray):
        self.acts, self.sequences = acts, sequences

    def top(self, latent: int, n: int, window: tuple[int, int] = (10, 10)) -> list[Context]:
        fired = np.flatnonzero(self.acts[:, latent]).tolist()
        fired.sort(key=lambda token: (-abs(self.acts[token, latent]), token))
        return [self.context(latent, token, window) for token in fired[:n]]

    def context(self, latent: int, token: int, window: tuple[int, int]) -> Context:
        sequence, position = divmod(token, self.sequences.shape[1])
        acts = self.acts[:, latent].reshape(self.sequences.shape)[sequence]
        shown = range(max(0, position - window[0]), min(len(acts), position + window[1] + 1))
        return Context(
            sequence=sequence,
            position=position,
            act=float(acts[position]),
            token_ids=tuple(int(self.sequences[sequence, i]) for i in shown),
            acts=tuple(float(acts[i]) for i in shown),
            peak=list(shown).index(position),
        )

    def histogram(self, latent: int) -> tuple[list[int], list[float]]:
        fired = self.acts[self.acts[:, latent] != 0, latent].tolist()
        low, high = min(fired, default=0.0), max(fired, default=0.0)
        low, high = min(low, 0.0), max(high, 0.0)
        edges = np.linspace(low, high, BINS + 1).tolist()
        counts = [sum(edges[i] <= act < edges[i + 1] for act in fired) for i in range(BINS)]
        counts[-1] += sum(act == edges[-1] for act in fired)
        return counts, edges

    def coactive(self, latent: int, n: int) -> list[tuple[int, int]]:
        fires = self.acts != 0
        together = [(other, int((fires[:, other] & fires[:, latent]).sum())) for other in range(fires.shape[1])]
        together = [pair for pair in together if pair[0] != latent and pair[1] > 0]
        return sorted(together, key=lambda pair: (-pair[1], pair[0]))[:n]

    def band(self, latent: int, number: int, n_bands: int) -> list[tuple[int, int]]:
        """(sequence, position) of all tokens in the number-th part of (0, largest] from above."""
        sizes = np.abs(self.acts[:, latent])
        low, high = (sizes.max() * (n_bands - number - above) / n_bands for above in (1, 0))
        return [divmod(int(t), self.sequences.shape[1]) for t in np.flatnonzero((sizes > low) & (sizes <= high))]


def assert_same(got: Features, expected: Dense, latents: list[int]) -> None:
    assert np.array_equal(got.n_fired, (expected.acts != 0).sum(0))
    assert np.array_equal(got.max_act, np.abs(expected.acts).max(0))
    for latent in latents:
        assert got.top(latent, 7) == expected.top(latent, 7)
        assert got.top(latent, 10**6, window=(2, 0)) == expected.top(latent, 10**6, window=(2, 0))
        assert got.coactive(latent, 5) == expected.coactive(latent, 5)
        counts, edges = got.histogram(latent)
        assert (counts.tolist(), edges.tolist()) == expected.histogram(latent)
        for number, band in enumerate(got.bands(latent, 3, 4)):
            there = expected.band(latent, number, 3)
            assert {(c.sequence, c.position) for c in band} <= set(there)
            assert len({(c.sequence, c.position) for c in band}) == len(band) == min(4, len(there))
            assert band == sorted(band, key=lambda c: (-abs(c.act), c.sequence, c.position))
            for c in band:
                assert c == expected.context(latent, c.sequence * got.context_size + c.position, (10, 10))


# --- planted answers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted_cache(tmp_path_factory) -> Cache:
    """Rows that say what they are: channel 0 is 1 on A, 1 on B, channel 2 is position / 8, channel 3 is 1 always."""
    tokenizer = make_tokenizer()
    config = GPT2Config(n_embd=D_IN, n_layer=1, n_head=4, n_positions=CONTEXT_SIZE, vocab_size=len(tokenizer))
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for embedding in (model.transformer.wte, model.transformer.wpe):
            embedding.weight.zero_()
        model.transformer.wte.weight[A, 0] = model.transformer.wte.weight[B, 1] = 1.0
        model.transformer.wte.weight[:, 3] = 1.0
        model.transformer.wpe.weight[:, 2] = torch.arange(CONTEXT_SIZE) / 8
    ids = np.random.default_rng(0).integers(2, 40, size=(300, 11)).tolist()
    source = LoadedDataset(Dataset.from_dict({"input_ids": ids}))
    asked = HarvestConfig(hook_names=(PLANTED_HOOK,), context_size=CONTEXT_SIZE, holdout=0.4, batch_size=8)
    return harvest(wrap_model(model, tokenizer, "planted"), source, asked, tmp_path_factory.mktemp("planted") / "c")


def planted_acts(token: int, position: int, special: tuple[int, ...]) -> list[float]:
    """What the planted latents do on a token; all numbers are whole eighths."""
    if token in special:
        return [0.0] * 5
    return [
        1 + position / 8 if token == A else 0.0,
        1.0 if token in (A, B) else 0.0,
        0.0,
        0.5,
        max(0.0, position / 8 - 1.5),
    ]


def planted_run(runs: Path, cache: Cache) -> Path:
    W_enc = torch.zeros(5, D_IN)
    W_enc[0, 0], W_enc[0, 2] = 32.0, 1.0
    W_enc[1, 0] = W_enc[1, 1] = 1.0
    W_enc[3, 3] = 0.5
    W_enc[4, 2] = 1.0
    b_enc = torch.tensor([-31.0, 0.0, -1.0, 0.0, -1.5])
    weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": torch.ones(5, D_IN), "b_dec": torch.zeros(D_IN)}
    config = make_config("standard", name="planted", hook_name=PLANTED_HOOK, d_in=D_IN, d_sae=5, input_scale=1.0)
    return make_run(runs, config, cache.identity["model"], weights=weights)


def test_planted_features_are_found_exactly(planted_cache, tmp_path):
    sequences, special = planted_cache.sequences("validation"), planted_cache.special_token_ids
    assert len(planted_cache.manifest.shards["validation"]) > 3
    assert len(sequences) * CONTEXT_SIZE % planted_cache.manifest.shard_rows, "a partial tail"
    acts = [planted_acts(token, i, special) for row in sequences.tolist() for i, token in enumerate(row)]
    expected = Dense(np.array(acts), sequences)
    got = build_features(planted_run(tmp_path, planted_cache), planted_cache)
    assert_same(got, expected, list(range(5)))

    assert (got.d_sae, got.context_size) == (5, CONTEXT_SIZE)
    assert got.n_tokens == sum(token not in special for token in sequences.flatten().tolist())
    assert got.cache_fingerprint == planted_cache.fingerprint
    best = got.top(0, 1)[0]
    assert best.token_ids[best.peak] == A
    assert best.act == best.acts[best.peak] == 1 + best.position / 8
    last = max(i for row in sequences.tolist() for i, token in enumerate(row) if token == A)
    assert best.position == last, "the latent grows with the position"
    assert got.coactive(0)[0] == (1, got.n_fired[0]), "1 fires on A too; 3 as often, but is a higher latent"
    assert (got.top(2), got.coactive(2), got.bands(2)) == ([], [], [[]] * 5)
    assert got.histogram(2)[0].sum() == got.histogram(2)[1].max() == 0
    assert got.histogram(3)[0].tolist() == [0] * (BINS - 1) + [got.n_tokens]
    assert {context.token_ids[context.peak] for context in got.top(1, 10**6)} == {A, B}


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


# --- against the dense matrix ----------------------------------------------------------------------------------------


def double_run(runs: Path, cache: Cache, architecture: str) -> Path:
    """Of random float64 weights: what fires is then the same whatever the order of summation."""
    hooks = {"hook_names": HOOKS[:2], "hook_widths": (D_IN, D_IN)} if architecture == "crosscoder" else {}
    d_in = 2 * D_IN if hooks else D_IN
    config = make_config(architecture, hook_name=HOOKS[0], d_in=d_in, d_sae=40, matryoshka_widths=None, **hooks)
    weights = {name: tensor.double() for name, tensor in make_weights(architecture, d_in, 40).items()}
    if architecture in TRANSCODERS:
        config = dataclasses.replace(config, hook_name_out=HOOKS[2])
    return make_run(runs, config, cache.identity["model"], weights=weights)


def in_token_order(cache: Cache, hook_name: str) -> torch.Tensor:
    """All validation rows, token after token, read by zarr-python."""
    fields = naive_loader.token_fields(cache, "validation")
    order = np.lexsort((fields["position"], fields["sequence"]))
    return naive_loader.activations(cache, hook_name, "validation")[torch.from_numpy(order)]


def dense(run: Path, cache: Cache) -> np.ndarray:
    """[token of the split, d_sae] by `SAE.encode` of every row, float64."""
    sae, sequences = load_sae(run), cache.sequences("validation")
    acts = sae.encode(torch.cat([in_token_order(cache, name) for name in sae.input_hooks], dim=1))
    assert acts.dtype == torch.float64
    special = np.isin(sequences.flatten(), cache.special_token_ids)
    assert special.any()
    return np.where(special[:, None], 0.0, acts.numpy())


def as_stored(features: Features, acts: np.ndarray) -> np.ndarray:
    """The matrix that the codes by token say, which must be `acts` rounded to float32.

    Half a unit of 24 bits, and float64 sums of at most 2 * D_IN products in another order: far below a thousandth of
    that, but at the border of two roundings it decides.
    """
    stored = np.zeros_like(acts)
    for codes in features.codes:
        token = np.repeat(np.arange(len(codes.token_id)), np.diff(codes.token_start))
        assert len(set(zip(token.tolist(), codes.latent.tolist(), strict=True))) == len(token), "no entry comes twice"
        stored[codes.first_token + token, codes.latent] = codes.act
    assert np.array_equal(stored != 0, acts != 0)
    assert (np.abs(stored - acts) <= 1.001 * 2.0**-24 * np.abs(acts)).all()
    return stored


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_equal_the_dense_matrix(architecture, tiny_cache, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.features.feature_acts.MAX_ROWS", 50)
    monkeypatch.setattr("trainer.features.build.FILE_ENTRIES", 900)
    run = double_run(tmp_path, tiny_cache, architecture)
    got, acts = build_features(run, tiny_cache), dense(run, tiny_cache)
    assert len(got.codes) > len(tiny_cache.manifest.shards["validation"]) > 1, "files end within shards"
    assert sum(len(codes.act) for codes in got.codes) == int((acts != 0).sum()) < acts.size
    expected = Dense(as_stored(got, acts), tiny_cache.sequences("validation"))
    assert_same(got, expected, list(range(0, 40, 3)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_may_hold_special_tokens_alone(architecture, tmp_path):
    run = make_run(tmp_path, make_config(architecture), {"name": "tiny", "revision": None})
    assert [len(entry) for entry in SparseEncoder(load_sae(run)).entries(torch.empty(0, 16))] == [0, 0, 0]


def test_abstopk_ranks_by_magnitude(tiny_cache, tmp_path):
    run = double_run(tmp_path, tiny_cache, "abstopk")
    features, acts = build_features(run, tiny_cache), dense(run, tiny_cache)
    negative = [i for i in range(40) if -acts[:, i].min() > acts[:, i].max()]
    assert negative, "some latent is at its strongest below zero"
    assert features.top(negative[0], 1)[0].act == -features.max_act[negative[0]] < 0


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_latents_may_be_ranked_by_the_decoders_norms(architecture, tiny_cache, tmp_path):
    run = double_run(tmp_path, tiny_cache, architecture)
    path = run / "sae" / "cfg.json"
    plain = dense(run, tiny_cache)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_acts_by_decoder_norm": True}))
    acts = dense(run, tiny_cache)
    assert not np.array_equal(acts != 0, plain != 0)
    as_stored(build_features(run, tiny_cache), acts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["topk", "abstopk", "jumprelu", "gated", "standard"])
def test_shorter_weights_encode_as_the_sae_does(architecture, dtype, tmp_path):
    """What fires in one and not in the other lies within rounding of its cut, and the rest differs by rounding.

    Pre-activations are sums of 33 terms, rounded once or twice each in the weights' dtype: by at most 2 * 33 eps of the
    sum of their magnitudes. Of a topk the k-th is a cut.
    """
    config = make_config(architecture, d_in=D_IN, input_scale=1.0)
    weights = {name: tensor.to(dtype) for name, tensor in make_weights(architecture, D_IN).items()}
    sae = load_sae(make_run(tmp_path, config, {"name": "tiny", "revision": None}, weights=weights))
    x = torch.randn(300, D_IN, generator=torch.Generator().manual_seed(3))
    row, latent, act = SparseEncoder(sae).entries(x)
    assert (row.diff() >= 0).all()
    assert (act != 0).all()
    got = torch.zeros(300, sae.d_sae, dtype=dtype).index_put((row, latent), act).double()
    expected = sae.encode(x).double()
    scale = (x.abs().double() + 4) @ (sae.W_enc.abs().double() * (1.0 if sae.r_mag is None else sae.r_mag.exp() + 1))
    rounding = 2 * 33 * torch.finfo(dtype).eps * (scale + 8)
    both = (got != 0) & (expected != 0)
    assert ((got - expected).abs() <= rounding)[both].all()
    one = (got != 0) ^ (expected != 0)
    assert one.double().mean() <= 0.02
    smallest = expected.abs().masked_fill(expected == 0, torch.inf).amin(1, keepdim=True)
    cut = smallest if sae.k is not None else torch.zeros(1) if sae.threshold is None else sae.threshold.double()
    at_cut = ((got + expected).abs() - cut).abs() <= rounding
    assert (at_cut | torch.tensor(architecture == "gated"))[one].all()


# --- kills -----------------------------------------------------------------------------------------------------------


def stored(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "features").iterdir() if path.name != "lock"}


def build_and_die(run: Path, cache: Path, n_files: int) -> None:
    """In a process of its own: killed just before the file after `n_files` gets its name."""
    child = os.fork()
    if child == 0:
        replace, left = os.replace, [n_files]

        def replace_or_die(*paths: Path) -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*paths)

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
    n_files = len(stored(whole))
    assert n_files > 6
    for already in (0, 1, 2, n_files // 2, n_files - 1):
        there = len(stored(killed)) - 1 if already else 0  # less what the last kill left aside
        build_and_die(killed, tiny_cache.path, already - there)
        assert any(name.endswith(".partial") for name in stored(killed)), "the lock of the killed one is free again"
        with pytest.raises(ManifestError, match=r"must be built, (only a part|there is no features/)"):
            open_features(killed)
    calls = []
    build_features(killed, tiny_cache, progress=lambda *call: calls.append(call))
    assert calls == [(tiny_cache.n_rows("validation"),) * 2], "only the last file was missing"
    assert stored(killed) == stored(whole)


def test_a_resumed_build_begins_where_it_was_killed(tiny_cache, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.features.build.FILE_ENTRIES", 400)
    monkeypatch.setattr("trainer.features.feature_acts.MAX_ROWS", 50)
    run, calls = double_run(tmp_path, tiny_cache, "jumprelu"), []
    build_and_die(run, tiny_cache.path, 4)
    done = sum(codes.name.startswith("codes-") for codes in (run / "features").iterdir())
    assert done == 3
    build_features(run, tiny_cache, progress=lambda *call: calls.append(call))
    fourth = sorted((run / "features").glob("codes-*"))[3]
    assert calls[0] == (int(fourth.stem[6:]), tiny_cache.n_rows("validation"))
    assert calls[1][0] > calls[0][0] > 0


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
    for n_rows in (32_768, 131_072):
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
    (run / "config.json").write_text("{}")
    with pytest.raises(ManifestError, match=r"config.json must name the model of the run"):
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


def test_damaged_features_are_named(planted_cache, tmp_path):
    whole = planted_run(tmp_path, planted_cache)
    build_features(whole, planted_cache)
    first = min((whole / "features").glob("codes-*")).name
    for number, (name, damage) in enumerate(
        {
            f"{first} of another length": lambda data: data[: len(data) // 2],
            f"{first} empty": lambda data: b"",
            f"{first} of another kind": lambda data: b"x" * len(data),
            f"{first} of other fields": lambda data: data.replace(b'"token_id"', b'"token_ix"'),
            "latents.safetensors of another length": lambda data: data[:-8],
            "source.json of other fields": lambda data: data.replace(b"n_rows", b"n_rowz"),
            "source.json of another kind": lambda data: b"[]",
        }.items()
    ):
        run = Path(shutil.copytree(whole, tmp_path / str(number)))
        path = run / "features" / name.split()[0]
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(ManifestError, match="features"):
            open_features(run)
    run = Path(shutil.copytree(whole, tmp_path / "hole"))
    (run / "features" / first).unlink()
    with pytest.raises(ManifestError, match=r"must hold the codes from token 0 on; remove it and build it anew"):
        open_features(run)
    run = Path(shutil.copytree(whole, tmp_path / "short"))
    max((run / "features").glob("codes-*")).unlink()
    with pytest.raises(ManifestError, match=r"its files must hold all \d+ rows"):
        open_features(run)


def test_wrong_questions_are_named(planted_cache, tmp_path):
    features = build_features(planted_run(tmp_path, planted_cache), planted_cache)
    for latent in (-1, 5):
        for ask in (features.top, features.bands, features.histogram, features.coactive):
            with pytest.raises(ConfigError, match=rf"latent must be in \[0, d_sae=5\), got {latent}"):
                ask(latent)
    for ask in (
        lambda: features.top(0, 0),
        lambda: features.coactive(0, 0),
        lambda: features.bands(0, 0),
        lambda: features.bands(0, 1, 0),
    ):
        with pytest.raises(ConfigError, match="must be at least 1, got 0"):
            ask()
