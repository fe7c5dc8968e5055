"""How similar the latents of one SAE are to those of others, by the cosines of their decoder directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from actcache.arguments import typed
from actcache.errors import CacheMismatch, ConfigError
from actcache.machine.limits import require_memory_for_array
from trainer.features.logit_lens import check_latents, in_parts
from trainer.sae.sae import SAE


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SimilarFeatures:
    """For some latents of one SAE, the latents of another SAE with the nearest decoder directions.

    Attributes:
        latents: the latents of the other SAE, nearest first, on the CPU.
        cosines: the cosines of their directions, on the CPU.
    """

    latents: Int64[Tensor, "latent n"]
    cosines: Float[Tensor, "latent n"]


@torch.no_grad()
def similar_features(a: SAE, b: SAE, n: int = 1, *, latents: Sequence[int] | None = None) -> SimilarFeatures:
    """For each of `latents` of `a`, the `n` latents of `b` whose decoder rows have the largest cosine with its own.

    128 rows of `a` at a time are compared with all rows of `b`. This holds two matrices [128, d_sae of b] and one copy
    of b's decoder in memory. A row of zeros has cosine 0 with every other row.

    Args:
        a: the SAE whose latents are looked up.
        b: the SAE in which they are looked for.
        n: how many latents of `b` to return for each.
        latents: which latents of `a`; None for all.

    Raises:
        CacheMismatch: the decoders have different widths.
        ConfigError: n is outside [1, d_sae of b], or a latent is not one of `a`.
        MemoryError: the SAEs are on a CPU that has no room for the copy.
    """
    chosen = range(a.d_sae) if latents is None else latents
    check_latents(a, chosen)
    if a.d_out != b.d_out:
        raise CacheMismatch(
            f"similar: both SAEs must reconstruct activations of one width, got {a.d_out} and {b.d_out}; compare SAEs "
            "of one hook"
        )
    if not 1 <= typed("similar", "n", n, int) <= b.d_sae:
        raise ConfigError(f"similar: n must be in [1, d_sae={b.d_sae}], got {n}")
    if a.device.type == "cpu":
        require_memory_for_array(b.W_dec.numel() * torch.float32.itemsize, "a copy of a decoder")
    others = _unit_rows(b.W_dec.to(a.device)).T
    tops = [(_unit_rows(a.W_dec[list(part)]) @ others).topk(n) for part in in_parts(chosen)]
    return SimilarFeatures(
        latents=torch.cat([top.indices for top in tops]).cpu(), cosines=torch.cat([top.values for top in tops]).cpu()
    )


def stability(saes: Sequence[SAE]) -> Float[Tensor, " d_sae"]:
    """How surely each latent of the first SAE is found in the others, which were trained with other seeds.

    It is the largest cosine of the latent's decoder row with a row of another SAE, as a mean over the other SAEs. Its
    mean over latents is the MMCS of Sharkey et al. 2022 ("Taking features out of superposition with sparse
    autoencoders"). A latent with 1 is in every SAE. Random directions reach about sqrt(2 ln(d_sae) / d_in).

    Raises:
        ConfigError: there are fewer than two SAEs.
        CacheMismatch: their decoders have different widths.
    """
    if len(saes) < 2:
        raise ConfigError(f"stability: needs SAEs of at least two seeds, got {len(saes)}")
    first, *others = saes
    return torch.stack([similar_features(first, other).cosines[:, 0] for other in others]).mean(0)


def _unit_rows(W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "d_sae d_out"]:
    return torch.nn.functional.normalize(W_dec.to(torch.promote_types(W_dec.dtype, torch.float32)), dim=1)
