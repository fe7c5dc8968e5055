"""Run by test_features in a process of its own: build the features of RUN from CACHE; print peak and promised bytes.

Peak is the growth of anonymous memory (RssAnon) over what was there before, the SAE's weights included.
"""

import re
import sys
import threading
from pathlib import Path

import torch

from actcache.store.cache import open_cache
from trainer.features import build, feature_acts
from trainer.formats.saelens import load_sae


def anonymous_bytes() -> int:
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def main(run: str, folder: str) -> None:
    torch.set_num_threads(1)
    build.FILE_ENTRIES = 1 << 18  # several files a shard
    cache, sae = open_cache(folder), load_sae(run)
    encoder = feature_acts.SparseEncoder(sae)
    for _ in range(2):  # what is grown once
        encoder.entries(torch.randn(64, sae.d_in))
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    build.build_features(run, cache)
    done.set()
    watcher.join()
    shard = cache.manifest.shard_rows * (2 * sae.d_in + 32)
    batch = encoder.batch_rows * (2 * sae.d_sae + 3 * sae.d_in) * 4
    entries = build.FILE_ENTRIES + encoder.batch_rows * (sae.k or sae.d_sae)
    print(peak, shard + batch + 64 * entries)


main(sys.argv[1], sys.argv[2])
