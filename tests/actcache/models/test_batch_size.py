"""The number of sequences per forward pass, found with models that take a known time or memory."""

import time

import pytest
import torch
from support.surroundings import address_space
from support.tiny_models import make_model, make_tokenizer
from torch import Tensor

from actcache.errors import ModelError
from actcache.machine.limits import MemoryRoom
from actcache.models import batch_size
from actcache.models.batch_size import N_TIMED, largest_batch
from actcache.models.huggingface import HuggingFaceModel

HOOKS = ["blocks.0.hook_resid_post", "blocks.2.hook_mlp_out"]
CONTEXT = 8


class Limited(HuggingFaceModel):
    """The real model; a pass takes at least `seconds(n_sequences)`, and memory is out above `max_sequences`."""

    def __init__(self, seconds=lambda n_sequences: 0.0, max_sequences: int = 1 << 20):
        super().__init__(make_model("llama", 512), make_tokenizer(), {"name": "limited"})
        self._seconds, self._max_sequences = seconds, max_sequences
        self.shapes: list[tuple[int, ...]] = []
        self.hook_names: set[str] = set()

    def _forward(self, token_ids: Tensor, visits) -> Tensor:
        self.shapes.append(tuple(token_ids.shape))
        self.hook_names |= visits.keys()
        if len(token_ids) > self._max_sequences:
            raise torch.OutOfMemoryError("out of memory")
        time.sleep(self._seconds(len(token_ids)))
        return super()._forward(token_ids, visits)


def test_real_model_on_the_cpu():
    model = Limited()
    found = largest_batch(model, CONTEXT, HOOKS)
    tried = sorted({n_sequences for n_sequences, _ in model.shapes})
    assert tried == [1 << i for i in range(len(tried))]  # every power of two, up to twice what was found
    assert found == max(1, tried[-1] // 2)
    assert len(model.shapes) == (1 + N_TIMED) * len(tried)
    assert {positions for _, positions in model.shapes} == {CONTEXT}
    assert model.hook_names == set(HOOKS)


def test_stops_where_more_sequences_bring_no_more_tokens():
    """Up to 4 sequences take 60 ms, more take 200 ms: 8 are slower a token than 4, whatever else it takes."""
    assert largest_batch(Limited(seconds=lambda n: 0.06 if n <= 4 else 0.2), CONTEXT, HOOKS) == 4


@pytest.mark.parametrize(("fits", "expected"), [(16, 8), (17, 8), (2, 1), (1, 1)])
def test_out_of_memory_leaves_half_of_what_ran(fits, expected):
    model = Limited(seconds=lambda n: 0.02, max_sequences=fits)  # always the same time: more is always faster
    assert largest_batch(model, CONTEXT, HOOKS) == expected
    assert max(model.shapes)[0] == 2 * (1 << (fits.bit_length() - 1))


class Hungry(Limited):
    """Each sequence of a pass takes, and touches, 32 MiB."""

    def _forward(self, token_ids: Tensor, visits) -> Tensor:
        taken = torch.ones(len(token_ids), 1 << 23)
        return super()._forward(token_ids, visits) + 0 * taken[0, 0]


def test_an_allocator_without_memory_ends_the_search(monkeypatch):
    """On a CPU torch says it by a plain RuntimeError; here it is the real one, under a real limit."""
    monkeypatch.setattr(batch_size, "_twice_fits", lambda *_: True)
    with address_space(350 << 20):
        found = largest_batch(Hungry(seconds=lambda n: 0.12), CONTEXT, HOOKS)
    assert found in (2, 4)


def test_a_pass_that_may_not_fit_is_not_run(monkeypatch):
    """Where the kernel would kill the process: 128 MiB were taken, 256 MiB more do not fit into what there is."""
    model = Hungry(seconds=lambda n: 0.12)
    monkeypatch.setattr(batch_size, "memory_room", lambda: MemoryRoom(n_bytes=150 << 20, limit_bytes=0, limit="a test"))
    assert largest_batch(model, CONTEXT, HOOKS) in (1, 2)
    assert max(model.shapes)[0] <= 4


def test_one_sequence_is_too_much():
    with pytest.raises(ModelError, match=r"limited: one sequence of 8 tokens does not fit .*smaller --context-size"):
        largest_batch(Limited(max_sequences=0), CONTEXT, HOOKS)


def test_other_errors_pass():
    with pytest.raises(ModelError, match="no hook"):
        largest_batch(Limited(), CONTEXT, ["blocks.9.hook_resid_post"])
