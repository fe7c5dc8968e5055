"""The device's half of the loader, on stand-ins for CUDA's streams and events here and on CUDA where there is one."""

import contextlib
import itertools
import sys
import threading

import numpy as np
import pytest
import torch
from support.tiny_caches import HOOKS, harvest_tiny

from actcache.loading import buffers
from actcache.loading.buffers import MAX_ARRAYS, STAGED_CHUNKS, WILL_NEED_CHUNKS, BufferPool, DeviceBuffers, will_need
from actcache.loading.loader import Loader
from actcache.loading.mixture import Mixture
from actcache.store.reader import HookReader


@pytest.fixture(scope="module", params=["lossless", "int8"])
def cache(request, tiny_model, tiny_texts, tiny_cache, tmp_path_factory):
    if request.param == "lossless":
        return tiny_cache
    return harvest_tiny(tiny_model, tiny_texts, tmp_path_factory.mktemp("int8") / "c", codec="int8")


class FakeStream(torch.cuda.Stream):
    __hash__, __eq__, __repr__ = object.__hash__, object.__eq__, object.__repr__

    def __new__(cls, log):
        return object.__new__(cls)

    def __init__(self, log: list):
        self.log, self.device = log, torch.device("cpu")

    def wait_event(self, event):
        self.log.append((self, "waits for", event))

    def wait_stream(self, stream):
        self.log.append((self, "waits for", stream))


class FakeEvent:
    def __init__(self, log: list):
        self.log = log

    def record(self, stream):
        self.log.append((stream, "records", self))

    def synchronize(self):
        self.log.append(("host", "waits for", self))


@pytest.fixture
def fake_cuda(monkeypatch):
    """torch.cuda's streams and events as notes in a list; every operation runs at once, on the CPU."""
    if torch.cuda.is_available():
        pytest.skip("the real ones are here")
    log: list = []
    current = FakeStream(log)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(log))
    monkeypatch.setattr(torch.cuda, "Event", lambda: FakeEvent(log))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    return log, current


@pytest.mark.parametrize("kept", [1, 0.7])
def test_rows_come_back_from_device_groups_in_the_order_asked(cache, fake_cuda, kept):
    reader = cache.hook_reader("train", HOOKS[0])
    n_chunks = STAGED_CHUNKS + 3  # every staging buffer serves, some twice
    n_served = int(kept * n_chunks * reader.chunk_rows)
    room = DeviceBuffers(reader, torch.device("cpu"), group_chunks=n_chunks)
    group = room.new_group()
    chunks = np.random.default_rng(0).permutation(reader.n_chunks)[:n_chunks].tolist()
    served = np.random.default_rng(1).permutation(n_chunks * reader.chunk_rows)[:n_served]
    places = np.full(n_chunks * reader.chunk_rows, n_served)
    places[served] = np.arange(n_served)
    group.expect(places)
    for number in reversed(range(n_chunks)):
        group.decode_chunk(number, chunks[number])
    group.finish()
    parts = [group.rows(10, 40), group.rows(60, 80)]
    whole = reader.read(0, reader.n_rows)
    rows = [chunks[s // reader.chunk_rows] * reader.chunk_rows + s % reader.chunk_rows for s in served.tolist()]
    assert torch.equal(room.values(parts), whole[rows[10:40] + rows[60:80]])
    assert room.values([]).shape == (0, whole.shape[1])


def test_device_groups_wait_for_each_other_and_for_nothing_else(tiny_cache, fake_cuda):
    log, current = fake_cuda
    reader = tiny_cache.hook_reader("train", HOOKS[0])
    room = DeviceBuffers(reader, torch.device("cpu"), group_chunks=2)
    group = room.new_group()
    copies = room._copies
    assert (copies, "waits for", current) in log, "the memory may still be in use by whoever had it"
    log.clear()
    group.expect(np.arange(2 * reader.chunk_rows))
    group.decode_chunk(0, 0)
    ((host, _, reused), (recorded_on, _, copied)) = log
    assert (host, recorded_on, reused) == ("host", copies, copied), "staging is written after its last copy"
    log.clear()
    group.finish()
    assert [entry[:2] for entry in log] == [(copies, "records")]
    arrived = log[0][2]
    log.clear()
    group.rows(0, 5)
    assert log[0] == (current, "waits for", arrived)
    copied = log[-1][2]
    assert log[-1][:2] == (current, "records")
    log.clear()
    group.release()
    assert log == [(copies, "waits for", copied)]


def test_will_need_asks_for_every_chunk_once_a_bounded_distance_ahead(tiny_cache, monkeypatch):
    asked = []
    monkeypatch.setattr(HookReader, "will_need", lambda reader, chunk: asked.append(chunk))
    chunks = list(range(140, 100, -1))
    for place in range(len(chunks)):
        will_need(tiny_cache.hook_reader("train", HOOKS[0]), chunks, place)
        assert set(chunks[: place + 1]) <= set(asked)
        assert len(asked) <= place + 1 + WILL_NEED_CHUNKS
    assert asked == chunks


def test_recycled_memory_is_bounded():
    pool = BufferPool(100, (7,), "uint16")
    held = [pool.acquire(100) for _ in range(50)]
    assert len({rows.ctypes.data for rows in held}) == 50
    del held
    assert len(pool._spare) == MAX_ARRAYS
    spare = {memory.ctypes.data for memory in pool._spare}
    lent = [pool.acquire(3), pool.acquire(100), pool.acquire()]
    assert {rows.ctypes.data for rows in lent} == spare
    assert [rows.shape for rows in lent] == [(3, 7), (100, 7), (100, 7)]
    assert not np.shares_memory(lent[0], lent[1])
    more = pool.acquire()
    del more
    assert pool._spare == [], "three are lent"
    del lent
    assert len(pool._spare) == MAX_ARRAYS


def between_steps(call, step, other):
    """Do `call`, and before its bytecode number `step` let another thread do `other`; whether there was such a step."""
    left = step

    def trace(frame, event, _):
        nonlocal left
        frame.f_trace_opcodes = frame.f_code.co_filename == buffers.__file__
        if event == "opcode":
            if left == 0:
                thread = threading.Thread(target=other)
                thread.start()
                thread.join()
            left -= 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return left < 0


@pytest.mark.parametrize("method", ["append", "clear"])
def test_threads_may_share_a_pool(method):
    """Between any two steps of one thread another takes the last spare array, or gives back what it has."""

    def survives(step):
        pool, held, mine = BufferPool(10, (3,), "uint16"), [], []
        held += [pool.acquire() for _ in range(3)]
        held.pop()  # one is spare
        other = held.clear if method == "clear" else lambda: held.append(pool.acquire())
        took = between_steps(lambda: mine.append(pool.acquire()), step, other)
        assert len({rows.ctypes.data for rows in [*held, *mine]}) == len([*held, *mine]), "nobody shares memory"
        gave = between_steps(mine.clear, step, other)
        held.clear()
        assert pool._lent == set()
        assert len(pool._spare) <= MAX_ARRAYS
        return took or gave

    assert next(step for step in itertools.count() if not survives(step)) > 10


@pytest.mark.gpu
@pytest.mark.parametrize("source", [Loader, Mixture])
def test_cuda_serves_the_batches_of_the_cpu(cache, source):
    """Batches held, batches dropped while kernels that read them run, and a consumer on a stream of its own."""
    caches = cache if source is Loader else [(cache, 2.0), (cache, 1.0)]
    settings = {"batch_tokens": 100, "group_chunks": 2, "epochs": 3, "token_fields": ("id", "document")}
    consumer = torch.cuda.Stream()
    held = []
    for number, batch in enumerate(source(caches, HOOKS[:2], device="cuda", **settings)):
        with torch.cuda.stream(consumer):
            consumer.wait_stream(torch.cuda.default_stream())
            torch.cuda._sleep(1_000_000)
            sums = {hook_name: x.double().sum(dim=0) for hook_name, x in batch.x.items()}
            for x in batch.x.values():
                x.record_stream(consumer)
        held.append((batch if number % 3 == 0 else None, sums, batch.row, batch.token_id))
    torch.cuda.synchronize()
    expected = list(source(caches, HOOKS[:2], **settings))
    for (batch, sums, row, token_id), wanted in zip(held, expected, strict=True):
        assert torch.equal(row, wanted.row)
        assert torch.equal(token_id, wanted.token_id)
        for hook_name, x in wanted.x.items():
            assert batch is None or torch.equal(batch.x[hook_name].cpu(), x)
            # the same 100 numbers in float64, added in another order
            torch.testing.assert_close(sums[hook_name].cpu(), x.double().sum(dim=0), rtol=1e-12, atol=1e-12)
