"""The model of a cache is found where the cache remembers it, or asked for."""

import pytest
from support.damages import BESIDE_HOOKS, drop, hook_damages
from support.tiny_caches import promised_files

pytestmark = pytest.mark.usefixtures("small_chunks")


def test_the_commands_find_the_model_or_ask_for_it(sound, copied, tiny_llama_dir):
    import json

    from support.command_line import actcache

    sampled = ("verify", copied, "--sample-model", "--sequences", 3, "--device", "cpu", "--json")
    report = json.loads(actcache(*sampled).stdout)
    assert (report["problems"], report["sample"]["problems"], report["sample"]["n_sequences"]) == ([], [], 3)
    drop(copied / "log" / "origin.json")
    BESIDE_HOOKS["statistics gone"].to(copied)
    actcache("repair", copied)
    hook_damages("acts")["acts cut"].to(copied)
    assert "pass --model" in actcache("repair", copied, code=1).stderr
    (copied / "log" / "origin.json").write_text('{"model": "", "revision": null, "dataset": null}')
    assert "was harvested from a model in memory; save that model" in actcache("repair", copied, code=1).stderr
    actcache("repair", copied, "--model", tiny_llama_dir, "--device", "cpu")
    assert promised_files(copied) == promised_files(sound["lossless"])


def test_a_model_in_memory_is_saved_and_named(tiny_texts, tmp_path):
    """Such as one that was trained or merged here: a cache of it remembers no model."""
    import json

    from support.command_line import actcache
    from support.tiny_caches import HOOKS
    from support.tiny_models import make_model, make_tokenizer

    import actcache as package

    tokenizer = make_tokenizer()
    model = make_model("gpt2", len(tokenizer), seed=5)
    cache = package.harvest(model, tokenizer, tiny_texts, HOOKS[0], tmp_path / "c", context_size=16, holdout=0.2)
    sampled = ("verify", cache.path, "--sample-model", "--device", "cpu")
    assert "from a model in memory; save that model and its tokenizer" in actcache(*sampled, code=1).stderr
    assert "a model must be named, got ''" in actcache(*sampled, "--model", "", code=1).stderr
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    report = json.loads(actcache(*sampled, "--json", "--model", tmp_path / "saved").stdout)
    assert (report["problems"], report["sample"]["problems"]) == ([], [])


def test_the_adapter_of_a_cache_is_found_or_asked_for(tiny_llama_dir, tiny_texts, tmp_path, monkeypatch):
    import json
    import shutil

    from support.adapters import save_adapter
    from support.command_line import actcache
    from support.tiny_caches import HOOKS
    from support.tiny_saes import make_config, make_run

    from actcache.store.cache import open_cache

    adapter = save_adapter(tiny_llama_dir, tmp_path / "lora")
    asked = ("harvest", "--model", tiny_llama_dir, "--hook", HOOKS[2], "--dataset", tiny_texts, "--device", "cpu")
    asked = (*asked, "--context-size", 16, "--holdout", 0.2, "--out", tmp_path / "c")
    actcache(*asked, "--adapter", adapter)
    cache = open_cache(tmp_path / "c")
    assert cache.origin["adapter"] == str(adapter)
    assert cache.identity["model"]["name"] == f"{tiny_llama_dir.name}+lora"
    assert "its weights are others" in actcache(*asked, code=1).stderr
    actcache(*asked, "--adapter", adapter)

    sampled = ("verify", tmp_path / "c", "--sample-model", "--device", "cpu")
    assert "are what the model gives" in actcache(*sampled).stderr
    run = make_run(tmp_path, make_config("topk", d_in=32, hook_name=HOOKS[2]), cache.identity["model"])
    said = json.loads(actcache("eval", run, "--cache", cache.path, "--device", "cpu", "--json").stdout)
    assert said["runs"][0]["ce_loss_with_ablation"] is not None

    moved = shutil.move(adapter, tmp_path / "moved")
    assert "the adapter" in actcache(*sampled, code=1).stderr
    actcache(*sampled, "--adapter", moved)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "of another user"))
    stranger = actcache(*sampled, "--model", tiny_llama_dir, code=1).stderr
    assert f"names the adapter {adapter}, which you have not named to actcache yet" in stranger
    assert f"pass --adapter {adapter}" in stranger
