"""The settings of an SAE by SAELens' names."""

import copy
import pickle

import pytest

from trainer.sae.cfg import ArchitectureName, SAECfg, SAEMetadata


def a_cfg() -> SAECfg:
    metadata = SAEMetadata({"hook_name": "blocks.1.hook_resid_post", "model_name": "tiny"})
    return SAECfg({"architecture": ArchitectureName("topk"), "k": 5, "metadata": metadata})


def test_keys_are_attributes_also_those_of_the_metadata():
    cfg = a_cfg()
    assert (cfg.k, cfg["k"], cfg.hook_name, cfg["hook_name"]) == (5, 5, *["blocks.1.hook_resid_post"] * 2)
    assert (cfg.metadata.model_name, cfg.metadata.unknown) == ("tiny", None)
    assert (cfg.architecture, cfg.architecture()) == ("topk", "topk")
    with pytest.raises(AttributeError, match=r"SAE\.cfg: has architecture, k, metadata, .*, got d_in"):
        _ = cfg.d_in


def test_it_is_copied_pickled_and_made_plain():
    cfg = a_cfg()
    for other in (copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg))):
        assert other == cfg
    assert cfg.to_dict() == {"architecture": "topk", "k": 5, "metadata": dict(cfg.metadata)}
    assert type(cfg.to_dict()["metadata"]) is dict
