"""Compiled blocks against the plain model: `JAXTYPING_DISABLE=1 pytest -m compiled tests/test_compiled.py`."""

import pytest
import torch
from support.tiny_models import D_MODEL, FAMILIES, N_LAYERS, make_model, make_model_dir, make_tokenizer
from torch import Tensor, nn

from actcache.errors import ModelError
from actcache.models.huggingface import HuggingFaceModel
from actcache.models.language_model import SITES, LanguageModel
from actcache.models.load import load_model, wrap_model

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),  # torch's own
]
TOKENS = torch.randint(0, 512, (3, 20), generator=torch.Generator().manual_seed(1))


def hook_names(family: str, sites: tuple[str, ...] = SITES) -> list[str]:
    kept = [site for site in sites if (family, site) != ("gpt_neox", "hook_resid_mid")]
    return [f"blocks.{layer}.{site}" for layer in range(N_LAYERS) for site in kept]


OUTSIDE = ("hook_resid_pre", "hook_resid_post")


def tiny(family: str, *, double: bool = False, compiled: bool) -> HuggingFaceModel:
    model = make_model(family, 512)
    return HuggingFaceModel(model.double() if double else model, make_tokenizer(), {"name": family}, compiled=compiled)


def rounding_bound(dtype: torch.dtype, reference: dict[str, Tensor]) -> float:
    """Of two ways to compute the same formulas, how far apart they may be.

    Each value is the end of at most `roundings` operations a layer (norms and projections over d_model, scores over
    d_head, softmax and mix over positions, MLP over 4 d_model), each off by eps/2 of values no larger than the largest,
    on both sides.
    """
    roundings = N_LAYERS * (5 * D_MODEL + D_MODEL // 4 + 2 * TOKENS.shape[1] + 4 * D_MODEL)
    return roundings * torch.finfo(dtype).eps * max(x.abs().max().item() for x in reference.values())


def largest_difference(x: dict[str, Tensor], y: dict[str, Tensor]) -> float:
    assert x.keys() == y.keys()
    return max((x[name].double() - y[name].double()).abs().max().item() for name in x)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_within_its_rounding_of_the_plain_float64_model(family):
    names = hook_names(family, OUTSIDE)
    reference = tiny(family, double=True, compiled=False).activations(TOKENS, names)
    x = tiny(family, compiled=True).activations(TOKENS, names)
    assert all(value.dtype == torch.float32 for value in x.values())
    assert largest_difference(x, reference) <= rounding_bound(torch.float32, reference)


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_float64_within_its_rounding_of_the_plain_model(family):
    """The same formula: another epsilon, mask or scale would be off by 1e-6 and more."""
    names = hook_names(family, OUTSIDE)
    x, y = (tiny(family, double=True, compiled=compiled).activations(TOKENS, names) for compiled in (True, False))
    assert largest_difference(x, y) <= rounding_bound(torch.float64, y) < 1e-10


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory):
    return make_model_dir("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def plain(directory) -> LanguageModel:
    return load_model(directory, device="cpu")


@pytest.fixture(scope="module")
def compiled(directory) -> LanguageModel:
    return load_model(directory, device="cpu", compile=True)


def test_blocks_do_run_compiled(compiled, plain):
    """Fused kernels round elsewhere, so not every bit is the same; the record says so, the identity does not."""
    name = "blocks.2.hook_resid_post"
    assert not torch.equal(compiled.activations(TOKENS, [name])[name], plain.activations(TOKENS, [name])[name])
    assert (compiled.compiled, plain.compiled) == (True, False)
    assert compiled.identity == plain.identity


def test_all_sites_together(compiled, plain):
    """Blocks whose inside is asked for run as they were: bit for bit."""
    x, y = (model.activations(TOKENS, hook_names("llama")) for model in (compiled, plain))
    assert list(x) == hook_names("llama")
    assert [name for name in x if not torch.equal(x[name], y[name])] == []


def test_inside_of_one_block_among_compiled_ones(compiled, plain):
    """Block 1 alone is plain; hooks attached after compilation are seen, and are gone afterwards."""
    inside = [f"blocks.1.{site}" for site in ("hook_attn_out", "hook_resid_mid", "hook_mlp_out")]
    names = ["blocks.1.hook_resid_pre", *inside, "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
    before = compiled.activations(TOKENS, ["blocks.2.hook_resid_post"])["blocks.2.hook_resid_post"]
    x = compiled.activations(TOKENS, names)
    pre, attn_out, mid, mlp_out, post, _ = x.values()
    assert torch.equal(pre + attn_out, mid)
    assert torch.equal(mid + mlp_out, post)
    reference = plain.activations(TOKENS, names)
    assert largest_difference(x, reference) <= rounding_bound(torch.float32, reference)
    after = compiled.activations(TOKENS, ["blocks.2.hook_resid_post"])["blocks.2.hook_resid_post"]
    assert torch.equal(before, after)


def test_each_site_alone(compiled, plain):
    for name in hook_names("llama"):
        x, y = (model.activations(TOKENS, [name]) for model in (compiled, plain))
        assert largest_difference(x, y) <= rounding_bound(torch.float32, y), name


def test_nothing_after_the_last_hook_is_run(compiled):
    calls = []
    block = compiled._blocks[2]
    handle = block.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        compiled.activations(TOKENS, ["blocks.1.hook_resid_post"])
        assert calls == []
        compiled.activations(TOKENS, ["blocks.2.hook_resid_post"])
        assert calls == [1]
    finally:
        handle.remove()


@pytest.mark.parametrize("site", SITES)
def test_replacing(site, compiled, plain):
    name = f"blocks.1.{site}"
    logits = [model.logits_with(TOKENS, name, torch.zeros_like) for model in (compiled, plain)]
    assert not torch.equal(logits[1], plain.logits(TOKENS))
    x, y = ({"logits": value} for value in logits)
    assert largest_difference(x, y) <= rounding_bound(torch.float32, y)
    start = compiled.activations(TOKENS, ["blocks.1.hook_resid_pre"])["blocks.1.hook_resid_pre"]
    assert torch.equal(compiled.logits_from(TOKENS, start, name, torch.zeros_like), logits[0])
    assert torch.equal(compiled.logits_with(TOKENS, name, torch.zeros_like), logits[0]), "it is compiled as before"


def test_one_graph_for_every_block_and_batch_size():
    """A harvest ends with smaller batches, and deep models must not reach torch's limit of recompilations (8)."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = tiny("llama", compiled=True)
    for n_sequences in (3, 2, 8):
        model.activations(TOKENS[:1].expand(n_sequences, -1), ["blocks.2.hook_resid_post"])
    assert (counters["stats"]["unique_graphs"], len(counters["graph_break"])) == (1, 0)


def test_hooks_of_others_inside_a_block_are_seen(plain, directory):
    model = load_model(directory, device="cpu", compile=True)
    name = "blocks.1.hook_resid_post"
    model.activations(TOKENS, [name])  # compiled before the hook is there

    def doubled(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return 2 * output

    found = []
    for each in (plain, model):
        assert isinstance(each, HuggingFaceModel)
        handle = each._blocks[1].get_submodule("mlp").register_forward_hook(doubled)
        found.append(each.activations(TOKENS, [name]))
        handle.remove()
    assert largest_difference(*found) <= rounding_bound(torch.float32, found[0])
    assert largest_difference(found[0], plain.activations(TOKENS, [name])) > 0.1


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled:UserWarning")
def test_no_compiler(directory):
    import torch._inductor.config

    torch._dynamo.reset()
    model = load_model(directory, device="cpu", compile=True)
    no_compiler = {"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}
    message = r"torch\.compile failed: .*No working C\+\+ compiler.*; leave out --compile"
    with torch._inductor.config.patch(no_compiler), pytest.raises(ModelError, match=message) as error:
        model.activations(TOKENS, ["blocks.0.hook_resid_post"])
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is None


def test_wrapped_models_are_not_compiled():
    assert not wrap_model(make_model("llama", 512), make_tokenizer()).compiled
