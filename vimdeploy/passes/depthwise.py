"""Write the short causal convolution as one Conv, where a builder is slow with many small nodes (TensorRT 8.5).

    Before: Pad (x) -> k x (Slice -> Mul by a tap) -> Adds, from a bias      x (B, L, D)      (taps.py)
    After:  Transpose -> Reshape -> Conv <group = D> -> Reshape -> Transpose

The exporter writes the taps out because ONNX Runtime and Myelin fuse them into one loop.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vimdeploy.passes import edit
from vimdeploy.passes.taps import Taps, find_taps


def depthwise_convolutions(model: ir.Model) -> ir.Model:
    """Replace every chain of taps in `model` (fp32), in place."""
    transposed: dict[ir.Value, ir.Value] = {}
    for taps in find_taps(model.graph):
        _rewrite(model.graph, taps, transposed)
    edit.drop_unread(model.graph)
    return model


def _rewrite(graph: ir.Graph, found: Taps, transposed: dict[ir.Value, ir.Value]) -> None:
    x, name = found.x, found.result.name or ""
    assert x.shape is not None
    batch, length, channels = x.shape
    turned = ir.Shape([batch, channels, length])
    flat, tall = ir.Shape([batch, channels, length]), ir.Shape([batch, channels, length, 1])
    nodes = []
    if x not in transposed:
        node = _node("Transpose", [x], {"perm": [0, 2, 1]}, f"{name}:turned", turned)
        # In two dimensions: the sizes then stay constants where a parser would compute those of a Conv in one.
        sizes = edit.constant(graph, f"{name}:tall", np.array([0, channels, length, 1], dtype=np.int64))
        shape = _node("Reshape", [node.outputs[0], sizes], {}, f"{name}:turned2", tall)
        transposed[x] = shape.outputs[0]
        nodes += [node, shape]
    taps = found.weight()  # (K, D)
    weight = edit.constant(graph, f"{name}:taps", taps.T[:, None, :, None])
    attributes = {"group": taps.shape[1], "kernel_shape": [len(taps), 1], "pads": [found.before, 0, found.after, 0]}
    convolution = _node("Conv", [transposed[x], weight, found.bias], attributes, f"{name}:conv", tall)
    sizes = edit.constant(graph, f"{name}:flat", np.array([0, channels, length], dtype=np.int64))
    squeezed = _node("Reshape", [convolution.outputs[0], sizes], {}, f"{name}:squeezed", flat)
    back = _node("Transpose", [squeezed.outputs[0]], {"perm": [0, 2, 1]}, f"{name}:back", ir.Shape(x.shape))
    graph.insert_before(found.nodes[0], [*nodes, convolution, squeezed, back])
    found.result.replace_all_uses_with(back.outputs[0], replace_graph_outputs=True)


def _node(op: str, inputs: list[ir.Value], attributes: dict[str, object], name: str, shape: ir.Shape) -> ir.Node:
    return edit.node(op, inputs, name, [(f"{name}:0", ir.DataType.FLOAT, shape)], attributes)
