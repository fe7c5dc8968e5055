"""Sweep files: expansion, defaults, and an error for everything that is wrong in them."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from support.config_cases import BASE, HOOK, OUT, OUT_WIDTH, Hooks, TwoHooks, penalised, resolved
from support.surroundings import descriptors

from actcache.errors import CacheMismatch, ConfigError
from trainer.config.presets import HookFacts
from trainer.config.settings import SAEConfig, TrainConfig
from trainer.config.sweep import SweepConfig
from trainer.trained_on import FrozenHooks


def test_a_jumprelu_penalty_has_its_own_settings() -> None:
    given = {"sparsity_coefficient": 1.0}
    assert penalised("jumprelu", **given).jumprelu_sparsity_loss_mode == "step"
    assert penalised("jumprelu", **given, jumprelu_sparsity_loss_mode="quadratic", target_l0=20).target_l0 == 20.0
    tanh = {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_tanh_scale": 4.0, "pre_act_loss_coefficient": 3e-6}
    assert penalised("jumprelu", **given, **tanh).jumprelu_tanh_scale == 4.0
    for changes, message in (
        ({"jumprelu_sparsity_loss_mode": "quadratic"}, "mode=quadratic needs target_l0"),
        ({"target_l0": 20.0}, "mode=step ignores target_l0, got 20.0"),
        (tanh | {"target_l0": 20.0}, "mode=tanh ignores target_l0"),
        (tanh | {"jumprelu_tanh_scale": None}, "mode=tanh needs jumprelu_tanh_scale"),
    ):
        with pytest.raises(ConfigError, match=message):
            penalised("jumprelu", **given, **changes)


def test_null_leaves_what_an_architecture_needs_at_its_default() -> None:
    assert resolved(architecture="matryoshka_batchtopk", matryoshka_widths=None).matryoshka_widths is not None
    given = {"sparsity_coefficient": 1.0}
    for setting in ("jumprelu_sparsity_loss_mode", "jumprelu_bandwidth", "jumprelu_init_threshold"):
        assert penalised("jumprelu", **given, **{setting: None}) == penalised("jumprelu", **given)
    assert penalised("standard", max_grad_norm=None).max_grad_norm is None, "null is a value there"


def test_gated_needs_its_coefficient() -> None:
    config = penalised("gated", sparsity_coefficient=0.5)
    assert (config.adam_beta1, config.has_unit_norm_decoder, config.sparsity_warm_up_steps) == (0.0, True, 50)
    with pytest.raises(ConfigError, match="gated needs sparsity_coefficient"):
        penalised("gated")


@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder"])
def test_a_transcoder_has_two_hooks_and_two_scales(architecture: str) -> None:
    run = {"architecture": architecture, "hook_name": HOOK, "hook_name_out": OUT, "d_sae": 256}
    sweep = SweepConfig.from_dict({"base": run})
    (config,) = sweep.expand(TwoHooks(), 4096)
    assert sweep.hook_names == (HOOK, OUT)
    assert (config.d_in, config.d_out, config.b_dec_init) == (64, OUT_WIDTH, "mean")
    assert (config.input_scale, config.output_scale) == (math.sqrt(64) / 20, math.sqrt(OUT_WIDTH) / 3)
    assert config.total_variance == pytest.approx(6.0 * OUT_WIDTH / 9)
    assert [hook.hook_name for hook in (*config.inputs, *config.outputs)] == [HOOK, OUT]
    with pytest.raises(ConfigError, match=f"{architecture} needs hook_name_out"):
        SweepConfig.from_dict({"base": run | {"hook_name_out": None}})


def test_a_crosscoder_has_a_scale_for_each_hook() -> None:
    run = {"architecture": "crosscoder", "hook_names": [HOOK, OUT], "d_sae": 256}
    sweep = SweepConfig.from_dict({"base": run})
    (config,) = sweep.expand(TwoHooks(), 4096)
    assert sweep.hook_names == (HOOK, OUT)
    assert (config.d_in, config.d_out, config.hook_widths) == (64 + OUT_WIDTH, 64 + OUT_WIDTH, (64, OUT_WIDTH))
    assert config.hook_scales == (math.sqrt(64) / 20, math.sqrt(OUT_WIDTH) / 3)
    assert (config.hook_name, config.input_scale) == (HOOK, 1.0)
    assert config.total_variance == pytest.approx(500 * 64 / 400 + 6.0 * OUT_WIDTH / 9)
    assert config.inputs == config.outputs
    assert SAEConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    for changes, message in (
        ({"hook_name": HOOK}, "crosscoder takes hook_names, got hook_name"),
        ({"hook_names": None}, "crosscoder needs hook_names"),
        ({"hook_names": [HOOK]}, "hook_names must be a list of at least two that differ"),
        ({"hook_names": [HOOK, HOOK]}, "hook_names must be a list of at least two that differ"),
        ({"hook_name_out": OUT}, "hook_name_out is a setting of transcoder, skip_transcoder"),
    ):
        with pytest.raises(ConfigError, match=message):
            SweepConfig.from_dict({"base": run | changes})


def test_settings_win_over_defaults() -> None:
    config = resolved(lr=1, k_aux=7, dead_window=99, normalize_activations="none", max_grad_norm=None, seed=5)
    assert (config.lr, config.k_aux, config.dead_window, config.input_scale, config.seed) == (1.0, 7, 99, 1.0, 5)
    assert type(config.lr) is float
    assert config.total_variance == 500.0


def test_the_scale_is_of_the_rows_that_are_trained_on() -> None:
    kept = resolved(sweep={"exclude_special_tokens": False})
    assert kept.input_scale == resolved().input_scale / 2


def test_the_last_partial_batch_is_a_step() -> None:
    assert resolved(training_tokens=4097).n_steps == 2


LONG_RAMPS = {
    "a warm-up": {"lr_warm_up_steps": 11},
    "a decay": {"lr_decay_steps": 11},
    "a warm-up and a decay that overlap": {"lr_warm_up_steps": 5, "lr_decay_steps": 6},
    "a warm-up of the sparsity": {"architecture": "standard", "k": None, "sparsity_warm_up_steps": 11},
    "an anneal of k": {"k_anneal_start": 32, "k_anneal_steps": 11},
}


@pytest.mark.parametrize("ramps", LONG_RAMPS.values(), ids=LONG_RAMPS)
def test_a_ramp_longer_than_the_run_is_refused(ramps: dict) -> None:
    """The numbers are named. Just as long as the run it may be."""
    asked = (
        r"must be at most n_steps=10, got (11|5 \+ 6|11 \+ 0|0 \+ 11); take fewer, or train on more than 40960 tokens"
    )
    with pytest.raises(ConfigError, match=asked):
        resolved(training_tokens=4096 * 10, **ramps)
    assert resolved(training_tokens=4096 * 11, **ramps).n_steps == 11


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
@pytest.mark.parametrize("n_steps", [1, 2, 7])
def test_the_ramps_of_presets_fit_into_the_shortest_runs(architecture: str, n_steps: int) -> None:
    assert resolved(training_tokens=4096 * n_steps, architecture=architecture, k=None, sparsity_coefficient=1.0)


def test_a_config_of_before_opens_whatever_its_ramps_are() -> None:
    config = resolved(training_tokens=4096 * 11, lr_warm_up_steps=11)
    assert dataclasses.replace(config, n_steps=3).lr_warm_up_steps == 11


def test_grid_is_the_product_in_order_and_names_tell_what_varies() -> None:
    sweep = SweepConfig.from_dict({"base": BASE, "grid": {"d_sae": [64, 128], "k": [4, 8]}})
    assert [run["name"] for run in sweep.runs] == ["topk-k4-d64", "topk-k8-d64", "topk-k4-d128", "topk-k8-d128"]
    sweep = SweepConfig.from_dict({"base": BASE, "grid": {"lr": [1e-3, 1e-4], "seed": [0, 1]}})
    assert [run["name"] for run in sweep.runs][:2] == ["topk-k16-d1024-lr0.001-seed0", "topk-k16-d1024-lr0.001-seed1"]


def test_runs_add_to_the_base_and_may_name_themselves() -> None:
    runs = [{}, {"name": "mine", "lr": 1.0}, {"architecture": "batchtopk", "k": 8}]
    sweep = SweepConfig.from_dict({"base": BASE, "runs": runs})
    assert [run["name"] for run in sweep.runs] == ["topk-k16-d1024", "mine", "batchtopk-k8-d1024"]
    assert [config.architecture for config in sweep.expand(Hooks(), 4096)] == ["topk", "topk", "batchtopk"]
    assert sweep.hook_names == (HOOK,)


def test_hook_names_in_names_are_plain_file_names() -> None:
    sweep = SweepConfig.from_dict({"base": BASE, "grid": {"hook_name": ["a/b c", "d"]}})
    assert [run["name"] for run in sweep.runs] == ["topk-k16-d1024-a-b-c", "topk-k16-d1024-d"]
    assert sweep.hook_names == ("a/b c", "d")


def test_yaml_reads_as_written(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        f"batch_tokens: 256\nseed: 3\nepochs: 2\nlog_every: 5\nbase: {{architecture: topk, hook_name: {HOOK}}}\n"
        "grid:\n  d_sae: [64]\n  k: [4]\n  lr: [3e-4, 1E-3, .5e-2]\n"
    )
    sweep = SweepConfig.from_yaml(path)
    assert sweep.train == TrainConfig(batch_tokens=256, seed=3, epochs=2, log_every=5)
    assert [run["lr"] for run in sweep.runs] == [3e-4, 1e-3, 5e-3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: {d_sae: 4, d_sae: 8}", "'d_sae' stands twice"),
        ("base: [", "is not YAML"),
        ("- 1", "sweep: must be a mapping"),
        ("", "sweep: must be a mapping"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        SweepConfig.from_yaml(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_opened_is_not_missing(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("runs: []")
    with descriptors(3), pytest.raises(OSError, match=r"ulimit -n.*sweep\.yaml"):
        SweepConfig.from_yaml(tmp_path / "sweep.yaml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot be read"):
        SweepConfig.from_yaml(tmp_path / "nothing.yaml")


WRONG_RUNS = [
    ({"k": 2000}, "topk-k2000-d1024: k must be at most d_sae=1024, got k=2000"),
    ({"k": 0}, "k must be at least 1, got k=0"),
    ({"k": None}, "topk needs k"),
    ({"k": 4.0}, r"k must be int, got 4\.0"),
    ({"k": True}, "k must be int, got True"),
    ({"k": [4]}, "k must be int"),
    ({"k_aux": 2000}, "k_aux must be at most d_sae=1024"),
    ({"sparsity_coefficient": 1.0}, "sparsity_coefficient is a setting of standard, jumprelu, gated, transcoder"),
    (
        {"architecture": "standard"},
        "k is a setting of topk, abstopk, batchtopk, matryoshka_batchtopk, got k=16 for standard",
    ),
    ({"architecture": "jumprelu", "k": None}, "jumprelu needs sparsity_coefficient"),
    ({"jumprelu_bandwidth": 0.1}, "jumprelu_bandwidth is a setting of jumprelu"),
    ({"architecture": "gates"}, "architecture must be one of standard, topk, abstopk, batchtopk"),
    ({"d_sea": 3}, "unknown setting 'd_sea'; did you mean d_sae"),
    ({"learning_rate": 3}, "unknown setting 'learning_rate'; known: "),
    ({"d_in": 3}, "unknown setting 'd_in'"),
    ({"d_sae": 0}, "d_sae must be at least 1"),
    ({"d_sae": None}, "needs d_sae"),
    ({"hook_name": None}, "needs hook_name"),
    ({"lr": "3e-4"}, "lr must be float, got '3e-4'"),
    ({"lr": 0.0}, "lr must be above 0"),
    ({"lr": float("nan")}, "lr must be above 0"),
    ({"lr": float("inf")}, "lr must be above 0"),
    ({"adam_beta1": 1.0}, r"adam_beta1 must be in \[0, 1\)"),
    ({"seed": -1}, r"seed must be in \[0, 2\*\*63\)"),
    ({"b_dec_init": "median"}, "b_dec_init must be one of zeros, mean, geometric_median"),
    ({"name": "../x"}, "name must be a plain file name"),
    ({"name": ""}, "name must be a plain file name"),
    ({"preset": "openai"}, "preset must be one of anthropic_april, openai_topk"),
    ({"preset": "gdm_jumprelu"}, "preset gdm_jumprelu is one of jumprelu, got architecture 'topk'"),
    ({"optimizer": "sgd"}, "optimizer must be one of adam, adamw, signum, muon, schedule_free"),
    ({"optimizer": "signum", "momentum": 0.9}, "is not of optimizer=signum; give lr"),
    ({"optimizer": "signum", "lr": 1.0}, "momentum is a setting of signum and muon, which need it, got momentum=None"),
    ({"momentum": 0.9}, "momentum is a setting of signum and muon, .* got momentum=0.9 for adam"),
    ({"weight_decay": 0.1}, "weight_decay is a setting of adamw, signum, muon, schedule_free, got it for adam"),
    ({"lr_end": 1e-5}, "must be given with it, got lr_end=1e-05 for constant"),
    ({"lr_scheduler_name": "cosineannealing"}, "must be given with it, got lr_end=None"),
    ({"k_anneal_steps": 5}, "k_anneal_start and k_anneal_steps go together"),
    ({"k_anneal_start": 5000, "k_anneal_steps": 5}, "k_anneal_start must be at most d_sae=1024"),
    ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\)"),
    ({"hook_names": ["a", "b"]}, "hook_names is a setting of crosscoder"),
]


@pytest.mark.parametrize(("run", "message"), WRONG_RUNS, ids=[str(run) for run, _ in WRONG_RUNS])
def test_a_wrong_setting_is_an_error_before_any_cache_is_open(run: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SweepConfig.from_dict({"base": BASE | run})


def test_jumprelus_preset_is_refused_at_another_scale() -> None:
    with pytest.raises(ConfigError, match="hold for normalize_activations=unit_mean_square only, got none"):
        penalised("jumprelu", sparsity_coefficient=1e-3, normalize_activations="none", jumprelu_bandwidth=0.05)
    config = penalised(
        "jumprelu",
        sparsity_coefficient=1e-3,
        normalize_activations="none",
        jumprelu_bandwidth=0.05,
        jumprelu_init_threshold=0.01,
    )
    assert (config.jumprelu_bandwidth, config.jumprelu_init_threshold) == (0.05, 0.01)


WRONG_SWEEPS = [
    ({}, "names no run"),
    ({"base": {}}, "names no run"),
    ({"base": BASE, "runs": []}, "runs: must be a list of at least one entry"),
    ({"base": BASE, "grid": {}}, "grid is empty"),
    ({"base": BASE, "grid": {"k": []}}, r"grid\.k: must be a list of at least one entry"),
    ({"base": BASE, "grid": {"k": 4}}, r"grid\.k: must be a list"),
    ({"base": BASE, "grid": {"k": [4]}, "runs": [{}]}, "give grid or runs, not both"),
    ({"base": BASE, "runs": [{}, {}]}, "run names must differ, got 'topk-k16-d1024' twice"),
    ({"base": BASE, "runs": [{"name": "a"}, {"name": "A"}]}, "run names must differ"),
    ({"base": BASE, "runs": ["topk"]}, r"runs\[0\]: must be a mapping"),
    ({"base": 3}, "base: must be a mapping"),
    ({"base": BASE, "batch_token": 3}, "unknown setting 'batch_token'; did you mean batch_tokens"),
    ({"base": BASE, "batch_tokens": 0}, "batch_tokens must be at least 1"),
    ({"base": BASE, "batch_tokens": None}, "batch_tokens must be int"),
    ({"base": BASE, "tokens": 0}, "tokens must be at least 1"),
    ({"base": BASE, "epochs": 1.5}, "epochs must be int"),
    ({"base": BASE, "exclude_special_tokens": 1}, "exclude_special_tokens must be bool"),
]


@pytest.mark.parametrize(("sweep", "message"), WRONG_SWEEPS, ids=[str(sweep) for sweep, _ in WRONG_SWEEPS])
def test_a_wrong_sweep_is_an_error(sweep: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SweepConfig.from_dict(sweep)


def test_a_hook_that_the_cache_lacks_is_the_caches_error() -> None:
    with pytest.raises(CacheMismatch, match=r"no blocks\.9"):
        SweepConfig.from_dict({"base": BASE | {"hook_name": "blocks.9"}}).expand(Hooks(), 4096)


@pytest.mark.parametrize(
    ("norm", "square"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (1.0, -1.0), (1e-300, 1.0), (1e200, 1e300)]
)
def test_rows_whose_lengths_cannot_be_scaled_are_refused(norm: float, square: float) -> None:
    facts = HookFacts(d_in=64, mean_norm=norm, mean_square_norm=square, total_variance=1.0)
    with pytest.raises(
        CacheMismatch, match=r"must have lengths that can be scaled to 1, got a mean norm of .*; verify"
    ):
        SweepConfig.from_dict({"base": BASE}).expand(FrozenHooks(hooks={BASE["hook_name"]: facts}), 4096)


def test_rows_without_variance_are_refused() -> None:
    with pytest.raises(CacheMismatch, match="must differ from each other"):
        SweepConfig.from_dict({"base": BASE}).expand(Hooks(variance=0.0), 4096)
