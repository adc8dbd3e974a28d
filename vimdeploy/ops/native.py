"""vimdeploy's compiled kernels on PyTorch tensors: the C interface of kernels/include/vim through ctypes.

Two libraries have the same functions: libvimdeploy_cuda.so (`..._cuda`, on torch's current stream) for CUDA tensors,
and ONNX Runtime's op library (`..._cpu`) for tensors on the CPU. A call checks shapes, types and strides, because a
kernel given a wrong pointer does not say so; it waits for nothing and takes no memory but a long scan's workspace,
from torch, so it may be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vimdeploy.errors import RuntimeMissing, VimDeployError

IO = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # vim_dtype
_OK, _UNSUPPORTED = 0, 1  # vim_status

#: forward and reverse direction
Pair = tuple[Tensor, Tensor]

_i64, _i32, _f32, _ptr = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p


class KernelError(VimDeployError):
    """A kernel refused what it was given, or CUDA refused the launch."""

    exit_code = 3


class _ScanDesc(ctypes.Structure):
    """vim_selective_scan_desc"""

    _fields_ = [
        *((name, _i64) for name in ("batch", "length", "channels", "states", "groups")),
        *((name, _i32) for name in ("io", "delta_softplus", "reverse", "has_D", "has_z", "has_delta_bias")),
        *((f"{tensor}_{axis}_stride", _i64) for tensor in ("u", "delta", "z") for axis in ("batch", "token")),
        *((f"{tensor}_{axis}_stride", _i64) for tensor in ("B", "C") for axis in ("batch", "token", "group")),
        *((f"y_{axis}_stride", _i64) for axis in ("batch", "token")),
    ]


class _ScanArgs(ctypes.Structure):
    """vim_selective_scan_args"""

    _fields_ = [(name, _ptr) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "y")]


class _BiScanDesc(ctypes.Structure):
    """vim_bi_selective_scan_desc"""

    _fields_ = [
        *((name, _i64) for name in ("batch", "length", "channels", "states", "groups")),
        *((name, _i32) for name in ("io", "delta_softplus", "has_D", "has_z", "has_delta_bias", "has_y_scale")),
        *((f"{tensor}_{axis}_stride", _i64 * 2) for tensor in ("u", "delta") for axis in ("batch", "token")),
        *((f"{tensor}_{axis}_stride", _i64 * 2) for tensor in ("B", "C") for axis in ("batch", "token", "group")),
        *((f"{tensor}_{axis}_stride", _i64) for tensor in ("z", "y") for axis in ("batch", "token")),
    ]


class _BiScanArgs(ctypes.Structure):
    """vim_bi_selective_scan_args"""

    _fields_ = [
        *((name, _ptr * 2) for name in ("u", "delta", "A", "B", "C", "D", "delta_bias")),
        *((name, _ptr) for name in ("z", "y_scale", "y")),
    ]


class _ConvDesc(ctypes.Structure):
    """vim_bi_causal_conv1d_desc"""

    _fields_ = [
        *((name, _i64) for name in ("batch", "length", "channels", "taps")),
        ("io", _i32),
        *((f"x_{axis}_stride", _i64) for axis in ("batch", "token")),
    ]


class _ConvArgs(ctypes.Structure):
    """vim_bi_causal_conv1d_args"""

    _fields_ = [("x", _ptr), ("weight", _ptr * 2), ("bias", _ptr * 2), ("u", _ptr * 2)]


class _NormDesc(ctypes.Structure):
    """vim_add_rms_norm_desc"""

    _fields_ = [("rows", _i64), ("channels", _i64), ("io", _i32), ("epsilon", _f32)]


class _NormArgs(ctypes.Structure):
    """vim_add_rms_norm_args"""

    _fields_ = [(name, _ptr) for name in ("h", "r", "weight", "n", "r_out")]


class Kernels:
    """The four kernels of a fused Vim in the library at `path`, for tensors on `device` ("cuda" or "cpu").

    Raises RuntimeMissing when the library is not there, does not load, or lacks a function. Thread-safe as the C
    interface is; every call enqueues on the current stream of its tensors' device.
    """

    _FUNCTIONS = ("vim_bi_selective_scan", "vim_selective_scan", "vim_bi_causal_conv1d", "vim_add_rms_norm")

    def __init__(self, path: Path, device: str = "cuda") -> None:
        self.path, self.device = path, device
        if not path.is_file():
            raise RuntimeMissing(f"the kernel library {path} is not a file", hint="name the built library")
        try:
            library = ctypes.CDLL(str(path))
            self._run = {name: getattr(library, f"{name}_{device}") for name in self._FUNCTIONS}
        except OSError as error:
            raise RuntimeMissing(
                f"the kernel library {path} cannot be loaded: {error}", hint="build it on this host"
            ) from error
        except AttributeError as error:
            raise RuntimeMissing(
                f"{path} lacks a kernel of this vimdeploy ({error})", hint="use the library of this version"
            ) from error
        self._supports = {name: getattr(library, f"{name}_supports") for name in self._FUNCTIONS}
        for function in (*self._run.values(), *self._supports.values()):
            function.restype = ctypes.c_int
        self._workspace: dict[str, Any] = {}
        if device == "cuda":
            library.vim_cuda_last_error.restype = ctypes.c_char_p
            for name in ("vim_bi_selective_scan", "vim_selective_scan"):
                self._workspace[name] = getattr(library, f"{name}_cuda_workspace")
                self._workspace[name].restype = ctypes.c_size_t
        self._library = library

    def bi_selective_scan(
        self,
        u: Pair,
        delta: Pair,
        A: Pair,
        B: Pair,
        C: Pair,
        D: Pair,
        z: Tensor,
        delta_bias: Pair,
        *,
        out: Tensor,
        y_scale: Tensor | None = None,
    ) -> None:
        """out = (scan(u[0], ...) + reverse scan(u[1], ...)) * silu(z) * y_scale, softplus on delta + delta_bias.

        u, delta (B, L, D), z, out (B, L, D) of T, last stride 1; B, C (B, L, N) of T; A (D, N), D, delta_bias, y_scale
        (D) fp32, contiguous. See kernels/include/vim/bi_selective_scan.h. Raises KernelError.
        """
        what = "bi_selective_scan"
        batch, length, channels = self._sizes(what, out)
        states = A[0].shape[-1]
        desc = _BiScanDesc(batch, length, channels, states, 1, IO[out.dtype], 1, 1, 1, 1, y_scale is not None)
        args = _BiScanArgs(z=self._data(what, "z", z, out), y=self._data(what, "out", out, out))
        desc.z_batch_stride, desc.z_token_stride, _ = z.stride()
        desc.y_batch_stride, desc.y_token_stride, _ = out.stride()
        for name, pair, shape in (
            ("u", u, (batch, length, channels)),
            ("delta", delta, (batch, length, channels)),
            ("B", B, (batch, length, states)),
            ("C", C, (batch, length, states)),
        ):
            for i, tensor in enumerate(pair):
                getattr(args, name)[i] = self._data(what, name, tensor, out, shape)
                getattr(desc, f"{name}_batch_stride")[i] = tensor.stride(0)
                getattr(desc, f"{name}_token_stride")[i] = tensor.stride(1)
            if name in "BC":
                getattr(desc, f"{name}_group_stride")[:] = (states, states)
        for i in range(2):
            args.A[i] = self._fp32(what, "A", A[i], out, (channels, states))
            args.D[i] = self._fp32(what, "D", D[i], out, (channels,))
            args.delta_bias[i] = self._fp32(what, "delta_bias", delta_bias[i], out, (channels,))
        if y_scale is not None:
            args.y_scale = self._fp32(what, "y_scale", y_scale, out, (channels,))
        self._launch("vim_bi_selective_scan", desc, args, out)

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
        """One direction, not gated: shapes as in `bi_selective_scan` (kernels/include/vim/selective_scan.h)."""
        what = "selective_scan"
        batch, length, channels = self._sizes(what, out)
        states = A.shape[-1]
        desc = _ScanDesc(batch, length, channels, states, 1, IO[out.dtype], 1, reverse, 1, 0, 1)
        args = _ScanArgs()
        for name, tensor, shape in (
            ("u", u, (batch, length, channels)),
            ("delta", delta, (batch, length, channels)),
            ("B", B, (batch, length, states)),
            ("C", C, (batch, length, states)),
            ("y", out, (batch, length, channels)),
        ):
            setattr(args, name, self._data(what, name, tensor, out, shape))
            setattr(desc, f"{name}_batch_stride", tensor.stride(0))
            setattr(desc, f"{name}_token_stride", tensor.stride(1))
        desc.B_group_stride = desc.C_group_stride = states
        args.A = self._fp32(what, "A", A, out, (channels, states))
        args.D = self._fp32(what, "D", D, out, (channels,))
        args.delta_bias = self._fp32(what, "delta_bias", delta_bias, out, (channels,))
        self._launch("vim_selective_scan", desc, args, out)

    def bi_causal_conv1d(self, x: Tensor, weight: Pair, bias: Pair, *, out: Pair) -> None:
        """out[0], out[1] = silu(causal convolution of x), forward and mirrored.

        x (B, L, D) of T, last stride 1; weight (K, D), bias (D) fp32; out (B, L, D) of T, contiguous. See
        kernels/include/vim/bi_causal_conv1d.h. Raises KernelError.
        """
        what = "bi_causal_conv1d"
        batch, length, channels = self._sizes(what, out[0])
        taps = weight[0].shape[0]
        desc = _ConvDesc(batch, length, channels, taps, IO[x.dtype], *x.stride()[:2])
        args = _ConvArgs(x=self._data(what, "x", x, out[0], (batch, length, channels)))
        for i in range(2):
            args.weight[i] = self._fp32(what, "weight", weight[i], out[0], (taps, channels))
            args.bias[i] = self._fp32(what, "bias", bias[i], out[0], (channels,))
            args.u[i] = self._data(what, "out", out[i], out[0], (batch, length, channels), contiguous=True)
        self._launch("vim_bi_causal_conv1d", desc, args, out[0])

    def add_rms_norm(self, h: Tensor, r: Tensor, weight: Tensor, epsilon: float, *, n: Tensor, r_out: Tensor) -> None:
        """r_out = h + r, n = r_out / rms(r_out) * weight; r_out may be r.

        h, n (rows, C) of T; r, r_out (rows, C), weight (C) fp32; all contiguous. See
        kernels/include/vim/add_rms_norm.h. Raises KernelError.
        """
        what = "add_rms_norm"
        rows, channels = n.shape
        desc = _NormDesc(rows, channels, IO[n.dtype], epsilon)
        args = _NormArgs(
            self._data(what, "h", h, n, (rows, channels), contiguous=True),
            self._fp32(what, "r", r, n, (rows, channels)),
            self._fp32(what, "weight", weight, n, (channels,)),
            self._data(what, "n", n, n, (rows, channels), contiguous=True),
            self._fp32(what, "r_out", r_out, n, (rows, channels)),
        )
        self._launch("vim_add_rms_norm", desc, args, n)

    def _launch(self, name: str, desc: ctypes.Structure, args: ctypes.Structure, like: Tensor) -> None:
        desc_at, args_at = ctypes.byref(desc), ctypes.byref(args)
        if self.device == "cpu":
            status = self._run[name](desc_at, args_at, None, None)
        else:
            stream = _ptr(torch.cuda.current_stream(like.device).cuda_stream)
            with torch.cuda.device(like.device):
                if name in self._workspace:
                    size = self._workspace[name](desc_at)
                    scratch = torch.empty(size, dtype=torch.uint8, device=like.device) if size else None
                    workspace = None if scratch is None else _ptr(scratch.data_ptr())
                    status = self._run[name](desc_at, args_at, workspace, stream)
                else:
                    status = self._run[name](desc_at, args_at, stream)
        if status == _OK:
            return
        if status == _UNSUPPORTED:
            reason = ctypes.create_string_buffer(512)
            self._supports[name](desc_at, reason, ctypes.c_size_t(len(reason)))
            raise KernelError(
                f"{name}: {reason.value.decode() or 'the kernel does not do that'}", hint="run the ONNX file instead"
            )
        raise KernelError(f"{name}: {self._library.vim_cuda_last_error().decode()}", hint="check the card")

    def _sizes(self, what: str, out: Tensor) -> tuple[int, int, int]:
        if out.dim() != 3 or out.dtype not in IO or out.device.type != self.device:
            raise KernelError(
                f"{what}: out must be (B, L, D) of fp32, fp16 or bf16 on {self.device}, not {_of(out)}",
                hint="pass such a tensor",
            )
        return out.shape[0], out.shape[1], out.shape[2]

    def _data(
        self,
        what: str,
        name: str,
        tensor: Tensor,
        like: Tensor,
        shape: Sequence[int] | None = None,
        contiguous: bool = False,
    ) -> int:
        """The address of a tensor of like's type whose rows the kernel can walk."""
        shape = tuple(shape or like.shape)
        good = tensor.dtype == like.dtype and tensor.device == like.device and tuple(tensor.shape) == shape
        if not good or tensor.stride(-1) != 1 or (contiguous and not tensor.is_contiguous()):
            need = f"{shape} of {like.dtype} on {like.device}, {'contiguous' if contiguous else 'last stride 1'}"
            raise KernelError(f"{what}: {name} must be {need}, not {_of(tensor)}", hint="pass such a tensor")
        return tensor.data_ptr()

    def _fp32(self, what: str, name: str, tensor: Tensor, like: Tensor, shape: Sequence[int]) -> int:
        good = tensor.dtype == torch.float32 and tensor.device == like.device and tuple(tensor.shape) == tuple(shape)
        if not good or not tensor.is_contiguous():
            need = f"{tuple(shape)} of torch.float32 on {like.device}, contiguous"
            raise KernelError(f"{what}: {name} must be {need}, not {_of(tensor)}", hint="pass such a tensor")
        return tensor.data_ptr()


def _of(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}, strides {tensor.stride()}"
