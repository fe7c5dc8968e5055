"""The number of sequences per forward pass, found by running forward passes."""

import time
from collections.abc import Sequence

import torch

from actcache.errors import ModelError
from actcache.machine.limits import lacked, memory_room, resident_bytes
from actcache.models.language_model import LanguageModel

MIN_GAIN = 1.05  # twice as many sequences must bring this factor in tokens/s, or the search ends
N_TIMED = 3


def largest_batch(model: LanguageModel, context_size: int, hook_names: Sequence[str]) -> int:
    """A number of sequences per forward pass that fits this model, its device and this length.

    Forward passes of 1, 2, 4, ... sequences are run until memory is out, or until twice as many sequences bring less
    than 5 % more tokens/s. On a CPU, where the kernel may kill a process that takes too much, the search ends before a
    pass that may not fit. Half of the largest number that ran is returned, so that as much memory stays free. Call
    this when everything else that needs memory on the device is there.

    A second call may find another number. Activations of another batch size differ in their last bits. So record the
    number, and pass it by hand where bytes have to be equal.

    Args:
        model: the model, on its device.
        context_size: tokens of a sequence.
        hook_names: the hooks that are captured in every pass, as `LanguageModel.activations` takes them.

    Returns:
        a power of two; 1 if not even two sequences fit.

    Raises:
        ModelError: one sequence does not fit, or a hook does not exist.
    """
    n_sequences, largest_run, best = 1, 0, 0.0
    before, _ = resident_bytes(forget_peak=True)
    while True:
        rate = _tokens_per_second(model, n_sequences, context_size, hook_names)
        torch.cuda.empty_cache()  # does nothing where CUDA is not in use
        if rate is not None:
            largest_run = n_sequences
        if rate is None or rate < MIN_GAIN * best or (model.device.type == "cpu" and not _twice_fits(before)):
            break
        n_sequences, best = 2 * n_sequences, rate
    if largest_run == 0:
        raise ModelError(
            f"{model.identity['name']}: one sequence of {context_size} tokens does not fit into the memory of "
            f"{model.device}; pass a smaller --context-size, another --model-dtype or --device-map auto"
        )
    return max(1, largest_run // 2)


def _tokens_per_second(
    model: LanguageModel, n_sequences: int, context_size: int, hook_names: Sequence[str]
) -> float | None:
    """Rate of the fastest of N_TIMED passes, which follow one pass to warm up; None if memory is out."""
    token_ids = (torch.arange(context_size) % model.n_embeddings).expand(n_sequences, -1)
    try:
        _, *seconds = [_seconds(model, token_ids, hook_names) for _ in range(1 + N_TIMED)]
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeErrors, on CUDA a kind of its own
        if lacked(error) is None:
            raise
        return None
    return token_ids.numel() / min(seconds)


def _twice_fits(before: int) -> bool:
    """Whether there is room for passes that take twice the memory of those until now. before: bytes without them."""
    now, peak = resident_bytes()
    return 2 * (peak - before) - (now - before) < memory_room().n_bytes


def _seconds(model: LanguageModel, token_ids: torch.Tensor, hook_names: Sequence[str]) -> float:
    """Wall-clock seconds of one forward pass, until its activations are computed."""
    started = time.perf_counter()
    activations = model.activations(token_ids, hook_names)
    for device in {x.device for x in activations.values() if x.is_cuda}:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
