"""passes/fuse_norm.py: one test a case, and what must stay as it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import zoo

from vimdeploy.export import schema
from vimdeploy.passes import edit
from vimdeploy.passes.fuse_norm import fuse_norms

OP = schema.ADD_NORM


def plain(name: str = "v2", **options: object) -> ir.Model:
    return zoo.loaded(zoo.NETWORKS[name], fallback="none", **options)


def fused_nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == OP.name]


def wiring(node: ir.Node) -> tuple[list[str | None], list[str | None]]:
    return [value and value.name for value in node.inputs], [value.name for value in node.outputs]


@pytest.mark.parametrize("opset", [16, 17, 18, 22])
def test_the_stream_goes_through_the_norms(opset: int) -> None:
    """ReduceMean has its axes as an attribute before opset 18."""
    model = plain(opset=opset)
    assert fuse_norms(model.graph) == 2
    first, last = fused_nodes(model)
    assert wiring(first) == (
        ["layers.0.mixer.out_proj/MatMul", "Add", "layers.1.norm.weight"],
        ["layers.1.norm/Mul.3", "layers.1/Add"],
    )
    assert wiring(last) == (
        ["layers.1.mixer.out_proj/MatMul", "layers.1/Add", "norm_f.weight"],
        ["norm_f/Mul.3", "Add.2"],
    )
    assert [node.name for node in (first, last)] == ["layers.1.norm/AddRMSNorm", "norm_f/AddRMSNorm"]
    for node in (first, last):
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        assert node.domain == "vim" and attributes == {"epsilon": pytest.approx(1e-5), **schema.PLUGIN_ATTRIBUTES}
        assert [(value.dtype, value.shape) for value in node.outputs] == [
            (ir.DataType.FLOAT, ir.Shape(["batch", 17, 16]))
        ] * 2


def test_the_first_block_has_no_residual_and_keeps_its_norm() -> None:
    for name in ("v2", "no absolute positions"):
        model = plain(name)
        fuse_norms(model.graph)
        kept = [node.name for node in model.graph if node.op_type == "ReduceMean"]
        assert kept == ["layers.0.norm/ReduceMean"]


def test_both_norms_of_a_pair_take_the_same_residual() -> None:
    model = ir.from_proto(zoo.exported(zoo.PAIRS.replace(depth=4), fallback="none"))
    assert fuse_norms(model.graph) == 3
    forward, backward, last = fused_nodes(model)
    assert wiring(forward)[0][:2] == wiring(backward)[0][:2]
    r_f, r_b = forward.outputs[1], backward.outputs[1]
    total = last.inputs[1].producer()  # type: ignore[union-attr]
    assert total is not None and total.op_type == "Add" and list(total.inputs) == [r_f, r_b]


@pytest.mark.parametrize("swap", [False, True], ids=["r + h", "h + r"])
def test_the_low_operand_is_h_in_either_order(swap: bool) -> None:
    """Taken for h, the stream would be rounded to fp16 in every layer."""
    model = plain()
    if swap:
        for node in model.graph:
            if node.name in ("layers.1/Add", "Add.2"):
                left, right = node.inputs
                node.replace_input_with(0, right)
                node.replace_input_with(1, left)
    fuse_norms(model.graph)
    assert [wiring(node)[0][0] for node in fused_nodes(model)] == [f"layers.{i}.mixer.out_proj/MatMul" for i in (0, 1)]


def test_the_rotated_residual_is_the_stream() -> None:
    """RoPE stands between the blocks, on h and on r."""
    model = plain("rope and residual")
    assert fuse_norms(model.graph) == 2
    first = fused_nodes(model)[0]
    h, r = (value.producer() for value in first.inputs[:2] if value is not None)
    assert h is not None and r is not None
    makers: list[set[str]] = []
    for node in (h, r):
        todo, seen = [node], set()
        while todo:
            one = todo.pop()
            seen.add(str(one.name))
            todo += [v.producer() for v in one.inputs if v is not None and v.producer() is not None]  # type: ignore[misc]
        makers.append(seen)
    assert "layers.0.mixer.out_proj/MatMul" in makers[0] and "layers.0.mixer.out_proj/MatMul" not in makers[1]


# Case 3: what must stay. Each changes layer 1's norm.

Change = Callable[[ir.Model, dict[str, ir.Node]], None]


def a_root_read_elsewhere(model: ir.Model, nodes: dict[str, ir.Node]) -> None:
    model.graph.outputs.append(nodes["Sqrt"].outputs[0])


def a_scaled_value_read_elsewhere(model: ir.Model, nodes: dict[str, ir.Node]) -> None:
    model.graph.insert_after(nodes["Mul.2"], ir.node("Neg", [nodes["Mul.2"].outputs[0]], name="reader"))


def another_axis(model: ir.Model, nodes: dict[str, ir.Node]) -> None:
    nodes["ReduceMean"].replace_input_with(1, edit.constant(model.graph, "tokens", np.array([1])))


def two_axes(model: ir.Model, nodes: dict[str, ir.Node]) -> None:
    nodes["ReduceMean"].replace_input_with(1, edit.constant(model.graph, "both", np.array([1, 2])))


def axis_dropped(model: ir.Model, nodes: dict[str, ir.Node]) -> None:
    nodes["ReduceMean"].attributes["keepdims"] = ir.AttrInt64("keepdims", 0)


def mean_of_a_product(model: ir.Model, nodes: dict[str, ir.Node]) -> None:
    nodes["Mul"].replace_input_with(1, nodes["Mul"].inputs[0].producer().inputs[0])  # type: ignore[union-attr]


def epsilon_computed(model: ir.Model, nodes: dict[str, ir.Node]) -> None:
    nodes["Add"].replace_input_with(1, nodes["ReduceMean"].outputs[0])


def no_root(model: ir.Model, nodes: dict[str, ir.Node]) -> None:
    nodes["Sqrt"].op_type = "Abs"


def another_value_scaled(model: ir.Model, nodes: dict[str, ir.Node]) -> None:
    scaled = nodes["Mul.2"]
    for i, value in enumerate(scaled.inputs):
        if value is nodes["Mul"].inputs[0]:
            scaled.replace_input_with(i, value.producer().inputs[1])  # type: ignore[union-attr]


def weight_of_every_token(model: ir.Model, nodes: dict[str, ir.Node]) -> None:
    nodes["Mul.3"].replace_input_with(1, edit.constant(model.graph, "table", np.ones((17, 16), np.float32)))


def weight_computed(model: ir.Model, nodes: dict[str, ir.Node]) -> None:
    nodes["Mul.3"].replace_input_with(1, nodes["Mul"].inputs[0])


def a_difference(model: ir.Model, nodes: dict[str, ir.Node]) -> None:
    nodes["Mul"].inputs[0].producer().op_type = "Sub"  # type: ignore[union-attr]


def two_low_operands(model: ir.Model, nodes: dict[str, ir.Node]) -> None:
    """What a MatMul gives is no residual stream: as r it would be cast to fp32 for nothing."""
    add = nodes["Mul"].inputs[0].producer()  # type: ignore[union-attr]
    assert add is not None
    add.replace_input_with(0, add.inputs[1])


def a_table_for_every_image(model: ir.Model, nodes: dict[str, ir.Node]) -> None:
    add = nodes["Mul"].inputs[0].producer()  # type: ignore[union-attr]
    assert add is not None
    h = add.inputs[1]
    narrow = edit.node("ReduceMax", [add.inputs[0]], "narrow", [("narrow", ir.DataType.FLOAT, ir.Shape([1, 17, 16]))])
    model.graph.insert_before(add, narrow)
    add.replace_input_with(0, narrow.outputs[0])
    add.replace_input_with(1, h)


@pytest.mark.parametrize(
    "change",
    [a_root_read_elsewhere, a_scaled_value_read_elsewhere, another_axis, two_axes, axis_dropped, mean_of_a_product,
     epsilon_computed, no_root, another_value_scaled, weight_of_every_token, weight_computed, a_difference,
     two_low_operands, a_table_for_every_image],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_what_is_not_so_stays(change: Change) -> None:
    model = plain()
    norm = {
        str(node.name).removeprefix("layers.1.norm/"): node
        for node in model.graph
        if "layers.1.norm/" in str(node.name)
    }
    change(model, norm)
    assert fuse_norms(model.graph) == 1, "the last only"
    assert [node.name for node in fused_nodes(model)] == ["norm_f/AddRMSNorm"]
    assert norm["Reciprocal"] in list(model.graph)


def test_layer_norms_stay() -> None:
    model = plain("LayerNorm")
    before = len(model.graph)
    assert fuse_norms(model.graph) == 0 and len(model.graph) == before
