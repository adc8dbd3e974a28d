"""The residual add and the RMSNorm behind it as one node, which writes the stream once and reads it once.

    Before: Add (r, h) -> x; Mul (x, x) -> ReduceMean -> Add epsilon -> Sqrt -> Reciprocal -> Mul x -> Mul weight
    After:  AddRMSNorm (h, r, weight) -> n, r_out

Cases, cited in the code:

1. The norm's links are read by each other only; x may be read by anybody, and is then r_out.
2. x is a sum of two values of one shape: h, which a typed graph has in the low type, and the residual stream r, which
   it has in fp32 (precision.py). The first block has no residual yet, and keeps its norm.
3. Anything else stays: LayerNorm, a norm of what is no sum.
"""

from __future__ import annotations

import onnx_ir as ir

from vimdeploy.export import schema
from vimdeploy.passes import edit
from vimdeploy.passes.precision import low_values


def fuse_norms(graph: ir.Graph) -> int:
    """Rewrite `graph` in place; the number of nodes made."""
    low = low_values(graph)
    made = 0
    for mean in [node for node in graph if node.op_type == "ReduceMean"]:
        x = squared(mean)
        norm = links(mean, x) if x is not None else None
        operands = _operands(x, low) if x is not None else None
        if x is None or norm is None or operands is None:
            continue
        rewrite(graph, x, operands, *norm)
        made += 1
    edit.drop_unread(graph)
    return made


def squared(mean: ir.Node) -> ir.Value | None:
    """x, where `mean` is that of its squares over the last axis."""
    square = mean.inputs[0].producer() if mean.inputs[0] is not None else None
    axes = edit.ints(mean.inputs[1]) if len(mean.inputs) > 1 else []
    if "axes" in mean.attributes:
        axes = list(mean.attributes["axes"].as_ints())
    kept = "keepdims" not in mean.attributes or mean.attributes["keepdims"].as_int() == 1
    if square is None or square.op_type != "Mul" or square.inputs[0] is not square.inputs[1] or not kept:
        return None
    x = square.inputs[0]
    fits = x is not None and len(axes) == 1 and edit.last_axis(x, axes[0])
    return x if fits and edit.only_reader(square.outputs[0]) is mean else None


def links(mean: ir.Node, x: ir.Value) -> tuple[float, ir.Value, ir.Value] | None:
    """Case 1: (epsilon, weight, n)."""
    shifted = _link(mean.outputs[0], "Add")
    epsilon = edit.array_of(_beside(shifted, mean.outputs[0])) if shifted else None
    root = _link(shifted.outputs[0], "Sqrt") if shifted else None
    scale = _link(root.outputs[0], "Reciprocal") if root else None
    scaled = _link(scale.outputs[0], "Mul") if scale else None
    last = _link(scaled.outputs[0], "Mul") if scaled else None
    if epsilon is None or epsilon.size != 1 or scale is None or scaled is None or last is None:
        return None
    weight = _beside(last, scaled.outputs[0])
    vector = edit.array_of(weight)
    if _beside(scaled, scale.outputs[0]) is not x or weight is None or vector is None or vector.ndim != 1:
        return None
    return float(epsilon.item()), weight, last.outputs[0]


def _link(value: ir.Value, op: str) -> ir.Node | None:
    """The one reader of `value`, where it is an `op`."""
    reader = edit.only_reader(value)
    return reader if reader is not None and reader.op_type == op else None


def _beside(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The other of a node's two inputs."""
    others = [other for other in node.inputs if other is not value]
    return others[0] if len(others) == 1 else None


def _operands(x: ir.Value, low: set[ir.Value]) -> tuple[ir.Value, ir.Value] | None:
    """Case 2: (h, r)."""
    add = x.producer()
    if add is None or add.op_type != "Add" or None in add.inputs:
        return None
    left, right = add.inputs
    assert left is not None and right is not None
    if left.const_value is not None or right.const_value is not None or left.shape is None:
        return None
    if left.shape != right.shape or (left in low) == (right in low):
        return None
    return (left, right) if left in low else (right, left)


def rewrite(
    graph: ir.Graph,
    x: ir.Value,
    operands: tuple[ir.Value, ir.Value],
    epsilon: float,
    weight: ir.Value,
    n: ir.Value,
) -> None:
    op = schema.ADD_NORM
    add, last = x.producer(), n.producer()
    assert add is not None and last is not None
    scope = str(last.name).rpartition("/")[0]
    fused = edit.node(
        op.name,
        [*operands, weight],
        f"{scope}/{op.name}" if scope else op.name,
        [(None, None, None)] * 2,
        op.node_attributes(epsilon=epsilon),
        schema.DOMAIN,
    )
    graph.insert_before(add, fused)
    edit.take_over(n, fused.outputs[0])
    edit.take_over(x, fused.outputs[1])
