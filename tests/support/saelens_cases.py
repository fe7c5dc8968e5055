"""SAEs in SAELens' directory format, and rows for them."""

from pathlib import Path

import torch
from torch import Tensor

from support.tiny_saes import make_config, make_weights
from trainer.formats.saelens import save_inference_sae

D_IN, D_SAE, K, SCALE = 16, 48, 5, 0.37  # of the configs that make_config gives
METADATA = {"model_name": "tiny", "dataset_path": "text", "context_size": 32, "prepend_bos": True}


def raw_activations(n: int = 200) -> Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(11)) * 3 + 1


def save(tmp_path: Path, architecture: str, **changes: object) -> Path:
    config = make_config(architecture, **changes)
    return save_inference_sae(config, make_weights(architecture), tmp_path / "run" / "sae", metadata=METADATA)
