"""The table of fields holds every field of every config of SAELens that trains on a language model."""

import dataclasses

import pytest

from actcache.interop.saelens_fields import (
    ACTIVATIONS,
    ARCHITECTURES,
    FLAT,
    HERE,
    LIMITS,
    LOGGER,
    OF_HARVEST,
    RENAMED,
    RUNNER,
    SAE,
    USED_BY,
)

# Every field of LanguageModelSAERunnerConfig in sae_lens/config.py (sae_lens/training/config.py until 2.1.3) of any
# version from 0.0.0 to 5.11.0, and what else their cfg.json holds.
OF_0_TO_5 = """
activation_fn activation_fn_kwargs act_store_device adam_beta1 adam_beta2 apply_b_dec_to_input architecture autocast
autocast_lm b_dec_init_method cached_activations_path checkpoint_path compile_llm compile_sae context_size d_in d_sae
dataset_path dataset_trust_remote_code dead_feature_threshold dead_feature_window decoder_heuristic_init
decoder_heuristic_init_norm decoder_orthogonal_init device dtype eval_batch_size_prompts eval_every_n_wandb_logs
exclude_special_tokens expansion_factor feature_sampling_window finetuning_method finetuning_tokens from_pretrained_path
hook_eval hook_head_index hook_layer hook_name hook_point hook_point_eval hook_point_head_index hook_point_layer
init_encoder_as_decoder_transpose is_dataset_tokenized jumprelu_bandwidth jumprelu_init_threshold l1_coefficient
l1_warm_up_steps llm_compilation_mode log_activations_store_to_wandb log_optimizer_state_to_wandb log_to_wandb
lp_norm lr model_name
lr_decay_steps lr_end lr_scheduler_name lr_warm_up_steps model_class_name model_from_pretrained_kwargs model_kwargs
mse_loss_normalization n_batches_in_buffer n_checkpoints n_eval_batches n_eval_seqs n_restart_cycles
noise_scale normalize_activations normalize_sae_decoder prepend_bos resume run_name sae_compilation_mode
sae_lens_training_version sae_lens_version scale_sparsity_penalty_by_decoder_norm seed seqpos_slice store_batch_size
store_batch_size_prompts streaming total_training_tokens train_batch_size train_batch_size_tokens training_tokens
use_cached_activations use_ghost_grads verbose wandb_entity wandb_id wandb_log_frequency wandb_project
activation_fn_str finetuning_scaling_factor neuronpedia_id tokens_per_buffer
"""


def fields_of(*classes) -> set[str]:
    return {field.name for each in classes for field in dataclasses.fields(each)}


def test_every_field_of_the_installed_saelens_stands_in_the_table():
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.config import CacheActivationsRunnerConfig
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

    saes = [config for _, config in SAE_TRAINING_CLASS_REGISTRY.values() if config.__module__.startswith("sae_lens.")]
    assert len(saes) >= 8
    assert fields_of(sae_lens.LanguageModelSAERunnerConfig) == {*RUNNER}
    assert fields_of(sae_lens.LoggingConfig) == {*LOGGER}
    assert fields_of(*saes) == {name.removeprefix("sae.") for name in SAE} - {"architecture"}
    assert fields_of(CacheActivationsRunnerConfig) - {*RUNNER, *SAE} == {*ACTIVATIONS}


def test_no_other_class_of_the_installed_saelens_configures_a_training_on_a_language_model():
    pytest.importorskip("sae_lens")
    from sae_lens import config

    classes = {
        name for name in vars(config) if name.endswith("Config") and vars(config)[name].__module__ == config.__name__
    }
    of_others = {"PretokenizeRunnerConfig", "SAETrainerConfig"}  # a dataset's tokens; any rows, whatever they are of
    assert classes - of_others == {"LanguageModelSAERunnerConfig", "CacheActivationsRunnerConfig", "LoggingConfig"}


def test_every_field_of_older_versions_stands_in_the_table():
    names = set(OF_0_TO_5.split())
    assert names <= {*HERE}
    assert {*FLAT} == names - {*RUNNER, *SAE, *LOGGER}


def test_a_field_stands_in_one_table():
    assert len(HERE) == sum(map(len, (RUNNER, SAE, LOGGER, FLAT, ACTIVATIONS)))


def test_rules_are_of_fields_that_there_are():
    for named in (LIMITS, USED_BY, OF_HARVEST, RENAMED, RENAMED.values()):
        assert {*named} <= {*HERE}
    assert all({*users} <= {*ARCHITECTURES} for users in USED_BY.values())


def test_the_architectures_are_those_that_are_trained_here():
    from trainer.config.settings import TRANSCODERS, Architecture

    trained = set(Architecture.__args__) - {*TRANSCODERS, "crosscoder"}  # SAELens trains none of these
    assert {*ARCHITECTURES} == trained
