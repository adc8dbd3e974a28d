"""Engines of a quantized file: the graph for each kind of parser, what the builder is told, and the proof of int8."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from fake_tensorrt import Creator, Flag, Layer, LayerType, Network, fake_tensorrt, install, plugin_file
from official import write_small
from tensorrt_stand_ins import trt_8_5, trt_10
from zoo import session

import vimdeploy.engines.build as build_module
from vimdeploy.bundle import read_info
from vimdeploy.engines.build import BuildOptions, build_engine, constrain
from vimdeploy.engines.capabilities import RTX, TENSORRT, Capabilities, capabilities_of, import_runtime
from vimdeploy.engines.inspect import Layer as Seen
from vimdeploy.engines.inspect import Wanted, names_in, prove
from vimdeploy.engines.prepare import Prepared, prepare
from vimdeploy.errors import CheckFailed, RuntimeMissing, UsageError
from vimdeploy.export import functions, schema
from vimdeploy.export.exporter import ExportOptions, export_checkpoint
from vimdeploy.passes.projections import projections
from vimdeploy.passes.quantize import quantize, quantized_products

QUANTIZED = {f"layers.{i}.mixer.{kind}/MatMul" for i in range(2) for kind in ("in_proj", "out_proj")}


def write_int8(folder: Path, fusion: str) -> Path:
    """A small network, in_proj and out_proj in int8, as `quantize` would write it."""
    exported = export_checkpoint(
        write_small(folder / "small.pth"), folder / f"{fusion}.vim", ExportOptions(fusion=fusion)
    )
    model = ir.load(exported.model)
    layers = projections(model.graph, ("in_proj", "out_proj"))
    quantize(model, {layer.name: 3.0 for layer in layers}, layers)
    model.metadata_props["vimdeploy.quantization"] = json.dumps({"int8": 4, "sqnr_db": 30.0})
    path = exported.model.with_name("model.int8.onnx")
    ir.save(model, path)
    return path


@pytest.fixture(scope="module", params=["none", "full"])
def int8(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_int8(tmp_path_factory.mktemp("int8"), request.param)


def prepared(model: Path, can: Capabilities, precision: str | None) -> Prepared:
    """Fused as far as the file is."""
    info = read_info(model)
    return prepare(model, info, precision, can, fusion=info.fusion)


OLD, NEW = capabilities_of(trt_8_5(), TENSORRT), capabilities_of(trt_10(), TENSORRT)


def test_old_parsers_get_a_float_graph_of_convolutions_and_no_constraints(int8: Path) -> None:
    given = prepared(int8, OLD, "fp16")
    model = ir.from_proto(onnx.load_from_string(given.onnx))
    kinds = [node.op_type for node in model.graph]
    assert "Cast" not in kinds  # 8.5 fuses pairs with products best where nothing stands between
    assert all(v.dtype != ir.DataType.FLOAT16 for v in model.graph.initializers.values())
    assert not [
        v for v in model.graph.initializers.values() if v.dtype == ir.DataType.INT8 and v.const_value.numpy().any()
    ]
    assert model.opset_imports[""] == 14
    products = quantized_products(model.graph)
    # Without fusion, in_proj is two products there, one for each half (no_slices.py).
    assert (
        {str(node.name).split(":")[0] for node in products}
        == QUANTIZED
        == {n.split(":")[0] for n in given.wanted.quantized}
    )
    assert given.wanted.asked == "int8" and given.wanted.low == "fp16"
    for product in products:
        pair = product.inputs[1].producer()
        assert product.op_type == "Conv" and pair is not None and pair.op_type == "DequantizeLinear"
        assert pair.attributes["axis"].as_int() == 0
    assert given.types == {} and given.wanted.chosen


def test_what_old_parsers_get_computes_what_the_file_does(int8: Path) -> None:
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    want = session(int8.read_bytes()).run(None, {"images": images})[0]
    model = ir.from_proto(onnx.load_from_string(prepared(int8, OLD, "fp16").onnx))
    if any(node.op_type == schema.BI_SCAN.name for node in model.graph):
        model.opset_imports[""] = 18  # the bodies are of 16 and later; nothing else here changed since 14
        for node in model.graph:
            if node.op_type == "ReduceMean":
                axes = ir.tensor(np.array(node.attributes.pop("axes").as_ints(), np.int64), name=f"{node.name}:axes")
                value = ir.Value(name=axes.name, type=ir.TensorType(axes.dtype), shape=axes.shape, const_value=axes)
                model.graph.initializers[str(axes.name)] = value
                node.resize_inputs(2)
                node.replace_input_with(1, value)
        functions.attach(model, "scan")
        got = session(ir.to_proto(model)).run(None, {"images": images})[0]
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_new_parsers_get_int8_constants_and_typed_pairs(int8: Path, precision: str) -> None:
    given = prepared(int8, NEW, precision)
    model = ir.from_proto(onnx.load_from_string(given.onnx))
    low = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[precision]
    assert model.opset_imports[""] == {"fp16": 19, "bf16": 22}[precision]
    products = quantized_products(model.graph)
    assert {str(node.name) for node in products} == QUANTIZED == given.wanted.quantized
    for product in products:
        pair = product.inputs[1].producer()
        assert pair.op_type == "DequantizeLinear" and pair.inputs[0].dtype == ir.DataType.INT8
        assert product.outputs[0].dtype == product.inputs[0].dtype == product.inputs[1].dtype == low
    assert given.wanted.low == precision and given.wanted.asked == "int8"


def test_the_fp32_rest_stays_fp32(int8: Path) -> None:
    given = prepared(int8, NEW, None)
    assert set(given.types.values()) == {"fp32"} and given.wanted.low == "fp32" and given.wanted.asked == "int8"
    assert prepared(int8, OLD, None).wanted.low == "fp32"


# The proof

WANTED = Wanted("fp16", frozenset({"a/MatMul", "b/MatMul"}), frozenset(), frozenset(), frozenset({"b/MatMul"}))


def seen(name: str, reads: str, *, opaque: bool = False) -> Seen:
    return Seen(name, names_in(name), (reads,), ("fp16",), opaque)


def test_each_projection_must_have_its_own_type() -> None:
    found = prove([seen("a/MatMul", "fp16"), seen("b.weight/q + b/MatMul", "int8")], WANTED, "inspector")
    assert found.to_dict() == {
        "asked": "int8", "rest": "fp16", "source": "inspector", "projections": {"fp16": 1, "int8": 1}, "islands": {},
        "hidden": 0, "layers": {"fp16": 2},
    }  # fmt: skip


def test_a_builder_that_chooses_may_leave_the_others_in_fp32() -> None:
    layers = [seen("a/MatMul", "fp32"), seen("b/MatMul", "int8")]
    with pytest.raises(CheckFailed, match="1 of 1 projections are not in fp16"):
        prove(layers, WANTED, "inspector")
    chosen = dataclasses.replace(WANTED, chosen=True)
    assert prove(layers, chosen, "inspector").projections == {"fp32": 1, "int8": 1}
    with pytest.raises(CheckFailed, match="quantized projections are not in int8"):
        prove([seen("a/MatMul", "fp32"), seen("b/MatMul", "fp32")], chosen, "inspector")


WRONG = {
    "1 of 1 quantized projections are not in int8 in the engine: b/MatMul .fp16": (
        seen("a/MatMul", "fp16"),
        seen("b/MatMul", "fp16"),
    ),
    "1 of 1 projections are not in fp16 in the engine: a/MatMul .int8": (
        seen("a/MatMul", "int8"),
        seen("b/MatMul", "int8"),
    ),
    "the inspector shows none of the 1 quantized projections, so int8 is not proven": (
        seen("a/MatMul", "fp16"),
        seen("{ForeignNode[b/MatMul]}", "int8", opaque=True),
    ),
}


@pytest.mark.parametrize("said", list(WRONG))
def test_int8_that_is_not_there_is_no_int8_engine(said: str) -> None:
    with pytest.raises(CheckFailed, match=said):
        prove(WRONG[said], WANTED, "inspector")


# The builder of 8.5, as far as it goes without a card


def inspected(model: Path, reads: str) -> list[dict[str, Any]]:
    """The inspector's words for a plan of `model`: fp16, and the quantized products reading `reads`."""
    graph = ir.from_proto(onnx.load_from_string(prepared(model, OLD, "fp16").onnx)).graph
    products = {node.name for node in quantized_products(graph)}
    rows = []
    for node in graph:
        if node.op_type in ("MatMul", "Gemm", "Conv", "ReduceMean"):
            kind = reads if node.name in products else "fp32" if node.op_type == "ReduceMean" else "fp16"
            tensors = [{"Name": "t", "Format/Datatype": f"Row major linear {kind.upper()} format"}]
            rows.append({"Name": node.name, "LayerType": "x", "Inputs": tensors, "Outputs": tensors})
    return rows


def build(patch: pytest.MonkeyPatch, model: Path, out: Path, reads: str, **options: Any) -> tuple[Any, Any]:
    creators = [Creator(name, "1", "vim") for name in schema.OPS]
    module = fake_tensorrt(layers=inspected(model, reads), creators=creators)
    install(patch, module)
    patch.setattr(build_module, "_SOURCES", dict.fromkeys(build_module._SOURCES, ("libnone.so", "f")))
    options.setdefault("fusion", read_info(model).fusion)
    return build_engine(model, out, BuildOptions(plugin=plugin_file(out.parent), **options)), module.seen


def test_a_build_on_8_5_allows_int8_and_fp16_and_says_so(
    monkeypatch: pytest.MonkeyPatch, int8: Path, tmp_path: Path
) -> None:
    result, told = build(monkeypatch, int8, tmp_path / "x.plan", "int8", int8=True)
    assert told["config"].flags == {Flag.FP16, Flag.INT8}  # constraints remove every kernel of some int8 node
    assert result.sidecar.precision["asked"] == "int8" and result.sidecar.precision["rest"] == "fp16"
    assert result.sidecar.precision["projections"]["int8"] in (4, 6)
    assert result.sidecar.info.quantization == {"int8": 4, "sqnr_db": 30.0}
    assert "smaller than in fp16, and slower" in result.notices[0]  # the stand-in's card is of sm_90
    _, told = build(monkeypatch, int8, tmp_path / "y.plan", "int8", precision="fp16")
    assert Flag.INT8 in told["config"].flags  # what a quantized file is, it is without --int8 too


def test_a_quiet_fp16_build_is_no_int8_engine(monkeypatch: pytest.MonkeyPatch, int8: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="quantized projections are not in int8 in the engine"):
        build(monkeypatch, int8, tmp_path / "x.plan", "fp16", int8=True)
    assert not (tmp_path / "x.plan").exists()


def test_int8_of_a_file_that_is_not_quantized_is_refused(
    monkeypatch: pytest.MonkeyPatch, int8: Path, tmp_path: Path
) -> None:
    plain = int8.with_name("model.onnx")
    module = fake_tensorrt(layers=[])
    install(monkeypatch, module)
    with pytest.raises(UsageError, match="is fp32, and int8 needs a file that was calibrated"):
        build_engine(plain, tmp_path / "x.plan", BuildOptions(int8=True, plugin=plugin_file(tmp_path)))


def test_outputs_keep_their_type_under_constraints() -> None:
    """8.5's head computes in fp16 and gives fp32, as the typed graph's last Cast does elsewhere."""
    module = fake_tensorrt()
    head, inner = Layer(LayerType.MATRIX_MULTIPLY, "logits"), Layer(LayerType.MATRIX_MULTIPLY, "inner")
    head.get_output(0).is_network_output = True  # type: ignore[misc]
    constrain(module, Network((head, inner)), {"logits": "fp16", "inner": "fp16"})
    half = module.DataType.HALF
    assert (head.precision, head.output_types) == (half, {}) and (inner.precision, inner.output_types) == (
        half,
        {0: half},
    )


# NVIDIA's own builder


@pytest.fixture
def rtx() -> None:
    try:
        import_runtime(RTX)
    except RuntimeMissing as missing:
        pytest.skip(missing.message)


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(("options", "rest"), [({}, "fp16"), ({"precision": "bf16"}, "bf16")])
def test_tensorrt_rtx_builds_it_ahead_of_time(options: dict[str, Any], rest: str, tmp_path: Path) -> None:
    model = write_int8(tmp_path, "full")
    result = build_engine(model, None, BuildOptions(runtime=RTX, int8=True, max_batch=4, **options))
    assert result.plan.name == "model.int8.plan"
    found = result.sidecar.precision
    assert (found["asked"], found["rest"], found["source"]) == ("int8", rest, "network")
    assert found["projections"] == {"int8": 4, rest: 10} and found["hidden"] == 0
