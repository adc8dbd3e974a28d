"""The C interface of kernels/include/vim/selective_scan.h through ctypes, on numpy arrays."""

from __future__ import annotations

import ctypes
import itertools
import platform
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import ml_dtypes
import numpy as np
from ort_library import ort_library

OK, UNSUPPORTED = 0, 1
# Narrowest first.
ISAS = ("neon",) if platform.machine() == "aarch64" else ("baseline", "x86-64-v3", "x86-64-v4")
IO = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 2}

Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)
ParallelFor = ctypes.CFUNCTYPE(None, ctypes.c_void_p, Body, ctypes.c_size_t, ctypes.c_void_p)


class Desc(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "length", "channels", "states", "groups")),
        *((name, ctypes.c_int32) for name in ("io", "delta_softplus", "reverse", "has_D", "has_z", "has_delta_bias")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "u_batch_stride", "u_token_stride",
                "delta_batch_stride", "delta_token_stride",
                "z_batch_stride", "z_token_stride",
                "B_batch_stride", "B_token_stride", "B_group_stride",
                "C_batch_stride", "C_token_stride", "C_group_stride",
                "y_batch_stride", "y_token_stride",
            )
        ),
    ]  # fmt: skip


class Args(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "y")]


@cache
def library() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(ort_library()))
    lib.vim_cpu_isa.restype = lib.vim_cpu_isa_at.restype = ctypes.c_char_p
    lib.vim_cpu_isa_at.argtypes = [ctypes.c_size_t]
    lib.vim_selective_scan_cpu.argtypes = [
        ctypes.POINTER(Desc), ctypes.POINTER(Args), ctypes.c_void_p, ctypes.c_void_p,
    ]  # fmt: skip
    lib.vim_selective_scan_cpu_isa.argtypes = [ctypes.c_char_p, *lib.vim_selective_scan_cpu.argtypes]
    lib.vim_selective_scan_contiguous.argtypes = [ctypes.POINTER(Desc)]
    lib.vim_selective_scan_supports.argtypes = [ctypes.POINTER(Desc), ctypes.c_char_p, ctypes.c_size_t]
    return lib


def describe(arrays: dict[str, np.ndarray], delta_softplus: bool = True, reverse: bool = False) -> Desc:
    """The descriptor of these arrays with the strides they have; `arrays` includes y."""
    batch, length, channels = arrays["u"].shape
    desc = Desc(batch, length, channels, arrays["A"].shape[1], arrays["B"].shape[2], IO[arrays["u"].dtype])
    desc.delta_softplus, desc.reverse = delta_softplus, reverse
    for name in ("D", "z", "delta_bias"):
        setattr(desc, f"has_{name}", name in arrays)
    for name in ("u", "delta", "z", "B", "C", "y"):
        if name in arrays:
            array = arrays[name]
            assert array.strides[-1] == array.itemsize or array.shape[-1] <= 1 or array.size == 0
            for axis, what in enumerate(("batch", "token", "group")[: array.ndim - 1]):
                setattr(desc, f"{name}_{what}_stride", array.strides[axis] // array.itemsize)
    return desc


def supports(desc: Desc, size: int = 256) -> tuple[bool, str]:
    reason = ctypes.create_string_buffer(b"\xff" * size, size) if size else None
    supported = library().vim_selective_scan_supports(ctypes.byref(desc), reason, size)
    return bool(supported), reason.value.decode() if reason else ""


def run(
    arrays: dict[str, np.ndarray],
    isa: str | None = None,
    parallel_for: ParallelFor | None = None,
    **attributes: bool,
) -> int:
    """Fills arrays["y"]; the kernel's status."""
    desc = describe(arrays, **attributes)
    args = Args(**{name: array.ctypes.data for name, array in arrays.items()})
    pool = ctypes.cast(parallel_for, ctypes.c_void_p) if parallel_for else None
    if isa is None:
        return library().vim_selective_scan_cpu(ctypes.byref(desc), ctypes.byref(args), pool, None)
    return library().vim_selective_scan_cpu_isa(isa.encode(), ctypes.byref(desc), ctypes.byref(args), pool, None)


def scan(inputs: dict[str, np.ndarray], isa: str | None = None, **attributes: bool) -> np.ndarray:
    y = np.full(inputs["u"].shape, np.nan, inputs["u"].dtype)
    assert run({**inputs, "y": y}, isa, **attributes) == OK
    return y


def has_isa(isa: str) -> bool:
    return run({**_SMALLEST, "y": np.empty((1, 1, 1), np.float32)}, isa) == OK


def isas_at_hand() -> list[str]:
    """As the library lists them, widest first."""
    names = (library().vim_cpu_isa_at(i) for i in itertools.count())
    return [name.decode() for name in itertools.takewhile(bool, names)]


class Threads:
    """A vim_parallel_for on Python threads, tasks in a shuffled order; remembers which ran."""

    def __init__(self, count: int) -> None:
        self.seen: list[int] = []
        self._count = count
        self.function = ParallelFor(self._run)

    def _run(self, _pool: int | None, body: Body, count: int, context: int | None) -> None:
        order = np.random.default_rng(0).permutation(count).tolist()
        with ThreadPoolExecutor(self._count) as executor:
            for index, _ in zip(order, executor.map(lambda i: body(context, i), order), strict=True):
                self.seen.append(index)


_ONE = np.ones((1, 1, 1), np.float32)
_SMALLEST = {"u": _ONE, "delta": _ONE, "A": -_ONE[0], "B": _ONE[None], "C": _ONE[None]}
