"""The kernels of kernels/include/vim in plain PyTorch fp64, with the methods of vimdeploy.ops.native.Kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[Tensor, Tensor]


class PlainKernels:
    """Step by step from the headers' formulas; writes over what the callers say is free, as a kernel would.

    Counts its calls in `calls`.
    """

    device = "cpu"

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    def _count(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1

    def bi_selective_scan(
        self, u: Pair, delta: Pair, A: Pair, B: Pair, C: Pair, D: Pair, z: Tensor, delta_bias: Pair, *, out: Tensor
    ) -> None:
        self._count("bi_selective_scan")
        parts = [_scan(u[i], delta[i], A[i], B[i], C[i], D[i], delta_bias[i], bool(i)) for i in range(2)]
        out.copy_((parts[0] + parts[1]) * F.silu(z.double()))

    def selective_scan(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        delta_bias: Tensor,
        *,
        out: Tensor,
        reverse: bool = False,
    ) -> None:
        self._count("selective_scan")
        out.copy_(_scan(u, delta, A, B, C, D, delta_bias, reverse))

    def bi_causal_conv1d(self, x: Tensor, weight: Pair, bias: Pair, *, out: Pair) -> None:
        self._count("bi_causal_conv1d")
        results = []
        for i in range(2):
            wide = x.double().flip(1) if i else x.double()
            taps = weight[i].double().t()[:, None]  # (D, 1, K), the last one on the current token
            y = F.conv1d(F.pad(wide.transpose(1, 2), (taps.shape[-1] - 1, 0)), taps, bias[i].double(), groups=len(taps))
            y = F.silu(y).transpose(1, 2)
            results.append(y.flip(1) if i else y)
        for target, result in zip(out, results, strict=True):
            target.copy_(result)

    def add_rms_norm(self, h: Tensor, r: Tensor, weight: Tensor, epsilon: float, *, n: Tensor, r_out: Tensor) -> None:
        self._count("add_rms_norm")
        total = h.double() + r.double()
        n.copy_(total / (total.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight.double())
        r_out.copy_(total)


def _scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    u, delta, A, B, C, D, bias = (t.double() for t in (u, delta, A, B, C, D, bias))
    step = F.softplus(delta + bias)
    state = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    y = torch.empty_like(u)
    order = range(u.shape[1])
    for t in reversed(order) if reverse else order:
        state = torch.exp(step[:, t, :, None] * A) * state + (step * u)[:, t, :, None] * B[:, t, None]
        y[:, t] = (state * C[:, t, None]).sum(-1) + D * u[:, t]
    return y
