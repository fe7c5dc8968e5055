"""What `benchmarks.gpu` can show without a GPU: its formulas, and how it declines."""

import pytest

from benchmarks.gpu import SHAPES, main
from benchmarks.roofline import Rates, Shape, kernel_bytes, roofline_seconds, step_bytes, step_flops

TINY = Shape(d_in=3, d_sae=7, k=2, batch=5)  # 21 weights a matrix, 52 parameters, 15 numbers of x, 10 entries


def test_the_flops_are_those_of_one_product():
    assert step_flops(TINY) == 5 * 7 * (3 + 3), "a multiplication and an addition for each weight of each latent"


def test_the_bytes_are_those_counted_by_hand():
    assert step_bytes(TINY, "float32", strict=False) == {
        "weights": 84,  # W_enc read: 21 floats
        "rows": 180,  # x read three times: 15 floats each
        "error": 180,  # written once, read twice
        "W_dec": 240,  # a row of 3 floats for each of 10 entries, twice
        "gradients": 416,  # 52 floats written and read
        "adam": 1248,  # three times 52 floats read and written
        "entries": 480,  # 10 of 12 bytes, four times
    }


def test_strictly_each_row_of_the_decoder_is_fetched_once():
    gathered, strict = (step_bytes(TINY, "float32", strict=strict) for strict in (False, True))
    assert strict == {**gathered, "W_dec": 2 * 84}
    few = Shape(d_in=3, d_sae=100, k=2, batch=5)
    assert step_bytes(few, "float32", strict=True) == step_bytes(few, "float32", strict=False), "10 of the 100 at most"


def test_a_bfloat16_encoder_reads_half_and_writes_its_copy():
    full, half = (step_bytes(TINY, precision, strict=False) for precision in ("float32", "bfloat16"))
    assert half == {**full, "weights": 42 + 42, "rows": 30 + 60 + 60}


def test_the_roofline_adds_both_times():
    rates = Rates(gemm={"float32": 10.0, "bfloat16": 20.0}, copy=100.0)
    assert roofline_seconds(TINY, "float32", rates, strict=False) == pytest.approx(21.0 + 28.28)
    assert roofline_seconds(TINY, "bfloat16", rates, strict=True) == pytest.approx(10.5 + 27.26)


def test_no_kernel_moves_more_than_its_step():
    for shape in SHAPES.values():
        step = step_bytes(shape, "float32", strict=True)
        alone = kernel_bytes(shape, shape.batch)
        assert alone["adam"] < step["adam"] + step["gradients"]
        assert alone["decode"] < step["W_dec"] + step["error"] + step["entries"]


def test_without_cuda_it_says_so_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "benchmarks.gpu: needs a CUDA device, torch finds none; run it where there is one\n"


def test_it_takes_no_arguments():
    with pytest.raises(SystemExit, match="2"):
        main(["--fast"])
