"""The bundled model loads without a network and was trained; the bundled text is the same whenever it is read."""

import hashlib
import lzma
import math
import os
import subprocess
import sys
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from actcache.bundled.documents import bundled_model_path, standard_library_documents

LOAD_OFFLINE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
logging.disable_progress_bar()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(model(**AutoTokenizer.from_pretrained(sys.argv[1])("def", return_tensors="pt")).logits.shape[-1])
"""
READ_DOCUMENTS = """
import hashlib, inspect, runpy, sys  # inspect, because ast.get_docstring imports it
standard_library_documents = runpy.run_path(sys.argv[1])["standard_library_documents"]
before = set(sys.modules)
print(hashlib.sha256("".join(standard_library_documents()).encode()).hexdigest(), set(sys.modules) - before)
"""


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return standard_library_documents()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(bundled_model_path(), local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(bundled_model_path(), local_files_only=True)


def test_the_model_loads_offline_and_silently(tmp_path, model):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", LOAD_OFFLINE, str(bundled_model_path())]
    loaded = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (loaded.stdout.strip(), loaded.stderr) == (str(model.config.vocab_size), "")


def test_the_model_is_small(model, tokenizer):
    assert 1e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 2e6
    assert len(tokenizer) == model.config.vocab_size <= 2048
    assert sum(path.stat().st_size for path in bundled_model_path().iterdir()) < 8e6


def test_one_special_token_begins_and_ends(tokenizer):
    assert tokenizer.all_special_ids == [tokenizer.bos_token_id] == [tokenizer.eos_token_id]
    assert tokenizer.encode("def", add_special_tokens=False) == tokenizer.encode("def")


@pytest.mark.parametrize(
    "text",
    ["", " a  b\n\n\tc ", "\r\nx\x00\x7f", "naïve Ω 漢字 \N{SNAKE}", "it 's , n't . do not"],
    ids=["empty", "spaces", "control", "unicode", "punctuation"],
)
def test_the_tokenizer_round_trips_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_tokenizer_round_trips_its_own_text(tokenizer, documents):
    text = "".join(documents[::20])
    assert tokenizer.decode(tokenizer.encode(text)) == text


@torch.inference_mode()
def test_the_model_beats_lzma(model, tokenizer):
    """On a passage that was held out when the model was trained."""
    passage = topics["function"][:2000]
    token_ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(passage)]])[:, : model.config.n_positions]
    logits = model(token_ids).logits[0, :-1]
    nats = torch.nn.functional.cross_entropy(logits, token_ids[0, 1:], reduction="sum").item()
    n_bytes = len(tokenizer.decode(token_ids[0, 1:]).encode())
    lzma_bits_per_byte = 8 * len(lzma.compress(passage.encode(), preset=9)) / len(passage.encode())
    assert nats / math.log(2) / n_bytes < lzma_bits_per_byte


def test_documents_are_sorted_and_unique(documents):
    assert documents == sorted(set(documents))
    assert all(document.strip() for document in documents)


def test_documents_are_the_standard_library(documents):
    starts = [document[:60].splitlines()[0] for document in documents]
    assert {"Topic lambda", "Module argparse", "Module json.decoder"} <= set(starts)
    assert not [start for start in starts if start.startswith(("Module test", "Module idlelib", "Module torch"))]
    assert sum(len(document.encode()) for document in documents) > 1e6


def test_a_docstring_follows_the_name_of_its_object(documents):
    (document,) = [document for document in documents if document.startswith("Module textwrap\n\n")]
    assert "\n\ntextwrap.dedent(text)\n\nRemove any common leading whitespace" in document


def test_another_process_reads_the_same_documents_and_imports_no_module(documents):
    command = [sys.executable, "-c", READ_DOCUMENTS, str(bundled_model_path().parent / "documents.py")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [hashlib.sha256("".join(documents).encode()).hexdigest(), "set()"]
