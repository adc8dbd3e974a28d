"""The CUDA kernels built for the CPU: tests/cpp/cuda_on_cpu.h in the place of what only nvcc understands."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_LAUNCH = (r"(\w[\w<>, ]*?)<<<(.+?), ([^,]+), (\w+), stream>>>\((.*?)\);", r"emulated::Launch(\1, \2, \3, \4, \5);")
_ATTRIBUTE = (r"cudaFuncSetAttribute\(kernel,[^;]*\);", "cudaSuccess;")
_ERROR = (r"cudaGetLastError\(\)", "cudaSuccess")
Replaced = dict[str, tuple[tuple[str, str], ...]]
_MATH: Replaced = {"cuda/math.cuh": ((r'asm\("ex2.*\n', "y = exp2f(x);\n"), (r'asm\("rcp.*\n', "y = 1.0f / x;\n"))}
#: file -> what only nvcc understands, and what stands for it
SCAN: Replaced = {
    **_MATH,
    "cuda/generic.cuh": (_LAUNCH, _ERROR),
    "cuda/sequential.cuh": (
        _LAUNCH,
        _ERROR,
        (r'asm volatile\("bar.sync (\d).*\n', r"emulated::Block::running->WaitFor(\1, kSequentialThreads);\n"),
        (
            r"__shared__ (SequentialShared<IO, kChannels>) shared\[2\];",
            r"auto& shared = *reinterpret_cast<\1(*)[2]>(shared_memory);",
        ),
    ),
    "cuda/launch.cuh": (
        _LAUNCH,
        _ATTRIBUTE,
        _ERROR,
        (
            r"return cudaLaunchKernelEx\(&config, kernel, args...\);",
            "emulated::Launch(kernel, config.gridDim.x, threads, shared, args...); return cudaSuccess;",
        ),
    ),
    "cuda/lanes.cuh": (
        (
            r"asm volatile\(\s*\"\{ \.reg \.pred in; \.reg \.f32 d(?s:.*?)\"r\"\(offset\)\);",
            "emulated::ScanStep(decay, state, offset);",
        ),
        (
            r"asm volatile\(\s*\"\{ \.reg \.pred in; \.reg \.f32 v(?s:.*?)\"r\"\(offset\)\);",
            "emulated::FromLaneBefore(value, first, offset);",
        ),
    ),
}
FUSED: Replaced = {
    **_MATH,
    "cuda/bi_causal_conv1d.cu": (_LAUNCH, _ERROR),
    "cuda/add_rms_norm.cu": (
        _LAUNCH,
        _ERROR,
        (
            r"__shared__ float parts\[(kRowThreads / 32)\];",
            r"auto& parts = *reinterpret_cast<float(*)[\1]>(shared_memory);",
        ),
    ),
}


def build(folder: Path, changes: Replaced | None = None) -> ctypes.CDLL:
    """The scan's kernels, with `changes` of one's own besides. Skips where it cannot be."""
    return _compiled(folder, SCAN, changes or {}, [ROOT / "tests/cpp/scan_on_cpu.cc"])


def build_fused(folder: Path, changes: Replaced | None = None) -> ctypes.CDLL:
    """The kernels around the scan, the same way."""
    descs = [ROOT / f"kernels/common/{name}_desc.cc" for name in ("add_rms_norm", "bi_causal_conv1d")]
    return _compiled(folder, FUSED, changes or {}, [ROOT / "tests/cpp/fused_on_cpu.cc", *descs])


def _compiled(folder: Path, replaced: Replaced, changes: Replaced, sources: list[Path]) -> ctypes.CDLL:
    nvcc, compiler = shutil.which("nvcc"), shutil.which("g++")
    headers = [Path(nvcc).resolve().parents[1] / "include"] if nvcc else []
    headers = [each for each in (*headers, Path("/usr/local/cuda/include")) if (each / "cuda_fp16.h").is_file()]
    if not headers or compiler is None:
        pytest.skip("no CUDA headers, or no g++")
    for name in {**replaced, **changes}:
        text = (ROOT / "kernels" / name).read_text()
        for pattern, replacement in (*replaced.get(name, ()), *changes.get(name, ())):
            text, count = re.subn(pattern, replacement, text)
            assert count, f"{name} has nothing like {pattern}"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    out = folder / f"{sources[0].stem}.so"
    includes = [folder, ROOT / "kernels", ROOT / "kernels/include", ROOT / "tests/cpp", headers[0]]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", *(f"-I{each}" for each in includes)]
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(out)], check=True)
    return ctypes.CDLL(str(out))


class Direction(ctypes.Structure):
    """vim::cuda::Direction."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("u", "delta", "B", "C", "A", "D", "delta_bias")] + [
        (name, ctypes.c_int64)
        for name in (
            *("u_batch", "u_token", "delta_batch", "delta_token"),
            *(f"{name}_{what}" for name in "BC" for what in ("batch", "token", "group")),
        )
    ]


class Params(ctypes.Structure):
    """vim::cuda::Params."""

    _fields_ = [
        ("direction", Direction * 2),
        *((name, ctypes.c_void_p) for name in ("z", "y_scale", "y")),
        *((name, ctypes.c_int64) for name in ("z_batch", "z_token", "y_batch", "y_token")),
        *((name, ctypes.c_int) for name in ("batch", "length", "channels", "states", "groups", "channels_per_group")),
        *((name, ctypes.c_int) for name in ("pair", "reverse", "delta_softplus", "add_to_y", "state_granule")),
        ("workspace", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("chunks", "chunk_tokens")),
    ]
