"""The settings of training: `SAEConfig` for one SAE, and `TrainConfig` for what all SAEs of a sweep share."""

import itertools
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from actcache.arguments import shown, type_fields_
from actcache.errors import ConfigError

Architecture = Literal[
    "standard",
    "topk",
    "abstopk",
    "batchtopk",
    "matryoshka_batchtopk",
    "jumprelu",
    "gated",
    "transcoder",
    "skip_transcoder",
    "crosscoder",
]
Optimizer = Literal["adam", "adamw", "signum", "muon", "schedule_free"]
LRScheduler = Literal["constant", "cosineannealing"]
WarmUp = Literal["linear", "cosine"]
EncoderDtype = Literal["float32", "bfloat16"]
SparsityLossMode = Literal["step", "tanh", "quadratic"]
Normalization = Literal["none", "expected_average_only_in", "unit_mean_square"]
DecoderBiasInit = Literal["zeros", "mean", "geometric_median"]
RowFilter = Literal["all", "no_special_tokens"]

BATCH_FAMILY = ("batchtopk", "matryoshka_batchtopk")  # k is a mean over the batch; for inference they become jumprelu
TOPK_FAMILY = ("topk", "abstopk", *BATCH_FAMILY)
TRANSCODERS = ("transcoder", "skip_transcoder")  # they predict the activation at another hook
PENALISED = ("standard", "jumprelu", "gated", *TRANSCODERS, "crosscoder")


def subtracts_b_dec(architecture: str) -> bool:
    """Whether the encoder sees x - b_dec (TopK family, gated) or x (all others)."""
    return architecture in (*TOPK_FAMILY, "gated")


@dataclass(frozen=True, slots=True, kw_only=True)
class SAEConfig:
    """One SAE, in which every setting has its value. `asdict` of it is JSON, and `SAEConfig(**json)` gives it back.

    Steps are optimizer steps, and tokens are rows. A setting that the architecture does not use is 0 or None.

    Raises:
        ConfigError: a value breaks a rule.
    """

    name: str
    architecture: Architecture
    hook_name: str  # hook of x; the first hook of a crosscoder
    hook_names: Sequence[str] | None  # all hooks of a crosscoder, side by side in x and in x_hat
    hook_name_out: str | None  # the hook that a transcoder predicts from x
    d_in: int  # width of x, with all hooks side by side
    d_out: int  # width of x_hat
    hook_widths: Sequence[int] | None  # widths of the hooks of a crosscoder
    d_sae: int
    k: int | None  # mean active latents per token (TopK family)
    k_anneal_start: int | None  # k of the first step; it reaches k after k_anneal_steps
    k_anneal_steps: int
    matryoshka_widths: Sequence[int] | None  # widths of the prefixes that reconstruct x, ascending, d_sae last
    sparsity_coefficient: float | None  # lambda of the penalty (all but the TopK family)
    encoder_dtype: EncoderDtype  # dtype in which the TopK family finds the largest pre-activations
    optimizer: Optimizer
    lr: float
    seed: int
    adam_beta1: float
    adam_beta2: float
    adam_eps: float
    momentum: float | None  # for signum and muon
    weight_decay: float
    ema_decay: float | None  # decay of the running average that is saved; None saves the last weights
    lr_scheduler_name: LRScheduler
    lr_end: float | None  # learning rate at the end of cosineannealing
    lr_warm_up_name: WarmUp
    lr_warm_up_steps: int
    lr_decay_steps: int
    max_grad_norm: float | None
    sparsity_warm_up_steps: int
    normalize_activations: Normalization
    input_scale: float  # factor of x
    output_scale: float  # factor of what is reconstructed
    hook_scales: Sequence[float] | None  # factor of each hook of a crosscoder, instead of these two
    b_dec_init: DecoderBiasInit
    decoder_init_norm: float | None  # norm of its rows; None for entries uniform within 1 / sqrt(d_in) of 0
    encoder_init_scale: float  # W_enc begins as the random directions times this
    init_firing_rate: float | None  # share of rows on which b_enc makes each latent fire at first
    aux_coefficient: float
    k_aux: int
    dead_window: int  # tokens without firing after which a latent is dead
    jumprelu_bandwidth: float | None
    jumprelu_init_threshold: float | None
    jumprelu_sparsity_loss_mode: SparsityLossMode | None  # the penalty of jumprelu
    jumprelu_tanh_scale: float | None  # c of the mode tanh
    pre_act_loss_coefficient: float | None  # lambda_P of the mode tanh, which revives dead latents
    target_l0: float | None  # L0 that the mode quadratic aims at
    total_variance: float  # variance of the scaled rows that are reconstructed, summed over d_out
    training_tokens: int
    n_steps: int

    def __post_init__(self) -> None:
        type_fields_(str(self.name), self)
        check_settings(self.name, {setting: getattr(self, setting) for setting in _RULES})
        if self.matryoshka_widths is not None and self.matryoshka_widths[-1] != self.d_sae:
            raise ConfigError(
                f"{self.name}: the last of matryoshka_widths must be d_sae={self.d_sae}, got {self.matryoshka_widths}"
            )
        for setting in ("k", "k_anneal_start", "k_aux"):
            value = getattr(self, setting)
            if value is not None and value > self.d_sae:
                raise ConfigError(
                    f"{self.name}: {setting} must be at most d_sae={self.d_sae}, got {setting}={value}; "
                    f"take a smaller {setting} or a wider SAE"
                )

    def check_ramps(self) -> None:
        """Raise ConfigError if lr, sparsity or k would change over more steps than the run has, and so never get there.

        It is no rule of every config, so that a run that was trained before opens whatever its ramps are.
        """
        for ramps in (("lr_warm_up_steps", "lr_decay_steps"), ("sparsity_warm_up_steps",), ("k_anneal_steps",)):
            steps = [getattr(self, ramp) for ramp in ramps]
            if sum(steps) > self.n_steps:
                raise ConfigError(
                    f"{self.name}: {' + '.join(ramps)} must be at most n_steps={self.n_steps}, got "
                    f"{' + '.join(map(str, steps))}; take fewer, or train on more than {self.training_tokens} tokens"
                )

    @property
    def has_unit_norm_decoder(self) -> bool:
        """Whether decoder rows are held at norm 1. They are not where the penalty weighs their norms instead."""
        weighs_norms = ("standard", *TRANSCODERS, "crosscoder")
        return self.architecture not in weighs_norms and self.jumprelu_sparsity_loss_mode != "tanh"

    @property
    def inputs(self) -> tuple["ScaledHook", ...]:
        """The hooks of x, side by side, with their scales."""
        return self._crosscoded or (ScaledHook(hook_name=self.hook_name, scale=self.input_scale),)

    @property
    def outputs(self) -> tuple["ScaledHook", ...]:
        """The hooks of what is reconstructed: those of x, or the other hook of a transcoder."""
        hook_name = self.hook_name if self.hook_name_out is None else self.hook_name_out
        return self._crosscoded or (ScaledHook(hook_name=hook_name, scale=self.output_scale),)

    @property
    def _crosscoded(self) -> tuple["ScaledHook", ...]:
        hooks = zip(self.hook_names or (), self.hook_scales or (), strict=True)
        return tuple(ScaledHook(hook_name=hook_name, scale=scale) for hook_name, scale in hooks)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledHook:
    """A hook and the factor by which its activations are multiplied before an SAE gets them."""

    hook_name: str
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """What all SAEs of a sweep share: the data, its order, and how often something is written.

    Raises:
        ConfigError: a value breaks a rule.
    """

    batch_tokens: int = 4096
    seed: int = 0
    tokens: int | None = None  # rows to train on; None for every row of every epoch
    epochs: int = 1
    exclude_special_tokens: bool = True
    log_every: int = 100  # steps
    checkpoint_every: int = 1000  # steps
    keep_checkpoints: int = 1  # how many of the last checkpoints stay
    eval_every: int | None = None  # steps between evaluations on held-out rows; None for no evaluation
    eval_tokens: int = 32_768  # rows of the validation split that an evaluation reads, at most

    def __post_init__(self) -> None:
        type_fields_("train", self)
        for setting, rule in _TRAIN_RULES.items():
            rule.check("train", setting, getattr(self, setting))

    @property
    def row_filter(self) -> RowFilter:
        """The name of the cache's statistics of the rows that this sweep trains on."""
        return "no_special_tokens" if self.exclude_special_tokens else "all"

    def training_tokens(self, n_rows: int) -> int:
        """How many rows to train on, if an epoch has `n_rows`. Raises ConfigError if `tokens` asks for more."""
        available = n_rows * self.epochs
        if self.tokens is None:
            return available
        if self.tokens > available:
            raise ConfigError(
                f"train: {self.tokens} tokens asked, but {self.epochs} epoch(s) of this cache serve {available} "
                f"({n_rows} each); take fewer, harvest more, or allow epochs={math.ceil(self.tokens / max(n_rows, 1))}"
            )
        return self.tokens


@dataclass(frozen=True, slots=True)
class _Rule:
    holds: Callable[[Any], bool]
    text: str

    def check(self, who: str, setting: str, value: object) -> None:
        if value is not None and not self.holds(value):
            raise ConfigError(f"{who}: {setting} must be {self.text}, got {setting}={shown(value)}")


def check_settings(who: str, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError if a setting of an SAE breaks its own rule. The error names `who` and the setting."""
    for setting, rule in _RULES.items():
        rule.check(who, setting, settings.get(setting))


_AT_LEAST_ONE = _Rule(lambda value: value >= 1, "at least 1")
_NOT_NEGATIVE = _Rule(lambda value: 0 <= value < math.inf, "at least 0")
_POSITIVE = _Rule(lambda value: 0 < value < math.inf, "above 0")
_BETA = _Rule(lambda value: 0 <= value < 1, "in [0, 1)")
_SEED = _Rule(lambda value: 0 <= value < 2**63, "in [0, 2**63)")
_NAME = _Rule(
    lambda value: re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,199}", value) is not None,
    "a plain file name (letters, digits, . _ + = -)",
)


_DISTINCT = _Rule(lambda names: len(set(names)) == len(names) >= 2, "a list of at least two that differ")


def _one_of(choices: object) -> _Rule:
    names = typing.get_args(choices)
    return _Rule(lambda value: value in names, f"one of {', '.join(names)}")


_RULES = {
    "name": _NAME,
    "architecture": _one_of(Architecture),
    "normalize_activations": _one_of(Normalization),
    "b_dec_init": _one_of(DecoderBiasInit),
    "jumprelu_sparsity_loss_mode": _one_of(SparsityLossMode),
    "optimizer": _one_of(Optimizer),
    "lr_scheduler_name": _one_of(LRScheduler),
    "lr_warm_up_name": _one_of(WarmUp),
    "encoder_dtype": _one_of(EncoderDtype),
    "hook_names": _DISTINCT,
    **dict.fromkeys(("d_in", "d_out", "d_sae", "k", "k_anneal_start"), _AT_LEAST_ONE),
    **dict.fromkeys(("dead_window", "training_tokens", "n_steps"), _AT_LEAST_ONE),
    **dict.fromkeys(("lr", "adam_eps", "max_grad_norm", "decoder_init_norm", "encoder_init_scale"), _POSITIVE),
    **dict.fromkeys(("input_scale", "output_scale"), _POSITIVE),
    **dict.fromkeys(("jumprelu_bandwidth", "jumprelu_init_threshold", "total_variance"), _POSITIVE),
    **dict.fromkeys(("jumprelu_tanh_scale", "target_l0"), _POSITIVE),
    **dict.fromkeys(("sparsity_coefficient", "aux_coefficient", "k_aux", "pre_act_loss_coefficient"), _NOT_NEGATIVE),
    **dict.fromkeys(("lr_warm_up_steps", "lr_decay_steps", "sparsity_warm_up_steps"), _NOT_NEGATIVE),
    **dict.fromkeys(("k_anneal_steps", "lr_end", "weight_decay"), _NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "momentum", "ema_decay"), _BETA),
    "matryoshka_widths": _Rule(
        lambda widths: len(widths) > 0 and all(0 < a < b for a, b in itertools.pairwise((0.5, *widths))),
        "an ascending list of widths",
    ),
    "init_firing_rate": _Rule(lambda rate: 0 < rate < 1, "in (0, 1)"),
    "seed": _SEED,
}
_TRAIN_RULES = {
    **dict.fromkeys(("batch_tokens", "tokens", "epochs", "log_every", "checkpoint_every"), _AT_LEAST_ONE),
    **dict.fromkeys(("keep_checkpoints", "eval_every", "eval_tokens"), _AT_LEAST_ONE),
    "seed": _SEED,
}
