"""Loss and gradients of every architecture against the definitions in float64."""

import pytest
import torch
from support.reference import FLOAT64, loss_and_gradients_reference
from support.sae_cases import double_weights, rows, targets
from support.tiny_saes import ARCHITECTURES, TOPK_FAMILY, make_config
from torch import Tensor

from trainer.config.settings import SAEConfig
from trainer.kernels.active import Workspace
from trainer.sae.architectures import forward
from trainer.sae.losses import LossTerms, loss_terms


def some_dead(n_dead: int, d_sae: int = 48) -> Tensor:
    """A mask of latents spread over the width."""
    dead = torch.zeros(d_sae, dtype=torch.bool)
    dead[torch.linspace(1, d_sae - 1, n_dead).long()] = True
    return dead


def terms(
    config: SAEConfig, weights: dict[str, Tensor], x: Tensor, *, coefficient: float = 0.0, dead: Tensor | None = None
) -> LossTerms:
    workspace = Workspace()
    return loss_terms(
        config,
        weights,
        targets(config, x),
        forward(config, weights, x, workspace),
        sparsity_coefficient=coefficient,
        dead=some_dead(0) if dead is None else dead,
        workspace=workspace,
    )


def assert_equals_the_definition(
    config: SAEConfig, b_enc: float, batch: int, *, coefficient: float = 0.0, dead: Tensor | None = None
) -> None:
    weights, x = double_weights(config, b_enc=b_enc), rows(batch, config.d_in)
    loss = terms(config, weights, x, coefficient=coefficient, dead=dead).total
    loss.backward()
    expected, gradients = loss_and_gradients_reference(
        config,
        {name: w.detach() for name, w in weights.items()},
        x,
        y=targets(config, x),
        sparsity_coefficient=coefficient,
        dead=dead,
    )
    torch.testing.assert_close(loss.detach(), expected, **FLOAT64)
    for name, weight in weights.items():
        torch.testing.assert_close(weight.grad, gradients[name], msg=lambda t, name=name: f"{name}: {t}", **FLOAT64)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("b_enc", [0.0, -2.0], ids=["dense", "sparse"])
@pytest.mark.parametrize("batch", [1, 2, 37])
def test_loss_and_gradients_equal_the_definition(architecture: str, b_enc: float, batch: int) -> None:
    bandwidth = 0.3 if architecture == "jumprelu" else None  # wide: the straight-through window is well populated
    config = make_config(architecture, total_variance=3.0, jumprelu_bandwidth=bandwidth)
    coefficient = 0.0 if architecture in TOPK_FAMILY else 0.7
    assert_equals_the_definition(config, b_enc, batch, coefficient=coefficient)


JUMPRELU_MODES = {
    "tanh": {"jumprelu_tanh_scale": 4.0, "pre_act_loss_coefficient": 0.01},
    "tanh, nothing silent": {"jumprelu_tanh_scale": 4.0, "pre_act_loss_coefficient": 0.0},
    "quadratic": {"target_l0": 7.0},
}


@pytest.mark.parametrize("mode", JUMPRELU_MODES)
@pytest.mark.parametrize("b_enc", [0.0, -2.0], ids=["dense", "sparse"])
@pytest.mark.parametrize("batch", [1, 37])
def test_every_penalty_of_jumprelu_equals_its_definition(mode: str, b_enc: float, batch: int) -> None:
    name = mode.partition(",")[0]
    config = make_config("jumprelu", jumprelu_bandwidth=0.3, jumprelu_sparsity_loss_mode=name, **JUMPRELU_MODES[mode])
    assert config.has_unit_norm_decoder == (name != "tanh")
    assert_equals_the_definition(config, b_enc, batch, coefficient=0.7)


@pytest.mark.parametrize("architecture", TOPK_FAMILY)
@pytest.mark.parametrize("n_dead", [1, 7, 8, 30, 48])
@pytest.mark.parametrize("batch", [1, 19])
def test_aux_k_equals_the_definition(architecture: str, n_dead: int, batch: int) -> None:
    config = make_config(architecture, aux_coefficient=0.25, k_aux=8, total_variance=3.0)
    assert_equals_the_definition(config, 0.0, batch, dead=some_dead(n_dead))


def test_aux_k_reaches_the_encoder_of_dead_latents() -> None:
    config = make_config("topk", k=1, aux_coefficient=1.0, k_aux=4)
    weights, x, dead = double_weights(config), rows(9, config.d_in), some_dead(4)
    with torch.no_grad():
        weights["b_enc"][0] += 100.0  # one latent takes every row's single place
    terms(config, weights, x, dead=dead).total.backward()
    assert (weights["W_enc"].grad[dead].norm(dim=1) > 0).all()
    assert (weights["W_dec"].grad[dead].norm(dim=1) > 0).all()


def test_where_none_can_be_dead_none_is() -> None:
    config = make_config("topk", aux_coefficient=1.0, k_aux=8)
    weights, x, workspace = double_weights(config), rows(3, 16), Workspace()
    output = forward(config, weights, x, workspace)
    unknown, none = (
        loss_terms(config, weights, x, output, sparsity_coefficient=0.0, dead=dead, workspace=workspace)
        for dead in (None, some_dead(0))
    )
    assert unknown.aux.item() == none.aux.item() == 0.0
    assert torch.equal(unknown.total, none.total)


@pytest.mark.parametrize(("aux_coefficient", "k_aux"), [(0.0, 8), (1.0, 0)])
def test_aux_k_can_be_off(aux_coefficient: float, k_aux: int) -> None:
    config = make_config("topk", aux_coefficient=aux_coefficient, k_aux=k_aux)
    assert terms(config, double_weights(config), rows(3, 16), dead=some_dead(5)).aux.item() == 0.0


def test_aux_k_of_a_perfect_reconstruction_is_zero_and_finite() -> None:
    config = make_config("topk", aux_coefficient=1.0, k_aux=8)
    weights = double_weights(config)
    x = weights["b_dec"].detach().expand(3, -1)
    with torch.no_grad():
        weights["b_enc"].fill_(-1.0)  # nothing fires, so x_hat = b_dec = x
    loss = terms(config, weights, x, dead=some_dead(5))
    loss.total.backward()
    assert loss.total.item() == 0.0
    assert all(weight.grad.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_terms_add_up(architecture: str) -> None:
    config = make_config(architecture, total_variance=2.0)
    loss = terms(config, double_weights(config), rows(5, 16), coefficient=0.5)
    torch.testing.assert_close(loss.total, loss.reconstruction + loss.sparsity + loss.aux)
    if architecture != "matryoshka_batchtopk":  # whose prefixes all count
        torch.testing.assert_close(loss.reconstruction, loss.mse / (2.0 if architecture in TOPK_FAMILY else 1.0))
