"""Run by test_loader in a process of its own: load an epoch of CACHE; print peak and promised bytes.

Peak is the growth of anonymous memory (RssAnon) since before the loader was made; mapped files are apart from it.
"""

import re
import sys
import threading
from pathlib import Path

from actcache import Loader, open_cache
from actcache.loading.buffers import DECODE_THREADS

GROUP_CHUNKS, BATCH = 2, 1024


def anonymous_bytes() -> int:
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def main(folder: str, max_norm_ratio: float) -> None:
    cache = open_cache(folder)
    (hook,) = cache.manifest.hooks
    settings = {"batch_tokens": BATCH, "group_chunks": GROUP_CHUNKS, "max_norm_ratio": max_norm_ratio}
    for batch in Loader(cache, hook.hook_name, **settings, limit=BATCH):  # what is imported or grown once
        del batch
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with Loader(cache, hook.hook_name, **settings) as loader:
        for batch in loader:
            peak = max(peak, anonymous_bytes() - before)
            del batch
    done.set()
    watcher.join()
    group_rows, row_bytes = GROUP_CHUNKS * cache.manifest.chunk_rows, hook.d_in * 2
    loose_rows = DECODE_THREADS * cache.manifest.chunk_rows + BATCH  # and a batch that lies in two groups
    allowed = 3 * group_rows * row_bytes + 2 * group_rows * (16 + 64) + loose_rows * row_bytes
    print(peak, allowed + loader.n_stored_rows // 8)


main(sys.argv[1], float(sys.argv[2]))
