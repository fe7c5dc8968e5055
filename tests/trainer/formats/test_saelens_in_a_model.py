"""Exported SAEs spliced into a model by SAELens' HookedSAETransformer and SAETransformerBridge, and by us."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.saelens_models import close, hooked, token_ids
from support.tiny_models import D_MODEL, make_model, make_tokenizer
from support.tiny_saes import ARCHITECTURES, TRANSCODERS, changed, make_config, make_weights
from torch import Tensor

from actcache.models.language_model import LanguageModel
from actcache.models.load import wrap_model
from trainer.formats.saelens import export_sae, load_sae, save_inference_sae
from trainer.sae.sae import SAE

sae_lens = pytest.importorskip("sae_lens")
pytestmark = [
    pytest.mark.filterwarnings("ignore:\\s*This SAE has non-empty model_from_pretrained_kwargs:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*HookedTransformer.* is deprecated:DeprecationWarning"),
]
SOURCE, TARGET = "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"  # of a transcoder
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def ours() -> LanguageModel:
    tokenizer = make_tokenizer()
    return wrap_model(make_model("gpt2", len(tokenizer)).double(), tokenizer, "tiny")


@pytest.fixture(scope="module")
def bridge() -> Any:
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    tokenizer = make_tokenizer()
    spare = make_model("gpt2", len(tokenizer)).double()
    tokenizer.bos_token = None  # or the bridge fetches the tokenizer anew
    return SAETransformerBridge.boot_transformers("gpt2", hf_model=spare, tokenizer=tokenizer, dtype=torch.float64)


@pytest.fixture(params=["bridge", "hooked"])
def theirs(request: pytest.FixtureRequest) -> Any:
    return hooked() if request.param == "hooked" else request.getfixturevalue(request.param)


def exported(tmp_path: Path, architecture: str) -> tuple[SAE, Any]:
    """(ours, SAELens') of an SAE in float64 that was trained on a scaled stream."""
    changes: dict[str, object] = {"hook_name": HOOK, "d_in": D_MODEL}
    if architecture in TRANSCODERS:
        changes = {"hook_name": SOURCE, "hook_name_out": TARGET, "d_in": D_MODEL, "d_out": D_MODEL}
    weights = make_weights(architecture, D_MODEL, d_out=D_MODEL)
    weights = {name: tensor.double() / 4 for name, tensor in weights.items()}
    save_inference_sae(make_config(architecture, **changes), weights, tmp_path / "run" / "sae", metadata={})
    folder = export_sae(tmp_path / "run", tmp_path / "exported")
    return load_sae(folder), sae_lens.SAE.load_from_disk(folder)


def spliced(model: LanguageModel, sae: SAE) -> Tensor:
    """Our logits, with x_hat in the place of the activation at every token."""
    (source,), (target,) = sae.input_hooks, sae.output_hooks
    seen: dict[str, Tensor] = {}

    def replace_(y: Tensor) -> Tensor:
        x = seen.get("x", y)
        return sae.reconstruct(x.flatten(0, 1))[1].view_as(y)

    show = None if source == target else {source: lambda x: seen.update(x=x)}
    return model.logits_with(token_ids(), target, replace_, hook_fns=show)


@torch.no_grad()
def test_the_models_are_the_same_without_an_sae(ours, theirs):
    assert close(theirs(token_ids()), ours.logits(token_ids()))


@torch.no_grad()
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "crosscoder"])
def test_an_exported_sae_spliced_by_saelens_gives_our_logits(architecture, ours, theirs, tmp_path):
    sae, exported_sae = exported(tmp_path, architecture)
    if architecture in ("batchtopk", "matryoshka_batchtopk"):
        assert exported_sae.cfg.architecture() == "jumprelu"
        threshold = make_weights(architecture)["threshold"].double() / 4
        assert exported_sae.threshold.unique().tolist() == [threshold.item()], "one number for every latent"
    logits = theirs.run_with_saes(token_ids(), saes=[exported_sae])
    if architecture == "skip_transcoder":  # SAELens calls encode and decode there, and never adds W_skip x
        sae = changed(sae, W_skip=None)
    assert close(logits, spliced(ours, sae))
    assert not close(logits, ours.logits(token_ids())), "the SAE changes something"
    assert close(theirs(token_ids()), ours.logits(token_ids())), "and is gone afterwards"


@torch.no_grad()
def test_with_the_error_term_nothing_changes(ours, theirs, tmp_path):
    _, exported_sae = exported(tmp_path, "topk")
    logits = theirs.run_with_saes(token_ids(), saes=[exported_sae], use_error_term=True)
    assert close(logits, ours.logits(token_ids()))


@torch.no_grad()
def test_an_sae_of_heads_takes_them_as_saelens_gives_them(tmp_path):
    """HookedTransformer has hook_z as [..., head, d_head]; ours has the heads side by side."""
    hook_z = "blocks.1.attn.hook_z"
    weights = {name: tensor.double() / 4 for name, tensor in make_weights("topk", D_MODEL).items()}
    config = make_config("topk", hook_name=hook_z, d_in=D_MODEL)
    save_inference_sae(config, weights, tmp_path / "run" / "sae", metadata={})
    sae = load_sae(tmp_path / "run")
    exported_sae = sae_lens.SAE.load_from_disk(export_sae(tmp_path / "run", tmp_path / "exported"))
    logits = hooked().run_with_saes(token_ids(), saes=[exported_sae])

    def flat(z: Tensor, hook: object) -> Tensor:
        return sae.reconstruct(z.flatten(2).flatten(0, 1))[1].view_as(z)

    assert close(logits, hooked().run_with_hooks(token_ids(), fwd_hooks=[(hook_z, flat)]))
