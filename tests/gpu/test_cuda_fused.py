"""The CUDA convolution and norm against numpy in float64. Needs a card; tests/gpu/run.sh builds the library."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent))

import cuda_library as lib  # noqa: E402
import reference as ref  # noqa: E402

# Outputs are rounded once; everything inside is fp32.
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 2e-6}
DTYPES = list(TOLERANCE)


def numpy64(tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def conv_f64(x, weights, biases) -> list[np.ndarray]:
    """Both directions, (B, L, D) each, from the values the kernel sees."""
    x = numpy64(x)
    taps, length = weights[0].shape[0], x.shape[1]
    out = []
    for reverse, (weight, bias) in enumerate(zip(map(numpy64, weights), map(numpy64, biases))):
        padded = np.pad(x, ((0, 0), (taps - 1, taps - 1), (0, 0)))
        start = (taps - 1 if reverse else 0) + np.arange(taps)
        # Tap k of the forward direction is on token t - (taps - 1) + k, of the reverse one on t + (taps - 1) - k.
        order = range(taps - 1, -1, -1) if reverse else range(taps)
        out.append(silu(bias + sum(weight[k] * padded[:, s : s + length] for k, s in zip(order, start))))
    return out


def norm_f64(h, r, weight, epsilon) -> tuple[np.ndarray, np.ndarray]:
    total = numpy64(h) + numpy64(r)
    return total / np.sqrt((total**2).mean(-1, keepdims=True) + epsilon) * numpy64(weight), total


def error_of(got, wanted: np.ndarray) -> float:
    return ref.relative_rms(got, torch.from_numpy(wanted).to(got.device))


def check_conv(batch, length, channels, taps, dtype, *, row=None, first=0, offset=0, margin=4096):
    """x are `channels` from column `first` of rows of `row`; outputs start `offset` elements off."""
    rows = torch.randn(batch, length, row or channels, device="cuda").to(dtype)
    x = rows[..., first : first + channels]
    weights = [torch.randn(taps, channels, device="cuda") for _ in "fb"]
    biases = [torch.randn(channels, device="cuda") for _ in "fb"]
    u = [ref.Guarded((batch, length, channels), dtype, offset=offset, margin=margin) for _ in "fb"]
    assert lib.conv(x, weights, biases, [each.view for each in u]) == lib.OK, lib.last_error()
    torch.cuda.synchronize()
    for each, wanted in zip(u, conv_f64(x, weights, biases)):
        assert error_of(each.view, wanted) <= TOLERANCE[dtype]
        assert each.intact(), "wrote outside u"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5, 16])
@pytest.mark.parametrize("batch,length,channels", [(2, 197, 384), (3, 61, 37), (1, 1025, 4)])
def test_conv_of_any_taps(batch, length, channels, taps, dtype):
    check_conv(batch, length, channels, taps, dtype)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 32, 33, 129])
def test_conv_of_short_sequences(length):
    """Shorter than the taps, and around each multiple of a thread's run of tokens."""
    for dtype in DTYPES:
        check_conv(2, length, 24, 4, dtype)


def test_conv_of_long_runs():
    """Enough rows for every length of a thread's run: 4, 8, 16 and 32 tokens."""
    for batch, length in [(1, 197), (8, 400), (64, 197), (64, 500)]:
        check_conv(batch, length, 384, 4, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row,first,offset", [(128, 0, 0), (128, 64, 8), (129, 1, 0), (130, 2, 2), (67, 3, 1)])
def test_conv_of_slices_and_odd_pointers(row, first, offset, dtype):
    """x is the half of in_proj's rows that it is; and rows and pointers that no vector load may touch."""
    check_conv(2, 50, 64, 4, dtype, row=row, first=first, offset=offset)


def test_conv_refuses_and_does_nothing():
    x = torch.randn(1, 4, 8, device="cuda").half()
    weights, biases = [torch.randn(4, 8, device="cuda")] * 2, [torch.randn(8, device="cuda")] * 2
    u = [torch.full_like(x, 7) for _ in "fb"]
    assert lib.conv(x, weights, biases, u, taps=17) == lib.UNSUPPORTED
    assert lib.conv(x, weights, biases, u, io=3) == lib.UNSUPPORTED
    assert lib.conv(x, weights, biases, u, batch=0) == lib.OK
    assert lib.conv(x, weights, biases, u, length=0) == lib.OK
    torch.cuda.synchronize()
    assert all((each == 7).all() for each in u)


def check_norm(rows, channels, dtype, *, epsilon=1e-5, scale=1.0, offset=0, in_place=False):
    r = ref.Guarded((1, rows, channels), torch.float32, offset=offset)
    r.view.copy_(torch.randn(1, rows, channels, device="cuda") * scale)
    before = r.view.clone()
    h = (torch.randn(rows, channels, device="cuda") * scale).clamp(-6e4, 6e4).to(dtype)
    weight = torch.randn(channels, device="cuda")
    n = ref.Guarded((1, rows, channels), dtype, offset=offset)
    r_out = r if in_place else ref.Guarded((1, rows, channels), torch.float32, offset=offset)
    status = lib.norm(h, r.view[0], weight, n.view[0], r_out.view[0], epsilon=epsilon)
    assert status == lib.OK, lib.last_error()
    torch.cuda.synchronize()
    wanted, total = norm_f64(h, before[0], weight, epsilon)
    assert error_of(n.view[0], wanted) <= TOLERANCE[dtype]
    assert error_of(r_out.view[0], total) <= 1e-7  # one rounding to fp32
    assert n.intact() and r_out.intact(), "wrote outside n or r_out"
    if not in_place:
        assert torch.equal(r.view, before), "wrote r"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4, 37, 192, 256, 260, 384, 388, 768, 772, 1024, 1028, 4099])
def test_norm_of_any_width(channels, in_place, dtype):
    for rows in (1, 5, 197):
        check_norm(rows, channels, dtype, in_place=in_place)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_of_odd_pointers(dtype):
    for offset in (1, 2, 4):
        check_norm(33, 384, dtype, offset=offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_of_a_residual_whose_square_fp16_cannot_hold(dtype):
    check_norm(65, 192, dtype, scale=1e4)
    check_norm(65, 192, dtype, scale=1e-4, epsilon=1e-8)


def test_norm_refuses_and_does_nothing():
    h = torch.randn(4, 8, device="cuda").half()
    r, weight = torch.randn(4, 8, device="cuda"), torch.randn(8, device="cuda")
    n, r_out = torch.full_like(h, 7), torch.full_like(r, 7)
    assert lib.norm(h, r, weight, n, r_out, epsilon=-1.0) == lib.UNSUPPORTED
    assert lib.norm(h[:0], r[:0], weight, n, r_out) == lib.OK
    torch.cuda.synchronize()
    assert (n == 7).all() and (r_out == 7).all()


def test_graph_capture_repeats_the_bits():
    x = torch.randn(4, 197, 768, device="cuda").half()
    weights, biases = [torch.randn(4, 384, device="cuda")] * 2, [torch.randn(384, device="cuda")] * 2
    u = [torch.empty(4, 197, 384, device="cuda", dtype=torch.half) for _ in "fb"]
    h, r, weight = x[0].clone(), torch.randn(197, 768, device="cuda"), torch.randn(768, device="cuda")
    n, r_out = torch.empty_like(h), torch.empty_like(r)

    def both() -> None:
        assert lib.conv(x[..., :384], weights, biases, u) == lib.OK
        assert lib.norm(h, r, weight, n, r_out) == lib.OK

    both()
    torch.cuda.synchronize()
    first = [each.clone() for each in (*u, n, r_out)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both()
    for _ in range(3):
        for each in (*u, n, r_out):
            each.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(each, wanted) for each, wanted in zip((*u, n, r_out), first))
