"""One SAE of each class of SAELens, made and spliced by SAELens itself, and by us: the table of the documentation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.places import ROOT
from support.saelens_models import N_HEADS, PROCESSED_ROUNDING, ROUNDING, close, hooked, token_ids, transformers_module
from support.saelens_peers import fill_
from support.tiny_models import D_MODEL
from torch import Tensor

from trainer.interventions.splice import Splice, spliced
from trainer.sae.sae import SAE

sae_lens = pytest.importorskip("sae_lens")
pytestmark = [
    pytest.mark.filterwarnings("ignore:\\s*This SAE has non-empty model_from_pretrained_kwargs:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*HookedTransformer.* is deprecated:DeprecationWarning"),
]
PAGE = ROOT / "docs" / "how-to" / "import-saes.md"
STREAM, MLP_OUT, HOOK_Z = "blocks.1.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"
SOURCE = "blocks.1.hook_resid_pre"  # of a transcoder
K = {"k": 5}
TEMPORAL = {"n_heads": 2, "bottleneck_factor": 8, "kval_topk": 5, "n_attn_layers": 2}
CENTRED = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
# row of the table -> (class of SAELens' registry, its settings, its hook, more metadata)
CASES: dict[str, tuple[str, dict[str, object], str, dict[str, object]]] = {
    "standard": ("standard", {}, STREAM, {}),
    "gated": ("gated", {}, STREAM, {}),
    "topk": ("topk", K, STREAM, {}),
    "topk, rescale_acts_by_decoder_norm": ("topk", {**K, "rescale_acts_by_decoder_norm": True}, STREAM, {}),
    "abstopk": ("abstopk", K, STREAM, {}),
    "jumprelu": ("jumprelu", {}, STREAM, {}),
    "matching_pursuit": ("matching_pursuit", {}, STREAM, {}),
    "transcoder": ("transcoder", {}, SOURCE, {}),
    "skip_transcoder": ("skip_transcoder", {}, SOURCE, {}),
    "jumprelu_transcoder": ("jumprelu_transcoder", {}, SOURCE, {}),
    "jumprelu_skip_transcoder": ("jumprelu_skip_transcoder", {}, SOURCE, {}),
    "temporal": ("temporal", TEMPORAL, STREAM, {}),
    "temporal, untied, scaled": (
        "temporal",
        {
            **TEMPORAL,
            "tied_weights": False,
            "sae_diff_type": "relu",
            "normalize_activations": "constant_scalar_rescale",
            "activation_normalization_factor": 0.3,
        },
        STREAM,
        {},
    ),
    "layer_norm": ("jumprelu", {"normalize_activations": "layer_norm"}, STREAM, {}),
    "constant_norm_rescale": ("topk", {**K, "normalize_activations": "constant_norm_rescale"}, STREAM, {}),
    "hook_z, all heads": ("topk", {**K, "reshape_activations": "hook_z"}, HOOK_Z, {}),
    "center_writing_weights, stream": ("standard", {}, STREAM, CENTRED),
    "center_writing_weights, mlp_out": ("standard", {}, MLP_OUT, CENTRED),
    "center_writing_weights, attn_out": ("topk", K, "blocks.1.hook_attn_out", CENTRED),
    "center_writing_weights, hook_z": ("topk", {**K, "reshape_activations": "hook_z"}, HOOK_Z, CENTRED),
    "center_writing_weights, transcoder": ("transcoder", {}, SOURCE, CENTRED),
}


def theirs_of(case: str) -> Any:
    """SAELens' own SAE with random weights, in float64."""
    architecture, settings, hook_name, metadata = CASES[case]
    is_transcoder = architecture.endswith("transcoder")
    cfg: dict[str, object] = {"architecture": architecture, "d_in": D_MODEL, "d_sae": 96, "dtype": "float64"}
    about = {"hook_name": hook_name, "model_name": "tiny", **metadata}
    cfg |= {"apply_b_dec_to_input": not is_transcoder, "metadata": about}
    if is_transcoder:
        cfg |= {"d_out": D_MODEL, "metadata": {**about, "hook_name_out": MLP_OUT}}
    sae = sae_lens.SAE.from_dict(cfg | settings)
    fill_(sae)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter /= 4
        if architecture == "matching_pursuit":
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    return sae


def loaded(theirs: Any, folder: Path) -> SAE:
    theirs.save_model(folder)
    return SAE.load_from_disk(folder)


def model_of(case: str) -> Any:
    """The model that SAELens runs the SAE in: centred where the SAE is."""
    centred = CASES[case][3] is CENTRED
    return hooked(center_writing_weights=True) if centred else hooked()


def activation(model: Any, hook_name: str) -> Tensor:
    return model.run_with_cache(token_ids(), names_filter=hook_name)[1][hook_name]


@torch.no_grad()
def compared(case: str, folder: Path) -> dict[str, bool]:
    """Whether encode, decode and the logits of the spliced model are equal, on raw and on centred models."""
    theirs, hook_name = theirs_of(case), CASES[case][2]
    ours, raw = loaded(theirs, folder), activation(hooked(), hook_name)
    x = activation(model_of(case), hook_name)
    rounding = PROCESSED_ROUNDING if CASES[case][3] is CENTRED else ROUNDING
    feature_acts = theirs.encode(x)
    x_hat = theirs.decode(feature_acts)
    if ours.reads_sequences:  # SAELens' run_with_saes leaves out what attention predicts
        logits = hooked().run_with_hooks(token_ids(), fwd_hooks=[(hook_name, lambda x, hook: theirs(x))])
    else:
        logits = model_of(case).run_with_saes(token_ids(), saes=[theirs])
    if ours.W_skip is not None:  # nor does it add W_skip x
        ours.W_skip.zero_()
    models = [model_of(case), hooked() if "hook_z" in hook_name else transformers_module()]
    mine = []
    for model in models:
        with spliced(model, [Splice(sae=ours, keep_error=False)]):
            output = model(token_ids())
        mine.append(output if isinstance(output, Tensor) else output.logits)
    return {
        "encode": all(close(feature_acts, ours.encode(each), rounding) for each in (x, raw)),
        "decode": close(x_hat.reshape(*x.shape[:2], -1), ours.decode(feature_acts, x)),
        "spliced logits": all(close(logits, each, rounding) for each in mine),
        "changes something": not close(logits, model_of(case)(token_ids()), rounding),
    }


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_saelens_computes(case, tmp_path):
    assert compared(case, tmp_path / "sae") == dict.fromkeys(
        ("encode", "decode", "spliced logits", "changes something"), True
    )
    row = f"| {case} | {CASES[case][0]} | equal | equal | equal |"
    assert row in PAGE.read_text(), "the table of the documentation"


def test_every_class_is_in_the_table():
    from sae_lens.registry import SAE_CLASS_REGISTRY

    assert {architecture for architecture, *_ in CASES.values()} == {*SAE_CLASS_REGISTRY}


@torch.no_grad()
def test_a_centred_sae_sees_the_stream_without_its_mean(tmp_path):
    """By its definition, in float64: it encodes x - mean(x), and where it is spliced in, the mean is added again."""
    theirs = theirs_of("center_writing_weights, stream")
    ours = loaded(theirs, tmp_path / "sae")
    x = activation(hooked(), STREAM)
    mean = x.mean(-1, keepdim=True)
    assert close(theirs.encode(x - mean), ours.encode(x))
    assert close(x - mean, ours.target(x))
    expected = hooked().run_with_hooks(token_ids(), fwd_hooks=[(STREAM, lambda x, hook: theirs(x - mean) + mean)])
    with spliced(transformers_module(), [Splice(sae=ours, keep_error=False)]):
        assert close(expected, transformers_module()(token_ids()).logits)


@torch.no_grad()
def test_a_forward_pass_and_a_saved_copy_are_equal_too(tmp_path):
    for case in ("layer_norm", "constant_norm_rescale", "temporal", "skip_transcoder"):
        theirs = theirs_of(case)
        ours = loaded(theirs, tmp_path / case)
        x = activation(hooked(), CASES[case][2])
        assert close(theirs(x), ours(x))
        copy = SAE.load_from_disk(ours.save(tmp_path / f"{case}-copy"))
        assert torch.equal(copy(x), ours(x))
        back = sae_lens.SAE.load_from_disk(tmp_path / f"{case}-copy")
        assert torch.equal(back.encode(x), theirs.encode(x))


@torch.no_grad()
def test_one_head_reads_and_writes_its_own_channels(tmp_path):
    d_head, head = D_MODEL // N_HEADS, 2
    about = {"hook_name": HOOK_Z, "model_name": "tiny", "hook_head_index": head}
    cfg = {"architecture": "jumprelu", "d_in": d_head, "d_sae": 24, "dtype": "float64", "metadata": about}
    theirs = sae_lens.SAE.from_dict(cfg)
    fill_(theirs)
    ours = loaded(theirs, tmp_path / "sae")
    z = activation(hooked(), HOOK_Z)
    assert torch.equal(theirs.encode(z[:, :, head]), ours.encode(z.flatten(2)))

    def one_head(z: Tensor, hook: object) -> Tensor:
        z[:, :, head] = theirs(z[:, :, head])
        return z

    back = sae_lens.SAE.load_from_disk(ours.save(tmp_path / "copy"))
    assert torch.equal(back.encode(z[:, :, head]), theirs.encode(z[:, :, head])), "SAELens reads it again"
    expected = hooked().run_with_hooks(token_ids(), fwd_hooks=[(HOOK_Z, one_head)])
    with spliced(hooked(), [Splice(sae=ours, keep_error=False)]):
        assert close(expected, hooked()(token_ids()))
