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
