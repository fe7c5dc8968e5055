"""Presets: the settings with which a paper trains an architecture, given the SAE's width and the facts of the cache.

A preset fills the settings that a run leaves out. A run that names no preset gets the first one of its architecture.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainer.config.settings import Architecture, Normalization

Settings = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class HookFacts:
    """What a cache says about the training rows of one hook.

    Attributes:
        d_in: their width.
        mean_norm: E||x||.
        mean_square_norm: E||x||^2.
        total_variance: their variance, summed over the width.
    """

    d_in: int
    mean_norm: float
    mean_square_norm: float
    total_variance: float

    def scale(self, normalize_activations: Normalization) -> float:
        """The factor of x that makes E||x|| = sqrt(d_in), or E||x||^2 = 1, or 1.0 for "none"."""
        if normalize_activations == "expected_average_only_in":
            return math.sqrt(self.d_in) / self.mean_norm
        if normalize_activations == "unit_mean_square":
            return 1 / math.sqrt(self.mean_square_norm)
        return 1.0

    @property
    def is_scalable(self) -> bool:
        """Whether each scale and the variance of the scaled rows are positive and finite."""
        if not (self.mean_norm > 0 and self.mean_square_norm > 0):
            return False
        scales = (self.scale("expected_average_only_in"), self.scale("unit_mean_square"), 1.0)
        return all(0 < self.total_variance * (scale * scale) < math.inf for scale in scales)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the cache and the length of training add to a run's settings.

    Attributes:
        inputs: the hooks of x.
        outputs: the hooks of x_hat.
        training_tokens: rows to train on.
        n_steps: optimizer steps.
    """

    inputs: tuple[HookFacts, ...]
    outputs: tuple[HookFacts, ...]
    training_tokens: int
    n_steps: int

    @property
    def d_in(self) -> int:
        """Width of x."""
        return sum(hook.d_in for hook in self.inputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """The architectures that a preset is for, and the settings in which it differs from `_COMMON`."""

    architectures: tuple[Architecture, ...]
    settings: Callable[[int, Facts], Settings]


def preset_settings(preset: str, d_sae: int, facts: Facts) -> Settings:
    """The preset's value of every setting that a run may leave out."""
    dead_window = max(1, min(10_000_000, facts.training_tokens // 10))
    return _COMMON | {"dead_window": dead_window} | PRESETS[preset].settings(d_sae, facts)


def default_preset(architecture: Architecture) -> str:
    """The preset of an architecture for runs that name none."""
    return next(name for name, preset in PRESETS.items() if architecture in preset.architectures)


_COMMON: Settings = {
    "hook_names": None,
    "hook_name_out": None,
    "k": None,
    "k_anneal_start": None,
    "k_anneal_steps": 0,
    "matryoshka_widths": None,
    "sparsity_coefficient": None,
    "encoder_dtype": "float32",
    "optimizer": "adam",
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
    "b_dec_init": "zeros",
    "decoder_init_norm": 1.0,
    "encoder_init_scale": 1.0,
    "init_firing_rate": None,
    "aux_coefficient": 0.0,
    "k_aux": 0,
    "jumprelu_bandwidth": None,
    "jumprelu_init_threshold": None,
    "jumprelu_sparsity_loss_mode": None,
    "jumprelu_tanh_scale": None,
    "pre_act_loss_coefficient": None,
    "target_l0": None,
}


def _anthropic_april(d_sae: int, facts: Facts) -> Settings:
    """Anthropic, "Circuits Updates - April 2024", on training SAEs."""
    return {
        "sparsity_coefficient": 5.0,
        "lr": 5e-5,
        "lr_decay_steps": facts.n_steps // 5,
        "max_grad_norm": 1.0,
        "sparsity_warm_up_steps": facts.n_steps // 20,
        "decoder_init_norm": 0.1,
    }


def _openai_topk(d_sae: int, facts: Facts) -> Settings:
    """Gao et al. 2024 (arXiv:2406.04093). lr falls with the root of d_sae. k_aux is a power of two near d_in / 2."""
    return {
        "lr": 2e-4 / math.sqrt(d_sae / 2**14),
        "adam_eps": 6.25e-10,
        "b_dec_init": "geometric_median",
        "aux_coefficient": 1 / 32,
        "k_aux": min(d_sae, 2 ** max(0, round(math.log2(facts.d_in / 2)))),
    }


def _eleuther_topk(d_sae: int, facts: Facts) -> Settings:
    """EleutherAI's sparsify: signum without AuxK. lr is 5e-3 at a width of 2^14."""
    return {
        "optimizer": "signum",
        "momentum": 0.95,
        "lr": 5e-3 / math.sqrt(d_sae / 2**14),
        "b_dec_init": "mean",
    }


def _bussmann_batchtopk(d_sae: int, facts: Facts) -> Settings:
    """Bussmann et al. 2024 (arXiv:2412.06410), with AuxK as for topk."""
    return _openai_topk(d_sae, facts) | {"lr": 3e-4, "adam_beta2": 0.99, "adam_eps": 1e-8}


def _bussmann_matryoshka(d_sae: int, facts: Facts) -> Settings:
    """Bussmann et al. 2025 (arXiv:2503.17547): prefixes of 1/32, 3/32, 7/32, 15/32 and all of the latents."""
    widths = sorted({max(1, d_sae * share // 32) for share in (1, 3, 7, 15, 32)})
    return _bussmann_batchtopk(d_sae, facts) | {"matryoshka_widths": tuple(widths)}


def _gdm_jumprelu(d_sae: int, facts: Facts) -> Settings:
    """Rajamanoharan et al. 2024 (arXiv:2407.14435), which Gemma Scope (arXiv:2408.05147) follows.

    Their warm-ups of 1,000 and 10,000 steps are cut to a tenth of the run.
    """
    return {
        "lr": 7e-5,
        "adam_beta1": 0.0,
        "lr_warm_up_name": "cosine",
        "lr_warm_up_steps": min(1_000, facts.n_steps // 10),
        "sparsity_warm_up_steps": min(10_000, facts.n_steps // 10),
        "normalize_activations": "unit_mean_square",
        "jumprelu_bandwidth": 0.001,
        "jumprelu_init_threshold": 0.001,
        "jumprelu_sparsity_loss_mode": "step",
    }


def _anthropic_january(d_sae: int, facts: Facts) -> Settings:
    """Anthropic, "Circuits Updates - January 2025", on JumpReLU with a tanh penalty. lr is that of April 2024.

    At first each latent fires on 10,000 / d_sae of the rows, and on half of them at most. lambda_S has no default,
    because sources quote different values.
    """
    return {
        "lr": 5e-5,
        "lr_decay_steps": facts.n_steps // 5,
        "sparsity_warm_up_steps": facts.n_steps,
        "max_grad_norm": 1.0,
        "decoder_init_norm": None,
        "encoder_init_scale": facts.d_in / d_sae,
        "init_firing_rate": min(0.5, 10_000 / d_sae),
        "jumprelu_bandwidth": 2.0,
        "jumprelu_init_threshold": 0.1,
        "jumprelu_sparsity_loss_mode": "tanh",
        "jumprelu_tanh_scale": 4.0,
        "pre_act_loss_coefficient": 3e-6,
    }


def _gdm_gated(d_sae: int, facts: Facts) -> Settings:
    """Adam without momentum, as in arXiv:2404.16014. lr is that of batchtopk; decay and warm-up are standard's."""
    return {
        "lr": 3e-4,
        "adam_beta1": 0.0,
        "lr_warm_up_steps": min(1_000, facts.n_steps // 10),
        "lr_decay_steps": facts.n_steps // 5,
        "sparsity_warm_up_steps": facts.n_steps // 20,
    }


def _dunefsky_transcoder(d_sae: int, facts: Facts) -> Settings:
    """Dunefsky et al. 2024 (arXiv:2406.11944): b_dec begins at the mean of y, and the decoder at 0.

    Penalty, lr and schedules are those of standard.
    """
    return _anthropic_april(d_sae, facts) | {"b_dec_init": "mean", "decoder_init_norm": 1.0}


def _anthropic_crosscoder(d_sae: int, facts: Facts) -> Settings:
    """Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing". lr is that of standard."""
    return _anthropic_april(d_sae, facts)


PRESETS = {
    "anthropic_april": Preset(architectures=("standard",), settings=_anthropic_april),
    "openai_topk": Preset(architectures=("topk", "abstopk"), settings=_openai_topk),
    "eleuther_topk": Preset(architectures=("topk",), settings=_eleuther_topk),
    "bussmann_batchtopk": Preset(architectures=("batchtopk",), settings=_bussmann_batchtopk),
    "bussmann_matryoshka": Preset(architectures=("matryoshka_batchtopk",), settings=_bussmann_matryoshka),
    "gdm_jumprelu": Preset(architectures=("jumprelu",), settings=_gdm_jumprelu),
    "gemma_scope": Preset(architectures=("jumprelu",), settings=_gdm_jumprelu),
    "anthropic_january": Preset(architectures=("jumprelu",), settings=_anthropic_january),
    "gdm_gated": Preset(architectures=("gated",), settings=_gdm_gated),
    "dunefsky_transcoder": Preset(architectures=("transcoder", "skip_transcoder"), settings=_dunefsky_transcoder),
    "anthropic_crosscoder": Preset(architectures=("crosscoder",), settings=_anthropic_crosscoder),
}
