"""The Triton kernels against float64 definitions: on the GPU, or on a CPU where TRITON_INTERPRET=1 was set before.

`test_triton_kernels.py` runs this file both ways, each in its own process: Triton reads the variable once.
"""

import os

import pytest
import torch
from torch import Tensor

from trainer.kernels import active, select, sparse, triton_kernels
from trainer.kernels.active import ActiveEntries, Workspace

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
EPS = torch.finfo(torch.float32).eps  # twice the rounding of one operation
CHUNK = triton_kernels.CHUNK
WIDTHS = [1, 17, 100, 512]
on_a_gpu = pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter has no device, and no room")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def integers(n: int, below: int, seed: int = 1) -> Tensor:
    return torch.randint(0, below, (n,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0)


def sums_by_definition(values: Tensor, index: Tensor, start: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(the sums in float64, how far a float32 sum may be off: n terms, each rounded once, and n - 1 additions)."""
    segment = torch.arange(len(start) - 1, device=DEVICE).repeat_interleave(start.diff())
    terms = values.double()[:, None] * rows.double()[index]
    empty = terms.new_zeros(len(start) - 1, rows.shape[1])
    return empty.index_add(0, segment, terms), start.diff()[:, None] * EPS * empty.index_add(0, segment, terms.abs())


LENGTHS = {
    "nothing": [0, 0, 0],
    "one_entry": [0, 1, 0],
    "short": [3, 1, 0, 0, 16, 17, 40],
    "full_chunks": [CHUNK, CHUNK, CHUNK],
    "long_from_a_border": [CHUNK, 2 * CHUNK, 1],
    "long_to_a_border": [1, 2 * CHUNK - 1, CHUNK + 1],
    "two_long_in_a_chunk": [CHUNK + 5, 0, CHUNK + 7, 3],
    "one_beside_silent_ones": [0, 0, (triton_kernels.ENTRIES + 1) * CHUNK + 3, 0],
}


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("d_in", WIDTHS)
def test_segment_sums_equal_the_definition(name: str, d_in: int) -> None:
    start = bounds(LENGTHS[name])
    n_entries = int(start[-1])
    values, index, rows = random(n_entries), integers(n_entries, 23), random(23, d_in, seed=2)
    expected, bound = sums_by_definition(values, index, start, rows)
    sums = triton_kernels.segment_sums(values, index, start, rows)
    assert sums.dtype == torch.float32
    assert ((sums - expected).abs() <= bound).all()


def test_equal_calls_give_equal_bits() -> None:
    start = bounds([3, CHUNK + 5, 0, 2 * CHUNK + 7])
    values, index, rows = random(int(start[-1])), integers(int(start[-1]), 23), random(23, 17, seed=2)
    sums = [triton_kernels.segment_sums(values, index, start, rows) for _ in range(2)]
    assert torch.equal(*sums)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
def test_segment_sums_of_bfloat16_are_rounded_in_float32(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    start = bounds([0, 5, CHUNK + 70, 1])
    n_entries = int(start[-1])
    values, rows = random(n_entries, dtype=dtypes[0]), random(9, 100, seed=2, dtype=dtypes[1])
    index = integers(n_entries, 9)
    expected, bound = sums_by_definition(values, index, start, rows)
    assert ((triton_kernels.segment_sums(values, index, start, rows) - expected).abs() <= bound).all()


def test_zero_rows_and_zero_values_give_zeros() -> None:
    start, index = bounds([2, CHUNK + 1]), integers(CHUNK + 3, 4)
    ones, zeros = torch.ones(CHUNK + 3, device=DEVICE), torch.zeros(4, 17, device=DEVICE)
    assert not triton_kernels.segment_sums(ones, index, start, zeros).any()
    assert not triton_kernels.segment_sums(ones * 0, index, start, zeros + 1).any()


def test_rows_without_an_order_in_memory_are_read_right() -> None:
    start, values, index = bounds([2, 3]), random(5), integers(5, 4)
    rows = random(6, 4, seed=2).T
    expected, bound = sums_by_definition(values, index, start, rows)
    assert ((triton_kernels.segment_sums(values, index, start, rows) - expected).abs() <= bound).all()


@pytest.mark.parametrize("d_in", WIDTHS)
@pytest.mark.parametrize("n_entries", [0, 1, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entry_dots_equal_the_definition(d_in: int, n_entries: int, dtype: torch.dtype) -> None:
    x, W = random(7, d_in), random(11, d_in, seed=3, dtype=dtype)
    row, latent = integers(n_entries, 7), integers(n_entries, 11, seed=2)
    dots = triton_kernels.entry_dots(x, row, W, latent, latent.argsort(stable=True))
    terms = x.double()[row] * W.double()[latent]
    assert ((dots - terms.sum(1)).abs() <= d_in * EPS * terms.abs().sum(1)).all()


def latents_by_definition(pre_acts: Tensor, k: int, by_magnitude: bool) -> list[list[int]]:
    """Of each row the k largest, NaN first, of equal ones the first; ascending."""
    ranked = (pre_acts.abs() if by_magnitude else pre_acts).double().nan_to_num(nan=float("inf"), posinf=1e300)
    return [sorted(sorted(range(len(row)), key=lambda i: -row[i])[:k]) for row in ranked.tolist()]


D_SAE_AND_K = [
    (1, 1),
    (2, 1),
    (9, 9),
    (100, 3),
    (129, 1),
    (129, 128),
    (1000, 64),
    (4097, 4),
    (4100, 1100),
    (4100, 4100),
]


@pytest.mark.parametrize(("d_sae", "k"), D_SAE_AND_K)
@pytest.mark.parametrize("by_magnitude", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_latents_equal_the_definition(d_sae: int, k: int, by_magnitude: bool, dtype: torch.dtype) -> None:
    pre_acts = random(2, d_sae, dtype=dtype)
    latents = triton_kernels.topk_latents(pre_acts, k, by_magnitude=by_magnitude)
    assert latents.tolist() == latents_by_definition(pre_acts, k, by_magnitude)
    if dtype == torch.float32:  # no two are equal
        of_torch = (pre_acts.abs() if by_magnitude else pre_acts).topk(k).indices
        assert torch.equal(latents, of_torch.sort(dim=1).values)


@pytest.mark.parametrize(("d_sae", "k"), [(9, 4), (200, 1), (200, 7), (200, 150), (4100, 9), (4100, 2100)])
@pytest.mark.parametrize("by_magnitude", [False, True])
def test_of_equal_pre_acts_the_first_are_taken(d_sae: int, k: int, by_magnitude: bool) -> None:
    few = torch.tensor([-1.0, -0.0, 0.0, 1.0], device=DEVICE)[integers(3 * d_sae, 4)].view(3, d_sae)
    few[1] = -0.0
    few[2, ::2] = 0.0
    latents = triton_kernels.topk_latents(few, k, by_magnitude=by_magnitude)
    assert latents.tolist() == latents_by_definition(few, k, by_magnitude)
    assert latents[1].tolist() == list(range(k))


@pytest.mark.parametrize("d_sae", [101, 4097])
def test_a_row_ends_where_the_next_begins(d_sae: int) -> None:
    pre_acts = random(3, d_sae)
    pre_acts[:, -1] = 9.0  # its group is chosen; in memory the next row's first entries follow
    pre_acts[:, :8] = 8.0
    latents = triton_kernels.topk_latents(pre_acts, 4, by_magnitude=False)
    assert latents.tolist() == 3 * [[0, 1, 2, d_sae - 1]]


@pytest.mark.parametrize("k", [1, 3, 6, 70])
def test_infinities_and_nans_are_ranked(k: int) -> None:
    pre_acts = random(1, 70).expand(2, -1).clone()
    pre_acts[0, [3, 69, 40]] = float("inf")
    pre_acts[0, [0, 20]] = torch.tensor([-float("nan"), float("nan")], device=DEVICE)
    pre_acts[1] = -float("inf")
    latents = triton_kernels.topk_latents(pre_acts, k, by_magnitude=False)
    first = [0, 20, 3, 40, 69]
    assert set(latents[0].tolist()) >= set(first[:k])
    assert latents[1].tolist() == list(range(k))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"topk_latents: k must be in \[1, d_sae=4\], got k=5; pick a smaller k"):
        triton_kernels.topk_latents(random(2, 4), 5, by_magnitude=False)
    with pytest.raises(ValueError, match=r"topk_latents: takes float32 or bfloat16, got torch.float64"):
        triton_kernels.topk_latents(random(2, 4).double(), 1, by_magnitude=False)
    with pytest.raises(ValueError, match=r"segment_sums: takes float32 or bfloat16, got torch.float64"):
        triton_kernels.segment_sums(random(2), integers(2, 3), bounds([2]), random(3, 4).double())


@pytest.fixture
def _as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has no CUDA tensors: let `kernels` take those of the CPU for them."""
    if IS_INTERPRETED:
        monkeypatch.setattr(active, "on_cuda", lambda _: True)


def every_other_row(batch: int, d_sae: int) -> Tensor:
    """Some entries of every other row, one latent in all of these, others in none."""
    mask = torch.rand(batch, d_sae, generator=torch.Generator().manual_seed(1)) < 0.2
    mask[:, 2], mask[:, 5] = True, False
    mask[::2] = False
    return mask.to(DEVICE)


@pytest.mark.usefixtures("_as_on_cuda")
def test_kept_entries_are_indexed_both_ways() -> None:
    mask = every_other_row(7, 19)
    row, latent = mask.nonzero(as_tuple=True)
    entries = ActiveEntries.of(row, latent, batch=7, d_sae=19)
    assert entries.row_start.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert entries.latent_start.tolist() == [0, *mask.sum(0).cumsum(0).tolist()]
    values = random(len(row)).relu()
    active = torch.zeros_like(mask).index_put((row, latent), values > 0)
    assert active.firing_counts(values, entries).tolist() == active.sum(0).tolist()


@pytest.mark.usefixtures("_as_on_cuda")
@pytest.mark.parametrize(("batch", "d_in"), [(40, 17), (2 * CHUNK + 40, 3)])
def test_a_sparse_autoencoder_has_the_dense_values_and_gradients(batch: int, d_in: int) -> None:
    d_sae = 19
    mask = every_other_row(batch, d_sae)
    x, g = random(batch, d_in), random(batch, d_in, seed=2)
    W_enc, b_enc = random(d_sae, d_in, seed=3).requires_grad_(), random(d_sae, seed=4).requires_grad_()
    W_dec, b_dec = random(d_sae, d_in, seed=5).requires_grad_(), random(d_in, seed=6).requires_grad_()
    row, latent = mask.nonzero(as_tuple=True)
    entries = ActiveEntries.of(row, latent, batch=batch, d_sae=d_sae)
    f = (x @ W_enc.detach().T + b_enc.detach())[mask]
    acts = sparse.active_pre_acts(f, entries, x, W_enc, b_enc, b_dec)
    x_hat = sparse.sparse_decode(acts, entries, W_dec)
    x_hat.backward(g)

    dense_f = torch.zeros(batch, d_sae, dtype=torch.float64, device=DEVICE).index_put((row, latent), f.double())
    x64, g64, W64 = x.double(), g.double(), W_dec.detach().double()
    to_f, size_of_f = (g64 @ W64.T) * mask, (g64.abs() @ W64.abs().T) * mask
    to_b, size_of_b = to_f.sum(0), size_of_f.sum(0)
    W_enc64 = W_enc.detach().double()
    expected = {
        "x_hat": (x_hat, dense_f @ W64, dense_f.abs() @ W64.abs()),
        "W_dec": (W_dec.grad, dense_f.T @ g64, dense_f.abs().T @ g64.abs()),
        "W_enc": (W_enc.grad, to_f.T @ x64, size_of_f.T @ x64.abs()),
        "b_enc": (b_enc.grad, to_b, size_of_b),
        "b_dec": (b_dec.grad, -to_b @ W_enc64, size_of_b @ W_enc64.abs()),
    }
    n_operations = d_in + batch + d_sae  # on the longest way: a dot product, a sum over rows, one over latents
    for name, (got, value, size) in expected.items():
        assert got is not None
        assert ((got - value).abs() <= n_operations * EPS * size).all(), name


@pytest.mark.usefixtures("_as_on_cuda")
@pytest.mark.parametrize("by_magnitude", [False, True])
def test_topk_pre_acts_are_those_of_the_dense_product(by_magnitude: bool) -> None:
    x, W_enc, b_enc = random(5, 4), random(33, 4, seed=1), random(33, seed=2)
    values, latents = select.topk_pre_acts(x, W_enc, b_enc, 6, Workspace(), by_magnitude=by_magnitude)
    pre_acts = torch.addmm(b_enc, x, W_enc.T)
    assert latents.tolist() == latents_by_definition(pre_acts, 6, by_magnitude)
    assert torch.equal(values, pre_acts.gather(1, latents))


LIKE_PLAIN_TORCH = [
    *((name, "float32") for name in ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk", "standard", "gated")),
    *((name, "bfloat16") for name in ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk")),
]


@pytest.mark.usefixtures("_as_on_cuda")
@pytest.mark.parametrize(("architecture", "encoder_dtype"), LIKE_PLAIN_TORCH)
def test_training_goes_as_in_plain_torch(
    architecture: str, encoder_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses of two steps, of which AuxK takes part in the second; few entries of the penalised are above 0."""
    from support.tiny_saes import TOPK_FAMILY, make_config
    from trainer.training.step import initial_state, train_step

    settings = {"aux_coefficient": 1.0, "k_aux": 4, "dead_window": 1, "k": 2} if architecture in TOPK_FAMILY else {}
    widths = (3, 12) if architecture == "matryoshka_batchtopk" else None
    settings["encoder_dtype"] = encoder_dtype
    config = make_config(architecture, d_sae=12, matryoshka_widths=widths, **settings)
    batches = [random(6, 16, seed=seed) for seed in range(2)]

    def losses(device: str) -> tuple[Tensor, bool]:
        state, totals = initial_state(config, torch.zeros(16, device=device)), []
        if architecture not in TOPK_FAMILY:
            with torch.no_grad():
                state.weights["b_gate" if architecture == "gated" else "b_enc"].fill_(-0.15)
        for x in batches:
            had_dead = bool(state.dead.any())
            outcome = train_step(state, x.to(device), Workspace())
            assert architecture in TOPK_FAMILY or 0 < outcome.n_active <= 6 * 12 / 8, "the sparse path"
            totals.append(outcome.loss.total.cpu())
        return torch.stack(totals), had_dead

    found, had_dead = losses(DEVICE)
    monkeypatch.setattr(active, "on_cuda", lambda _: False)
    expected, _ = losses("cpu")
    assert had_dead == (architecture in TOPK_FAMILY)
    # sums of at most 6 * 16 terms, a handful of them nested; the errors of one step feed the other
    assert ((found - expected).abs() <= 2 * 10 * 6 * 16 * EPS * expected.abs()).all()


@on_a_gpu
def test_offsets_go_past_two_to_the_31() -> None:
    pre_acts = torch.zeros((1 << 16) + 1, 1 << 15, dtype=torch.bfloat16, device=DEVICE)  # 4.3 GB
    pre_acts[-1, 5] = 1.0
    assert triton_kernels.topk_latents(pre_acts, 1, by_magnitude=False)[-1].tolist() == [5]
    del pre_acts
    start = torch.zeros((1 << 21) + 2, dtype=torch.int64, device=DEVICE)
    start[-1] = 1  # only the last segment has an entry
    values, rows = random(1), random(1, 1024, seed=1)
    sums = triton_kernels.segment_sums(values, start[:1], start, rows)  # 8.6 GB
    assert not sums[-2].any()
    assert torch.equal(sums[-1], (values * rows)[0])


@on_a_gpu
@pytest.mark.parametrize("d_sae", [19, 40_000])
def test_nothing_waits_for_the_device(d_sae: int) -> None:
    x, b_dec = random(50, 17), random(17, seed=1).requires_grad_()
    W_enc, W_dec = (random(d_sae, 17, seed=seed).requires_grad_() for seed in (2, 3))
    b_enc, workspace = torch.zeros(d_sae, device=DEVICE, requires_grad=True), Workspace()

    def step() -> None:
        values, latents = select.topk_pre_acts(x, W_enc, b_enc, 4, workspace)
        row = torch.arange(50, device=DEVICE).repeat_interleave(4)
        entries = ActiveEntries.of(row, latents.flatten(), batch=50, d_sae=d_sae)
        acts = sparse.active_pre_acts(values.flatten(), entries, x, W_enc, b_enc, b_dec).relu()
        sparse.sparse_decode(acts, entries, W_dec).sum().backward()
        active.firing_counts(acts, entries)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
