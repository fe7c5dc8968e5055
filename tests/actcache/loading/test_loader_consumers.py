"""Trainers of other libraries take their batches from a loader."""

import copy

import pytest
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from support.tiny_caches import HOOKS
from torch.utils.data import DataLoader, IterableDataset

from actcache.loading.loader import Loader
from actcache.loading.mixture import Mixture
from actcache.store.cache import open_cache

HOOK, BATCH_TOKENS = HOOKS[0], 256


class Activations(IterableDataset):
    """The batches of a cache for torch.utils.data, which are whole already: batch_size=None."""

    def __init__(self, path, hook_name: str):
        self.path, self.hook_name = path, hook_name

    def __iter__(self):
        for batch in Loader(open_cache(self.path), self.hook_name, batch_tokens=BATCH_TOKENS, epochs=2):
            yield {"x": batch.x[self.hook_name], "row": batch.row}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_torch_data_loader_passes_batches_on(tiny_cache, workers):
    expected = Loader(tiny_cache, HOOK, batch_tokens=BATCH_TOKENS, epochs=2)
    passed = DataLoader(Activations(tiny_cache.path, HOOK), batch_size=None, num_workers=workers)
    n_batches = 0
    for found, batch in zip(passed, expected, strict=True):
        assert torch.equal(found["x"], batch.x[HOOK])
        assert torch.equal(found["row"], batch.row)
        n_batches += 1
    assert n_batches == expected.n_steps > 10


class Noted:
    """An iterator that keeps what it has handed on."""

    def __init__(self, batches):
        self.batches, self.handed = batches, []

    def __iter__(self):
        return self

    def __next__(self) -> torch.Tensor:
        x = next(self.batches)
        self.handed.append(x)
        return x


@pytest.mark.parametrize("source", [Loader, Mixture])
def test_saelens_trains_on_the_rows_of_the_cache(tiny_cache, source):
    caches = tiny_cache if source is Loader else [(tiny_cache, 1.0)]
    n_steps = 6
    loader = source(caches, HOOK, batch_tokens=BATCH_TOKENS)
    handed = Noted(batch.x[HOOK].float() for batch in loader)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=tiny_cache.hook(HOOK).d_in, d_sae=64, k=4))
    untrained = copy.deepcopy(sae)
    config = SAETrainerConfig(
        total_training_samples=n_steps * BATCH_TOKENS,
        train_batch_size_samples=BATCH_TOKENS,
        lr=1e-3,
        lr_end=1e-4,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(config, sae, handed)
    trained = trainer.fit()

    assert (trainer.n_training_steps, trainer.n_training_samples) == (n_steps, n_steps * BATCH_TOKENS)
    expected = [batch.x[HOOK].float() for batch in Loader(tiny_cache, HOOK, batch_tokens=BATCH_TOKENS)][:n_steps]
    assert len(handed.handed) == n_steps
    assert all(torch.equal(x, wanted) for x, wanted in zip(handed.handed, expected, strict=True))

    # the same steps on copies that nothing else ever wrote to end in the same weights
    alone = SAETrainer(config, untrained, iter([x.clone() for x in expected])).fit()
    for name, value in trained.state_dict().items():
        assert torch.equal(value, alone.state_dict()[name])
