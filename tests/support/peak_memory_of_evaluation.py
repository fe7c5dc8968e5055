"""Run by test_evaluate in a process of its own: evaluate a wide SAE on a new cache at FOLDER; print peaks as JSON.

A peak is the growth of anonymous memory (RssAnon) over what there was after the same with a narrow SAE.
"""

import json
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from actcache.bundled.documents import bundled_model_path
from actcache.harvesting.config import HarvestConfig
from actcache.harvesting.run import harvest
from actcache.models.load import wrap_model
from actcache.text.sources import LoadedDataset
from trainer.evaluation import downstream_loss
from trainer.evaluation.evaluate import evaluate
from trainer.sae.sae import SAE

D_MODEL, CONTEXT_SIZE, VOCAB, N_TOKENS = 32, 128, 8192, 1 << 12
HOOK, D_SAE, PIECE_VALUES = "blocks.0.hook_resid_post", 32_768, 1 << 20


def anonymous_bytes() -> int:
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def growth(run: Callable[[], object]) -> int:
    """The most anonymous bytes meanwhile, over those before."""
    before, done = anonymous_bytes(), threading.Event()
    peak = [before]

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return peak[0] - before


def random_sae(d_sae: int) -> SAE:
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.randn(d_sae, D_MODEL, generator=generator) / D_MODEL
    return SAE(
        architecture="jumprelu",
        hook_name=HOOK,
        W_enc=W_dec.T.contiguous(),
        W_dec=W_dec,
        b_enc=torch.zeros(d_sae),
        b_dec=torch.zeros(D_MODEL),
        threshold=torch.full((d_sae,), 0.01),
        subtracts_b_dec=False,
        metadata={},
    )


def main(folder: str) -> None:
    downstream_loss.PIECE_VALUES = PIECE_VALUES
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    bos = tokenizer.bos_token_id
    sizes = {"n_embd": D_MODEL, "n_layer": 1, "n_head": 1, "n_positions": CONTEXT_SIZE, "vocab_size": VOCAB}
    model = wrap_model(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=bos, eos_token_id=bos)).eval(), tokenizer, "r")
    ids = np.random.default_rng(0).integers(1, 256, size=(N_TOKENS // CONTEXT_SIZE, CONTEXT_SIZE - 1))
    documents = LoadedDataset(Dataset.from_dict({"input_ids": ids.tolist()}))
    asked = HarvestConfig(hook_names=(HOOK,), context_size=CONTEXT_SIZE, holdout=0.5)
    cache, narrow, wide = harvest(model, documents, asked, folder), random_sae(64), random_sae(D_SAE)
    evaluate(narrow, cache)  # what is imported or grown once
    peaks = {"cache": growth(lambda: evaluate(wide, cache)), "model": growth(lambda: evaluate(wide, cache, model))}
    sizes = {"piece_values": PIECE_VALUES, "batch_tokens": downstream_loss.BATCH_TOKENS, "vocab": VOCAB}
    print(json.dumps(peaks | sizes))


main(sys.argv[1])
