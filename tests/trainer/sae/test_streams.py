"""The raw and the centred residual stream: what an SAE is of, what a model has, and what does not fit."""

from dataclasses import dataclass

import pytest
import torch
from support.planted import make_sae
from support.saelens_models import close, hooked, token_ids, transformers_module
from support.tiny_models import D_MODEL, make_model
from support.tiny_saes import changed

from actcache.errors import CacheMismatch
from trainer.interventions.splice import Splice, spliced
from trainer.sae.streams import CENTRED, checked_stream

pytest.importorskip("sae_lens")
pytestmark = pytest.mark.filterwarnings("ignore:.*HookedTransformer.* is deprecated:DeprecationWarning")
STREAM = "blocks.1.hook_resid_post"
CENTRED_SAE = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}


@dataclass
class Stub:
    name: str
    centred: bool
    layer_norm: bool

    def has_centred_stream(self) -> bool:
        return self.centred

    def has_layer_norm(self) -> bool:
        return self.layer_norm


def test_every_pair_of_stream_and_model():
    raw, rms, centred = Stub("raw", False, True), Stub("rms", False, False), Stub("centred", True, True)
    assert checked_stream(raw, [STREAM], is_centred=False).endswith("of the raw residual stream, raw has the raw one")
    assert checked_stream(rms, [STREAM], is_centred=False).endswith("of the raw residual stream, rms has the raw one")
    assert checked_stream(centred, [STREAM], is_centred=True).endswith("centred has the centred one")
    assert checked_stream(raw, [STREAM], is_centred=True).endswith("has the raw one, whose mean the SAE subtracts")
    for model, is_centred, says in (
        (centred, False, "is of the raw residual stream, centred was loaded with a centred one"),
        (rms, True, "its norms are RMSNorms"),
    ):
        with pytest.raises(CacheMismatch, match=says):
            checked_stream(model, [STREAM], is_centred=is_centred)
        assert "is the same in the raw" in checked_stream(model, ["blocks.1.attn.hook_z"], is_centred=is_centred)


@torch.no_grad()
def test_each_site_is_centred_exactly_where_transformerlens_centres_it():
    """By the activations of both models: mean 0 on the centred one where it is counted as centred, and only there."""
    processed, raw = hooked(center_writing_weights=True), hooked()
    for model in (processed, raw):
        for flag in ("use_attn_in", "use_hook_mlp_in"):
            setattr(model.cfg, flag, True)
    seen, plain = (model.run_with_cache(token_ids())[1] for model in (processed, raw))
    names = [name for name, x in seen.items() if x.shape[-1] == D_MODEL and name.startswith(("blocks.1.", "hook_"))]
    assert len(names) > 10
    for name in names:
        same = seen[name].shape == plain[name].shape and close(seen[name], plain[name], 1e4 * 2.0**-24)
        mean = seen[name].double().mean(-1).abs().max()
        centred = not same and bool(mean < 1e-4)
        assert same != centred, name
        assert (CENTRED.fullmatch(name) is not None) == centred, name
    for model in (processed, raw):
        for flag in ("use_attn_in", "use_hook_mlp_in"):
            setattr(model.cfg, flag, False)


@torch.no_grad()
def test_a_check_sees_the_model_without_the_splices_that_are_in_it():
    raw = make_sae(hook_name=STREAM)
    centred = changed(raw, metadata={**raw.metadata, **CENTRED_SAE})
    where = torch.zeros(token_ids().shape, dtype=torch.bool)
    where[:, 3:] = True
    splices = [Splice(sae=raw, where=where, keep_error=False), Splice(sae=centred, where=where, keep_error=False)]
    for module in (transformers_module(), hooked()):
        with spliced(module, splices):
            expected = module(token_ids())
        with spliced(module, splices[:1]), spliced(module, splices[1:]):
            got = module(token_ids())
        one, other = (each if isinstance(each, torch.Tensor) else each.logits for each in (expected, got))
        assert torch.equal(one, other)


@torch.no_grad()
def test_models_that_are_loaded_say_what_they_are():
    raw = make_sae(hook_name=STREAM)
    centred = changed(raw, metadata={**raw.metadata, **CENTRED_SAE})
    processed = hooked(center_writing_weights=True)
    assert raw.check(hooked()).endswith("tiny has the raw one")
    assert raw.check(transformers_module()).endswith("has the raw one")
    assert centred.check(processed).endswith("tiny has the centred one")
    assert centred.check(transformers_module()).endswith("has the raw one, whose mean the SAE subtracts")
    with pytest.raises(CacheMismatch, match="was loaded with a centred one"), spliced(processed, [Splice(sae=raw)]):
        pass
    with pytest.raises(CacheMismatch, match="its norms are RMSNorms"):
        centred.check(make_model("llama", 512))


@torch.no_grad()
def test_an_sae_of_the_other_stream_would_compute_something_else():
    """Without a word, were it not for the check: the logits of both models are the same."""
    raw, processed = hooked(), hooked(center_writing_weights=True)
    rounding = 1e4 * 2.0**-24
    assert close(raw(token_ids()), processed(token_ids()), rounding)
    x, y = (m.run_with_cache(token_ids(), names_filter=STREAM)[1][STREAM] for m in (raw, processed))
    sae = make_sae(hook_name=STREAM)
    assert x.shape[-1] == D_MODEL
    assert not close(sae.encode(x), sae.encode(y), rounding)
