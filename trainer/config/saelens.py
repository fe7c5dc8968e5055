"""`sweep_from_saelens`: the sweep of one SAE that a training config of SAELens asks for."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from actcache.errors import ConfigError
from actcache.interop.saelens_config import SAELensConfig, read_saelens_config
from trainer.config.settings import TOPK_FAMILY
from trainer.config.sweep import SweepConfig

logger = logging.getLogger("actcache")

SUMMED_SINCE = CLIPPED_SINCE = (1, 5, 0)  # versions of SAELens
_NEW_IN_1_5 = {"l1_warm_up_steps", "streaming", "decoder_heuristic_init", "init_encoder_as_decoder_transpose"}
_NEW_IN_1_5 |= {"normalize_activations", "scale_sparsity_penalty_by_decoder_norm", "eval_every_n_wandb_logs"}
KAIMING_NORM = math.sqrt(2)  # of a row of kaiming_uniform_: entries within sqrt(6 / d_in) of 0
# SAELens does not divide AuxK by ||e||^2, and the reconstruction loss of the TopK family by nothing. Here both are
# divided. The two are one loss where ||e||^2 is this share of the variance, as it is of many SAEs.
AUX_AT_SHARE_LEFT = 0.2


def sweep_from_saelens(cfg: object) -> SweepConfig:
    """The sweep of one SAE that a training config of SAELens asks for.

    Everything that SAELens sets is set, also where it is no field: Adam's epsilon, and the clipping of gradients. What
    is different here is logged as one warning. docs/tutorial/from-saelens.md lists every field.

    Args:
        cfg: SAELens' own object, its fields as a mapping, or the path of a file, as for `--from-saelens`: JSON or YAML
            by its suffix, else Python that calls LanguageModelSAERunnerConfig. Python text is read, and never run.

    Raises:
        ConfigError: it is no such config; or a field asks for something that is not trained here, and what would be
            trained instead would be something else. The message names all such fields.
    """
    config = read_saelens_config(cfg)
    sweep = sweep_of(config)
    differences = [
        f"{row.field}={row.value!r} ({row.here})" for row in config.rows("train") if row.verdict == "different"
    ]
    if differences:
        logger.warning("%s: different here: %s", config.who, "; ".join(differences))
    return sweep


def sweep_of(
    config: SAELensConfig,
    *,
    tokens: int | None = None,
    batch_tokens: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> SweepConfig:
    """The sweep of a config that was read.

    Args:
        config: the config.
        tokens, batch_tokens: instead of its own. In a run of fewer steps, warm-ups and decay are as much shorter.
        settings: of the SAE, instead of those that the config asks for.

    Raises:
        ConfigError: as `sweep_from_saelens`.
    """
    config.refuse(config.rows("train"))
    if config.architecture is None:
        raise ConfigError(f"{config.who}: must say which SAE is trained; give a LanguageModelSAERunnerConfig")
    planned = _n_steps(config)
    own = {"training_tokens": tokens, "train_batch_size_tokens": batch_tokens}
    given = {name: value for name, value in own.items() if value is not None}
    config = replace(config, given={**config.given, **given})
    n_steps = _n_steps(config)
    run = _run(config, shorter=min(1.0, n_steps / planned))
    return SweepConfig.from_dict({**_shared(config, n_steps), "runs": [run | dict(settings or {})]})


def _n_steps(config: SAELensConfig) -> int:
    batch = config["train_batch_size_tokens"]
    if batch < 1:
        raise ConfigError(f"{config.who}: train_batch_size_tokens must be at least 1, got {batch}")
    return max(1, math.ceil(config["training_tokens"] / batch))


def _shared(config: SAELensConfig, n_steps: int) -> dict[str, Any]:
    """What all SAEs of a sweep share. SAELens evaluates where it logs, and keeps n_checkpoints besides the last one."""
    n_checkpoints = max(0, config["n_checkpoints"])
    kept = {"checkpoint_every": max(1, n_steps // (n_checkpoints + 1)), "keep_checkpoints": n_checkpoints}
    log_every = config["wandb_log_frequency"]
    return {
        "tokens": config["training_tokens"],
        "batch_tokens": config["train_batch_size_tokens"],
        "seed": config["seed"],
        "exclude_special_tokens": config["exclude_special_tokens"],
        "log_every": log_every,
        "eval_every": log_every * config["eval_every_n_wandb_logs"],
        "eval_tokens": config["n_eval_batches"] * config["store_batch_size_prompts"] * config["context_size"],
        **(kept if n_checkpoints else {}),
    }


def _run(config: SAELensConfig, shorter: float) -> dict[str, Any]:
    """The settings of the SAE. shorter: the factor of its warm-ups and its decay."""
    architecture, scheduler = config.architecture, config["lr_scheduler_name"]
    lr_end = config["lr_end"] if config["lr_end"] is not None else config["lr"] / 10
    name = re.sub(r"[^A-Za-z0-9._+=-]", "-", str(config["run_name"] or "")).lstrip("._+=-")[:200]
    run = {
        "name": name or None,
        "architecture": architecture,
        "hook_name": config.hook_name,
        "d_sae": _d_sae(config),
        "optimizer": "adam",
        "lr": config["lr"],
        "lr_scheduler_name": scheduler,
        "lr_end": lr_end if scheduler == "cosineannealing" else None,
        "lr_warm_up_name": "linear",
        "lr_warm_up_steps": int(config["lr_warm_up_steps"] * shorter),
        "lr_decay_steps": int(config["lr_decay_steps"] * shorter),
        "adam_beta1": config["adam_beta1"],
        "adam_beta2": config["adam_beta2"],
        "adam_eps": 1e-8,  # torch's, which SAELens takes
        # SAELens clips to 1 since 1.5.0 (sae_lens/training/train_sae_on_language_model.py there, sae_trainer.py since)
        "max_grad_norm": None if _is_before(config, CLIPPED_SINCE) else 1.0,
        "seed": config["seed"],
        "normalize_activations": _normalization(config),
        "b_dec_init": config["b_dec_init_method"] if config.is_flat else "zeros",
        "init_firing_rate": None,
        "dead_window": max(1, config["dead_feature_window"] * config["train_batch_size_tokens"]),
        **_initial_norms(config),
    }
    sparsity = _topk if architecture in TOPK_FAMILY else _jumprelu if architecture == "jumprelu" else _penalised
    return run | sparsity(config, shorter)


def _d_sae(config: SAELensConfig) -> int | None:
    if config["d_sae"] is not None or not config.is_flat:
        return config["d_sae"]
    factor = config["expansion_factor"]
    return _whole(config, "d_in") * (4 if factor is None else _whole(config, "expansion_factor"))


def _whole(config: SAELensConfig, name: str) -> int:
    value = config[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ConfigError(f"{config.who}: {name} must be a whole number, got {value!r}; write it as one")
    return int(value)


def _is_before(config: SAELensConfig, version: tuple[int, int, int]) -> bool:
    """Whether a config is of an older version of SAELens. Raises ConfigError if it may be and does not say so.

    `hook_point` became `hook_name` with 3.0.0. A config with `hook_point` is of 1.5.0 or later if it has a field
    that is new there.
    """
    if config.version is not None:
        return config.version < version
    if "hook_point" in config.given and not _NEW_IN_1_5 & config.given.keys():
        raise ConfigError(
            f"{config.who}: must say its version of SAELens: the squared error is a mean over d_in before 1.5.0 "
            'and a sum since; add sae_lens_version="1.4.0", or the version that it is of'
        )
    return False


def _normalization(config: SAELensConfig) -> str:
    """A bool until 3.3 (sae_lens/training/activations_store.py), a word since."""
    asked = config["normalize_activations"]
    words = {True: "expected_average_only_in", False: "none"}
    return words[asked] if isinstance(asked, bool) else asked


def _initial_norms(config: SAELensConfig) -> dict[str, float]:
    """The norm of the decoder's rows, and how much longer or shorter those of the encoder are at first.

    SAELens 6 begins both alike (saes/sae.py). Before, the encoder had its own random entries, within sqrt(6 / d_sae)
    of 0, unless it was the decoder's transpose (sae_lens/training/training_sae.py of 3.0.0 to 5.11.0).
    """
    if not config.is_flat:
        norm = KAIMING_NORM if config["decoder_init_norm"] is None else config["decoder_init_norm"]
        encoder_norm = norm
    else:
        heuristic = config["decoder_heuristic_init_norm"] if config["decoder_heuristic_init"] else KAIMING_NORM
        norm = 1.0 if config["normalize_sae_decoder"] else heuristic
        of_its_own = math.sqrt(2 * max(1, _whole(config, "d_in")) / max(1, _d_sae(config) or 1))
        encoder_norm = norm if config["init_encoder_as_decoder_transpose"] else of_its_own
    weighs_norms = config.architecture == "standard" or config["jumprelu_sparsity_loss_mode"] == "tanh"
    has_free_norms = weighs_norms and config.architecture in ("standard", "jumprelu")
    held = norm if has_free_norms else 1.0
    return {"decoder_init_norm": held, "encoder_init_scale": encoder_norm / (held or 1.0)}


def _penalised(config: SAELensConfig, shorter: float) -> dict[str, Any]:
    """standard and gated. The L1 penalty of SAELens weighs decoder norms, or holds them at 1, which is the same."""
    return {
        "sparsity_coefficient": config["l1_coefficient"] * _loss_factor(config),
        "sparsity_warm_up_steps": int(config["l1_warm_up_steps"] * shorter),
    }


def _loss_factor(config: SAELensConfig) -> int:
    """The factor that makes the squared error of SAELens the one of here, which is a sum over d_in.

    It is such a sum since 1.5.0: `per_item_mse_loss.sum(dim=-1).mean()` in sae_lens/training/sparse_autoencoder.py,
    training_sae.py since 3.0.0, and saes/sae.py since 6.0.0. Before, it is `per_item_mse_loss.mean()`.
    Until 0.2.1 each row was divided by its norm besides, as `mse_loss_normalization` still asks for; both are refused.
    """
    if not _is_before(config, SUMMED_SINCE):
        return 1
    if config.version is not None and config.version < (0, 2, 2):
        raise ConfigError(
            f"{config.who}: SAELens {'.'.join(map(str, config.version))} divides the squared error by the norm of each "
            "row, which is not trained here; set sae_lens_version to 1.4.0 in a copy of it to train without that"
        )
    return _whole(config, "d_in")


def _topk(config: SAELensConfig, shorter: float) -> dict[str, Any]:
    """The TopK family. k_aux is half of d_in, of d_sae before 5.6.1 (sae_lens/training/training_sae.py)."""
    of_flat = config["activation_fn_kwargs"]
    k = of_flat.get("k", 100) if config.is_flat and isinstance(of_flat, Mapping) else config["k"]
    d_sae = _d_sae(config) or 1
    wide = config.is_flat and config.version is not None and config.version < (5, 6, 1)
    settings: dict[str, Any] = {
        "k": k,
        "aux_coefficient": config["aux_loss_coefficient"] * AUX_AT_SHARE_LEFT,
        "k_aux": max(1, min(d_sae, (d_sae if wide else _whole(config, "d_in")) // 2)),
        "encoder_dtype": "float32",
    }
    if config.architecture == "matryoshka_batchtopk":
        widths = sorted({*config["matryoshka_widths"], d_sae})
        # SAELens adds up the errors of the prefixes, and AuxK to the sum (saes/matryoshka_batchtopk_sae.py)
        settings |= {"matryoshka_widths": widths, "aux_coefficient": settings["aux_coefficient"] / len(widths)}
    return settings


def _jumprelu(config: SAELensConfig, shorter: float) -> dict[str, Any]:
    """jumprelu. SAELens' quadratic penalty is 2 / L (l0 - L)^2 for the target L, here it is (l0 / L - 1)^2."""
    if config.is_flat:  # in 4.1.0 to 5.11.0 the coefficient of L0 is called l1_coefficient
        mode, coefficient, warm_up = "step", config["l1_coefficient"], config["l1_warm_up_steps"]
    else:
        mode = config["jumprelu_sparsity_loss_mode"]
        coefficient, warm_up = config["l0_coefficient"], config["l0_warm_up_steps"]
    target = config["target_l0"]
    of_mode = {
        "step": {},
        "quadratic": {"target_l0": target},
        "tanh": {
            "jumprelu_tanh_scale": config["jumprelu_tanh_scale"],
            "pre_act_loss_coefficient": config["pre_act_loss_coefficient"] or 0.0,
        },
    }
    return {
        "sparsity_coefficient": coefficient * (2 * (target or 1) if mode == "quadratic" else 1),
        "sparsity_warm_up_steps": int(warm_up * shorter),
        "jumprelu_init_threshold": config["jumprelu_init_threshold"],
        "jumprelu_bandwidth": config["jumprelu_bandwidth"],
        "jumprelu_sparsity_loss_mode": mode,
        **of_mode[mode],
    }
