"""The scan in float64, token by token, and inputs that show errors."""

from __future__ import annotations

import torch
from cuda_library import Direction


def scan_f64(d: Direction, z=None, *, softplus=True, reverse=False) -> torch.Tensor:
    """y (B, L, D) float64 of one direction, from the values the kernel sees (already rounded to the io type)."""
    u, delta, A, B, C = (t.double() for t in (d.u, d.delta, d.A, d.B, d.C))
    if d.delta_bias is not None:
        delta = delta + d.delta_bias.double()
    if softplus:
        delta = torch.logaddexp(delta, torch.zeros_like(delta))
    batch, length, channels = u.shape
    per_group = channels // B.shape[2]
    state = torch.zeros(batch, channels, A.shape[1], dtype=torch.float64, device=u.device)
    y = torch.empty_like(u)
    B, C = B.contiguous(), C.contiguous()
    gain = delta * u
    for t in reversed(range(length)) if reverse else range(length):
        b = B[:, t].repeat_interleave(per_group, dim=1)
        c = C[:, t].repeat_interleave(per_group, dim=1)
        state = torch.exp(delta[:, t, :, None] * A) * state + gain[:, t, :, None] * b
        y[:, t] = (state * c).sum(-1)
    if d.D is not None:
        y = y + d.D.double() * u
    return y if z is None else y * torch.nn.functional.silu(z.double())


def relative_rms(y: torch.Tensor, reference: torch.Tensor) -> float:
    """|y - reference| / |reference|; NaN where y has one."""
    return ((y.double() - reference).norm() / reference.norm().clamp_min(1e-300)).item()


def make_direction(
    batch, length, channels, dtype, *, states=16, groups=1, rank=0, decay="vim", generator=None, skip=True, bias=True
) -> Direction:
    """Random inputs of one direction.

    decay: "vim" (Delta log-uniform in 1e-3..1e-1, A near -(n+1)), "slow" (|Delta A| near 1e-4), "fast" (states forget
    within a token), "extreme" (delta of +-80). rank > 0: B and C are slices of rows of rank + 2 groups states elements.
    """
    kw = {"device": "cuda", "generator": generator}
    u = torch.randn(batch, length, channels, **kw).to(dtype)
    A = -(torch.arange(1, states + 1, device="cuda").float() * (1 + 0.4 * (torch.rand(channels, states, **kw) - 0.5)))
    step = torch.exp(torch.rand(batch, length, channels, **kw) * 4.6 - 6.9)
    if decay == "slow":
        A, step = A * 0.02, step * 0.3
    elif decay == "fast":
        step = step * 100
    raw = torch.log(torch.expm1(step.double())).float()
    delta_bias = torch.randn(channels, **kw) * 0.5 if bias else None
    if bias:
        raw = raw - delta_bias
    if decay == "extreme":
        raw = torch.where(torch.rand(batch, length, channels, **kw) < 0.5, -80.0, 80.0)
    rows = torch.randn(batch, length, rank + 2 * groups * states, **kw).to(dtype)
    B = rows[..., rank : rank + groups * states].unflatten(-1, (groups, states))
    C = rows[..., rank + groups * states :].unflatten(-1, (groups, states))
    if rank == 0:
        B, C = B.contiguous(), C.contiguous()
    D = torch.randn(channels, **kw) if skip else None
    return Direction(u, raw.to(dtype), A.contiguous(), B, C, D, delta_bias)


class Guarded:
    """A (B, L, D) output, full of NaN, inside a buffer whose other elements must stay as they are."""

    def __init__(self, shape, dtype, *, token_pad=0, offset=0, margin=4096):
        batch, length, channels = shape
        token = channels + token_pad
        self.buffer = torch.full((margin * 2 + offset + batch * length * token,), 123.0, dtype=dtype, device="cuda")
        self.view = self.buffer.as_strided(shape, (length * token, token, 1), margin + offset)
        self.view.fill_(float("nan"))
        self.mask = torch.ones_like(self.buffer, dtype=torch.bool)
        self.mask.as_strided(shape, (length * token, token, 1), margin + offset).fill_(False)

    def intact(self) -> bool:
        return bool((self.buffer[self.mask] == 123.0).all())
