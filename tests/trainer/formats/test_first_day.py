"""The first day of a SAELens user: a published SAE is loaded, looked at and steered with, in SAELens' own words.

The release stands in for gpt2-small-res-jb: the keys of its cfg.json, its files, and a registry entry that alone says
that the stream is centred.
"""

import json
import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.hub import Hub
from support.places import ROOT
from support.saelens_models import PROCESSED_ROUNDING, close, hooked, transformers_module
from support.saelens_peers import fill_
from support.tiny_models import D_MODEL, make_tokenizer
from torch import Tensor
from transformers import AutoTokenizer

import trainer
from actcache import live_model
from actcache.errors import CacheMismatch
from trainer.sae.sae import SAE

sae_lens = pytest.importorskip("sae_lens")
pytestmark = [
    pytest.mark.filterwarnings("ignore:\\s*This SAE has non-empty model_from_pretrained_kwargs:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*HookedTransformer.* is deprecated:DeprecationWarning"),
]
HOOK, D_SAE = "blocks.1.hook_resid_pre", 96
TEXT = "The old lighthouse keeper climbed the stairs"
CFG = {  # the keys of that release, with the values that are small here
    **{"model_name": "gpt2-small", "hook_point": HOOK, "hook_point_layer": 1, "hook_point_head_index": None},
    **{"dataset_path": "Skylion007/openwebtext", "is_dataset_tokenized": False, "context_size": 128},
    **{"use_cached_activations": False, "cached_activations_path": "activations/x", "d_in": D_MODEL, "d_sae": D_SAE},
    **{"n_batches_in_buffer": 128, "total_training_tokens": 300000000, "store_batch_size": 32, "device": "mps"},
    **{"seed": 42, "dtype": "torch.float64", "b_dec_init_method": "geometric_median", "expansion_factor": 32},
    **{"from_pretrained_path": None, "l1_coefficient": 8e-05, "lr": 0.0004, "lr_scheduler_name": None},
    **{"lr_warm_up_steps": 5000, "train_batch_size": 4096, "use_ghost_grads": False, "log_to_wandb": True},
    **{"feature_sampling_window": 5000, "feature_sampling_method": None, "resample_batches": 1028},
    **{"feature_reinit_scale": 0.2, "dead_feature_window": 5000, "dead_feature_threshold": 1e-08},
    **{"wandb_project": "mats_sae_training_gpt2_small_resid_pre_5", "wandb_entity": None, "wandb_log_frequency": 100},
    **{"n_checkpoints": 10, "checkpoint_path": "checkpoints/y", "tokens_per_buffer": 67108864, "run_name": "z"},
}


@pytest.fixture(autouse=True)
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path / "hub", monkeypatch)
    folder = hub.folder(HOOK)
    cfg = {"architecture": "standard", "d_in": D_MODEL, "d_sae": D_SAE, "dtype": "float64"}
    made = sae_lens.SAE.from_dict({**cfg, "metadata": {"hook_name": HOOK, "model_name": "gpt2-small"}})
    fill_(made)
    made.W_dec.data /= 8
    save_file(made.state_dict(), folder / "sae_weights.safetensors")
    save_file({"sparsity": torch.linspace(-9, -1, D_SAE)}, folder / "sparsity.safetensors")
    (folder / "cfg.json").write_text(json.dumps(CFG))
    overrides = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    hub.register("gpt2-small-res-jb", HOOK, config_overrides=overrides)


def of_saelens() -> Any:
    return sae_lens.SAE.from_pretrained("gpt2-small-res-jb", "one")


@cache
def models() -> dict[str, Any]:
    """Of the same weights; with a tokenizer that is loaded from a folder, as TransformerLens loads it once more."""
    made = {"raw": hooked(), "processed": hooked(center_writing_weights=True)}
    with TemporaryDirectory() as folder:
        make_tokenizer().save_pretrained(folder)
        for model in made.values():
            model.set_tokenizer(AutoTokenizer.from_pretrained(folder), default_padding_side="right")
    return made


BLOCK = """
sae, cfg_dict, sparsity = SAE.from_pretrained(release="gpt2-small-res-jb", sae_id="one")
tokens = model.to_tokens("The old lighthouse keeper climbed the stairs"); _, cache = model.run_with_cache(tokens)
acts = cache["resid_pre", 1]; f = sae.encode(acts); best = f[0, pos].topk(5); norm = (acts - sae.decode(f)).norm()
"""


def the_block(imported: type, model: Any) -> dict[str, Any]:
    """The block as its users type it; only the import line is another."""
    names: dict[str, Any] = {"SAE": imported, "model": model, "pos": 3}
    with torch.no_grad():
        exec(BLOCK, names)
    return names


class Theirs:
    """SAELens 6 gives the SAE alone; before, from_pretrained gave the three values, as this does."""

    @staticmethod
    def from_pretrained(release: str, sae_id: str) -> Any:
        return sae_lens.SAE.from_pretrained_with_cfg_and_sparsity(release, sae_id, dtype="float64")


def test_a_published_sae_is_loaded_and_looked_at():
    """Ours, on both models, is SAELens' on the model that the SAE is of; float32, in which weights are centred."""
    theirs = the_block(Theirs, models()["processed"])
    for model in models().values():
        ours = the_block(SAE, model)
        assert close(theirs["f"], ours["f"], PROCESSED_ROUNDING)
        assert close(theirs["sae"].decode(theirs["f"]), ours["sae"].decode(ours["f"]), PROCESSED_ROUNDING)
        assert close(theirs["best"].values, ours["best"].values, PROCESSED_ROUNDING)
        assert torch.equal(theirs["best"].indices, ours["best"].indices)
        assert torch.equal(theirs["sparsity"].double(), ours["sparsity"].double())
        seen, x_hat = ours["sae"].target(ours["acts"]), ours["sae"](ours["acts"])
        assert close(theirs["norm"], (seen - x_hat).norm(), PROCESSED_ROUNDING), "the error of the reconstruction"
        assert ours["cfg_dict"]["hook_name"] == HOOK
    assert ours["cfg_dict"]["model_from_pretrained_kwargs"] == {"center_writing_weights": True}


@torch.no_grad()
def test_a_raw_sae_on_a_processed_model_is_refused_and_not_computed():
    sae = SAE.from_pretrained("gpt2-small-res-jb", "one")
    sae.is_centred = False
    processed = models()["processed"]
    tokens = processed.to_tokens(TEXT)
    for use in (
        lambda: trainer.attribution(processed, [sae], tokens, lambda logits: logits[0, -1, 3]),
        lambda: trainer.encode_text(sae, processed, TEXT),
        lambda: trainer.steer(processed, sae, TEXT, features={3: trainer.Clamp(0.0)}),
        lambda: sae.check(processed),
    ):
        with pytest.raises(CacheMismatch, match="of the raw residual stream, tiny was loaded with a centred one"):
            use()


@torch.no_grad()
@pytest.mark.parametrize("name", ["raw", "processed", "transformers"])
def test_features_are_steered_and_ablated_as_by_hand(name):
    sae = SAE.from_pretrained("gpt2-small-res-jb", "one").double()
    module = transformers_module() if name == "transformers" else models()[name]
    tokens = make_tokenizer()(TEXT, return_tensors="pt").input_ids
    x = live_model(models()["raw"]).activations(tokens, [HOOK])[HOOK]
    f = sae.encode(x)
    latent = int(f[0, -1].argmax())
    where = torch.zeros(tokens.shape, dtype=torch.bool)
    where[0, 2:] = True

    def ablated(x: Tensor, hook: object) -> Tensor:
        change = -f[..., latent, None] * sae.W_dec[latent]
        return x + change * where[..., None]

    def steered(x: Tensor, hook: object) -> Tensor:
        return x + 4.0 * sae.W_dec[latent] * where[..., None]

    for by_hand, change in ((ablated, trainer.Clamp(0.0)), (steered, trainer.Add(4.0))):
        expected = models()["raw"].run_with_hooks(tokens, fwd_hooks=[(HOOK, by_hand)])
        splice = trainer.Splice(sae=sae, features={latent: change}, where=where)
        with trainer.spliced(module, [splice]):
            output = module(tokens)
        assert close(expected, output if isinstance(output, Tensor) else output.logits, PROCESSED_ROUNDING)
    with trainer.spliced(module, []):
        output = module(tokens)
    assert not close(expected, output if isinstance(output, Tensor) else output.logits, PROCESSED_ROUNDING)


def test_the_features_that_raise_the_logit_of_an_answer():
    """Attribution on the user's own model; the latent with the largest effect is the one whose ablation costs most."""
    sae, model = SAE.from_pretrained("gpt2-small-res-jb", "one").double(), models()["raw"]
    tokens, answer = model.to_tokens(TEXT), 7

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, answer] - logits[0, -1].mean()

    (found,) = trainer.attribution(model, [sae], tokens, metric, steps=32)
    with torch.no_grad():
        base, drops = metric(model(tokens)), {}
        for latent in found.feature_acts.amax((0, 1)).topk(12).indices.tolist():
            with trainer.spliced(model, [trainer.Splice(sae=sae, features={latent: trainer.Clamp(0.0)})]):
                drops[latent] = float(metric(model(tokens)) - base)
    effects = {latent: float(found.effect[..., latent].sum()) for latent in drops}
    assert max(drops, key=lambda i: abs(drops[i])) == max(effects, key=lambda i: abs(effects[i]))


def test_the_block_is_that_of_the_documentation():
    shown = (ROOT / "docs" / "tutorial" / "from-saelens.md").read_text()
    for line in BLOCK.strip().splitlines():
        for part in line.split("; "):
            call = re.sub(r'"[^"]*"|\b1\b', "", part)
            assert call in re.sub(r'"[^"]*"|\b8\b', "", shown), part
