"""What every language model promises, whichever backend it has."""

import weakref

import pytest
import torch
from support.model_cases import TOKENS, hook_names, with_raw_hook
from support.tiny_models import D_MODEL, FAMILIES, make_tokenizer

from actcache.errors import ModelError
from actcache.models.load import wrap_model


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


def test_activations_keep_the_order_and_ignore_repeats(ours):
    names = ["blocks.2.hook_resid_pre", "blocks.0.hook_mlp_out", "blocks.2.hook_resid_pre"]
    x = ours("llama").activations(TOKENS, names)
    assert list(x) == names[:2]
    assert not any(value.requires_grad for value in x.values())


def test_token_ids_may_be_int32(ours):
    name = "blocks.1.hook_resid_post"
    x, y = (ours("gpt2").activations(ids, [name])[name] for ids in (TOKENS, TOKENS.int()))
    assert torch.equal(x, y)


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


@pytest.mark.parametrize("backend", ["ours", "bridge"])
@pytest.mark.parametrize("family", FAMILIES)
def test_replacing_by_itself_changes_no_bit(family, backend, request):
    model = request.getfixturevalue(backend)(family)
    logits = model.logits(TOKENS)
    for name in hook_names(family):
        assert torch.equal(model.logits_with(TOKENS, name, torch.clone), logits), name


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


def test_unknown_hook_lists_near_names(ours, bridge):
    for model in (ours("llama"), bridge("llama")):
        for call in (model.hook_widths, lambda names, model=model: model.activations(TOKENS, names)):
            with pytest.raises(ModelError, match=r"no hook 'blocks\.1\.resid_post'.*near.*blocks\.1\.hook_resid_post"):
                call(["blocks.1.resid_post"])
        with pytest.raises(ModelError, match="3 layers"):
            model.logits_with(TOKENS, "blocks.1.resid_post", torch.clone)


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


@pytest.mark.parametrize("backend", ["ours", "bridge"])
@pytest.mark.parametrize("token_id", [-1, 512])
def test_an_id_that_the_embedding_lacks_is_one_line(backend, token_id, request):
    model = request.getfixturevalue(backend)("gpt2")
    assert model.n_embeddings == 512
    token_ids = torch.tensor([[3, token_id]])
    for run in (model.logits, lambda ids: model.activations(ids, ["blocks.0.hook_resid_pre"])):
        with pytest.raises(
            ModelError, match=rf"must be in \[0, 512\), .*, got {token_id}; pass the tokenizer"
        ) as error:
            run(token_ids)
        assert "\n" not in str(error.value)
