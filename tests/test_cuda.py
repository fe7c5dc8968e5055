"""What only a GPU can show; run as `pytest -m gpu`."""

import pytest
import torch
from tiny_caches import HOOKS, harvest_tiny

pytestmark = pytest.mark.gpu
CODECS = ["lossless", "fast", "raw", "int8"]


@pytest.fixture(scope="module")
def cuda_model(tiny_llama_dir):
    from actcache.models import load_model

    return load_model(str(tiny_llama_dir), device="cuda", dtype="float32")


@pytest.mark.parametrize("codec", CODECS)
def test_rows_are_what_the_device_computed(cuda_model, tiny_texts, tmp_path, codec):
    from actcache.codecs import codec as profile
    from actcache.codecs import stored_tensors, values
    from actcache.verify import verify

    cache = harvest_tiny(cuda_model, tiny_texts, tmp_path / "c", tokens=1000, codec=codec)
    assert verify(cache.path).problems == ()
    sequences = torch.from_numpy(cache.sequences("train")[:8])
    sequence, position = (
        torch.from_numpy(cache.token_reader("train", name).read(0, cache.n_rows())) for name in ("sequence", "position")
    )
    first = sequence < 8
    for name, x in cuda_model.activations(sequences, HOOKS).items():
        rows = x.flatten(0, 1)[(sequence[first] * cache.context_size + position[first]).to(x.device)]
        expected = values(stored_tensors(rows, "bfloat16", profile(codec)), "bfloat16")
        assert torch.equal(cache.hook_reader("train", name).read(0, cache.n_rows())[first], expected.cpu())


def test_equal_harvests_are_equal_bytes(cuda_model, tiny_texts, tmp_path):
    from tiny_caches import promised_files

    once, again = (harvest_tiny(cuda_model, tiny_texts, tmp_path / name, tokens=2000).path for name in ("a", "b"))
    assert promised_files(once) == promised_files(again)


@pytest.mark.parametrize("codec", CODECS)
def test_batches_on_the_device_are_those_on_the_cpu(tiny_model, tiny_texts, tmp_path, codec):
    from actcache.loader import Loader

    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", codec=codec)
    settings = {"batch_tokens": 100, "epochs": 2, "group_chunks": 2}
    with Loader(cache, HOOKS, **settings) as here, Loader(cache, HOOKS, **settings, device="cuda") as there:
        for batch, on_device in zip(here, there, strict=True):
            assert torch.equal(batch.row, on_device.row)
            for name in HOOKS:
                assert on_device.x[name].is_cuda
                assert torch.equal(batch.x[name], on_device.x[name].cpu())


def test_the_batch_size_is_found_on_the_device(cuda_model):
    from actcache.batch_size import largest_batch

    n_sequences = largest_batch(cuda_model, 16, HOOKS)
    assert n_sequences & (n_sequences - 1) == 0
    assert cuda_model.activations(torch.zeros(n_sequences, 16, dtype=torch.long), HOOKS)
