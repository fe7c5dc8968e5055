"""Passes over a Loader and a Mixture: each is fresh, and threads, other processes and torch's workers share them."""

import itertools
import multiprocessing
import os
import pickle
import re
import shutil
import threading
import time

import pytest
import torch
from support.tiny_caches import HOOKS, harvest_tiny
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from actcache.errors import CacheMismatch, ConfigError
from actcache.loading.loader import Loader
from actcache.loading.mixture import Mixture
from actcache.store.cache import open_cache

SETTINGS = {"batch_tokens": 100, "group_chunks": 3, "epochs": 2, "seed": 1}


def steps_and_rows(batches) -> list[tuple[int, list[int]]]:
    return [(batch.step, batch.row.tolist()) for batch in batches]


@pytest.fixture(params=[Loader, Mixture])
def loader(request, tiny_cache):
    source = tiny_cache if request.param is Loader else [(tiny_cache, 2), (tiny_cache, 1)]
    with request.param(source, HOOKS[:2], token_fields=["position"], max_norm_ratio=2.0, **SETTINGS) as loader:
        yield loader


def test_every_pass_begins_at_the_start(loader):
    whole = steps_and_rows(loader)
    assert len(whole) == loader.n_steps > 10
    assert steps_and_rows(loader) == whole
    for batch in loader:
        if batch.step == 4:
            break
    assert steps_and_rows(loader) == whole, "also after a break"
    loader.close()
    assert steps_and_rows(loader) == whole, "also after it was closed"


def test_a_start_step_is_the_start_of_every_pass(tiny_cache):
    whole = steps_and_rows(Loader(tiny_cache, HOOKS[0], **SETTINGS))
    resumed = Loader(tiny_cache, HOOKS[0], start_step=5, **SETTINGS)
    assert steps_and_rows(resumed) == steps_and_rows(resumed) == whole[5:]


def test_a_pass_from_a_step_on_is_asked_for(loader):
    whole = steps_and_rows(loader)
    for step in (0, 1, loader.n_steps - 1, loader.n_steps):
        assert steps_and_rows(loader.at(step)) == whole[step:]
    for wrong in (-1, loader.n_steps + 1):
        with pytest.raises(ConfigError, match=f"step must be at .*, got {wrong}"):
            loader.at(wrong)


def test_a_start_behind_the_end_is_refused(tiny_cache):
    with pytest.raises(ConfigError, match=r"start_step must be at most 2, the number of batches, got 3"):
        Loader(tiny_cache, HOOKS[0], limit=200, batch_tokens=100, start_step=3)


def test_a_pass_goes_on_beside_a_later_one(loader):
    whole = steps_and_rows(loader)
    earlier = iter(loader)
    first = steps_and_rows(itertools.islice(earlier, 3))
    later = iter(loader)
    turns = [(next(earlier), next(later)) for _ in range(4)]
    assert first + steps_and_rows(one for one, _ in turns) == whole[:7]
    assert steps_and_rows(other for _, other in turns) + steps_and_rows(later) == whole
    assert steps_and_rows(earlier) == whole[7:]
    assert next(earlier, None) is None, "an ended pass stays ended"


def in_threads(work, n: int) -> None:
    """Run `work` in n threads at once; an error of one is raised here."""
    errors: list[BaseException] = []
    ready = threading.Barrier(n)

    def run() -> None:
        ready.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_that_share_a_pass_get_each_batch_once(loader):
    whole = steps_and_rows(loader)
    for _ in range(2):
        batches, found = iter(loader), []

        def take(batches=batches, found=found) -> None:
            for batch in batches:
                found.append((batch.step, batch.row.tolist()))
                time.sleep(0)  # so that another thread has its turn

        in_threads(take, 4)
        assert sorted(found) == whole


def test_threads_that_share_a_loader_get_a_whole_pass_each(loader):
    first = loader.n_steps - 8  # they take turns, and each decodes its group anew at each turn
    whole, found = steps_and_rows(loader.at(first)), []
    in_threads(lambda: found.append(steps_and_rows(loader.at(first))), 3)
    assert found == [whole] * 3


def test_a_fork_beside_a_thread_that_holds_the_lock_waits_for_nobody(loader):
    with loader.lock:
        reader = threading.Thread(target=lambda: next(iter(loader)))
        reader.start()  # it waits for the lock, or has it
        child = multiprocessing.get_context("fork").Process(target=lambda: next(iter(loader)))
        child.start()
        child.join(timeout=60)
        child.kill()
    reader.join()
    assert child.exitcode == 0


def test_it_can_be_sent_to_another_process(loader, tmp_path, monkeypatch):
    batches = iter(loader)
    next(batches)
    sent = pickle.dumps((loader, batches))
    assert len(sent) < 1 << 20, "no rows are sent"
    whole = steps_and_rows(loader)
    monkeypatch.chdir(tmp_path)
    received, rest = pickle.loads(sent)
    assert steps_and_rows(received) == whole
    assert steps_and_rows(rest) == whole[1:]


def sum_of_rows(loader) -> int:
    return sum(int(batch.row.sum()) for batch in loader)


def test_a_spawned_process_serves_the_same(tiny_cache):
    loader = Loader(tiny_cache, HOOKS[0], **SETTINGS)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(sum_of_rows, [loader]) == sum_of_rows(loader)


def test_a_cache_and_its_readers_can_be_sent_and_another_cache_is_refused(
    tiny_model, tiny_texts, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    cache = harvest_tiny(tiny_model, tiny_texts, "cache", hook_names=HOOKS[:1], tokens=1600)
    expected = cache.hook_reader("train", HOOKS[0]).read(3, 20)
    reader, token_reader = cache.hook_reader("train", HOOKS[0]), cache.token_reader("train", "id")
    reader.read(0, 1)
    sent, sent_readers = pickle.dumps(cache), pickle.dumps((reader, token_reader))
    os.mkdir("elsewhere")
    monkeypatch.chdir("elsewhere")
    received = pickle.loads(sent)
    assert (received.path, received.fingerprint) == (tmp_path / "cache", cache.fingerprint)
    assert torch.equal(received.hook_reader("train", HOOKS[0]).read(3, 20), expected)
    received_reader, received_tokens = pickle.loads(sent_readers)
    assert torch.equal(received_reader.read(3, 20), expected)
    assert received_tokens.read(0, 40).tolist() == received.token_reader("train", "id").read(0, 40).tolist()
    harvest_tiny(tiny_model, tiny_texts, tmp_path / "cache", hook_names=HOOKS[:2], tokens=1600)
    with pytest.raises(CacheMismatch, match=f"was cache {cache.fingerprint} when it was opened, is"):
        pickle.loads(sent)
    shutil.rmtree(tmp_path / "cache")


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_workers_of_a_torch_data_loader_share_the_batches(loader, workers):
    whole = steps_and_rows(loader)
    found = DataLoader(loader, batch_size=None, num_workers=workers)
    assert steps_and_rows(found) == whole, "all of them, once, in their order"
    assert steps_and_rows(found) == whole


@pytest.mark.faults
def test_spawned_workers_share_them_too(tiny_cache):
    loader = Loader(tiny_cache, HOOKS[0], **SETTINGS)
    found = DataLoader(loader, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    assert steps_and_rows(found) == steps_and_rows(loader)


def test_ranks_and_workers_go_together(tiny_cache):
    whole = steps_and_rows(Loader(tiny_cache, HOOKS[0], **SETTINGS))
    parts = [
        steps_and_rows(
            DataLoader(
                Loader(tiny_cache, HOOKS[0], rank=rank, world_size=2, **SETTINGS), batch_size=None, num_workers=2
            )
        )
        for rank in range(2)
    ]
    assert [(step, a + b) for (step, a), (_, b) in zip(*parts, strict=True)] == whole


class MadeInWorkers(IterableDataset):
    """Every worker makes a loader for itself. by_worker: its number goes into the rank of the loader."""

    def __init__(self, source, by_worker: bool, world_size: int = 1, rank: int = 0):
        self.source, self.by_worker, self.world_size, self.rank = source, by_worker, world_size, rank

    def __iter__(self):
        rank, world_size = self.rank, self.world_size
        if self.by_worker:
            worker = get_worker_info()
            rank, world_size = rank * worker.num_workers + worker.id, world_size * worker.num_workers
        kind = Mixture if isinstance(self.source, list) else Loader
        return iter(kind(self.source, HOOKS[0], rank=rank, world_size=world_size, **SETTINGS))


class Refusals(MadeInWorkers):
    """Every worker gives what the loader refuses, for a worker that raises keeps torch waiting for 5 s at its end."""

    def __iter__(self):
        with pytest.raises(ConfigError) as refused:
            super().__iter__()
        yield str(refused.value)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", [Loader, Mixture])
def test_a_worker_does_not_divide_the_batches_a_second_time(tiny_cache, kind, rank):
    source = tiny_cache if kind is Loader else [(tiny_cache, 1)]
    divided = Refusals(source, by_worker=True, rank=rank, world_size=rank + 1)
    said = [*DataLoader(divided, batch_size=None, num_workers=2)]
    assert len(said) == 2
    for line in said:
        assert re.search(r"share the batches by themselves, got rank .* in worker . of 2; leave rank", line)


def test_a_loader_that_is_made_in_a_worker_shares_the_batches_too(tiny_cache):
    whole = steps_and_rows(Loader(tiny_cache, HOOKS[0], **SETTINGS))
    for workers, by_worker in ((2, False), (1, True), (1, False)):
        made = MadeInWorkers(tiny_cache, by_worker)
        assert steps_and_rows(DataLoader(made, batch_size=None, num_workers=workers)) == whole
    (_, half), *_ = steps_and_rows(DataLoader(MadeInWorkers(tiny_cache, False, 2), batch_size=None, num_workers=1))
    assert half == whole[0][1][:50]


def test_a_reopened_cache_is_the_one_that_was_opened(tiny_cache):
    assert open_cache(tiny_cache.path).fingerprint == pickle.loads(pickle.dumps(tiny_cache)).fingerprint
