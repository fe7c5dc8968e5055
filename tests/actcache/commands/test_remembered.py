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
    assert "was harvested from a model in memory; pass --model" in actcache("repair", copied, code=1).stderr
    actcache("repair", copied, "--model", tiny_llama_dir, "--device", "cpu")
    assert promised_files(copied) == promised_files(sound["lossless"])
