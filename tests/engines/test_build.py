"""engines/build.py around a stand-in for TensorRT 8.5: what it is asked for, what is written, what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from fake_tensorrt import Flag, Layer, LayerType, Network, fake_tensorrt, install, plugin_file
from tiny_onnx import write_tiny_onnx

import vimdeploy.engines.build as build_module
from vimdeploy.bundle import sha256_of
from vimdeploy.engines.build import BuildOptions, BuildResult, build_engine, constrain
from vimdeploy.engines.capabilities import capabilities_of
from vimdeploy.engines.sidecar import read_sidecar
from vimdeploy.errors import CheckFailed, EngineError, ModelFileError, RuntimeMissing, UsageError, VimDeployError

FORMATS = {kind: f"Row major linear {kind.upper()} format" for kind in ("fp32", "fp16", "bf16")}


def inspected(precision: str) -> list[dict[str, Any]]:
    """The inspector's list for tiny_onnx's model, whose one projection has no name of its own: MatMul."""
    tensor = [{"Name": "t", "Format/Datatype": FORMATS[precision]}]
    return [{"Name": "MatMul", "LayerType": "MatrixMultiply", "Inputs": tensor, "Outputs": tensor}]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = write_tiny_onnx(tmp_path / "tiny.vim" / "model.onnx")
    proto = onnx.load(str(path))
    for node in proto.graph.node:
        node.name = node.name or node.op_type
    proto = onnx.shape_inference.infer_shapes(proto)
    for value in proto.graph.value_info:
        value.type.tensor_type.elem_type = value.type.tensor_type.elem_type or onnx.TensorProto.FLOAT
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 1, 3])
    tail = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", 3]) for n in ("y2", "product")]
    proto.graph.value_info.extend([y, *tail])
    onnx.save(proto, str(path))
    return path


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    return plugin_file(tmp_path)


def build(
    monkeypatch: pytest.MonkeyPatch, model: Path, plugin: Path, module: Any = None, **options: Any
) -> tuple[BuildResult, Any]:
    module = module or fake_tensorrt(layers=inspected(options.get("precision") or "fp32"))
    install(monkeypatch, module)
    # As on a host that has neither cuBLAS nor cuDNN.
    monkeypatch.setattr(build_module, "_SOURCES", dict.fromkeys(build_module._SOURCES, ("libnone.so", "f")))
    return build_engine(model, None, BuildOptions(plugin=plugin, **options)), module.seen


def test_cublas_of_another_cuda_than_tensorrts_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """8.5 loads libcublas.so.11 and fails at the end of a build without it, whatever else the host has."""

    def load(name: str, mode: int) -> SimpleNamespace:
        if ".13" not in name:
            raise OSError(name)
        return SimpleNamespace(cublasCreate_v2=0, cublasLtCreate=0)

    monkeypatch.setattr(build_module.ctypes, "CDLL", load)
    module = fake_tensorrt(layers=inspected("fp32"))
    old = capabilities_of(module, "tensorrt")
    assert old.cuda_majors == (11,)
    every = sum(1 << int(getattr(module.TacticSource, name)) for name in build_module._SOURCES)
    cudnn = 1 << int(module.TacticSource.CUDNN)
    assert build_module._absent_tactics(module, old) == every
    newer = dataclasses.replace(old, cuda_majors=(12, 13))
    assert build_module._absent_tactics(module, newer) == cudnn


def test_an_fp16_build_on_8_5(monkeypatch: pytest.MonkeyPatch, model: Path, plugin: Path) -> None:
    cache = model.parent / "timing.cache"
    result, seen = build(
        monkeypatch, model, plugin, precision="fp16", max_batch=16, workspace=1 << 20, timing_cache=cache
    )
    config = seen["config"]
    assert config.flags == {Flag.FP16, Flag.OBEY_PRECISION_CONSTRAINTS}  # TF32, on by default, is off
    assert config.workspace == 1 << 20 and seen["network_flags"] == 1
    assert config.sources == 0
    assert config.profiles[0].shapes == ("image", (1, 3, 32, 32), (8, 3, 32, 32), (16, 3, 32, 32))
    given = onnx.load_from_string(seen["onnx"])
    assert {o.domain: o.version for o in given.opset_import} == {"": 14, "vim": 1} and not given.functions
    assert any(t.data_type == onnx.TensorProto.FLOAT16 for t in given.graph.initializer)
    sidecar = read_sidecar(result.plan)
    assert sidecar.plugin == {
        "file": str(plugin), "sha256": sha256_of(plugin), "ops": ["SelectiveScan"], "version": "1", "namespace": "vim"
    }  # fmt: skip
    assert sidecar.device == {"name": "NVIDIA H100 80GB HBM3", "sm": 90, "driver": "13.0"}
    assert sidecar.build["timing_cache"] == {"file": "timing.cache", "warm": False, "bytes_before": 0}
    assert cache.read_bytes() == b"timings" and not result.notices
    again, seen = build(monkeypatch, model, plugin, precision="fp16", timing_cache=cache)
    assert again.sidecar.build["timing_cache"]["warm"] and seen["config"].cache == b"timings"


def test_tf32_when_asked_for(monkeypatch: pytest.MonkeyPatch, model: Path, plugin: Path) -> None:
    result, seen = build(monkeypatch, model, plugin, tf32=True)
    assert seen["config"].flags == {Flag.TF32} and result.sidecar.tf32
    assert result.plan.name == "model.fp32.plan"


def test_one_batch_makes_constant_shapes(monkeypatch: pytest.MonkeyPatch, model: Path, plugin: Path) -> None:
    _, seen = build(monkeypatch, model, plugin, min_batch=4, opt_batch=4, max_batch=4)
    given = onnx.load_from_string(seen["onnx"])
    assert given.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 4


def test_types_become_constraints() -> None:
    module = fake_tensorrt()
    kinds = module.DataType
    layers = (
        Layer(LayerType.MATRIX_MULTIPLY, "low"),
        Layer(LayerType.MATRIX_MULTIPLY, "wide"),
        Layer(LayerType.PLUGIN_V2, "low"),
        Layer(LayerType.IDENTITY, "low"),
        Layer(LayerType.CONSTANT, "low"),
        Layer(LayerType.MATRIX_MULTIPLY, "(Unnamed Layer* 3) [Shuffle]_output"),
    )
    constrain(module, Network(layers), {"low": "fp16", "wide": "fp32"})
    half, full = kinds.HALF, kinds.FLOAT
    assert [layer.output_types.get(0) for layer in layers] == [half, full, half, half, None, None]
    # A plugin's A and D stay fp32; a cast computes in neither type.
    assert [layer.precision for layer in layers] == [half, full, None, None, None, None]


def refused(
    monkeypatch: pytest.MonkeyPatch, error: type[VimDeployError], model: Path, plugin: Path, **rest: Any
) -> str:
    before = {path: path.read_bytes() for path in model.parent.iterdir()}
    with pytest.raises(error) as caught:
        build(monkeypatch, model, plugin, **rest)
    assert caught.value.hint
    assert {path: path.read_bytes() for path in model.parent.iterdir()} == before, "something was left behind"
    return caught.value.message


def test_a_quiet_fp32_build_is_no_fp16_engine(monkeypatch: pytest.MonkeyPatch, model: Path, plugin: Path) -> None:
    said = refused(
        monkeypatch, CheckFailed, model, plugin, module=fake_tensorrt(layers=inspected("fp32")), precision="fp16"
    )
    assert said == "1 of 1 projections are not in fp16 in the engine: MatMul (fp32)"


def test_what_this_tensorrt_cannot_do(monkeypatch: pytest.MonkeyPatch, model: Path, plugin: Path) -> None:
    assert refused(monkeypatch, UsageError, model, plugin, precision="bf16") == "TensorRT 8.5.3.1 has no bf16"
    assert "no version-compatible" in refused(monkeypatch, UsageError, model, plugin, version_compatible=True)


def test_too_little_workspace(monkeypatch: pytest.MonkeyPatch, model: Path, plugin: Path) -> None:
    errors = ["Could not find any implementation for node MatMul due to insufficient workspace.", "engine is null"]
    module = fake_tensorrt(build_errors=errors)
    said = refused(monkeypatch, EngineError, model, plugin, module=module, workspace=1 << 20)
    assert said.startswith("TensorRT 8.5.3.1 found no kernel for a layer within a workspace of 1 MiB: Could not find")
    # Without the option the builder's first error, the cause, comes before the last.
    said = refused(monkeypatch, EngineError, model, plugin, module=fake_tensorrt(build_errors=errors))
    assert said.endswith("due to insufficient workspace.; then engine is null")


def test_the_parsers_words(monkeypatch: pytest.MonkeyPatch, model: Path, plugin: Path) -> None:
    names = [node.op_type for node in onnx.load(str(model)).graph.node]
    scan = next(i for i, name in enumerate(names) if name == "SelectiveScan")
    module = fake_tensorrt(parse_errors=[(scan, 'Assertion failed: creator && "Plugin not found"')])
    said = refused(monkeypatch, RuntimeMissing, model, plugin, module=module)
    assert "found no plugin SelectiveScan, version 1, namespace 'vim'" in said and "SelectiveScan: Assertion" in said
    module = fake_tensorrt(parse_errors=[(0, "Plugin not found"), (99, "x")])
    assert "cannot read" in refused(monkeypatch, EngineError, model, plugin, module=module)


def test_plugins_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, model: Path, plugin: Path, tmp_path: Path) -> None:
    assert "is not a file" in refused(monkeypatch, RuntimeMissing, model, tmp_path / "gone.so")
    text = tmp_path / "text.so"
    text.write_text("#!/bin/sh\n" * 4)
    assert "is not a shared library" in refused(monkeypatch, RuntimeMissing, model, text)
    other = tmp_path / "other.so"
    content = bytearray(plugin.read_bytes())
    content[18:20] = (183 if content[18] == 62 else 62).to_bytes(2, "little")
    other.write_bytes(content)
    assert "is built for" in refused(monkeypatch, RuntimeMissing, model, other)
    broken = refused(monkeypatch, RuntimeMissing, model, plugin, module=fake_tensorrt(creators=[]))
    assert "cannot be loaded" in broken


def test_a_timing_cache_of_another_card(monkeypatch: pytest.MonkeyPatch, model: Path, plugin: Path) -> None:
    cache = model.parent / "t.cache"
    cache.write_bytes(b"of another card")
    assert "not a timing cache of this" in refused(monkeypatch, ModelFileError, model, plugin, timing_cache=cache)
    assert "is a folder" in refused(monkeypatch, UsageError, model, plugin, timing_cache=model.parent)


def test_the_registry_says_what_it_has_instead(monkeypatch: pytest.MonkeyPatch, model: Path, plugin: Path) -> None:
    from vimdeploy.engines import plugin as module

    monkeypatch.setattr(module, "_dlopen", lambda path, can: SimpleNamespace())
    from fake_tensorrt import Creator

    other = fake_tensorrt(creators=[Creator("SelectiveScan", "2", "vim"), Creator("SelectiveScan", "1", "")])
    said = refused(monkeypatch, RuntimeMissing, model, plugin, module=other)
    assert said.endswith(
        "has no plugin SelectiveScan, version 1, namespace 'vim': under that name there is version 2, namespace 'vim'; "
        "version 1, namespace ''"
    )
    said = refused(monkeypatch, RuntimeMissing, model, plugin, module=fake_tensorrt(creators=[]))
    assert said.endswith("no plugin has that name")


def test_a_plugin_library_older_than_the_fused_ops(monkeypatch: pytest.MonkeyPatch, plugin: Path) -> None:
    from fake_tensorrt import Creator

    from vimdeploy.engines import plugin as module
    from vimdeploy.engines.capabilities import TENSORRT, capabilities_of

    monkeypatch.setattr(module, "_dlopen", lambda path, can: SimpleNamespace())
    older = fake_tensorrt(creators=[Creator("SelectiveScan", "1", "vim"), Creator("EfficientNMS_TRT", "1", "")])
    can = capabilities_of(older, TENSORRT)
    assert module.load_plugin(older, can, plugin, ["SelectiveScan"]) == sha256_of(plugin)
    with pytest.raises(RuntimeMissing) as caught:
        module.load_plugin(older, can, plugin, ["SelectiveScan", "BiSelectiveScan", "AddRMSNorm"])
    assert caught.value.message.endswith(
        "has no plugin AddRMSNorm nor BiSelectiveScan, version 1, namespace 'vim': an older build, which has "
        "SelectiveScan only"
    )
    assert caught.value.hint == "use the plugin library of this vimdeploy version"
