"""The CUDA kernels' C interface through ctypes, for torch CUDA tensors. Used by tests/gpu and benchmarks/."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))
from kernel_instances import instances  # noqa: E402

IO = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
GENERIC, SEQUENTIAL, LANES, STATES = 0, 1, 2, 3
OK, UNSUPPORTED, LAUNCH_FAILED = 0, 1, 2

_i64, _i32, _f32, _ptr = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p


class Variant(ctypes.Structure):
    """vim_scan_variant."""

    _fields_ = [(name, _i32) for name in ("form", "channels", "lanes", "tokens", "split", "apart", "rows", "chunks")]

    def __str__(self) -> str:
        if self.form == GENERIC:
            return "generic"
        if self.form == SEQUENTIAL:
            return f"sequential x{self.channels}"
        if self.form == STATES:
            states = f"states {self.lanes} lanes ch{self.channels} tile{self.tokens} items{self.split} rows{self.rows}"
            return states + " apart" * self.apart + (f" chunks{self.chunks}" if self.chunks > 1 else "")
        return f"lanes {self.lanes}x{self.tokens} ch{self.channels} split{self.split}" + " cluster" * self.apart

    def fields(self) -> tuple[int, ...]:
        return tuple(getattr(self, name) for name, _ in self._fields_)


def sequential(channels: int = 1) -> Variant:
    return Variant(SEQUENTIAL, channels, 0, 0, 0, 0)


def lanes(lanes: int, tokens: int, channels: int = 8, split: int = 1, cluster: int = 0) -> Variant:
    return Variant(LANES, channels, lanes, tokens, split, cluster)


def states(lanes: int, channels: int, tile: int, items: int, rows: int, apart: int = 0, chunks: int = 1) -> Variant:
    return Variant(STATES, channels, lanes, tile, items, apart, rows, chunks)


STATES_VARIANTS = [states(*each[:6]) for each in instances("VIM_STATES_INSTANCES")]
STATES_VARIANTS += [
    states(*each[:6], chunks) for each in instances("VIM_STATES_CHUNKED") for chunks in (2, 4, 5, 8, 11, 16)
]
INSTANCES = [(w, t, c) for t, w, c in instances("VIM_LANES_INSTANCES")]  # (lanes, tokens, channels)
SINGLE_VARIANTS = [sequential(1), sequential(2)] + [lanes(w, t, c, s) for w, t, c in INSTANCES for s in (1, 2, 4)]
PAIR_VARIANTS = [sequential(1), sequential(2)]
SINGLE_VARIANTS += STATES_VARIANTS
PAIR_VARIANTS += STATES_VARIANTS
PAIR_VARIANTS += [lanes(w, t, c, s, k) for w, t, c in INSTANCES for s in (1, 2, 4) for k in (0, 1)]


class _Desc(ctypes.Structure):
    _fields_ = (
        [(n, _i64) for n in ("batch", "length", "channels", "states", "groups")]
        + [(n, _i32) for n in ("io", "delta_softplus", "reverse", "has_D", "has_z", "has_delta_bias")]
        + [(f"{t}_{s}_stride", _i64) for t in ("u", "delta", "z") for s in ("batch", "token")]
        + [(f"{t}_{s}_stride", _i64) for t in ("B", "C") for s in ("batch", "token", "group")]
        + [(f"y_{s}_stride", _i64) for s in ("batch", "token")]
    )


class _Args(ctypes.Structure):
    _fields_ = [(n, _ptr) for n in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "y")]


class _BiDesc(ctypes.Structure):
    _fields_ = (
        [(n, _i64) for n in ("batch", "length", "channels", "states", "groups")]
        + [(n, _i32) for n in ("io", "delta_softplus", "has_D", "has_z", "has_delta_bias", "has_y_scale")]
        + [(f"{t}_{s}_stride", _i64 * 2) for t in ("u", "delta") for s in ("batch", "token")]
        + [(f"{t}_{s}_stride", _i64 * 2) for t in ("B", "C") for s in ("batch", "token", "group")]
        + [(f"{t}_{s}_stride", _i64) for t in ("z", "y") for s in ("batch", "token")]
    )


class _BiArgs(ctypes.Structure):
    _fields_ = [(n, _ptr * 2) for n in ("u", "delta", "A", "B", "C", "D", "delta_bias")]
    _fields_ += [(n, _ptr) for n in ("z", "y_scale", "y")]


def library() -> ctypes.CDLL:
    """The library that tests/gpu/run.sh builds, or the one VIM_CUDA_LIBRARY names."""
    global _library
    if _library is None:
        _library = ctypes.CDLL(os.environ.get("VIM_CUDA_LIBRARY", str(ROOT / "build/gpu/out/libvimdeploy_cuda.so")))
        _library.vim_cuda_last_error.restype = ctypes.c_char_p
        _library.vim_selective_scan_choose_variant.restype = Variant
        _library.vim_bi_selective_scan_choose_variant.restype = Variant
    return _library


_library: ctypes.CDLL | None = None


@dataclass
class Direction:
    """u, delta (B, L, D); A (D, N) fp32; B, C (B, L, G, N), last stride 1; D, delta_bias (D) fp32 or None."""

    u: torch.Tensor
    delta: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None = None
    delta_bias: torch.Tensor | None = None


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Call:
    """One prepared call: descriptor and arguments are built once, `run` only enqueues. Keeps its tensors alive.

    directions: one Direction, or the forward and the reverse one. z, y: (B, L, D), y is written. y_scale: (D) fp32, of
    pairs only.
    """

    def __init__(self, directions, z, y, *, reverse=False, softplus=True, y_scale=None):
        first = directions[0]
        batch, length, channels = first.u.shape
        groups, states = first.B.shape[2:]
        self.keep = (directions, z, y, y_scale)
        self.pair = len(directions) == 2
        self.desc = desc = (_BiDesc if self.pair else _Desc)()
        self.args = args = (_BiArgs if self.pair else _Args)()
        desc.batch, desc.length, desc.channels, desc.states, desc.groups = batch, length, channels, states, groups
        desc.io, desc.delta_softplus = IO[first.u.dtype], softplus
        desc.has_D, desc.has_z, desc.has_delta_bias = first.D is not None, z is not None, first.delta_bias is not None
        if self.pair:
            desc.has_y_scale, args.y_scale = y_scale is not None, _pointer(y_scale)
        else:
            desc.reverse = reverse
        for name, tensor in (("z", z), ("y", y)):
            setattr(args, name, _pointer(tensor))
            if tensor is not None:
                setattr(desc, f"{name}_batch_stride", tensor.stride(0))
                setattr(desc, f"{name}_token_stride", tensor.stride(1))
        for name in ("u", "delta", "B", "C"):
            for axis, dimension in (("batch", 0), ("token", 1), ("group", 2)):
                if axis == "group" and name in ("u", "delta"):
                    continue
                strides = [getattr(d, name).stride(dimension) for d in directions]
                setattr(desc, f"{name}_{axis}_stride", (_i64 * 2)(*strides) if self.pair else strides[0])
        for name in ("u", "delta", "A", "B", "C", "D", "delta_bias"):
            pointers = [_pointer(getattr(d, name)) for d in directions]
            setattr(args, name, (_ptr * 2)(*pointers) if self.pair else pointers[0])
        self.prefix = "vim_bi_selective_scan" if self.pair else "vim_selective_scan"
        lib = library()
        self._run = getattr(lib, f"{self.prefix}_cuda")
        self._with = getattr(lib, f"{self.prefix}_cuda_with")
        self._desc, self._args = ctypes.byref(desc), ctypes.byref(args)
        size = getattr(lib, f"{self.prefix}_cuda_workspace")
        size.restype = ctypes.c_size_t
        self.workspace = torch.empty(size(self._desc), dtype=torch.uint8, device=first.u.device)
        self._workspace = _ptr(self.workspace.data_ptr()) if len(self.workspace) else None

    def run(self, variant: Variant | None = None) -> int:
        """Enqueues on torch's current stream; the vim_status."""
        if variant is None:
            return self._run(self._desc, self._args, self._workspace, _stream())
        return self._with(self._desc, self._args, ctypes.byref(variant), self._workspace, _stream())

    def chosen(self, sm: int = 90) -> Variant:
        return getattr(library(), f"{self.prefix}_choose_variant")(self._desc, sm)


class _ConvDesc(ctypes.Structure):
    _fields_ = [(n, _i64) for n in ("batch", "length", "channels", "taps")] + [("io", _i32)]
    _fields_ += [(n, _i64) for n in ("x_batch_stride", "x_token_stride")]


class _ConvArgs(ctypes.Structure):
    _fields_ = [("x", _ptr)] + [(n, _ptr * 2) for n in ("weight", "bias", "u")]


def conv(x, weights, biases, u, **changes) -> int:
    """vim_bi_causal_conv1d_cuda on torch's current stream; the vim_status.

    x (B, L, D) of any strides but the last; weights two (taps, D), biases two (D) fp32; u two (B, L, D) contiguous,
    written. changes: fields of the descriptor to set otherwise.
    """
    batch, length, channels = x.shape
    desc = _ConvDesc(batch, length, channels, weights[0].shape[0], IO[x.dtype], x.stride(0), x.stride(1))
    for name, value in changes.items():
        setattr(desc, name, value)
    pairs = [(_ptr * 2)(*(t.data_ptr() for t in pair)) for pair in (weights, biases, u)]
    args = _ConvArgs(x.data_ptr(), *pairs)
    return library().vim_bi_causal_conv1d_cuda(ctypes.byref(desc), ctypes.byref(args), _stream())


class _NormDesc(ctypes.Structure):
    _fields_ = [("rows", _i64), ("channels", _i64), ("io", _i32), ("epsilon", _f32)]


class _NormArgs(ctypes.Structure):
    _fields_ = [(n, _ptr) for n in ("h", "r", "weight", "n", "r_out")]


def norm(h, r, weight, n, r_out, *, epsilon=1e-5) -> int:
    """vim_add_rms_norm_cuda on torch's current stream; the vim_status.

    h, n (rows, C) of one type; r, r_out (rows, C) and weight (C) fp32; n and r_out are written.
    """
    desc = _NormDesc(h.shape[0], h.shape[1], IO[h.dtype], epsilon)
    args = _NormArgs(*(t.data_ptr() for t in (h, r, weight, n, r_out)))
    return library().vim_add_rms_norm_cuda(ctypes.byref(desc), ctypes.byref(args), _stream())


def _stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def last_error() -> str:
    return library().vim_cuda_last_error().decode()
