"""Gradients at latents against finite differences, and planted answers."""

from functools import partial

import pytest
import torch
from support.planted import HOOK, LAST, make_sae, model_of, planted, token_ids
from support.tiny_saes import changed

from actcache.errors import ConfigError
from trainer.interventions.feature_attribution import attribution
from trainer.interventions.splice import Add, Scale, Splice, spliced

TOKENS = torch.tensor([token_ids()[1:11], token_ids("the cat, the cat, the sea and the lamp")[1:11]])
LATER = "blocks.2.hook_resid_pre"
STEP = 1e-5


def metric(logits):
    return logits[0, -1, 7] - 2 * logits[1, -2, 9]


def measured(model, splices):
    with spliced(model, splices):
        return float(metric(model.logits(TOKENS)))


def saes_of_two_hooks():
    return [make_sae(), make_sae("skip_transcoder"), make_sae("jumprelu", hook_name=LATER)]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])  # the norms of others compute in float32
def test_gradients_equal_finite_differences(family):
    model, saes = model_of(family), saes_of_two_hooks()
    found = attribution(model, saes, TOKENS, metric)
    for index, attributed in enumerate(found):
        for place in [(0, 9), (1, 4), (1, 9)]:
            only = torch.zeros(TOKENS.shape, dtype=torch.bool)
            only[place] = True
            for latent in (3, int(attributed.gradient[place].abs().argmax())):
                high, low = (
                    measured(model, [Splice(sae=saes[index], features={latent: Add(step)}, where=only)])
                    for step in (STEP, -STEP)
                )
                assert float(attributed.gradient[place][latent]) == pytest.approx((high - low) / (2 * STEP), abs=1e-8)
        assert attributed.effect.equal(-attributed.feature_acts * attributed.gradient)
    assert found[0].gradient[1, 9].abs().max() == 0, "nothing that is judged comes after it"


def test_the_activations_are_those_of_the_pass():
    model, saes = model_of("gpt2"), saes_of_two_hooks()
    x = model.activations(TOKENS, [HOOK, "blocks.1.hook_mlp_out", LATER])
    for found, (sae, name) in zip(attribution(model, saes, TOKENS, metric), zip(saes, x, strict=True), strict=True):
        expected = sae.encode(x[name].flatten(0, 1)).view(*TOKENS.shape, -1)
        torch.testing.assert_close(found.feature_acts, expected)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_planted_latent_has_the_largest_effect(family):
    """Its direction at the last block promotes the token; ablating it takes that away."""
    token_id, d = planted(family)
    model, sae = model_of(family), make_sae(hook_name=LAST)
    W_enc, W_dec, b_enc = sae.W_enc.clone(), sae.W_dec.clone(), sae.b_enc.clone()
    W_enc[:, 5], W_dec[5], b_enc[5] = 0.0, d * 2, 2.0  # it is active everywhere
    sae = changed(sae, W_enc=W_enc, W_dec=W_dec, b_enc=b_enc)
    (found,) = attribution(model, [sae], TOKENS, lambda logits: logits[0, -1, token_id])
    assert int(found.effect[0, -1].abs().argmax()) == 5
    assert float(found.effect[0, -1, 5]) < 0
    assert found.effect[1].abs().max() == found.effect[0, :-1].abs().max() == 0


def test_integrated_gradients_sum_to_what_the_latents_do_together():
    """The completeness axiom. The middle of each step errs by the square of its width."""
    model, sae = model_of("gpt_neox"), make_sae()
    clean = measured(model, [])
    ablated = measured(model, [Splice(sae=sae, features=dict.fromkeys(range(sae.d_sae), Scale(0.0)))])
    errors = [
        abs(float(attribution(model, [sae], TOKENS, metric, steps=steps)[0].effect.sum()) - (ablated - clean))
        for steps in (8, 32)
    ]
    assert errors[1] < errors[0] / 8
    assert errors[1] < abs(ablated - clean) / 100


def test_tokens_that_do_not_count_have_none():
    where = torch.zeros(TOKENS.shape, dtype=torch.bool)
    where[:, 2:] = True
    model, sae = model_of("gpt2"), make_sae()
    (whole,), (part,) = (attribution(model, [sae], TOKENS, metric, where=each) for each in (None, where))
    assert part.feature_acts[:, :2].abs().max() == part.gradient[:, :2].abs().max() == 0
    torch.testing.assert_close(part.effect[:, 2:], whole.effect[:, 2:])


def test_a_metric_is_one_number():
    call = partial(attribution, model_of("gpt2"), [make_sae()], TOKENS)
    with pytest.raises(ConfigError, match=r"metric must give one number, got shape \(512,\)"):
        call(lambda logits: logits[0, -1])
    with pytest.raises(ConfigError, match="steps must be"):
        call(metric, steps=-1)
