"""What one stage hands to the next: TokenBatch -> ActivationBatch -> (shard on disk) -> Batch. Read this first.

Every type here is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Int32
from torch import Tensor

SPLITS = ("train", "validation")
# the way out wherever held-out rows are needed and there are none
HOLD_OUT_MORE = (
    "harvest with a larger --holdout, with more documents, or with --sample-by line where a text file is one document"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Consecutive packed sequences of one split, on their way into the language model.

    token_ids: int32, one row a sequence of `context_size` tokens.
    first_sequence: number, within the split, of the first of these sequences.
    """

    token_ids: Int32[np.ndarray, "sequence position"]
    first_sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationBatch:
    """The activations of one TokenBatch at one hook.

    x: activations on the model's device, in the model's dtype.
    first_token: flat token number, within the split, of x[0, 0].
    """

    hook_name: str
    x: Float[Tensor, "sequence position d_in"]
    first_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Shuffled rows on their way into the SAEs. Every hook has the same rows in the same order.

    x: hook_name -> activations in the stored dtype (bfloat16, float16 or float32), on the loader's device.
    row: number of each row within the split, shared by all hooks of the cache.
    step: number of this batch since the start of the stream, from 0.
    token_id, document, sequence, position: for each row's token its id, the index of its document in the dataset, the
        number of its packed sequence, and its position there; None if the loader was not asked for the field.
    cache: for each row of a mixture the number of the cache that it comes from; None if there is one cache.
    """

    x: dict[str, Float[Tensor, "batch d_in"]]
    row: Int[Tensor, " batch"]
    step: int
    token_id: Int[Tensor, " batch"] | None = None
    document: Int[Tensor, " batch"] | None = None
    sequence: Int[Tensor, " batch"] | None = None
    position: Int[Tensor, " batch"] | None = None
    cache: Int[Tensor, " batch"] | None = None
