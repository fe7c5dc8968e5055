"""What the tests of evaluation share: a tiny float64 model, a cache of two of its hooks, SAEs near the identity."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor

from actcache.harvesting.config import HarvestConfig
from actcache.harvesting.run import harvest
from actcache.models.language_model import LanguageModel
from actcache.models.load import wrap_model
from actcache.store.cache import Cache
from actcache.text.sources import LoadedDataset
from support.tiny_models import TEXT, make_model, make_tokenizer
from trainer.evaluation.evaluate import evaluate_all
from trainer.sae.sae import SAE

HOOK, OTHER_HOOK = "blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"
D_IN = 32
# The model and the SAEs here compute in float64, so that two orders of summation differ by rounding alone: 2^-53 times
# the terms of the longest sum (under 10^6), times 10 for the condition of the scores, which are ratios of differences.
ROUNDING = 10 * 1e6 * 2.0**-53


def new_model() -> LanguageModel:
    """The tiny GPT-2 in float64."""
    tokenizer = make_tokenizer()
    return wrap_model(make_model("gpt2", len(tokenizer)).double(), tokenizer, "tiny")


def new_cache(out: Path, model: LanguageModel, **changes: object) -> Cache:
    """Its activations in float32; `changes` are of HarvestConfig."""
    documents = [line for line in TEXT.splitlines() if line] * 6
    config = HarvestConfig(
        hook_names=(HOOK, OTHER_HOOK), tokens=2048, context_size=32, dtype="float32", holdout=0.4, batch_size=16
    )
    source = LoadedDataset(datasets.Dataset.from_dict({"text": documents}))
    return harvest(model, source, dataclasses.replace(config, **changes), out)


def make_sae(architecture: str = "jumprelu", hook_name: str = HOOK, seed: int = 0) -> SAE:
    """A random float64 SAE near the identity, so that its reconstruction is bad but not nonsense."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(3 * D_IN, D_IN, generator=generator, dtype=torch.float64)
    w = w / w.norm(dim=1, keepdim=True)
    return SAE(
        architecture=architecture,
        hook_name=hook_name,
        W_enc=w.T.contiguous(),
        W_dec=w / 2,
        b_enc=torch.full((3 * D_IN,), -0.1, dtype=torch.float64),
        b_dec=torch.randn(D_IN, generator=generator, dtype=torch.float64) / 10,
        threshold=torch.full((3 * D_IN,), 0.2, dtype=torch.float64) if architecture == "jumprelu" else None,
        k=6 if architecture == "topk" else None,
        subtracts_b_dec=architecture == "topk",
        metadata={},
    )


def validation_rows(cache: Cache, hook_name: str, *, exclude_special_tokens: bool = True) -> Tensor:
    """Every stored validation row, float64, in stored order; those of special tokens only where they are asked for."""
    x = cache.hook_reader("validation", hook_name).read(0, cache.n_rows("validation"))
    ids = cache.token_reader("validation", "id").read(0, cache.n_rows("validation"))
    excluded = cache.special_token_ids if exclude_special_tokens else ()
    return x[torch.from_numpy(~np.isin(ids, excluded))].double()


def filled(values: Sequence[float | None]) -> list[float]:
    """None as NaN, which pytest.approx can compare."""
    return [math.nan if value is None else value for value in values]


class Counted:
    """A model that counts its passes: whole ones, and by hook those that replace an activation."""

    def __init__(self, model: LanguageModel):
        self.model, self.identity, self.device, self.passes = model, model.identity, model.device, Counter[str]()
        self.backend, self.attention_kernel, self.compiled = model.backend, model.attention_kernel, model.compiled
        self.vocab_size, self.differences, self.probe = model.vocab_size, model.differences, model.probe
        self.name = model.name
        self.has_centred_stream, self.has_layer_norm = model.has_centred_stream, model.has_layer_norm

    def logits(self, token_ids: Tensor, **options: object) -> Tensor:
        self.passes["whole"] += 1
        return self.model.logits(token_ids, **options)

    def logits_with(self, token_ids: Tensor, hook_name: str, replace: Callable[[Tensor], Tensor]) -> Tensor:
        self.passes[f"whole, with {hook_name}"] += 1
        return self.model.logits_with(token_ids, hook_name, replace)

    def logits_from(
        self, token_ids: Tensor, start: Tensor, hook_name: str, replace: Callable[[Tensor], Tensor]
    ) -> Tensor:
        self.passes[hook_name] += 1
        return self.model.logits_from(token_ids, start, hook_name, replace)

    def stream_before(self, hook_name: str) -> str | None:
        return self.model.stream_before(hook_name)


def counted(saes: list[SAE], cache: Cache, model: LanguageModel, **options: object) -> tuple[list[dict], Counter[str]]:
    """What `evaluate_all` returns, and the passes that it made."""
    watched = Counted(model)
    return evaluate_all(saes, cache, watched, **{"model_tokens": 96, **options}), watched.passes
