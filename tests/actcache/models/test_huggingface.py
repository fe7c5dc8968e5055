"""The transformers model with hooks against its own hidden states and raw torch hooks."""

from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
from support.model_cases import PLACES, TOKENS, hook_names, with_raw_hook
from support.tiny_models import D_MODEL, FAMILIES, N_LAYERS, make_model, make_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3Config, PreTrainedModel, SiglipVisionConfig

from actcache.errors import ModelError
from actcache.models.huggingface import HuggingFaceModel
from actcache.models.language_model import SITES
from actcache.models.load import load_model, wrap_model

# Reading


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_stream_equals_hidden_states_bit_for_bit(family, ours, theirs):
    x = ours(family).activations(TOKENS, hook_names(family))
    last_block = []
    output = with_raw_hook(
        theirs(family),
        f"{PLACES[family][0]}.{N_LAYERS - 1}",
        lambda module, args, output: last_block.append(output),
        lambda: theirs(family)(TOKENS, output_hidden_states=True),
    )
    for layer in range(N_LAYERS):
        assert torch.equal(x[f"blocks.{layer}.hook_resid_pre"], output.hidden_states[layer])
    for layer in range(N_LAYERS - 1):
        assert torch.equal(x[f"blocks.{layer}.hook_resid_post"], output.hidden_states[layer + 1])
    # hidden_states[-1] has been through the final norm; the hook has not
    assert torch.equal(x[f"blocks.{N_LAYERS - 1}.hook_resid_post"], last_block[0])
    assert not torch.equal(last_block[0], output.hidden_states[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_of_a_block_add_up_bit_for_bit(family, ours):
    """Each is one float add that the block itself does, so equal to the bit (a + b == b + a)."""
    x = ours(family).activations(TOKENS, hook_names(family))
    for layer in range(N_LAYERS):
        at = {site: x.get(f"blocks.{layer}.{site}") for site in SITES}
        if family == "gpt_neox":
            total = at["hook_mlp_out"] + at["hook_attn_out"] + at["hook_resid_pre"]
        else:
            assert torch.equal(at["hook_resid_pre"] + at["hook_attn_out"], at["hook_resid_mid"])
            total = at["hook_resid_mid"] + at["hook_mlp_out"]
        assert torch.equal(total, at["hook_resid_post"])


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_later_changes_what_was_captured(family, ours):
    """A hook asked for alone is captured and the pass ends at once; nothing can have touched it."""
    together = ours(family).activations(TOKENS, hook_names(family))
    for name in hook_names(family):
        assert torch.equal(ours(family).activations(TOKENS, [name])[name], together[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_after_the_last_hook_is_run(family, theirs):
    model, (blocks, _, _, mlp_chain) = theirs(family), PLACES[family]
    calls: Counter[str] = Counter()
    watched = [f"{blocks}.{layer}" for layer in range(N_LAYERS)] + [f"{blocks}.1.mlp"]
    handles = [
        model.get_submodule(path).register_forward_hook(lambda module, args, output, path=path: calls.update([path]))
        for path in watched
    ]
    handles.append(model.get_output_embeddings().register_forward_hook(lambda *_: calls.update(["head"])))
    wrapped = wrap_model(model, make_tokenizer())

    def run(*names: str) -> Counter[str]:
        calls.clear()
        wrapped.activations(TOKENS, names)
        return Counter(calls)

    try:
        assert run("blocks.1.hook_resid_pre") == Counter({watched[0]: 1})
        assert run("blocks.1.hook_attn_out", "blocks.0.hook_resid_post") == Counter({watched[0]: 1})
        assert run("blocks.1.hook_resid_post") == Counter({watched[0]: 1, watched[1]: 1, f"{blocks}.1.mlp": 1})
        assert run("blocks.2.hook_resid_post")["head"] == 0
        if mlp_chain:
            assert run("blocks.1.hook_resid_mid") == Counter({watched[0]: 1})
    finally:
        for handle in handles:
            handle.remove()


def test_bfloat16_equals_hidden_states_bit_for_bit(directory):
    model = load_model(directory("llama"), device="cpu", dtype="bfloat16")
    reference = AutoModelForCausalLM.from_pretrained(directory("llama"), dtype=torch.bfloat16)
    with torch.no_grad():
        hidden_states = reference(TOKENS, output_hidden_states=True).hidden_states
    x = model.activations(TOKENS, ["blocks.0.hook_resid_post"])["blocks.0.hook_resid_post"]
    assert model.dtype == x.dtype == torch.bfloat16
    assert torch.equal(x, hidden_states[1])


# Replacing


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_bit_for_bit(family, ours, theirs):
    with torch.no_grad():
        assert torch.equal(ours(family).logits(TOKENS), theirs(family)(TOKENS).logits)


def zeroed_by_hand(model: PreTrainedModel, family: str, hook_name: str) -> Tensor:
    """Logits with zeros at the hook, from one raw torch hook."""
    blocks, attn_out, mlp_out, mlp_chain = PLACES[family]
    _, layer, site = hook_name.split(".")
    block = f"{blocks}.{layer}"

    def zero_input(module, args):
        return (torch.zeros_like(args[0]), *args[1:])

    def zero_output(module, args, output):
        return tuple(map(zero_output_of, output)) if isinstance(output, tuple) else torch.zeros_like(output)

    def zero_output_of(value):
        return None if value is None else torch.zeros_like(value)

    def mlp_of_zeros(module, args, output):
        x = torch.zeros_like(output)
        for name in mlp_chain:
            x = module.get_submodule(name)(x)
        return x

    path, change = {
        "hook_resid_pre": (block, zero_input),
        "hook_attn_out": (f"{block}.{attn_out}", zero_output),
        "hook_resid_mid": (block, mlp_of_zeros),
        "hook_mlp_out": (f"{block}.{mlp_out}", zero_output),
        "hook_resid_post": (block, zero_output),
    }[site]
    return with_raw_hook(model, path, change, lambda: model(TOKENS).logits, on_input=change is zero_input)


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_ablation_equals_one_made_by_hand(family, ours, theirs):
    for name in hook_names(family):
        expected = zeroed_by_hand(theirs(family), family, name)
        assert torch.equal(ours(family).logits_with(TOKENS, name, torch.zeros_like), expected), name
        assert not torch.equal(ours(family).logits(TOKENS), expected)


def blocks_run(model: HuggingFaceModel, run: Callable[[], Tensor]) -> tuple[Tensor, set[int]]:
    """`run()`, and the blocks whose inside was run by it."""
    entered: set[int] = set()
    handles = [
        next(block.children()).register_forward_hook(lambda *_, number=number: entered.add(number))
        for number, block in enumerate(model._blocks)
    ]
    try:
        return run(), entered
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_from_a_known_stream_equals_a_whole_one_bit_for_bit(family, ours):
    model = ours(family)
    for name in hook_names(family):
        before = model.stream_before(name)
        start = model.activations(TOKENS, [before])[before]
        change = partial(model.logits_from, TOKENS, start, name, torch.zeros_like)
        change()  # the first time, a pass over one token tells what a block returns
        logits, entered = blocks_run(model, change)
        assert torch.equal(logits, model.logits_with(TOKENS, name, torch.zeros_like)), name
        assert entered == set(range(int(name.split(".")[1]), N_LAYERS)), name


def test_a_pass_from_a_known_stream_leaves_the_model_as_it_was(ours):
    model = ours("llama")
    logits, name = model.logits(TOKENS), "blocks.2.hook_mlp_out"
    start = model.activations(TOKENS, [model.stream_before(name)])[model.stream_before(name)]
    before = [dict(block.__dict__) for block in model._blocks]
    with pytest.raises(ZeroDivisionError):
        model.logits_from(TOKENS, start, name, lambda x: 1 / 0)
    model._blocks[0].forward = model._blocks[0].forward  # as compiling or offloading puts one on the instance
    try:
        model.logits_from(TOKENS, start, name, torch.clone)
        assert "forward" in model._blocks[0].__dict__
    finally:
        del model._blocks[0].forward
    assert [dict(block.__dict__) for block in model._blocks] == before
    assert torch.equal(model.logits(TOKENS), logits)


def test_a_pass_from_a_stream_that_does_not_fit_is_refused(ours, bridge):
    model, name = ours("llama"), "blocks.1.hook_resid_post"
    with pytest.raises(
        ValueError, match=r"start must have shape \(3, 20, 32\), got \(3, 20, 31\); .*blocks\.1\.hook_r"
    ):
        model.logits_from(TOKENS, torch.zeros(3, 20, D_MODEL - 1), name, torch.clone)
    assert bridge("llama").stream_before(name) is None
    with pytest.raises(ModelError, match="begins at the embedding; use logits_with"):
        bridge("llama").logits_from(TOKENS, torch.zeros(3, 20, D_MODEL), name, torch.clone)


# Models that are loaded already


class LowRankAdapter(nn.Module):
    """A linear layer with a low-rank term beside it, as adapters put in."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, 2, bias=False)
        self.up = nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(x))


def test_adapted_model_inside_a_wrapper():
    model = make_model("llama", 512)
    plain = wrap_model(model, make_tokenizer(), name="tiny")
    plain_identity = plain.identity  # it is told anew when the model has changed
    plain_x = plain.activations(TOKENS, ["blocks.0.hook_resid_post"])["blocks.0.hook_resid_post"]
    attention = model.get_submodule("model.layers.0.self_attn")
    attention.q_proj = LowRankAdapter(attention.q_proj)
    adapted = wrap_model(model.eval(), make_tokenizer(), name="tiny")
    x = adapted.activations(TOKENS, ["blocks.0.hook_resid_post"])["blocks.0.hook_resid_post"]
    with torch.no_grad():
        assert torch.equal(x, model(TOKENS, output_hidden_states=True).hidden_states[1])
    assert not torch.equal(x, plain_x)
    assert adapted.identity["content_sha256"] != plain_identity["content_sha256"]
    assert adapted.identity["config"] == plain_identity["config"]


def test_text_model_inside_a_multimodal_gemma3():
    """The larger Gemma 3 checkpoints come so: the hooks are on the text blocks, not on those of the vision tower."""
    text = make_model("gemma3_text", 512).config
    vision = SiglipVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=1,
        image_size=28,
        patch_size=14,
    )
    tokens = {"image_token_index": 511, "boi_token_index": 510, "eoi_token_index": 509, "mm_tokens_per_image": 4}
    model = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=vision, **tokens)).eval()
    ids = TOKENS % 500
    x = wrap_model(model, make_tokenizer()).activations(ids, hook_names("gemma3_text"))
    with torch.no_grad():
        hidden_states = model(ids, output_hidden_states=True).hidden_states
    assert all(torch.equal(x[f"blocks.{layer}.hook_resid_pre"], hidden_states[layer]) for layer in range(N_LAYERS))


@pytest.mark.parametrize("layer", ["-1", "3", "01", "x"])
def test_layer_that_is_not_there(layer, ours):
    with pytest.raises(ModelError, match=r"3 layers, blocks\.0 to blocks\.2"):
        ours("gpt2").activations(TOKENS, [f"blocks.{layer}.hook_resid_post"])


def test_sequences_longer_than_the_model_takes(ours):
    with pytest.raises(ModelError, match="at most 256 tokens, got 257"):
        ours("gpt2").logits(torch.zeros((1, 257), dtype=torch.long))
