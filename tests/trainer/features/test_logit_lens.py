"""The logit lens against its definition written out in float64 and against planted directions."""

import pytest
import torch
from support.planted import D_SAE, TEXT, folded_by_hand, make_sae, model_of, module_of, planted
from support.reference import unit_roundoff
from support.tiny_models import D_MODEL, FAMILIES, LAYER_NORMED, make_model, make_tokenizer, norm_by_hand

from actcache.errors import ConfigError
from actcache.models.bridge import BridgeModel
from actcache.models.load import wrap_model
from trainer.features.attribution import logit_attribution
from trainer.features.logit_lens import logit_lens
from trainer.features.text import ROWS_AT_ONCE
from trainer.features.token_strings import token_string


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lens_equals_its_definition(family):
    """Float64 products over d_model on both sides; the measured gain may be off by the norm's own rounding."""
    sae, latents = make_sae(), [5, 0, 95]
    n_tokens = len(make_tokenizer())
    whole = [lens.promoted for lens in logit_lens(sae, model_of(family), latents, n_tokens)]
    assert all(sorted(token.token_id for token in tokens) == list(range(n_tokens)) for tokens in whole)
    by_id = [[token.logit for token in sorted(tokens, key=lambda t: t.token_id)] for tokens in whole]
    logits = torch.tensor(by_id, dtype=torch.float64)
    rows, folded = sae.W_dec[latents], folded_by_hand(family)
    gain, bias, _ = norm_by_hand(module_of(family), family)
    W_U = module_of(family).get_output_embeddings().weight.detach()
    u = unit_roundoff(family, torch.float64)
    centred = rows - rows.mean(1, keepdim=True) if family in LAYER_NORMED else rows
    bound = (2 * D_MODEL + 16) * u * (centred.abs() * (gain.abs() + bias.abs())) @ W_U.abs().T
    assert ((logits - rows @ folded.T).abs() <= bound + bound.mean(1, keepdim=True)).all()

    n = 7
    for lens, latent, row in zip(logit_lens(sae, model_of(family), latents, n), latents, logits, strict=True):
        order = row.argsort(descending=True).tolist()
        assert lens.latent == latent
        assert [token.token_id for token in lens.promoted] == order[:n]
        assert [token.token_id for token in lens.suppressed] == order[: -n - 1 : -1]
        assert [token.logit for token in lens.promoted] == row[order[:n]].tolist()
        assert lens.promoted[0].token == token_string(make_tokenizer(), order[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_direction_of_a_token_promotes_it(family):
    token_id, d = planted(family)
    W_dec = make_sae().W_dec.clone()
    W_dec[11], W_dec[12] = d, -3 * d
    lens, opposite = logit_lens(make_sae(W_dec=W_dec), model_of(family), [11, 12], 3)
    assert lens.promoted[0].token_id == opposite.suppressed[0].token_id == token_id
    assert opposite.suppressed[0].logit == pytest.approx(-3 * lens.promoted[0].logit, rel=1e-6)


def test_the_lens_in_many_parts_of_either_backend_and_rescaled():
    sae = make_sae("topk")  # one that rescales: its directions have norm 1
    latents = [i % D_SAE for i in range(ROWS_AT_ONCE + 9)]
    lenses = logit_lens(sae, model_of("llama"), latents, 2)
    assert [lens.latent for lens in lenses] == latents
    unit = make_sae(W_dec=sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True))
    (expected,) = logit_lens(unit, model_of("llama"), [latents[-1]], 2)
    assert [t.token_id for t in lenses[-1].promoted] == [t.token_id for t in expected.promoted]
    bridge = BridgeModel(make_model("llama", 512).double(), make_tokenizer(), {"name": "tiny"})
    (theirs,) = logit_lens(unit, bridge, [latents[-1]], 2)
    assert [t.token_id for t in theirs.promoted] == [t.token_id for t in expected.promoted]


def test_tokens_that_the_tokenizer_does_not_know_are_left_out():
    model = wrap_model(make_model("gpt2", 560).double(), make_tokenizer(), "padded")
    with torch.no_grad():
        model._model.get_output_embeddings().weight[512:] *= 100
    (lens,) = logit_lens(make_sae(), model, [3], 512)
    assert {token.token_id for token in lens.promoted} == set(range(512))


def test_tokens_that_the_model_does_not_know_are_left_out():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<beyond>"])
    model = wrap_model(make_model("gpt2", 512).double(), tokenizer, "narrow")
    (lens,) = logit_lens(make_sae(), model, [3], 512)
    assert {token.token_id for token in lens.promoted} == set(range(512))
    with pytest.raises(ConfigError, match=r"n must be in \[1, 512\], got 513"):
        logit_lens(make_sae(), model, [3], 513)
    for token in ("<beyond>", 512):
        with pytest.raises(
            ConfigError, match=r"must be one token of the model, got .*, which is 512; the model has 512 logits"
        ):
            logit_attribution(make_sae(), model, TEXT, -1, token)


@pytest.mark.parametrize(
    ("latents", "n", "says"),
    [([D_SAE], 1, r"a feature must be in \[0, d_sae=96\), got 96"), ([-1], 1, "got -1"), ([0], 0, r"n must be in")],
)
def test_wrong_arguments_of_the_lens(latents, n, says):
    with pytest.raises(ConfigError, match=says):
        logit_lens(make_sae(), model_of("gpt2"), latents, n)


def test_hooks_beside_the_stream_are_refused():
    sae = make_sae(hook_name="blocks.1.attn.hook_z")
    with pytest.raises(ConfigError, match=r"logit_lens: x_hat must be at one of .* got blocks\.1\.attn\.hook_z"):
        logit_lens(sae, model_of("gpt2"), [0])
    with pytest.raises(ConfigError, match="logit_attribution: x_hat must be"):
        logit_attribution(sae, model_of("gpt2"), TEXT, -1, 5)
