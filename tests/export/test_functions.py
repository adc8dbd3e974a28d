"""The function bodies alone, in real ONNX Runtime, against the definition in float64."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import zoo
from golden import selective_scan_f64, selective_scan_magnitude
from onnx import TensorProto, helper
from scan_cases import ALL_OPTIONAL, INSIDE, OUTPUT_ROUNDING, SMALLEST, make_inputs

from vimdeploy.export import functions, schema
from vimdeploy.export.functions import ScanSignature, function_body

KINDS = ("scan", "linear-attention")
SUBSETS = [s for n in range(4) for s in itertools.combinations(ALL_OPTIONAL, n)]
ELEMENT = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def model_of_one_node(
    kind: str, inputs: dict[str, np.ndarray], dtype: str, opset: int, **attributes: int
) -> onnx.ModelProto:
    """inputs (fp32 outside, batch and length open) -> Cast to the io type -> vim::SelectiveScan -> Cast -> y."""
    io = ELEMENT[dtype]
    signature = ScanSignature(
        ir.DataType(io),
        inputs["u"].shape[2],
        inputs["A"].shape[1],
        inputs["B"].shape[2],
        tuple(name in inputs for name in ALL_OPTIONAL),  # type: ignore[arg-type]
    )
    function = ir.serde.serialize_function(function_body(kind, signature, opset))
    nodes, names = [], []
    for name in schema.SCAN.inputs:
        if name in inputs and name not in schema.SCAN.fp32 and dtype != "fp32":
            nodes.append(helper.make_node("Cast", [name], [f"{name}_low"], to=io))
            names.append(f"{name}_low")
        else:
            names.append(name if name in inputs else "")
    while not names[-1]:
        names.pop()
    every = schema.SCAN.node_attributes(**attributes)
    nodes.append(helper.make_node("SelectiveScan", names, ["y_low"], domain="vim", **every))
    nodes.append(helper.make_node("Cast", ["y_low"], ["y"], to=TensorProto.FLOAT))
    shapes = {name: ["b", "l", *x.shape[2:]] if x.ndim > 2 else list(x.shape) for name, x in inputs.items()}
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shapes["u"])],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("vim", 1)]
    if kind == "linear-attention":
        imports.append(helper.make_opsetid("com.microsoft", 1))
    model = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=8)
    return model


def compute(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> np.ndarray:
    (y,) = zoo.session(model).run(None, {name: x.astype(np.float32) for name, x in inputs.items()})
    return y


#: ONNX Runtime's Sigmoid is off by so much, whatever it returns (measured from -12 to 12: 1.23e-7): for a gate of -8
#: that is a thousandth of the value, and of no weight in a network.
SIGMOID = 2e-7


def assert_close(y: np.ndarray, inputs: dict[str, np.ndarray], dtype: str = "fp32", **flags: bool) -> None:
    """As scan_cases has it, with the runtime's Sigmoid allowed for."""
    wide = {name: value.astype(np.float64) for name, value in inputs.items()}
    want = selective_scan_f64(**wide, **flags)
    allowed = (
        INSIDE * selective_scan_magnitude(**wide, **flags) + OUTPUT_ROUNDING[dtype] * np.abs(want) + SMALLEST[dtype]
    )
    if "z" in wide:
        z = np.abs(wide.pop("z"))
        allowed += SIGMOID * z * selective_scan_magnitude(**wide, **flags)
    assert y.shape == want.shape and np.isfinite(y).all()
    assert (np.abs(y - want) <= allowed).all(), f"{np.max(np.abs(y - want) / allowed):.3g} times what is allowed"


def assert_computes_the_scan(
    kind: str, inputs: dict[str, np.ndarray], dtype: str = "fp32", opset: int = 18, **attributes: int
) -> None:
    y = compute(model_of_one_node(kind, inputs, dtype, opset, **attributes), inputs)
    assert_close(y, inputs, dtype, **{name: bool(value) for name, value in attributes.items()})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("opset", [16, 18, 20, 22])
@pytest.mark.parametrize("reverse", [0, 1])
def test_every_opset_and_direction(kind: str, opset: int, reverse: int) -> None:
    inputs = make_inputs(2, 11, 8, 4)
    assert_computes_the_scan(kind, inputs, opset=opset, reverse=reverse)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optional", SUBSETS, ids=["+".join(s) or "none" for s in SUBSETS])
def test_optional_inputs(kind: str, optional: tuple[str, ...]) -> None:
    assert_computes_the_scan(kind, make_inputs(2, 7, 8, 4, optional=optional), reverse=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("reverse", [0, 1])
def test_groups(kind: str, groups: int, reverse: int) -> None:
    assert_computes_the_scan(kind, make_inputs(2, 9, 8, 3, groups), reverse=reverse)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("reverse", [0, 1])
def test_low_types_outside_fp32_inside(kind: str, dtype: str, reverse: int) -> None:
    assert_computes_the_scan(kind, make_inputs(2, 30, 8, 4, 2, dtype), dtype, 22, reverse=reverse)


@pytest.mark.parametrize("kind", KINDS)
def test_softplus_only_where_asked(kind: str) -> None:
    inputs = make_inputs(2, 7, 8, 4)
    inputs["delta"] = np.abs(inputs["delta"]) + 7
    inputs["A"] /= 50
    assert_computes_the_scan(kind, inputs, delta_softplus=0)
    assert_computes_the_scan(kind, inputs, delta_softplus=1)
    with pytest.raises(AssertionError, match="times what is allowed"):  # the two are not the same thing here
        y = compute(model_of_one_node(kind, inputs, "fp32", 18, delta_softplus=0), inputs)
        assert_close(y, inputs, delta_softplus=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reverse", [0, 1])
def test_length_and_batch_are_open(kind: str, reverse: int) -> None:
    """One model for all of them: nothing of the traced size may be frozen in."""
    model = model_of_one_node(kind, make_inputs(2, 5, 8, 4), "fp32", 18, reverse=reverse)
    running = zoo.session(model)
    for batch, length in ((1, 1), (1, 2), (3, 1), (2, 65), (5, 17)):
        inputs = make_inputs(batch, length, 8, 4)
        (y,) = running.run(None, inputs)
        assert_close(y, inputs, reverse=bool(reverse))


@pytest.mark.parametrize("kind", KINDS)
def test_long_and_stiff(kind: str) -> None:
    """800 tokens; steps so large that nothing is kept, and so small that everything is."""
    inputs = make_inputs(1, 800, 4, 16)
    inputs["delta"][:, ::3] += 30
    inputs["delta"][:, 1::3] -= 15
    assert_computes_the_scan(kind, inputs, reverse=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype,opset", [*itertools.product(("fp32", "fp16"), (16, 18, 20, 22)), ("bf16", 22)])
@pytest.mark.parametrize("optional", [(), ALL_OPTIONAL], ids=["no optional", "all optional"])
def test_the_checker_accepts(kind: str, dtype: str, optional: tuple[str, ...], opset: int) -> None:
    model = model_of_one_node(kind, make_inputs(2, 5, 8, 4, optional=optional), dtype, opset)
    if kind == "linear-attention":
        # onnx has no schema of Microsoft's operators; everything else is checked.
        onnx.checker.check_model(model)
    else:
        zoo.check(model)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_the_scan_body_is_one_scan(groups: int, dtype: ir.DataType) -> None:
    body = function_body("scan", ScanSignature(dtype, 8, 4, groups, (True, True, True)), 18)
    operators = [node.op_type for node in body]
    assert operators.count("Scan") == 1
    assert not {"Loop", "If", "Transpose", "Einsum"} & set(operators)
    assert {node.domain for node in body} == {""}


def test_the_linear_attention_body_is_one_node_of_microsofts() -> None:
    body = function_body("linear-attention", ScanSignature(ir.DataType.FLOAT, 8, 4, 1, (True, True, True)), 18)
    assert [node.op_type for node in body if node.domain == "com.microsoft"] == ["LinearAttention"]
    assert not {"Scan", "Loop", "Transpose"} & {node.op_type for node in body}


@pytest.mark.parametrize("kind", KINDS)
def test_the_function_declares_what_nodes_carry(kind: str) -> None:
    """ONNX Runtime and TensorRT refuse attributes on a node that its function does not name."""
    function = ir.serde.serialize_function(
        function_body(kind, ScanSignature(ir.DataType.FLOAT, 8, 4, 1, (True, True, True)), 18)
    )
    assert (function.domain, function.name) == ("vim", "SelectiveScan")
    assert list(function.input) == list(schema.SCAN.inputs) and list(function.output) == ["y"]
    assert sorted(function.attribute) == ["delta_softplus", "plugin_namespace", "plugin_version", "reverse"]
    # Defaults of function attributes are part of ONNX from IR version 9 on, and files are written in 8.
    assert not function.attribute_proto
    assert {(o.domain, o.version) for o in function.opset_import} >= {("", 18)}


def test_no_body_when_none_is_wanted() -> None:
    model = zoo.exported(zoo.BASE, fallback="none")
    assert not model.functions
    assert len(zoo.scans(model)) == 4


def test_scans_that_differ_cannot_share_a_body() -> None:
    model = zoo.loaded(zoo.BASE)
    scan = next(node for node in model.graph if node.domain == "vim")
    scan.replace_input_with(5, None)
    model.functions.clear()
    with pytest.raises(AssertionError, match="differ"):
        functions.attach(model, "scan")
