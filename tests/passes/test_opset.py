"""passes/opset.py: the lowered graph is one of that opset, and computes the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from zoo import BASE, NETWORKS, exported, images_for, run

from vimdeploy.errors import ExportError
from vimdeploy.export import functions
from vimdeploy.passes.opset import lower_opset, raise_opset


def lowered(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    graph = ir.from_proto(model)
    graph.functions.clear()  # a body of opset 18 cannot stay; the op library runs the node
    return ir.to_proto(lower_opset(graph, opset))


@pytest.mark.parametrize("name", ["v2", "layer pairs, v2", "rope and residual", "cls double"])
def test_a_fused_graph_is_lowered_like_any(name: str) -> None:
    config = NETWORKS[name]
    graph = ir.from_proto(exported(config, fusion="full"))
    graph.functions.clear()
    lower_opset(graph, 16)
    functions.attach(graph, "scan")
    x = images_for(config)
    np.testing.assert_allclose(run(ir.to_proto(graph), x), run(exported(config), x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("opset", [14, 16])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_outputs_are_equal(name: str, opset: int) -> None:
    config = NETWORKS[name]
    model = exported(config)
    low = lowered(model, opset)
    assert {o.domain: o.version for o in low.opset_import}[""] == opset
    for node in low.graph.node:
        if node.domain == "":
            schema = onnx.defs.get_schema(node.op_type, opset)
            assert (
                len(node.input) <= len(schema.inputs)
                or schema.inputs[-1].option == schema.FormalParameterOption.Variadic
            )
            assert {a.name for a in node.attribute} <= set(schema.attributes), node.name
    x = images_for(config)
    np.testing.assert_array_equal(run(low, x, "library"), run(model, x, "library"))


def test_newer_parsers_get_the_graph_as_it_is() -> None:
    model = ir.from_proto(exported(BASE))
    before = ir.to_proto(model).SerializeToString()
    assert ir.to_proto(lower_opset(model, 18)).SerializeToString() == before


def small(op: str, opset: int, inputs: int = 1, **attributes: object) -> ir.Model:
    names = [f"x{i}" for i in range(inputs)]
    node = helper.make_node(op, names, ["y"], name="the node", **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in names],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8))


def test_what_cannot_be_lowered_is_named() -> None:
    with pytest.raises(ExportError, match="the node: Gelu of opset 20 has no form in opset 16"):
        lower_opset(small("Gelu", 20), 16)
    with pytest.raises(ExportError, match="the node: the axes of ReduceMean are computed"):
        lower_opset(small("ReduceMean", 18, inputs=2), 16)
    with pytest.raises(ExportError, match="older than graphs can be lowered to"):
        lower_opset(small("Relu", 18), 9)


def test_raising_for_bf16() -> None:
    model = ir.from_proto(exported(BASE))
    model.functions.clear()
    raise_opset(model, 22)
    assert model.opset_imports[""] == 22
    with pytest.raises(ExportError, match="may differ in opset 22"):
        raise_opset(small("Resize", 18), 22)
