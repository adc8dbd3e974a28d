"""The C interface of the fused ops (kernels/include/vim/bi_*.h, add_rms_norm.h) through ctypes, on numpy arrays.

Each op has `describe`, `run` (status; fills the outputs among its arrays) and a function that allocates the outputs.
Pairs are (forward, backward).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from scan_c import IO, OK, ParallelFor, library

Arrays = dict[str, Any]  # arrays, or pairs of them

_i64, _i32, _f32, _ptr = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p


class BiScanDesc(ctypes.Structure):
    _fields_ = [
        *((name, _i64) for name in ("batch", "length", "channels", "states", "groups")),
        *((name, _i32) for name in ("io", "delta_softplus", "has_D", "has_z", "has_delta_bias", "has_y_scale")),
        *((f"{tensor}_{axis}_stride", _i64 * 2) for tensor in ("u", "delta") for axis in ("batch", "token")),
        *((f"{tensor}_{axis}_stride", _i64 * 2) for tensor in ("B", "C") for axis in ("batch", "token", "group")),
        *((f"{tensor}_{axis}_stride", _i64) for tensor in ("z", "y") for axis in ("batch", "token")),
    ]


class BiScanArgs(ctypes.Structure):
    _fields_ = [
        *((name, _ptr * 2) for name in ("u", "delta", "A", "B", "C", "D", "delta_bias")),
        *((name, _ptr) for name in ("z", "y_scale", "y")),
    ]


class BiConvDesc(ctypes.Structure):
    _fields_ = [
        *((name, _i64) for name in ("batch", "length", "channels", "taps")),
        ("io", _i32),
        *((name, _i64) for name in ("x_batch_stride", "x_token_stride")),
    ]


class BiConvArgs(ctypes.Structure):
    _fields_ = [("x", _ptr), ("weight", _ptr * 2), ("bias", _ptr * 2), ("u", _ptr * 2)]


class NormDesc(ctypes.Structure):
    _fields_ = [("rows", _i64), ("channels", _i64), ("io", _i32), ("epsilon", _f32)]


class NormArgs(ctypes.Structure):
    _fields_ = [(name, _ptr) for name in ("h", "r", "weight", "n", "r_out")]


def pointers(args: ctypes.Structure, arrays: Arrays) -> ctypes.Structure:
    for name, value in arrays.items():
        if isinstance(value, np.ndarray):
            setattr(args, name, value.ctypes.data)
        else:
            getattr(args, name)[:] = [one.ctypes.data for one in value]
    return args


def _call(
    op: str, desc: ctypes.Structure, args: ctypes.Structure, isa: str | None, parallel_for: ParallelFor | None
) -> int:
    pool = ctypes.cast(parallel_for, ctypes.c_void_p) if parallel_for else None
    rest = (ctypes.byref(desc), ctypes.byref(args), pool, None)
    if isa is None:
        return getattr(library(), f"vim_{op}_cpu")(*rest)
    return getattr(library(), f"vim_{op}_cpu_isa")(isa.encode(), *rest)


def prepared(op: str, desc: ctypes.Structure, args: ctypes.Structure, arrays: Arrays, isa: str) -> Callable[[], int]:
    """The call itself, to be repeated: nothing is looked at again. One thread."""
    run = getattr(library(), f"vim_{op}_cpu_isa")
    name, rest = isa.encode(), (ctypes.byref(desc), ctypes.byref(pointers(args, arrays)), None, None)
    return lambda _keep=arrays: run(name, *rest)


def supports(op: str, desc: ctypes.Structure, size: int = 256) -> tuple[bool, str]:
    reason = ctypes.create_string_buffer(b"\xff" * size, size) if size else None
    pointer = ctypes.cast(reason, ctypes.c_char_p) if reason else None
    supported = getattr(library(), f"vim_{op}_supports")(ctypes.byref(desc), pointer, ctypes.c_size_t(size))
    return bool(supported), reason.value.decode() if reason else ""


def contiguous_bi_scan(desc: BiScanDesc, row: int, z_row: int) -> None:
    library().vim_bi_selective_scan_contiguous(ctypes.byref(desc), _i64(row), _i64(z_row))


def describe_bi_scan(arrays: Arrays, delta_softplus: bool = True) -> BiScanDesc:
    """The descriptor of these arrays with the strides they have; `arrays` includes y."""
    batch, length, channels = arrays["y"].shape
    groups, states = arrays["B"][0].shape[2:]
    desc = BiScanDesc(batch, length, channels, states, groups, IO[arrays["y"].dtype], delta_softplus)
    for name in ("D", "z", "delta_bias", "y_scale"):
        setattr(desc, f"has_{name}", name in arrays)
    for name in ("u", "delta", "B", "C"):
        for i, array in enumerate(arrays[name]):
            for axis, what in enumerate(("batch", "token", "group")[: array.ndim - 1]):
                getattr(desc, f"{name}_{what}_stride")[i] = array.strides[axis] // array.itemsize
    for name in ("z", "y"):
        if name in arrays:
            for axis, what in enumerate(("batch", "token")):
                setattr(desc, f"{name}_{what}_stride", arrays[name].strides[axis] // arrays[name].itemsize)
    return desc


def run_bi_scan(
    arrays: Arrays, isa: str | None = None, parallel_for: ParallelFor | None = None, **attributes: bool
) -> int:
    desc = describe_bi_scan(arrays, **attributes)
    return _call("bi_selective_scan", desc, pointers(BiScanArgs(), arrays), isa, parallel_for)


def bi_scan(inputs: Arrays, isa: str | None = None, **attributes: bool) -> np.ndarray:
    y = np.full(inputs["u"][0].shape, np.nan, inputs["u"][0].dtype)
    assert run_bi_scan({**inputs, "y": y}, isa, **attributes) == OK
    return y


def describe_bi_conv(arrays: Arrays) -> BiConvDesc:
    """`x` may be strided and be the first columns of longer rows."""
    x = arrays["x"]
    batch, length, channels = x.shape
    desc = BiConvDesc(batch, length, channels, arrays["weight"][0].shape[0], IO[x.dtype])
    desc.x_batch_stride, desc.x_token_stride = (stride // x.itemsize for stride in x.strides[:2])
    return desc


def run_bi_conv(arrays: Arrays, isa: str | None = None, parallel_for: ParallelFor | None = None) -> int:
    desc = describe_bi_conv(arrays)
    return _call("bi_causal_conv1d", desc, pointers(BiConvArgs(), arrays), isa, parallel_for)


def bi_conv(inputs: Arrays, isa: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    u = tuple(np.full(inputs["x"].shape, np.nan, inputs["x"].dtype) for _ in range(2))
    assert run_bi_conv({**inputs, "u": u}, isa) == OK
    return u


def run_norm(arrays: Arrays, epsilon: float, isa: str | None = None, parallel_for: ParallelFor | None = None) -> int:
    h = arrays["h"]
    channels = h.shape[-1]
    desc = NormDesc(h.size // channels, channels, IO[h.dtype], epsilon)
    return _call("add_rms_norm", desc, pointers(NormArgs(), arrays), isa, parallel_for)


def norm(inputs: Arrays, epsilon: float = 1e-5, isa: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    n, r_out = np.full_like(inputs["h"], np.nan), np.full_like(inputs["r"], np.nan)
    assert run_norm({**inputs, "n": n, "r_out": r_out}, epsilon, isa) == OK
    return n, r_out
