"""actcache.models against transformers' own hidden states, raw torch hooks, and TransformerLens' bridge."""

import json
import shutil
import weakref
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from support.tiny_models import D_MODEL, FAMILIES, N_LAYERS, make_model, make_model_dir, make_tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CTRLConfig,
    CTRLLMHeadModel,
    Gemma3Config,
    OPTConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)

from actcache.errors import ConfigError, ModelError
from actcache.models.bridge import BridgeModel
from actcache.models.huggingface import HuggingFaceModel
from actcache.models.language_model import SITES, LanguageModel
from actcache.models.load import load_model, wrap_model

# Written out by hand, apart from the table under test: blocks; what writes attention's part; what the MLP's; the chain
# of modules from hook_resid_mid to hook_mlp_out.
PLACES = {
    "gpt2": ("transformer.h", "attn", "mlp", ["ln_2", "mlp"]),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp", []),
    "gpt_neox_sequential": ("gpt_neox.layers", "attention", "mlp", ["post_attention_layernorm", "mlp"]),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3"),
        ("model.layers", "self_attn", "mlp", ["post_attention_layernorm", "mlp"]),
    ),
    **dict.fromkeys(
        ("gemma2", "gemma3_text"),
        (
            "model.layers",
            "post_attention_layernorm",
            "post_feedforward_layernorm",
            ["pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"],
        ),
    ),
}
# 3 sequences of 20 tokens: longer than the sliding windows of 8
TOKENS = torch.randint(0, 512, (3, 20), generator=torch.Generator().manual_seed(1))


def hook_names(family: str) -> list[str]:
    sites = [site for site in SITES if (family, site) != ("gpt_neox", "hook_resid_mid")]
    return [f"blocks.{layer}.{site}" for layer in range(N_LAYERS) for site in sites]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda family: make_model_dir(family, tmp_path_factory.mktemp("models") / family))


@pytest.fixture(scope="module")
def ours(directory) -> Callable[[str], LanguageModel]:
    return cache(lambda family: load_model(directory(family), device="cpu"))


@pytest.fixture(scope="module")
def theirs(directory) -> Callable[[str], PreTrainedModel]:
    return cache(lambda family: AutoModelForCausalLM.from_pretrained(directory(family)))


@pytest.fixture(scope="module")
def bridge(directory) -> Callable[[str], LanguageModel]:
    return cache(lambda family: load_model(directory(family), device="cpu", backend="transformer_lens"))


@pytest.fixture(scope="module")
def eager(directory) -> Callable[[str], LanguageModel]:
    """Our fast path with the attention kernel of the bridge."""

    def load(family: str) -> LanguageModel:
        model = AutoModelForCausalLM.from_pretrained(directory(family), attn_implementation="eager")
        return wrap_model(model, make_tokenizer())

    return cache(load)


def with_raw_hook(model: nn.Module, path: str, change: Callable, run: Callable[[], object], *, on_input: bool = False):
    """`run()` with a plain torch hook on the module at `path`."""
    module = model.get_submodule(path)
    handle = module.register_forward_pre_hook(change) if on_input else module.register_forward_hook(change)
    try:
        with torch.no_grad():
            return run()
    finally:
        handle.remove()


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


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
def test_activations_and_logits_equal_the_bridge_bit_for_bit(family, eager, bridge):
    x, y = (model(family).activations(TOKENS, hook_names(family)) for model in (eager, bridge))
    assert [name for name in x if not torch.equal(x[name], y[name])] == []
    assert torch.equal(eager(family).logits(TOKENS), bridge(family).logits(TOKENS))


def test_gpt2_equals_the_bridge_in_float64_within_its_rounding():
    """The bridge splits GPT-2's joint q, k, v projection, so sums are rounded in another order: not bit for bit.

    Each value is the end of at most `roundings` float64 operations a layer (norms and projections over d_model, scores
    over d_head, softmax and mix over positions, MLP over 4 d_model), each off by eps/2 of values no larger than the
    largest, on both sides. Another formula (an epsilon, a mask, a scale) would be off by 1e-6 and more.
    """
    ours = HuggingFaceModel(make_model("gpt2", 512).double(), make_tokenizer(), {"name": "gpt2"})
    theirs = BridgeModel(make_model("gpt2", 512).double(), make_tokenizer(), {"name": "gpt2"})
    x, y = (model.activations(TOKENS, hook_names("gpt2")) for model in (ours, theirs))
    roundings = N_LAYERS * (5 * D_MODEL + D_MODEL // 4 + 2 * TOKENS.shape[1] + 4 * D_MODEL)
    bound = roundings * torch.finfo(torch.float64).eps * max(value.abs().max().item() for value in x.values())
    assert max((x[name] - y[name]).abs().max().item() for name in x) <= bound < 1e-10


@pytest.mark.parametrize("make", ["ours", "bridge"])
def test_hooks_are_shown_in_the_order_of_the_model_and_not_kept(make, request):
    model = request.getfixturevalue(make)("gpt2")
    names = [f"blocks.{layer}.hook_resid_post" for layer in (1, 0)]
    expected, seen = model.activations(TOKENS, names), {}
    model.run_until(
        TOKENS, names, lambda name, x: seen.update({name: (weakref.ref(x), torch.equal(x, expected[name]))})
    )
    assert list(seen) == names[::-1]
    assert all(equal for _, equal in seen.values())
    assert not any(shown() is not None for shown, _ in seen.values())
    with pytest.raises(ZeroDivisionError):
        model.run_until(TOKENS, names, lambda name, x: 1 / 0)
    assert torch.equal(model.activations(TOKENS, names)[names[0]], expected[names[0]]), "the hooks were removed"


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


def test_activations_keep_the_order_and_ignore_repeats(ours):
    names = ["blocks.2.hook_resid_pre", "blocks.0.hook_mlp_out", "blocks.2.hook_resid_pre"]
    x = ours("llama").activations(TOKENS, names)
    assert list(x) == names[:2]
    assert not any(value.requires_grad for value in x.values())


def test_token_ids_may_be_int32(ours):
    name = "blocks.1.hook_resid_post"
    x, y = (ours("gpt2").activations(ids, [name])[name] for ids in (TOKENS, TOKENS.int()))
    assert torch.equal(x, y)


def test_bfloat16_equals_hidden_states_bit_for_bit(directory):
    model = load_model(directory("llama"), device="cpu", dtype="bfloat16")
    reference = AutoModelForCausalLM.from_pretrained(directory("llama"), dtype=torch.bfloat16)
    with torch.no_grad():
        hidden_states = reference(TOKENS, output_hidden_states=True).hidden_states
    x = model.activations(TOKENS, ["blocks.0.hook_resid_post"])["blocks.0.hook_resid_post"]
    assert model.dtype == x.dtype == torch.bfloat16
    assert torch.equal(x, hidden_states[1])


def test_facts(ours, bridge):
    for model in (ours("llama"), bridge("llama")):
        assert (model.n_layers, model.d_model, model.device.type, model.dtype) == (3, 32, "cpu", torch.float32)
        assert model.tokenizer("the cat").input_ids == make_tokenizer()("the cat").input_ids
        assert model.tokenizer.pad_token is None  # as loaded: the bridge's copy has one
    assert [model("llama").attention_kernel for model in (ours, bridge)] == ["sdpa", "eager"]
    assert ours("gemma2").attention_kernel == "eager"  # sdpa cannot cap attention scores


@pytest.mark.parametrize("backend", ["ours", "bridge"])
def test_hook_widths(backend, request):
    names = ["blocks.0.hook_resid_pre", "blocks.2.hook_mlp_out"]
    assert request.getfixturevalue(backend)("qwen3").hook_widths(names) == dict.fromkeys(names, D_MODEL)


def test_bridge_serves_its_other_hooks_flattened(bridge):
    names = ["blocks.1.attn.hook_z", "blocks.1.mlp.hook_in", "blocks.1.ln1.hook_scale", "ln_final.hook_out"]
    widths = bridge("llama").hook_widths(names)
    assert widths == dict(zip(names, [D_MODEL, D_MODEL, 1, D_MODEL], strict=True))
    assert bridge("llama").activations(TOKENS, names[:1])[names[0]].shape == (3, 20, D_MODEL)


def test_bridge_stops_after_the_last_hook(bridge):
    later = []
    model = bridge("llama")
    module = model._bridge.original_model.get_submodule("model.layers.2")
    with_raw_hook(
        module, "", lambda *_: later.append(1), lambda: model.activations(TOKENS, ["blocks.1.hook_resid_post"])
    )
    assert later == []


# Replacing


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_bit_for_bit(family, ours, theirs):
    with torch.no_grad():
        assert torch.equal(ours(family).logits(TOKENS), theirs(family)(TOKENS).logits)


@pytest.mark.parametrize("backend", ["ours", "bridge"])
@pytest.mark.parametrize("family", FAMILIES)
def test_replacing_by_itself_changes_no_bit(family, backend, request):
    model = request.getfixturevalue(backend)(family)
    logits = model.logits(TOKENS)
    for name in hook_names(family):
        assert torch.equal(model.logits_with(TOKENS, name, torch.clone), logits), name


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


@pytest.mark.parametrize("backend", ["ours", "bridge"])
def test_the_original_pass_shows_what_is_asked_for(backend, request):
    model, seen = request.getfixturevalue(backend)("llama"), {}
    names = hook_names("llama")
    logits = model.logits(TOKENS, hook_fns={name: lambda x, name=name: seen.update({name: x}) for name in names})
    assert torch.equal(logits, model.logits(TOKENS))
    x = model.activations(TOKENS, names)
    assert all(torch.equal(seen[name], x[name]) for name in names)
    with pytest.raises(ModelError, match="no hook"):
        model.logits(TOKENS, hook_fns={"blocks.1.resid_post": print})


@pytest.mark.parametrize("family", ["gpt_neox", "gpt_neox_sequential", "llama", "gemma2", "gemma3_text"])
def test_replacing_in_the_bridge_equals_ours_bit_for_bit(family, eager, bridge):
    direction = torch.linspace(-1, 1, D_MODEL)
    for name in hook_names(family):
        x, y = (model(family).logits_with(TOKENS, name, lambda x: x + direction) for model in (eager, bridge))
        assert torch.equal(x, y), name


def test_replacement_is_cast_and_its_shape_checked(ours):
    name = "blocks.1.hook_resid_post"
    x = ours("llama").logits_with(TOKENS, name, lambda x: torch.zeros_like(x, dtype=torch.float64))
    assert torch.equal(x, ours("llama").logits_with(TOKENS, name, torch.zeros_like))
    with pytest.raises(ValueError, match=r"keep the shape \(3, 20, 32\), got \(3, 32\)"):
        ours("llama").logits_with(TOKENS, name, lambda x: x[:, 0])


def test_no_hook_stays_behind(theirs):
    model = wrap_model(theirs("llama"), make_tokenizer())

    def count() -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in theirs("llama").modules())

    before = count()
    model.activations(TOKENS, hook_names("llama"))
    model.logits_with(TOKENS, "blocks.1.hook_resid_mid", torch.clone)
    with pytest.raises(ZeroDivisionError):
        model.logits_with(TOKENS, "blocks.1.hook_mlp_out", lambda x: 1 / 0)
    assert count() == before


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
    plain_x = plain.activations(TOKENS, ["blocks.0.hook_resid_post"])["blocks.0.hook_resid_post"]
    attention = model.get_submodule("model.layers.0.self_attn")
    attention.q_proj = LowRankAdapter(attention.q_proj)
    adapted = wrap_model(model.eval(), make_tokenizer(), name="tiny")
    x = adapted.activations(TOKENS, ["blocks.0.hook_resid_post"])["blocks.0.hook_resid_post"]
    with torch.no_grad():
        assert torch.equal(x, model(TOKENS, output_hidden_states=True).hidden_states[1])
    assert not torch.equal(x, plain_x)
    assert adapted.identity["weights_sha256"] != plain.identity["weights_sha256"]
    assert adapted.identity["config_sha256"] == plain.identity["config_sha256"]


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


def test_wrap_model_refuses_training_mode():
    with pytest.raises(ModelError, match=r"call model\.eval\(\)"):
        wrap_model(make_model("gpt2", 512).train(), make_tokenizer())


def test_model_without_a_head(directory, ours, tmp_path):
    """Activations as ever; logits are an error. The same for a checkpoint that was saved without its head."""
    headless = AutoModel.from_pretrained(directory("llama"))
    headless.save_pretrained(tmp_path / "headless")
    make_tokenizer().save_pretrained(tmp_path / "headless")
    names = hook_names("llama")
    expected = ours("llama").activations(TOKENS, names)
    for model in (wrap_model(headless, make_tokenizer()), load_model(tmp_path / "headless", device="cpu")):
        x = model.activations(TOKENS, names)
        assert all(torch.equal(x[name], expected[name]) for name in names)
        with pytest.raises(ModelError, match="no output head"):
            model.logits(TOKENS)


# Identity


def test_identity_is_the_model_not_the_place(directory, ours, bridge, tmp_path):
    moved = shutil.copytree(directory("llama"), tmp_path / "elsewhere" / "llama")
    expected = ours("llama").identity
    assert expected["name"] == "llama"
    assert expected["revision"] is None
    assert json.loads(json.dumps(expected)) == expected
    assert load_model(moved, device="cpu").identity == expected
    assert bridge("llama").identity == expected


def test_identity_of_other_weights_dtype_and_config(directory, ours):
    expected = ours("llama").identity
    other_seed = wrap_model(make_model("llama", 512, seed=1), make_tokenizer(), name="llama").identity
    other_dtype = load_model(directory("llama"), device="cpu", dtype="bfloat16").identity
    assert other_seed["config_sha256"] == other_dtype["config_sha256"] == expected["config_sha256"]
    assert len({i["weights_sha256"] for i in (expected, other_seed, other_dtype)}) == 3
    assert len({ours(family).identity["config_sha256"] for family in FAMILIES}) == len(FAMILIES)


# Errors


def test_unknown_hook_lists_near_names(ours, bridge):
    for model in (ours("llama"), bridge("llama")):
        for call in (model.hook_widths, lambda names, model=model: model.activations(TOKENS, names)):
            with pytest.raises(ModelError, match=r"no hook 'blocks\.1\.resid_post'.*near.*blocks\.1\.hook_resid_post"):
                call(["blocks.1.resid_post"])
        with pytest.raises(ModelError, match="3 layers"):
            model.logits_with(TOKENS, "blocks.1.resid_post", torch.clone)


@pytest.mark.parametrize("layer", ["-1", "3", "01", "x"])
def test_layer_that_is_not_there(layer, ours):
    with pytest.raises(ModelError, match=r"3 layers, blocks\.0 to blocks\.2"):
        ours("gpt2").activations(TOKENS, [f"blocks.{layer}.hook_resid_post"])


def test_parallel_blocks_have_no_resid_mid(ours, bridge):
    with pytest.raises(ModelError, match=r"attention and MLP of this model are parallel.*hook_resid_pre"):
        ours("gpt_neox").activations(TOKENS, ["blocks.1.hook_resid_mid"])
    with pytest.raises(ModelError, match="no hook"):
        bridge("gpt_neox").activations(TOKENS, ["blocks.1.hook_resid_mid"])


@pytest.mark.parametrize("name", ["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"])
def test_bridge_refuses_hooks_without_a_vector_for_each_token(name, bridge):
    with pytest.raises(ModelError, match="no vector for each token"):
        bridge("llama").hook_widths([name])


def test_bridge_names_the_flag_of_a_hook_that_is_off(bridge):
    with pytest.raises(ModelError, match="hook_result because use_attn_result is False; choose another hook"):
        bridge("llama").hook_widths(["blocks.1.attn.hook_result"])


def test_bridge_refuses_a_model_that_it_does_not_know(tmp_path):
    config = CTRLConfig(vocab_size=512, n_positions=8, n_embd=8, dff=8, n_layer=1, n_head=1)
    CTRLLMHeadModel(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="TransformerLens cannot take model_type 'ctrl'") as error:
        load_model(tmp_path, device="cpu", backend="transformer_lens")
    assert one_line(error)


def test_replacing_resid_mid_needs_a_block_that_adds(theirs):
    """A block whose output is something else, here because a hook of the user's doubles it, is found out."""
    model = wrap_model(theirs("llama"), make_tokenizer())
    with pytest.raises(ModelError, match="replace at hook_resid_post"):
        with_raw_hook(
            theirs("llama"),
            "model.layers.1",
            lambda module, args, output: 2 * output,
            lambda: model.logits_with(TOKENS, "blocks.1.hook_resid_mid", torch.clone),
        )


def test_no_hooks_is_the_callers_mistake(ours):
    with pytest.raises(ValueError, match="at least one hook"):
        ours("gpt2").activations(TOKENS, [])


def test_sequences_longer_than_the_model_takes(ours):
    with pytest.raises(ModelError, match="at most 256 tokens, got 257"):
        ours("gpt2").logits(torch.zeros((1, 257), dtype=torch.long))


def one_line(error: pytest.ExceptionInfo[Exception]) -> bool:
    return "\n" not in str(error.value) and error.value.__cause__ is None


@pytest.mark.parametrize("name", ["/no/such/dir", "./no-such-dir", "a/b/c"])
def test_missing_directory(name):
    with pytest.raises(ModelError, match="no directory"):
        load_model(name)


def test_missing_hub_name():
    with pytest.raises(ModelError, match="cannot load 'no-such-owner/no-such-model' at revision v1") as error:
        load_model("no-such-owner/no-such-model", revision="v1")
    assert one_line(error)


def test_directory_without_config(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_model(tmp_path)


def broken(source: Path, target: Path, file_name: str, change: Callable[[bytes], bytes]) -> Path:
    shutil.copytree(source, target)
    (target / file_name).write_bytes(change((target / file_name).read_bytes()))
    return target


@pytest.mark.parametrize(
    ("file_name", "change", "message"),
    [
        ("config.json", lambda text: text[:20], "cannot load"),
        ("config.json", lambda text: text.replace(b'"hidden_size": 32', b'"hidden_size": "wide"'), "cannot load"),
        ("config.json", lambda text: text.replace(b'"llama"', b'"unheard-of"'), "cannot load.*unheard-of"),
        ("config.json", lambda text: text.replace(b'_layers": 3', b'_layers": 4'), "9 are missing.*layers.3"),
        ("config.json", lambda text: text.replace(b'_size": 48', b'_size": 64'), "another shape.*layers.0.mlp"),
        ("model.safetensors", lambda data: data[:-100], "cannot load"),
        ("tokenizer.json", lambda text: text[:-100], "cannot load"),
    ],
)
def test_damaged_directory(file_name, change, message, directory, tmp_path):
    with pytest.raises(ModelError, match=message) as error:
        load_model(broken(directory("llama"), tmp_path / "broken", file_name, change), device="cpu")
    assert one_line(error)


def test_unknown_family_names_the_known_ones_and_the_other_backend(tmp_path):
    OPTConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"'gpt2'.*'gemma3_text'.*got 'opt'.*--backend transformer_lens"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"backend": "vllm"}, "backend must be one of .*got 'vllm'"),
        ({"device": "warp"}, "device must be auto or .*got 'warp'"),
        ({"device": "cpu", "dtype": "int8"}, "dtype must be auto or .*got 'int8'"),
    ],
)
def test_arguments_that_are_wrong_alone(setting, message, directory):
    with pytest.raises(ConfigError, match=message):
        load_model(directory("gpt2"), **setting)


# Manners


@pytest.mark.parametrize("backend", ["hf", "transformer_lens"])
def test_loading_prints_nothing_whatever_the_path_says(backend, directory, tmp_path, capfd):
    """A path with another family's name in it leads nobody astray."""
    path = shutil.copytree(directory("gpt2"), tmp_path / "llama-gemma-mistral")
    capfd.readouterr()
    model = load_model(path, device="cpu", backend=backend)
    model.logits(TOKENS)
    assert capfd.readouterr() == ("", "")
    assert model.hook_widths(["blocks.0.hook_resid_mid"]) == {"blocks.0.hook_resid_mid": D_MODEL}
