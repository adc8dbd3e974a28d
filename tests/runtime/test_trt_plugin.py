"""The TensorRT plugins without a card: symbols, NVIDIA's own registries, and every question a builder asks.

The libraries are those the package holds, else they are built with nvcc for one SM (cuda_build.py).
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_build import cuda_build

from vimdeploy.export import schema

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = ROOT / "vimdeploy" / "_lib"

#: op -> its attributes, which are the creator's fields
OPS = {
    "SelectiveScan": ["delta_softplus", "reverse"],
    "BiSelectiveScan": ["delta_softplus"],
    "BiCausalConv1d": [],
    "AddRMSNorm": ["epsilon"],
}


@pytest.fixture(scope="module")
def built() -> Path:
    return cuda_build()


@pytest.fixture(scope="module")
def libraries(request: pytest.FixtureRequest) -> dict[str, Path]:
    """Paths of what there is, by target name: the package's own, else what is built here."""
    names = ("vimdeploy_trt", "vimdeploy_trt8")
    found = {name: INSTALLED / f"lib{name}.so" for name in names}
    if all(path.exists() for path in found.values()):
        return found
    folder = request.getfixturevalue("built")
    return {name: path for name in names if (path := folder / f"lib{name}.so").exists()}


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
import importlib, json, sys
import numpy as np
trt = importlib.import_module(sys.argv[1])
ops = json.loads(sys.argv[3])
registry = trt.get_plugin_registry()
assert registry.load_library(sys.argv[2]) is not None, "load_library refused it"
def field(name, value):
    if name == "epsilon":
        return trt.PluginField(name, np.array([value], np.float32), trt.PluginFieldType.FLOAT32)
    return trt.PluginField(name, np.array([value], np.int32), trt.PluginFieldType.INT32)
for op, attributes in ops.items():
    creator = registry.get_creator(op, "1", "vim")
    assert creator is not None, f"no creator of {op} in namespace vim"
    assert registry.get_creator(op, "1", "") is None, f"{op} also in the empty namespace"
    assert (creator.name, creator.plugin_version, creator.plugin_namespace) == (op, "1", "vim")
    assert [f.name for f in creator.field_names] == attributes, [f.name for f in creator.field_names]
    for phase in (trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME):
        plugin = creator.create_plugin("layer", trt.PluginFieldCollection([field(a, 1) for a in attributes]), phase)
        assert plugin is not None, op
        assert plugin.get_capability_interface(trt.PluginCapabilityType.RUNTIME) is not None, op
    wrong = trt.PluginFieldCollection([field("reverse", 7)])
    assert creator.create_plugin("layer", wrong, trt.TensorRTPhase.BUILD) is None, op
"""


@pytest.mark.parametrize("module", ["tensorrt_lean_bindings", "tensorrt_rtx_bindings"])
def test_every_op_is_in_nvidias_registry(module: str, plugin: Path) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    command = [sys.executable, "-c", _REGISTRY, module, str(plugin), json.dumps(OPS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "vim::SelectiveScan 'layer': attribute reverse is 7; it must be 0 or 1" in done.stderr
    assert "vim::AddRMSNorm 'layer': there is no attribute 'reverse'; there are epsilon" in done.stderr
    assert "vim::BiCausalConv1d 'layer': there is no attribute 'reverse'; this op has none" in done.stderr


def test_the_plugins_are_those_of_the_schema() -> None:
    assert {name: list(op.attributes) for name, op in schema.OPS.items()} == OPS


@pytest.mark.parametrize("host,library", [("trt_plugin_host", "vimdeploy_trt"), ("trt8_plugin_host", "vimdeploy_trt8")])
def test_answers_as_a_builder_asks(host: str, library: str, built: Path, libraries: dict[str, Path]) -> None:
    """tests/gpu/trt_plugin_host.cc: types, formats, shapes, fields, clones and the words of refusals, for every op."""
    if not (built / host).exists() or library not in libraries:
        pytest.skip("no headers of TensorRT 8.5: set TENSORRT8_ROOT")
    done = subprocess.run([str(built / host), str(libraries[library])], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "89 checks, 0 failed" in done.stdout
