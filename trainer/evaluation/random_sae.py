"""A random dictionary as a baseline for SAEs: how much as many latents explain when nobody has trained them."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from actcache.flow import Batch
from trainer.evaluation.downstream_loss import piece_rows
from trainer.sae.sae import SAE


def random_sae(
    batches: Iterable[Batch], hook_name: str, mean: Float[Tensor, " d_in"], *, d_sae: int, k: int, seed: int = 0
) -> SAE:
    """A TopK SAE whose latents have random directions, W_dec with rows of one length and W_enc its transpose.

    x_hat = mean + sum of ReLU of the k largest <x - mean, d_i>, times d_i. The directions are Gaussian. Two things are
    fitted, so that the baseline is not weak for want of them: b_dec is the mean, and the length of the rows is the one
    with the smallest squared error on the batches. With rows of length 1, let r be x_hat - mean. Then rows of length
    sqrt(c) give c r, and the best c is E<x - mean, r> / E||r||^2.

    Args:
        batches: rows of the hook, to which the length is fitted.
        hook_name: the hook.
        mean: the mean of the hook's rows.
        d_sae: number of latents.
        k: active latents of a row, at most; k <= d_sae.
        seed: of the directions.

    Returns:
        A float32 SAE on the device of `mean`. Its `training_architecture` is "random".
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(d_sae, len(mean), generator=generator)).to(mean.device)
    unit = _sae(hook_name, directions, mean, k)
    dot, square = 0.0, 0.0
    for batch in batches:
        for x in batch.x[hook_name].split(piece_rows(d_sae)):
            r = unit.reconstruct(x)[1].double() - mean
            dot += float(((x.double() - mean) * r).sum())
            square += float(r.square().sum())
    return _sae(hook_name, directions * (dot / square) ** 0.5 if square else directions, mean, k)


def _sae(hook_name: str, W_dec: Float[Tensor, "d_sae d_in"], b_dec: Float[Tensor, " d_in"], k: int) -> SAE:
    return SAE(
        architecture="topk",
        hook_name=hook_name,
        W_enc=W_dec.T,  # a view, so that both take the memory of one
        W_dec=W_dec,
        b_dec=b_dec,
        k=k,
        subtracts_b_dec=True,
        metadata={"training_architecture": "random"},
    )
