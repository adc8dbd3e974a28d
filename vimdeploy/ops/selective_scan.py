"""The selective scan as a PyTorch operator, ``torch.ops.vim.selective_scan``.

One signature, three bodies: the recurrence itself (CPU, and the oracle of every test), a Triton kernel for CUDA
tensors, and a fake kernel that knows shapes only, for torch.export and torch.compile. The contract is design.md's
`vim::SelectiveScan` version 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Elements of the intermediate tensors of one run of tokens: small enough for a cache, large enough to amortise calls.
_ELEMENTS = 1 << 19


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    reverse: bool = False,
) -> Tensor:
    """The recurrence in fp32 (fp64 for fp64 inputs); differentiable.

    ======================  =================  =======================================
    u, delta, z             (B, L, D)          T in fp16, bf16, fp32, fp64
    A                       (D, N)             fp32, negative
    B, C                    (B, L, G, N)       T; channel d reads group d // (D / G)
    D, delta_bias           (D,)               fp32
    returns                 (B, L, D)          T
    ======================  =================  =======================================

    Source: vim-spec.md 3.3 d-g; exp for the state decay, plain Euler for the input (dt * B).
    """
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    batch, length, channels = u.shape
    groups, states = B.shape[2], B.shape[3]

    dt = delta.to(wide)
    if delta_bias is not None:
        dt = dt + delta_bias.to(wide)
    if delta_softplus:
        dt = F.softplus(dt)  # x itself above 20
    uw, Aw, Bw, Cw = u.to(wide), A.to(wide), B.to(wide), C.to(wide)
    if groups > 1:
        Bw, Cw = (x.repeat_interleave(channels // groups, dim=2) for x in (Bw, Cw))  # (B, L, D, N)
    dtu = dt * uw

    # Everything but the recurrence itself is done for a run of tokens at once: torch's price is a call, not a product.
    run = max(1, _ELEMENTS // max(1, batch * channels * states))
    starts = range(0, length, run)
    state = uw.new_zeros(batch, channels, states)
    parts: list[Tensor] = []
    for start in reversed(starts) if reverse else starts:
        tokens = slice(start, start + run)
        decay = torch.exp(dt[:, tokens, :, None] * Aw).unbind(1)  # each (B, D, N)
        gain = (dtu[:, tokens, :, None] * Bw[:, tokens]).unbind(1)
        visited: list[Tensor] = []
        for a, b in zip(reversed(decay), reversed(gain)) if reverse else zip(decay, gain):
            state = torch.addcmul(b, a, state)  # s_t = exp(dt_t A) s_{t-1} + dt_t u_t B_t
            visited.append(state)
        if reverse:
            visited.reverse()
        parts.append((torch.stack(visited, dim=1) * Cw[:, tokens]).sum(-1))  # (B, run, D)
    if reverse:
        parts.reverse()
    y = torch.cat(parts, dim=1) if parts else uw.new_zeros(batch, 0, channels)
    if D is not None:
        y = y + uw * D.to(wide)
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(u.dtype)


def _check(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, bias: Tensor | None
) -> None:
    """Refuse what the contract does not name, with the name of the input (torch._check survives tracing)."""
    torch._check(u.dim() == 3, lambda: f"selective_scan: u must be (B, L, D), has {u.dim()} dimensions")
    batch, length, channels = u.shape
    torch._check(A.dim() == 2 and A.shape[0] == channels, lambda: f"selective_scan: A must be ({channels}, N)")
    torch._check(B.dim() == 4, lambda: f"selective_scan: B must be (B, L, G, N), has {B.dim()} dimensions")
    groups, states = B.shape[2], B.shape[3]
    torch._check(
        groups > 0 and channels % groups == 0,
        lambda: f"selective_scan: {groups} groups do not divide {channels} channels",
    )
    torch._check(states == A.shape[1], lambda: f"selective_scan: B has {states} states, A has {A.shape[1]}")
    for name, tensor, shape in (
        ("delta", delta, (batch, length, channels)),
        ("B", B, (batch, length, groups, states)),
        ("C", C, (batch, length, groups, states)),
        ("z", z, (batch, length, channels)),
    ):
        if tensor is not None:
            torch._check(tensor.shape == shape, lambda n=name, t=tensor: f"selective_scan: {n} is {tuple(t.shape)}")
            torch._check(tensor.dtype == u.dtype, lambda n=name, t=tensor: f"selective_scan: {n} is {t.dtype}, not u's")
    for name, vector in (("D", D), ("delta_bias", bias)):
        if vector is not None:
            torch._check(vector.shape == (channels,), lambda n=name: f"selective_scan: {n} must be ({channels},)")


@torch.library.custom_op("vim::selective_scan", mutates_args=(), device_types="cpu")
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    reverse: bool = False,
) -> Tensor:
    """Selective scan, shapes as in `selective_scan_ref`. Raises RuntimeError naming an input that does not fit."""
    _check(u, delta, A, B, C, D, z, delta_bias)
    return selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)


@selective_scan.register_fake
def _(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=True, reverse=False):  # type: ignore[no-untyped-def]
    _check(u, delta, A, B, C, D, z, delta_bias)
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@selective_scan.register_kernel("cuda")
def _(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=True, reverse=False):  # type: ignore[no-untyped-def]
    _check(u, delta, A, B, C, D, z, delta_bias)
    if u.dtype == torch.float64:  # for checking other kernels; the Triton kernel computes in fp32
        return selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    from vimdeploy.ops.triton_scan import selective_scan_triton

    return selective_scan_triton(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)


def _keep_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.delta_softplus, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    """Gradient by running the recurrence again under autograd: exact, and no more memory than one layer needs."""
    # The dispatcher drops trailing arguments that equal their defaults, and so does needs_input_grad.
    needed = dict(enumerate(ctx.needs_input_grad))
    tensors = [
        None if t is None else t.detach().requires_grad_(needed.get(i, False)) for i, t in enumerate(ctx.saved_tensors)
    ]
    with torch.enable_grad():
        y = selective_scan_ref(*tensors, ctx.delta_softplus, ctx.reverse)  # type: ignore[call-arg, arg-type]
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    grads = iter(torch.autograd.grad(y, wanted, grad))
    every = (*(next(grads) if t is not None and t.requires_grad else None for t in tensors), None, None)
    return every[: len(needed)]


selective_scan.register_autograd(_backward, setup_context=_keep_for_backward)
