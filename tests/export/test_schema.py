"""`vim::SelectiveScan` as ONNX's own tools see it."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from vimdeploy.export import schema


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
            helper.make_tensor_value_info(n, TensorProto.FLOAT if n in schema.FP32_INPUTS else io, shapes[n])
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
