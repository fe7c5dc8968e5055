"""Fixtures shared by the test files.

Nothing of actcache or trainer is imported here at module level: jaxtyping's import hook has to be set before they are.
"""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from support import run_time_checks

run_time_checks.install()
for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[variable] = "1"  # before transformers and datasets are imported: they read these once
for variable in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):  # this user has named no model and no dataset yet
    os.environ[variable] = tempfile.mkdtemp(prefix="actcache-user-")
    atexit.register(shutil.rmtree, os.environ[variable], ignore_errors=True)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell hands it down as ignored


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Tensors here are tiny: a second thread only waits, and on a busy machine it waits long."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny Llama (grouped-query attention) and its tokenizer."""
    from support.tiny_models import make_model_dir

    from actcache.commands.named_sources import note_named

    folder = make_model_dir("llama", tmp_path_factory.mktemp("tiny_llama"))
    note_named("model", str(folder), None)
    return folder


@pytest.fixture(scope="session")
def tiny_gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny GPT-2 and its tokenizer."""
    from support.tiny_models import make_model_dir

    return make_model_dir("gpt2", tmp_path_factory.mktemp("tiny_gpt2"))


@pytest.fixture(scope="session")
def tiny_model(tiny_llama_dir):
    """The tiny Llama, loaded."""
    from actcache.models.load import load_model

    return load_model(str(tiny_llama_dir), device="cpu")


@pytest.fixture(scope="session")
def tiny_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of sixty documents."""
    from support.tiny_caches import write_texts

    from actcache.commands.named_sources import note_named

    path = write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")
    note_named("dataset", str(path), None)
    return path


@pytest.fixture(scope="session")
def tiny_cache(tiny_model, tiny_texts, tmp_path_factory: pytest.TempPathFactory):
    """A lossless cache of three hooks, many shards and a partial tail in both splits; do not change it."""
    from support.tiny_caches import harvest_tiny

    return harvest_tiny(tiny_model, tiny_texts, tmp_path_factory.mktemp("cache") / "cache")


@pytest.fixture(scope="module")
def places(tiny_llama_dir, tiny_texts, tmp_path_factory: pytest.TempPathFactory):
    """What every command of the command line can be tried on; do not change it."""
    from support.every_command import make_places

    return make_places(tmp_path_factory.mktemp("places"), tiny_llama_dir, tiny_texts)


@pytest.fixture(scope="module")
def scenarios(tiny_llama_dir, tiny_texts, tmp_path_factory: pytest.TempPathFactory):
    """Caches on their way, in processes that a fault may befall."""
    from support.fault_scenarios import Scenarios
    from support.faulty_writers import shrink_sequence_shards

    with pytest.MonkeyPatch.context() as patch:
        shrink_sequence_shards(patch.setattr)
        made = Scenarios(tiny_llama_dir, tiny_texts, tmp_path_factory.mktemp("faults"))
        yield made
        made.writers.kill_all()
