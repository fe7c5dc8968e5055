"""What the tests of built features share: the answers by their definitions, and caches and runs to ask about."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from actcache.harvesting.config import HarvestConfig
from actcache.harvesting.run import harvest
from actcache.models.load import wrap_model
from actcache.store.cache import Cache
from actcache.text.sources import LoadedDataset
from support import naive_loader
from support.tiny_caches import HOOKS
from support.tiny_models import make_tokenizer
from support.tiny_saes import TRANSCODERS, make_config, make_run, make_weights
from trainer.features.read import BINS, Context, Features
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


def new_planted_cache(out: Path) -> Cache:
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
    return harvest(wrap_model(model, tokenizer, "planted"), source, asked, out)


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
