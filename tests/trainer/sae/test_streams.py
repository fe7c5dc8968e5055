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
from trainer.sae.streams import checked_stream

pytest.importorskip("sae_lens")
pytestmark = pytest.mark.filterwarnings("ignore:.*HookedTransformer.* is deprecated:DeprecationWarning")
STREAM = "blocks.1.hook_resid_post"
CENTRED = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}


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
def test_models_that_are_loaded_say_what_they_are():
    raw = make_sae(hook_name=STREAM)
    centred = changed(raw, metadata={**raw.metadata, **CENTRED})
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
