"""Write int8 products as 1 x 1 convolutions, the form in which TensorRT 8.5.3.1 was seen to build them in int8.

    Before: x (..., C) -> Q -> DQ --------------------> MatMul (int8 W (C, N) -> DQ <axis 1>) -> y (..., N)
    After:  x -> Reshape (-1, C, 1, 1) -> Q -> DQ ----> Conv (int8 W^T (N, C, 1, 1) -> DQ <axis 0>) -> Reshape -> y

Exact: the same products of the same integers. A row of 1 x 1 pixels lies in memory as the matrix does, in channel-last
order as in channel-first.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vimdeploy.passes import edit

_FLOAT, _INT8 = ir.DataType.FLOAT, ir.DataType.INT8


def products_as_convolutions(model: ir.Model) -> ir.Model:
    """Rewrite every quantized MatMul of `model` whose sides after the first are known, in place."""
    graph = model.graph
    for product in [node for node in graph if node.op_type == "MatMul"]:
        _convolution(graph, product)
    edit.drop_unread(graph)
    return model


def _convolution(graph: ir.Graph, product: ir.Node) -> None:
    x, weight = product.inputs[0], product.inputs[1]
    dq, w_dq = (value.producer() if value is not None else None for value in (x, weight))
    if dq is None or w_dq is None or dq.op_type != "DequantizeLinear" or w_dq.op_type != "DequantizeLinear":
        return
    q = dq.inputs[0].producer() if dq.inputs[0] is not None else None
    stored = w_dq.inputs[0]
    levels = edit.array_of(stored)
    source = q.inputs[0] if q is not None else None
    y = product.outputs[0]
    if q is None or source is None or stored is None or levels is None or levels.ndim != 2 or y.shape is None:
        return
    sides = list(y.shape)[1:]
    if not all(isinstance(side, int) for side in sides):
        return
    name, (channels, made) = str(product.name), levels.shape
    pixels = ir.Shape([None, channels, 1, 1])
    to = edit.constant(graph, f"const/int64/4/-1,{channels},1,1", np.array([-1, channels, 1, 1], dtype=np.int64))
    whole = [-1, *sides]
    back = edit.constant(
        graph, f"const/int64/{len(whole)}/{','.join(map(str, whole))}", np.array(whole, dtype=np.int64)
    )
    kernel = edit.constant(graph, f"{stored.name}:conv", levels.T.reshape(made, channels, 1, 1))
    flat = edit.node("Reshape", [source, to], f"{name}:pixels", [(f"{name}:pixels", source.dtype, pixels)])
    q4 = edit.node("QuantizeLinear", [flat.outputs[0], *q.inputs[1:]], f"{name}:q", [(f"{name}:q", _INT8, pixels)])
    dq4 = edit.node("DequantizeLinear", [q4.outputs[0], *dq.inputs[1:]], f"{name}:dq", [(f"{name}:dq", _FLOAT, pixels)])
    w4 = edit.node(
        "DequantizeLinear",
        [kernel, *w_dq.inputs[1:]],
        f"{w_dq.name}:conv",
        [(f"{w_dq.name}:conv", _FLOAT, ir.Shape([made, channels, 1, 1]))],
        {"axis": 0},
    )
    conv = edit.node(
        "Conv",
        [dq4.outputs[0], w4.outputs[0]],
        name,
        [(f"{name}:conv", y.dtype, ir.Shape([None, made, 1, 1]))],
        {"kernel_shape": [1, 1]},
    )
    rows = edit.node("Reshape", [conv.outputs[0], back], f"{name}:rows", [(None, None, None)])
    graph.insert_before(product, [flat, q4, dq4, w4, conv, rows])
    edit.take_over(y, rows.outputs[0])
    graph.remove(product, safe=True)
