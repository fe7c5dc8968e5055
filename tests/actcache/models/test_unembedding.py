"""The measured final norm and output head against the parameters of transformers' modules, and against its logits."""

import subprocess
import sys

import pytest
import torch
from support.places import CHILD
from support.reference import unit_roundoff
from support.tiny_models import D_MODEL, FAMILIES, LAYER_NORMED, N_LAYERS, make_model, make_tokenizer, norm_by_hand
from torch import nn

from actcache.errors import ModelError
from actcache.models.bridge import BridgeModel
from actcache.models.huggingface import HuggingFaceModel
from actcache.models.load import wrap_model
from actcache.models.unembedding import SMALL

LAST = f"blocks.{N_LAYERS - 1}.hook_resid_post"
TOKENS = torch.randint(0, 512, (2, 20), generator=torch.Generator().manual_seed(1))
BACKENDS = {"hf": HuggingFaceModel, "transformer_lens": BridgeModel}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_measured_norm_is_the_modules(family, dtype):
    """What is measured is gain + bias, rounded once by the product, once by the sum and once on the way to the dtype,
    from a normalised row that a few roundings may have moved; eps comes from a ratio with SMALL^2 + eps.
    """
    module = make_model(family, 512).to(dtype)
    got = wrap_model(module, make_tokenizer(), "tiny").unembedding()
    gain, bias, eps = norm_by_hand(module, family)
    u = unit_roundoff(family, dtype)
    assert got.is_centred is (family in LAYER_NORMED)
    assert torch.equal(got.bias, bias)
    assert ((got.gain - gain).abs() <= 8 * u * (gain.abs() + bias.abs())).all()
    assert abs(got.eps - eps) <= 64 * u * (SMALL**2 + eps) * float((gain.abs() + bias.abs()).max() / gain.abs().mean())
    assert got.W_U.data_ptr() == module.get_output_embeddings().weight.data_ptr(), "no copy"


ONE_DIRECTION = """
import torch
from actcache.machine.limits import resident_bytes
from actcache.models.unembedding import Unembedding

torch.set_num_threads(1)
W_U, zeros = torch.ones(1 << 19, 64), torch.zeros(64, dtype=torch.float64)
head = Unembedding(W_U=W_U, b_U=None, gain=zeros + 1, bias=zeros, eps=0.0, is_centred=False)
before, _ = resident_bytes(forget_peak=True)
v, constant = head.token_direction(3)
print(resident_bytes()[1] - before, int(v.count_nonzero()), constant)
"""


def test_a_token_direction_makes_no_copy_of_the_head():
    """128 MiB of it would be 256 in float64. In a process of its own, whose memory nothing else takes or gives back."""
    done = subprocess.run([sys.executable, "-c", ONE_DIRECTION], capture_output=True, text=True, env=CHILD, check=True)
    n_bytes, *direction = done.stdout.split()
    assert int(n_bytes) < 32 << 20
    assert direction == ["0", "0.0"], "the row is the mean row"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_makes_the_logits_of_the_stream(family, backend):
    """Within the roundings of one norm and one product over d_model. Gemma 2 caps its logits: a contraction."""
    module = make_model(family, 512).double()
    module.config.architectures = [type(module).__name__]  # as it is read from a directory
    model = BACKENDS[backend](module, make_tokenizer(), {"name": "tiny"})
    cap = getattr(module.config, "final_logit_softcapping", None)
    unembedding, logits = model.unembedding(), model.logits(TOKENS)
    x = model.activations(TOKENS, [LAST])[LAST]
    normed = unembedding.gain * unembedding.centred(x) / unembedding.scale(x)[..., None] + unembedding.bias
    got = normed @ unembedding.W_U.T + (0 if unembedding.b_U is None else unembedding.b_U)
    # the bridge computes norms itself, in the model's dtype or in float32
    u = 2.0**-24 if backend == "transformer_lens" else unit_roundoff(family, torch.float64)
    bound = (D_MODEL + 32) * u * (normed.abs() @ unembedding.W_U.abs().T)
    assert (((got if cap is None else cap * (got / cap).tanh()) - logits).abs() <= bound).all()
    assert float(bound.max()) < 1e-3 * float(logits.std())

    v, constant = unembedding.token_direction(7)
    relative = x @ v / unembedding.scale(x) + constant
    assert ((relative - (got[..., 7] - got.mean(-1))).abs() <= 512 * 2.0**-53 * got.abs().amax(-1)).all()


def test_a_head_with_a_bias_and_a_wrapped_norm():
    module = make_model("gpt2", 512).double()
    module.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, 512, dtype=torch.float64))
    plain = wrap_model(module, make_tokenizer(), "tiny").unembedding()
    assert torch.equal(plain.b_U, module.lm_head.bias.detach())
    module.transformer.ln_f = nn.Sequential(module.transformer.ln_f)
    assert torch.equal(wrap_model(module, make_tokenizer(), "tiny").unembedding().gain, plain.gain)
    v, constant = plain.token_direction(3)
    x = torch.linspace(-2, 3, D_MODEL, dtype=torch.float64)
    logits = module.lm_head(module.transformer.ln_f(x)).detach()
    assert float(x @ v / plain.scale(x)) + constant == pytest.approx(float(logits[3] - logits.mean()), rel=1e-12)


def test_something_else_than_a_norm_is_refused():
    module = make_model("llama", 512)
    module.model.norm = nn.Sequential(module.model.norm, nn.Tanh())
    with pytest.raises(ModelError, match="there must be one LayerNorm or RMSNorm, there is something else"):
        wrap_model(module.eval(), make_tokenizer(), "tiny").unembedding()
    module.model.norm = nn.Identity()
    with pytest.raises(ModelError, match="there must be one LayerNorm or RMSNorm"):
        wrap_model(module.eval(), make_tokenizer(), "tiny").unembedding()


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ModelError, match="has no output head to read directions with"):
        wrap_model(make_model("gpt2", 512).transformer, make_tokenizer(), "tiny").unembedding()


def test_no_hook_stays_behind():
    module = make_model("gpt2", 512)
    model = wrap_model(module, make_tokenizer(), "tiny")
    before = model.logits(TOKENS)
    model.unembedding()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert torch.equal(model.logits(TOKENS), before)
