"""SAEs in a pass of a model, against the stream and the logits made by hand."""

from functools import cache, partial

import pytest
import torch
from support.planted import HOOK, make_sae, model_of, module_of, token_ids
from support.saelens_models import close, hooked, transformers_module
from support.tiny_models import D_MODEL, make_model, make_tokenizer
from support.tiny_saes import changed

from actcache.errors import CacheMismatch, ConfigError, ModelError
from actcache.models.bridge import BridgeModel
from trainer.interventions.splice import Add, Clamp, Patch, Scale, Splice, spliced
from trainer.interventions.steering import steered_logits

pytestmark = pytest.mark.filterwarnings("ignore:.*HookedTransformer.* is deprecated:DeprecationWarning")
TOKENS = torch.tensor([token_ids()[1:11], token_ids("the cat, the cat, the sea and the lamp")[1:11]])  # none is special
LATER = "blocks.2.hook_mlp_out"
FIRST = torch.zeros(TOKENS.shape, dtype=torch.bool)
FIRST[:, :3] = True


@cache
def bridge():
    module = make_model("llama", 512).double()
    module.config.architectures = [type(module).__name__]  # as it is read from a directory
    return BridgeModel(module, make_tokenizer(), {"name": "llama"})


MODELS = {"gpt2": partial(model_of, "gpt2"), "llama": partial(model_of, "llama"), "bridge": bridge}


def at(model, hook_name, splices=()):
    """The activation at a hook while the splices are there."""
    with spliced(model, splices):
        return model.activations(TOKENS, [hook_name])[hook_name]


def acts_of(sae, x):
    return sae.encode(x.flatten(0, 1)).view(*x.shape[:2], -1)


def busiest(sae, x):
    """The latent that is active at the most tokens."""
    return int((acts_of(sae, x) > 0).sum((0, 1)).argmax())


@pytest.mark.parametrize("name", MODELS)
def test_later_saes_read_the_stream_that_earlier_ones_changed(name):
    model, seen = MODELS[name](), []
    first, second = make_sae(), make_sae("jumprelu", hook_name=LATER)
    latent = busiest(first, at(model, HOOK))
    splices = [
        Splice(sae=first, features={latent: Add(3.0)}),
        Splice(sae=second, act=lambda f: seen.append(f) or f),
    ]
    with spliced(model, splices):
        logits = model.logits(TOKENS)
    d = first.W_dec[latent]
    there: dict[str, torch.Tensor] = {}
    expected = model.logits_with(TOKENS, HOOK, lambda x: x + 3.0 * d, hook_fns={LATER: lambda x: there.update(x=x)})
    torch.testing.assert_close(seen[0], acts_of(second, there["x"]).flatten(0, 1))
    torch.testing.assert_close(logits, expected)
    assert not torch.allclose(seen[0], acts_of(second, at(model, LATER)).flatten(0, 1))


@pytest.mark.parametrize("name", MODELS)
def test_splices_that_change_nothing_change_no_bit(name):
    model = MODELS[name]()
    splices = [
        Splice(sae=make_sae()),
        Splice(sae=make_sae("topk"), act=torch.clone),
        Splice(sae=make_sae("skip_transcoder")),
    ]
    expected = model.logits(TOKENS)
    with spliced(model, splices):
        assert torch.equal(model.logits(TOKENS), expected)
    assert torch.equal(model.logits(TOKENS), expected), "nothing stays in the model"


def test_a_pass_of_the_models_own_module_goes_through_them():
    model, sae = model_of("llama"), make_sae()
    features = {busiest(sae, at(model, HOOK)): Clamp(5.0)}
    with spliced(model, [Splice(sae=sae, features=features)]), torch.no_grad():
        own = module_of("llama")(input_ids=TOKENS).logits
    assert torch.equal(own, steered_logits(model, sae, TOKENS, features))


def test_without_the_error_the_reconstruction_goes_on():
    model, sae = model_of("gpt2"), make_sae("topk")
    x = at(model, HOOK)
    got = at(model, "blocks.2.hook_resid_pre", [Splice(sae=sae, keep_error=False, where=FIRST)])
    x_hat = torch.stack([sae.reconstruct(rows)[1] for rows in x])
    torch.testing.assert_close(got, torch.where(FIRST[..., None], x_hat, x))


@pytest.mark.parametrize("change", [Scale(0.5), Clamp(2.0), Add(-1.0), "patch"])
def test_a_change_is_made_at_the_tokens_that_are_asked_for(change):
    model, sae = model_of("gpt2"), make_sae()
    x = at(model, HOOK)
    latent = busiest(sae, x)
    f = acts_of(sae, x)[..., latent]
    other = f.roll(1, dims=1)  # as if another prompt had it
    expected = {Scale: 0.5 * f, Clamp: torch.full_like(f, 2.0), Add: f - 1.0, str: other}[type(change)]
    splice = Splice(sae=sae, features={latent: Patch(other) if change == "patch" else change}, where=FIRST)
    got = at(model, "blocks.2.hook_resid_pre", [splice])
    torch.testing.assert_close(got, x + (torch.where(FIRST, expected - f, 0)[..., None] * sae.W_dec[latent]))


MID, MLP_OUT, POST = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"


def planned(*plan):
    """Splices at hooks, in this order, each of an SAE of its own; one with two hooks is a transcoder."""
    made = []
    for number, (hook_name, hook_name_out) in enumerate(plan):
        sae = make_sae("skip_transcoder" if hook_name_out else "standard", hook_name=hook_name)
        sae.hook_name_out = hook_name_out
        made.append(Splice(sae=sae, features={number: Add(2.0)}, keep_error=False, where=FIRST))
    return made


@pytest.mark.parametrize(
    "plan",
    [
        [(MID, None)],
        [(MID, MLP_OUT)],
        [(MID, None), (MLP_OUT, None)],
        [(MLP_OUT, None), (MID, None)],
        [(POST, None), (MID, None)],
        [(MID, None), (MID, MLP_OUT), (POST, None)],
    ],
    ids=str,
)
def test_splices_in_one_block_are_what_its_stream_makes_of_them(plan):
    """By hand, in HookedTransformer's own hooks; then on its module, and on transformers', by us."""
    pytest.importorskip("sae_lens")
    splices, seen = planned(*plan), {}

    def hook(splice, at):
        def fn(x, hook):
            source, target = splice.sae.hook_name, splice.sae.output_hooks[0]
            if at == source:
                seen[id(splice)] = x
            return splice.replaced(seen[id(splice)], x) if at == target else x

        return fn

    fwd_hooks = [(at, hook(s, at)) for s in splices for at in dict.fromkeys((s.sae.hook_name, *s.sae.output_hooks))]
    with torch.no_grad():
        expected = hooked().run_with_hooks(TOKENS, fwd_hooks=fwd_hooks)
        for module in (hooked(), transformers_module()):
            with spliced(module, splices):
                output = module(TOKENS)
            assert close(expected, output if isinstance(output, torch.Tensor) else output.logits)


def test_a_transcoder_to_another_width_is_said():
    sae = changed(
        make_sae("skip_transcoder"), W_dec=torch.zeros(96, 8).double(), b_dec=torch.zeros(8).double(), W_skip=None
    )
    with pytest.raises(CacheMismatch, match="the SAE gives activations of width 8, the model has 32"):
        at(model_of("gpt2"), "blocks.2.hook_resid_pre", [Splice(sae=sae)])


@pytest.mark.parametrize("how", ["layer_norm", "constant_norm_rescale"])
def test_a_change_in_normalised_units_is_brought_back_token_by_token(how):
    model, sae = model_of("gpt2"), make_sae(normalize_activations=how)
    x = at(model, HOOK)
    latent = busiest(sae, x)
    got = at(model, "blocks.2.hook_resid_pre", [Splice(sae=sae, features={latent: Add(2.0)})])
    scale = x.std(-1) if how == "layer_norm" else x.norm(dim=-1) / D_MODEL**0.5
    torch.testing.assert_close(got, x + 2.0 * scale[..., None] * sae.W_dec[latent])
    f = sae.encode(x)
    more = f.clone()
    more[..., latent] += 2.0
    torch.testing.assert_close(got - x, sae.decode(more, x) - sae.decode(f, x))
    whole = at(model, "blocks.2.hook_resid_pre", [Splice(sae=sae, act=lambda f: 0 * f, keep_error=False)])
    torch.testing.assert_close(whole, sae.decode(0 * f, x))


def test_a_change_of_one_heads_sae_stays_in_its_head():
    model, d_head, head = bridge(), D_MODEL // 4, 2
    hook_z = "blocks.1.attn.hook_z"
    w = torch.randn(12, d_head, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    about = {"metadata": {"hook_head_index": head}, "hook_name": hook_z}
    sae = make_sae(W_enc=w.T, W_dec=w, b_enc=torch.zeros(12).double(), b_dec=torch.zeros(d_head).double(), **about)
    z = at(model, hook_z)
    channels = slice(head * d_head, (head + 1) * d_head)
    seen: dict[str, torch.Tensor] = {}
    with spliced(model, [Splice(sae=sae, features={3: Add(1.5)})]), spliced(model, []):
        model.logits(TOKENS, hook_fns={hook_z: lambda x: seen.update(x=x)})
    expected = z.clone()
    expected[..., channels] += 1.5 * sae.W_dec[3]
    torch.testing.assert_close(seen["x"], expected)
    assert torch.equal(sae.encode(z), sae.encode(z[..., channels]))


def test_two_saes_at_one_hook_act_in_their_order():
    model, sae = model_of("gpt2"), make_sae()
    latent = busiest(sae, at(model, HOOK))
    seen = []
    splices = [Splice(sae=sae, features={latent: Clamp(9.0)}), Splice(sae=sae, act=lambda f: seen.append(f) or f)]
    got = at(model, "blocks.2.hook_resid_pre", splices)
    f = acts_of(sae, at(model, HOOK))
    changed = at(model, HOOK) + (9.0 - f[..., latent])[..., None] * sae.W_dec[latent]
    torch.testing.assert_close(got, changed)
    torch.testing.assert_close(seen[0], acts_of(sae, changed).flatten(0, 1))


def test_gradients_flow_to_what_an_act_returns():
    model, sae = model_of("llama"), make_sae()
    probe = torch.zeros(TOKENS.numel(), sae.d_sae, dtype=torch.float64, requires_grad=True)
    with spliced(model, [Splice(sae=sae, act=lambda f: f + probe)]):
        logit = model.logits_with_gradients(TOKENS)[0, -1, 7]
    (gradient,) = torch.autograd.grad(logit, probe)
    assert gradient.view(*TOKENS.shape, -1)[0].abs().sum() > 0
    assert gradient.view(*TOKENS.shape, -1)[1].abs().sum() == 0, "the other sequence"
    assert all(parameter.grad is None for parameter in module_of("llama").parameters())


def test_what_does_not_fit_is_said():
    model, sae = model_of("gpt2"), make_sae()
    with pytest.raises(ConfigError, match="a feature must be in"):
        Splice(sae=sae, features={sae.d_sae: Clamp(0.0)})
    crosscoder = make_sae(architecture="crosscoder", hook_names=("blocks.0.hook_resid_post", HOOK))
    with pytest.raises(ConfigError, match="are several hooks at once; take an SAE of one"):
        Splice(sae=crosscoder)
    narrow = changed(sae, W_enc=torch.zeros(8, sae.d_sae, dtype=torch.float64))
    with pytest.raises(CacheMismatch, match=f"takes activations of width 8, the model gives {D_MODEL}"):
        at(model, "blocks.2.hook_resid_pre", [Splice(sae=narrow)])
    with pytest.raises(ValueError, match=r"where must be of the tokens \(2, 10\), got \(1, 4\)"):
        at(model, "blocks.2.hook_resid_pre", [Splice(sae=sae, where=torch.ones(1, 4, dtype=torch.bool))])
    with pytest.raises(ValueError, match=r"Patch must be of the tokens \(2, 10\), got \(3, 1\)"):
        at(model, "blocks.2.hook_resid_pre", [Splice(sae=sae, features={0: Patch(torch.ones(3, 1))})])
    with pytest.raises(ModelError, match="no hook"), spliced(model, [Splice(sae=make_sae(hook_name="blocks.9.x"))]):
        pass
