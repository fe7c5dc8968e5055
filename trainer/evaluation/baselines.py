"""What the SAEs of a folder are compared with: as many principal components, and as many latents of random directions.

Both get as much as is fair, so that an SAE that beats them has learned something: the mean and the components are
fitted to training rows, and the random dictionary is as wide as the widest SAE with this k.
"""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch

from actcache.errors import CacheMismatch
from actcache.files import is_file
from actcache.loading.loader import Loader
from actcache.store.cache import Cache
from trainer.evaluation.downstream_loss import BATCH_TOKENS
from trainer.evaluation.pca import PCA, fit_pca
from trainer.evaluation.random_sae import random_sae
from trainer.run_folder import BASELINES, CONFIG_FILE, read_run_json, write_run_json
from trainer.sae.sae import SAE

PCA_ROWS = 131_072  # training rows that principal components are fitted to, at most
RANDOM_ROWS = 8_192  # training rows that the length of random directions is fitted to, at most: it is one number


def baselines(compared: Iterable[tuple[str, int | None, int]], cache: Cache, device: torch.device) -> list[PCA | SAE]:
    """Two baselines for every distinct (hook_name, k) with k up to d_in: first all PCAs of a hook, then the others.

    The PCA of each hook is fitted once, with the largest k. Those of smaller k are the first of its components.

    Args:
        compared: hook_name, k (None if it has none) and d_sae of each SAE.
        cache: its training rows are read.
        device: where the baselines are made.
    """
    widths: dict[str, dict[int, int]] = {}  # by hook and k, the largest d_sae
    for hook_name, k, d_sae in compared:
        if k is not None and k <= min(d_sae, cache.hook(hook_name).d_in):
            of_hook = widths.setdefault(hook_name, {})
            of_hook[k] = max(d_sae, of_hook.get(k, 0))
    made: list[PCA | SAE] = []
    for hook_name, of_hook in sorted(widths.items()):
        with Loader(cache, [hook_name], split="train", batch_tokens=BATCH_TOKENS, device=device) as loader:
            widest = fit_pca(islice(loader, PCA_ROWS // BATCH_TOKENS), hook_name, max(of_hook))
        made += [widest.leading(k) for k in sorted(of_hook)]
        for k, d_sae in sorted(of_hook.items()):
            with Loader(cache, [hook_name], split="train", batch_tokens=BATCH_TOKENS, device=device) as loader:
                first = islice(loader, RANDOM_ROWS // BATCH_TOKENS)
                made.append(random_sae(first, hook_name, widest.mean, d_sae=d_sae, k=k))
    return made


def trained_as(sae: PCA | SAE) -> str:
    """The architecture that tells runs apart: a batchtopk SAE is saved as the jumprelu that it is at inference."""
    return sae.architecture if isinstance(sae, PCA) else sae.metadata.get("training_architecture", sae.architecture)


def is_baseline(folder: Path) -> bool:
    """Whether a folder with a config.json is that of a baseline."""
    return read_run_json(folder, CONFIG_FILE).get("architecture") in BASELINES


def write_baseline(runs: Path, baseline: PCA | SAE, cache: Cache) -> Path:
    """Write the baseline's folder with its config.json. Raises CacheMismatch if a run has this name."""
    architecture = trained_as(baseline)
    folder = runs / f"{architecture}-k{baseline.k}-{baseline.hook_name}"
    if is_file(folder / CONFIG_FILE) and not is_baseline(folder):
        raise CacheMismatch(f"evaluate: a baseline goes to {folder}, where a run is; give the run another name")
    sizes = {"d_in": baseline.d_in, "d_sae": baseline.d_sae, "k": baseline.k}
    fitted = {"n_rows": baseline.n_rows} if isinstance(baseline, PCA) else {}
    source = {"cache_fingerprint": cache.fingerprint, "model": cache.identity["model"]["name"]}
    config = {"architecture": architecture, "name": folder.name, "hook_name": baseline.hook_name}
    write_run_json(folder, CONFIG_FILE, config | sizes | fitted | source)
    return folder
