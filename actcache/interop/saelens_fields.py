"""Every field of SAELens' training configs, and what it is here. docs/tutorial/from-saelens.md shows these tables.

A text that begins with "not here" says why nothing is taken. "harvest" is an option of `actcache harvest`, "train" one
of `actcache train`, "sweep" a key that all SAEs share, "SAE" a key of one SAE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

Command = Literal["harvest", "train"]


@runtime_checkable
class Config(Protocol):
    """What a limit may ask of the config that a value stands in."""

    @property
    def architecture(self) -> str | None: ...
    def __getitem__(self, name: str, /) -> Any: ...


RUNNER = {
    "sae": "the SAE's config, below",
    "model_name": "harvest `--model`",
    "model_class_name": "harvest `--backend`: hooks of the residual stream are read from the transformers model itself",
    "hook_name": "harvest `--hook`, SAE `hook_name`",
    "hook_eval": "not here: SAELens does not use it",
    "hook_head_index": "not here: an SAE reads a whole hook, all heads of attn.hook_z side by side",
    "dataset_path": "harvest `--dataset`",
    "dataset_trust_remote_code": "not here: no code of a dataset is run",
    "streaming": "harvest `--streaming`",
    "is_dataset_tokenized": "not here: a column of token ids is recognised; harvest `--column` names another",
    "use_chat_formatting": "not here: no chat template is applied",
    "context_size": "harvest `--context-size`",
    "use_cached_activations": "not here: training always reads a cache",
    "cached_activations_path": "not here: CACHE of train; `actcache import-cache` takes an Arrow cache in",
    "from_pretrained_path": "not here: training begins at new weights",
    "n_batches_in_buffer": "not here: the whole cache is shuffled, without a buffer",
    "training_tokens": "sweep `tokens`; harvest `--tokens`, 2 % more for held-out rows, 5 % without special tokens",
    "store_batch_size_prompts": "harvest `--batch-size`, if the config gives it",
    "seqpos_slice": "not here: a sweep trains on every position",
    "disable_concat_sequences": "not here: documents are packed one after another",
    "sequence_separator_token": "harvest `--separator`: bos, eos or none",
    "activations_mixing_fraction": "not here: the whole cache is shuffled, without a buffer",
    "device": "not here: `--device` of harvest and of train; auto takes a GPU if there is one",
    "llm_device": "not here: harvest `--device`",
    "act_store_device": "not here: a harvest keeps activations where the model is",
    "prefetch_llm_batches": "not here: a harvest always computes while it writes",
    "seed": "harvest `--seed`, sweep `seed`, SAE `seed`",
    "dtype": "harvest `--dtype`; SAEs train in float32",
    "prepend_bos": "harvest `--prepend-bos`",
    "autocast": "not here: SAEs train in float32",
    "autocast_lm": "harvest `--model-dtype` bfloat16",
    "compile_llm": "harvest `--compile`",
    "llm_compilation_mode": "not here: `--compile` has one mode",
    "compile_sae": "not here: the steps of an SAE have kernels of their own",
    "sae_compilation_mode": "not here, as `compile_sae`",
    "train_batch_size_tokens": "sweep `batch_tokens`",
    "adam_beta1": "SAE `adam_beta1`",
    "adam_beta2": "SAE `adam_beta2`",
    "lr": "SAE `lr`",
    "lr_scheduler_name": "SAE `lr_scheduler_name`: constant or cosineannealing",
    "lr_warm_up_steps": "SAE `lr_warm_up_steps`",
    "lr_end": "SAE `lr_end`, for cosineannealing; lr / 10 if it is not given",
    "lr_decay_steps": "SAE `lr_decay_steps`",
    "n_restart_cycles": "not here: cosineannealing has no restarts",
    "dead_feature_window": "SAE `dead_window`, in tokens instead of steps",
    "feature_sampling_window": "not here: `actcache eval` counts how often each latent fires, after training",
    "dead_feature_threshold": "not here: a latent is dead if it did not fire within `dead_window`",
    "n_eval_batches": "sweep `eval_tokens`: so many batches of prompts",
    "eval_batch_size_prompts": "not here: held-out rows are read in batches of `batch_tokens`",
    "logger": "the logger's config, below",
    "n_checkpoints": "sweep `checkpoint_every`, `keep_checkpoints`",
    "checkpoint_path": "not here: RUNS/<name>/checkpoint",
    "save_final_checkpoint": "not here: the last weights are always saved",
    "output_path": "not here: train `--out`",
    "resume_from_checkpoint": "not here: the same command resumes a training of its own",
    "verbose": "not here: it changes no result",
    "model_kwargs": "not here: from Python, harvest a model that you loaded",
    "model_from_pretrained_kwargs": "harvest `--model-dtype` and `--revision`; a model is never centred or folded",
    "sae_lens_version": "says how the loss was summed",
    "sae_lens_training_version": "says how the loss was summed",
    "exclude_special_tokens": "sweep `exclude_special_tokens`",
    "n_batches_for_norm_estimate": "not here: norms are those of all rows of the train split",
}
SAE = {
    "architecture": "SAE `architecture`: standard, gated, jumprelu, topk, batchtopk, matryoshka_batchtopk or abstopk",
    "d_in": "not here: the cache knows it",
    "d_sae": "SAE `d_sae`",
    "sae.dtype": "not here: SAEs train in float32",
    "sae.device": "not here: train `--device`",
    "apply_b_dec_to_input": "not here: the TopK family and gated encode x - b_dec, others x, and b_enc makes up for it",
    "normalize_activations": "SAE `normalize_activations`: none or expected_average_only_in",
    "reshape_activations": "not here: the heads of attn.hook_z lie side by side",
    "metadata": "not here: it is written anew into sae/cfg.json",
    "decoder_init_norm": "SAE `decoder_init_norm`; where decoder rows have norm 1, SAE `encoder_init_scale`",
    "l1_coefficient": "SAE `sparsity_coefficient`; times d_in before SAELens 1.5.0, whose error is a mean over d_in",
    "l1_warm_up_steps": "SAE `sparsity_warm_up_steps`",
    "lp_norm": "not here: the penalty is the L1 norm",
    "k": "SAE `k`, a whole number",
    "use_sparse_activations": "not here: sums run over active latents alone, always",
    "aux_loss_coefficient": "SAE `aux_coefficient`, a fifth of it, because the loss is divided otherwise",
    "rescale_acts_by_decoder_norm": "not here: decoder rows have norm 1, so both values mean the same",
    "topk_threshold_lr": "not here: the threshold is measured after training",
    "matryoshka_widths": "SAE `matryoshka_widths`; d_sae is added if it is not the last",
    "use_matryoshka_aux_loss": "not here: dead latents learn the error of the whole SAE",
    "l0_coefficient": "SAE `sparsity_coefficient`; in mode quadratic times 2 `target_l0`, of the mean L0 of a batch",
    "l0_warm_up_steps": "SAE `sparsity_warm_up_steps`",
    "jumprelu_init_threshold": "SAE `jumprelu_init_threshold`",
    "jumprelu_bandwidth": "SAE `jumprelu_bandwidth`",
    "jumprelu_sparsity_loss_mode": "SAE `jumprelu_sparsity_loss_mode`: step, tanh or quadratic",
    "jumprelu_tanh_scale": "SAE `jumprelu_tanh_scale`, in mode tanh",
    "jumprelu_ste_to_input": "not here: the estimator's gradient goes to the threshold alone",
    "pre_act_loss_coefficient": "SAE `pre_act_loss_coefficient`, in mode tanh; of all silent latents, not of the dead",
    "target_l0": "SAE `target_l0`, in mode quadratic",
    "residual_threshold": "not here: matching_pursuit is imported, and not trained",
    "max_iterations": "not here, as `residual_threshold`",
    "stop_on_duplicate_support": "not here, as `residual_threshold`",
}
LOGGER = {
    "log_to_wandb": "not here: train `--logger` wandb asks for it",
    "log_activations_store_to_wandb": "not here: a cache stays where it is",
    "log_optimizer_state_to_wandb": "not here: checkpoints stay in RUNS/<name>",
    "log_weights_to_wandb": "not here: weights stay in RUNS/<name>",
    "wandb_project": "not here: `WANDB_PROJECT` in the environment",
    "wandb_id": "not here: it is made, and kept in RUNS/<name>/logger_id",
    "run_name": "SAE `name`",
    "wandb_entity": "not here: `WANDB_ENTITY` in the environment, which wandb reads",
    "wandb_log_frequency": "sweep `log_every`",
    "eval_every_n_wandb_logs": "sweep `eval_every`, in steps",
}
FLAT = {  # fields that only SAELens 0 to 5 has; its other fields stand above
    "hook_layer": "not here: `hook_name` says it",
    "hook_point": "harvest `--hook`, SAE `hook_name` (SAELens 0 to 2)",
    "hook_point_layer": "the layer of `hook_point`",
    "hook_point_eval": "not here: SAELens does not use it",
    "hook_point_head_index": "not here, as `hook_head_index`",
    "expansion_factor": "SAE `d_sae`, times d_in",
    "b_dec_init_method": "SAE `b_dec_init`",
    "activation_fn": "SAE `architecture`: relu, or topk, which makes it topk",
    "activation_fn_str": "as `activation_fn`, in a cfg.json",
    "activation_fn_kwargs": "SAE `k`",
    "normalize_sae_decoder": "SAE `decoder_init_norm`: 1 if true",
    "noise_scale": "not here: no noise is added to pre-activations",
    "decoder_orthogonal_init": "not here: decoder rows begin at random directions",
    "decoder_heuristic_init": "SAE `decoder_init_norm`",
    "decoder_heuristic_init_norm": "SAE `decoder_init_norm`",
    "init_encoder_as_decoder_transpose": "SAE `encoder_init_scale`: the encoder always begins along the decoder",
    "mse_loss_normalization": "not here: the squared error is not divided by the norm of each row",
    "scale_sparsity_penalty_by_decoder_norm": "not here: the penalty of standard always weighs decoder norms",
    "use_ghost_grads": "not here: dead latents get no ghost gradients; the TopK family revives them by AuxK",
    "finetuning_method": "not here: no fine-tuning follows",
    "finetuning_tokens": "not here, as `finetuning_method`",
    "finetuning_scaling_factor": "not here, as `finetuning_method`",
    "resume": "not here: the same command resumes a training of its own",
    "total_training_tokens": "as `training_tokens` (SAELens 0.0 to 0.5.0)",
    "train_batch_size": "as `train_batch_size_tokens` (SAELens 0)",
    "store_batch_size": "as `store_batch_size_prompts` (SAELens 0)",
    "n_eval_seqs": "not here: sweep `eval_tokens`",
    "tokens_per_buffer": "not here: SAELens computes it",
    "neuronpedia_id": "not here: `actcache export` names it anew",
}
ACTIVATIONS = {  # fields that only CacheActivationsRunnerConfig has
    "model_batch_size": "harvest `--batch-size`",
    "new_cached_activations_path": "not here: harvest `--out`",
    "shuffle": "not here: rows are always scattered",
    "buffer_size_gb": "not here: a harvest sizes its shards itself",
    "hf_repo_id": "not here: a cache stays on this machine",
    "hf_num_shards": "not here, as `hf_repo_id`",
    "hf_revision": "not here, as `hf_repo_id`",
    "hf_is_private_repo": "not here, as `hf_repo_id`",
}
HERE = RUNNER | SAE | LOGGER | FLAT | ACTIVATIONS
OF_HARVEST = (
    *("model_name", "model_class_name", "hook_name", "hook_point", "hook_point_layer", "dataset_path"),
    *("dataset_trust_remote_code", "streaming", "is_dataset_tokenized", "use_chat_formatting", "context_size"),
    *("training_tokens", "total_training_tokens", "store_batch_size_prompts", "store_batch_size", "model_batch_size"),
    *("disable_concat_sequences", "sequence_separator_token", "seed", "dtype", "prepend_bos", "autocast_lm"),
    *("compile_llm", "llm_compilation_mode", "model_kwargs", "model_from_pretrained_kwargs"),
)
RENAMED = {
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
    "total_training_tokens": "training_tokens",
    "train_batch_size": "train_batch_size_tokens",
    "store_batch_size": "store_batch_size_prompts",
    "model_batch_size": "store_batch_size_prompts",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The values of a field that lose nothing. For another one the field's text says what is different here.

    is_met: whether a value is one of them, given the value and the config, of which it may ask other fields.
    refused_by: the command that refuses another value, because it would do something else than what was asked for;
        None where it is enough to say the difference.
    """

    is_met: Callable[[Any, Config], bool]
    refused_by: Command | None = None


def _one_of(*values: object, refused_by: Command | None = None) -> Limit:
    return Limit(is_met=lambda value, _: value in values, refused_by=refused_by)


def _takes_all(slice_: Any, _: Config) -> bool:
    return slice_ is None or (slice_[0] in (None, 0) and all(each is None for each in slice_[1:]))


TOPK_FAMILY = ("topk", "batchtopk", "matryoshka_batchtopk", "abstopk")
ARCHITECTURES = ("standard", "gated", "jumprelu", *TOPK_FAMILY)
LIMITS = {
    "model_class_name": _one_of("HookedTransformer", "AutoModelForCausalLM", refused_by="harvest"),
    "use_chat_formatting": _one_of(False, refused_by="harvest"),
    "disable_concat_sequences": _one_of(False, refused_by="harvest"),
    "sequence_separator_token": _one_of("bos", "eos", None, refused_by="harvest"),
    "dtype": _one_of("float32", "bfloat16", "float16", refused_by="harvest"),
    "model_kwargs": _one_of({}, None),
    "architecture": _one_of(*ARCHITECTURES, refused_by="train"),
    "hook_head_index": _one_of(None, refused_by="train"),
    "from_pretrained_path": _one_of(None, refused_by="train"),
    "seqpos_slice": Limit(is_met=_takes_all, refused_by="train"),
    "exclude_special_tokens": _one_of(True, False, refused_by="train"),
    "lr_scheduler_name": _one_of("constant", "cosineannealing", refused_by="train"),
    "normalize_activations": _one_of("none", "expected_average_only_in", True, False, refused_by="train"),
    "lp_norm": _one_of(1, refused_by="train"),
    "jumprelu_sparsity_loss_mode": _one_of("step", "tanh", "quadratic", refused_by="train"),
    "activation_fn": _one_of("relu", "topk", None, refused_by="train"),
    "mse_loss_normalization": _one_of(None, refused_by="train"),
    "noise_scale": _one_of(0, refused_by="train"),
    "sae.dtype": _one_of("float32"),
    "autocast": _one_of(False),
    "apply_b_dec_to_input": Limit(is_met=lambda value, of: value == (of.architecture in ("gated", *TOPK_FAMILY))),
    "use_matryoshka_aux_loss": _one_of(False),
    "aux_loss_coefficient": _one_of(0),
    "jumprelu_ste_to_input": _one_of(False),
    "pre_act_loss_coefficient": _one_of(None),
    "use_ghost_grads": _one_of(False),
    "finetuning_method": _one_of(None),
    "decoder_orthogonal_init": _one_of(False),
    "init_encoder_as_decoder_transpose": _one_of(True),
    "scale_sparsity_penalty_by_decoder_norm": Limit(is_met=lambda value, of: value or of["normalize_sae_decoder"]),
}
# Fields that these architectures alone use; for others SAELens does not read them.
USED_BY = {
    **dict.fromkeys(("l1_coefficient", "l1_warm_up_steps"), ("standard", "gated", "jumprelu")),
    **dict.fromkeys(("lp_norm", "scale_sparsity_penalty_by_decoder_norm", "use_ghost_grads"), ("standard",)),
    **dict.fromkeys(("k", "activation_fn_kwargs", "aux_loss_coefficient"), TOPK_FAMILY),
    **dict.fromkeys(("matryoshka_widths", "use_matryoshka_aux_loss"), ("matryoshka_batchtopk",)),
    **dict.fromkeys(("l0_coefficient", "l0_warm_up_steps", "pre_act_loss_coefficient", "target_l0"), ("jumprelu",)),
    **dict.fromkeys(("jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_ste_to_input"), ("jumprelu",)),
    **dict.fromkeys(("jumprelu_sparsity_loss_mode", "jumprelu_tanh_scale"), ("jumprelu",)),
}
