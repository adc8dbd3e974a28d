"""Outlier channels put into a model without changing what it computes: what naive int8 fails on.

Chosen channels of what in_proj and out_proj read are made 30 times as large, and the weight's rows that read them 30
times as small. Trained models have such channels; how many and how large depends on the model.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vimdeploy.export import functions, schema

FACTOR = 30.0
CHANNELS = 4


def channels_of(width: int, i: int) -> np.ndarray:
    """CHANNELS different channels of `width`, others in each layer i; the same on every host."""
    return (np.arange(CHANNELS) * (width // CHANNELS) + 7 * i) % width


def inject(model: ir.Model, fallback: str, factor: float = FACTOR) -> ir.Model:
    """Rewrite every in_proj and out_proj of `model` (fp32, fused or not), in place."""
    graph = model.graph
    ends = ("in_proj.weight.T", "out_proj.weight.T")
    products = [node for node in graph if node.op_type == "MatMul" and str(node.inputs[1].name).endswith(ends)]
    assert products
    for i, product in enumerate(products):
        weight = product.inputs[1].const_value.numpy().copy()
        scale = np.ones(len(weight), np.float32)
        scale[channels_of(len(weight), i)] = factor
        _set(product.inputs[1], weight / scale[:, None])
        maker = product.inputs[0].producer()
        if maker.op_type == schema.ADD_NORM.name:
            _set(maker.inputs[2], maker.inputs[2].const_value.numpy() * scale)
        elif maker.op_type == "Mul" and maker.inputs[1].const_value is not None:
            _set(maker.inputs[1], maker.inputs[1].const_value.numpy() * scale)
        elif maker.op_type == schema.BI_SCAN.name:
            maker.resize_inputs(len(schema.BI_SCAN.inputs))
            maker.replace_input_with(13, _constant(graph, f"{maker.name}:outliers", scale))
        else:  # the sum of two scans, or one token of it
            name = f"{product.name}:outlier_scale"
            scaled = ir.node("Mul", [product.inputs[0], _constant(graph, f"{name}:factors", scale)], name=name)
            out = scaled.outputs[0]
            out.name, out.type, out.shape = name, product.inputs[0].type, product.inputs[0].shape
            graph.insert_before(product, scaled)
            product.replace_input_with(0, out)
    for node in graph:  # one body serves all scans
        if node.op_type == schema.BI_SCAN.name and (len(node.inputs) < 14 or node.inputs[13] is None):
            node.resize_inputs(14)
            node.replace_input_with(
                13, _constant(graph, f"{node.name}:ones", np.ones(node.inputs[8].shape[0], np.float32))
            )
    model.functions.clear()
    functions.attach(model, fallback)
    return model


def _set(value: ir.Value, array: np.ndarray) -> None:
    value.const_value = ir.tensor(array.astype(np.float32), name=value.name)


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.initializers[name] = value
    return value
