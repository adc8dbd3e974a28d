"""Rewrite a bf16 graph so that a runtime without bf16 kernels computes it, rounding for rounding.

    Before: bf16 node -> bf16 value
    After:  fp32 node -> Cast bf16 -> Cast fp32, weights fp32 holding the bf16 values

Each node then computes in fp32 and stores what bf16 would hold: what a GPU with fp32 accumulation does. ONNX Runtime
has no bf16 kernels on x86 CPUs; this is how `verify` still checks a bf16 file there, and says so.
"""

from __future__ import annotations

import onnx_ir as ir

from vimdeploy.export import functions, schema

_LOW, _WIDE = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def emulate_bf16(model: ir.Model) -> ir.Model:
    """Turn every bf16 tensor of `model` into a rounded fp32 one, in place; function bodies are rewritten to match."""
    graph = model.graph
    for value in list(graph.initializers.values()):
        if value.dtype == _LOW:
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy().astype("float32"), name=value.name)
            value.type = ir.TensorType(_WIDE)
    for node in list(graph):
        if node.op_type == "Cast" and node.attributes["to"].value == _LOW:
            node.attributes["to"] = ir.AttrInt64("to", _WIDE)
        for value in node.outputs:
            if value.dtype != _LOW:
                continue
            value.type = ir.TensorType(_WIDE)
            down = ir.node("Cast", [value], {"to": _LOW}, name=f"{value.name}:round")
            up = ir.node("Cast", [down.outputs[0]], {"to": _WIDE}, name=f"{value.name}:widen")
            for cast, dtype in ((down, _LOW), (up, _WIDE)):
                cast.outputs[0].name, cast.outputs[0].type = f"{cast.name}ed", ir.TensorType(dtype)
            readers = [(user, i) for user, i in value.uses() if user is not down]
            graph.insert_after(node, [down, up])
            for user, i in readers:
                user.replace_input_with(i, up.outputs[0])
    bodies = [f for f in model.functions.values() if f.domain == schema.DOMAIN]
    if bodies:
        linear = any(node.domain == "com.microsoft" for body in bodies for node in body)
        model.functions.clear()
        functions.attach(model, "linear-attention" if linear else "scan")
    return model
