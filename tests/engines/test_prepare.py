"""engines/prepare.py: which ops a parser gets, from fused and unfused files, and that they compute the network."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import zoo
from fake_tensorrt import fake_tensorrt
from official import write_small

from vimdeploy.bundle import read_info
from vimdeploy.engines.capabilities import RTX, TENSORRT, Capabilities, capabilities_of
from vimdeploy.engines.prepare import Prepared, prepare
from vimdeploy.errors import UsageError
from vimdeploy.export import functions
from vimdeploy.export.exporter import ExportOptions, export_checkpoint

FULL = {"BiSelectiveScan": 2, "BiCausalConv1d": 2, "AddRMSNorm": 2}
OPS = {"none": {"SelectiveScan": 4}, "bidirectional": {"BiSelectiveScan": 2}, "full": FULL}


def tensorrt(**changes: object) -> Capabilities:
    """One that takes IPluginV3 and has bf16."""
    known = {"plugins": "v3", "bf16": True, "slow_slices": False, "max_opset": None, "strongly_typed": True, **changes}
    return dataclasses.replace(capabilities_of(fake_tensorrt(), TENSORRT), **known)  # type: ignore[arg-type]


def rtx() -> Capabilities:
    return tensorrt(runtime=RTX, plugins="none")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("prepare")
    checkpoint = write_small(folder / "small.pth")
    made = {}
    for fusion in OPS:
        for precision in ("fp32", "fp16"):
            options = ExportOptions(fusion=fusion, precision=precision)
            out = folder / f"{fusion}-{precision}.onnx"
            made[f"{fusion} {precision}"] = export_checkpoint(checkpoint, out, options).model
    return made


def prepared(model: Path, can: Capabilities, precision: str | None = None, fusion: str | None = None) -> Prepared:
    return prepare(model, read_info(model), precision, can, fusion=fusion)


def ops(found: Prepared) -> dict[str, int]:
    nodes = onnx.load_from_string(found.onnx).graph.node
    return dict(Counter(node.op_type for node in nodes if node.domain == "vim"))


def run(content: bytes) -> np.ndarray:
    """As it stands, or with the ops' bodies."""
    model = ir.from_proto(onnx.load_from_string(content))
    functions.attach(model, "scan")
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)
    return zoo.run(ir.to_proto(model), images)


@pytest.mark.parametrize("fusion", [None, *OPS])
@pytest.mark.parametrize("file", OPS)
def test_a_parser_with_plugins_gets_what_was_asked_for_or_all_there_is(
    models: dict[str, Path], file: str, fusion: str | None
) -> None:
    wanted = fusion or "full"
    model = models[f"{file} fp32"]
    if list(OPS).index(wanted) < list(OPS).index(file):
        with pytest.raises(UsageError, match=rf"is fused \({file}\) already and cannot be built with") as caught:
            prepared(model, tensorrt(), fusion=fusion)
        assert caught.value.hint == f"export it with --fusion {fusion}"
        return
    found = prepared(model, tensorrt(), "fp16", fusion)
    assert found.fusion == wanted and ops(found) == OPS[wanted] and found.ops == set(OPS[wanted])
    assert len(found.wanted.projections) == 2 * 6 + 2
    assert len(found.wanted.islands) + len(found.wanted.streams) == 3
    plain = run(models["none fp32"].read_bytes())
    np.testing.assert_allclose(run(found.onnx), plain, rtol=0, atol=0.02 * np.abs(plain).max())
    exact = prepared(model, tensorrt(), "fp32", fusion)
    np.testing.assert_allclose(run(exact.onnx), plain, rtol=0, atol=1e-5)


def test_a_fully_fused_layer_has_no_slice(models: dict[str, Path]) -> None:
    for file in ("none fp32", "full fp32", "full fp16"):
        found = prepared(models[file], tensorrt())
        inside = [node for node in onnx.load_from_string(found.onnx).graph.node if ".mixer" in node.name]
        assert Counter(node.op_type for node in inside) - Counter(Gather=1) == Counter(
            MatMul=2 * 6, BiCausalConv1d=2, BiSelectiveScan=2
        ), file


@pytest.mark.parametrize("file", OPS)
def test_without_plugins_the_file_stays_as_it_is_and_its_bodies_are_built_in(
    models: dict[str, Path], file: str
) -> None:
    found = prepared(models[f"{file} fp32"], rtx())
    assert found.fusion == file and ops(found) == {} and found.ops == set(OPS[file])
    graph = onnx.load_from_string(found.onnx)
    assert not graph.functions and {o.domain for o in graph.opset_import} == {""}
    names = [node.name for node in graph.graph.node]
    assert all(names) and len(set(names)) == len(names)
    assert len(found.wanted.islands) == 3 and not found.wanted.streams
    onnx.checker.check_model(graph, full_check=True)
    np.testing.assert_allclose(run(found.onnx), run(models["none fp32"].read_bytes()), rtol=0, atol=1e-5)


def test_a_typed_file_stays_as_it_is(models: dict[str, Path]) -> None:
    for file in OPS:
        assert ops(prepared(models[f"{file} fp16"], tensorrt())) == OPS[file]
        assert prepared(models[f"{file} fp16"], tensorrt(), fusion=file).fusion == file
    with pytest.raises(UsageError, match="is fp16, and only fp32 graphs are fused") as caught:
        prepared(models["none fp16"], tensorrt(), fusion="full")
    assert caught.value.hint == "leave out --fusion, or export it as fp32"


def test_without_plugins_it_is_fused_when_asked(models: dict[str, Path]) -> None:
    found = prepared(models["none fp32"], rtx(), fusion="full")
    assert found.fusion == "full" and found.ops == set(FULL) and ops(found) == {}


def test_bf16_raises_the_opset_of_a_fused_file(models: dict[str, Path]) -> None:
    found = prepared(models["full fp32"], tensorrt(), "bf16")
    graph = onnx.load_from_string(found.onnx)
    assert {o.domain: o.version for o in graph.opset_import} == {"": 22, "vim": 1}
    assert found.types["layers.1/Add"] == "fp32" and found.types["layers.1.norm/Mul.3"] == "bf16"
