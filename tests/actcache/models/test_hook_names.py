import pytest
import torch
from support.model_cases import PLACES, TOKENS, with_raw_hook

from actcache.models.hook_names import hooks_of


@pytest.mark.parametrize(
    ("module", "hooks"),
    [
        ("transformer.h.3", ("blocks.3.hook_resid_pre", "blocks.3.hook_resid_post")),
        ("model.layers.11", ("blocks.11.hook_resid_pre", "blocks.11.hook_resid_post")),
        ("layers_11", ("blocks.11.hook_resid_pre", "blocks.11.hook_resid_post")),
        ("gpt_neox.layers.0.mlp", ("blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out")),
        ("transformer.h.2.attn", ("blocks.2.attn.hook_in", "blocks.2.hook_attn_out")),
        ("gpt_neox.layers.2.attention", ("blocks.2.attn.hook_in", "blocks.2.hook_attn_out")),
        ("model.layers.2.self_attn", ("blocks.2.attn.hook_in", "blocks.2.hook_attn_out")),
        ("model.layers.2.mlp.down_proj", None),
        ("model.layers.2.input_layernorm", None),
        ("model.embed_tokens", None),
        ("lm_head", None),
        ("model.layers.x", None),
    ],
)
def test_modules_have_the_names_of_transformer_lens(module, hooks):
    assert hooks_of(module, "openai-community/gpt2") == hooks


@pytest.mark.parametrize("name", ["google/gemma-2-2b", "Gemma3"])
def test_inside_a_block_of_gemma_no_module_is_a_hook(name):
    """The norms behind MLP and attention belong to its hooks."""
    assert hooks_of("model.layers.4.mlp", name) is None
    assert hooks_of("model.layers.4.self_attn", name) is None
    assert hooks_of("model.layers.4", name) == ("blocks.4.hook_resid_pre", "blocks.4.hook_resid_post")


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_a_named_module_gives_what_its_hook_shows(family, ours, theirs):
    """Whatever a plain torch hook sees at the module, ours sees at the hook of that name."""
    blocks, attn, mlp, _ = PLACES[family]
    for path in (f"{blocks}.1", f"{blocks}.1.{attn}", f"{blocks}.1.{mlp}"):
        _, output = hooks_of(path, family)
        seen = []
        with_raw_hook(
            theirs(family), path, lambda module, args, x, seen=seen: seen.append(x), lambda: theirs(family)(TOKENS)
        )
        raw = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        assert torch.equal(ours(family).activations(TOKENS, [output])[output], raw), path
