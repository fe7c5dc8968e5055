"""What the tests of features share: a model of one block whose activations and latents are planted."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actcache.models.language_model import LanguageModel
from actcache.models.load import wrap_model
from support.tiny_models import D_MODEL, LAYER_NORMED, N_LAYERS, make_model, make_tokenizer, norm_by_hand
from support.tiny_saes import changed
from trainer.sae.sae import SAE

HOOK, LAST = "blocks.1.hook_resid_post", f"blocks.{N_LAYERS - 1}.hook_resid_post"


D_SAE = 3 * D_MODEL


TEXT = "The old lighthouse keeper climbed the stairs"


@cache
def module_of(family: str) -> PreTrainedModel:
    return make_model(family, 512).double()


@cache
def model_of(family: str) -> LanguageModel:
    return wrap_model(module_of(family), make_tokenizer(), family)


def make_sae(architecture: str = "standard", **changes: object) -> SAE:
    """A random float64 SAE near the identity."""
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(D_SAE, D_MODEL, generator=generator, dtype=torch.float64)
    is_transcoder = architecture == "skip_transcoder"
    sae = SAE(
        architecture=architecture,
        hook_name="blocks.1.hook_mlp_out" if is_transcoder else HOOK,
        hook_name_out=HOOK if is_transcoder else None,
        W_skip=torch.randn(D_MODEL, D_MODEL, generator=generator, dtype=torch.float64) if is_transcoder else None,
        W_enc=(w / w.norm(dim=1, keepdim=True)).T.contiguous(),
        W_dec=w / 9,
        b_enc=torch.full((D_SAE,), -0.2, dtype=torch.float64),
        b_dec=torch.randn(D_MODEL, generator=generator, dtype=torch.float64) / 4,
        threshold=torch.full((D_SAE,), 0.3, dtype=torch.float64) if architecture == "jumprelu" else None,
        k=6 if architecture in ("topk", "abstopk") else None,
        rescale_acts_by_decoder_norm=architecture == "topk",
        subtracts_b_dec=architecture in ("topk", "abstopk"),
        metadata={"prepend_bos": True},
    )
    return changed(sae, **changes)


def token_ids(text: str = TEXT) -> list[int]:
    return make_tokenizer()(text).input_ids  # its template puts <bos> first


def folded_by_hand(family: str) -> Tensor:
    """W_U with the final norm's gain and centring folded and rows centred over the vocabulary, float64."""
    gain, _, _ = norm_by_hand(module_of(family), family)
    W_U = module_of(family).get_output_embeddings().weight.detach()
    folded = (W_U - W_U.mean(0)) * gain
    return folded - folded.mean(1, keepdim=True) if family in LAYER_NORMED else folded


def planted(family: str) -> tuple[int, Tensor]:
    """A token and the decoder direction that must promote it: its own row of the folded unembedding.

    The token whose row is longest, for <row, other> < |row|^2 then follows from Cauchy and Schwarz.
    """
    folded = folded_by_hand(family)
    token_id = int(folded.norm(dim=1).argmax())
    return token_id, folded[token_id] / folded[token_id].norm()
