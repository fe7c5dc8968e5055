"""Models of each family, each made and loaded once; tests leave them as they were.

actcache is imported in the fixtures: its shapes are checked only from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

if TYPE_CHECKING:
    from actcache.models.language_model import LanguageModel


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    from support.tiny_models import make_model_dir

    return cache(lambda family: make_model_dir(family, tmp_path_factory.mktemp("models") / family))


@pytest.fixture(scope="session")
def ours(directory) -> Callable[[str], LanguageModel]:
    from actcache.models.load import load_model

    return cache(lambda family: load_model(directory(family), device="cpu"))


@pytest.fixture(scope="session")
def theirs(directory) -> Callable[[str], PreTrainedModel]:
    return cache(lambda family: AutoModelForCausalLM.from_pretrained(directory(family)))


@pytest.fixture(scope="session")
def bridge(directory) -> Callable[[str], LanguageModel]:
    from actcache.models.load import load_model

    return cache(lambda family: load_model(directory(family), device="cpu", backend="transformer_lens"))


@pytest.fixture(scope="session")
def eager(directory) -> Callable[[str], LanguageModel]:
    """Our fast path with the attention kernel of the bridge."""
    from support.tiny_models import make_tokenizer

    from actcache.models.load import wrap_model

    def load(family: str) -> LanguageModel:
        model = AutoModelForCausalLM.from_pretrained(directory(family), attn_implementation="eager")
        return wrap_model(model, make_tokenizer())

    return cache(load)
