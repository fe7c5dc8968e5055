"""The sparse path against dense float64 products."""

import pytest
import torch
from support.kernel_cases import MASKS, kept_of, random
from support.reference import FLOAT64

from trainer.kernels import select, sparse
from trainer.kernels.active import ActiveEntries, Workspace


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("subtracts_b_dec", [False, True])
def test_a_sparse_autoencoder_has_the_dense_values_and_gradients(name: str, subtracts_b_dec: bool) -> None:
    mask, d_in = MASKS[name], 6
    batch, d_sae = mask.shape
    x, target = random(batch, d_in), random(batch, d_in, seed=2)
    values = {"W_enc": random(d_sae, d_in, seed=3), "b_enc": random(d_sae, seed=4)}
    values |= {"W_dec": random(d_sae, d_in, seed=5), "b_dec": random(d_in, seed=6)}
    ours, dense = ({key: value.clone().requires_grad_() for key, value in values.items()} for _ in range(2))

    encoder_input = dense["b_dec"].neg() + x if subtracts_b_dec else x
    f = (encoder_input @ dense["W_enc"].T + dense["b_enc"]) * mask
    dense_x_hat = f @ dense["W_dec"] + dense["b_dec"]
    (dense_x_hat * target).sum().backward()

    entries = kept_of(mask)
    b_dec = ours["b_dec"] if subtracts_b_dec else None
    acts = sparse.active_pre_acts(
        f.detach()[mask], entries, encoder_input.detach(), ours["W_enc"], ours["b_enc"], b_dec
    )
    x_hat = sparse.sparse_decode(acts, entries, ours["W_dec"]) + ours["b_dec"]
    (x_hat * target).sum().backward()

    torch.testing.assert_close(x_hat, dense_x_hat, **FLOAT64)
    for key, weight in ours.items():
        torch.testing.assert_close(weight.grad, dense[key].grad, msg=lambda text, key=key: f"{key}: {text}", **FLOAT64)


@pytest.mark.parametrize("subtracts_b_dec", [False, True])
def test_dense_pre_acts_have_the_gradients_of_the_product(subtracts_b_dec: bool) -> None:
    x, upstream = random(5, 3), random(5, 7, seed=1)
    leaves = [random(7, 3, seed=2), random(7, seed=3), *([random(3, seed=4)] if subtracts_b_dec else [])]
    W_enc, b_enc, *rest = (leaf.requires_grad_() for leaf in leaves)
    encoder_input = x - rest[0] if rest else x
    expected = torch.autograd.grad(encoder_input @ W_enc.T + b_enc, leaves, upstream)
    pre_acts = select.encoder_pre_acts(encoder_input, W_enc, b_enc, Workspace())
    dense = sparse.dense_pre_acts(pre_acts, encoder_input.detach(), W_enc, b_enc, rest[0] if rest else None)
    got = torch.autograd.grad(dense, leaves, upstream)
    torch.testing.assert_close(got, expected, **FLOAT64)


def test_a_detached_decoder_gets_no_gradient() -> None:
    entries, W_dec = kept_of(MASKS["random"]), random(17, 6).requires_grad_()
    values = random(len(entries.row), seed=3).requires_grad_()
    sparse.sparse_decode(values, entries, W_dec.detach()).sum().backward()
    assert W_dec.grad is None
    torch.testing.assert_close(values.grad, W_dec.detach().sum(1)[entries.latent], **FLOAT64)


@pytest.mark.parametrize("name", MASKS)
def test_pre_acts_of_the_kept_entries_alone(name: str) -> None:
    mask, d_in = MASKS[name], 6
    x, W_enc, b_enc = random(mask.shape[0], d_in), random(mask.shape[1], d_in, seed=3), random(mask.shape[1], seed=4)
    got = sparse.entry_pre_acts(kept_of(mask), x, W_enc, b_enc)
    torch.testing.assert_close(got, (x @ W_enc.T + b_enc)[mask], **FLOAT64)


def test_pre_acts_of_entries_in_no_order_within_their_row() -> None:
    x, W_enc, b_enc = random(9, 6), random(17, 6, seed=3), random(17, seed=4)
    latents = torch.stack([torch.randperm(17, generator=torch.Generator().manual_seed(row))[:5] for row in range(9)])
    entries = ActiveEntries.of(torch.arange(9).repeat_interleave(5), latents.flatten(), batch=9, d_sae=17)
    got = sparse.entry_pre_acts(entries, x, W_enc, b_enc)
    torch.testing.assert_close(got.view(9, 5), (x @ W_enc.T + b_enc).gather(1, latents), **FLOAT64)
