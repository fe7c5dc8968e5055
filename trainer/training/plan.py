"""What a sweep will take, before it starts: its parameters, memory and FLOPs, and how many passes over the cache.

The memory is an upper bound of what the steps add to the process on the device that trains. It leaves out what an SAE
takes once: a sample of rows for its first b_enc, and one float64 matrix for its export.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from actcache.errors import ConfigError
from actcache.machine import memory_room
from trainer.config.settings import TOPK_FAMILY, SAEConfig
from trainer.kernels.active import Workspace
from trainer.kernels.select import topk_chunk_rows
from trainer.training.step import initial_state, train_step

LOADER_BYTES = 640 << 20  # of one hook: three groups of at most 144 MiB, and the row numbers of two of them
FREE_SHARE = 0.8  # the share of the free memory that training may use


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """The SAEs of a sweep in the order in which they are trained.

    Attributes:
        passes: the SAEs of each pass. A pass reads the cache once, and its SAEs share every batch.
        batch_tokens: rows of a batch.
        memory_bytes: the memory that may be used.
    """

    passes: tuple[tuple[SAEConfig, ...], ...]
    batch_tokens: int
    memory_bytes: int

    @property
    def configs(self) -> tuple[SAEConfig, ...]:
        """The SAEs of all passes."""
        return tuple(config for each in self.passes for config in each)

    @property
    def n_parameters(self) -> int:
        """Number of trained parameters of all SAEs."""
        return sum(n_parameters(config) for config in self.configs)

    @property
    def needed_bytes(self) -> int:
        """Bytes of the pass that needs most memory."""
        return max((pass_bytes(each, self.batch_tokens) for each in self.passes), default=0)

    @property
    def flops(self) -> float:
        """FLOPs of training all SAEs on all of their tokens."""
        return sum((flops_per_token(config) * config.training_tokens for config in self.configs), start=0.0)


def plan_passes(configs: Sequence[SAEConfig], batch_tokens: int, memory_bytes: int) -> SweepPlan:
    """Put the SAEs into passes, in their order. A new pass begins where the next SAE would not fit into the last one.

    Raises:
        ConfigError: an SAE does not fit alone.
    """
    passes: list[list[SAEConfig]] = []
    for config in configs:
        if pass_bytes([config], batch_tokens) > memory_bytes:
            raise ConfigError(
                f"{config.name}: training needs about {pass_bytes([config], batch_tokens) / 1e9:.1f} GB, "
                f"{memory_bytes / 1e9:.1f} GB may be used; take a smaller d_sae={config.d_sae} or "
                f"batch_tokens={batch_tokens}, or allow more memory"
            )
        if not passes or pass_bytes([*passes[-1], config], batch_tokens) > memory_bytes:
            passes.append([])
        passes[-1].append(config)
    return SweepPlan(passes=tuple(map(tuple, passes)), batch_tokens=batch_tokens, memory_bytes=memory_bytes)


def free_memory(device: torch.device | str) -> int:
    """Bytes that training may take on a device: FREE_SHARE of those that are free."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * FREE_SHARE)
    return int(memory_room().n_bytes * FREE_SHARE)


def n_parameters(config: SAEConfig) -> int:
    """Number of trained parameters of an SAE."""
    per_latent = {"gated": 3, "jumprelu": 2}.get(config.architecture, 1)
    skip = config.d_in * config.d_out if config.architecture == "skip_transcoder" else 0
    return config.d_sae * (config.d_in + config.d_out + per_latent) + config.d_out + skip


def pass_bytes(configs: Sequence[SAEConfig], batch_tokens: int) -> int:
    """Bytes of training these SAEs together: all their states, the largest of their steps, a batch and the loader."""
    hooks = {hook for config in configs for hook in (*config.inputs, *config.outputs)}
    widths = {(c.inputs, c.d_in) for c in configs} | {(c.outputs, c.d_out) for c in configs}
    inputs = sum(width for _, width in widths) * batch_tokens * 4
    states = sum(_state_bytes(config) for config in configs)
    n_hooks = len({hook.hook_name for hook in hooks})
    return n_hooks * LOADER_BYTES + inputs + states + max(_step_bytes(config, batch_tokens) for config in configs)


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


def _step_bytes(config: SAEConfig, batch_tokens: int) -> int:
    """Bytes of one step beside the state. A dense step holds pre_acts, feature_acts, their gradients and masks."""
    rows = batch_tokens * (config.d_in + 4 * config.d_out) * 4
    if config.architecture not in TOPK_FAMILY:
        return rows + 6 * batch_tokens * config.d_sae * 4
    assert config.k is not None
    entries = batch_tokens * max(config.k, config.k_anneal_start or 0, config.k_aux) * 12 * 8
    at_once = min(batch_tokens, topk_chunk_rows(config.d_sae, is_cuda=False))
    ranked = at_once if config.architecture in ("topk", "abstopk") else 2 * batch_tokens
    return rows + entries + 2 * ranked * config.d_sae * 4
