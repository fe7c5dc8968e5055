"""What `benchmarks.gpu` can show without a GPU: its formulas, its way through all parts on a CPU, and how it fails."""

import json
import signal
import subprocess
import sys
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
from support.places import CHILD, ROOT

from benchmarks.gpu import FULL, IMPORTED_ONCE, main
from benchmarks.gpu_kernels import OF_TORCH, OF_TRITON
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
    for shape in FULL.shapes.values():
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


def test_what_is_imported_once_leaves_cuda_to_the_parts():
    """CUDA cannot be used in a fork of a process that has asked for it."""
    watch = "import torch\nfor name in ('is_available', 'device_count', 'init', '_lazy_init'):\n"
    watch += "    setattr(torch.cuda, name, lambda: exit('asked for CUDA'))\n"
    imports = "".join(f"import {name}\n" for name in IMPORTED_ONCE)
    done = subprocess.run([sys.executable, "-c", watch + imports], cwd=ROOT, env=CHILD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_takes_no_arguments():
    with pytest.raises(SystemExit, match="2"):
        main(["--fast"])


class Report:
    """A script in its own process, whose lines on stdout must be JSON. said: the lines on stderr so far."""

    def __init__(self, script: str, folder: Path):
        (folder / "script.py").write_text(script)
        self.said = list[str]()
        self._process = subprocess.Popen(
            [sys.executable, folder / "script.py"],
            cwd=ROOT,
            env=CHILD,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, row: str) -> None:
        """Until the row is measured."""
        while not (self.said and self.said[-1].startswith(f"{row}: ")):
            line = self._process.stderr.readline()
            assert line, f"{row} was never measured: {self.said}"
            self.said.append(line)

    def interrupt(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> tuple[int, list[dict]]:
        """(exit code, the JSON of each line)."""
        out, err = self._process.communicate(timeout=600)
        self.said += err.splitlines(keepends=True)
        return self._process.returncode, [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]


PARTS = """
import os, sys, time
from functools import partial
from benchmarks.gpu_parts import Parts

def say(line):
    print(line, file=sys.stderr, flush=True)

if __name__ == "__main__":
    parts = Parts(say, seconds={seconds}, part_seconds=2)
    sys.exit(parts.report({measure_all}))
"""


def test_what_goes_wrong_costs_one_row(tmp_path):
    wrong = {
        "raises": ('partial(int, "x")', "ValueError: invalid literal for int() with base 10: 'x'"),
        "dies": ("os.abort", "its process ended with exit code -6"),
        "hangs": ("partial(time.sleep, 60)", "stopped after the 2 s that a part may take"),
        "has a NaN": ('partial(dict, seconds=float("nan"))', "ValueError: Out of range float values are not JSON"),
    }
    calls = [f"parts.measure({part}, 'wrong', '{name}')" for name, (part, _) in wrong.items()]
    calls.append("""parts.measure(partial(eval, "print('noise') or {'seconds': 1.5}"), 'right')""")
    report = Report(PARTS.format(seconds=600, measure_all=f"lambda parts: [{', '.join(calls)}]"), tmp_path)
    code, (found,) = report.end()
    assert code == 1
    assert found["failed"] == [f"wrong, {name}" for name in wrong]
    assert found["right"] == {"seconds": 1.5}
    for name, (_, why) in wrong.items():
        assert found["wrong"][name]["error"].startswith(why)


def test_what_would_begin_too_late_says_so(tmp_path):
    calls = "parts.measure(partial(time.sleep, 60), 'a'), parts.measure(partial(dict, seconds=1.5), 'b')"
    code, (found,) = Report(PARTS.format(seconds=1, measure_all=f"lambda parts: ({calls})"), tmp_path).end()
    stopped, late = ({"error": f"{how}: the time for all parts was over"} for how in ("stopped", "not begun"))
    assert (code, found) == (1, {"a": stopped, "b": late, "failed": ["a", "b"]})


def test_an_error_between_the_parts_leaves_the_rows(tmp_path):
    calls = "parts.measure(partial(dict, seconds=1.5), 'a'), 1 / 0"
    report = Report(PARTS.format(seconds=600, measure_all=f"lambda parts: ({calls})"), tmp_path)
    assert report.end() == (1, [{"a": {"seconds": 1.5}, "failed": []}])
    assert "ZeroDivisionError" in report.said[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_the_rows_so_far(tmp_path, number):
    sleep = "import sys, time; print('asleep: ', file=sys.stderr, flush=True); time.sleep(60)"
    right, asleep, late = "partial(dict, seconds=1.5)", f'partial(exec, "{sleep}")', "partial(dict, seconds=1.5)"
    calls = f"parts.measure({right}, 'a'), parts.measure({asleep}, 'b'), parts.measure({late}, 'c')"
    report = Report(PARTS.format(seconds=600, measure_all=f"lambda parts: ({calls})"), tmp_path)
    report.wait_for("asleep")
    report.interrupt(number)
    stopped, late = ({"error": f"{how}: interrupted by {number.name}"} for how in ("stopped", "not begun"))
    assert report.end() == (1, [{"a": {"seconds": 1.5}, "b": stopped, "c": late, "failed": ["b", "c"]}])


OF_A_GPU = [f"tiny, kernels, {kernel}" for kernel in OF_TRITON]  # fail on a CPU, be triton installed or not
ON_A_CPU = """
import sys
from benchmarks import gpu
from benchmarks.roofline import Shape

def code(name, d_in, n_copied):
    shapes = {name: Shape(d_in=d_in, d_sae=128, k=4, batch=256)}
    sizes = {"n_copied": n_copied, "gemm_size": 64, "seconds": 600, "part_seconds": 300}
    return gpu.run(gpu.Bench(device="cpu", shapes=shapes, **sizes))

if __name__ == "__main__":
    # no memory has a negative size, and no head of a GPT-2 is as narrow as 48: without rates and cache
    sys.exit(10 * code("tiny", 64, 1 << 20) + code("bare", 48, -1))
"""


@pytest.fixture(scope="module")
def on_a_cpu(tmp_path_factory) -> tuple[int, dict, dict, list[str]]:
    """Both exit codes, what was found of all parts, what was found without rates and cache until a signal, and stderr.

    One process runs both, because it imports for ten seconds.
    """
    report = Report(ON_A_CPU, tmp_path_factory.mktemp("on_a_cpu"))
    report.wait_for("bare, kernels, encoder")
    report.interrupt(signal.SIGTERM)
    code, (everything, bare) = report.end()
    return code, everything, bare, report.said


def row_of(found: dict, name: str) -> dict:
    return reduce(getitem, name.split(", "), found)


def test_all_parts_but_those_of_a_gpu_are_measured_on_a_cpu(on_a_cpu):
    codes, found, _, said = on_a_cpu
    assert found["failed"] == OF_A_GPU, "".join(said)
    assert codes // 10 == 1
    of_precisions = [f"tiny, {precision}, {{}}" for precision in ("float32", "bfloat16")]
    in_order = ["machine", "rates", "tiny, harvest", "tiny, loader"]
    in_order += [name.format(part) for name in of_precisions for part in ("step", "fed")]
    in_order += [f"tiny, kernels, {kernel}" for kernel in (*OF_TRITON, *OF_TORCH)]
    in_order += [name.format(part) for part in ("deterministic", *found["peers"]) for name in of_precisions]
    measured = [name for line in said if (name := line.split(": ")[0]) in in_order]
    assert measured[: len(in_order)] == in_order
    rates, tiny = Rates(**found["rates"]), found["tiny"]
    for precision in ("float32", "bfloat16"):
        step = tiny[precision]["step"]
        assert step["share_of_roofline"] * step["resident_seconds"] == pytest.approx(step["roofline_seconds"])
        assert step["roofline_seconds"] == roofline_seconds(Shape(**tiny["shape"]), precision, rates, strict=False)
        assert step["tokens_per_second"] * step["resident_seconds"] == pytest.approx(256)
        assert step["is_cached"]
        assert tiny[precision]["fed"]["fed_seconds"] > 0
        assert tiny[precision]["deterministic"]["plain_repeats"]
    assert tiny["kernels"]["adam"]["share"] > 0


def test_without_rates_and_cache_and_until_a_signal(on_a_cpu):
    codes, _, found, _ = on_a_cpu
    assert codes % 10 == 1
    lost = ["rates", "bare, harvest", "bare, loader", "bare, float32, fed", "bare, bfloat16, fed"]
    assert found["failed"][:9] == [*lost, *(name.replace("tiny", "bare") for name in OF_A_GPU)]
    assert "bare, bfloat16, deterministic" in found["failed"][9:]
    for name in found["failed"][9:]:
        assert "interrupted by SIGTERM" in row_of(found, name)["error"]
    for precision in ("float32", "bfloat16"):
        step, fed = found["bare"][precision]["step"], found["bare"][precision]["fed"]
        assert step["resident_seconds"] > 0
        assert step["share_of_roofline"] is None
        assert not step["is_cached"]
        assert (fed["fed_seconds"], fed["fed_over_resident"]) == (None, None)
    encoder = found["bare"]["kernels"]["encoder"]
    assert encoder["seconds"] > 0
    assert (encoder["bound"], encoder["share"]) == (None, None)
