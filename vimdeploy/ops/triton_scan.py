"""The selective scan for CUDA tensors as one Triton kernel: for training-side code and checks, without a build step.

The kernels in kernels/cuda are the fast ones; this one needs nothing but Triton, which is imported on first use.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, union-attr"
from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from vimdeploy.errors import VimDeployError

# Set by _kernel: Triton looks names up in the globals of the module that holds the kernel.
tl: Any = None
libdevice: Any = None


@functools.cache
def _kernel() -> Any:
    global tl, libdevice
    try:
        import triton
        import triton.language as tl
        from triton.language.extra import libdevice
    except ImportError as error:
        raise VimDeployError(
            "the selective scan of CUDA tensors needs Triton; install it (pip install 'vimdeploy[triton]') or move "
            "the model to the CPU"
        ) from error

    @triton.jit
    def selective_scan_kernel(
        u, delta, A, B, C, D, z, bias, y,
        length, channels, states, per_group,
        u_batch, u_token, delta_batch, delta_token, B_batch, B_token, B_group, C_batch, C_token, C_group,
        z_batch, z_token,
        HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
        SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr,
    ):  # fmt: skip
        batch = tl.program_id(1).to(tl.int64)
        d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
        n = tl.arange(0, STATES)
        real = d < channels
        pair = real[:, None] & (n < states)[None, :]
        group = d // per_group
        a = tl.load(A + d[:, None] * states + n[None, :], mask=pair, other=0.0)
        skip = tl.load(D + d, mask=real, other=0.0) if HAS_D else tl.zeros([CHANNELS], tl.float32)
        shift = tl.load(bias + d, mask=real, other=0.0) if HAS_BIAS else tl.zeros([CHANNELS], tl.float32)
        b_at = B + batch * B_batch + group[:, None] * B_group + n[None, :]
        c_at = C + batch * C_batch + group[:, None] * C_group + n[None, :]
        state = tl.zeros([CHANNELS, STATES], tl.float32)
        for walk in range(length):
            t = (length - 1 - walk if REVERSE else walk).to(tl.int64)
            x = tl.load(u + batch * u_batch + t * u_token + d, mask=real, other=0.0).to(tl.float32)
            step = tl.load(delta + batch * delta_batch + t * delta_token + d, mask=real, other=0.0).to(tl.float32)
            step += shift
            if SOFTPLUS:
                step = tl.maximum(step, 0.0) + libdevice.log1p(tl.exp(-tl.abs(step)))
            # s + (e^x - 1) s: the exponential unit is biased just below 1, which slow decays would add up.
            b = tl.load(b_at + t * B_token, mask=pair, other=0.0).to(tl.float32)
            state += libdevice.expm1(step[:, None] * a) * state + (step * x)[:, None] * b
            c = tl.load(c_at + t * C_token, mask=pair, other=0.0).to(tl.float32)
            out = tl.sum(state * c, axis=1) + skip * x
            if HAS_Z:
                gate = tl.load(z + batch * z_batch + t * z_token + d, mask=real, other=0.0).to(tl.float32)
                out *= gate * tl.sigmoid(gate)
            tl.store(y + (batch * length + t) * channels + d, out.to(y.dtype.element_ty), mask=real)

    return selective_scan_kernel


def selective_scan_triton(
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
    """The scan of `selective_scan_ref`, on the current stream of u's device.

    u, delta, z (B, L, D) of fp16, bf16 or fp32; A (D, N) fp32, N <= 256; B, C (B, L, G, N) of u's type; D,
    delta_bias (D,) fp32. Any strides. Returns y (B, L, D), contiguous, of u's type; the state is fp32.
    Raises VimDeployError where Triton is missing or the tensors are of another kind.
    """
    if not u.is_cuda or u.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise VimDeployError(
            f"selective_scan_triton takes fp16, bf16 or fp32 CUDA tensors, not {u.dtype} on {u.device}"
        )
    batch, length, channels = u.shape
    groups, states = B.shape[2], B.shape[3]
    if states > 256:
        raise VimDeployError(f"selective_scan_triton takes at most 256 states, not {states}")
    u, delta, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (u, delta, B, C))
    if z is not None and z.stride(-1) != 1:
        z = z.contiguous()
    A = A.float().contiguous()
    D, delta_bias = (None if t is None else t.float().contiguous() for t in (D, delta_bias))
    y = torch.empty((batch, length, channels), dtype=u.dtype, device=u.device)
    if y.numel() == 0:
        return y

    kernel = _kernel()
    padded = max(1, 1 << (states - 1).bit_length())
    block = max(1, 1024 // padded) if batch * channels >= 4096 else max(1, 512 // padded)
    block = min(block, 1 << (channels - 1).bit_length())
    z_strides = (0, 0) if z is None else z.stride()[:2]
    with torch.cuda.device(u.device):
        kernel[(-(-channels // block), batch)](
            u, delta, A, B, C, u if D is None else D, u if z is None else z, u if delta_bias is None else delta_bias, y,
            length, channels, states, channels // groups,
            *u.stride()[:2], *delta.stride()[:2], *B.stride()[:3], *C.stride()[:3], *z_strides,
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None,
            SOFTPLUS=bool(delta_softplus), REVERSE=bool(reverse), CHANNELS=block, STATES=padded, num_warps=4,
        )  # fmt: skip
    return y
