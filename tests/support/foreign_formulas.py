"""SAEs of sparsify and dictionary_learning by the formulas of each class, in float64."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from support.foreign_saes import D_IN, D_SAE, SPARSIFY_KINDS, K
from trainer.sae.sae import SAE

U = 2.0**-24


def rows(n: int = 200) -> Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(11)) * 3 + 1


def by_hand(w: dict[str, Tensor], x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(feature_acts, x_hat) by the formulas of each class, in the dtype of w."""
    relu, linear = torch.relu, "encoder.weight" in w
    W_enc, W_dec = (w["encoder.weight"].T, w.get("W_dec")) if linear else (w["W_enc"], w["W_dec"])
    W_dec = w["decoder.weight"].T if "decoder.weight" in w else W_dec
    b_dec = next(w[name] for name in ("b_dec", "bias", "decoder_bias", "decoder.bias") if name in w)
    b_enc = w.get("encoder.bias", w.get("b_enc"))
    centres = kind not in ("AutoEncoderNew", "JumpReluAutoEncoder", "transcoder", "skip transcoder")
    u = (x - b_dec if centres else x) @ W_enc
    if kind == "GatedAutoEncoder":
        f = (u + w["gate_bias"] > 0) * relu(w["r_mag"].exp() * u + w["mag_bias"])
        return f, f @ W_dec + b_dec
    h = u + b_enc
    f = relu(h)
    if kind in ("AutoEncoderTopK", *SPARSIFY_KINDS):
        top = f.topk(K, dim=1)
        f = torch.zeros_like(f).scatter(1, top.indices, top.values)
    elif "threshold" in w:
        f = f * (h > w["threshold"])
    x_hat = f @ W_dec + b_dec + (x @ w["W_skip"].T if "W_skip" in w else 0.0)
    if kind == "AutoEncoder":  # load_dictionary brings decoder columns to norm 1, and the latents with them
        f = f * W_dec.norm(dim=1)
    return f, x_hat


def rounding(sae: SAE, x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """How far float32 may lie from the exact (feature_acts, x_hat): a dot product of n terms errs by (n + 2) u sum |ab|
    at most, u = 2^-24; a few more roundings are for scaled weights, norms and the exponential.
    """
    w = {name: getattr(sae, name).double() for name in ("W_enc", "W_dec", "b_dec")}
    biases = [getattr(sae, name) for name in ("b_enc", "b_gate", "b_mag") if getattr(sae, name) is not None]
    size = (x.abs() + w["b_dec"].abs() * sae.subtracts_b_dec) @ w["W_enc"].abs()
    acts = (D_IN + 12) * U * (size + torch.stack(biases).double().abs().amax(0))
    if sae.r_mag is not None:
        acts = acts * sae.r_mag.double().exp().clamp_min(1)
    through = acts * (f != 0) + (D_SAE + 6) * U * f
    out = through @ w["W_dec"].abs() + (D_SAE + 6) * U * w["b_dec"].abs()
    if sae.W_skip is not None:
        out = out + (D_IN + 6) * U * (x.abs() @ sae.W_skip.double().abs().T)
    return acts, out


def check(sae: SAE, tensors: dict[str, Tensor], kind: str, theirs: tuple[Tensor, Tensor] | None = None) -> None:
    """The SAE computes what the formulas do, and what the library did, where it is there."""
    x = rows()
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    f, x_hat = by_hand(exact, x.double(), kind)
    acts_error, x_hat_error = rounding(sae, x.double(), f)
    got = sae.reconstruct(x)
    assert torch.equal(got[0] != 0, f != 0), "no latent of these rows lies within rounding of the decision"
    assert ((got[0].double() - f).abs() <= acts_error).all()
    assert ((got[1].double() - x_hat).abs() <= x_hat_error).all()
    if theirs is not None:
        assert torch.equal(theirs[0] != 0, f != 0)
        assert ((theirs[0].double() - f).abs() <= acts_error).all()
        assert ((theirs[1].double() - x_hat).abs() <= x_hat_error).all()


def peer(name: str) -> Any:
    """The library, whose imports warn of much."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, exc_type=ImportError)
