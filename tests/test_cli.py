"""The command line as a user types it: one path through every command, and every wrong use."""

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import typer
from support.command_line import actcache
from support.damages import flip
from support.places import ROOT
from support.remote_code import RemoteCode
from support.tiny_caches import HOOKS
from support.tiny_models import pickle_weights

from actcache.commands.terminal import plain

SWEEP = """
batch_tokens: 256
tokens: 2000
log_every: 2
base: {hook_name: blocks.1.hook_resid_post, d_sae: 64}
runs:
  - {name: topk, architecture: topk, k: 4}
  - {name: batchtopk, architecture: batchtopk, k: 4}
  - {name: standard, architecture: standard, sparsity_coefficient: 1.0}
  - {name: jumprelu, architecture: jumprelu, sparsity_coefficient: 0.01}
"""


def in_a_process(*args: object) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run([sys.executable, "-m", "cli", *map(str, args)], capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def work(tmp_path_factory, tiny_llama_dir, tiny_texts) -> Path:
    """A folder with a cache harvested, a sweep trained and evaluated, all from the command line."""
    work = tmp_path_factory.mktemp("work")
    hooks = [part for hook in HOOKS for part in ("--hook", hook)]
    common = ["--context-size", 16, "--holdout", 0.2, "--batch-size", 8, "--device", "cpu"]
    actcache("harvest", "--model", tiny_llama_dir, *hooks, "--dataset", tiny_texts, *common, "--out", work / "cache")
    (work / "sweep.yaml").write_text(SWEEP)
    actcache("train", work / "cache", work / "sweep.yaml", "--out", work / "runs")
    actcache("eval", work / "runs")
    return work


def test_the_path_from_text_to_report(work):
    rows = {path.parent.name: json.loads(path.read_text()) for path in work.glob("runs/*/eval.json")}
    baselines = {f"{kind}-k4-blocks.1.hook_resid_post" for kind in ("pca", "random")}
    assert set(rows) == {"topk", "batchtopk", "standard", "jumprelu"} | baselines
    assert all(row["ce_loss_score"] is not None for row in rows.values())
    actcache("report", work / "runs", "--out", work / "report.html")
    assert "batchtopk" in (work / "report.html").read_text()
    actcache("export", work / "runs" / "topk", "--out", work / "exported")
    assert {path.name for path in (work / "exported").iterdir()} == {"cfg.json", "sae_weights.safetensors"}


def test_json_goes_to_stdout_and_all_else_to_stderr(work):
    info = json.loads(actcache("info", work / "cache", "--json").stdout)
    assert info["hooks"] == dict.fromkeys(sorted(HOOKS), 32)
    report = json.loads(actcache("verify", work / "cache", "--json").stdout)
    assert report["problems"] == []
    rows = json.loads(actcache("eval", work / "runs" / "topk", "--json").stdout)["runs"]
    assert rows[0]["architecture"] == "topk"
    human = actcache("info", work / "cache")
    assert human.stdout == ""
    assert "blocks.1.hook_attn_out [32]" in human.stderr


def test_an_sae_comes_in_and_is_evaluated_beside_ours(work):
    name = json.loads(actcache("info", work / "cache", "--json").stdout)["model"]["name"]
    actcache("export", work / "runs" / "topk", "--out", work / "theirs")
    run = work / "imported" / "theirs"
    done = actcache("import", work / "theirs", "--out", run, "--model-name", name, "--hook-name", HOOKS[2])
    assert done.stderr.strip() == f"import: {run.resolve()}"
    rows = json.loads(actcache("eval", work / "imported", "--cache", work / "cache", "--json").stdout)["runs"]
    ours = json.loads((work / "runs" / "topk" / "eval.json").read_text())
    assert rows[0]["explained_variance"] == ours["explained_variance"]
    assert "pass --cache" in actcache("eval", work / "imported", code=1).stderr
    assert "name a folder DIR, or else a --release" in actcache("import", "--out", work / "x", code=2).stderr
    both = ["--release", "r", "--sae-id", "s"]
    assert "name a folder DIR" in actcache("import", work / "theirs", *both, "--out", work / "x", code=2).stderr


def test_a_cache_goes_out_to_saelens_and_comes_back(work, tiny_llama_dir):
    done = actcache("export-cache", work / "cache", "--out", work / "arrow")
    assert done.stderr.strip().endswith(f"export-cache: {work / 'arrow'}")
    options = ["--model", tiny_llama_dir, "--special-token", 0, "--special-token", 1, "--holdout", 0.2]
    command = ["import-cache", work / "arrow", "--out", work / "back", *options, "--dtype", "bfloat16"]
    assert "is finished" in actcache(*command).stderr
    assert "was already there, nothing was done" in actcache(*command).stderr
    facts = [json.loads(actcache("info", work / name, "--json").stdout) for name in ("cache", "back")]
    assert sum(facts[1]["rows"].values()) == facts[0]["rows"]["train"]
    assert facts[1]["hooks"] == facts[0]["hooks"]
    report = actcache("verify", work / "back", "--sample-model", "--sequences", 3, "--device", "cpu")
    assert "are what the model gives" in report.stderr
    actcache("eval", work / "runs" / "topk", "--cache", work / "back", "--device", "cpu")
    assert (
        "split must be one of"
        in actcache("export-cache", work / "cache", "--out", work / "x", "--split", "test", code=2).stderr
    )


def test_the_same_command_again_changes_nothing(work, tiny_llama_dir, tiny_texts):
    before = {path: path.stat().st_mtime_ns for path in (work / "runs").rglob("*.safetensors")}
    actcache("train", work / "cache", "--config", work / "sweep.yaml", "--out", work / "runs")
    assert {path: path.stat().st_mtime_ns for path in (work / "runs").rglob("*.safetensors")} == before
    common = ["--context-size", 16, "--holdout", 0.2, "--device", "cpu", "--out", work / "cache"]
    done = actcache("harvest", "--model", tiny_llama_dir, "--hook", HOOKS[0], "--dataset", tiny_texts, *common)
    assert "was already there" in done.stderr


def test_one_sae_from_options_alone(work):
    options = ["--hook", HOOKS[2], "--d-sae", 64, "--k", 4, "--tokens", 512, "--batch-tokens", 128]
    actcache("train", work / "cache", *options, "--keep-special-tokens", "--out", work / "single")
    config = json.loads(next((work / "single").glob("*/config.json")).read_text())
    assert config["sae"]["k"] == 4
    assert config["train"] | {"tokens": 512, "batch_tokens": 128, "exclude_special_tokens": False} == config["train"]


def test_held_out_metrics_from_an_option(work):
    options = ["--hook", HOOKS[2], "--d-sae", 64, "--k", 4, "--tokens", 512, "--batch-tokens", 128]
    actcache("train", work / "cache", *options, "--eval-every", 3, "--out", work / "evaluated")
    log = next((work / "evaluated").glob("*/metrics.jsonl")).read_text()
    assert [json.loads(line)["step"] for line in log.splitlines()] == [3, 4]
    assert all("validation/explained_variance" in json.loads(line) for line in log.splitlines())


def test_special_tokens_are_measured_when_asked_for(work):
    kept, dropped = (
        json.loads(actcache("eval", work / "runs" / "topk", *options, "--json").stdout)["runs"][0]
        for options in (["--keep-special-tokens"], [])
    )
    assert (kept["exclude_special_tokens"], dropped["exclude_special_tokens"]) == (False, True)
    assert kept["n_tokens"] > dropped["n_tokens"]
    assert kept["n_model_tokens"] > dropped["n_model_tokens"]


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(work):
    done = actcache("train", work / "cache", work / "sweep.yaml", "--out", work / "dry", "--dry-run")
    assert "to train: 4 SAEs of" in done.stderr
    assert "s of steps, by one of each kind" in done.stderr
    assert not (work / "dry").exists()
    again = actcache("train", work / "cache", work / "sweep.yaml", "--out", work / "runs", "--dry-run")
    assert "to train: 0 SAEs of 0 parameters in 0 pass(es)" in again.stderr


def test_a_transcoder_and_a_preset_from_options(work):
    options = ["--d-sae", 64, "--tokens", 512, "--batch-tokens", 128, "--out", work / "more"]
    pair = ["--hook", HOOKS[0], "--hook-out", HOOKS[2], "--architecture", "transcoder"]
    actcache("train", work / "cache", *pair, "--sparsity-coefficient", 1.0, *options)
    actcache(
        "train", work / "cache", "--preset", "gemma_scope", "--hook", HOOKS[2], "--sparsity-coefficient", 0.01, *options
    )
    runs = {path.parent.name: json.loads(path.read_text())["sae"] for path in (work / "more").glob("*/config.json")}
    assert runs["transcoder-l1.0-d64"]["hook_name_out"] == HOOKS[2]
    assert runs["gemma_scope-l0.01-d64"]["architecture"] == "jumprelu"
    rows = json.loads(actcache("eval", work / "more", "--json").stdout)["runs"]
    assert all(row["ce_loss_score"] is not None for row in rows)


def test_steering_prints_the_text_without_and_with(work, tiny_llama_dir):
    run, prompt = work / "runs" / "topk", "The old lighthouse keeper"
    common = ["steer", run, "--feature", 3, "--text", prompt, "--tokens", 6, "--device", "cpu"]
    got = json.loads(actcache(*common, "--strength", 40, "--temperature", 0, "--json").stdout)
    assert (got["feature"], got["mode"], got["strength"], got["prompt"]) == (3, "add", 40, prompt)
    assert got["before"] != got["after"]
    again = actcache(*common, "--strength", 40, "--temperature", 0, "--model", tiny_llama_dir)
    assert again.stdout == ""
    said = [f"without: {prompt}{got['before']}", f"with:    {prompt}{got['after']}"]
    assert again.stderr == "".join(f"{plain(line)}\n" for line in said)
    same = json.loads(actcache(*common, "--mode", "scale", "--strength", 1, "--seed", 4, "--json").stdout)
    assert same["before"] == same["after"]
    ablated = json.loads(actcache(*common, "--mode", "ablate", "--seed", 4, "--json").stdout)
    clamped = json.loads(actcache(*common, "--mode", "clamp", "--strength", 0, "--seed", 4, "--json").stdout)
    assert (ablated["before"], ablated["after"]) == (same["before"], clamped["after"])
    actcache(*common, "--mode", "ablate", "--drop-error")


TRUSTED = ("--trust-remote-code", "--allow-pickle")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, tiny_llama_dir, tiny_texts) -> Path:
    """A folder with a cache of a model that brings code and a pickle, and a run that was trained on it."""
    folder = tmp_path_factory.mktemp("foreign")
    model = pickle_weights(RemoteCode(tiny_llama_dir, folder).model("own"))
    chosen = ["--model", model, "--backend", "transformer_lens", "--hook", HOOKS[2], *TRUSTED]
    sizes = ["--context-size", 16, "--tokens", 1000, "--holdout", 0.2, "--batch-size", 8, "--device", "cpu"]
    actcache("harvest", *chosen, "--dataset", tiny_texts, *sizes, "--out", folder / "cache")
    single = ["--hook", HOOKS[2], "--d-sae", 64, "--k", 4, "--tokens", 500, "--batch-tokens", 100]
    actcache("train", folder / "cache", *single, "--out", folder / "runs")
    return folder


@pytest.mark.parametrize(
    ("command", "place", "options", "says"),
    [
        ("verify", "cache", ["--sample-model"], "are what the model gives"),
        ("repair", "damaged", [], "written anew"),
        ("eval", "runs", [], "topk"),
        ("features", "run", ["--text", "the cat"], "the"),
        ("features", "run", [], "64 features on"),
        ("steer", "run", ["--feature", 3, "--strength", 1, "--text", "the cat", "--tokens", 2], "without: the cat"),
    ],
    ids=["verify", "repair", "eval", "features of a text", "features", "steer"],
)
def test_a_model_with_code_and_a_pickle_has_to_be_trusted_again(foreign, tmp_path, command, place, options, says):
    (run,) = (foreign / "runs").glob("*/sae")
    places = {"cache": foreign / "cache", "runs": foreign / "runs", "run": run.parent, "damaged": tmp_path / "cache"}
    if place == "damaged":
        shutil.copytree(foreign / "cache", places[place])
        flip(places[place] / "acts.zarr" / "train" / HOOKS[2] / "acts" / "c" / "0" / "0")
    asked = [command, places[place], *options, "--device", "cpu"]
    *before, refused = actcache(*asked, code=1).stderr.splitlines()
    assert refused.startswith("error: load_model: ")
    assert "brings code of its own, " in refused
    assert "pass --trust-remote-code" in refused
    assert not any("rror" in line or "Traceback" in line for line in before)
    assert "pass --allow-pickle" in actcache(*asked, "--trust-remote-code", code=1).stderr.splitlines()[-1]
    assert says in actcache(*asked, *TRUSTED).stderr


def test_similar_features_of_two_runs(work):
    a, b = work / "runs" / "topk", work / "runs" / "batchtopk"
    got = json.loads(actcache("similar", a, b, "--json").stdout)
    assert len(got["features"]) == 64
    assert 0 < got["mean_max_cosine"] <= 1 + 1e-6
    one = json.loads(actcache("similar", a, b, "--feature", 5, "--json").stdout)
    assert len(one["similar"]) == 10
    assert one["similar"][0]["feature"] == got["features"][5]["feature"]
    assert "largest cosine of 64 features: 1.0000 on average; 100.0% at 0.7 or more" in actcache("similar", a, a).stderr
    assert actcache("similar", a, a, "--feature", 5).stderr.split()[:2] == ["5", "1.0000"]


def test_stability_is_the_mean_over_the_others(work):
    a, b = work / "runs" / "topk", work / "runs" / "standard"
    near = [each["cosine"] for each in json.loads(actcache("similar", a, b, "--json").stdout)["features"]]
    got = json.loads(actcache("stability", a, b, a, "--json").stdout)
    assert got["features"] == pytest.approx([(cosine + 1) / 2 for cosine in near], abs=1e-6)
    assert got["mean_stability"] == pytest.approx(sum(got["features"]) / 64)
    one = json.loads(actcache("stability", a, b, a, "--feature", 5, "--json").stdout)
    assert one == {"feature": 5, "stability": got["features"][5]}
    assert "mean of 2 SAEs, of 64 features: 1.0000 on average" in actcache("stability", a, a, a).stderr
    assert actcache("stability", a, a, "--feature", 5).stderr.split() == ["5", "1.0000"]


def test_features_are_found_once_and_looked_up(work):
    first = actcache("features", work / "runs" / "topk", "--json", "--top", 3)
    found = json.loads(first.stdout)
    assert (found["d_sae"], len(found["features"])) == (64, 3)
    assert found["rows_per_second"] > 0
    again = json.loads(actcache("features", work / "runs" / "topk", "--json", "--top", 3).stdout)
    assert again == found | {"rows_per_second": None}, "it was there already"
    table = actcache("features", work / "runs" / "topk", "--top", 3)
    assert table.stdout == ""
    assert f"64 features on {found['n_tokens']:,} held-out tokens" in table.stderr

    often = found["features"][0]
    asked = ["features", work / "runs" / "topk", "--feature", often["feature"], "--top", 2]
    facts = json.loads(actcache(*asked, "--json").stdout)
    assert often == {name: facts[name] for name in often}
    best, second = facts["contexts"]
    assert best["act"] == facts["max_act"] >= second["act"]
    assert best["tokens"][best["peak"]] == often["top_token"]
    assert sum(facts["histogram"]["counts"]) == facts["n_fired"]
    remembered, *lines = actcache(*asked).stderr.splitlines()
    assert remembered == f"{work / 'runs' / 'topk'}: was trained on the cache {work / 'cache'}"
    assert lines[0].startswith(f"feature {often['feature']}: density ")
    assert f"[{often['top_token']}]".replace("\n", "⏎") in lines[1]
    together, promoted, suppressed = lines[-3:]
    assert together.startswith("fires together with: ")
    raised, lowered = (facts["logit_lens"][end] for end in ("promoted", "suppressed"))
    assert len(raised) == len(lowered) == 10
    assert raised[0]["logit"] > 0 > lowered[0]["logit"]
    assert promoted.startswith(f"promoted: {raised[0]['token']!r} +")
    assert suppressed.startswith(f"suppressed: {lowered[0]['token']!r} -")


def test_a_text_is_encoded_and_a_logit_taken_apart(work):
    asked = ["features", work / "runs" / "topk", "--text", "the cat sat"]
    tokens = json.loads(actcache(*asked, "--json").stdout)["tokens"]
    assert "".join(token["token"] for token in tokens if not token["is_special"]) == "the cat sat"
    assert str(tokens[-1]["features"][0][0]) in actcache(*asked).stderr.splitlines()[-1]

    predicted = tokens[-1]["token"]
    found = json.loads(actcache(*asked, "--predict", predicted, "--json").stdout)
    assert (found["token"], found["position"]) == (predicted, len(tokens) - 1)
    assert {each["latent"] for each in found["features"]} == {latent for latent, _ in tokens[-1]["features"]}
    parts = [*(each["logit"] for each in found["features"]), found["bias"], found["error"], found["rest"]]
    assert sum(parts) == pytest.approx(found["logit"], abs=1e-4)
    lines = actcache(*asked, "--predict", predicted, "--top", 2).stderr.splitlines()[-4:]
    assert f"{found['logit']:.4g} = " in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["feature", *(str(e["latent"]) for e in found["features"][:2])]


def test_features_reach_the_report_and_neuronpedia(work):
    run = work / "runs" / "standard"
    actcache("features", run)
    assert {path.name for path in (run / "features").glob("*.json")} == {
        *("source.json", "rows.json", "crc32c.json", "tokens.json", "lens.json")
    }
    actcache("report", work / "runs", "--out", work / "features.html")
    names = sorted(path.parent.name for path in work.glob("runs/*/sae"))
    assert f'id="features-{names.index("standard")}"' in (work / "features.html").read_text()
    actcache("export", run, "--format", "neuronpedia", "--out", work / "neuronpedia")
    (folder,) = (work / "neuronpedia").glob("*/1-standard")
    assert {path.name for path in folder.iterdir()} == {
        *(f"{table}.jsonl" for table in ("release", "model", "sourceset", "source")),
        "features",
        "activations",
    }


def wrong_uses(work: Path, model: Path, other_model: Path, texts: Path) -> dict[str, tuple[list, int, str]]:
    """What is wrong -> (arguments, exit code, what the one line says)."""
    out = work / "wrong"
    harvest = ["harvest", "--model", model, "--dataset", texts, "--context-size", 16, "--device", "cpu"]
    hook = ["--hook", HOOKS[0]]
    train = ["train", work / "cache", "--out", work / "wrong-runs"]
    single = [*train, "--hook", HOOKS[0], "--d-sae", 64]
    steer = ["steer", work / "runs" / "topk", "--text", "the cat", "--device", "cpu"]
    (work / "empty.txt").write_text("")
    (work / "other").mkdir(exist_ok=True)
    (work / "other" / "thesis.tex").write_text("x")
    (work / "unknown.yaml").write_text(SWEEP + "lerning_rate: 1\n")
    (work / "wide.yaml").write_text(SWEEP.replace("k: 4", "k: 65"))
    damaged = shutil.copytree(work / "cache", work / "damaged", dirs_exist_ok=True)
    shard = damaged / "acts.zarr" / "train" / HOOKS[2] / "acts" / "c" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:30] + b"\x00" + shard.read_bytes()[31:])
    small = [*harvest[:3], "--dataset", texts, "--context-size", 16, *hook]
    return {
        "hook": ([*harvest, "--hook", "blocks.1.hook_resid_pst", "--out", out], 1, "hook_resid_post"),
        "dataset": ([*harvest[:3], "--dataset", work / "none.jsonl", *hook, "--out", out], 1, "cannot load"),
        "model": (["harvest", "--model", work / "none", *harvest[3:], *hook, "--out", out], 1, "no directory"),
        "other folder": ([*harvest, *hook, "--out", work / "other"], 1, "holds thesis.tex"),
        "empty text": ([*harvest[:3], "--dataset", work / "empty.txt", *hook, "--out", out], 1, "dataset"),
        "too many tokens": ([*small, "--tokens", 10**7, "--out", work / "many"], 1, "or fewer"),
        "other cache": ([*harvest, *hook, "--seed", 5, "--out", work / "cache"], 1, "seed is 0 there, 5 here"),
        "other model": (["eval", work / "runs" / "topk", "--model", other_model], 1, "tiny_gpt2"),
        "runs over a thesis": (["train", work / "cache", work / "sweep.yaml", "--out", work / "other"], 1, "thesis"),
        "runs in a cache": (["train", work / "cache", work / "sweep.yaml", "--out", work / "cache"], 1, "hold runs"),
        "damaged shard": (["train", damaged, work / "sweep.yaml", "--out", work / "x"], 1, "checksum"),
        "damage found": (["verify", damaged], 1, "1 problems found"),
        "no cache": (["info", work], 1, "not a cache"),
        "unknown key": (
            ["train", work / "cache", work / "unknown.yaml", "--out", work / "wrong-runs"],
            2,
            "lerning_rate",
        ),
        "k > d_sae": (
            ["train", work / "cache", work / "wide.yaml", "--out", work / "wrong-runs"],
            2,
            "k must be at most d_sae=64",
        ),
        "k and d_sae": ([*single, "--k", 65], 2, "k must be at most d_sae=64"),
        "no sweep": (train, 2, "name a sweep file"),
        "no such preset": ([*single, "--preset", "openai"], 2, "preset must be one of anthropic_april"),
        "no hook to predict": ([*single, "--architecture", "transcoder"], 2, "transcoder needs hook_name_out"),
        "no memory": ([*single, "--k", 4, "--memory", "nan"], 2, "--memory must be above 0 GB, got nan"),
        "no room": ([*single, "--k", 4, "--memory", 0.01], 2, "0.01 GB may be used; take a smaller d_sae=64"),
        "tokens beyond epochs": ([*single, "--k", 4, "--tokens", 10**9], 2, "epochs"),
        "eval_every 0": ([*single, "--k", 4, "--eval-every", 0], 2, "eval_every must be at least 1"),
        "no such logger": ([*single, "--k", 4, "--logger", "mlflow"], 2, "a logger must be one of wandb, trackio"),
        "no such layout": (
            ["export", work / "runs" / "topk", "--out", out, "--format", "zip"],
            2,
            "must be one of saelens, neuronpedia",
        ),
        "features not built": (
            ["export", work / "runs" / "batchtopk", "--out", out, "--format", "neuronpedia"],
            1,
            "its features must be built",
        ),
        "bad codec": ([*harvest, *hook, "--codec", "zip", "--out", out], 2, "codec: must be one of lossless, fast"),
        "strength left out": ([*steer, "--feature", 3], 2, "--strength must be given with add, scale and clamp"),
        "strength of an ablation": ([*steer, "--feature", 3, "--mode", "ablate", "--strength", 1], 2, "left out with"),
        "no such mode": ([*steer, "--feature", 3, "--mode", "push", "--strength", 1], 2, "must be one of add, scale"),
        "no such feature": ([*steer, "--feature", 64, "--strength", 1], 2, "must be in [0, d_sae=64), got 64"),
        "too long a text": ([*steer, "--feature", 1, "--strength", 1, "--tokens", 999], 2, "has 256 positions, 999"),
        "nothing to steer": (["steer", work / "other", *steer[2:], "--feature", 1, "--strength", 1], 1, "neither cfg"),
        "no such twin": (["similar", *steer[1:2] * 2, "--feature", 64], 2, "must be in [0, d_sae=64), got 64"),
        "no such stable one": (["stability", *steer[1:2] * 2, "--feature", 64], 2, "must be in [0, d_sae=64), got 64"),
        "stable in what": (["stability", work / "runs" / "topk"], 2, "Missing argument"),
        "no option": (["harvest"], 2, "Missing option"),
        "no such command": (["harvset"], 2, "No such command"),
        "no such feature to look up": (
            ["features", work / "runs" / "topk", "--feature", 64],
            2,
            "must be in [0, d_sae=64), got 64",
        ),
        "a logit of no text": (["features", work / "runs" / "topk", "--predict", " on"], 2, "give --text too"),
        "a logit of two tokens": (
            ["features", work / "runs" / "topk", "--text", "the", "--predict", "the cat sat"],
            2,
            "one token",
        ),
        "features of no run": (["features", work / "exported", "--cache", work / "cache"], 1, "must be a RUN folder"),
        "features of another cache": (["features", work / "runs" / "topk", "--cache", work], 1, "not a cache"),
        "bench": (["bench", "flying"], 2, "bench: must be one of"),
        "both": (["eval", work / "runs", "--exclude-special-tokens", "--keep-special-tokens"], 2, "exclude each other"),
    }


def test_wrong_use_gives_one_clear_line(work, tiny_llama_dir, tiny_gpt2_dir, tiny_texts, subtests):
    for name, (args, code, message) in wrong_uses(work, tiny_llama_dir, tiny_gpt2_dir, tiny_texts).items():
        with subtests.test(name):
            done = actcache(*args, code=code)
            assert message in " ".join(done.stderr.split()), done.stderr
            assert "Traceback" not in done.stderr
            assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) <= 1


def test_a_process_keeps_exit_code_and_streams_apart(work):
    sound = in_a_process("info", work / "cache", "--json")
    assert (sound.returncode, json.loads(sound.stdout)["context_size"], sound.stderr) == (0, 16, "")
    wrong = in_a_process("info", work)
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (1, "", 1)
    assert "Traceback" in in_a_process("--debug", "info", work).stderr


def paths_of_commands():
    """(command, parameter) for every argument that is a file or a folder."""
    import cli

    for functions in cli.COMMANDS.values():
        for command, function in functions.items():
            for name, hint in get_type_hints(function).items():
                if hint in (Path, Path | None, list[Path]):
                    yield command, name


def typed(command: str, **given: str) -> list[str]:
    """A command with these arguments, and something for every other that it needs."""
    import cli

    (function,) = (functions[command] for functions in cli.COMMANDS.values() if command in functions)
    hints, argv = get_type_hints(function, include_extras=True), [command]
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in given and parameter.default is not inspect.Parameter.empty:
            continue
        kind, info = get_args(hints[name])[0], hints[name].__metadata__[0]
        value = given.get(name, "1" if kind is int else "x")
        declared = [word for word in (info.default, *(info.param_decls or ())) if str(word).startswith("--")]
        option = (declared or [f"--{name.replace('_', '-')}"])[0].split("/")[0]
        is_positional = isinstance(info, typer.models.ArgumentInfo)
        argv += [value] if is_positional else [option] if kind is bool else [option, value]
    return argv


def test_every_path_of_every_command_refuses_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = list(paths_of_commands())
    assert {("harvest", "out"), ("train", "cache"), ("train", "sweep"), ("eval", "cache"), ("stability", "others")} <= {
        *found
    }
    for command, name in found:
        said = actcache(*typed(command, **{name: "s3://bucket/x"}), code=2).stderr
        assert said.startswith("error: s3:/bucket/x: no address is read or written; mount or copy"), (command, name)
        assert len(said.splitlines()) == 1
        assert not list(tmp_path.iterdir()), (command, name)


@pytest.mark.parametrize("option", ["--model", "--dataset", "--release"])
def test_names_that_may_be_paths_refuse_an_address_too(option, tmp_path, monkeypatch, tiny_llama_dir):
    monkeypatch.chdir(tmp_path)
    argv = ["import", "--sae-id", "x", "--out", "out"]
    if option != "--release":
        given = {"--model": tiny_llama_dir, "--dataset": "texts.jsonl", "--hook": HOOKS[0], "--out": "cache"}
        argv = ["harvest", *(part for each in given.items() if each[0] != option for part in each)]
    address = "s3://owner/name" if option == "--release" else "hf://owner/name"  # a release may be of the hub
    said = actcache(*argv, option, address, code=2).stderr
    assert said.splitlines()[-1].startswith(f"error: {address}: no address is read or written")
    assert not list(tmp_path.iterdir())


def test_a_tilde_is_the_home_folder(work, monkeypatch, tmp_path):
    """A shell leaves it as it is in --out=~/cache."""
    monkeypatch.setenv("HOME", str(tmp_path))
    actcache("export", work / "runs" / "topk", "--out=~/exported")
    assert (tmp_path / "exported" / "cfg.json").is_file()
