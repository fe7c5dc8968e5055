"""What fires on the tokens of a text, against the SAE's own encoding of the model's activations."""

import pytest
import torch
from support.planted import D_SAE, HOOK, TEXT, make_sae, model_of, module_of, token_ids
from support.tiny_models import D_MODEL, make_tokenizer

from actcache.errors import CacheMismatch, ConfigError
from trainer.features.logit_lens import logit_lens
from trainer.features.text import ROWS_AT_ONCE, encode_text


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
