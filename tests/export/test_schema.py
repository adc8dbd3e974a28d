"""The `vim` ops as ONNX's own tools see them: `SelectiveScan` first, then the fused ones."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from vimdeploy.export import schema

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def registered() -> None:
    schema.register()


def graph_around(
    names: list[str], *, channels: int = 8, io: int = TensorProto.FLOAT, **attributes: object
) -> onnx.ModelProto:
    """u -> scan -> Neg -> y, types and shapes of the inner values left for inference to find."""
    sequence, vector, group = ["b", "l", channels], [channels], ["b", "l", 1, 4]
    shapes = {"u": sequence, "delta": sequence, "A": [channels, 4], "B": group, "C": group}
    shapes |= {"D": vector, "z": sequence, "delta_bias": vector}
    graph = helper.make_graph(
        [
            helper.make_node("SelectiveScan", names, ["s"], domain="vim", **attributes),
            helper.make_node("Neg", ["s"], ["y"]),
        ],
        "g",
        [
            helper.make_tensor_value_info(n, TensorProto.FLOAT if n in schema.SCAN.fp32 else io, shapes[n])
            for n in dict.fromkeys(n for n in names if n)
        ],
        [helper.make_tensor_value_info("y", io, ["b", "l", "d"])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("vim", 1)])


def test_the_schema_says_what_the_contract_says() -> None:
    found = onnx.defs.get_schema("SelectiveScan", 1, "vim")
    assert [i.name for i in found.inputs] == ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"]
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    assert [i.name for i in found.inputs if i.option == optional] == ["D", "z", "delta_bias"]
    assert {i.name for i in found.inputs if i.type_str == "tensor(float)"} == {"A", "D", "delta_bias"}
    assert [o.name for o in found.outputs] == ["y"] and found.outputs[0].type_str == "T"
    (constraint,) = found.type_constraints
    assert set(constraint.allowed_type_strs) == {"tensor(float)", "tensor(float16)", "tensor(bfloat16)"}
    assert found.has_type_and_shape_inference_function
    defaults = {name: a.default_value.i for name, a in found.attributes.items() if a.default_value.name}
    assert defaults == {"delta_softplus": 1, "reverse": 0}
    assert set(found.attributes) == {"delta_softplus", "reverse", "plugin_namespace", "plugin_version"}


def test_registering_twice_is_harmless() -> None:
    schema.register()
    assert onnx.defs.has("SelectiveScan", "vim")


@pytest.mark.parametrize("io", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_shape_and_type_flow_through_a_graph(io: int) -> None:
    model = graph_around(["u", "delta", "A", "B", "C"], io=io)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    (value,) = (v for v in inferred.graph.value_info if v.name == "s")
    assert value.type.tensor_type.elem_type == io
    assert [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] == ["b", "l", 8]
    assert [d.dim_value for d in inferred.graph.output[0].type.tensor_type.shape.dim][2:] == [8]


@pytest.mark.parametrize(
    "names",
    [
        ["u", "delta", "A", "B", "C"],
        ["u", "delta", "A", "B", "C", "D"],
        ["u", "delta", "A", "B", "C", "", "z"],
        ["u", "delta", "A", "B", "C", "", "", "delta_bias"],
        ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"],
    ],
)
def test_the_checker_takes_optional_inputs(names: list[str]) -> None:
    onnx.checker.check_model(graph_around(names, reverse=1, delta_softplus=0, plugin_namespace="vim"), full_check=True)


@pytest.mark.parametrize(
    "names,attributes,message",
    [
        (["u", "delta", "A", "B"], {}, "input size 4 not in range"),
        (["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "u"], {}, "input size 9 not in range"),
        (["u", "delta", "", "B", "C"], {}, "input 2 is marked single but has an empty string"),
        (["u", "delta", "A", "B", "C"], {"reversed": 1}, "Unrecognized attribute: reversed"),
        (["u", "delta", "A", "B", "C"], {"reverse": 1.0}, "Mismatched attribute type"),
    ],
)
def test_the_checker_refuses(names: list[str], attributes: dict[str, object], message: str) -> None:
    with pytest.raises(onnx.checker.ValidationError, match=message):
        onnx.checker.check_model(graph_around(names, **attributes), full_check=True)


def test_the_checker_refuses_two_io_types() -> None:
    model = graph_around(["u", "delta", "A", "B", "C"])
    model.graph.input[1].type.tensor_type.elem_type = TensorProto.FLOAT16
    with pytest.raises(onnx.shape_inference.InferenceError, match="delta"):
        onnx.checker.check_model(model, full_check=True)


def test_the_checker_refuses_a_low_decay() -> None:
    model = graph_around(["u", "delta", "A", "B", "C"], io=TensorProto.FLOAT16)
    model.graph.input[2].type.tensor_type.elem_type = TensorProto.FLOAT16
    with pytest.raises(onnx.shape_inference.InferenceError, match="A "):
        onnx.checker.check_model(model, full_check=True)


# The fused ops.

B, L, D, N, P, W, K, C = "b", "l", 8, 4, 11, 16, 4, 6
INPUTS = {
    "BiSelectiveScan": {
        **{f"{name}_{way}": [B, L, D] for name in ("u", "delta") for way in "fb"},
        **{f"A_{way}": [D, N] for way in "fb"}, **{f"x_{way}": [B, L, P] for way in "fb"},
        **{f"D_{way}": [D] for way in "fb"}, "z": [B, L, W], **{f"delta_bias_{way}": [D] for way in "fb"},
    },
    "BiCausalConv1d": {"x": [B, L, W], "weight_f": [K, D], "bias_f": [D], "weight_b": [K, D], "bias_b": [D]},
    "AddRMSNorm": {"h": [B, L, C], "r": [B, L, C], "weight": [C]},
}  # fmt: skip
OUTPUTS = {
    "BiSelectiveScan": {"y": [B, L, D]},
    "BiCausalConv1d": {"u_f": [B, L, D], "u_b": [B, L, D]},
    "AddRMSNorm": {"n": [B, L, C], "r_out": [B, L, C]},
}
#: The brief of each op: what is fp32 whatever the io type, and the attributes with their defaults.
FP32 = {
    "BiSelectiveScan": {"A_f", "A_b", "D_f", "D_b", "delta_bias_f", "delta_bias_b", "y_scale"},
    "BiCausalConv1d": {"weight_f", "bias_f", "weight_b", "bias_b"},
    "AddRMSNorm": {"r", "weight", "r_out"},
}
DEFAULTS = {"BiSelectiveScan": {"delta_softplus": 1}, "BiCausalConv1d": {}, "AddRMSNorm": {"epsilon": 1e-5}}
OPTIONAL = {"BiSelectiveScan": ["y_scale"], "BiCausalConv1d": [], "AddRMSNorm": []}
FUSED = tuple(INPUTS)


def fused_graph(
    op: str, io: int = TensorProto.FLOAT, *, extra: tuple[str, ...] = (), **changes: list[object]
) -> onnx.ModelProto:
    """The node's outputs through Neg, so that what lies between is left for inference to find."""
    shapes = {**INPUTS[op], **{name: [D] for name in extra}, **changes}
    names = [*INPUTS[op], *extra]
    types = {name: TensorProto.FLOAT if name in FP32[op] else io for name in (*names, *OUTPUTS[op])}
    made = {name: f"{name}_made" for name in OUTPUTS[op]}
    graph = helper.make_graph(
        [
            helper.make_node(op, names, list(made.values()), domain="vim", **schema.OPS[op].node_attributes()),
            *(helper.make_node("Neg", [inner], [name]) for name, inner in made.items()),
        ],
        "g",
        [helper.make_tensor_value_info(name, types[name], shapes[name]) for name in names],
        [helper.make_tensor_value_info(name, types[name], None) for name in made],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("vim", 1)])


def sides(value: onnx.ValueInfoProto) -> list[object]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("op", FUSED)
def test_a_fused_ops_schema_says_what_its_contract_says(op: str) -> None:
    found = onnx.defs.get_schema(op, 1, "vim")
    option = onnx.defs.OpSchema.FormalParameterOption
    assert [i.name for i in found.inputs] == [*INPUTS[op], *OPTIONAL[op]]
    assert [i.name for i in found.inputs if i.option == option.Optional] == OPTIONAL[op]
    assert [o.name for o in found.outputs] == list(OUTPUTS[op])
    assert {v.name for v in (*found.inputs, *found.outputs) if v.type_str == "tensor(float)"} == FP32[op]
    defaults = {
        n: helper.get_attribute_value(a.default_value) for n, a in found.attributes.items() if a.default_value.name
    }
    assert defaults == pytest.approx(DEFAULTS[op])
    assert set(found.attributes) == {*DEFAULTS[op], "plugin_namespace", "plugin_version"}
    assert found.doc and found.has_type_and_shape_inference_function


@pytest.mark.parametrize("io", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16])
@pytest.mark.parametrize("op", FUSED)
def test_shapes_and_types_flow_through_a_fused_op(op: str, io: int) -> None:
    inferred = onnx.shape_inference.infer_shapes(fused_graph(op, io), check_type=True, strict_mode=True)
    found = {value.name: value for value in inferred.graph.value_info}
    for name, shape in OUTPUTS[op].items():
        assert sides(found[f"{name}_made"]) == shape
        assert found[f"{name}_made"].type.tensor_type.elem_type == (TensorProto.FLOAT if name in FP32[op] else io)


def test_a_norm_of_one_token_has_rank_two() -> None:
    model = fused_graph("AddRMSNorm", h=[B, C], r=[B, C])
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    assert [sides(value) for value in inferred.graph.value_info] == [[B, C], [B, C]]


def test_the_width_of_a_convolution_is_that_of_its_bias() -> None:
    """Not that of the rows it is read from; unknown where the bias' is."""
    model = fused_graph("BiCausalConv1d", x=["b", 5, 100])
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    assert [sides(value) for value in inferred.graph.value_info] == [["b", 5, D], ["b", 5, D]]
    model.graph.input[2].type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    (first, second) = (list(value.type.tensor_type.shape.dim) for value in inferred.graph.value_info)
    assert not first[2].HasField("dim_value") and second[2].dim_value == D


@pytest.mark.parametrize("y_scale", [(), ("y_scale",)], ids=["13 inputs", "14 inputs"])
def test_the_checker_takes_a_fused_scan_with_and_without_a_scale(y_scale: tuple[str, ...]) -> None:
    model = fused_graph("BiSelectiveScan", extra=y_scale)
    model.graph.output[0].type.tensor_type.shape.CopyFrom(model.graph.input[0].type.tensor_type.shape)
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("op,name", [(op, name) for op in FUSED for name in INPUTS[op] if name in FP32[op]])
def test_the_checker_refuses_a_low_type_where_fp32_is_due(op: str, name: str) -> None:
    model = fused_graph(op, TensorProto.FLOAT16)
    model.graph.input[list(INPUTS[op]).index(name)].type.tensor_type.elem_type = TensorProto.FLOAT16
    with pytest.raises(onnx.shape_inference.InferenceError, match=name):
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


def test_a_nodes_attributes_are_all_written_out() -> None:
    assert schema.ADD_NORM.node_attributes(epsilon=1e-6) == {"epsilon": 1e-6, **schema.PLUGIN_ATTRIBUTES}
    assert list(schema.SCAN.node_attributes(reverse=1).items())[:2] == [("delta_softplus", 1), ("reverse", 1)]
    with pytest.raises(TypeError, match="vim::BiSelectiveScan has no attribute 'reverse'"):
        schema.BI_SCAN.node_attributes(reverse=1)


def documented(op: str) -> dict[str, str]:
    """input -> type, from the reference page's table."""
    page = "selective-scan" if op == "SelectiveScan" else "fused-ops"
    text = (ROOT / "docs" / "reference" / f"{page}.md").read_text(encoding="utf-8")
    section = text[text.index(f"`vim::{op}`") if page == "selective-scan" else text.index(f"## `vim::{op}`") :]
    found: dict[str, str] = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 4 and cells[0] not in ("input", "---"):
            found |= dict.fromkeys(cells[0].split(", "), cells[2])
        elif found:
            break
    return found


@pytest.mark.parametrize("op", schema.OPS)
def test_the_reference_pages_table_is_the_schemas(op: str) -> None:
    table, found = documented(op), schema.OPS[op]
    assert sorted(table) == sorted(found.inputs)
    for name, kind in table.items():
        assert kind.startswith("fp32" if name in found.fp32 else "T"), name
        assert ("optional" in kind) == (name in found.optional), name
