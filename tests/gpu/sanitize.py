"""A reduced set of launches for compute-sanitizer to watch: every instance, ragged lengths, both types of pairs."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import cuda_library as lib
import reference as ref


def scans() -> int:
    ran = 0
    for dtype, length, channels in [(torch.float16, 131, 24), (torch.float32, 131, 24)]:
        directions = [ref.make_direction(1, length, channels, dtype, rank=12) for _ in "fb"]
        z = torch.randn(1, length, channels, device="cuda").to(dtype)
        y_scale = torch.rand(channels, device="cuda")
        y = ref.Guarded(z.shape, dtype)
        for variant in [lib.Variant(), *lib.PAIR_VARIANTS]:
            if variant.form == lib.LANES and variant.split == 4 and dtype == torch.float32:
                continue
            ran += lib.Call(directions, z, y.view, y_scale=y_scale).run(variant) == lib.OK
        for variant in [lib.Variant(), *lib.SINGLE_VARIANTS[:8]]:
            ran += lib.Call(directions[1:], z, y.view, reverse=True).run(variant) == lib.OK
        torch.cuda.synchronize()
        assert y.intact() and torch.isfinite(y.view).all()
        ran += in_chunks(dtype, channels)
    return ran


def in_chunks(dtype, channels, length=331) -> int:
    """Shorter sequences are not cut."""
    ran = 0
    directions = [ref.make_direction(1, length, channels, dtype, rank=12) for _ in "fb"]
    z, y = torch.randn(1, length, channels, device="cuda").to(dtype), ref.Guarded((1, length, channels), dtype)
    for variant in [each for each in lib.STATES_VARIANTS if each.chunks > 1]:
        ran += lib.Call(directions, z, y.view).run(variant) == lib.OK
        ran += lib.Call(directions[1:], z, y.view, reverse=True).run(variant) == lib.OK
    torch.cuda.synchronize()
    assert y.intact() and torch.isfinite(y.view).all()
    return ran


def convolutions() -> int:
    ran = 0
    for dtype in (torch.float16, torch.float32):
        for taps, channels in [(2, 24), (3, 24), (4, 24), (4, 37), (5, 24)]:
            x = torch.randn(2, 67, 2 * channels, device="cuda").to(dtype)[..., :channels]
            weights = [torch.randn(taps, channels, device="cuda") for _ in "fb"]
            biases = [torch.randn(channels, device="cuda") for _ in "fb"]
            u = [torch.empty(2, 67, channels, device="cuda", dtype=dtype) for _ in "fb"]
            ran += lib.conv(x, weights, biases, u) == lib.OK
            torch.cuda.synchronize()
            assert all(torch.isfinite(each).all() for each in u)
    return ran


def norms() -> int:
    ran = 0
    for dtype in (torch.float16, torch.float32):
        for channels in (37, 192, 384, 768, 1024, 2048):
            h, r = torch.randn(13, channels, device="cuda").to(dtype), torch.randn(13, channels, device="cuda")
            weight, n = torch.randn(channels, device="cuda"), torch.empty_like(h)
            ran += lib.norm(h, r, weight, n, r) == lib.OK
            torch.cuda.synchronize()
            assert torch.isfinite(n).all()
    return ran


if __name__ == "__main__":
    counts = {"scans": scans(), "convolutions": convolutions(), "norms": norms()}
    assert counts["convolutions"] == 10 and counts["norms"] == 12 and counts["scans"] > 30, counts
    print(counts)
