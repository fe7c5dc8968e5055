"""Folders of SAEs as sparsify and dictionary_learning leave them, made by hand and seeded."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE, K = 16, 48, 5
DICTIONARIES = (
    *("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK"),
    *("BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"),
)
SPARSIFY_KINDS = ("sae", "transcoder", "skip transcoder", "skip sae")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(hash((shape, seed)) % 1000))


def sparsify_folder(path: Path, kind: str = "sae", hookpoint: str = "layers.3", **changes: object) -> Path:
    """RUN/hookpoint as sparsify saves it, with config.json of the run above."""
    folder = path / "run" / hookpoint
    folder.mkdir(parents=True)
    skips = "skip" in kind
    tensors = {
        "encoder.weight": random(D_SAE, D_IN),
        "encoder.bias": random(D_SAE),
        "W_dec": random(D_SAE, D_IN, seed=1),
        "b_dec": random(D_IN),
        **({"W_skip": random(D_IN, D_IN)} if skips else {}),
    }
    save_file(tensors, folder / "sae.safetensors")
    cfg: dict[str, object] = {
        **{"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": D_SAE, "k": K},
        **{"multi_topk": False, "skip_connection": skips, "transcode": "transcoder" in kind, "d_in": D_IN},
    }
    (folder / "cfg.json").write_text(json.dumps(cfg | changes))
    run = {"model": "EleutherAI/pythia-70m", "hookpoints": [hookpoint], "ctx_len": 128, "hf_token": None}
    (path / "run" / "config.json").write_text(json.dumps(run))
    return folder


def dictionary_tensors(dict_class: str) -> dict[str, Tensor]:
    """A state dict as the class has it, every bias away from 0, thresholds where some latents pass."""
    linear = {"encoder.weight": random(D_SAE, D_IN), "decoder.weight": random(D_IN, D_SAE, seed=1)}
    ranked = {**linear, "encoder.bias": random(D_SAE), "b_dec": random(D_IN), "k": torch.tensor(K, dtype=torch.int)}
    ranked["threshold"] = torch.tensor(4.0)
    plain = {"W_enc": random(D_IN, D_SAE), "b_enc": random(D_SAE), "W_dec": random(D_SAE, D_IN), "b_dec": random(D_IN)}
    return {
        "AutoEncoder": {"bias": random(D_IN), **linear, "encoder.bias": random(D_SAE)},
        "AutoEncoderNew": {**linear, "encoder.bias": random(D_SAE), "decoder.bias": random(D_IN)},
        "GatedAutoEncoder": {
            **{"decoder_bias": random(D_IN), "r_mag": random(D_SAE, seed=2) / 4},
            **{"gate_bias": random(D_SAE, seed=3), "mag_bias": random(D_SAE, seed=4), **linear},
        },
        "AutoEncoderTopK": ranked,
        "BatchTopKSAE": ranked,
        "MatryoshkaBatchTopKSAE": {
            **plain,
            **{name: ranked[name] for name in ("k", "threshold")},
            "group_sizes": torch.tensor([16, 32]),
        },
        "JumpReluAutoEncoder": {**plain, "threshold": random(D_SAE).abs() + 1},
    }[dict_class]


def dictionary_folder(path: Path, dict_class: str, **changes: object) -> Path:
    """trainer_0 as trainSAE saves it."""
    folder = path / "trainer_0"
    folder.mkdir(parents=True)
    torch.save(dictionary_tensors(dict_class), folder / "ae.pt")
    trainer: dict[str, object] = {
        **{"dict_class": dict_class, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 3, "lr": 1e-3, "k": K},
        **{"lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_3"},
    }
    buffer = {"d_submodule": D_IN, "io": "out", "ctx_len": 128}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer | changes, "buffer": buffer}))
    return folder
