"""Which baselines a set of SAEs gets, and where they are written."""

import json

import pytest
import torch
from support.evaluation_cases import D_IN, HOOK, OTHER_HOOK
from support.tiny_saes import make_config, make_run

from actcache.errors import CacheMismatch
from trainer.evaluation.baselines import baselines, is_baseline, trained_as, write_baseline
from trainer.evaluation.pca import PCA

CPU = torch.device("cpu")


def test_every_hook_and_k_gets_two_and_the_random_one_is_the_widest(cache) -> None:
    compared = [(HOOK, 4, 48), (HOOK, 4, 96), (HOOK, 2, 64), (HOOK, None, 512), (HOOK, D_IN + 1, 512)]
    found = baselines([*compared, (OTHER_HOOK, 4, 40)], cache, CPU)
    assert [(trained_as(each), each.hook_name, each.k, each.d_sae) for each in found] == [
        *(("pca", OTHER_HOOK, 4, 4), ("random", OTHER_HOOK, 4, 40)),
        *(("pca", HOOK, 2, 2), ("pca", HOOK, 4, 4), ("random", HOOK, 2, 64), ("random", HOOK, 4, 96)),
    ]
    of_hook = [each for each in found if each.hook_name == HOOK]
    for pca, random in zip(of_hook[:2], of_hook[2:], strict=True):
        assert isinstance(pca, PCA)
        assert torch.equal(pca.mean, random.b_dec), "both know the mean"


def test_a_baseline_is_no_run_and_never_takes_the_place_of_one(cache, tmp_path) -> None:
    pca, random = baselines([(HOOK, 4, 48)], cache, CPU)
    folder = write_baseline(tmp_path, random, cache)
    assert folder.name == f"random-k4-{HOOK}"
    config = json.loads((folder / "config.json").read_text())
    assert config == {
        **{"architecture": "random", "name": folder.name, "hook_name": HOOK, "d_in": D_IN, "d_sae": 48, "k": 4},
        **{"cache_fingerprint": cache.fingerprint, "model": "tiny"},
    }
    assert is_baseline(folder)
    assert write_baseline(tmp_path, random, cache) == folder, "written anew"
    run = make_run(tmp_path, make_config("topk", name=f"pca-k4-{HOOK}"), cache.identity["model"])
    assert not is_baseline(run)
    with pytest.raises(CacheMismatch, match=r"a baseline goes to .*, where a run is; give the run another name"):
        write_baseline(tmp_path, pca, cache)
