"""How many sequences to run at once, found by running them."""

import time
from collections.abc import Sequence

import torch

from actcache.errors import ModelError
from actcache.models.language_model import LanguageModel

MIN_GAIN = 1.05  # in tokens/s, of twice as many sequences, for going on
N_TIMED = 3


def largest_batch(model: LanguageModel, context_size: int, hook_names: Sequence[str]) -> int:
    """The number of sequences per forward pass for this model, device and length: a power of two.

    Runs real forward passes of 1, 2, 4, ... sequences until memory is out or twice as many bring less than 5 % more
    tokens/s. The result is half of the largest number that ran, so as much memory again is known to be free for it
    (if not even two sequences fit, it is 1). Call it when everything else that needs memory on the device is there.

    It measures, so a second call may find another number, and activations of another batch size differ in their last
    bits: record the number, and pass it by hand where bytes have to be equal.

    Args:
        context_size: positions of a sequence.
        hook_names: what is captured in every pass, as `LanguageModel.activations` takes it.

    Raises:
        ModelError: one sequence is too much, or a hook does not exist.
    """
    n_sequences, largest_run, best = 1, 0, 0.0
    while True:
        rate = _tokens_per_second(model, n_sequences, context_size, hook_names)
        torch.cuda.empty_cache()  # does nothing where CUDA is not in use
        if rate is not None:
            largest_run = n_sequences
        if rate is None or rate < MIN_GAIN * best:
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
    """The best of N_TIMED passes, after one to warm up; None if memory is out."""
    token_ids = (torch.arange(context_size) % len(model.tokenizer)).expand(n_sequences, -1)
    try:
        _, *seconds = [_seconds(model, token_ids, hook_names) for _ in range(1 + N_TIMED)]
    except torch.OutOfMemoryError:
        return None
    return token_ids.numel() / min(seconds)


def _seconds(model: LanguageModel, token_ids: torch.Tensor, hook_names: Sequence[str]) -> float:
    """Wall-clock time of one forward pass, until its activations are there."""
    started = time.perf_counter()
    activations = model.activations(token_ids, hook_names)
    for device in {x.device for x in activations.values() if x.is_cuda}:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
