"""Principal components as a baseline for SAEs: how much the same number of dense directions explains."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor

from actcache.arguments import typed
from actcache.flow import Batch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PCA:
    """The leading principal directions of a hook. It has the methods and sizes of an `SAE`.

    feature_acts = (x - mean) components^T and x_hat = feature_acts components + mean, in the components' dtype. On the
    rows that it was fitted on, no other linear map of this rank has a smaller squared error (Eckart and Young 1936).
    """

    hook_name: str
    mean: Float[Tensor, " d_in"]
    components: Float[Tensor, "n_components d_in"]  # orthonormal rows, the largest variance first
    n_rows: int  # how many rows it was fitted on

    @property
    def architecture(self) -> str:
        """What tells it from the SAEs."""
        return "pca"

    @property
    def k(self) -> int:
        """How many components are active on a row: all of them."""
        return self.d_sae

    @property
    def input_hooks(self) -> tuple[str, ...]:
        """The hook whose activations are x."""
        return (self.hook_name,)

    @property
    def output_hooks(self) -> tuple[str, ...]:
        """The hook whose activations x_hat reconstructs: the same one."""
        return (self.hook_name,)

    @property
    def d_in(self) -> int:
        """Width of x."""
        return self.components.shape[1]

    @property
    def d_out(self) -> int:
        """Width of x_hat."""
        return self.d_in

    @property
    def d_sae(self) -> int:
        """Number of components."""
        return self.components.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the components. x must be there too."""
        return self.components.device

    def takes(self, width: int) -> bool:
        """Whether activations of this width are those of the hook."""
        return width == self.d_in

    gives = takes

    def own_channels(self, width: int) -> None:
        """All channels of the hook."""
        return

    def target(self, y: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """What x_hat reconstructs: all of the activation."""
        return y

    def placed(self, y: Float[Tensor, "*batch d_in"], x_hat: Float[Tensor, "*batch d_in"]) -> Tensor:
        """x_hat, which takes the place of all of the activation y."""
        return x_hat

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch n_components"]:
        """The coordinates of x along the components. They have either sign."""
        return (x.to(self.components.dtype) - self.mean) @ self.components.T

    def decode(self, feature_acts: Float[Tensor, "batch n_components"]) -> Float[Tensor, "batch d_in"]:
        """The point of the affine subspace with these coordinates."""
        return feature_acts @ self.components + self.mean

    def reconstruct(self, x: Float[Tensor, "batch d_in"]) -> tuple[Tensor, Float[Tensor, "batch d_in"]]:
        """(coordinates, x_hat)."""
        feature_acts = self.encode(x)
        return feature_acts, self.decode(feature_acts)

    def leading(self, n_components: int) -> "PCA":
        """The PCA with the first n_components alone. It equals a fit of so few components.

        Raises:
            ValueError: n_components is outside [1, d_sae].
        """
        _check_components(n_components, self.d_sae)
        return PCA(
            hook_name=self.hook_name, mean=self.mean, components=self.components[:n_components], n_rows=self.n_rows
        )


def fit_pca(batches: Iterable[Batch], hook_name: str, n_components: int) -> PCA:
    """Fit principal components in one pass over batches.

    The pass sums x - shift and its outer products in float64. Then the covariance is decomposed. The shift is the mean
    of the first batch; it keeps the sums small where channels have a large mean. Memory is two d_in x d_in float64
    matrices, whatever the number of rows. The components are float32, on the batches' device.

    Args:
        batches: rows of the hook.
        hook_name: the hook.
        n_components: how many components to return.

    Raises:
        ValueError: there are no rows, or n_components is outside [1, d_in].
    """
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise ValueError(f"fit_pca: needs at least one batch of {hook_name}, got none; pass batches with rows")
    shift = first.x[hook_name].double().mean(0)
    _check_components(n_components, len(shift))
    n_rows, total, products = 0, torch.zeros_like(shift), torch.outer(shift, shift).zero_()
    for batch in chain([first], stream):
        x = batch.x[hook_name].double() - shift
        n_rows += len(x)
        total += x.sum(0)
        products.addmm_(x.T, x)
    offset = total / n_rows
    vectors = torch.linalg.eigh(
        products / n_rows - torch.outer(offset, offset)
    ).eigenvectors  # the smallest variance first
    components = vectors.flip(1)[:, :n_components].T.float().contiguous()
    return PCA(hook_name=hook_name, mean=(shift + offset).float(), components=components, n_rows=n_rows)


def _check_components(n_components: int, most: int) -> None:
    if not 1 <= typed("pca", "n_components", n_components, int) <= most:
        raise ValueError(f"pca: n_components must be in [1, {most}], got {n_components}; pick fewer components")
