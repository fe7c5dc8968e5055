"""`actcache train --from-saelens`: a user's config trains as it is, and what is unlike in it is said."""

from pathlib import Path

import pytest
import torch
from support.command_line import actcache
from support.saelens_configs import flat_file
from support.tiny_caches import HOOKS
from support.tiny_models import make_tokenizer
from support.tiny_saes import make_config

from actcache import open_cache
from actcache.interop.saelens_config import read_saelens_config
from trainer.commands.from_saelens import fitted, l0_lines, unlike
from trainer.config.sweep import SweepConfig
from trainer.run_folder import read_run_json
from trainer.training.run import RunRecord

RUN = {"architecture": "topk", "hook_name": HOOKS[2], "d_sae": 64, "k": 4}


@pytest.fixture(scope="module")
def nine_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest stand-in of gpt2-small that has its block 8."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer, folder = make_tokenizer(), tmp_path_factory.mktemp("nine_layers")
    torch.manual_seed(0)
    sizes = {"n_layer": 9, "n_embd": 16, "n_head": 2, "n_positions": 128, "bos_token_id": 0, "eos_token_id": 1}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_flat_config_as_text_harvests_and_trains(nine_layers: Path, tiny_texts: Path, tmp_path: Path):
    config, cache, out = flat_file(tmp_path), tmp_path / "cache", tmp_path / "runs"
    stand_in = ("--model", nine_layers, "--dataset", tiny_texts, "--tokens", 5120, "--holdout", 0.2, "--device", "cpu")
    actcache("harvest", "--from-saelens", config, *stand_in, "--out", cache)
    fewer = ("--tokens", 5120, "--batch-tokens", 128, "--device", "cpu")
    done = actcache("train", cache, "--from-saelens", config, *fewer, "--out", out)
    lines = done.stderr.splitlines()
    assert lines[0].split() == ["field", "value", "here"]
    assert f"{config}: asks for 24,415 steps, here are 40; warm-ups and decay are as much shorter" in lines
    assert f"{config}: model_name is gpt2-small, the cache is of {nine_layers.name}" in lines
    assert f"{config}: d_in is 768, the cache has 16" in lines
    n_rows = open_cache(cache).n_rows("train")
    assert f"{cache}: 5,120 tokens of {n_rows:,} rows take 2 epochs" in lines
    (remark,) = [line for line in lines if "L0 is" in line]
    assert "and 50 to 200 is usual; raise --sparsity-coefficient, which is 8e-05," in remark
    (folder,) = [path.parent for path in out.glob("*/sae")]
    settings = read_run_json(folder, "config.json")
    assert settings["sae"]["d_sae"] == 6144
    assert (settings["sae"]["sparsity_warm_up_steps"], settings["sae"]["lr"]) == (1, 4e-4)


@pytest.mark.parametrize(
    ("architecture", "l0", "advice"),
    [
        ("standard", 3.0, "lower"),
        ("standard", 25.0, None),
        ("gated", 400.0, None),
        ("jumprelu", 401.0, "raise"),
        ("topk", 5.0, None),  # as was asked for
    ],
)
def test_an_l0_far_from_the_usual_is_remarked_upon(architecture, l0, advice):
    metrics = {"metrics/l0": 100.0, "validation/l0": l0}  # what is held out says more than one batch
    record = RunRecord(config=make_config(architecture), folder=Path(), metrics=metrics, seconds=0.0, error=None)
    lines = [*l0_lines([record])]
    assert len(lines) == (advice is not None)
    assert all(f"L0 is {l0:,.1f}, and 50 to 200 is usual; {advice} --sparsity-coefficient" in line for line in lines)


def test_what_a_config_and_the_cache_say_otherwise(tiny_cache):
    same = {"hook_name": HOOKS[2], "d_in": 32, "context_size": 16, "prepend_bos": True}
    said = [*unlike(read_saelens_config(same), tiny_cache)]
    assert said == []
    other = {"hook_name": HOOKS[2], "d_in": 8, "context_size": 64, "prepend_bos": False, "model_name": "gpt2"}
    said = [*unlike(read_saelens_config(other), tiny_cache)]
    assert [line.split()[0] for line in said] == ["model_name", "context_size", "prepend_bos", "d_in"]
    assert said[1] == "context_size is 64, the cache has 16"


def test_a_sweep_gets_the_epochs_that_its_tokens_take(tiny_cache):
    n_rows = tiny_cache.n_rows("train")
    sweep = SweepConfig.from_dict({"tokens": 2 * n_rows + 1, "runs": [RUN]})
    assert fitted(sweep, tiny_cache, {}).train.epochs == 3
    assert fitted(sweep, tiny_cache, {"epochs": 1}).train.epochs == 1
    enough = SweepConfig.from_dict({"tokens": n_rows, "runs": [RUN]})
    assert fitted(enough, tiny_cache, {}).train == enough.train


def test_a_sweep_file_besides_is_refused(tiny_cache, tmp_path: Path):
    config = flat_file(tmp_path)
    done = actcache("train", tiny_cache.path, "s.yaml", "--from-saelens", config, "--out", tmp_path / "runs", code=2)
    assert "train: --from-saelens says what to train, got s.yaml too; leave one out" in done.stderr


def test_what_is_not_trained_here_is_refused_after_the_table(tiny_cache, tmp_path: Path):
    path = tmp_path / "cfg.py"
    path.write_text(
        "LanguageModelSAERunnerConfig(sae=MatchingPursuitTrainingSAEConfig(d_in=32, d_sae=64), autocast=True)"
    )
    done = actcache("train", tiny_cache.path, "--from-saelens", path, "--out", tmp_path / "runs", code=2)
    lines = done.stderr.splitlines()
    assert lines[1].split()[:3] == ["architecture", "matching_pursuit", "refused"]
    assert lines[2].split()[:3] == ["autocast", "True", "different"]
    assert not (tmp_path / "runs").exists()
