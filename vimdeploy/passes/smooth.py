"""Move the spread of a linear layer's input channels into its weight: exact, and free where the graph allows.

    Before: x ----------------------------> MatMul (W)
    After:  x / s, by whoever makes x ----> MatMul (s W)       s (K): one factor a channel, a row of W

An int8 tensor has one scale, so a channel thirty times as large as the others leaves those five bits fewer; a weight
has one for each column and bears a large row better (SmoothQuant, arXiv 2211.10438). Who divides, cited in the code:

1. vim::AddRMSNorm, read by this layer only: its weight.
2. A product with a constant vector, read by this layer only: the vector (a norm's last step).
3. A sum with a constant vector in front of this layer: the vector, and on to the product before it (LayerNorm).
4. vim::BiSelectiveScan, read by this layer only: y_scale, which its epilogue multiplies by.
5. Otherwise a new product in front of the layer: exact, not free.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vimdeploy.export import schema
from vimdeploy.passes import edit
from vimdeploy.passes.projections import Projection

_Y_SCALE = schema.BI_SCAN.inputs.index("y_scale")


def smooth(model: ir.Model, factors: dict[str, np.ndarray], layers: list[Projection]) -> ir.Model:
    """Divide the input of each layer named in `factors` by its factors (K,), all positive, in place.

    The function bodies of `model` no longer fit where case 4 applies: attach them again afterwards.
    """
    graph = model.graph
    for layer in layers:
        if layer.name not in factors:
            continue
        s = factors[layer.name].astype(np.float64)
        _divide(graph, layer.input, layer.node, s)
        assert layer.node.op_type == "MatMul"
        _scale_constant(graph, layer.node, 1, s[:, None])
    _complete_y_scales(graph)
    edit.drop_unread(graph)
    return model


def _divide(graph: ir.Graph, x: ir.Value, reader: ir.Node, s: np.ndarray) -> None:
    """Let `reader` read x / s."""
    maker = x.producer()
    alone = edit.only_reader(x) is reader
    if alone and maker is not None and maker.domain == schema.DOMAIN:
        if maker.op_type == schema.ADD_NORM.name and maker.outputs[0] is x:  # case 1
            return _scale_constant(graph, maker, schema.ADD_NORM.inputs.index("weight"), 1 / s)
        if maker.op_type == schema.BI_SCAN.name:  # case 4
            return _scale_y(graph, maker, 1 / s)
    if alone and maker is not None and maker.op_type == "Mul":  # case 2
        i = _vector_input(maker, len(s))
        if i is not None:
            return _scale_constant(graph, maker, i, 1 / s)
    if alone and maker is not None and maker.op_type == "Add":  # case 3
        i = _vector_input(maker, len(s))
        inner = maker.inputs[1 - i] if i is not None else None
        product = inner.producer() if inner is not None else None
        j = _vector_input(product, len(s)) if product is not None and product.op_type == "Mul" else None
        if inner is not None and product is not None and None not in (i, j) and edit.only_reader(inner) is maker:
            assert i is not None and j is not None
            _scale_constant(graph, maker, i, 1 / s)
            return _scale_constant(graph, product, j, 1 / s)
    _insert(graph, x, reader, 1 / s)  # case 5


def _insert(graph: ir.Graph, x: ir.Value, reader: ir.Node, factors: np.ndarray) -> None:
    vector = edit.constant(graph, f"{reader.name}:smooth", factors.astype(np.float32))
    product = edit.node("Mul", [x, vector], f"{reader.name}:smoothed", [(f"{reader.name}:smoothed", x.dtype, x.shape)])
    graph.insert_before(reader, product)
    for i, value in enumerate(reader.inputs):
        if value is x:
            reader.replace_input_with(i, product.outputs[0])


def _vector_input(node: ir.Node, length: int) -> int | None:
    """Which input of a product or sum is a constant vector of `length`, the other being computed."""
    if len(node.inputs) != 2:
        return None
    vectors = [
        i for i, value in enumerate(node.inputs) if (a := edit.array_of(value)) is not None and a.shape == (length,)
    ]
    return vectors[0] if len(vectors) == 1 else None


def _scale_constant(graph: ir.Graph, node: ir.Node, i: int, factors: np.ndarray) -> None:
    """Multiply the constant that is input `i` of `node`; one that others read too stays what it was for them."""
    value = node.inputs[i]
    array = edit.array_of(value)
    assert value is not None and array is not None
    scaled = (array * factors).astype(np.float32)
    if any(use.node is not node for use in value.uses()):
        node.replace_input_with(i, edit.constant(graph, f"{value.name}:{node.name}", scaled))
    else:
        value.const_value = ir.tensor(scaled, name=value.name)


def _scale_y(graph: ir.Graph, scan: ir.Node, factors: np.ndarray) -> None:
    if len(scan.inputs) > _Y_SCALE and scan.inputs[_Y_SCALE] is not None:
        return _scale_constant(graph, scan, _Y_SCALE, factors)
    _set_y_scale(graph, scan, factors.astype(np.float32))


def _set_y_scale(graph: ir.Graph, scan: ir.Node, array: np.ndarray) -> None:
    scan.resize_inputs(_Y_SCALE + 1)
    scan.replace_input_with(_Y_SCALE, edit.constant(graph, f"{scan.name}:y_scale", array))


def _complete_y_scales(graph: ir.Graph) -> None:
    """One function body serves every scan of a model, so all carry y_scale when one does."""
    scans = [node for node in graph if node.domain == schema.DOMAIN and node.op_type == schema.BI_SCAN.name]
    bare = [node for node in scans if len(node.inputs) <= _Y_SCALE or node.inputs[_Y_SCALE] is None]
    for scan in bare if len(bare) < len(scans) else []:
        d = edit.array_of(scan.inputs[schema.BI_SCAN.inputs.index("D_f")])
        assert d is not None
        _set_y_scale(graph, scan, np.ones(len(d), np.float32))
