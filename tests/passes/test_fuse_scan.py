"""passes/fuse_scan.py: one test a case, and what must stay as it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import zoo

from vimdeploy.export import functions, schema
from vimdeploy.passes import edit
from vimdeploy.passes.fuse_scan import fuse_scans

SCAN, FUSED = schema.SCAN, schema.BI_SCAN


def plain(name: str = "v2") -> ir.Model:
    return zoo.loaded(zoo.NETWORKS[name], fallback="none")


def scans(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == SCAN.name]


def named(node: ir.Node) -> dict[str, ir.Value | None]:
    """A fused node's inputs by the op's names."""
    return dict(zip(FUSED.inputs, node.inputs))


def test_every_input_comes_from_where_the_scans_had_it() -> None:
    model = plain()
    forward, backward = scans(model)[:2]
    inputs = {way: dict(zip(SCAN.inputs, scan.inputs)) for way, scan in (("f", forward), ("b", backward))}
    rows = {way: inputs[way]["B"].producer().inputs[0].producer().inputs[0] for way in "fb"}  # type: ignore[union-attr]
    in_proj = inputs["f"]["z"].producer().inputs[0]  # type: ignore[union-attr]
    assert fuse_scans(model.graph) == 2
    fused = next(node for node in model.graph if node.op_type == FUSED.name)
    got = named(fused)
    for name in ("u", "delta", "A", "D", "delta_bias"):
        for way in "fb":
            assert got[f"{name}_{way}"] is inputs[way][name], name
    assert (got["x_f"], got["x_b"], got["z"]) == (rows["f"], rows["b"], in_proj)
    assert in_proj.name == "layers.0.mixer.in_proj/MatMul" and rows["b"].name == "layers.0.mixer.x_proj_b/MatMul"  # type: ignore[union-attr]
    assert len(fused.inputs) == 13, "no y_scale: that is absent, not empty"


def test_the_node_is_written_like_any_of_ours() -> None:
    model = plain()
    fuse_scans(model.graph)
    fused = [node for node in model.graph if node.op_type == FUSED.name]
    assert [node.name for node in fused] == [f"layers.{i}.mixer/BiSelectiveScan" for i in range(2)]
    for node in fused:
        assert node.domain == "vim" and node.version is None
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        assert attributes == {"delta_softplus": 1, "plugin_namespace": "vim", "plugin_version": "1"}
        (y,) = node.outputs
        assert y.name is not None and y.name.endswith(".mixer/Add.9"), "the sum's own name"
        assert y.dtype == ir.DataType.FLOAT and y.shape == ir.Shape(["batch", 17, 32])


@pytest.mark.parametrize("name", ["layer pairs, v2", "layer pairs, v1"])
def test_the_forward_scan_is_the_forward_one_in_a_reversed_layer_too(name: str) -> None:
    """There the first direction that the network computes runs backwards."""
    model = plain(name)
    by_output = {scan.inputs[2].name: scan.attributes["reverse"].as_int() for scan in scans(model)}  # type: ignore[union-attr]
    fuse_scans(model.graph)
    fused = [node for node in model.graph if node.op_type == FUSED.name]
    assert len(fused) == 2
    for node in fused:
        got = named(node)
        assert by_output[got["A_f"].name] == 0 and by_output[got["A_b"].name] == 1  # type: ignore[union-attr]
    assert [named(node)["A_f"].name for node in fused] == ["layers.0.mixer.A", "layers.1.mixer.A_b"]  # type: ignore[union-attr]


def test_directions_that_differ_in_A_only() -> None:
    model = plain("v1")
    fuse_scans(model.graph)
    got = named(next(node for node in model.graph if node.op_type == FUSED.name))
    assert got["D_f"] is got["D_b"] and got["delta_bias_f"] is got["delta_bias_b"]
    assert [got[f"A_{way}"].name for way in "fb"] == ["layers.0.mixer.A", "layers.0.mixer.A_b"]  # type: ignore[union-attr]


def test_a_gate_of_its_own_is_read_as_it_is() -> None:
    """Case 3: z need not be part of wider rows."""
    model = plain()
    forward, backward = scans(model)[:2]
    z = forward.inputs[SCAN.inputs.index("z")]
    assert z is not None
    gate = edit.node("Neg", [z], "gate", [("gate", z.dtype, z.shape)])
    model.graph.insert_after(z.producer(), gate)  # type: ignore[arg-type]
    for scan in (forward, backward):
        scan.replace_input_with(SCAN.inputs.index("z"), gate.outputs[0])
    want = run(model)
    assert fuse_scans(model.graph) == 2
    assert named(next(node for node in model.graph if node.op_type == FUSED.name))["z"] is gate.outputs[0]
    np.testing.assert_allclose(run(model), want, rtol=0, atol=1e-5)


def run(model: ir.Model) -> np.ndarray:
    copy = ir.from_proto(ir.to_proto(model))
    functions.attach(copy, "scan")
    return zoo.run(ir.to_proto(copy), zoo.images_for(zoo.BASE))


# Case 4: what must stay. Each takes layer 0's scans, (forward, backward), and their sum, and changes one thing.

Change = Callable[[ir.Model, ir.Node, ir.Node, ir.Node], None]


def one_direction_twice(model: ir.Model, forward: ir.Node, backward: ir.Node, add: ir.Node) -> None:
    backward.attributes["reverse"] = ir.AttrInt64("reverse", 0)


def softplus_in_one_only(model: ir.Model, forward: ir.Node, backward: ir.Node, add: ir.Node) -> None:
    backward.attributes["delta_softplus"] = ir.AttrInt64("delta_softplus", 0)


def two_gates(model: ir.Model, forward: ir.Node, backward: ir.Node, add: ir.Node) -> None:
    backward.replace_input_with(SCAN.inputs.index("z"), forward.inputs[0])


def no_skip(model: ir.Model, forward: ir.Node, backward: ir.Node, add: ir.Node) -> None:
    forward.replace_input_with(SCAN.inputs.index("D"), None)


def no_bias(model: ir.Model, forward: ir.Node, backward: ir.Node, add: ir.Node) -> None:
    backward.resize_inputs(SCAN.inputs.index("delta_bias"))


def read_elsewhere(model: ir.Model, forward: ir.Node, backward: ir.Node, add: ir.Node) -> None:
    model.graph.outputs.append(forward.outputs[0])


def read_by_another_node(model: ir.Model, forward: ir.Node, backward: ir.Node, add: ir.Node) -> None:
    model.graph.insert_after(forward, ir.node("Neg", [forward.outputs[0]], name="reader"))


def summed_with_something_else(model: ir.Model, forward: ir.Node, backward: ir.Node, add: ir.Node) -> None:
    add.replace_input_with(1, forward.inputs[0])


def subtracted(model: ir.Model, forward: ir.Node, backward: ir.Node, add: ir.Node) -> None:
    add.op_type = "Sub"


def C_before_B(model: ir.Model, forward: ir.Node, backward: ir.Node, add: ir.Node) -> None:
    b, c = forward.inputs[3], forward.inputs[4]
    forward.replace_input_with(3, c)
    forward.replace_input_with(4, b)


def B_of_other_rows(model: ir.Model, forward: ir.Node, backward: ir.Node, add: ir.Node) -> None:
    forward.replace_input_with(3, backward.inputs[3])


def rows_that_go_on_after_C(model: ir.Model, forward: ir.Node, backward: ir.Node, add: ir.Node) -> None:
    split = forward.inputs[3].producer().inputs[0].producer()  # type: ignore[union-attr]
    assert split is not None
    first, second, *_ = split.outputs
    group_b, group_c = (forward.inputs[i].producer() for i in (3, 4))  # type: ignore[union-attr]
    group_b.replace_input_with(0, first)  # type: ignore[union-attr]
    group_c.replace_input_with(0, second)  # type: ignore[union-attr]


def groups(model: ir.Model, forward: ir.Node, backward: ir.Node, add: ir.Node) -> None:
    """B and C of several groups come from a Reshape."""
    forward.inputs[3].producer().op_type = "Reshape"  # type: ignore[union-attr]


def other_states(model: ir.Model, forward: ir.Node, backward: ir.Node, add: ir.Node) -> None:
    edit.constant(model.graph, "A of three", -np.ones((32, 3), np.float32))
    backward.replace_input_with(2, model.graph.initializers["A of three"])


@pytest.mark.parametrize(
    "change",
    [one_direction_twice, softplus_in_one_only, two_gates, no_skip, no_bias, read_elsewhere, read_by_another_node,
     summed_with_something_else, subtracted, C_before_B, B_of_other_rows, rows_that_go_on_after_C, groups,
     other_states],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_what_is_not_so_stays(change: Change) -> None:
    model = plain()
    forward, backward = scans(model)[:2]
    add = edit.only_reader(forward.outputs[0])
    assert add is not None
    change(model, forward, backward, add)
    assert fuse_scans(model.graph) == 1, "layer 1's only"
    assert forward in scans(model)
    assert [node.name for node in model.graph if node.op_type == FUSED.name] == ["layers.1.mixer/BiSelectiveScan"]


@pytest.mark.parametrize("name", ["forward only", "layer pairs, forward only"])
def test_a_single_direction_stays(name: str) -> None:
    model = plain(name)
    before = len(model.graph)
    assert fuse_scans(model.graph) == 0 and len(model.graph) == before and len(scans(model)) == 2
