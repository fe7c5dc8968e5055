"""What our SAEs explain beside SAELens' at equal L0: the same rows, first weights, loss and schedules.

Rows: `blocks.2.hook_resid_post` of the bundled model over the standard library's documentation, lossless bfloat16,
without special tokens, scaled alike. standard, topk, batchtopk and jumprelu of 1,024 latents, each for three seeds.
SAELens' SAETrainer trains one SAE a seed on the batches of our loader, in their order; `trainer.train` trains ours at
three sparsities around it. `peers` says what is made equal. What is not is what either makes of an architecture: AuxK
(ours divides by the error and weighs by 1/32, SAELens' does neither), the threshold of batchtopk (ours is calibrated on
training rows at the end, SAELens' is a running mean of the training batches).

All are exported, loaded again for rows in raw units, and measured on the validation split by `trainer.sae.metrics`. Our
explained variance is interpolated, linearly in log L0, to SAELens' L0.

Also: the same steps on the rows of a lossless cache and on rows that the model computes there and then. They must be
equal to the last bit of bfloat16, and so the SAEs.

    actcache bench quality
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from actcache.bundled.documents import bundled_model_path, write_documents
from actcache.harvesting.config import HarvestConfig
from actcache.harvesting.run import harvest
from actcache.loading.loader import Loader
from actcache.models.language_model import LanguageModel
from actcache.models.load import load_model
from actcache.store.cache import Cache
from actcache.text.sources import DatasetSource
from benchmarks.bench_train import checked, our_step
from benchmarks.measure import Say, installed, machine
from benchmarks.peers import comparable, saelens_inference_sae, saelens_step, saelens_trainer
from trainer.config.settings import SAEConfig
from trainer.config.sweep import SweepConfig
from trainer.formats.saelens import load_sae
from trainer.sae.metrics import ReconstructionSums
from trainer.training.step import TrainState, initial_state
from trainer.training.sweep import train

HOOK, CONTEXT_SIZE, HOLDOUT = "blocks.2.hook_resid_post", 128, 0.1
BATCH_TOKENS, STEPS, SEEDS = 4096, 128, (0, 1, 2)
N_TOKENS, HARVESTED_TOKENS, LIVE_TOKENS = STEPS * BATCH_TOKENS, 655_360, 1 << 16
MEASURED_TOKENS = 1 << 15  # rows of the validation split, at most
SHARED = {"hook_name": HOOK, "d_sae": 1024, "b_dec_init": "mean", "lr_warm_up_steps": 0, "lr_decay_steps": STEPS // 5}


class InferenceSAE(Protocol):
    """What is measured: ours or SAELens'."""

    def encode(self, x: Tensor) -> Tensor: ...
    def decode(self, feature_acts: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An architecture with the settings of both sides, lr as in `trainer/demo.yaml`, and the one that decides L0.

    saelens: SAELens' value of that one. ours: so that our L0 lies on both sides of SAELens'.
    """

    architecture: str
    settings: dict[str, float]
    varied: str
    saelens: float
    ours: tuple[float, ...]

    def sweep(self, cache: Cache, values: Sequence[float]) -> SweepConfig:
        """An SAE for every seed (slowest) and value, with gradients clipped as SAELens clips them."""
        sweep = _sweep([self._run(seed, value) for seed in SEEDS for value in values])
        clipped = comparable(sweep.expand(cache, N_TOKENS)[0])  # they all scale x alike
        like_saelens = {"max_grad_norm": clipped.max_grad_norm, "adam_eps": clipped.adam_eps}
        return _sweep([run | like_saelens for run in sweep.runs])

    def _run(self, seed: int, value: float) -> dict[str, Any]:
        name = f"{self.architecture}-{value}-seed-{seed}"
        own = {"name": name, "architecture": self.architecture, "seed": seed, self.varied: value}
        return SHARED | self.settings | own


CASES = (
    Case(architecture="topk", settings={"lr": 8e-3}, varied="k", saelens=16, ours=(15, 16, 17)),
    Case(architecture="batchtopk", settings={"lr": 8e-3}, varied="k", saelens=16, ours=(14, 16, 18)),
    Case(
        architecture="standard",
        settings={"lr": 2e-3},
        varied="sparsity_coefficient",
        saelens=0.7,
        ours=(0.6, 0.7, 0.8),
    ),
    Case(
        architecture="jumprelu",
        settings={"lr": 3e-3},
        varied="sparsity_coefficient",
        saelens=3e-4,
        ours=(2e-4, 3e-4, 4.5e-4),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """An SAE on the validation split."""

    l0: float
    explained_variance: float


def run(say: Say) -> dict[str, Any]:
    """Measure; returns what the JSON line says."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model, documents = load_model(bundled_model_path(), device="cpu"), write_documents(root / "documents.jsonl")
        found: dict[str, Any] = {"cached_equals_live": cached_equals_live(model, documents, root / "short")}
        say("from a cache and from the model: equal rows and SAEs")
        if installed("sae_lens", say):
            config = HarvestConfig(
                hook_names=(HOOK,), tokens=HARVESTED_TOKENS, context_size=CONTEXT_SIZE, holdout=HOLDOUT
            )
            cache = harvest(model, DatasetSource(path=str(documents)), config, root / "cache")
            for case in CASES:
                found[case.architecture] = _compared(cache, case, root / case.architecture, say)
    return {"bench": "quality", **SHARED, "n_tokens": N_TOKENS, **found, "machine": machine()}


def at_l0(qualities: Sequence[Quality], l0: float) -> float:
    """Explained variance at this L0, linear in log L0 between the two qualities on its sides.

    Raises:
        ValueError: all qualities lie on one side of it.
    """
    ordered = sorted(qualities, key=lambda quality: quality.l0)
    first, last = ordered[0].l0, ordered[-1].l0
    if not first <= l0 <= last:
        raise ValueError(f"at_l0: l0 must be in [{first:.2f}, {last:.2f}], got {l0:.2f}; train at other sparsities")
    known = [quality.explained_variance for quality in ordered]
    return float(np.interp(np.log(l0), np.log([quality.l0 for quality in ordered]), known))


def cached_equals_live(
    model: LanguageModel, documents: Path, folder: Path, n_tokens: int = LIVE_TOKENS
) -> dict[str, int]:
    """Step an SAE on rows of a lossless cache and another on the same rows computed anew; all must be equal.

    The model runs one sequence at a time, both times: in larger batches float32 may round otherwise.
    """
    harvested = HarvestConfig(hook_names=(HOOK,), tokens=n_tokens, context_size=CONTEXT_SIZE, batch_size=1, holdout=0.0)
    cache = harvest(model, DatasetSource(path=str(documents)), harvested, folder)
    sequences = torch.from_numpy(cache.sequences("train")).split(1)
    live = torch.cat([model.activations(sequence, [HOOK])[HOOK] for sequence in sequences])
    config = _sweep([SHARED | {"name": "topk", "architecture": "topk", "k": 16, "lr_decay_steps": 0}]).expand(
        cache, n_tokens
    )[0]
    states = _initial_state(cache, config), _initial_state(cache, config)
    steps = [our_step(state) for state in states]
    for batch in Loader(cache, HOOK, batch_tokens=BATCH_TOKENS, token_fields=("sequence", "position")):
        pair = batch.x[HOOK], live[batch.sequence, batch.position].bfloat16()
        assert torch.equal(*pair), f"step {batch.step}: the cache holds other rows than the model gives"
        for step, x in zip(steps, pair, strict=True):
            step(_scaled(x, config))
    cached, computed = (state.weights for state in states)
    assert all(torch.equal(cached[name], computed[name]) for name in cached), "equal rows gave other weights"
    return {"steps": states[0].step, "rows": states[0].n_tokens}


def _compared(cache: Cache, case: Case, folder: Path, say: Say) -> dict[str, Any]:
    """Each seed's SAEs, and by how much ours explain more than SAELens' at its L0."""
    say(f"{case.architecture}: explained variance at L0 on the validation rows")
    ours, theirs = case.sweep(cache, case.ours), case.sweep(cache, [case.saelens])
    train(cache, ours, folder)
    names = [run["name"] for run in ours.runs]
    seeds = []
    for number, config in enumerate(theirs.expand(cache, N_TOKENS)):
        saelens = _quality(_saelens_sae(cache, config, folder / f"saelens-{config.seed}"), cache)
        mine = names[number * len(case.ours) : (number + 1) * len(case.ours)]
        seeds.append(_of_seed(config.seed, saelens, [_quality(load_sae(folder / name), cache) for name in mine], say))
    more = [seed["more_explained"] for seed in seeds]
    say(f"  ours - SAELens: mean {np.mean(more):+.4f}, range {min(more):+.4f} to {max(more):+.4f}")
    return {"seeds": seeds, "mean": float(np.mean(more)), "min": min(more), "max": max(more)}


def _of_seed(seed: int, saelens: Quality, ours: Sequence[Quality], say: Say) -> dict[str, Any]:
    told = ", ".join(_told(quality) for quality in ours)
    at_equal_l0 = at_l0(ours, saelens.l0)
    more = at_equal_l0 - saelens.explained_variance
    say(f"  seed {seed}: SAELens {_told(saelens)}; ours {told}, so {at_equal_l0:.4f} ({more:+.4f})")
    return {
        "seed": seed,
        "saelens": asdict(saelens),
        "ours": [asdict(quality) for quality in ours],
        "more_explained": more,
    }


def _told(quality: Quality) -> str:
    return f"{quality.explained_variance:.4f} at {quality.l0:.2f}"


def _saelens_sae(cache: Cache, config: SAEConfig, folder: Path) -> InferenceSAE:
    """SAELens' SAE of the config, trained on the rows that `trainer.train` trains ours on."""
    state = _initial_state(cache, config)
    trainer = saelens_trainer(config, state.weights, BATCH_TOKENS)
    step, feed = saelens_step(trainer), _scaled_batches(cache, config)
    checked({"ours": our_step(state), "saelens": step}, [next(feed)])
    for x in feed:
        step(x)
    return saelens_inference_sae(trainer, config, folder)


def _initial_state(cache: Cache, config: SAEConfig) -> TrainState:
    """Where `trainer.train` begins, with b_dec at the mean row."""
    mean = torch.from_numpy(cache.statistics(HOOK).mean)
    return initial_state(config, (mean * config.input_scale).float())


def _scaled_batches(cache: Cache, config: SAEConfig) -> Iterator[Float[Tensor, "batch d_in"]]:
    for batch in Loader(cache, HOOK, batch_tokens=BATCH_TOKENS, limit=N_TOKENS):
        yield _scaled(batch.x[HOOK], config)


def _scaled(x: Float[Tensor, "batch d_in"], config: SAEConfig) -> Float[Tensor, "batch d_in"]:
    return x.float() * config.input_scale


@torch.no_grad()
def _quality(sae: InferenceSAE, cache: Cache) -> Quality:
    """Over the same validation rows each time, in raw units."""
    whole: ReconstructionSums | None = None
    for batch in Loader(cache, HOOK, split="validation", batch_tokens=BATCH_TOKENS, limit=MEASURED_TOKENS):
        x = batch.x[HOOK].float()
        feature_acts = sae.encode(x)
        part = ReconstructionSums.of(x, feature_acts, sae.decode(feature_acts))
        whole = part if whole is None else whole.merge(part)
    assert whole is not None, "the validation split holds rows"
    return Quality(l0=whole.l0, explained_variance=whole.explained_variance)


def _sweep(runs: Sequence[dict[str, Any]]) -> SweepConfig:
    shared = {"batch_tokens": BATCH_TOKENS, "tokens": N_TOKENS, "log_every": STEPS}
    return SweepConfig.from_dict(shared | {"runs": list(runs)})
