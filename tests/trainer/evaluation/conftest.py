"""Fixtures of the tests of evaluation. Nothing of actcache or trainer is imported here at module level."""

import pytest


@pytest.fixture(scope="session")
def model():
    """The tiny GPT-2 in float64."""
    from support.evaluation_cases import new_model

    return new_model()


@pytest.fixture(scope="session")
def cache(model, tmp_path_factory: pytest.TempPathFactory):
    """A cache of two of its hooks; evaluating keeps the losses of the model beside it, and nothing else may change."""
    from support.evaluation_cases import new_cache

    return new_cache(tmp_path_factory.mktemp("evaluated") / "cache", model)
