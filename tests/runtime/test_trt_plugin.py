"""The TensorRT plugins without a card: symbols, NVIDIA's own registries, and every question a builder asks.

The libraries are those the package holds, else they are built here with nvcc for one SM. Headers: kernel-lens, or
TENSORRT_ROOT and TENSORRT8_ROOT.
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = ROOT / "vimdeploy" / "_lib"
BUILD = ROOT / "build" / "test-trt"

PROJECT = f"""
cmake_minimum_required(VERSION 3.18)
project(trt LANGUAGES CXX CUDA)
add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Werror>")
add_subdirectory({ROOT}/kernels/cuda kernels)
add_subdirectory({ROOT}/plugins/tensorrt plugins)
"""


def _headers() -> Path | None:
    """TensorRT 10's, as plugins/tensorrt/CMakeLists.txt finds them."""
    if "TENSORRT_ROOT" in os.environ:
        root = Path(os.environ["TENSORRT_ROOT"])
        return next((p for p in (root, root / "include") if (p / "NvInferRuntime.h").exists()), None)
    spec = importlib.util.find_spec("kernel_lens")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "include" / "tensorrt"


def _cuda_include() -> Path | None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    text = subprocess.run([nvcc, "-v", "x"], capture_output=True, text=True, check=False).stderr
    top = next((line.split("=", 1)[1] for line in text.splitlines() if line.startswith("#$ TOP=")), None)
    return Path(top) / "include" if top else None


@pytest.fixture(scope="module")
def libraries() -> dict[str, Path]:
    """Paths of what there is, by target name."""
    names = ("vimdeploy_trt", "vimdeploy_trt8")
    found = {name: INSTALLED / f"lib{name}.so" for name in names}
    if all(path.exists() for path in found.values()):
        return found
    if shutil.which("nvcc") is None or shutil.which("cmake") is None:
        pytest.skip("no TensorRT plugin in the package, and no nvcc and cmake to build one")
    if _headers() is None:
        pytest.skip("no TensorRT headers: pip install --no-deps kernel-lens, or set TENSORRT_ROOT")
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:  # two test workers, one build
        fcntl.flock(lock, fcntl.LOCK_EX)
        (BUILD / "CMakeLists.txt").write_text(PROJECT)
        configure = ["cmake", "-S", str(BUILD), "-B", str(BUILD / "b"), "-DCMAKE_BUILD_TYPE=Release"]
        configure += ["-DVIMDEPLOY_CUDA_ARCHITECTURES=90-real", f"-DCMAKE_CUDA_COMPILER={shutil.which('nvcc')}"]
        configure += [f"-DTENSORRT_ROOT={_headers()}", f"-DPython3_EXECUTABLE={sys.executable}"]
        for command in (configure, ["cmake", "--build", str(BUILD / "b")]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    built = {name: BUILD / "b" / "plugins" / f"lib{name}.so" for name in names}
    return {name: path for name, path in built.items() if path.exists()}


@pytest.fixture(scope="module")
def plugin(libraries: dict[str, Path]) -> Path:
    return libraries["vimdeploy_trt"]


def _symbols(library: Path, which: str) -> set[str]:
    text = subprocess.run(["nm", "-D", which, str(library)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].split("@")[0] for line in text.splitlines()}


def test_exports_exactly_two_symbols(plugin: Path) -> None:
    assert _symbols(plugin, "--defined-only") == {"getCreators", "setLoggerFinder"}


def test_adapters_need_no_tensorrt_and_no_cuda_library(libraries: dict[str, Path]) -> None:
    """Undefined names come from the C and C++ libraries alone, so one file loads under every TensorRT."""
    for library in libraries.values():
        text = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
        needed = {line.split("[")[1].rstrip("]") for line in text.splitlines() if "NEEDED" in line}
        known = ("libstdc++", "libm.", "libgcc_s", "libc.", "ld-linux", "libdl", "libpthread", "librt")
        assert all(name.startswith(known) for name in needed), needed
        undefined = _symbols(library, "--undefined-only")
        suspicious = ("getPluginRegistry", "getLogger", "getBuilderPluginRegistry", "createInfer", "cuda", "cu")
        assert not {name for name in undefined if name.startswith(suspicious)}


def test_tensorrt_8_adapter_exports_nothing(libraries: dict[str, Path]) -> None:
    if "vimdeploy_trt8" not in libraries:
        pytest.skip("no headers of TensorRT 8.5: set TENSORRT8_ROOT")
    assert _symbols(libraries["vimdeploy_trt8"], "--defined-only") == set()


# In a process of its own: a registry is one for a process, and TensorRT without a card writes to stderr.
_REGISTRY = """
import importlib, sys
import numpy as np
trt = importlib.import_module(sys.argv[1])
registry = trt.get_plugin_registry()
assert registry.load_library(sys.argv[2]) is not None, "load_library refused it"
creator = registry.get_creator("SelectiveScan", "1", "vim")
assert creator is not None, "no creator in namespace vim"
assert registry.get_creator("SelectiveScan", "1", "") is None, "also in the empty namespace"
print(creator.name, creator.plugin_version, creator.plugin_namespace, [f.name for f in creator.field_names])
def field(name, value):
    return trt.PluginField(name, np.array([value], np.int32), trt.PluginFieldType.INT32)
for phase in (trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME):
    fields = trt.PluginFieldCollection([field("delta_softplus", 0), field("reverse", 1)])
    plugin = creator.create_plugin("scan", fields, phase)
    runtime = plugin.get_capability_interface(trt.PluginCapabilityType.RUNTIME)
    assert plugin is not None and runtime is not None
assert creator.create_plugin("scan", trt.PluginFieldCollection([field("reverse", 7)]), trt.TensorRTPhase.BUILD) is None
print(trt.__version__)
"""


@pytest.mark.parametrize("module", ["tensorrt_lean_bindings", "tensorrt_rtx_bindings"])
def test_loads_in_nvidias_registry(module: str, plugin: Path) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", _REGISTRY, module, str(plugin)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SelectiveScan 1 vim ['delta_softplus', 'reverse']" in done.stdout
    assert "attribute reverse is 7; it must be 0 or 1" in done.stderr


def test_answers_as_a_builder_asks(plugin: Path, tmp_path: Path) -> None:
    """tests/gpu/trt_plugin_host.cc: types, formats, shapes, fields, clones and the words of each refusal."""
    headers, cuda = _headers(), _cuda_include()
    if headers is None or cuda is None:
        pytest.skip("no TensorRT or CUDA headers to compile the host with")
    host = tmp_path / "host"
    sources = ["tests/gpu/trt_plugin_host.cc", "kernels/common/selective_scan_desc.cc"]
    sources += ["kernels/cpu/selective_scan.cc", "kernels/cpu/selective_scan_baseline.cc"]
    library = next(cuda.parent.glob("**/libcudart_static.a"))
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wno-deprecated-declarations", "-I", str(ROOT / "kernels")]
    command += ["-I", str(ROOT / "kernels" / "include"), "-isystem", str(headers), "-isystem", str(cuda)]
    command += [str(ROOT / source) for source in sources] + [str(library), "-ldl", "-lrt", "-lpthread", "-o", str(host)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(host), str(plugin)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "32 checks, 0 failed" in done.stdout
