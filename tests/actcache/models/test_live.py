"""Models that the caller has loaded, read by hook name: transformers' modules and TransformerLens' two kinds."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from support.saelens_models import close, hooked, token_ids, transformers_module
from support.tiny_models import make_tokenizer

from actcache.errors import ModelError
from actcache.models.live import live_model
from actcache.models.load import wrap_model

pytest.importorskip("transformer_lens")
pytest.importorskip("sae_lens")
pytestmark = pytest.mark.filterwarnings("ignore:.*HookedTransformer.* is deprecated:DeprecationWarning")
HOOKS = ("blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_post")


@cache
def bridge() -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer = make_tokenizer()
    tokenizer.bos_token = None  # or the bridge fetches the tokenizer anew
    return TransformerBridge.boot_transformers(
        "gpt2", hf_model=copy.deepcopy(transformers_module()), tokenizer=tokenizer, dtype=torch.float64
    )


MODELS = {"hooked": hooked, "bridge": bridge, "transformers": transformers_module}


@pytest.mark.parametrize("name", MODELS)
def test_it_has_the_activations_and_logits_of_its_module(name):
    module = MODELS[name]()
    model, known = live_model(module), wrap_model(transformers_module(), None)
    with torch.no_grad():
        output = module(token_ids())
        own = output if isinstance(output, torch.Tensor) else output.logits
    assert torch.equal(model.logits(token_ids()), own)
    for hook_name, x in model.activations(token_ids(), HOOKS).items():
        assert close(x, known.activations(token_ids(), [hook_name])[hook_name])
    replaced = model.logits_with(token_ids(), HOOKS[1], torch.zeros_like)
    assert close(replaced, known.logits_with(token_ids(), HOOKS[1], torch.zeros_like))
    with torch.no_grad():
        again = module(token_ids())
    assert torch.equal(again if isinstance(again, torch.Tensor) else again.logits, own), "nothing stays in the module"
    assert model.has_layer_norm()
    assert not model.has_centred_stream()
    assert live_model(model) is model


def test_heads_lie_side_by_side():
    model = live_model(hooked())
    z = hooked().run_with_cache(token_ids(), names_filter="blocks.1.attn.hook_z")[1]["blocks.1.attn.hook_z"]
    assert torch.equal(model.activations(token_ids(), ["blocks.1.attn.hook_z"])["blocks.1.attn.hook_z"], z.flatten(2))
    assert model.hook_widths(["blocks.1.attn.hook_z"]) == {"blocks.1.attn.hook_z": z.shape[2] * z.shape[3]}


def test_what_a_module_lacks_is_said():
    model = live_model(hooked())
    with pytest.raises(ModelError, match=r"no hook 'blocks.9.hook_resid_post'; near names"):
        model.activations(token_ids(), ["blocks.9.hook_resid_post"])
    with pytest.raises(ModelError, match=r"Cannot add hook blocks\.1.attn.hook_result if use_attn_result"):
        model.activations(token_ids(), ["blocks.1.attn.hook_result"])
    with pytest.raises(ModelError, match="a HookedSAETransformer that is loaded already cannot be compared"):
        model.differences({"name": "tiny"})


def test_the_stream_of_a_processed_model_is_centred():
    assert live_model(hooked(center_writing_weights=True)).has_centred_stream()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_does_not_decide_whether_a_stream_is_centred(dtype):
    """A mean over d_model of many roundings is small; that of a raw stream is not so small in any dtype."""
    raw, centred = (copy.deepcopy(hooked(**how)).to(dtype) for how in ({}, {"center_writing_weights": True}))
    for model in (raw, centred):
        model.cfg.dtype = dtype
    assert not live_model(raw).has_centred_stream()
    assert live_model(centred).has_centred_stream()


def test_a_model_without_an_output_head_is_known_by_its_norms():
    base = copy.deepcopy(transformers_module()).transformer
    assert live_model(base).has_layer_norm()


def test_another_tokenizer_is_taken_without_a_copy_of_the_model():
    model, tokenizer = live_model(transformers_module()), make_tokenizer()
    assert live_model(model, tokenizer).tokenizer is tokenizer
    assert model.tokenizer is None
    assert torch.equal(live_model(model, tokenizer).logits(token_ids()), model.logits(token_ids()))


def test_the_weights_are_hashed_when_the_identity_is_asked_for(monkeypatch):
    """Steering asks for none; the hash of a large model takes seconds."""
    from actcache.models import identity

    hashed, real = [], identity.content_sha256
    monkeypatch.setattr(identity, "content_sha256", lambda model: hashed.append(1) or real(model))
    model = live_model(transformers_module(), make_tokenizer())
    model.logits(token_ids())
    assert not hashed
    assert model.identity["content_sha256"]
    assert model.identity == model.identity
    assert len(hashed) == 1
