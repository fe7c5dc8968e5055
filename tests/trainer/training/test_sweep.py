"""Sweeps: equal to solo training, resumed bit for bit after any stop, one run's failure is its own."""

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.places import ROOT
from support.strangers import as_another_user, only_root
from support.sweep_cases import (
    EVERY_2,
    HOOKS,
    TOKENS,
    Stop,
    a_config,
    batches,
    held_out,
    log_lines,
    new_states,
    stop_after,
)
from support.tiny_caches import harvest_tiny, write_texts
from support.tiny_models import make_model, make_tokenizer
from support.tiny_saes import ARCHITECTURES, TRANSCODERS
from support.training_cases import assert_same_state

from actcache.errors import CacheLocked, CacheMismatch, ConfigError, DatasetError, ManifestError
from actcache.flow import Batch
from actcache.loading.loader import Loader
from actcache.models.load import wrap_model
from actcache.store.cache import Cache, open_cache
from trainer.config.settings import SAEConfig, TrainConfig
from trainer.config.sweep import SweepConfig
from trainer.formats.saelens import load_sae
from trainer.kernels.active import Workspace
from trainer.run_folder import RUNS_LOCK, only_writer, read_runs
from trainer.sae.architectures import forward
from trainer.training.checkpoint import latest_checkpoint, load_checkpoint
from trainer.training.plan import pass_bytes, reading_bytes
from trainer.training.sweep import SweepProgress, plan, sweep, train

EVALUATED = dataclasses.replace(EVERY_2, eval_every=5)
HELD_OUT_KEYS = {f"validation/{name}" for name in ("explained_variance", "l0", "mse", "dead_fraction")}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A real cache of a tiny GPT-2."""
    folder = tmp_path_factory.mktemp("cache")
    tokenizer = make_tokenizer()
    model = wrap_model(make_model("gpt2", len(tokenizer)), tokenizer, "tiny")
    return harvest_tiny(model, write_texts(folder / "texts.jsonl", 6), folder / "cache")


def mixed_configs() -> list[SAEConfig]:
    """Every architecture, two hooks, two scales, two widths."""
    configs = [a_config(architecture) for architecture in ARCHITECTURES]
    configs.append(a_config("topk", name="other-hook", hook_name=HOOKS[0], input_scale=2.0))
    configs.append(a_config("topk", name="wide", d_sae=96, k=3, seed=4))
    return configs


def test_an_sae_of_a_sweep_equals_the_same_trained_alone(tmp_path: Path) -> None:
    together = new_states(mixed_configs())
    sweep(batches(), together, EVALUATED, tmp_path / "together", validation=held_out)
    for state, solo in zip(together, new_states(mixed_configs()), strict=True):
        sweep(batches(), [solo], EVALUATED, tmp_path / "alone", validation=held_out)
        assert_same_state(state, solo)
        logs = [tmp_path / where / state.config.name / "metrics.jsonl" for where in ("together", "alone")]
        assert logs[0].read_bytes() == logs[1].read_bytes()


def test_what_a_sweep_writes(tmp_path: Path) -> None:
    (state,) = new_states([a_config("topk")])
    seen: list[SweepProgress] = []
    records = sweep(batches(), [state], EVERY_2, tmp_path, progress=seen.append)
    folder = tmp_path / "a-topk"
    assert [line["step"] for line in log_lines(folder)] == [2, 4, 6, 8, 10, 12]
    assert log_lines(folder)[-1] == records["a-topk"].metrics
    assert records["a-topk"].metrics["n_tokens"] == TOKENS
    timing = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
    assert [line["step"] for line in timing] == [2, 4, 6, 8, 10, 12]
    assert set(timing[0]) == {
        "step",
        "step_seconds",
        "seconds",
        "tokens_per_second",
        "sae_tokens_per_second",
        "wait_share",
    }
    assert [each.name for each in (folder / "checkpoint").glob("*.safetensors")] == ["step-00000012.safetensors"]
    assert_same_state(load_checkpoint(state.config, folder / "checkpoint" / "step-00000012.safetensors"), state)
    assert [(each.step, each.n_saes) for each in seen] == [(step, int(step < 12)) for step in range(1, 13)]
    assert [step for step, each in enumerate(seen, start=1) if each.metrics] == [2, 4, 6, 8, 10, 12]
    assert seen[-1].n_sae_tokens == TOKENS


def test_held_out_rows_are_read_once_an_evaluation_for_all_saes(tmp_path: Path) -> None:
    states = new_states([a_config("topk"), a_config("standard", hook_name=HOOKS[0]), a_config("gated")])
    asked: list[Sequence[str]] = []

    def counted(hook_names: Sequence[str]) -> Iterator[Batch]:
        asked.append(hook_names)
        return held_out(hook_names)

    records = sweep(batches(), states, EVALUATED, tmp_path, validation=counted)
    assert asked == [(HOOKS[1], HOOKS[0])] * 3
    for state in states:
        lines = log_lines(tmp_path / state.config.name)
        assert [line["step"] for line in lines] == [2, 4, 5, 6, 8, 10, 12]
        for line in lines:
            assert HELD_OUT_KEYS & set(line) == (HELD_OUT_KEYS if line["step"] in (5, 10, 12) else set())
        assert lines[-1] == records[state.config.name].metrics


def test_evaluating_does_not_change_what_is_trained(tmp_path: Path) -> None:
    evaluated, plain = new_states(mixed_configs()), new_states(mixed_configs())
    often = dataclasses.replace(EVERY_2, eval_every=2)
    sweep(batches(), evaluated, often, tmp_path / "evaluated", validation=held_out)
    sweep(batches(), plain, EVERY_2, tmp_path / "plain")
    for one, other in zip(evaluated, plain, strict=True):
        assert_same_state(one, other)
        lines = log_lines(tmp_path / "evaluated" / one.config.name)
        without = [{key: value for key, value in line.items() if key not in HELD_OUT_KEYS} for line in lines]
        assert without == log_lines(tmp_path / "plain" / one.config.name)


def test_evaluation_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eval_every=5 needs rows to evaluate on; pass validation"):
        sweep(batches(), new_states([a_config("topk")]), EVALUATED, tmp_path)


class Recorder:
    """A logger that keeps what it gets."""

    def __init__(self) -> None:
        self.lines: dict[str, list[dict[str, Any]]] = {}

    def log(self, name: str, metrics: Mapping[str, Any]) -> None:
        self.lines.setdefault(name, []).append(dict(metrics))

    def close(self) -> None:
        pass


def test_a_logger_gets_the_lines_of_the_file_each_once(tmp_path: Path) -> None:
    configs = [a_config("topk"), a_config("topk", name="other-hook", hook_name=HOOKS[0])]
    recorder, states = Recorder(), new_states(configs)
    first = (batch for batch in batches() if batch.step < 7)
    with pytest.raises(DatasetError):
        sweep(first, states, EVALUATED, tmp_path, validation=held_out, loggers=[recorder])
    sweep(batches(7), states, EVALUATED, tmp_path, validation=held_out, loggers=[recorder])
    assert recorder.lines == {config.name: log_lines(tmp_path / config.name) for config in configs}


@pytest.mark.parametrize("eval_every", [None, 1])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_diverging_sae_leaves_the_others_untouched(architecture: str, eval_every: int | None, tmp_path: Path) -> None:
    settings = dataclasses.replace(EVERY_2, eval_every=eval_every)
    wild = a_config(architecture, name="wild", lr=1e30, max_grad_norm=None)
    calm = [a_config(each, name=f"calm-{each}") for each in ("topk", "standard")]
    both, alone = new_states([calm[0], wild, calm[1]]), new_states(calm)
    records = sweep(batches(), both, settings, tmp_path / "both", validation=held_out)
    sweep(batches(), alone, settings, tmp_path / "alone", validation=held_out)
    assert_same_state(both[0], alone[0])
    assert_same_state(both[2], alone[1])
    for line in log_lines(tmp_path / "both" / "wild"):
        assert all(math.isfinite(value) for value in line.values())
    error = records["wild"].error
    assert error is not None
    assert "wild: " in error
    assert json.loads((tmp_path / "both" / "wild" / "failed.json").read_text())["error"] == error
    assert records["calm-topk"].error is None


def test_each_sae_joins_at_its_own_step(tmp_path: Path) -> None:
    configs = [a_config("topk"), a_config("standard"), a_config("jumprelu")]
    whole, parts = new_states(configs), new_states(configs)
    sweep(batches(), whole, EVERY_2, tmp_path / "whole")
    for state, stop in zip(parts, (0, 3, 7), strict=True):
        first = (batch for batch in batches() if batch.step < stop)
        with pytest.raises(DatasetError, match=f"must serve 12 batches, it ended after {stop}"):
            sweep(first, [state], EVERY_2, tmp_path / "parts")
    sweep(batches(), parts, EVERY_2, tmp_path / "parts")
    for one, other in zip(whole, parts, strict=True):
        assert_same_state(one, other)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_every_sae_after_the_step(number: signal.Signals, tmp_path: Path) -> None:
    usual = signal.getsignal(number)
    states = new_states([a_config("topk"), a_config("standard")])

    def interrupt(progress: SweepProgress) -> None:
        if progress.step == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt, match=f"{number.name}: all is saved"):
        sweep(batches(), states, EVERY_2, tmp_path, progress=interrupt)
    assert signal.getsignal(number) == usual
    for state in states:
        folder = tmp_path / state.config.name / "checkpoint"
        assert [each.name for each in folder.glob("*.safetensors")] == ["step-00000003.safetensors"]


# --- train: a cache, a sweep file, a folder of runs


def the_sweep(**changes: object) -> SweepConfig:
    """Every architecture on one hook of the cache; 18 steps over three epochs, the last of one row."""
    run = [
        {"architecture": "topk", "k": 4},
        {"architecture": "batchtopk", "k": 4},
        {"architecture": "standard", "sparsity_coefficient": 0.5},
        {"architecture": "jumprelu", "sparsity_coefficient": 0.01},
        {"architecture": "gated", "sparsity_coefficient": 0.5},
        {"architecture": "abstopk", "k": 4},
        {"architecture": "matryoshka_batchtopk", "k": 4},
        {"architecture": "crosscoder", "hook_name": None, "hook_names": list(HOOKS), "sparsity_coefficient": 0.5},
        *({"architecture": name, "hook_name_out": HOOKS[0], "sparsity_coefficient": 0.5} for name in TRANSCODERS),
    ]
    run = [{"name": run["architecture"], **run} for run in run]
    sweep_file = {"batch_tokens": 128, "log_every": 3, "checkpoint_every": 4, "epochs": 3, "tokens": 17 * 128 + 1}
    sweep_file |= {"eval_every": 5, "eval_tokens": 150}
    base = {"hook_name": HOOKS[1], "d_sae": 48, "lr": 0.003}
    return SweepConfig.from_dict(sweep_file | {"base": base, "runs": run} | changes)


@pytest.fixture(scope="module")
def finished(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUNS of `the_sweep`, never interrupted."""
    out = tmp_path_factory.mktemp("runs")
    assert all(record.error is None for record in train(cache, the_sweep(), out))
    return out


def assert_same_runs(one: Path, other: Path, besides: Sequence[str] = ()) -> None:
    """Equal weights, optimizers, counters, metrics and saved SAEs."""
    for name in ARCHITECTURES:
        files = ["metrics.jsonl", "config.json", "sae/cfg.json", "sae/sae_weights.safetensors"]
        files.append(f"checkpoint/{latest_checkpoint(one / name / 'checkpoint').name}")
        for file in (file for file in files if file not in besides):
            assert (one / name / file).read_bytes() == (other / name / file).read_bytes(), f"{name}/{file}"


def test_a_finished_run_says_what_it_was(cache: Cache, finished: Path) -> None:
    for name in ("topk", "batchtopk", "standard", "jumprelu"):
        config = json.loads((finished / name / "config.json").read_text())
        assert SAEConfig(**config["sae"]).name == name
        assert config["sae"]["n_steps"] == 18
        assert TrainConfig(**config["train"]) == the_sweep().train
        assert (config["cache"]["path"], config["cache"]["fingerprint"]) == (str(cache.path), cache.fingerprint)
        assert config["model"] == {"name": "tiny", "revision": cache.identity["model"]["revision"]}
        assert config["sae"]["training_tokens"] == log_lines(finished / name)[-1]["n_tokens"]
        sae = load_sae(finished / name)
        assert (sae.d_in, sae.d_sae, sae.hook_name) == (32, 48, HOOKS[1])


def test_a_trained_sae_explains_raw_activations(cache: Cache, finished: Path) -> None:
    """The exported SAE, scale folded, reconstructs what the training SAE did."""
    with Loader(cache, HOOKS[1], batch_tokens=64) as loader:
        x = next(iter(loader)).x[HOOKS[1]].float()
    sae = load_sae(finished / "topk")
    config = SAEConfig(**json.loads((finished / "topk" / "config.json").read_text())["sae"])
    state = load_checkpoint(config, latest_checkpoint(finished / "topk" / "checkpoint"))
    W = {name: weight.detach() for name, weight in state.weights.items()}
    h = (x * config.input_scale - W["b_dec"]) @ W["W_enc"].T + W["b_enc"]
    top = h.topk(4, dim=1)
    x_hat = torch.zeros_like(h).scatter(1, top.indices, top.values.relu()) @ W["W_dec"] + W["b_dec"]
    torch.testing.assert_close(sae.decode(sae.encode(x)), x_hat / config.input_scale, rtol=1e-4, atol=1e-4)


def test_transcoders_and_crosscoders_explain_what_they_are_to(cache: Cache, finished: Path) -> None:
    """The exported SAE, scales folded, reconstructs what the training SAE did: y, or all hooks side by side."""
    with Loader(cache, HOOKS, batch_tokens=64) as loader:
        x = {name: each.float() for name, each in next(iter(loader)).x.items()}
    for name in (*TRANSCODERS, "crosscoder"):
        sae = load_sae(finished / name)
        config = SAEConfig(**json.loads((finished / name / "config.json").read_text())["sae"])
        state = load_checkpoint(config, latest_checkpoint(finished / name / "checkpoint"))
        assert sae.input_hooks == tuple(hook.hook_name for hook in config.inputs)
        assert sae.output_hooks == ((HOOKS[0],) if name in TRANSCODERS else HOOKS)
        scaled = torch.cat([x[hook.hook_name] * hook.scale for hook in config.inputs], dim=1)
        y_hat = forward(config, state.weights, scaled, Workspace()).x_hat.detach()
        widths = config.hook_widths or (config.d_out,)
        scales = torch.tensor([hook.scale for hook in config.outputs]).repeat_interleave(torch.tensor(widths))
        _, got = sae.reconstruct(torch.cat([x[hook] for hook in sae.input_hooks], dim=1))
        torch.testing.assert_close(got, y_hat / scales, rtol=1e-4, atol=1e-4)


def test_batchtopk_is_saved_with_a_threshold_that_keeps_about_k(cache: Cache, finished: Path) -> None:
    with Loader(cache, HOOKS[1], batch_tokens=256) as loader:
        acts = load_sae(finished / "batchtopk").encode(next(iter(loader)).x[HOOKS[1]].float())
    assert 3 < (acts > 0).sum(1).float().mean() < 5


def test_b_dec_starts_where_the_config_says(cache: Cache, tmp_path: Path) -> None:
    inits = ("zeros", "mean", "geometric_median")
    run = [{"architecture": "topk", "k": 4, "name": init, "b_dec_init": init, "lr": 1e-30} for init in inits]
    records = train(cache, the_sweep(runs=run, tokens=64, epochs=1), tmp_path)
    statistics = cache.statistics(HOOKS[1])
    expected = {"zeros": 0 * statistics.mean, "mean": statistics.mean, "geometric_median": statistics.geometric_median}
    for record in records:
        got = load_sae(record.folder).b_dec.double()
        # in units of the raw activations: float32 rounding, once scaled and once folded
        torch.testing.assert_close(got, torch.from_numpy(expected[record.config.name]), rtol=1e-6, atol=1e-6)


def test_a_transcoder_begins_with_the_mean_row_at_zero(cache: Cache, tmp_path: Path) -> None:
    run = {"architecture": "transcoder", "hook_name_out": HOOKS[0], "sparsity_coefficient": 0.5, "lr": 1e-30}
    (record,) = train(cache, the_sweep(runs=[run], tokens=64, epochs=1), tmp_path)
    sae, mean = load_sae(record.folder), torch.from_numpy(cache.statistics(HOOKS[1]).mean)
    at_mean = mean @ sae.W_enc.double() + sae.b_enc.double()
    # float32 weights and products of 32 channels, whose sizes add up to less than 32 * max |x| |w|
    allowed = 32 * 2**-22 * float(mean.abs().max() * sae.W_enc.abs().max()) + 1e-6
    assert at_mean.abs().max() <= allowed
    torch.testing.assert_close(
        sae.b_dec.double(), torch.from_numpy(cache.statistics(HOOKS[0]).mean), rtol=1e-6, atol=1e-6
    )


def test_a_missing_optimizer_is_an_error_before_anything_is_written(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    run = {"architecture": "topk", "k": 4, "optimizer": "signum", "momentum": 0.9}
    with pytest.raises(ConfigError, match=r"pip install 'actcache\[optimizers\]', or take adam"):
        train(cache, the_sweep(runs=[run]), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_finished_runs_are_left_alone_and_new_ones_are_added(cache: Cache, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    sweep_file = the_sweep()
    more = dataclasses.replace(
        sweep_file, runs=(*sweep_file.runs, {**sweep_file.runs[0], "name": "another", "seed": 7})
    )
    records = train(cache, more, finished)
    assert [record.config.name for record in records] == [*(run["name"] for run in sweep_file.runs), "another"]
    assert [record.seconds > 0 for record in records] == [False] * len(ARCHITECTURES) + [True]
    assert all(record.metrics["step"] == record.config.n_steps for record in records)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (finished / "another" / "sae" / "cfg.json").exists()


def was_stopped(cache: Cache, out: Path, n_steps: int) -> bool:
    """One call that is stopped after so many steps; False if it came to its end before."""
    try:
        train(cache, the_sweep(), out, progress=stop_after(n_steps))
    except Stop:
        return True
    return False


@pytest.mark.parametrize("n_steps", [4, 5, 6, 7])
def test_training_resumes_bit_for_bit_from_any_step(n_steps: int, cache: Cache, finished: Path, tmp_path: Path) -> None:
    n_calls = 1
    while was_stopped(cache, tmp_path, n_steps):
        n_calls += 1
    assert n_calls >= 3
    assert_same_runs(finished, tmp_path)


CHILD = """
import sys, time, torch
torch.set_num_threads(1)
from actcache import open_cache
from trainer import SweepConfig, train
cache, sweep_file, out = sys.argv[1:]
train(open_cache(cache), SweepConfig.from_yaml(sweep_file), out, progress=lambda progress: time.sleep(0.05))
"""
CHILD_SETTINGS: dict[str, Any] = {
    "cwd": ROOT,
    "env": {**os.environ, "OMP_NUM_THREADS": "1"},
}


def write_sweep_file(folder: Path) -> Path:
    """The sweep as a file, for a process of its own."""
    config = the_sweep()
    train_settings = {key: value for key, value in dataclasses.asdict(config.train).items() if value is not None}
    path = folder / "sweep.yaml"
    path.write_text(json.dumps({**train_settings, "runs": config.runs}))
    return path


def test_a_killed_process_resumes_bit_for_bit(cache: Cache, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    command = [sys.executable, "-c", CHILD, str(cache.path), str(write_sweep_file(tmp_path)), str(out)]
    child = subprocess.Popen(command, **CHILD_SETTINGS)
    try:
        log = out / "jumprelu" / "metrics.jsonl"
        while child.poll() is None and not (log.exists() and log.read_text().count("\n") >= 2):
            time.sleep(0.005)
    finally:
        child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "the child was still training"
    assert not (out / "topk" / "sae").exists()
    train(cache, the_sweep(), out)
    assert_same_runs(finished, out)


MORTAL_CHILD = """
import os, signal, sys, threading, time, torch
torch.set_num_threads(1)
from actcache import open_cache
from trainer import SweepConfig, train
cache, sweep_file, out, n_steps, delay = sys.argv[1:]
steps = []

def progress(_):
    steps.append(None)
    time.sleep(0.05)
    if len(steps) == int(n_steps):
        threading.Timer(float(delay), os.kill, (os.getpid(), signal.SIGKILL)).start()

train(open_cache(cache), SweepConfig.from_yaml(sweep_file), out, progress=progress)
"""


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_again_and_again_it_ends_bit_for_bit(
    seed: int, cache: Cache, finished: Path, tmp_path: Path
) -> None:
    """Within a step, a checkpoint, an export.

    A call lives for up to five steps of twelve and less than one more, and goes on from the checkpoint of step 5 or 10:
    so the first call dies, and so does the one that goes on from 5.
    """
    sweep_file, out, rng, n_killed = write_sweep_file(tmp_path), tmp_path / "runs", random.Random(seed), 0
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        arguments = [cache.path, sweep_file, out, rng.randint(2, 5), rng.uniform(0, 0.05)]
        code = subprocess.run(
            [sys.executable, "-c", MORTAL_CHILD, *map(str, arguments)], **CHILD_SETTINGS, check=False
        ).returncode
        n_killed += code == -signal.SIGKILL
    assert code == 0
    assert n_killed >= 2
    assert_same_runs(finished, out)


def test_one_process_at_a_time_trains_in_a_folder(cache: Cache, finished: Path, tmp_path: Path) -> None:
    """The second gets one clear line, whenever it comes, and the first ends as if it had been alone."""
    refused: list[str] = []

    def second(_: SweepProgress) -> None:
        if len(refused) < 2:
            with pytest.raises(CacheLocked, match="another process is training there; wait for it") as caught:
                train(cache, the_sweep(), tmp_path)
            refused.append(str(caught.value))

    train(cache, the_sweep(), tmp_path, progress=second)
    assert len(refused) == 2
    assert_same_runs(finished, tmp_path)
    train(cache, the_sweep(), tmp_path)


def test_a_finished_folder_needs_no_lock(cache: Cache, finished: Path) -> None:
    with only_writer(finished, RUNS_LOCK, "is training there", "pass another --out"):
        assert plan(cache, the_sweep(), finished).passes == ()
        assert len(train(cache, the_sweep(), finished)) == len(ARCHITECTURES)


@only_root
def test_a_finished_folder_of_somebody_else_has_nothing_to_do(cache: Cache, finished: Path) -> None:
    new = the_sweep(runs=[{"name": "new", "architecture": "topk", "k": 4}])
    with as_another_user(finished, cache.path):
        assert len(train(cache, the_sweep(), finished)) == len(ARCHITECTURES)
        with pytest.raises(PermissionError, match=rf"has to write there; pass another --out; .*: '{finished}'$"):
            train(cache, new, finished)


def test_a_torn_line_is_cut_off(cache: Cache, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(cache, the_sweep(), tmp_path, progress=stop_after(5))
    log = tmp_path / "standard" / "metrics.jsonl"
    log.write_bytes(log.read_bytes() + b'{"step": 6, "n_tok')
    train(cache, the_sweep(), tmp_path)
    assert_same_runs(finished, tmp_path)


def test_another_configuration_lists_the_differences(cache: Cache, finished: Path) -> None:
    changed = the_sweep(base={"hook_name": HOOKS[1], "d_sae": 48, "lr": 0.004}, seed=1)
    with pytest.raises(CacheMismatch, match=r"topk: holds another run: sae\.lr is 0\.003 there, 0\.004 here; train\.s"):
        train(cache, changed, finished)


def test_how_often_to_save_may_change(cache: Cache, finished: Path) -> None:
    assert len(train(cache, the_sweep(checkpoint_every=1, keep_checkpoints=9), finished)) == len(ARCHITECTURES)


def test_the_last_checkpoints_stay_and_any_of_them_goes_on(cache: Cache, finished: Path, tmp_path: Path) -> None:
    sweep_file = the_sweep(keep_checkpoints=2)
    with pytest.raises(Stop):
        train(cache, sweep_file, tmp_path, progress=stop_after(14))
    for name in ARCHITECTURES:
        held = sorted((tmp_path / name / "checkpoint").glob("*.safetensors"))
        assert [each.name for each in held] == ["step-00000008.safetensors", "step-00000012.safetensors"]
        held[1].write_bytes(b"damaged")
    with pytest.raises(ManifestError, match=r"step-00000012\.safetensors: is damaged.* go on from step-00000008"):
        train(cache, sweep_file, tmp_path)
    for name in ARCHITECTURES:
        (tmp_path / name / "checkpoint" / "step-00000012.safetensors").unlink()
    train(cache, sweep_file, tmp_path)
    assert_same_runs(finished, tmp_path, besides=("config.json",))


def test_held_out_metrics_are_of_the_validation_split(cache: Cache, finished: Path) -> None:
    """The last line of a run against its exported SAE, on the first rows of the split in the loader's order.

    Float32 of both sides: the scale is folded into the exported weights. Outputs differ by a few hundred roundings of
    2^-24 of sums below ten times the result, so squared errors by less than 1e-3 of themselves; of 7,200 activations
    at most two may lie so near their threshold that they fall on the other side of it.
    """
    with Loader(cache, HOOKS[1], split="validation", limit=150, group_chunks=4) as loader:
        x = torch.cat([batch.x[HOOKS[1]] for batch in loader]).double()
    for name in ("topk", "abstopk", "standard", "jumprelu", "gated"):
        sae = load_sae(finished / name)
        acts = sae.encode(x.float())
        x_hat = sae.decode(acts).double()
        line = log_lines(finished / name)[-1]
        mse = float(((x - x_hat) ** 2).sum(1).mean())
        variance = float(((x - x.mean(0)) ** 2).sum(1).mean())
        assert line["validation/mse"] == pytest.approx(mse, rel=1e-3)
        assert line["validation/explained_variance"] == pytest.approx(1 - mse / variance, abs=1e-3)
        assert line["validation/l0"] == pytest.approx(float((acts != 0).sum(1).double().mean()), abs=2 / len(x))
        assert line["validation/dead_fraction"] == pytest.approx(float((acts == 0).all(0).double().mean()), abs=2 / 48)


def test_an_empty_validation_split_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    model = wrap_model(make_model("gpt2", len(tokenizer)), tokenizer, "tiny")
    texts = write_texts(tmp_path / "texts.jsonl", 6)
    cache = harvest_tiny(model, texts, tmp_path / "cache", holdout=0.0)
    with pytest.raises(DatasetError, match="eval_every=5 needs held-out rows"):
        train(cache, the_sweep(), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_is_no_run_is_refused(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "topk").mkdir()
    (tmp_path / "topk" / "thesis.txt").write_text("do not touch")
    with pytest.raises(CacheMismatch, match=r"topk: must be a run or absent, it has no config\.json"):
        train(cache, the_sweep(), tmp_path)
    assert not (tmp_path / "standard").exists(), "nothing is written before everything is checked"
    (tmp_path / "topk" / "config.json").write_text("{")
    with pytest.raises(ManifestError, match=r"config\.json: must be readable JSON"):
        train(cache, the_sweep(), tmp_path)


def test_a_diverged_run_is_reported_again_and_not_retrained(cache: Cache, tmp_path: Path) -> None:
    topk = {"architecture": "topk", "k": 4}
    run = [{**topk, "name": "wild", "lr": 1e30}, {**topk, "name": "calm"}]
    sweep_file = the_sweep(runs=run, tokens=400)
    first, second = train(cache, sweep_file, tmp_path), train(cache, sweep_file, tmp_path)
    assert first[0].error is not None
    assert [record.error for record in second] == [record.error for record in first]
    assert not (tmp_path / "wild" / "sae").exists()
    assert (tmp_path / "calm" / "sae").exists()


def test_a_run_that_ends_farther_off_than_zeros_diverged(cache: Cache, tmp_path: Path) -> None:
    """Its weights are finite, and so are its losses."""
    wild = {"name": "wild", "architecture": "standard", "sparsity_coefficient": 1e-9, "lr": 1e3}
    sweep_file = the_sweep(runs=[wild, {"name": "calm", "architecture": "topk", "k": 4}])
    for records in (train(cache, sweep_file, tmp_path), train(cache, sweep_file, tmp_path)):
        assert "must end nearer to the activations than zeros are, its explained variance" in str(records[0].error)
        assert records[1].error is None
    assert -math.inf < log_lines(tmp_path / "wild")[-2]["metrics/explained_variance"] < -1e3
    assert not (tmp_path / "wild" / "sae").exists()
    assert json.loads((tmp_path / "wild" / "failed.json").read_text())["step"] == 18
    assert (tmp_path / "calm" / "sae").exists()
    (found,) = [run for run in read_runs(tmp_path) if run.error]
    assert found.name == "wild"


def test_an_sae_that_gives_zeros_is_poor_but_did_not_diverge(cache: Cache, tmp_path: Path) -> None:
    """Its explained variance is -||mean||^2 / variance, below -1 at this hook or not."""
    dead = {"name": "dead", "architecture": "standard", "sparsity_coefficient": 1e3, "lr": 0.01, "b_dec_init": "zeros"}
    (record,) = train(cache, the_sweep(runs=[dead]), tmp_path)
    assert record.error is None
    assert (tmp_path / "dead" / "sae").exists()


def test_more_tokens_than_the_epochs_serve_say_how_many_there_are(cache: Cache, tmp_path: Path) -> None:
    with Loader(cache, HOOKS[1]) as loader:
        n_rows = loader.n_rows
    with pytest.raises(ConfigError, match=rf"{3 * n_rows + 1} tokens asked, but 3 epoch\(s\) .* serve {3 * n_rows}"):
        train(cache, the_sweep(tokens=3 * n_rows + 1), tmp_path)


def test_tokens_are_exact(cache: Cache, tmp_path: Path) -> None:
    for record in train(cache, the_sweep(tokens=129, epochs=1), tmp_path):
        assert (record.metrics["n_tokens"], record.metrics["step"]) == (129, 2)
    assert open_cache(cache.path).fingerprint == cache.fingerprint


def test_a_sweep_too_large_for_the_memory_is_trained_in_passes(cache: Cache, finished: Path, tmp_path: Path) -> None:
    sweep_file = the_sweep()
    reading = reading_bytes(cache, sweep_file.train, sweep_file.hook_names)
    together = partial(pass_bytes, batch_tokens=128, loader_bytes=reading)
    needed = [together([config]) for config in plan(cache, sweep_file, tmp_path).configs]
    planned = plan(cache, sweep_file, tmp_path, memory_bytes=max(needed))
    assert len(planned.passes) > 1
    assert [config.name for config in planned.configs] == [run["name"] for run in sweep_file.runs]
    assert planned.needed_bytes == max(map(together, planned.passes)) <= max(needed)
    train(cache, sweep_file, tmp_path, memory_bytes=max(needed))
    assert_same_runs(finished, tmp_path)
    assert plan(cache, sweep_file, tmp_path).passes == (), "nothing is left to do"
    with pytest.raises(ConfigError, match=r"needs about 0\.0\d+ GB, 0\.001 GB may be used; take a smaller d_sae=48"):
        plan(cache, sweep_file, tmp_path / "other", memory_bytes=1_000_000)
