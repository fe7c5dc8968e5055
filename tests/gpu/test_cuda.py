"""What only a GPU can show; run as `pytest -m gpu`."""

import copy

import pytest
import torch
from support.tiny_caches import HOOKS, harvest_tiny
from support.tiny_saes import ARCHITECTURES, TOPK_FAMILY, make_config

pytestmark = pytest.mark.gpu
CODECS = ["lossless", "fast", "raw", "int8"]


@pytest.fixture(scope="module")
def cuda_model(tiny_llama_dir):
    from actcache.models.load import load_model

    return load_model(str(tiny_llama_dir), device="cuda", dtype="float32")


@pytest.mark.parametrize("codec", CODECS)
def test_rows_are_what_the_device_computed(cuda_model, tiny_texts, tmp_path, codec):
    from actcache.format.codecs import codec as profile
    from actcache.format.codecs import stored_tensors, values
    from actcache.integrity.verify import verify

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
    from support.tiny_caches import promised_files

    once, again = (harvest_tiny(cuda_model, tiny_texts, tmp_path / name, tokens=2000).path for name in ("a", "b"))
    assert promised_files(once) == promised_files(again)


@pytest.mark.parametrize("codec", CODECS)
def test_batches_on_the_device_are_those_on_the_cpu(tiny_model, tiny_texts, tmp_path, codec):
    from actcache.loading.loader import Loader

    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", codec=codec)
    settings = {"batch_tokens": 100, "epochs": 2, "group_chunks": 2}
    with Loader(cache, HOOKS, **settings) as here, Loader(cache, HOOKS, **settings, device="cuda") as there:
        for batch, on_device in zip(here, there, strict=True):
            assert torch.equal(batch.row, on_device.row)
            for name in HOOKS:
                assert on_device.x[name].is_cuda
                assert torch.equal(batch.x[name], on_device.x[name].cpu())


def test_the_batch_size_is_found_on_the_device(cuda_model):
    from actcache.models.batch_size import largest_batch

    n_sequences = largest_batch(cuda_model, 16, HOOKS)
    assert n_sequences & (n_sequences - 1) == 0
    assert cuda_model.activations(torch.zeros(n_sequences, 16, dtype=torch.long), HOOKS)


@pytest.mark.parametrize("bias", [0.0, -0.2], ids=["dense", "sparse"])
@pytest.mark.parametrize("has_dead", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_waits_for_no_more_than_one_number(architecture, has_dead, bias, monkeypatch):
    """For how many entries are kept, or latents dead: here each step is told what a copy of it has counted before."""
    from trainer.kernels import active
    from trainer.kernels.active import Workspace
    from trainer.sae.architectures import DENSEST_SPARSE
    from trainer.training.step import initial_state, train_step

    aux = {"aux_coefficient": 1 / 32, "k_aux": 8} if architecture in TOPK_FAMILY else {}
    config = make_config(architecture, dead_window=1 if has_dead else 10_000, max_grad_norm=1.0, **aux)
    state = initial_state(config, torch.zeros(config.d_out, device="cuda"))
    with torch.no_grad():
        state.weights["b_gate" if architecture == "gated" else "b_enc"].fill_(bias)
    x, y = (torch.randn(256, width, device="cuda") for width in (config.d_in, config.d_out))
    workspace, counted, numbers = Workspace(), active.count_true, list[int]()
    for _ in range(2):
        train_step(state, x, workspace, y=y)  # compiles, and makes the optimizer's moments
    state.tokens_since_fired[::2] = 500
    twin = copy.deepcopy(state)
    monkeypatch.setattr(active, "count_true", lambda mask: numbers.append(counted(mask)) or numbers[-1])
    train_step(twin, x, workspace, y=y)
    if architecture in TOPK_FAMILY:
        assert len(numbers) == has_dead
    else:
        assert len(numbers) == 1
        assert numbers[0] > 0
        assert (numbers[0] <= DENSEST_SPARSE * 256 * config.d_sae) == (bias < 0)
    monkeypatch.setattr(active, "count_true", lambda mask: numbers[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(state, x, workspace, y=y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(weight, twin.weights[name]) for name, weight in state.weights.items())


def test_a_diverged_sae_is_stopped_with_the_step_at_which_it_did(tmp_path):
    from trainer.config.settings import TrainConfig
    from trainer.kernels.active import Workspace
    from trainer.training.run import Run
    from trainer.training.step import initial_state

    state = initial_state(make_config("topk"), torch.zeros(16, device="cuda"))
    x = torch.randn(64, 16, device="cuda")
    with Run(state, tmp_path, TrainConfig(log_every=8, checkpoint_every=8), Workspace(), ()) as run:
        for step in range(8):
            run.step(x * (torch.inf if step == 5 else 1.0), x)
            run.write(dict)
    assert "at step 5" in str(run.error)
    assert run.seconds > 0
    assert not (tmp_path / "checkpoint").exists()
