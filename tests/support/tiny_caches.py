"""Small real caches: real text, a tiny real model, the real harvest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from support.tiny_models import TEXT

if TYPE_CHECKING:
    from actcache.models.language_model import LanguageModel
    from actcache.store.cache import Cache

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_attn_out", "blocks.1.hook_resid_post")
TOKENS = 2000  # of the cache that tests of growth and of several writers come to
# settings of caches whose arrays are stored in different ways
PROFILES = {
    "lossless": {},
    "raw": {"codec": "raw"},
    "int8": {"codec": "int8"},
    "float32": {"codec": "raw", "dtype": "float32"},
}


def write_texts(path: Path, n_documents: int = 60) -> Path:
    """A jsonl file of documents of different lengths, the first one empty; returns `path`."""
    sentences = [sentence.strip() for sentence in TEXT.replace("\n", " ").split(".")]
    documents = [""] + [f"{number}. " + ". ".join(sentences[: 1 + number % 12]) for number in range(1, n_documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def harvest_tiny(model: LanguageModel, texts: Path, out: Path, **settings: object) -> Cache:
    """Harvest HOOKS at context 16 in shards of 128 rows; `settings` are HarvestConfig's."""
    from actcache.harvesting.config import HarvestConfig
    from actcache.harvesting.run import harvest
    from actcache.text.sources import DatasetSource

    defaults = {"hook_names": HOOKS, "context_size": 16, "holdout": 0.2, "batch_size": 8}
    return harvest(model, DatasetSource(path=str(texts)), HarvestConfig(**{**defaults, **settings}), out)


def promised_files(cache: Path) -> dict[str, str]:
    """Path -> sha256 of every file that equal caches share to the byte: acts.zarr, stats and manifest/cache.json."""
    files = [*(cache / "acts.zarr").rglob("*"), *(cache / "stats").rglob("*"), cache / "manifest" / "cache.json"]
    return {str(f.relative_to(cache)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(files) if f.is_file()}
