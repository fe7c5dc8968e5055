"""What a sweep will take, before it starts: its parameters, memory and FLOPs, and how many passes over the cache.

The memory is an upper bound of what the steps, their log and their evaluations add to the process on the device that
trains. It leaves out what an SAE takes once: a sample of rows for its first b_enc, and one float64 matrix for its
export.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from actcache.errors import ConfigError
from actcache.loading import loader
from actcache.loading.stream import hook_bytes
from actcache.machine.limits import memory_room
from actcache.store.cache import Cache
from trainer.config.settings import BATCH_FAMILY, TOPK_FAMILY, SAEConfig, TrainConfig
from trainer.kernels.active import Workspace
from trainer.kernels.select import topk_chunk_rows, with_margin
from trainer.training import validation
from trainer.training.step import initial_state, train_step

LOADER_BYTES = 640 << 20  # of one hook: three groups of at most 144 MiB, and the row numbers of two of them
FREE_SHARE = 0.8  # the share of the free memory that training may use
# Matrices [batch, d_sae] of float32 that one step holds at once, if its pass is dense: measured, and a quarter more.
DENSE_MATRICES = {"jumprelu": 6.5, "gated": 8.5}
OTHER_DENSE_MATRICES, TANH_MATRICES = 4.5, 7.5
LOGGED_ROWS = 8  # reconstructions [batch, d_out] of float32 at once: a step has fewer, its log has float64 ones
PREFIX_ROWS = 6  # the same for each prefix of a Matryoshka SAE
ENTRY_BYTES, PREFIX_ENTRY_BYTES = 64, 32  # of an active entry: its indices in both orders, values and gradients
UPDATE_COPIES = {"muon": 2, "schedule_free": 2}  # copies of all weights that these optimizers make in a step


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """The SAEs of a sweep in the order in which they are trained.

    Attributes:
        passes: the SAEs of each pass. A pass reads the cache once, and its SAEs share every batch.
        batch_tokens: rows of a batch.
        memory_bytes: the memory that may be used.
        needed_bytes: bytes of the pass that needs most memory.
    """

    passes: tuple[tuple[SAEConfig, ...], ...]
    batch_tokens: int
    memory_bytes: int
    needed_bytes: int

    @property
    def configs(self) -> tuple[SAEConfig, ...]:
        """The SAEs of all passes."""
        return tuple(config for each in self.passes for config in each)

    @property
    def n_parameters(self) -> int:
        """Number of trained parameters of all SAEs."""
        return sum(n_parameters(config) for config in self.configs)

    @property
    def flops(self) -> float:
        """FLOPs of training all SAEs on all of their tokens."""
        return sum((flops_per_token(config) * config.training_tokens for config in self.configs), start=0.0)


def plan_passes(
    configs: Sequence[SAEConfig],
    batch_tokens: int,
    memory_bytes: int,
    *,
    loader_bytes: int = LOADER_BYTES,
    is_cuda: bool = False,
) -> SweepPlan:
    """Put the SAEs into passes, in their order. A new pass begins where the next SAE would not fit into the last one.

    Args:
        configs: the SAEs.
        batch_tokens: rows of a batch.
        memory_bytes: the memory that may be used.
        loader_bytes: what reading one hook takes.
        is_cuda: whether they train on CUDA.

    Raises:
        ConfigError: an SAE does not fit alone.
    """
    needed = partial(pass_bytes, batch_tokens=batch_tokens, loader_bytes=loader_bytes, is_cuda=is_cuda)
    passes: list[list[SAEConfig]] = []
    for config in configs:
        if needed([config]) > memory_bytes:
            raise ConfigError(
                f"{config.name}: training needs about {needed([config]) / 1e9:.2g} GB, {memory_bytes / 1e9:.2g} GB may "
                f"be used; take a smaller d_sae={config.d_sae} or batch_tokens={batch_tokens}, or allow more memory"
            )
        if not passes or needed([*passes[-1], config]) > memory_bytes:
            passes.append([])
        passes[-1].append(config)
    return SweepPlan(
        passes=tuple(map(tuple, passes)),
        batch_tokens=batch_tokens,
        memory_bytes=memory_bytes,
        needed_bytes=max(map(needed, passes), default=0),
    )


def free_memory(device: torch.device | str) -> int:
    """Bytes that training may take on a device: FREE_SHARE of those that are free."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * FREE_SHARE)
    return int(memory_room().n_bytes * FREE_SHARE)


def reading_bytes(cache: Cache, train_config: TrainConfig, hook_names: Sequence[str]) -> int:
    """Bytes that reading a hook takes at most: its training rows and, if there are evaluations, its held-out ones."""
    group_chunks = {"train": loader.GROUP_CHUNKS}
    if train_config.eval_every is not None:
        group_chunks["validation"] = validation.GROUP_CHUNKS
    return max(
        sum(
            hook_bytes(cache, split, name, batch_rows=train_config.batch_tokens, group_chunks=n_chunks)
            for split, n_chunks in group_chunks.items()
        )
        for name in hook_names
    )


def n_parameters(config: SAEConfig) -> int:
    """Number of trained parameters of an SAE."""
    per_latent = {"gated": 3, "jumprelu": 2}.get(config.architecture, 1)
    skip = config.d_in * config.d_out if config.architecture == "skip_transcoder" else 0
    return config.d_sae * (config.d_in + config.d_out + per_latent) + config.d_out + skip


def pass_bytes(
    configs: Sequence[SAEConfig], batch_tokens: int, *, loader_bytes: int = LOADER_BYTES, is_cuda: bool = False
) -> int:
    """Bytes of training these SAEs together: all their states, the largest of their steps, a batch and the loader."""
    hooks = {hook for config in configs for hook in (*config.inputs, *config.outputs)}
    widths = {(c.inputs, c.d_in) for c in configs} | {(c.outputs, c.d_out) for c in configs}
    inputs = sum(width for _, width in widths) * batch_tokens * 4
    states = sum(_state_bytes(config) for config in configs)
    n_hooks = len({hook.hook_name for hook in hooks})
    step = max(_step_bytes(config, batch_tokens, is_cuda=is_cuda) for config in configs)
    return n_hooks * loader_bytes + inputs + states + step


def flops_per_token(config: SAEConfig) -> float:
    """FLOPs of a training step for each token.

    The TopK family encodes all latents, 2 d_in d_sae, and does the rest for the k active ones alone. The other
    architectures are counted as dense, which they are until they become sparse: 4 d_in d_sae in the encoder and
    6 d_out d_sae in the decoder.
    """
    if config.architecture in TOPK_FAMILY:
        assert config.k is not None
        return 2.0 * config.d_in * config.d_sae + (2 * config.d_in + 6 * config.d_out) * config.k
    return (4.0 * config.d_in + 6.0 * config.d_out) * config.d_sae


def measured_seconds(configs: Sequence[SAEConfig], batch_tokens: int, device: torch.device | str) -> float:
    """Seconds that all steps of these SAEs take, without reads, from one real step of each kind on random rows."""
    kinds: dict[SAEConfig, int] = {}
    for config in configs:
        kind = replace(config, name="timed", seed=0, lr=1e-6, sparsity_coefficient=config.sparsity_coefficient and 1.0)
        kinds[kind] = kinds.get(kind, 0) + config.n_steps
    return sum((_step_seconds(kind, batch_tokens, device) * n_steps for kind, n_steps in kinds.items()), start=0.0)


def _step_seconds(config: SAEConfig, batch_tokens: int, device: torch.device | str) -> float:
    """Seconds of one step. It is the second one, because the first one allocates its memory."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_tokens, config.d_in, generator=generator).to(device)
    y = x if config.d_in == config.d_out else torch.randn(batch_tokens, config.d_out, generator=generator).to(device)
    state, workspace = initial_state(config, torch.zeros(config.d_out, device=device)), Workspace()
    train_step(state, x, workspace, y=y)
    started = time.perf_counter()
    int(train_step(state, x, workspace, y=y).n_active)  # computed last, so that the step has ended on CUDA too
    return time.perf_counter() - started


def _state_bytes(config: SAEConfig) -> int:
    """Bytes of the weights, their gradients, the optimizer's state (at most two moments) and the running average."""
    return n_parameters(config) * 4 * (4 + (config.ema_decay is not None))


def _step_bytes(config: SAEConfig, batch_tokens: int, *, is_cuda: bool) -> int:
    """Bytes of one step beside the state: of the pass and its gradients, and of the weights' update."""
    rows = batch_tokens * (config.d_in + LOGGED_ROWS * config.d_out) * 4
    copies = UPDATE_COPIES.get(config.optimizer, 0) * n_parameters(config) * 4
    copies += config.d_sae * config.d_out * 4  # for the norms of the decoder's rows, or for what is parallel to them
    if config.architecture in TOPK_FAMILY:
        return rows + copies + _sparse_bytes(config, batch_tokens, is_cuda=is_cuda)
    matrices = DENSE_MATRICES.get(config.architecture, OTHER_DENSE_MATRICES)
    if config.jumprelu_sparsity_loss_mode == "tanh":
        matrices = TANH_MATRICES
    return rows + copies + round(matrices * batch_tokens * config.d_sae * 4)


def _sparse_bytes(config: SAEConfig, batch_tokens: int, *, is_cuda: bool) -> int:
    """Bytes that a pass of the TopK family takes for its active entries, and to find them.

    A chunk of pre-activations is ranked with at most 3/4 as much beside it, by magnitude with a copy more. BatchTopK
    ranks the whole batch. AuxK encodes with a copy of the dead latents' weights, bfloat16 with one of all.
    """
    assert config.k is not None
    k = max(config.k, config.k_anneal_start or 0)
    weights, is_short = config.d_sae * config.d_in * 4, config.encoder_dtype == "bfloat16"
    kept = with_margin(k, config.d_sae) if is_short else k
    has_aux = config.k_aux > 0 and config.aux_coefficient > 0
    entry_bytes = ENTRY_BYTES + (PREFIX_ENTRY_BYTES if config.matryoshka_widths else 0)
    entries = batch_tokens * (kept * entry_bytes + (config.k_aux if has_aux else 0) * ENTRY_BYTES)
    chunk = min(batch_tokens, topk_chunk_rows(config.d_sae, is_cuda=is_cuda))
    ranked = 2.75 * chunk if config.architecture == "abstopk" else 1.75 * chunk
    if config.architecture in BATCH_FAMILY:
        ranked = max(ranked, 2.0 * batch_tokens)
    prefixes = len(config.matryoshka_widths or ()) * PREFIX_ROWS * batch_tokens * config.d_out * 4
    copies = (weights if has_aux else 0) + (weights // 2 if is_short else 0)
    return round(ranked * config.d_sae * 4) + entries + prefixes + copies
