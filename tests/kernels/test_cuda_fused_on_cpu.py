"""The CUDA convolution and norm computed on the CPU: their results, in whatever order a block's threads run.

How, and what it finds: test_cuda_scan_on_cpu.py.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import fused_c
import numpy as np
import pytest
from cuda_on_cpu import build_fused
from fused_cases import assert_bi_conv, assert_norm, make_bi_conv, make_norm
from scan_cases import DTYPES

ORDERS = (0, 1, 2)
OK, UNSUPPORTED = 0, 1


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_fused(tmp_path_factory.mktemp("fused"))


def run(library: ctypes.CDLL, op: str, desc: ctypes.Structure, args: ctypes.Structure, order: int) -> int:
    library.set_order(order)
    return getattr(library, f"vim_{op}_cuda")(ctypes.byref(desc), ctypes.byref(args), None)


def conv(library: ctypes.CDLL, inputs: dict[str, Any], order: int) -> tuple[np.ndarray, np.ndarray]:
    u = tuple(np.full(inputs["x"].shape, np.nan, inputs["x"].dtype) for _ in range(2))
    args = fused_c.pointers(fused_c.BiConvArgs(), {**inputs, "u": u})
    assert run(library, "bi_causal_conv1d", fused_c.describe_bi_conv(inputs), args, order) == OK
    return u[0], u[1]


def norm(
    library: ctypes.CDLL, inputs: dict[str, Any], order: int, epsilon: float = 1e-5
) -> tuple[np.ndarray, np.ndarray]:
    h = inputs["h"]
    n, r_out = np.full_like(h, np.nan), np.full_like(inputs["r"], np.nan)
    desc = fused_c.NormDesc(h.size // h.shape[-1], h.shape[-1], fused_c.IO[h.dtype], epsilon)
    args = fused_c.pointers(fused_c.NormArgs(), {**inputs, "n": n, "r_out": r_out})
    assert run(library, "add_rms_norm", desc, args, order) == OK
    return n, r_out


def assert_same(results: list[tuple[np.ndarray, np.ndarray]]) -> None:
    assert len({tuple(one.tobytes() for one in result) for result in results}) == 1, "the order of threads matters"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("channels", [37, 40], ids=["one channel a thread", "four channels a thread"])
def test_convolution(library: ctypes.CDLL, channels: int, taps: int, dtype: str) -> None:
    """Rows of x twice as wide as what is read of them, as in_proj writes them."""
    inputs = make_bi_conv(2, 67, channels, taps, dtype=dtype, width=2 * channels)
    results = [conv(library, inputs, order) for order in ORDERS]
    assert_bi_conv(results[0], inputs, dtype)
    assert_same(results)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 31, 32, 33])
def test_convolution_of_few_tokens(library: ctypes.CDLL, length: int) -> None:
    inputs = make_bi_conv(1, length, 8)
    assert_bi_conv(conv(library, inputs, 0), inputs, "fp32")


def test_convolution_in_long_walks(library: ctypes.CDLL) -> None:
    """So many channels that a thread takes more than one group of tokens."""
    inputs = make_bi_conv(2, 40, 4 * 9000, dtype="fp16")
    assert_bi_conv(conv(library, inputs, 0), inputs, "fp16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [4, 192, 384, 768, 1024, 1028, 37, 2001])
def test_norm(library: ctypes.CDLL, channels: int, dtype: str) -> None:
    """Every number of registers a row takes, and rows that take a block: too long, or not aligned."""
    inputs = make_norm(7, channels, dtype=dtype)
    results = [norm(library, inputs, order) for order in ORDERS]
    assert_norm(results[0], inputs, dtype)
    assert_same(results)


@pytest.mark.parametrize("epsilon", [0.0, 1.0])
def test_norm_of_large_streams(library: ctypes.CDLL, epsilon: float) -> None:
    inputs = make_norm(3, 192, scale=3e4)
    assert_norm(norm(library, inputs, 0, epsilon), inputs, "fp32", epsilon)


@pytest.mark.parametrize("channels", [192, 37])
def test_norm_in_place(library: ctypes.CDLL, channels: int) -> None:
    inputs = make_norm(5, channels, dtype="fp16")
    want = norm(library, inputs, 0)
    stream, n = inputs["r"].copy(), np.empty_like(want[0])
    desc = fused_c.NormDesc(5, channels, fused_c.IO[n.dtype], 1e-5)
    args = fused_c.pointers(fused_c.NormArgs(), {**inputs, "r": stream, "n": n, "r_out": stream})
    assert run(library, "add_rms_norm", desc, args, 0) == OK
    assert_same([want, (n, stream)])


def test_what_no_kernel_takes_is_refused(library: ctypes.CDLL) -> None:
    desc, args = fused_c.BiConvDesc(1, 8, 8, 17, 0), fused_c.BiConvArgs()
    assert run(library, "bi_causal_conv1d", desc, args, 0) == UNSUPPORTED
    assert run(library, "add_rms_norm", fused_c.NormDesc(1, 0, 0, 1e-5), fused_c.NormArgs(), 0) == UNSUPPORTED


def test_a_missing_barrier_is_found(tmp_path: Path) -> None:
    """The sum of a row's squares, which the warps of a block gather, without the barrier between them."""
    broken = build_fused(tmp_path, {"cuda/add_rms_norm.cu": ((r"__syncthreads\(\);", ""),)})
    inputs = make_norm(2, 2001)
    results = [norm(broken, inputs, order) for order in (0, 1)]
    assert len({result[0].tobytes() for result in results}) > 1 or np.isnan(results[0][0]).any()
