"""Store the weights of int8 layers in floats, for parsers that take no int8 constant (TensorRT 8.5, 8.6).

    Before: int8 W -> DequantizeLinear ------------------------> Conv
    After:  fp32 W -> QuantizeLinear -> DequantizeLinear ------> Conv

Their parser says "invalid weights type of Int8" (NVIDIA/TensorRT#2163, microsoft/onnxruntime#11535: 8.4 and older).
Exact: the floats are what the int8 values stand for, and the same scales turn them into the same int8 values again.
The builder does that and stores int8, so the engine is as small.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vimdeploy.passes import edit

_INT8 = ir.DataType.INT8


def float_weights(model: ir.Model) -> ir.Model:
    """Rewrite every DequantizeLinear of a constant in `model`, in place."""
    graph = model.graph
    for old in [node for node in graph if node.op_type == "DequantizeLinear"]:
        levels, scales = (edit.array_of(value) for value in old.inputs[:2])
        if levels is None or scales is None or old.inputs[1] is None or old.inputs[2] is None:
            continue
        axis = old.attributes["axis"].as_int() if "axis" in old.attributes else 1
        sides = [-1 if i == axis else 1 for i in range(levels.ndim)]
        floats = levels.astype(np.float32) * scales.reshape(sides)
        name, shape = str(old.name), ir.Shape(floats.shape)
        weight = edit.constant(graph, f"{name}:float", floats)
        scale_and_zero = list(old.inputs[1:3])
        q = edit.node(
            "QuantizeLinear", [weight, *scale_and_zero], f"{name}:q", [(f"{name}:q", _INT8, shape)], {"axis": axis}
        )
        dq = edit.node(
            "DequantizeLinear", [q.outputs[0], *scale_and_zero], f"{name}:dq", [(None, None, None)], {"axis": axis}
        )
        graph.insert_before(old, [q, dq])
        edit.take_over(old.outputs[0], dq.outputs[0])
        graph.remove(old, safe=True)
    edit.drop_unread(graph)
    return model
