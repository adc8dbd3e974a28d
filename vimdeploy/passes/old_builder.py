"""Two rewrites that let TensorRT 8's builder do without its own compilers: the digits model fell from 111 s to 36 s.

1. The first block has no residual to add, so fuse_norm.py leaves its norm; 8.5 compiles that chain of pointwise layers
   once for each of thirty tactics and three types. The sum before it is one, of the tokens and the position table:

    Before: Add (tokens, table) -> x; Mul (x, x) -> ReduceMean -> ... -> n
    After:  AddRMSNorm (tokens, Expand (table), weight) -> n, x

2. A Gather of one token goes, with the MatMul after it, to Myelin, which shows the inspector no precision and cannot be
   had without cuBLASLt:

    Before: Gather <axis = 1> (y (B, L, C), position)
    After:  Slice (position : position + 1) -> Reshape (0, C)

What is not so stays.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vimdeploy.export import schema
from vimdeploy.passes import edit, fuse_norm


def for_old_builder(model: ir.Model) -> ir.Model:
    """Rewrite `model`, fused and fp32, in place."""
    graph = model.graph
    if any(node.domain == schema.DOMAIN and node.op_type == schema.ADD_NORM.name for node in graph):
        _first_norm(graph)
    for gather in [node for node in graph if node.op_type == "Gather"]:
        _slice(graph, gather)
    edit.drop_unread(graph)
    return model


def _first_norm(graph: ir.Graph) -> None:
    """Rewrite 1."""
    for mean in [node for node in graph if node.op_type == "ReduceMean"]:
        x = fuse_norm.squared(mean)
        norm = fuse_norm.links(mean, x) if x is not None else None
        add = x.producer() if x is not None else None
        if x is None or norm is None or add is None or add.op_type != "Add":
            continue
        tokens, table = add.inputs
        fits = tokens is not None and tokens.shape is not None and tokens.shape == x.shape
        if not fits or tokens is None or table is None or edit.array_of(table) is None:
            continue
        sides = edit.node("Shape", [tokens], f"{table.name}/Shape", [(None, ir.DataType.INT64, ir.Shape([3]))])
        whole = edit.node("Expand", [table, sides.outputs[0]], f"{table.name}/Expand", [(None, table.dtype, x.shape)])
        graph.insert_before(add, [sides, whole])
        fuse_norm.rewrite(graph, x, (tokens, whole.outputs[0]), *norm)


def _slice(graph: ir.Graph, gather: ir.Node) -> None:
    """Rewrite 2."""
    y, index = gather.inputs[0], edit.array_of(gather.inputs[1])
    axis = gather.attributes["axis"].as_int() if "axis" in gather.attributes else 0
    result = gather.outputs[0]
    if y is None or y.shape is None or len(y.shape) != 3 or index is None or index.ndim or axis != 1 or index < 0:
        return
    position, channels = int(index), y.shape[2]
    if not isinstance(channels, int):
        return
    bounds = [
        edit.constant(graph, f"const/int64/1/{value}", np.array([value], dtype=np.int64))
        for value in (position, position + 1, 1)
    ]
    cut = edit.node(
        "Slice", [y, *bounds], f"{gather.name}:slice", [(None, y.dtype, ir.Shape([y.shape[0], 1, channels]))]
    )
    sizes = edit.constant(graph, f"const/int64/2/0,{channels}", np.array([0, channels], dtype=np.int64))
    flat = edit.node("Reshape", [cut.outputs[0], sizes], str(gather.name), [(None, None, None)])
    graph.insert_before(gather, [cut, flat])
    edit.take_over(result, flat.outputs[0])
