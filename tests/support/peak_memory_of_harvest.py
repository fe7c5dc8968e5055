"""Run by test_memory in a process of its own: harvest into OUT with each CODEC; print peak, promised and forward bytes.

A line for each codec. Peak is the growth of anonymous memory (RssAnon) over the peak of the model and its forward
passes alone; forward is what these took beside the model.
"""

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from actcache.bundled.documents import bundled_model_path
from actcache.harvesting.config import HarvestConfig
from actcache.harvesting.estimate import encoder_threads, spare_cores
from actcache.harvesting.run import harvest
from actcache.models.load import wrap_model
from actcache.text.sources import LoadedDataset

D_MODEL, CONTEXT_SIZE, BATCH_SIZE = 256, 128, 32
HOOKS = ("blocks.0.hook_resid_pre", "blocks.0.hook_resid_post")


def anonymous_bytes() -> int:
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@contextmanager
def peak_of(peaks: list[int]) -> Iterator[None]:
    """Append the largest number of anonymous bytes that there were meanwhile."""
    peak, done = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield
    done.set()
    watcher.join()
    peaks.append(peak[0])


def main(out: str, n_tokens: int, codecs: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    bos = tokenizer.bos_token_id
    sizes = {"n_embd": D_MODEL, "n_layer": 1, "n_head": 4, "n_positions": CONTEXT_SIZE, "vocab_size": len(tokenizer)}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=bos, eos_token_id=bos)).eval()
    model = wrap_model(model, tokenizer, name="random")
    ids = np.random.default_rng(0).integers(1, 256, size=(n_tokens // CONTEXT_SIZE, CONTEXT_SIZE - 1))
    documents = LoadedDataset(Dataset.from_dict({"input_ids": ids.tolist()}))
    loaded, peaks = anonymous_bytes(), list[int]()
    with peak_of(peaks):
        for _ in range(8):
            model.activations(torch.zeros(BATCH_SIZE, CONTEXT_SIZE, dtype=torch.long), HOOKS)
    for codec in codecs:
        asked = HarvestConfig(
            hook_names=HOOKS, context_size=CONTEXT_SIZE, batch_size=BATCH_SIZE, holdout=0.0, codec=codec
        )
        with peak_of(peaks):
            manifest = harvest(model, documents, asked, Path(out) / codec).manifest
        row_bytes = len(HOOKS) * (D_MODEL + 2 * D_MODEL // 32 if codec == "int8" else 2 * D_MODEL)
        windows = (2 if spare_cores(model.device) else 1) * manifest.shard_rows * row_bytes
        encoding = encoder_threads(model.device) * 24 * manifest.chunk_rows * D_MODEL
        promised = windows + encoding + 128 * manifest.shard_rows + 16 * 8192 * D_MODEL + (64 << 20)
        print(peaks[-1] - peaks[0], promised, peaks[0] - loaded)


main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
