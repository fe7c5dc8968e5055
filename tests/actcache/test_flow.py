from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch

from actcache.flow import SPLITS, ActivationBatch, Batch, TokenBatch

STAGES = {
    TokenBatch: {"token_ids": np.zeros((2, 3), dtype=np.int32), "first_sequence": 5},
    ActivationBatch: {"hook_name": "blocks.0.hook_mlp_out", "x": torch.zeros(2, 3, 4), "first_token": 15},
    Batch: {"x": {"blocks.0.hook_mlp_out": torch.zeros(6, 4)}, "row": torch.arange(6), "step": 0},
}
WRONG = {
    TokenBatch: {"token_ids": np.zeros((2, 3), dtype=np.int64)},
    ActivationBatch: {"x": torch.zeros(6, 4)},
    Batch: {"row": torch.arange(5)},
}


def test_splits_are_frozen():
    """Shards of both are numbered in this order, and folders of old caches have these names."""
    assert SPLITS == ("train", "validation")


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_hands_on_cannot_be_changed(stage):
    value = stage(**STAGES[stage])
    for name, given in STAGES[stage].items():
        assert getattr(value, name) is given
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, given)


@pytest.mark.parametrize("stage", STAGES)
def test_shapes_and_dtypes_are_checked_in_tests(stage):
    """So every test that passes one of these on holds its shape as well."""
    with pytest.raises(Exception, match="Type-check error"):
        stage(**{**STAGES[stage], **WRONG[stage]})


def test_fields_of_tokens_are_absent_unless_asked_for():
    batch = Batch(**STAGES[Batch])
    assert {name: getattr(batch, name) for name in ("token_id", "document", "sequence", "position", "cache")} == {
        "token_id": None,
        "document": None,
        "sequence": None,
        "position": None,
        "cache": None,
    }
