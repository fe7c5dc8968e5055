"""While tests run, annotations are checked at every call: shapes, and what is no array."""

import jaxtyping
import pytest
import torch
from beartype import beartype


def test_axes_that_differ_are_found():
    from trainer.sae.metrics import explained_variance

    with pytest.raises(jaxtyping.TypeCheckError, match="explained_variance"):
        explained_variance(torch.ones(3, 4), torch.ones(4, 4))


def test_an_argument_that_is_no_array_is_checked():
    from actcache.format.paths import statistics_key

    assert statistics_key("train", "hook")
    with pytest.raises(jaxtyping.TypeCheckError, match="hook_name"):
        statistics_key("train", 3)


def test_what_is_returned_is_checked():
    @jaxtyping.jaxtyped(typechecker=beartype)
    def made() -> int:
        return "no number"

    with pytest.raises(jaxtyping.TypeCheckError, match="made"):
        made()
