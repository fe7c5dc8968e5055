"""What the tests of kernels share: float64 rows, and masks of active entries."""

import torch
from torch import Tensor

from trainer.kernels.active import ActiveEntries


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kept_of(mask: Tensor) -> ActiveEntries:
    row, latent = mask.nonzero(as_tuple=True)
    return ActiveEntries.of(row, latent, batch=mask.shape[0], d_sae=mask.shape[1])


MASKS = {
    "one_row": torch.ones(1, 5, dtype=torch.bool),
    "one_entry": torch.tensor([[False, True, False]]),
    "nothing": torch.zeros(3, 4, dtype=torch.bool),
    "empty_rows": torch.tensor([[False] * 4, [True, False, True, True], [False] * 4, [False, False, True, False]]),
    "everything": torch.ones(7, 9, dtype=torch.bool),
    "random": torch.rand(33, 17, generator=torch.Generator().manual_seed(1)) < 0.2,
}
