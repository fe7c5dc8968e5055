"""The parts of a logit, against definitions written out in float64 and against a planted feature."""

import pytest
import torch
from support.planted import LAST, TEXT, folded_by_hand, make_sae, model_of, module_of, planted, token_ids
from support.reference import unit_roundoff
from support.tiny_models import D_MODEL, FAMILIES, LAYER_NORMED, make_tokenizer, norm_by_hand
from support.tiny_saes import changed

from actcache.errors import ConfigError
from trainer.features.attribution import logit_attribution
from trainer.features.token_strings import token_string


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("architecture", ["standard", "topk", "abstopk", "skip_transcoder"])
def test_the_parts_sum_to_the_change_of_the_logit(family, architecture):
    """Against float64 by hand, the scale of the final norm frozen at what it is with everything in place.

    The change is <W_U[t], gain * centred(part)> / scale for each part; parts of a sum of float64 numbers.
    """
    sae, model, position, token_id = make_sae(architecture), model_of(family), 6, 42
    got = logit_attribution(sae, model, TEXT, position, token_id)
    gain, bias, eps = norm_by_hand(module_of(family), family)
    ids = torch.tensor([token_ids()[: position + 1]])  # what comes later is not read
    hooks = [sae.hook_name, sae.output_hooks[0], LAST]
    seen = model.activations(ids, hooks)
    x, y, stream = (seen[hook][0, position] for hook in hooks)
    centred = stream - stream.mean() if family in LAYER_NORMED else stream
    scale = (centred.square().mean() + eps).sqrt()
    v = folded_by_hand(family)[token_id] / scale

    acts = sae.encode(x[None])[0]
    d = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True) if architecture == "topk" else sae.W_dec
    expected = {i: float(acts[i] * (d[i] @ v)) for i in acts.nonzero()[:, 0].tolist()}
    # a norm measured in float32 (RMSNorm) has a gain that is off by a few of its roundings; so has every product
    u = unit_roundoff(family, torch.float64)
    size = (gain.abs() + bias.abs()) * module_of(family).get_output_embeddings().weight.abs().amax(0) / scale
    bound = 4 * D_MODEL * u * float(size @ (stream.abs() + y.abs() + acts.abs() @ d.abs() + 9 * x.abs().sum()))
    assert {feature.latent: feature.logit for feature in got.features} == pytest.approx(expected, abs=bound)
    assert [feature.activation for feature in got.features] == [float(acts[feature.latent]) for feature in got.features]
    x_hat = sae.reconstruct(x[None])[1][0]
    assert got.error == pytest.approx(float((y - x_hat) @ v), abs=bound)
    assert got.direct == pytest.approx(float(y @ v), abs=bound), "features + bias + error"
    assert got.direct + got.rest == pytest.approx(got.logit, abs=1e-12 * (1 + abs(got.logit)))

    logits, cap = model.logits(ids)[0, position], getattr(module_of(family).config, "final_logit_softcapping", None)
    logits = logits if cap is None else cap * (logits / cap).atanh()
    assert got.logit == pytest.approx(float(logits[token_id] - logits.mean()), abs=2 * bound)
    assert (got.position, got.token_id, got.token) == (position, token_id, token_string(make_tokenizer(), token_id))
    sizes = [abs(feature.logit) for feature in got.features]
    assert sizes == sorted(sizes, reverse=True)


@torch.no_grad()
@pytest.mark.parametrize("how", ["layer_norm", "constant_norm_rescale"])
def test_directions_in_normalised_units_are_scaled(how):
    """What a latent adds is the difference between the reconstructions with it and without it."""
    sae, model, token_id = make_sae(hook_name=LAST, normalize_activations=how), model_of("gpt2"), 17
    got = logit_attribution(sae, model, TEXT, -1, token_id)
    x = model.activations(torch.tensor([token_ids()]), [LAST])[LAST][0, -1]
    unembedding, f = model.unembedding(), sae.encode(x)
    v = unembedding.token_direction(token_id)[0] / unembedding.scale(x)
    for feature in got.features[:5]:
        without = f.clone()
        without[feature.latent] = 0.0
        part = sae.decode(f, x) - sae.decode(without, x)
        assert feature.logit == pytest.approx(float(part @ v), abs=1e-12)
    assert got.bias == pytest.approx(float(sae.decode(0 * f, x) @ v), abs=1e-12)
    assert got.direct == pytest.approx(got.logit - got.rest)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_taking_a_feature_out_of_the_last_stream_changes_the_logit_by_its_part(family):
    """At the last hook the direct path is the whole path, and with the scale frozen the change is exact."""
    sae, model, token_id = make_sae(hook_name=LAST), model_of(family), 17
    got = logit_attribution(sae, model, TEXT, -1, token_id)
    unembedding = model.unembedding()
    stream = model.activations(torch.tensor([token_ids()]), [LAST])[LAST][0, -1]
    for feature in got.features[:5]:
        without = stream - feature.activation * sae.W_dec[feature.latent]
        logits = [
            (unembedding.gain * unembedding.centred(x) / unembedding.scale(stream)) @ unembedding.W_U.T
            for x in (stream, without)
        ]
        change = (logits[0] - logits[1])[token_id] - (logits[0] - logits[1]).mean()
        size = float((unembedding.gain.abs() * stream.abs()) @ unembedding.W_U.abs().amax(0))
        assert feature.logit == pytest.approx(float(change), abs=8 * D_MODEL * 2.0**-53 * size)
    assert got.direct == pytest.approx(got.logit - got.rest)


def test_a_planted_feature_has_the_largest_part():
    token_id, d = planted("llama")
    sae = make_sae("topk", rescale_acts_by_decoder_norm=False)
    plain = logit_attribution(sae, model_of("llama"), TEXT, 5, token_id)
    latent = plain.features[2].latent
    W_dec = sae.W_dec.clone()
    W_dec[latent] = 50 * d
    got = logit_attribution(changed(sae, W_dec=W_dec), model_of("llama"), TEXT, 5, token_id)
    assert max(got.features, key=lambda feature: feature.logit).latent == latent
    assert got.logit == plain.logit, "the model is the same"
    assert got.direct == pytest.approx(plain.direct, rel=1e-9), "what the feature adds, the error takes off"


def test_positions_and_tokens_of_an_attribution():
    sae, model = make_sae(), model_of("gpt2")
    n, tokenizer = len(token_ids()), make_tokenizer()
    last = logit_attribution(sae, model, TEXT, -1, 300)
    assert last == logit_attribution(sae, model, TEXT, n - 1, tokenizer.decode([300]))
    for position in (n, -n - 1):
        with pytest.raises(ConfigError, match=rf"position must be in \[-{n}, {n}\), got {position}"):
            logit_attribution(sae, model, TEXT, position, 300)
    for token, pieces in (("the keeper of the old", r"which is \['"), (512, r"which is \[\]"), ("", r"which is \[\]")):
        with pytest.raises(ConfigError, match=f"must be one token of the model, got .*{pieces}"):
            logit_attribution(sae, model, TEXT, -1, token)
