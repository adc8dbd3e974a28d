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
    for name in [n for n, v in graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        del graph.initializers[name]
    return model


def _split_weights(graph: ir.Graph, split: ir.Node) -> None:
    """Rewrite 1, where the Split is the product's only reader and goes along its last axis."""
    whole = split.inputs[0]
    product = whole.producer() if whole is not None else None
    if whole is None or product is None or product.op_type != "MatMul" or len(tuple(whole.uses())) != 1:
        return
    x, weight, sizes = product.inputs[0], product.inputs[1], split.inputs[1] if len(split.inputs) > 1 else None
    axis = split.attributes["axis"].as_int() if "axis" in split.attributes else 0
    rank = len(whole.shape) if whole.shape is not None else 0
    if weight is None or weight.const_value is None or sizes is None or sizes.const_value is None or not rank:
        return
    if axis not in (-1, rank - 1):
        return
    matrix, start = weight.const_value.numpy(), 0
    for i, (size, part) in enumerate(zip(sizes.const_value.numpy(), split.outputs)):
        tensor = ir.tensor(np.ascontiguousarray(matrix[:, start : start + size]), name=f"{weight.name}:{i}")
        shape = ir.Shape([len(matrix), int(size)])
        columns = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        graph.initializers[str(columns.name)] = columns
        piece = ir.node("MatMul", [x, columns], name=f"{product.name}:{i}")
        _take_over(graph, split, part, piece)
        start += int(size)
    graph.remove([split, product], safe=True)


def _reshape(graph: ir.Graph, node: ir.Node) -> None:
    """Rewrite 2, where every size after the batch is known."""
    result = node.outputs[0]
    if result.shape is None or not all(isinstance(side, int) for side in result.shape[1:]):
        return
    sizes = [0 if i == 0 and not isinstance(side, int) else side for i, side in enumerate(result.shape)]
    axes = node.inputs[1].const_value.numpy() if node.inputs[1] is not None and node.inputs[1].const_value else None
    if axes is None or 0 in axes:  # the batch must stay where 0 copies it from
        return
    name = f"{result.name}:sizes"
    tensor = ir.tensor(np.array(sizes, dtype=np.int64), name=name)
    graph.initializers[name] = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([len(sizes)]), const_value=tensor
    )
    _take_over(graph, node, result, ir.node("Reshape", [node.inputs[0], graph.initializers[name]], name=node.name))
    graph.remove(node, safe=True)


def _take_over(graph: ir.Graph, before: ir.Node, value: ir.Value, node: ir.Node) -> None:
    """Let the first output of `node`, put in before `before`, be what `value` was: type, shape, name, readers."""
    new = node.outputs[0]
    new.type, new.shape = value.type, value.shape
    graph.insert_before(before, node)
    value.replace_all_uses_with(new, replace_graph_outputs=True)
    value.name, new.name = None, value.name
