"""What tests/gpu/CMakeLists.txt builds, compiled here with nvcc for one SM. Nothing of it needs a card to load."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu-tests"


def cuda_build() -> Path:
    """The folder of the kernels, adapters and the programs that drive them; skips where they cannot be built.

    TensorRT's headers: kernel-lens, or TENSORRT_ROOT and TENSORRT8_ROOT; ONNX Runtime's: ONNXRUNTIME_ROOT, or those
    that another build here has fetched. What lacks its headers is left out.
    """
    if shutil.which("nvcc") is None or shutil.which("cmake") is None:
        pytest.skip("no nvcc and cmake to build the CUDA code")
    if _tensorrt_headers() is None:
        pytest.skip("no TensorRT headers: pip install --no-deps kernel-lens, or set TENSORRT_ROOT")
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:  # two test workers, one build
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = ["cmake", "-S", str(ROOT / "tests" / "gpu"), "-B", str(BUILD / "b")]
        configure += ["-DVIMDEPLOY_CUDA_ARCHITECTURES=90-real", f"-DCMAKE_CUDA_COMPILER={shutil.which('nvcc')}"]
        configure += [f"-DTENSORRT_ROOT={_tensorrt_headers()}", f"-DPython3_EXECUTABLE={sys.executable}"]
        if "ONNXRUNTIME_ROOT" not in os.environ and (fetched := _fetched_onnxruntime_headers()) is not None:
            configure += [f"-DONNXRUNTIME_ROOT={fetched}"]
        for command in (configure, ["cmake", "--build", str(BUILD / "b")]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return BUILD / "b" / "out"


def _tensorrt_headers() -> Path | None:
    """TensorRT 10's, as plugins/tensorrt/CMakeLists.txt finds them."""
    if "TENSORRT_ROOT" in os.environ:
        root = Path(os.environ["TENSORRT_ROOT"])
        return next((p for p in (root, root / "include") if (p / "NvInferRuntime.h").exists()), None)
    spec = importlib.util.find_spec("kernel_lens")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "include" / "tensorrt"


def _fetched_onnxruntime_headers() -> Path | None:
    return next(
        (path.parent for path in sorted(ROOT.glob("build/*/onnxruntime-headers/**/onnxruntime_cxx_api.h"))), None
    )
