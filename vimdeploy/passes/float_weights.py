"""Store the weights of int8 layers in floats, for parsers that take no int8 constant (TensorRT 8.5, 8.6).

    Before: int8 W (K, N) -> DequantizeLinear <axis = 1> --------------------------------------> MatMul
    After:  fp32 W^T (N, K) -> QuantizeLinear -> DequantizeLinear <axis = 0> -> Transpose -----> MatMul

Their parser says "invalid weights type of Int8" (NVIDIA/TensorRT#2163, microsoft/onnxruntime#11535: 8.4 and older).
Exact: the floats are what the int8 values stand for, and the same scales turn them into the same int8 values again.
The builder does that and stores int8, so the engine is as small. The transposed form is how PyTorch's quantized Linear
layers reach TensorRT, whose scales it expects along the first axis. Convolutions keep their layout.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vimdeploy.passes import edit

_FLOAT, _INT8 = ir.DataType.FLOAT, ir.DataType.INT8


def float_weights(model: ir.Model, *, transposed: bool = True) -> ir.Model:
    """Rewrite every DequantizeLinear of a constant in `model`, in place. Without `transposed` the layout stays."""
    graph = model.graph
    for old in [node for node in graph if node.op_type == "DequantizeLinear"]:
        levels, scales = (edit.array_of(value) for value in old.inputs[:2])
        if levels is None or scales is None or old.inputs[1] is None or old.inputs[2] is None:
            continue
        axis = old.attributes["axis"].as_int() if "axis" in old.attributes else 1
        turn = transposed and axis == 1 and levels.ndim == 2
        sides = [-1 if i == axis else 1 for i in range(levels.ndim)]
        floats = levels.astype(np.float32) * scales.reshape(sides)
        name = str(old.name)
        weight = edit.constant(graph, f"{name}:float", floats.T if turn else floats)
        shape, along = ir.Shape(floats.T.shape if turn else floats.shape), {"axis": 0 if turn else axis}
        scale_and_zero = list(old.inputs[1:3])
        q = edit.node("QuantizeLinear", [weight, *scale_and_zero], f"{name}:q", [(f"{name}:q", _INT8, shape)], along)
        dq = edit.node(
            "DequantizeLinear", [q.outputs[0], *scale_and_zero], f"{name}:dq", [(f"{name}:dq", _FLOAT, shape)], along
        )
        made = [q, dq]
        if turn:
            back = edit.node("Transpose", [dq.outputs[0]], f"{name}:turned", [(None, None, None)], {"perm": [1, 0]})
            made.append(back)
        graph.insert_before(old, made)
        edit.take_over(old.outputs[0], made[-1].outputs[0])
        graph.remove(old, safe=True)
    edit.drop_unread(graph)
    return model
