"""passes/fuse_conv.py and taps.py: one test a case, and what must stay as it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import zoo

from vimdeploy.export import schema
from vimdeploy.passes import edit
from vimdeploy.passes.fuse_conv import fuse_convolutions
from vimdeploy.passes.taps import find_taps

OP = schema.BI_CONV


def plain(name: str = "v2") -> ir.Model:
    return zoo.loaded(zoo.NETWORKS[name], fallback="none")


def fused_nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == OP.name]


def inputs_of(node: ir.Node) -> dict[str, ir.Value | None]:
    return dict(zip(OP.inputs, node.inputs))


@pytest.mark.parametrize("name", ["v2", "another state, conv, rank, expansion"])
def test_taps_are_recognised_with_their_weights(name: str) -> None:
    config = zoo.NETWORKS[name]
    weights = zoo.weights_of(config)
    found = find_taps(plain(name).graph)
    assert [(taps.before, taps.after) for taps in found] == [(config.d_conv - 1, 0), (0, config.d_conv - 1)] * 2
    for taps, suffix, order in zip(found[:2], ("", "_b"), (1, -1)):
        want = weights[f"layers.0.mixer.conv1d{suffix}.weight"][:, 0].T[::order]  # (D, 1, K): the last on the token
        np.testing.assert_array_equal(taps.weight(), want.astype(np.float32))
        assert taps.x.name == "layers.0.mixer/Split:0" and taps.bias.name == f"layers.0.mixer.conv1d{suffix}.bias"
        assert taps.nodes[0].op_type == "Pad" and taps.nodes[-1].outputs[0] is taps.result
        assert len(taps.nodes) == 1 + 3 * config.d_conv


@pytest.mark.parametrize("name", ["v2", "layer pairs, v2", "another state, conv, rank, expansion"])
def test_each_direction_keeps_its_weights_with_the_last_tap_on_the_token(name: str) -> None:
    """In the reversed layer of a pair the network's first convolution is the one that sees the future."""
    config, model = zoo.NETWORKS[name], plain(name)
    weights = zoo.weights_of(config)
    assert fuse_convolutions(model.graph) == 2
    for i, node in enumerate(fused_nodes(model)):
        inputs = inputs_of(node)
        suffixes = ("_b", "") if config.bidirectional and i % 2 else ("", "_b")
        for way, suffix in zip("fb", suffixes):
            want = weights[f"layers.{i}.mixer.conv1d{suffix}.weight"][:, 0].T.astype(np.float32)
            weight = edit.array_of(inputs[f"weight_{way}"])
            assert weight is not None and weight.shape == (config.d_conv, config.d_inner)
            np.testing.assert_array_equal(weight, want)
            assert inputs[f"weight_{way}"].name == f"layers.{i}.mixer.conv1d{suffix}.taps"  # type: ignore[union-attr]
            assert inputs[f"bias_{way}"].name == f"layers.{i}.mixer.conv1d{suffix}.bias"  # type: ignore[union-attr]


def test_it_reads_in_projs_rows_and_gives_what_the_projections_read() -> None:
    model = plain()
    fuse_convolutions(model.graph)
    node = fused_nodes(model)[0]
    assert node.name == "layers.0.mixer/BiCausalConv1d" and node.domain == "vim"
    assert {name: a.value for name, a in node.attributes.items()} == schema.PLUGIN_ATTRIBUTES
    assert inputs_of(node)["x"].name == "layers.0.mixer.in_proj/MatMul"  # type: ignore[union-attr]
    assert [value.name for value in node.outputs] == ["layers.0.mixer/Mul.5", "layers.0.mixer/Mul.10"]
    for value, reader in zip(node.outputs, ("x_proj", "x_proj_b")):
        assert value.shape == ir.Shape(["batch", 17, 32]) and value.dtype == ir.DataType.FLOAT
        readers = {use.node.name for use in value.uses()}
        assert f"layers.0.mixer.{reader}/MatMul" in readers and len(readers) == 2  # and the scan
    assert not [n for n in model.graph if n.op_type in ("Pad", "Sigmoid")]
    assert not [name for name in model.graph.initializers if ".taps." in name]


def test_an_x_of_its_own_is_read_as_it_is() -> None:
    """Case 3: x need not be part of wider rows, and a later part of them is not where the op would look."""
    for part in (None, 1):
        model = plain()
        split = next(node for node in model.graph if node.name == "layers.0.mixer/Split")
        x = split.outputs[0]
        if part is None:
            other = edit.node("Neg", [x], "x", [("x", x.dtype, x.shape)]).outputs[0]
            model.graph.insert_after(split, other.producer())  # type: ignore[arg-type]
        else:
            other = split.outputs[part]
        for pad in [use.node for use in tuple(x.uses()) if use.node.op_type == "Pad"]:
            pad.replace_input_with(0, other)
        assert fuse_convolutions(model.graph) == 2
        assert inputs_of(fused_nodes(model)[0])["x"] is other


# Case 4: what must stay.

Change = Callable[[ir.Model, ir.Node, ir.Node], None]


def another_input(model: ir.Model, forward: ir.Node, backward: ir.Node) -> None:
    split = forward.inputs[0].producer()  # type: ignore[union-attr]
    assert split is not None
    backward.replace_input_with(0, split.outputs[1])


def both_see_the_past(model: ir.Model, forward: ir.Node, backward: ir.Node) -> None:
    backward.replace_input_with(1, forward.inputs[1])


def padded_with_ones(model: ir.Model, forward: ir.Node, backward: ir.Node) -> None:
    one = edit.constant(model.graph, "one", np.array(1, np.float32))
    forward.resize_inputs(3)
    forward.replace_input_with(2, one)


def reflected(model: ir.Model, forward: ir.Node, backward: ir.Node) -> None:
    forward.attributes["mode"] = ir.AttrString("mode", "reflect")


def a_product_read_elsewhere(model: ir.Model, forward: ir.Node, backward: ir.Node) -> None:
    cut = next(iter(forward.outputs[0].uses())).node
    model.graph.outputs.append(edit.only_reader(cut.outputs[0]).outputs[0])  # type: ignore[union-attr]


def a_tap_that_is_computed(model: ir.Model, forward: ir.Node, backward: ir.Node) -> None:
    cut = next(iter(forward.outputs[0].uses())).node
    product = edit.only_reader(cut.outputs[0])
    assert product is not None
    product.replace_input_with(1, forward.inputs[0])


def a_token_left_out(model: ir.Model, forward: ir.Node, backward: ir.Node) -> None:
    cut = next(iter(forward.outputs[0].uses())).node
    cut.replace_input_with(2, edit.constant(model.graph, "sixteen", np.array([16])))


def no_activation(model: ir.Model, forward: ir.Node, backward: ir.Node) -> None:
    result = silu_of(forward)
    result.replace_all_uses_with(sum_of(forward))


def another_activation(model: ir.Model, forward: ir.Node, backward: ir.Node) -> None:
    gate = next(use.node for use in sum_of(forward).uses() if use.node.op_type == "Sigmoid")
    gate.op_type = "Tanh"


def the_gate_of_the_other(model: ir.Model, forward: ir.Node, backward: ir.Node) -> None:
    gate = next(use.node for use in sum_of(forward).uses() if use.node.op_type == "Sigmoid")
    gate.replace_input_with(0, forward.inputs[0])


def the_sum_read_elsewhere(model: ir.Model, forward: ir.Node, backward: ir.Node) -> None:
    model.graph.outputs.append(sum_of(forward))


def sum_of(pad: ir.Node) -> ir.Value:
    names = {"layers.0.mixer/Pad": "layers.0.mixer/Add.4", "layers.0.mixer/Pad.2": "layers.0.mixer/Add.8"}
    return next(node.outputs[0] for node in pad.graph if node.name == names[str(pad.name)])  # type: ignore[union-attr]


def silu_of(pad: ir.Node) -> ir.Value:
    return next(use.node.outputs[0] for use in sum_of(pad).uses() if use.node.op_type == "Mul")


@pytest.mark.parametrize(
    "change",
    [another_input, both_see_the_past, padded_with_ones, reflected, a_product_read_elsewhere, a_tap_that_is_computed,
     a_token_left_out, no_activation, another_activation, the_gate_of_the_other, the_sum_read_elsewhere],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_what_is_not_so_stays(change: Change) -> None:
    model = plain()
    forward, backward = [node for node in model.graph if node.op_type == "Pad"][:2]
    change(model, forward, backward)
    assert fuse_convolutions(model.graph) == 1, "layer 1's only"
    assert [node.name for node in fused_nodes(model)] == ["layers.1.mixer/BiCausalConv1d"]
    assert forward in list(model.graph)


@pytest.mark.parametrize("name", ["v1", "forward only", "layer pairs, v1", "layer pairs, forward only"])
def test_one_convolution_stays(name: str) -> None:
    model = plain(name)
    before = len(model.graph)
    assert fuse_convolutions(model.graph) == 0 and len(model.graph) == before
