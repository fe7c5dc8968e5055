"""Evaluating a topk SAE (768 -> 16384, k 32) in the middle of a GPT-2 of random weights, of GPT-2's own size and words.

From the cache alone: every metric that needs no model, over the validation rows (lossless bfloat16, without special
tokens). Bound: the two bare products x W_enc and f W_dec on as many rows in memory. SAELens: run_evals with the metrics
of sparsity, variance and shrinkage, which runs the model up to the hook.

With the model: cross entropy and KL of the same tokens besides; for the first SAE of a cache, for another one, when the
losses of ablations are kept, and for four SAEs in one call. Bound: two bare forward passes, without and with the SAE,
and the two products; ours does not run the blocks before the hook a second time, so more than all of it is possible.
SAELens: run_evals with everything but what it takes from the weights alone.

Both get batches of 2,048 tokens and run the same weights in float32 (SAELens through its HookedProxyLM). Before the
timing each metric must agree: losses within the rounding of float32, what is computed of the cached rows within that of
bfloat16.

    actcache bench eval
"""

from __future__ import annotations

import math
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from actcache.harvesting.config import HarvestConfig
from actcache.harvesting.run import harvest
from actcache.models.language_model import LanguageModel
from actcache.models.load import wrap_model
from actcache.store.cache import Cache
from benchmarks.measure import Say, described, installed, interleaved_seconds, machine, ratios
from benchmarks.peers import saelens_model
from benchmarks.stream import CONTEXT_SIZE, random_documents, random_gpt2_module
from trainer.evaluation.downstream_loss import BATCH_TOKENS
from trainer.evaluation.evaluate import evaluate_all
from trainer.evaluation.stored_losses import LOSSES
from trainer.sae.sae import SAE

N_LAYERS, D_MODEL, VOCAB, D_SAE, K = 12, 768, 50_257, 16_384, 32
HOOK, SAELENS_HOOK = f"blocks.{N_LAYERS // 2}.hook_resid_pre", f"transformer.h.{N_LAYERS // 2 - 1}"
N_SEQUENCES, N_SAES, REPEATS = 35, 4, 3  # 16 of the sequences are held out: one batch
LOSS_ROUNDING = N_SEQUENCES * CONTEXT_SIZE * 2**-24  # SAELens' float32 mean over tokens, added in any order
KL_ROUNDING = VOCAB * 2**-24  # its float32 sum over the vocabulary, added in any order
BFLOAT16 = 2**-7  # a channel is rounded by at most 2^-9 of itself: of its square, or a ratio of two of them, four times


def run(say: Say) -> dict[str, Any]:
    """Measure; returns what the JSON line says."""
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(Path(folder))
        with_saelens = installed("sae_lens", say)
        contenders = bench.ours() | (bench.saelens(say) if with_saelens else {})
        seconds = interleaved_seconds(contenders, REPEATS)
        result = {"bench": "eval", "hook_name": HOOK, "d_sae": D_SAE, "n_tokens": bench.n_tokens}
        return result | _described(seconds, bench.n_tokens, say) | {"machine": machine()}


class _Bench:
    """A model, a cache of its rows with half of them held out, and an SAE, all below `folder`."""

    def __init__(self, folder: Path):
        self._model_folder = folder / "model"
        module, tokenizer = random_gpt2_module(N_LAYERS, D_MODEL, vocab_size=VOCAB)
        for part in (module, tokenizer):
            part.save_pretrained(self._model_folder)
        self._model: LanguageModel = wrap_model(module, tokenizer, name="random-gpt2")
        config = HarvestConfig(hook_names=(HOOK,), context_size=CONTEXT_SIZE, holdout=0.5)
        self._cache: Cache = harvest(self._model, random_documents(N_SEQUENCES), config, folder / "cache")
        self._sequences = torch.from_numpy(self._cache.sequences("validation")).long()
        self._sae = _random_sae()
        self.n_tokens = self._sequences.numel()

    def ours(self) -> dict[str, Callable[[], object]]:
        """The bounds and our ways."""
        x = self._cache.hook_reader("validation", HOOK).read(0, self.n_tokens).float()
        return {
            "products": lambda: _products(self._sae, x),
            "forwards": lambda: [self._forward() for _ in range(2)],
            "cache alone": lambda: self._evaluated(1, model=False),
            "first SAE": self._first,
            "another SAE": lambda: self._evaluated(1),
            f"{N_SAES} SAEs": lambda: self._evaluated(N_SAES),
        }

    def saelens(self, say: Say) -> dict[str, Callable[[], object]]:
        """SAELens' run_evals, once its metrics agree with ours."""
        sae, model = _saelens_sae(self._sae), saelens_model(self._model_folder, SAELENS_HOOK)
        _check(self._first(), self._run_evals(sae, model, losses=True), say)
        return {
            "saelens without losses": lambda: self._run_evals(sae, model, losses=False),
            "saelens": lambda: self._run_evals(sae, model, losses=True),
        }

    def _forward(self) -> None:
        for token_ids in self._sequences.split(BATCH_TOKENS // CONTEXT_SIZE):
            self._model.logits(token_ids)

    def _first(self) -> dict[str, Any]:
        shutil.rmtree(self._cache.path / LOSSES, ignore_errors=True)
        return self._evaluated(1)

    def _evaluated(self, n_saes: int, *, model: bool = True) -> dict[str, Any]:
        language_model = self._model if model else None
        return evaluate_all([self._sae] * n_saes, self._cache, language_model, model_tokens=self.n_tokens)[0]

    def _run_evals(self, sae: Any, model: Any, *, losses: bool) -> dict[str, float]:
        from sae_lens.evals import EvalConfig, run_evals
        from sae_lens.training.activation_scaler import ActivationScaler

        prompts = BATCH_TOKENS // CONTEXT_SIZE
        n_batches = -(-len(self._sequences) // prompts)
        config = EvalConfig(
            batch_size_prompts=prompts,
            n_eval_reconstruction_batches=n_batches,
            n_eval_sparsity_variance_batches=n_batches,
            compute_kl=losses,
            compute_ce_loss=losses,
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
            compute_featurewise_density_statistics=True,
        )
        store: Any = _Sequences(self._sequences)
        special = self._cache.special_token_ids
        grouped, _ = run_evals(sae, store, model, ActivationScaler(), config, exclude_special_tokens=special)
        return {name: value for group in grouped.values() for name, value in group.items()}


class _Sequences:
    """What run_evals asks of an ActivationsStore: the same sequences in order, for either part of it."""

    context_size, store_batch_size_prompts = CONTEXT_SIZE, BATCH_TOKENS // CONTEXT_SIZE

    def __init__(self, sequences: Tensor):
        self._sequences = sequences
        self.reset_input_dataset()

    def reset_input_dataset(self) -> None:
        """Begin anew."""
        self._batches = iter(self._sequences.split(self.store_batch_size_prompts))

    def get_batch_tokens(self, batch_size: int) -> Tensor:
        """The next sequences; the last batch may be shorter."""
        return next(self._batches)


def _random_sae() -> SAE:
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_MODEL, generator=generator))
    return SAE(
        architecture="topk",
        hook_name=HOOK,
        W_enc=W_dec.T.contiguous(),
        W_dec=W_dec / 2,
        b_enc=torch.zeros(D_SAE),
        b_dec=torch.zeros(D_MODEL),
        k=K,
        subtracts_b_dec=True,
        metadata={},
    )


def _saelens_sae(sae: SAE) -> Any:
    from sae_lens import SAE as SAELensSAE

    config = {"architecture": "topk", "d_in": sae.d_in, "d_sae": sae.d_sae, "k": K, "apply_b_dec_to_input": True}
    theirs = SAELensSAE.from_dict(
        config | {"rescale_acts_by_decoder_norm": False, "metadata": {"hook_name": SAELENS_HOOK}}
    )
    theirs.load_state_dict({name: getattr(sae, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")})
    return theirs


@torch.no_grad()
def _products(sae: SAE, x: Float[Tensor, "row d_in"]) -> None:
    for rows in x.split(BATCH_TOKENS):
        _ = (rows @ sae.W_enc) @ sae.W_dec


def _check(ours: Mapping[str, Any], theirs: Mapping[str, float], say: Say) -> None:
    of_rows = ("l0", "l1", "mse", "explained_variance", "cossim", "l2_ratio", "relative_reconstruction_bias")
    losses = ("ce_loss_without_sae", "ce_loss_with_sae", "ce_loss_with_ablation")
    divergences = ("kl_div_with_sae", "kl_div_with_ablation", "kl_div_score")
    for names, rounding in ((of_rows, BFLOAT16), (losses, LOSS_ROUNDING), (divergences, KL_ROUNDING)):
        for name in names:
            about_one = 1 if name == "explained_variance" else 0  # what is not explained has the rounding
            pair = ours[name] - about_one, theirs[name] - about_one
            assert math.isclose(*pair, rel_tol=rounding), f"{name}: {ours[name]} here, {theirs[name]} in SAELens"
        say("  ".join(f"{name} {ours[name]:.4f}" for name in names))


def _described(seconds: Mapping[str, Sequence[float]], n_tokens: int, say: Say) -> dict[str, Any]:
    """Tokens/s of each, and the ratios pair by pair; of several SAEs in one call, the seconds of one."""
    many = f"{N_SAES} SAEs"
    spent = {name: [each / (N_SAES if name == many else 1) for each in times] for name, times in seconds.items()}
    rates = {name: n_tokens / statistics.median(times) for name, times in spent.items()}
    say(f"{n_tokens} tokens; tokens/s, medians of {REPEATS}, of {many} for each")
    say("  " + ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()))
    passes = [sum(pair) for pair in zip(spent["forwards"], spent["products"], strict=True)]
    found = {"products / cache alone": ratios(spent["products"], spent["cache alone"])}
    for name in ("first SAE", "another SAE", many):
        found[f"two forwards and products / {name}"] = ratios(passes, spent[name])
    if "saelens" in spent:
        found["saelens without losses / cache alone"] = ratios(spent["saelens without losses"], spent["cache alone"])
        for name in ("first SAE", "another SAE", many):
            found[f"saelens / {name}"] = ratios(spent["saelens"], spent[name])
    for name, ratio in found.items():
        say("  " + described(name, ratio))
    return {"tokens_per_second": rates, **found}
