"""SAEs that SAELens made, and what it takes for ours to equal them."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

D_IN, D_OUT, D_SAE, K, SCALE = 16, 12, 48, 5, 0.37
HOOK = "blocks.1.hook_resid_post"
VARIANTS = (
    *("standard", "topk", "abstopk", "jumprelu", "gated", "matching_pursuit", "topk rescaled", "abstopk rescaled"),
    *("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"),
)
METADATA = {"hook_name": HOOK, "model_name": "tiny", "context_size": 32, "neuronpedia_id": "tiny/1-res"}


def rows(n: int = 200) -> Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(11)) * 3 + 1


def their_sae(variant: str, **changes: object) -> Any:
    """An SAE of SAELens with random weights, with 16 channels and 48 latents."""
    import sae_lens

    architecture = variant.split()[0]
    is_transcoder = architecture.endswith("transcoder")
    cfg: dict[str, object] = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE}
    cfg |= {"apply_b_dec_to_input": not is_transcoder, "metadata": METADATA}
    if is_transcoder:
        cfg |= {"d_out": D_OUT, "metadata": {**METADATA, "hook_name_out": "blocks.1.hook_mlp_out"}}
    if architecture in ("topk", "abstopk"):
        cfg |= {"k": K, "rescale_acts_by_decoder_norm": variant.endswith("rescaled")}
    sae = sae_lens.SAE.from_dict(cfg | changes)
    fill_(sae)
    return sae


def fill_(module: torch.nn.Module) -> None:
    """Random weights and biases, thresholds above 0; decoder rows of norm 1 where pursuit needs them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            values = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            tensor.copy_(values.abs() if "threshold" in name else values)
        if "matching_pursuit" in module.cfg.architecture():
            module.W_dec /= module.W_dec.norm(dim=1, keepdim=True)


def equal_outputs(theirs: Any, ours: Any) -> None:
    """Bit for bit: the same operations in the same order on the same shapes."""
    x = rows()
    with torch.no_grad():
        feature_acts = theirs.encode(x)
        assert torch.equal(feature_acts, ours.encode(x))
        assert torch.equal(theirs.decode(feature_acts), ours.decode(feature_acts))
        assert torch.equal(theirs(x), ours.reconstruct(x)[1])


def equal_files(one: Path, other: Path) -> None:
    tensors, others = (load_file(folder / "sae_weights.safetensors") for folder in (one, other))
    assert set(tensors) == set(others)
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
