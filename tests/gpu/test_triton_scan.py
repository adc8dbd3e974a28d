"""The Triton scan against float64. Needs a card and Triton."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
pytest.importorskip("triton")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import reference as ref  # noqa: E402

from vimdeploy.errors import VimDeployError  # noqa: E402
from vimdeploy.ops.triton_scan import selective_scan_triton  # noqa: E402

TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 2e-6}


def check(d, z, *, softplus=True, reverse=False):
    y = selective_scan_triton(d.u, d.delta, d.A, d.B, d.C, d.D, z, d.delta_bias, softplus, reverse)
    assert y.dtype == d.u.dtype and y.is_contiguous()
    error = ref.relative_rms(y, ref.scan_f64(d, z, softplus=softplus, reverse=reverse))
    assert error <= TOLERANCE[d.u.dtype], f"{error:.2e}"


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("states,groups,channels", [(16, 1, 384), (16, 3, 48), (1, 1, 8), (5, 1, 37), (64, 2, 10)])
def test_against_float64(states, groups, channels, reverse, dtype):
    d = ref.make_direction(2, 197, channels, dtype, states=states, groups=groups, rank=12)
    check(d, torch.randn(2, 197, channels, device="cuda").to(dtype), reverse=reverse)


@pytest.mark.parametrize("decay", ["slow", "fast"])
def test_long_fp32(decay):
    check(ref.make_direction(1, 6085, 32, torch.float32, decay=decay), None)


def test_extreme_delta_without_softplus_and_options():
    d = ref.make_direction(2, 64, 32, torch.float16, decay="extreme", bias=False, skip=False)
    d.delta = d.delta.abs()
    check(d, None, softplus=False)


def test_strided_inputs():
    wide = torch.randn(2, 33, 100, device="cuda").half()
    d = ref.make_direction(2, 33, 40, torch.float16, rank=3)
    d.u = wide[..., 7:47]
    d.delta = d.delta.transpose(1, 2).contiguous().transpose(1, 2)
    check(d, wide[..., 50:90], reverse=True)


def test_refusals_and_empty():
    d = ref.make_direction(1, 4, 8, torch.float32)
    with pytest.raises(VimDeployError, match="fp16, bf16 or fp32 CUDA tensors"):
        selective_scan_triton(d.u.cpu(), d.delta, d.A, d.B, d.C)
    assert selective_scan_triton(d.u[:, :0], d.delta[:, :0], d.A, d.B[:, :0], d.C[:, :0]).shape == (1, 0, 8)
