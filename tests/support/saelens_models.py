"""One tiny GPT-2, as transformers runs it, and as HookedTransformer does: raw, or processed as it is by default."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from support.tiny_models import D_MODEL, N_LAYERS, make_model, make_tokenizer

N_HEADS = 4
# Two orders of summation differ by 2^-53 for each of the terms that are added up; on the way to a logit these are fewer
# than 10^4 (three blocks of at most 4 * 128 + 20, the SAE and the unembedding).
ROUNDING = 1e4 * 2.0**-53

PROCESSED_ROUNDING = 1e4 * 2.0**-24  # TransformerLens centres weights in float32


def token_ids() -> Tensor:
    return torch.randint(2, 400, (4, 20), generator=torch.Generator().manual_seed(5))


@cache
def transformers_module() -> torch.nn.Module:
    return make_model("gpt2", len(make_tokenizer())).double()


@cache
def hooked(**processing: bool) -> Any:
    """SAELens' HookedSAETransformer of the same weights in float64; nothing is processed that is not asked for."""
    import sae_lens
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    hf = transformers_module()
    config = HookedTransformerConfig(
        n_layers=N_LAYERS,
        d_model=D_MODEL,
        n_ctx=256,
        d_head=D_MODEL // N_HEADS,
        n_heads=N_HEADS,
        d_mlp=4 * D_MODEL,
        d_vocab=hf.config.vocab_size,
        act_fn="gelu_new",
        normalization_type="LN",
        dtype=torch.float64,
        device="cpu",
        model_name="tiny",
    )
    model = sae_lens.HookedSAETransformer(config)
    plain = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
    model.load_and_process_state_dict(convert_gpt2_weights(hf, config), **{**plain, **processing})
    return model.eval()


def close(theirs: Tensor, ours: Tensor, rounding: float = ROUNDING) -> bool:
    return bool(((theirs - ours).abs() <= rounding * ours.abs().max()).all())
