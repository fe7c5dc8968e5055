"""Generation with latents changed, against transformers' own generation and against replacements made by hand."""

from collections.abc import Callable, Mapping
from functools import cache

import pytest
import torch
from support.planted import HOOK, LAST, TEXT, make_sae, model_of, module_of, planted, token_ids
from support.tiny_models import D_MODEL, FAMILIES, make_model, make_tokenizer
from support.tiny_saes import changed
from torch import Tensor
from transformers import PreTrainedModel

from actcache.errors import CacheMismatch, ConfigError
from actcache.models.bridge import BridgeModel
from actcache.models.language_model import LanguageModel
from actcache.models.load import load_model, wrap_model
from trainer.interventions.splice import Add, Change, Clamp, Scale, Splice, spliced
from trainer.interventions.steering import steer, steered_logits
from trainer.sae.sae import SAE

TOKENS = torch.tensor([token_ids()[:12], token_ids("the cat, the cat, the sea and the lamp")[:12]])
BLOCK_AFTER = {"gpt2": "transformer.h.2", "llama": "model.layers.2"}  # its input is what is at HOOK


@cache
def bridge_of(family: str) -> LanguageModel:
    module = make_model(family, 512).double()
    module.config.architectures = [type(module).__name__]  # as it is read from a directory
    return BridgeModel(module, make_tokenizer(), {"name": family})


def stream_after(family: str, run: Callable[[], object]) -> Tensor:
    """The stream that the last block is given while `run` runs."""
    seen: list[Tensor] = []
    block = module_of(family).get_submodule(BLOCK_AFTER[family])
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        run()
    finally:
        handle.remove()
    return seen[0]


def by_hand(sae: SAE, x: Tensor, ids: Tensor, changed: Mapping[int, Callable], *, keep_error: bool) -> Tensor:
    """decode(f') + x - decode(f), or decode(f'), token by token; special tokens as they were."""
    out = x.clone()
    for sequence, position in (ids > 1).nonzero().tolist():  # 0 and 1 are <bos> and <eos>
        acts = sae.encode(x[sequence, position][None])
        new = acts.clone()
        for latent, change in changed.items():
            new[0, latent] = change(acts[0, latent])
        error = x[sequence, position] - sae.decode(acts)[0]
        out[sequence, position] = sae.decode(new)[0] + (error if keep_error else 0)
    return out


# The logits under a change


@pytest.mark.parametrize("make", [model_of, bridge_of])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_changes_nothing_changes_no_bit(family, make):
    model, sae = make(family), make_sae("topk")
    expected = model.logits(TOKENS)
    active = int(sae.encode(model.activations(TOKENS, [HOOK])[HOOK][0, 3:4])[0].argmax())
    for features in ({}, {active: Scale(1.0)}, {active: Add(0.0), 5: Scale(1.0)}):
        assert torch.equal(steered_logits(model, sae, TOKENS, features), expected)
    for change in (Scale(2.0), Clamp(0.0), Add(1.0)):
        assert not torch.equal(steered_logits(model, sae, TOKENS, {active: change}), expected)


def test_a_narrower_sae_leaves_a_wider_stream_as_it_is():
    """The SAE in float32 and the model in float64, and the other way round: x is not rounded on the way."""
    sae = make_sae("jumprelu")
    tensors = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    single = changed(sae, **{name: getattr(sae, name).float() for name in tensors})
    half = wrap_model(make_model("llama", 512).bfloat16(), make_tokenizer(), "half")
    for model, each in ((model_of("llama"), single), (half, single), (half, sae)):
        assert torch.equal(steered_logits(model, each, TOKENS, {7: Scale(1.0)}), model.logits(TOKENS))


@pytest.mark.parametrize("keep_error", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "abstopk"])
@pytest.mark.parametrize("family", BLOCK_AFTER)
def test_the_stream_is_x_hat_changed_plus_the_error(family, architecture, keep_error):
    """Float64; each value is a sum of d_sae products beside x, in another order here and there."""
    sae, model = make_sae(architecture), model_of(family)
    x = model.activations(TOKENS, [HOOK])[HOOK]
    active = sae.encode(x[0, 3:4])[0].argsort(descending=True).tolist()
    features: dict[int, Change] = {active[0]: Scale(-2.5), active[1]: Clamp(1.75), active[-1]: Add(3.0), 9: Clamp(0.0)}
    got = stream_after(family, lambda: steered_logits(model, sae, TOKENS, features, keep_error=keep_error))
    changed = {
        active[0]: lambda f: -2.5 * f,
        active[1]: lambda f: 1.75,
        active[-1]: lambda f: f + 3.0,
        9: lambda f: 0.0,
    }
    expected = by_hand(sae, x, TOKENS, changed, keep_error=keep_error)
    size = float(x.abs().max() + sae.encode(x.flatten(0, 1)).abs().sum(1).max() + 10)
    assert float((got - expected).abs().max()) <= 4 * (sae.d_sae + D_MODEL) * 2.0**-53 * size
    assert torch.equal(got[:, 0], x[:, 0]), "BOS is not steered"
    assert float((got - x)[:, 1:].abs().amax(-1).min()) > 0.1, "every other token is"


def test_special_tokens_amid_the_text_are_not_steered():
    ids = TOKENS.clone()
    ids[0, 4], ids[1, 7] = 1, 0
    model, sae = model_of("llama"), make_sae()
    x = model.activations(ids, [HOOK])[HOOK]
    got = stream_after("llama", lambda: steered_logits(model, sae, ids, {3: Add(2.0)}))
    is_special = ids <= 1
    assert torch.equal(got[is_special], x[is_special])
    added = (got - x)[~is_special]
    torch.testing.assert_close(added, (2 * sae.W_dec[3]).expand_as(added), rtol=0, atol=4 * 2.0**-53 * 100)


def test_clamping_a_silent_feature_adds_it_and_scaling_it_does_nothing():
    sae = make_sae()
    silent = changed(sae, b_enc=sae.b_enc.index_fill(0, torch.tensor([8]), -1e6))
    model = model_of("gpt2")
    clamped = steered_logits(model, silent, TOKENS, {8: Clamp(4.0)})
    assert torch.equal(clamped, steered_logits(model, silent, TOKENS, {8: Add(4.0)}))
    assert not torch.equal(clamped, model.logits(TOKENS))
    for change in (Scale(50.0), Clamp(0.0)):
        assert torch.equal(steered_logits(model, silent, TOKENS, {8: change}), model.logits(TOKENS))


def test_dropping_the_error_alone_is_the_reconstruction():
    model, sae = model_of("llama"), make_sae("topk")
    expected = model.logits_with(
        TOKENS,
        HOOK,
        lambda x: torch.where((TOKENS > 1)[..., None], sae.reconstruct(x.flatten(0, 1))[1].view_as(x), x),
    )
    got = steered_logits(model, sae, TOKENS, {}, keep_error=False)
    # only special tokens are left out of the SAE's batch: its products round in another order
    assert float((got - expected).abs().max()) <= 1e-10 * float(expected.abs().max())


def test_a_transcoder_changes_what_it_predicts():
    sae, model = make_sae("skip_transcoder"), model_of("llama")
    seen = model.activations(TOKENS, [sae.hook_name, HOOK])
    x, y = seen[sae.hook_name], seen[HOOK]
    kept = stream_after("llama", lambda: steered_logits(model, sae, TOKENS, {3: Clamp(2.0)}))
    acts, y_hat = sae.reconstruct(x.flatten(0, 1))
    delta = ((2.0 - acts[:, 3:4]) * sae.W_dec[3]).view_as(y)
    for got, base in (
        (kept, y),
        (stream_after("llama", lambda: steered_logits(model, sae, TOKENS, {3: Clamp(2.0)}, keep_error=False)), None),
    ):
        expected = (y_hat.view_as(y) if base is None else base) + delta
        size = float(y_hat.abs().max() + y.abs().max() + acts.abs().sum(1).max())
        assert float((got - expected)[:, 1:].abs().max()) <= 4 * (sae.d_sae + D_MODEL) * 2.0**-53 * size
        assert torch.equal(got[:, 0], y[:, 0])


# Generation


def theirs(module: PreTrainedModel, ids: list[int], n_tokens: int, direction: Tensor | None = None) -> str:
    """What transformers' own greedy generation, with its key-value cache, appends; `direction` on all but BOS."""
    paths = {"gpt2": "transformer.h.1", "gpt_neox": "gpt_neox.layers.1"}
    block = module.get_submodule(paths.get(module.config.model_type, "model.layers.1"))

    def add(module: object, args: object, output: Tensor) -> Tensor | None:
        if direction is None:
            return None
        first = 1 if output.shape[1] > 1 else 0  # with a cache, what comes later comes alone
        return torch.cat([output[:, :first], output[:, first:] + direction], dim=1)

    handle = block.register_forward_hook(add)
    try:
        prompt = torch.tensor([ids])
        whole = module.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=n_tokens,
            pad_token_id=1,
        )
    finally:
        handle.remove()
    tokenizer = make_tokenizer()
    whole, start = (tokenizer.decode(each, skip_special_tokens=True) for each in (whole[0].tolist(), ids))
    return whole[len(start) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_equals_transformers_generation(family):
    """Float64, so that no token hangs on a rounding; 30 tokens are beyond the sliding windows of 8."""
    sae, n_tokens = make_sae(), 30
    got = steer(model_of(family), sae, TEXT, features={4: Add(40.0)}, n_tokens=n_tokens, temperature=0.0)
    assert got.prompt == TEXT
    assert got.before == theirs(module_of(family), token_ids(), n_tokens)
    assert got.after == theirs(module_of(family), token_ids(), n_tokens, 40.0 * sae.W_dec[4])
    assert got.before != got.after


@pytest.mark.parametrize("family", FAMILIES)
def test_steering_along_a_token_makes_it_come(family):
    token_id, d = planted(family)
    sae = make_sae(hook_name=LAST)
    W_dec = sae.W_dec.clone()
    W_dec[30] = d
    got = steer(
        model_of(family),
        changed(sae, W_dec=W_dec),
        TEXT,
        features={30: Add(1e4)},
        n_tokens=5,
        temperature=0.0,
    )
    tokenizer = make_tokenizer()
    ids = token_ids()[1:]
    assert got.after == tokenizer.decode(ids + [token_id] * 5)[len(tokenizer.decode(ids)) :]
    assert got.before != got.after


def test_scale_one_leaves_the_text_as_it_is():
    for seed in range(3):
        got = steer(model_of("gpt2"), make_sae(), TEXT, features={2: Scale(1.0)}, n_tokens=20, seed=seed)
        assert got.before == got.after


def test_draws_follow_the_seed():
    def run(seed: int, **changes: object) -> tuple[str, str]:
        features = {2: Add(1.0)}
        got = steer(model_of("gpt2"), make_sae(), TEXT, features=features, n_tokens=12, seed=seed, **changes)
        return got.before, got.after

    assert run(0) == run(0)
    assert run(0)[0] != run(1)[0]
    state = torch.get_rng_state()
    assert run(5, temperature=0.0) == run(6, temperature=0.0) == run(7, temperature=1e-300)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_drawn_tokens_have_the_probabilities_of_the_softmax(temperature):
    """The first token over 200 seeds: chi-squared of the likeliest tokens and the rest is under its 1e-6 quantile.

    One prompt, one softmax: the expected counts come from transformers' logits.
    """
    n, tokenizer, prompt = 200, make_tokenizer(), token_ids()
    with torch.no_grad():
        p = (module_of("gpt2")(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    common = [i for i in p.argsort(descending=True).tolist()[:8] if i > 1 and p[i] > 5 / n]
    start = len(tokenizer.decode(prompt[1:]))
    texts = {tokenizer.decode([*prompt[1:], i])[start:]: i for i in common}
    counts = dict.fromkeys([*common, None], 0)
    for seed in range(n):
        got = steer(model_of("gpt2"), make_sae(), TEXT, features={}, n_tokens=1, temperature=temperature, seed=seed)
        counts[texts.get(got.before)] += 1
    expected = [n * float(p[i]) for i in common]
    expected.append(n - sum(expected))
    chi_squared = sum((seen - wanted) ** 2 / wanted for seen, wanted in zip(counts.values(), expected, strict=True))
    assert chi_squared < 42.8, "the 1 - 1e-6 quantile with 8 degrees of freedom; fewer have less"


def test_the_text_ends_at_a_special_token():
    module = make_model("gpt2", 512).double()
    with torch.no_grad():
        module.lm_head.weight[1] *= 0
    module.lm_head.bias = torch.nn.Parameter(torch.zeros(512, dtype=torch.float64).index_fill(0, torch.tensor(1), 1e3))
    calls: list[int] = []
    module.lm_head.register_forward_hook(lambda *_: calls.append(1))
    got = steer(wrap_model(module, make_tokenizer(), "ends"), make_sae(), TEXT, features={}, n_tokens=50)
    assert (got.before, got.after, len(calls)) == ("", "", 2), "one pass without and one with"


def test_it_runs_from_a_directory_and_through_the_bridge(tiny_llama_dir):
    features = {4: Add(40.0)}
    for backend in ("hf", "transformer_lens"):
        model = load_model(tiny_llama_dir, device="cpu", backend=backend)
        got = steer(model, make_sae(), TEXT, features=features, n_tokens=8, temperature=0.0)
        assert got.before != got.after


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"features": {96: Add(1.0)}}, r"a feature must be in \[0, d_sae=96\), got 96"),
        ({"n_tokens": 0}, "n_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be 0 or a positive number, got -1"),
        ({"temperature": float("nan")}, "got nan"),
        ({"n_tokens": 257}, r"gpt2 has 256 positions, 257 tokens after a text of \d+ do not fit"),
    ],
)
def test_wrong_arguments(changes, says):
    arguments = {"features": {3: Add(1.0)}, "n_tokens": 5, **changes}
    with pytest.raises(ConfigError, match=says):
        steer(model_of("gpt2"), make_sae(), TEXT, **arguments)


def test_the_last_position_can_be_read_and_no_more():
    text = make_tokenizer().decode((token_ids()[1:] * 20)[:250])
    room = 256 - len(token_ids(text)) + 1
    arguments = {"features": {}, "temperature": 0.0}
    assert steer(model_of("gpt2"), make_sae(), text, n_tokens=room, **arguments).before
    with pytest.raises(ConfigError, match="do not fit"):
        steer(model_of("gpt2"), make_sae(), text, n_tokens=room + 1, **arguments)


@pytest.mark.parametrize("keep_error", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_that_grows_is_steered_as_the_whole_text(family, keep_error):
    """Keys and values are kept; the last tokens come one by one, and their logits are those of the whole."""
    model, sae = model_of(family), make_sae()
    acts = sae.encode(model.activations(TOKENS, [HOOK])[HOOK][:, 1:].flatten(0, 1))
    features = {int(acts.sum(0).argmax()): Add(2.0), 5: Clamp(0.0)}
    expected = steered_logits(model, sae, TOKENS, features, keep_error=keep_error)
    got, past = [], None
    for part in TOKENS.split([9, 1, 2], dim=1):
        where = part > 1  # 0 and 1 are <bos> and <eos>
        splice = Splice(sae=sae, features=features, keep_error=keep_error, where=where)
        with spliced(model, [splice]):
            logits, past = model.logits_after(past, part)
        assert past is not None
        got.append(logits)
    torch.testing.assert_close(torch.cat(got, dim=1), expected, rtol=1e-5, atol=1e-5)  # some norms are of float32


def test_a_backend_that_keeps_no_past_writes_the_same_text():
    sae = make_sae()
    features, asked = {3: Add(4.0)}, {"n_tokens": 12, "temperature": 0.0}
    kept, anew = (steer(make("llama"), sae, TEXT, features=features, **asked) for make in (model_of, bridge_of))
    assert (kept.before, kept.after) == (anew.before, anew.after)
    assert kept.before != kept.after


def test_saes_that_cannot_steer():
    crosscoder = make_sae(architecture="crosscoder", hook_names=("blocks.0.hook_resid_post", HOOK))
    with pytest.raises(ConfigError, match="are several hooks at once; take an SAE of one"):
        steered_logits(model_of("gpt2"), crosscoder, TOKENS, {})
    narrow = make_sae(W_enc=torch.zeros(8, 96, dtype=torch.float64))
    with pytest.raises(CacheMismatch, match="takes activations of width 8, the model gives 32"):
        steered_logits(model_of("gpt2"), narrow, TOKENS, {})
