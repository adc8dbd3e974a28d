"""Write the short causal convolution as one Conv, where a builder is slow with many small nodes (TensorRT 8.5).

    Before: Pad (x) -> k x (Slice -> Mul by a tap) -> Adds, from a bias      x (B, L, D)
    After:  Transpose -> Reshape -> Conv <group = D> -> Reshape -> Transpose

The exporter writes the taps out because ONNX Runtime and Myelin fuse them into one loop. Cases, cited in the code:

1. All readers of the Pad are Slices of the padded length's tokens, each multiplied by one constant per channel.
2. The products are summed in a chain of Adds that starts from a constant bias and has no other reader on the way.
3. Anything else is left as it is.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def depthwise_convolutions(model: ir.Model) -> ir.Model:
    """Replace every chain of taps in `model` (fp32), in place."""
    graph = model.graph
    transposed: dict[ir.Value, ir.Value] = {}
    for pad in [node for node in graph if node.op_type == "Pad"]:
        found = _match(pad)
        if found is not None:
            _rewrite(graph, pad, *found, transposed)
    for name in [n for n, v in graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        del graph.initializers[name]
    return model


def _match(pad: ir.Node) -> tuple[list[np.ndarray], np.ndarray, list[ir.Node]] | None:
    """(taps in order, bias, the nodes that go), or None (case 3)."""
    x = pad.inputs[0]
    pads = _ints(pad.inputs[1])
    if x is None or x.shape is None or len(x.shape) != 3 or len(pads) != 6 or any(pads[i] for i in (0, 2, 3, 5)):
        return None
    length = x.shape[1]
    taps: dict[int, np.ndarray] = {}
    adds: list[ir.Node] = []
    gone: list[ir.Node] = [pad]
    for cut, _ in pad.outputs[0].uses():  # case 1
        if cut.op_type != "Slice" or len(cut.inputs) != 4 or _ints(cut.inputs[3]) != [1]:
            return None
        (start,), (end,) = _ints(cut.inputs[1]), _ints(cut.inputs[2])
        product = _only_reader(cut.outputs[0])
        if end - start != length or product is None or product.op_type != "Mul":
            return None
        tap = _other(product, cut.outputs[0])
        total = _only_reader(product.outputs[0])
        if tap is None or total is None or total.op_type != "Add":
            return None
        taps[start] = tap
        adds.append(total)
        gone += [cut, product]
    if sorted(taps) != list(range(pads[1] + pads[4] + 1)) or len(set(adds)) != len(taps):
        return None
    biases = [const for add in adds for const in [_other(add, None)] if const is not None]  # case 2
    last = [add for add in adds if not any(user in adds for user, _ in add.outputs[0].uses())]
    if len(biases) != 1 or len(last) != 1 or any(_only_reader(a.outputs[0]) is None for a in adds if a is not last[0]):
        return None
    order = [add for add in adds if add is not last[0]] + last
    return [taps[i] for i in range(len(taps))], biases[0], gone + order


def _rewrite(
    graph: ir.Graph,
    pad: ir.Node,
    taps: list[np.ndarray],
    bias: np.ndarray,
    gone: list[ir.Node],
    transposed: dict[ir.Value, ir.Value],
) -> None:
    x, result = pad.inputs[0], gone[-1].outputs[0]
    assert x is not None and x.shape is not None
    name = result.name or ""
    batch, length, channels = x.shape
    turned = ir.Shape([batch, channels, length])
    flat, tall = ir.Shape([batch, channels, length]), ir.Shape([batch, channels, length, 1])
    before, after = _ints(pad.inputs[1])[1], _ints(pad.inputs[1])[4]
    nodes = []
    if x not in transposed:
        node = _node("Transpose", [x], {"perm": [0, 2, 1]}, f"{name}:turned", turned)
        # In two dimensions: the sizes then stay constants where a parser would compute those of a Conv in one.
        sizes = _constant(graph, f"{name}:tall", np.array([0, channels, length, 1], dtype=np.int64))
        shape = _node("Reshape", [node.outputs[0], sizes], {}, f"{name}:turned2", tall)
        transposed[x] = shape.outputs[0]
        nodes += [node, shape]
    weight = _constant(graph, f"{name}:taps", np.stack(taps, axis=-1)[:, None, :, None])
    offset = _constant(graph, f"{name}:bias", bias)
    attributes = {"group": len(bias), "kernel_shape": [len(taps), 1], "pads": [before, 0, after, 0]}
    convolution = _node("Conv", [transposed[x], weight, offset], attributes, f"{name}:conv", tall)
    sizes = _constant(graph, f"{name}:flat", np.array([0, channels, length], dtype=np.int64))
    squeezed = _node("Reshape", [convolution.outputs[0], sizes], {}, f"{name}:squeezed", flat)
    back = _node("Transpose", [squeezed.outputs[0]], {"perm": [0, 2, 1]}, f"{name}:back", ir.Shape(x.shape))
    graph.insert_before(pad, [*nodes, convolution, squeezed, back])
    result.replace_all_uses_with(back.outputs[0], replace_graph_outputs=True)
    graph.remove(list(reversed(gone)), safe=True)


def _node(op: str, inputs: list[ir.Value], attributes: dict[str, object], name: str, shape: ir.Shape) -> ir.Node:
    node = ir.node(op, inputs, attributes, name=name)  # type: ignore[arg-type]
    node.outputs[0].name, node.outputs[0].shape = f"{name}:0", shape
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return node


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.initializers[name] = value
    return value


def _ints(value: ir.Value | None) -> list[int]:
    return [] if value is None or value.const_value is None else [int(i) for i in value.const_value.numpy()]


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _other(node: ir.Node, value: ir.Value | None) -> np.ndarray | None:
    """The constant vector beside `value` among a node's two inputs."""
    others = [v for v in node.inputs if v is not None and v is not value and v.const_value is not None]
    array = others[0].const_value.numpy() if len(others) == 1 and others[0].const_value is not None else None
    return array if array is not None and array.ndim == 1 else None
