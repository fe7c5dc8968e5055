"""Small SAEs and run folders, made on the spot and seeded: what training leaves behind, without training."""

import dataclasses
import inspect
import json
from pathlib import Path

import torch
from torch import Tensor

BATCH_FAMILY = ("batchtopk", "matryoshka_batchtopk")
TOPK_FAMILY = ("topk", "abstopk", *BATCH_FAMILY)
TRANSCODERS = ("transcoder", "skip_transcoder")
WEIGHS_NORMS = ("standard", *TRANSCODERS, "crosscoder")  # in the penalty, instead of holding them at 1
ARCHITECTURES = ("standard", "jumprelu", "gated", *TOPK_FAMILY, *TRANSCODERS, "crosscoder")


def make_config(architecture: str, **changes: object):
    """A resolved SAEConfig: 16 wide, 48 latents, k 5, an input scale that is not 1; a transcoder gives 12 channels, a
    crosscoder's hooks are 10 and 6 wide.
    """
    from trainer.config.settings import SAEConfig

    is_topk, is_jumprelu = architecture in TOPK_FAMILY, architecture == "jumprelu"
    is_transcoder, is_crosscoder = architecture in TRANSCODERS, architecture == "crosscoder"
    values: dict[str, object] = {
        "name": f"a-{architecture}",
        "architecture": architecture,
        "hook_name": "blocks.1.hook_resid_post",
        "hook_names": ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post") if is_crosscoder else None,
        "hook_name_out": "blocks.1.hook_mlp_out" if is_transcoder else None,
        "d_in": 16,
        "d_out": 12 if is_transcoder else 16,
        "hook_widths": (10, 6) if is_crosscoder else None,
        "d_sae": 48,
        "k": 5 if is_topk else None,
        "k_anneal_start": None,
        "k_anneal_steps": 0,
        "matryoshka_widths": (3, 20, 48) if architecture == "matryoshka_batchtopk" else None,
        "sparsity_coefficient": None if is_topk else 1.0,
        "encoder_dtype": "float32",
        "optimizer": "adam",
        "lr": 1e-3,
        "seed": 0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_eps": 1e-8,
        "momentum": None,
        "weight_decay": 0.0,
        "ema_decay": None,
        "lr_scheduler_name": "constant",
        "lr_end": None,
        "lr_warm_up_name": "linear",
        "lr_warm_up_steps": 0,
        "lr_decay_steps": 0,
        "max_grad_norm": None,
        "sparsity_warm_up_steps": 0,
        "normalize_activations": "expected_average_only_in",
        "input_scale": 1.0 if is_crosscoder else 0.37,
        "output_scale": 0.6 if is_transcoder else 1.0 if is_crosscoder else 0.37,
        "hook_scales": (0.37, 1.9) if is_crosscoder else None,
        "b_dec_init": "zeros",
        "decoder_init_norm": 0.1,
        "encoder_init_scale": 1.0,
        "init_firing_rate": None,
        "aux_coefficient": 0.0,
        "k_aux": 0,
        "dead_window": 1000,
        "jumprelu_bandwidth": 0.05 if is_jumprelu else None,
        "jumprelu_init_threshold": 0.01 if is_jumprelu else None,
        "jumprelu_sparsity_loss_mode": "step" if is_jumprelu else None,
        "jumprelu_tanh_scale": None,
        "pre_act_loss_coefficient": None,
        "target_l0": None,
        "total_variance": 1.0,
        "training_tokens": 10_000,
        "n_steps": 10,
    }
    for given, follows in (("d_in", "d_out"), ("input_scale", "output_scale")):
        if given in changes and not is_transcoder:
            changes.setdefault(follows, changes[given])
    return dataclasses.replace(SAEConfig(**values), **changes)


def make_weights(
    architecture: str, d_in: int = 16, d_sae: int = 48, seed: int = 7, d_out: int | None = None
) -> dict[str, Tensor]:
    """Training weights, W_enc as [d_sae, d_in], with every bias and threshold away from zero."""
    d_out = d_out or (12 if architecture in TRANSCODERS else d_in)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "W_enc": torch.randn(d_sae, d_in, generator=generator),
        "W_dec": torch.randn(d_sae, d_out, generator=generator),
        "b_enc": torch.randn(d_sae, generator=generator),
        "b_dec": torch.randn(d_out, generator=generator),
    }
    if architecture == "skip_transcoder":
        weights["W_skip"] = torch.randn(d_out, d_in, generator=generator)
    if architecture == "gated":
        weights["b_gate"] = weights.pop("b_enc")
        weights["b_mag"], weights["r_mag"] = (torch.randn(d_sae, generator=generator) / 4 for _ in range(2))
    if architecture == "jumprelu":
        weights["threshold"] = torch.rand(d_sae, generator=generator)
    if architecture in BATCH_FAMILY:
        weights["threshold"] = torch.tensor(0.8)
    return weights


def changed(sae, **changes: object):
    """Another SAE, with the weights and settings of this one but for the changes."""
    given = {name: getattr(sae, name) for name in inspect.signature(type(sae)).parameters}
    return type(sae)(**{**given, **changes})


def make_run(
    runs: Path, config, model: dict[str, object], *, seed: int = 7, weights: dict[str, Tensor] | None = None
) -> Path:
    """RUNS/<name> with config.json and sae/, as a finished training leaves it; of random weights if none are given."""
    from trainer.formats.saelens import inference_sae, write_run_sae

    run = runs / config.name
    weights = weights or make_weights(config.architecture, config.d_in, config.d_sae, seed, config.d_out)
    write_run_sae(run, inference_sae(config, weights, metadata={"model_name": model["name"]}))
    about = {
        "sae": dataclasses.asdict(config),
        "train": {"batch_tokens": 1000, "seed": 0},
        "cache": {"path": "cache", "fingerprint": "0123456789abcdef"},
        "model": {"name": model["name"], "revision": model["revision"]},
    }
    (run / "config.json").write_text(json.dumps(about))
    return run
