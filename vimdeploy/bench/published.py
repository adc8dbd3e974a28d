"""Vim as it was published: the order of operations of hustvl's eager PyTorch code, for a baseline.

Channel-first from in_proj on, the sequence flipped and flipped back for the backward direction, B and C transposed
into tensors of their own, one scan a direction, -exp(A_log) in every pass (vim-spec.md 3.3; performance.md 1.1, "Host
side in Vim"). Where mamba-ssm and causal-conv1d are installed their kernels do the scan, the norm and the convolution,
as they did there; without them, PyTorch's own operators and one of vimdeploy's scans. `PublishedVim.describe` says
which.

Kinder to it than the original: weights lie in the low type already, which autocast would make of them in every pass.
"""

from __future__ import annotations

import copy
import ctypes
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vimdeploy.errors import RuntimeMissing, VariantError
from vimdeploy.models.fused import refusal
from vimdeploy.ops.selective_scan import selective_scan

#: (u, delta, A, B, C, D, z, delta_bias) -> gated y: u, delta, z, y (B, D, L), B, C (B, 1, N, L) of T; the rest fp32
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
_TOKENS_A_CHUNK = 2048  # of mamba-ssm's kernel, which writes a state for each


@dataclass(frozen=True)
class Parts:
    """What computes the three operators that upstream had kernels of its own for, and their names for the report."""

    scan: Scan
    conv: Callable[[Tensor, Tensor, Tensor], Tensor]  # x (B, D, L), weight (D, K), bias (D) -> silu of the convolution
    add_norm: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]  # h, r -> norm(h + r), h + r
    names: tuple[str, ...]


def find_parts(mamba_library: Path | None = None, *, cuda: bool) -> Parts:
    """Upstream's kernels where they are installed, stand-ins elsewhere.

    ``mamba_library``: mamba-ssm's forward scan built as a C function (benchmarks/scan.py says which). Raises
    RuntimeMissing when it is named and cannot be used.
    """
    names = []
    scan: Scan
    if mamba_library is not None:
        scan = _library_scan(mamba_library)
        names.append("mamba-ssm's scan")
    elif cuda and _version("mamba-ssm"):
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        def scan(u, delta, A, B, C, D, z, bias):  # type: ignore[no-untyped-def]
            return selective_scan_fn(u, delta, A, B, C, D, z, bias, True)

        names.append(f"mamba-ssm {_version('mamba-ssm')}'s scan")
    else:
        scan = _own_scan
        names.append("vimdeploy's Triton scan" if cuda else "vimdeploy's reference scan")
    conv = _torch_conv
    if cuda and _version("causal-conv1d"):
        from causal_conv1d import causal_conv1d_fn

        def conv(x, weight, bias):  # type: ignore[no-untyped-def]
            return causal_conv1d_fn(x, weight, bias, activation="silu")

        names.append(f"causal-conv1d {_version('causal-conv1d')}")
    add_norm = _torch_add_norm
    if cuda and _version("mamba-ssm"):
        from mamba_ssm.ops.triton.layer_norm import rms_norm_fn

        def add_norm(h, r, weight, eps):  # type: ignore[no-untyped-def]
            return rms_norm_fn(h, weight, None, residual=r, prenorm=True, residual_in_fp32=True, eps=eps)

        names.append("its fused norm")
    return Parts(scan, conv, add_norm, tuple(names))


class PublishedVim:
    """The network of `model` (a Vim, bimamba v2) in `dtype` as upstream runs it: images (B, C, H, W) -> logits.

    Raises VariantError for the strategies of the ablations.
    """

    def __init__(self, model: Any, parts: Parts, *, dtype: torch.dtype, device: str) -> None:
        why = refusal(model.config)
        if why is not None:
            raise VariantError(f"Vim as published does not serve this model: {why}", hint="leave out --against torch")
        self._config, self._parts, self._dtype = model.config, parts, dtype
        self._model: Any = copy.deepcopy(model).to(device, dtype).eval()
        for layer, exact in zip(self._model.layers, model.layers):
            for name in ("A_log", "A_b_log", "D", "D_b"):
                getattr(layer.mixer, name).data = getattr(exact.mixer, name).data.to(device, torch.float32)
            for name in ("dt_proj", "dt_proj_b"):
                bias = getattr(exact.mixer, name).bias
                getattr(layer.mixer, name).bias.data = bias.data.to(device, torch.float32)
            layer.norm.weight.data = exact.norm.weight.data.to(device, torch.float32)
        self._model.norm_f.weight.data = model.norm_f.weight.data.to(device, torch.float32)

    def describe(self) -> str:
        return "as published: eager PyTorch with " + ", ".join(self._parts.names)

    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self._model.parameters())

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        model, eps = self._model, self._config.norm_eps
        h, r = model.tokens(images.to(self._dtype)), None
        for layer in model.layers:
            n, r = self._parts.add_norm(h, r, layer.norm.weight, eps)
            h = self._mixer(layer.mixer, n)
        n, _ = self._parts.add_norm(h, r, model.norm_f.weight, eps)
        return model.head(model.pool(n))

    def _mixer(self, mixer: Any, n: Tensor) -> Tensor:
        # Upstream's one product in two, and batched: x and z come out contiguous, as kernels without strides want them.
        weights, biases = mixer.in_proj.weight.chunk(2), (None, None)
        if mixer.in_proj.bias is not None:
            biases = mixer.in_proj.bias.chunk(2)
        x, z = (_product(w, n.transpose(1, 2), b) for w, b in zip(weights, biases))  # (B, D, L)
        y = self._direction(mixer, x, z, "", "A_log")
        y = y + self._direction(mixer, x.flip(-1), z.flip(-1), "_b", "A_b_log").flip(-1)
        y = y.transpose(1, 2)
        if mixer.divide:
            y = y / 2
        out = F.linear(y, mixer.out_proj.weight, mixer.out_proj.bias)
        return out * mixer.gamma if hasattr(mixer, "gamma") else out

    def _direction(self, mixer: Any, x: Tensor, z: Tensor, suffix: str, A_log: str) -> Tensor:
        """(B, D, L) -> (B, D, L), gated."""
        conv, x_proj, dt_proj = (getattr(mixer, name + suffix) for name in ("conv1d", "x_proj", "dt_proj"))
        A = -torch.exp(getattr(mixer, A_log).float())
        u = self._parts.conv(x, conv.weight[:, 0], conv.bias)
        rows = F.linear(u.transpose(1, 2), x_proj.weight)  # (B, L, R + 2N)
        dt, B, C = rows.split([mixer.rank, mixer.d_state, mixer.d_state], dim=-1)
        delta = _product(dt_proj.weight, dt.transpose(1, 2), None)  # (B, D, L)
        B, C = (t.transpose(1, 2).unsqueeze(1).contiguous() for t in (B, C))
        return self._parts.scan(u, delta, A, B, C, getattr(mixer, "D" + suffix).float(), z, dt_proj.bias.float())


def _product(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """weight (D, C) times x (B, C, L), plus bias (D,); contiguous, which matmul's is not."""
    y = torch.bmm(weight.expand(len(x), -1, -1), x)
    return y if bias is None else y + bias[:, None]


def _torch_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    reach = weight.shape[1] - 1
    return F.silu(F.conv1d(x, weight[:, None], bias, padding=reach, groups=len(weight))[..., : x.shape[-1]])


def _torch_add_norm(h: Tensor, r: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    r = h.float() if r is None else r + h
    return F.rms_norm(r, (r.shape[-1],), weight, eps).to(h.dtype), r


def _own_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
    """vimdeploy's op is channel-last: it reads transposed views, which its Triton kernel copies first."""
    u, delta, z = (t.transpose(1, 2) for t in (u, delta, z))
    B, C = (t.permute(0, 3, 1, 2) for t in (B, C))
    return selective_scan(u, delta, A, B, C, D, z, bias).transpose(1, 2)


def _library_scan(path: Path) -> Scan:
    try:
        function = ctypes.CDLL(str(path)).mamba_selective_scan
    except (OSError, AttributeError) as error:
        raise RuntimeMissing(f"{path} has no mamba_selective_scan: {error}", hint="build it again") from error

    def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        batch, channels, length = u.shape
        u, delta, z = (t.contiguous() for t in (u, delta, z))  # which they are: the C function takes no strides
        out, out_z = torch.empty_like(u), torch.empty_like(u)
        chunks = -(-length // _TOKENS_A_CHUNK)
        states = torch.empty(batch, channels, chunks, 2 * A.shape[1], device=u.device)
        tensors = (u, delta, A, B, C, D, z, bias, out, out_z, states)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
        stream = ctypes.c_void_p(torch.cuda.current_stream(u.device).cuda_stream)
        function(int(u.dtype == torch.float16), batch, channels, length, *pointers, stream)
        return out_z

    return scan


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
