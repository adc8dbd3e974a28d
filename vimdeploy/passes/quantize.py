"""Put linear layers into int8 by explicit QuantizeLinear and DequantizeLinear, in the form every runtime here reads.

    Before: x (fp32) ----------------------------------> MatMul (W fp32)
    After:  x -> QuantizeLinear -> DequantizeLinear ---> MatMul (int8 W -> DequantizeLinear)

What the form is for, cited in the code:

1. Symmetric, zero point 0, int8: the only form TensorRT takes. ONNX Runtime turns it into uint8 with zero point 128 by
   itself where the processor wants that (x86-64) and fuses each layer into one MatMulIntegerToFloat.
2. One scale for an activation; one a column for a weight. Scales have 8 significant bits, so that fp16 and bf16 graphs
   made of this one hold the very same scales.
3. Weights are stored as int8: the file is a quarter in those layers. For parsers that want them in floats there is
   float_weights.py.
4. A Gemm becomes MatMul and Add: a quantized Gemm's bias would have to be int32, which TensorRT does not take.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vimdeploy.passes import edit
from vimdeploy.passes.projections import Projection

_FLOAT = ir.DataType.FLOAT
LEVELS = 127
_SCALE_BITS = 8


def quantize(model: ir.Model, ranges: dict[str, float], layers: list[Projection]) -> ir.Model:
    """Quantize each layer named in `ranges` (layer -> the largest |input| to be told apart), in place."""
    for layer in layers:
        if layer.name in ranges:
            _quantize(model.graph, layer, scale_of(ranges[layer.name]))
    edit.drop_unread(model.graph)
    return model


def scale_of(bound: float | np.ndarray) -> np.ndarray:
    """The float32 scale of values up to `bound`: bound / 127, rounded up to 8 significant bits (form 2)."""
    fraction, exponent = np.frexp(np.asarray(bound, np.float64) / LEVELS)
    steps = np.ceil(np.ldexp(fraction, _SCALE_BITS))
    return np.asarray(np.ldexp(steps, exponent - _SCALE_BITS), np.float32)


def quantized_weight(weight: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 weights and their scales, one for each index along `axis`. A column of zeros gets the scale 1."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    bounds = np.abs(weight).max(axis=others)
    scales = scale_of(np.where(bounds > 0, bounds, LEVELS))
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    steps = np.rint(weight.astype(np.float64) / scales.reshape(shape))
    return np.clip(steps, -LEVELS, LEVELS).astype(np.int8), scales


def is_quantized(model: ir.Model) -> bool:
    return any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph)


def quantized_products(graph: ir.Graph) -> list[ir.Node]:
    """The nodes whose data input comes out of a DequantizeLinear: those that must compute in int8."""
    found = []
    for node in graph:
        if node.op_type in ("MatMul", "Gemm", "Conv") and node.inputs[0] is not None:
            maker = node.inputs[0].producer()
            if maker is not None and maker.op_type == "DequantizeLinear":
                found.append(node)
    return found


def _quantize(graph: ir.Graph, layer: Projection, scale: np.ndarray) -> None:
    node = as_matmul(graph, layer.node)  # form 4
    nodes, x, weight = qdq_nodes(graph, layer.name, node, scale)
    graph.insert_before(node, nodes)
    node.replace_input_with(0, x)
    node.replace_input_with(1, weight)


def qdq_nodes(graph: ir.Graph, name: str, node: ir.Node, scale: np.ndarray) -> tuple[list[ir.Node], ir.Value, ir.Value]:
    """The nodes that make a layer's input and weight out of int8, not yet in a graph, and what they make.

    Their constants go into `graph`. `node` is a MatMul or Conv with a constant weight.
    """
    axis = 1 if node.op_type == "MatMul" else 0
    x, weight = node.inputs[0], edit.array_of(node.inputs[1])
    assert x is not None and weight is not None
    levels, scales = quantized_weight(weight, axis)
    x_scale = edit.constant(graph, f"{name}.input:scale", scale)
    x_zero = edit.constant(graph, f"{name}.input:zero", np.array(0, np.int8))  # form 1
    q = _node("QuantizeLinear", [x, x_scale, x_zero], f"{name}.input/Quantize", ir.DataType.INT8, x.shape)
    dq = _node("DequantizeLinear", [q.outputs[0], x_scale, x_zero], f"{name}.input/Dequantize", _FLOAT, x.shape)
    stored = [
        edit.constant(graph, f"{name}.weight:{what}", array)  # forms 2, 3
        for what, array in (("int8", levels), ("scale", scales), ("zero", np.zeros(len(scales), np.int8)))
    ]
    w = _node("DequantizeLinear", stored, f"{name}.weight/Dequantize", _FLOAT, ir.Shape(levels.shape), {"axis": axis})
    return [q, dq, w], dq.outputs[0], w.outputs[0]


def _node(
    op: str,
    inputs: list[ir.Value],
    name: str,
    dtype: ir.DataType,
    shape: ir.Shape | None,
    attributes: dict[str, object] | None = None,
) -> ir.Node:
    return edit.node(op, inputs, name, [(name, dtype, shape)], attributes)


def as_matmul(graph: ir.Graph, node: ir.Node) -> ir.Node:
    """The MatMul that stands, with an Add, in place of a Gemm (x, W (N, K), b) with transB; any other node itself."""
    if node.op_type != "Gemm":
        return node
    x, bias, y = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None, node.outputs[0]
    weight = node.inputs[1]
    matrix = edit.array_of(weight)
    assert weight is not None and matrix is not None
    transposed = edit.constant(graph, f"{weight.name}.T", matrix.T)
    product = edit.node("MatMul", [x, transposed], str(node.name), [(f"{y.name}:product", y.dtype, y.shape)])
    nodes = [product]
    if bias is not None:
        nodes.append(edit.node("Add", [product.outputs[0], bias], f"{node.name}:bias", [(None, None, None)]))
    graph.insert_before(node, nodes)
    edit.take_over(y, nodes[-1].outputs[0])
    graph.remove(node, safe=True)
    return product
