"""Times the fused convolution and the fused norm on a CUDA card, against memory and against PyTorch's own operators.

  tests/gpu/run.sh -k choice                       builds build/gpu/out/libvimdeploy_cuda.so (or set VIM_CUDA_LIBRARY)
  python benchmarks/fused.py --output benchmarks/results/fused-h200.json

As in a Vim layer: the convolution reads the first half of in_proj's rows and writes both directions' u; the norm adds
fp16 h to the fp32 residual. PyTorch does what the unfused graph says: a depthwise convolution and SiLU a direction; an
addition and rms_norm in fp32, rounded. Medians and buffer sets as in scan.py; `memory` is the time that moving every
operand once takes at the copy rate of the same run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from scan import MODELS, Timer, lib, machine

BATCHES, LENGTHS = (1, 8, 64), (197, 6085)


def copy_rate(timer: Timer) -> float:
    """Bytes read and written a second by a copy far larger than the L2."""
    source = torch.randn(256 * 2**20, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / timer.microseconds([lambda: target.copy_(source)]) * 1e6


class Convolution:
    """Both directions' convolution and SiLU of one layer; `bytes` is what must be moved."""

    def __init__(self, batch: int, length: int, channels: int):
        self.xz = torch.randn(batch, length, 2 * channels, device="cuda").half()
        self.x = self.xz[..., :channels]
        self.weights = [torch.randn(4, channels, device="cuda") for _ in "fb"]
        self.biases = [torch.randn(channels, device="cuda") for _ in "fb"]
        self.u = [torch.empty(batch, length, channels, device="cuda", dtype=torch.half) for _ in "fb"]
        self.half = [(w.T[:, None].contiguous().half(), b.half()) for w, b in zip(self.weights, self.biases)]
        self.bytes = 3 * self.u[0].nbytes

    def ours(self) -> None:
        assert lib.conv(self.x, self.weights, self.biases, self.u) == lib.OK, lib.last_error()

    def torch(self) -> None:
        x, length = self.x.transpose(1, 2), self.x.shape[1]
        for reverse, (weight, bias) in enumerate(self.half):
            taps = weight.flip(-1) if reverse else weight
            y = torch.nn.functional.conv1d(x, taps, bias, padding=3, groups=x.shape[1])
            y = y[..., 3:] if reverse else y[..., :length]
            torch.nn.functional.silu(y.transpose(1, 2))

    def check(self) -> None:
        self.ours()
        x, length = self.x.transpose(1, 2).float(), self.x.shape[1]
        for reverse, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            taps = weight.T[:, None].flip(-1) if reverse else weight.T[:, None]
            y = torch.nn.functional.conv1d(x, taps, bias, padding=3, groups=x.shape[1])
            y = torch.nn.functional.silu(y[..., 3:] if reverse else y[..., :length]).transpose(1, 2)
            assert (self.u[reverse].float() - y).norm() < 2e-3 * y.norm()


class Norm:
    """Residual add and RMSNorm of one layer."""

    def __init__(self, batch: int, length: int, channels: int):
        self.h = torch.randn(batch * length, channels, device="cuda").half()
        self.r = torch.randn(batch * length, channels, device="cuda")
        self.weight = torch.randn(channels, device="cuda")
        self.n, self.r_out = torch.empty_like(self.h), torch.empty_like(self.r)
        self.bytes = 2 * self.h.nbytes + 2 * self.r.nbytes

    def ours(self) -> None:
        assert lib.norm(self.h, self.r, self.weight, self.n, self.r_out) == lib.OK, lib.last_error()

    def torch(self) -> torch.Tensor:
        r = self.h + self.r
        return torch.nn.functional.rms_norm(r, (r.shape[1],), self.weight, 1e-5).half()

    def check(self) -> None:
        self.ours()
        wanted = self.torch().float()
        assert (self.n.float() - wanted).norm() < 2e-3 * wanted.norm()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--budget-ms", type=float, default=30, help="device time per figure")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    timer = Timer(arguments.budget_ms)
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    for kind in (Convolution, Norm):
        kind(2, 197, 384).check()
    rate = copy_rate(timer)
    result = {**machine(), "copy_bytes_per_s": rate, "rows": []}
    for model, (channels, _) in MODELS.items():
        for length in LENGTHS:
            for batch in BATCHES:
                for kind, width in ((Convolution, channels), (Norm, channels // 2)):
                    first = kind(batch, length, width)
                    count = max(1, min(24, 4 * l2_bytes // first.bytes + 1))
                    sets = [first] + [kind(batch, length, width) for _ in range(count - 1)]
                    us, torch_us = (timer.microseconds([getattr(s, how) for s in sets]) for how in ("ours", "torch"))
                    memory_us = first.bytes / rate * 1e6
                    row = {"op": kind.__name__, "model": model, "batch": batch, "length": length, "us": us}
                    result["rows"].append({**row, "torch_us": torch_us, "memory_us": memory_us})
                    print(
                        f"{kind.__name__:12s} {model:2s} B{batch:<3d} L{length:<5d} {us:8.2f} us, torch {torch_us:8.2f}"
                        f" ({torch_us / us:4.1f} x), memory {memory_us:8.2f} ({memory_us / us:4.0%})",
                        flush=True,
                    )
                    del first, sets
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
