"""Initial weights, and the forward pass of every architecture against its definition in float64."""

import math

import pytest
import torch
from support.reference import FLOAT64
from support.sae_cases import definition, double_weights, rows
from support.tiny_saes import ARCHITECTURES, TOPK_FAMILY, TRANSCODERS, make_config
from torch import Tensor

from trainer.kernels.active import Workspace
from trainer.sae.architectures import DENSEST_SPARSE, SAEOutput, forward, initial_weights


def dense_acts(output: SAEOutput, d_sae: int) -> Tensor:
    if output.entries is None:
        return output.feature_acts
    f = output.feature_acts.new_zeros(len(output.x_hat), d_sae)
    f[output.entries.row, output.entries.latent] = output.feature_acts
    return f


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("b_enc", [0.0, -2.0], ids=["dense", "sparse"])
@pytest.mark.parametrize("batch", [1, 2, 37])
def test_forward_equals_the_definition(architecture: str, b_enc: float, batch: int) -> None:
    config = make_config(architecture)
    weights, x = double_weights(config, b_enc=b_enc), rows(batch, config.d_in)
    output = forward(config, weights, x, Workspace())
    f, x_hat = definition(config, weights, x)
    torch.testing.assert_close(dense_acts(output, config.d_sae).detach(), f, **FLOAT64)
    torch.testing.assert_close(output.x_hat.detach(), x_hat, **FLOAT64)
    assert output.firing_counts().tolist() == (f != 0).sum(0).tolist()


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in TOPK_FAMILY])
def test_few_active_latents_take_the_sparse_path(architecture: str) -> None:
    config = make_config(architecture)
    many, few = (double_weights(config, b_enc=b_enc) for b_enc in (0.0, -2.0))
    x = rows(37, config.d_in)
    assert forward(config, many, x, Workspace()).entries is None
    output = forward(config, few, x, Workspace())
    assert output.entries is not None
    assert 0 < len(output.entries.row) <= DENSEST_SPARSE * 37 * config.d_sae


@pytest.mark.parametrize("architecture", TOPK_FAMILY)
@pytest.mark.parametrize("k", [1, 48])
def test_k_may_be_1_or_d_sae(architecture: str, k: int) -> None:
    config = make_config(architecture, k=k)
    weights, x = double_weights(config), rows(5, config.d_in)
    output = forward(config, weights, x, Workspace())
    torch.testing.assert_close(output.x_hat.detach(), definition(config, weights, x)[1], **FLOAT64)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in TRANSCODERS])
def test_initial_weights(architecture: str) -> None:
    config = make_config(architecture, decoder_init_norm=0.25, seed=3)
    b_dec, state = torch.arange(16.0), torch.get_rng_state()
    weights = initial_weights(config, b_dec)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not touched"
    torch.testing.assert_close(weights["W_dec"].norm(dim=1), torch.full((48,), 0.25))
    assert torch.equal(weights["W_enc"], weights["W_dec"])
    assert weights["W_enc"].data_ptr() != weights["W_dec"].data_ptr()
    assert torch.equal(weights["b_dec"], b_dec)
    biases = ("b_gate", "b_mag", "r_mag") if architecture == "gated" else ("b_enc",)
    assert all(weights[name].count_nonzero() == 0 for name in biases)
    assert all(weight.is_leaf and weight.requires_grad and weight.dtype == torch.float32 for weight in weights.values())
    assert torch.equal(initial_weights(config, b_dec)["W_dec"], weights["W_dec"])
    assert not torch.equal(initial_weights(make_config(architecture, seed=4), b_dec)["W_dec"], weights["W_dec"])


@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_a_transcoder_begins_as_the_mean_of_what_it_predicts(architecture: str) -> None:
    config, b_dec = make_config(architecture, decoder_init_norm=0.5), torch.arange(12.0)
    sample = rows(200, 16).float() + 3.0
    weights = initial_weights(config, b_dec, x_mean=sample.mean(0))
    x_hat = forward(config, weights, sample, Workspace()).x_hat
    assert torch.equal(x_hat, b_dec.expand(200, -1))
    torch.testing.assert_close(weights["W_enc"].norm(dim=1), torch.full((48,), 0.5))
    # pre-activations of the mean row: a float32 sum of 16 products below 10
    at_mean = sample.mean(0) @ weights["W_enc"].T + weights["b_enc"]
    torch.testing.assert_close(at_mean, torch.zeros(48), rtol=0, atol=16 * 10 * 2**-24)


@pytest.mark.parametrize("rate", [0.01, 0.25, 0.5])
def test_b_enc_may_be_set_for_a_rate_of_firing(rate: float) -> None:
    config = make_config(
        "jumprelu", init_firing_rate=rate, decoder_init_norm=None, encoder_init_scale=0.3, jumprelu_init_threshold=0.1
    )
    sample = rows(1000, 16).float()
    weights = initial_weights(config, torch.zeros(16), sample=sample)
    counts = forward(config, weights, sample, Workspace()).firing_counts()
    assert (counts - round(1000 * rate)).abs().max() <= 1, "the row at the quantile may round to either side"
    assert torch.equal(weights["W_enc"], weights["W_dec"] * 0.3)
    assert weights["W_dec"].abs().max() <= 1 / 4
    # uniform in (-a, a): a variance of a^2 / 3, known to 5 standard errors of 768 draws
    assert abs(weights["W_dec"].var().item() * 48 - 1) < 5 * math.sqrt(4 / 5 / 768)


def test_jumprelu_starts_at_its_threshold() -> None:
    weights = initial_weights(make_config("jumprelu", jumprelu_init_threshold=0.02), torch.zeros(16))
    assert torch.equal(weights["threshold"], torch.full((48,), 0.02))


@pytest.mark.parametrize("offset", [0.0, 5.0])
@pytest.mark.parametrize("architecture", TOPK_FAMILY)
def test_an_encoder_in_bfloat16_keeps_what_one_in_float32_keeps(architecture: str, offset: float) -> None:
    """Among 4096 pre-activations many are equal in bfloat16. A large common part of x makes more of them equal.

    The kept latents are those of a float32 product, but for a pair that two orders of summing tell apart.
    """
    sizes = {"d_in": 64, "d_sae": 4096, "k": 32}
    widths = {"matryoshka_widths": (512, 4096)} if architecture == "matryoshka_batchtopk" else {}
    configs = [make_config(architecture, encoder_dtype=dtype, **sizes, **widths) for dtype in ("float32", "bfloat16")]
    weights = initial_weights(configs[0], torch.zeros(64))
    x = rows(64, 64).float() + offset * rows(1, 64, seed=3).float()
    exact, short = (forward(config, weights, x, Workspace()) for config in configs)
    kept = [{*zip(*(e.tolist() for e in (o.entries.row, o.entries.latent)), strict=True)} for o in (exact, short)]
    assert len(kept[0]) == len(kept[1]) == 64 * 32
    assert len(kept[0] - kept[1]) <= 1
    assert abs(sum(latent for _, latent in kept[0]) - sum(latent for _, latent in kept[1])) < 4096
    torch.testing.assert_close(short.x_hat, exact.x_hat, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", TOPK_FAMILY)
def test_an_encoder_in_bfloat16_chooses_and_float32_computes(architecture: str) -> None:
    """Where the k-th and the next pre-activation are further apart than bfloat16 errs, all is as with float32.

    Rounding x, W_enc and b_enc errs by 2^-9 of each, and the result by 2^-9 of it: in all by less than 2^-7 of the sum
    of the sizes of the products (a batch's k * batch-th of all entries for the batchtopk family).
    """
    config, x = make_config(architecture, encoder_dtype="bfloat16"), rows(64, 16).float()
    weights = {name: w.detach().float().requires_grad_() for name, w in double_weights(config).items()}
    output = forward(config, weights, x, Workspace())
    f, _ = definition(config, {name: w.double() for name, w in weights.items()}, x.double())
    got = dense_acts(output, config.d_sae).detach()
    centred = (x - weights["b_dec"]).detach()
    error = 2**-7 * (centred.abs() @ weights["W_enc"].detach().abs().T + weights["b_enc"].detach().abs())
    entries, size = f != 0, f.abs()
    by_row = config.architecture in ("topk", "abstopk")
    h = (centred @ weights["W_enc"].detach().T + weights["b_enc"].detach()).double()
    ranked = h.abs() if architecture == "abstopk" else h
    smallest = torch.where(entries, size, torch.inf).amin(1, keepdim=True)
    largest = torch.where(entries, -torch.inf, ranked).amax(1, keepdim=True)
    if not by_row:
        smallest, largest = smallest.amin(), largest.amax()
    doubtful = (ranked - (smallest + largest) / 2).abs() <= (smallest - largest) / 2 + error
    sure = ~doubtful if not by_row else ~((smallest - largest) <= 2 * error.amax(1, keepdim=True)).expand_as(f)
    assert sure.double().mean() > 0.5
    # a float32 sum of 16 products
    torch.testing.assert_close(got.double()[sure], f[sure], rtol=1e-5, atol=1e-5)
    output.x_hat.sum().backward()
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in weights.values())
