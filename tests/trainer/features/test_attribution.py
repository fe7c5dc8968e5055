"""What latents do, against definitions written out in float64 and against planted answers."""

import dataclasses
import math

import pytest
import torch
from support.planted import D_SAE, HOOK, LAST, TEXT, folded_by_hand, make_sae, model_of, module_of, planted, token_ids
from support.reference import unit_roundoff
from support.tiny_models import D_MODEL, FAMILIES, LAYER_NORMED, make_model, make_tokenizer, norm_by_hand
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from actcache.errors import CacheMismatch, ConfigError
from actcache.models.bridge import BridgeModel
from actcache.models.load import wrap_model
from trainer.features.attribution import logit_attribution
from trainer.features.logit_lens import lens_logits, logit_lens
from trainer.features.similarity import similar_features, stability
from trainer.features.text import ROWS_AT_ONCE, encode_text
from trainer.features.token_strings import token_string
from trainer.sae.sae import SAE

# Encoding a text


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "abstopk"])
def test_a_text_is_encoded_token_by_token(architecture):
    sae, ids = make_sae(architecture), token_ids()
    hidden_states = module_of("llama")(torch.tensor([ids]), output_hidden_states=True).hidden_states
    expected = sae.encode(hidden_states[2][0])  # after block 1
    got = encode_text(sae, model_of("llama"), TEXT)
    assert [token.token_id for token in got] == ids
    assert "".join(token.token for token in got) == f"<bos>{TEXT}"
    assert [token.is_special for token in got] == [True] + [False] * (len(ids) - 1)
    for token, acts in zip(got, expected, strict=True):
        assert dict(token.features) == {i: float(acts[i]) for i in acts.nonzero()[:, 0].tolist()}
        sizes = [abs(act) for _, act in token.features]
        assert sizes == sorted(sizes, reverse=True)


def test_bos_comes_first_where_the_cache_had_it_and_only_once():
    model = model_of("gpt2")
    without = encode_text(make_sae(metadata={"prepend_bos": False}), model, TEXT)
    assert [token.token_id for token in without] == token_ids()[1:]
    assert encode_text(make_sae(), model, "<bos>" + TEXT) == encode_text(make_sae(), model, TEXT)
    assert [token.token for token in encode_text(make_sae(), model, "")] == ["<bos>"]
    with pytest.raises(ConfigError, match="must have at least one token, got ''"):
        encode_text(make_sae(metadata={"prepend_bos": False}), model, "")


def test_a_long_text_equals_its_tokens_one_by_one():
    sae, model = make_sae(), model_of("gpt2")
    text = "the cat " * ROWS_AT_ONCE
    text = make_tokenizer().decode(token_ids(text)[1 : ROWS_AT_ONCE + 40])
    got = encode_text(sae, model, text)
    assert len(got) > ROWS_AT_ONCE
    rows = model.activations(torch.tensor([token_ids(text)]), [HOOK])[HOOK][0]
    for token, row in zip(got, rows, strict=True):
        alone = sae.encode(row[None])[0]
        # another shape of product: rounding of d_model terms, twice
        bound = 4 * D_MODEL * 2.0**-53 * float(row.norm())
        acts = torch.zeros(D_SAE, dtype=torch.float64)
        for latent, act in token.features:
            acts[latent] = act
        assert float((acts - alone).abs().max()) <= bound


def test_a_crosscoder_encodes_all_of_its_hooks():
    hooks = ("blocks.0.hook_resid_post", HOOK)
    wide = torch.randn(2 * D_MODEL, D_SAE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    sae = make_sae(architecture="crosscoder", hook_names=hooks, W_enc=wide, W_dec=wide.T, b_dec=wide[:, 0])
    x = model_of("llama").activations(torch.tensor([token_ids()]), hooks)
    expected = sae.encode(torch.cat([x[hook][0] for hook in hooks], dim=1))
    got = encode_text(sae, model_of("llama"), TEXT)
    assert [len(token.features) for token in got] == (expected != 0).sum(1).tolist()
    with pytest.raises(ConfigError, match=r"x_hat must be at one of hook_resid_pre.* got blocks\.0"):
        logit_lens(sae, model_of("llama"), [0])


def test_an_sae_of_another_width_is_refused():
    narrow = make_sae(W_enc=torch.zeros(8, D_SAE, dtype=torch.float64))
    with pytest.raises(CacheMismatch, match="takes activations of width 8, the model gives 32"):
        encode_text(narrow, model_of("gpt2"), TEXT)


def test_tokens_keep_their_leading_space():
    byte_level = make_tokenizer()
    assert "".join(token_string(byte_level, i) for i in byte_level("the old cat").input_ids) == "<bos>the old cat"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator(["the old cat and the old mat"] * 9, trainers.BpeTrainer(show_progress=False))
    sentence_piece = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids = sentence_piece("the old cat").input_ids
    assert sentence_piece.decode(ids[-1:]) == "cat", "decoded alone it loses the space"
    assert [token_string(sentence_piece, i) for i in ids] == [" the", " old", " cat"]


# The logit lens


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lens_equals_its_definition(family):
    """Float64 products over d_model on both sides; the measured gain may be off by the norm's own rounding."""
    sae, latents = make_sae(), [5, 0, 95]
    logits = lens_logits(sae, model_of(family), latents)
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


@pytest.mark.parametrize(
    ("latents", "n", "says"),
    [([D_SAE], 1, r"a feature must be in \[0, d_sae=96\), got 96"), ([-1], 1, "got -1"), ([0], 0, r"n must be in")],
)
def test_wrong_arguments_of_the_lens(latents, n, says):
    with pytest.raises(ConfigError, match=says):
        logit_lens(make_sae(), model_of("gpt2"), latents, n)


def test_hooks_beside_the_stream_are_refused():
    sae = make_sae(hook_name="blocks.1.attn.hook_z")
    for call in (lambda: logit_lens(sae, model_of("gpt2"), [0]), lambda: lens_logits(sae, model_of("gpt2"), [0])):
        with pytest.raises(ConfigError, match=r"logit_lens: x_hat must be at one of .* got blocks\.1\.attn\.hook_z"):
            call()
    with pytest.raises(ConfigError, match="logit_attribution: x_hat must be"):
        logit_attribution(sae, model_of("gpt2"), TEXT, -1, 5)


# Logit attribution


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
    got = logit_attribution(dataclasses.replace(sae, W_dec=W_dec), model_of("llama"), TEXT, 5, token_id)
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


# Similar features


def random_sae(seed: int, d_sae: int = D_SAE) -> SAE:
    w = torch.randn(d_sae, D_MODEL, generator=torch.Generator().manual_seed(seed))
    return make_sae(W_dec=w, W_enc=w.T, b_enc=torch.zeros(d_sae))


def test_similar_features_are_those_of_the_definition():
    a, b = random_sae(0, ROWS_AT_ONCE + 30), random_sae(1)
    got = similar_features(a, b, 4)
    wide_a, wide_b = a.W_dec.double(), b.W_dec.double()
    cosines = wide_a @ wide_b.T / torch.outer(wide_a.norm(dim=1), wide_b.norm(dim=1))
    best = cosines.topk(4)
    # float32: two norms and one product over d_model terms
    bound = (2 * D_MODEL + 8) * 2.0**-24
    assert float((got.cosines.double() - best.values).abs().max()) <= bound
    assert float((cosines.gather(1, got.latents) - best.values).abs().max()) <= 2 * bound
    some = similar_features(a, b, 4, latents=[150, 3])
    assert torch.equal(some.latents, got.latents[[150, 3]])


def test_a_permuted_copy_is_found_whole():
    a = random_sae(3)
    order = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(4))
    b = dataclasses.replace(a, W_dec=7 * a.W_dec[order])
    got = similar_features(a, b)
    assert torch.equal(order[got.latents[:, 0]], torch.arange(D_SAE))
    torch.testing.assert_close(got.cosines, torch.ones(D_SAE, 1), rtol=0, atol=(2 * D_MODEL + 8) * 2.0**-24)


def test_a_dead_row_is_like_nothing():
    a = random_sae(3)
    dead = dataclasses.replace(a, W_dec=a.W_dec.index_fill(0, torch.tensor([9]), 0.0))
    assert similar_features(dead, a, D_SAE).cosines[9].tolist() == [0.0] * D_SAE


def test_stability_is_the_mean_of_the_best_cosines():
    first, other = random_sae(0), random_sae(1)
    copy = dataclasses.replace(first, W_dec=first.W_dec.flip(0))
    alone = similar_features(first, other).cosines[:, 0]
    got = stability([first, other, copy])
    # the copy's cosines are 1 within rounding, so the mean is half way from there
    torch.testing.assert_close(got, (alone + 1) / 2, rtol=0, atol=(2 * D_MODEL + 8) * 2.0**-24)
    typical = math.sqrt(2 * math.log(D_SAE) / D_MODEL)
    assert 0.5 * typical < float(alone.mean()) < 1.5 * typical, "random directions are alike as the docstring says"


def test_what_cannot_be_compared():
    narrow = dataclasses.replace(random_sae(0), W_dec=torch.zeros(D_SAE, 8), b_dec=torch.zeros(8))
    with pytest.raises(CacheMismatch, match="one width, got 32 and 8; compare SAEs of one hook"):
        similar_features(random_sae(0), narrow)
    for n in (0, D_SAE + 1):
        with pytest.raises(ConfigError, match=rf"n must be in \[1, d_sae=96\], got {n}"):
            similar_features(random_sae(0), random_sae(1), n)
    with pytest.raises(ConfigError, match="at least two seeds, got 1"):
        stability([random_sae(0)])
