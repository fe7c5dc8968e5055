"""Metrics of a reconstruction: one definition of each, under SAELens' names, summed in float64.

`ReconstructionSums` holds the sums over a whole split, so that no metric depends on how the rows were cut into batches.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

SMALLEST_NORM = 1e-4  # where ||x|| is smaller, SAELens divides ||x_hat|| by 1 instead
COUNTED_AT_ONCE = 1 << 18  # activations; a CPU counts so many without leaving its cache
RESOLUTION = 1e-12  # share of E||x||^2 below which a float64 difference of sums is rounding, not variance


def explained_variance(x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"]) -> float:
    """1 - E||x - x_hat||^2 / (E||x||^2 - ||E x||^2) over the rows of one batch, in float64.

    This is SAELens' `explained_variance`. The means run over rows and the norms over d_in, so it is one ratio for all
    channels and not a mean of ratios per channel. 1 is perfect. 0 is what the mean of x would reach, and a negative
    value is worse than that. Where the rows have no variance it is 1.0 if x_hat equals x, else 0.0.

    Raises:
        ValueError: there are no rows.
    """
    n_rows = _n_rows(x, "explained_variance")
    wide = x.double()
    return _explained_variance(
        n_rows, wide.sum(0), float(wide.square().sum()), float((wide - x_hat.double()).square().sum())
    )


def ce_loss_score(*, ce_loss_without_sae: float, ce_loss_with_sae: float, ce_loss_with_ablation: float) -> float | None:
    """(CE_ablated - CE_sae) / (CE_ablated - CE_original): the share of zero ablation's harm that is won back.

    This is SAELens' `ce_loss_score`, and "loss recovered" of Rajamanoharan et al. 2024 (arXiv:2404.16014). The losses
    are means per token in nats. 1 is the original model and 0 is zero ablation. The score is None where ablation leaves
    the loss as it was, because it then has no scale.
    """
    lost = ce_loss_with_ablation - ce_loss_without_sae
    return None if lost == 0.0 else (ce_loss_with_ablation - ce_loss_with_sae) / lost


def kl_div_score(*, kl_div_with_sae: float, kl_div_with_ablation: float) -> float | None:
    """(KL_ablated - KL_sae) / KL_ablated, where KL is the mean per token of KL(original || new) in nats.

    This is SAELens' `kl_div_score`. 1 is the original model and 0 is zero ablation. The score is None where ablation
    changes no prediction.
    """
    return None if kl_div_with_ablation == 0.0 else (kl_div_with_ablation - kl_div_with_sae) / kl_div_with_ablation


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconstructionSums:
    """Sums over rows of one SAE's reconstruction, in float64. Every metric of the whole split follows from them.

    `of` makes the sums of one batch, and `merge` adds two of them. The order of merging changes a metric by rounding
    alone.
    """

    n_rows: int
    x: Float[Tensor, " d_in"]  # sum of x
    square_norm: float  # sum of ||x||^2
    square_norm_hat: float  # sum of ||x_hat||^2
    dot: float  # sum of <x, x_hat>
    square_error: float  # sum of ||x - x_hat||^2
    cosine: float  # sum of <x, x_hat> / (||x|| ||x_hat||)
    norm_ratio: float  # sum of ||x_hat|| / ||x||
    absolute: float  # sum of |f| over latents too
    fired: Int[Tensor, " d_sae"]  # int64, number of rows in which each latent is active

    @classmethod
    def of(
        cls,
        x: Float[Tensor, "batch d_in"],
        feature_acts: Float[Tensor, "batch d_sae"],
        x_hat: Float[Tensor, "batch d_in"],
    ) -> "ReconstructionSums":
        """The sums of one batch. They are made on its device and returned on the CPU.

        Raises:
            ValueError: there are no rows.
        """
        n_at_once = len(feature_acts) if feature_acts.is_cuda else COUNTED_AT_ONCE // feature_acts.shape[1]
        parts = feature_acts.split(max(1, n_at_once))
        absolute = sum(float(part.abs().sum(dtype=torch.float64)) for part in parts)
        fired = torch.stack([(part != 0).sum(0) for part in parts]).sum(0)
        return cls.counted(x, x_hat, absolute=absolute, fired=fired)

    @classmethod
    def counted(
        cls,
        x: Float[Tensor, "batch d_in"],
        x_hat: Float[Tensor, "batch d_in"],
        *,
        absolute: float,
        fired: Int[Tensor, " d_sae"],
    ) -> "ReconstructionSums":
        """As `of`, from counts of the activations instead of a [batch, d_sae] matrix of them.

        Args:
            x: what was to be reconstructed.
            x_hat: its reconstruction.
            absolute: the sum of |f| over the batch and the latents.
            fired: in how many rows each latent is active, int64.

        Raises:
            ValueError: there are no rows.
        """
        n_rows = _n_rows(x, "ReconstructionSums")
        x, x_hat = x.double(), x_hat.double()
        norm, norm_hat, dot = x.norm(dim=1), x_hat.norm(dim=1), (x * x_hat).sum(1)  # (batch,)
        lengths = norm * norm_hat
        divisor = torch.where(norm < SMALLEST_NORM, torch.ones_like(norm), norm)
        return cls(
            n_rows=n_rows,
            x=x.sum(0).cpu(),
            square_norm=float(x.square().sum()),
            square_norm_hat=float(x_hat.square().sum()),
            dot=float(dot.sum()),
            square_error=float((x - x_hat).square().sum()),
            cosine=float(torch.where(lengths > 0, dot / lengths.clamp_min(torch.finfo(torch.float64).tiny), 0.0).sum()),
            norm_ratio=float((norm_hat / divisor).sum()),
            absolute=absolute,
            fired=fired.cpu(),
        )

    @property
    def is_worse_than_zeros(self) -> bool:
        """Whether x_hat is farther from x than zeros are: sum ||x - x_hat||^2 > sum ||x||^2, or not finite.

        An explained variance below 0 says less: that of zeros is -||E x||^2 / Var x, often far below 0.
        """
        return not self.square_error <= self.square_norm

    def merge(self, other: "ReconstructionSums") -> "ReconstructionSums":
        """The sums over the rows of both, which must be of the same SAE."""
        return ReconstructionSums(
            n_rows=self.n_rows + other.n_rows,
            x=self.x + other.x,
            square_norm=self.square_norm + other.square_norm,
            square_norm_hat=self.square_norm_hat + other.square_norm_hat,
            dot=self.dot + other.dot,
            square_error=self.square_error + other.square_error,
            cosine=self.cosine + other.cosine,
            norm_ratio=self.norm_ratio + other.norm_ratio,
            absolute=self.absolute + other.absolute,
            fired=self.fired + other.fired,
        )

    @property
    def explained_variance(self) -> float:
        """1 - E||x - x_hat||^2 / (E||x||^2 - ||E x||^2) over all rows (SAELens `explained_variance`)."""
        return _explained_variance(self.n_rows, self.x, self.square_norm, self.square_error)

    @property
    def mse(self) -> float:
        """E||x - x_hat||^2, a sum over d_in and a mean over rows (SAELens' `mse`)."""
        return self.square_error / self.n_rows

    @property
    def cossim(self) -> float:
        """E[<x, x_hat> / (||x|| ||x_hat||)] (SAELens' `cossim`). A row of zeros counts 0, where SAELens gets NaN."""
        return self.cosine / self.n_rows

    @property
    def l2_ratio(self) -> float:
        """E[||x_hat|| / ||x||] (SAELens' `l2_ratio`). Below 1, x shrinks. Where ||x|| < 1e-4 the divisor is 1."""
        return self.norm_ratio / self.n_rows

    @property
    def relative_reconstruction_bias(self) -> float | None:
        """E||x_hat||^2 / E<x, x_hat>. 1 is unbiased; below 1 the SAE shrinks x.

        Rajamanoharan et al. 2024 (arXiv:2404.16014), equation 10. It is one ratio over all rows, where SAELens
        takes the mean of its batches' ratios. It is None where E<x, x_hat> is 0, as it is where x_hat is all zeros.
        """
        return None if self.dot == 0.0 else self.square_norm_hat / self.dot

    @property
    def l0(self) -> float:
        """Mean number of active latents per row (SAELens' `l0`). Signed activations count too."""
        return int(self.fired.sum()) / self.n_rows

    @property
    def l1(self) -> float:
        """Mean over rows of sum_i |f_i|, without decoder norms (SAELens' `l1`)."""
        return self.absolute / self.n_rows

    @property
    def feature_density(self) -> Float[Tensor, " d_sae"]:
        """Share of the rows in which each latent is active, float64 in [0, 1] (SAELens' `feature_density`)."""
        return self.fired.double() / self.n_rows

    @property
    def dead_fraction(self) -> float:
        """Share of the latents that are active in none of these rows. With few rows, rare latents look dead."""
        return int((self.fired == 0).sum()) / len(self.fired)


def _n_rows(x: Tensor, who: str) -> int:
    if len(x) == 0:
        raise ValueError(f"{who}: a mean needs at least 1 row, got shape {tuple(x.shape)}; pass a batch with rows")
    return len(x)


def _explained_variance(n_rows: int, sum_x: Float[Tensor, " d_in"], square_norm: float, square_error: float) -> float:
    mean_square_norm = square_norm / n_rows
    total_variance = mean_square_norm - float((sum_x / n_rows).square().sum())
    mse = square_error / n_rows
    if total_variance <= RESOLUTION * mean_square_norm:
        return 1.0 if mse <= RESOLUTION * mean_square_norm else 0.0
    return 1.0 - mse / total_variance
