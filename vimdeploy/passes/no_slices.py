"""Write a Vim graph without slices of activations and without computed shapes, for a builder that is slow with both.

TensorRT 8.5's parser turns each Slice, Split and Unsqueeze of a dynamic batch into a subgraph of shape arithmetic. On
an H100 its optimizer spent 49 s in two passes over an eight-block Vim (828 layers) before it timed a first kernel.
These rewrites take out what makes it compute shapes; how much time they save has not been measured. Each is exact:

1. MatMul (x, W) -> Split            becomes one MatMul for each part, with that part of W's columns. No copies either:
                                     a plugin wants its inputs dense.
2. Unsqueeze (x, axis) with sizes    becomes Reshape to constant sizes, 0 for those that are copied.
   known after the batch
3. depthwise.py                      the taps of the short convolution, as one Conv.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vimdeploy.passes import edit
from vimdeploy.passes.depthwise import depthwise_convolutions


def without_slices(model: ir.Model) -> ir.Model:
    """Rewrite `model` (fp32), in place."""
    depthwise_convolutions(model)
    graph = model.graph
    for node in list(graph):
        if node.op_type == "Split":
            _split_weights(graph, node)
        elif node.op_type == "Unsqueeze":
            _reshape(graph, node)
    edit.drop_unread(graph)
    return model


def _split_weights(graph: ir.Graph, split: ir.Node) -> None:
    """Rewrite 1, where the Split is the product's only reader and goes along its last axis."""
    whole = split.inputs[0]
    product = whole.producer() if whole is not None else None
    if whole is None or product is None or product.op_type != "MatMul" or edit.only_reader(whole) is not split:
        return
    x, weight = product.inputs[0], product.inputs[1]
    cut = weight.producer() if weight is not None else None
    int8 = cut is not None and cut.op_type == "DequantizeLinear" and edit.array_of(cut.inputs[0]) is not None
    matrix = edit.array_of(cut.inputs[0] if cut is not None and int8 else weight)
    sizes = edit.ints(split.inputs[1]) if len(split.inputs) > 1 else []
    axis = split.attributes["axis"].as_int() if "axis" in split.attributes else 0
    if weight is None or matrix is None or not sizes or not edit.last_axis(whole, axis):
        return
    start = 0
    for i, (size, part) in enumerate(zip(sizes, split.outputs)):
        stored = f"{weight.name}:{i}:int8" if int8 else f"{weight.name}:{i}"
        columns = edit.constant(graph, stored, matrix[:, start : start + size])
        if cut is not None and int8:  # the columns' scales go with them
            parts = [edit.array_of(value) for value in cut.inputs[1:3]]
            beside = [
                edit.constant(graph, f"{weight.name}:{i}:{what}", array[start : start + size])
                for what, array in zip(("scale", "zero"), parts)
                if array is not None
            ]
            shape = ir.Shape([len(matrix), size])
            name = f"{cut.name}:{i}"
            made = edit.node(cut.op_type, [columns, *beside], name, [(name, weight.dtype, shape)], {"axis": 1})
            graph.insert_before(split, made)
            columns = made.outputs[0]
        piece = edit.node("MatMul", [x, columns], f"{product.name}:{i}", [(None, None, None)])
        graph.insert_before(split, piece)
        edit.take_over(part, piece.outputs[0])
        start += size
    graph.remove([split, product], safe=True)


def _reshape(graph: ir.Graph, node: ir.Node) -> None:
    """Rewrite 2, where every size after the batch is known."""
    result = node.outputs[0]
    if result.shape is None or not all(isinstance(side, int) for side in result.shape[1:]):
        return
    sizes = [0 if i == 0 and not isinstance(side, int) else side for i, side in enumerate(result.shape)]
    axes = edit.ints(node.inputs[1])
    if not axes or 0 in axes:  # the batch must stay where 0 copies it from
        return
    constant = edit.constant(graph, f"{result.name}:sizes", np.array(sizes, dtype=np.int64))
    reshape = edit.node("Reshape", [node.inputs[0], constant], str(node.name), [(None, None, None)])
    graph.insert_before(node, reshape)
    edit.take_over(result, reshape.outputs[0])
    graph.remove(node, safe=True)
