"""Compute of the last block's end what the head reads only: one token.

    Before: MatMul (y) -> AddRMSNorm (h, r) -> Gather <axis = 1> one token
    After:  Gather (y) -> MatMul; Gather (r); AddRMSNorm of (B, C)

Cases, cited in the code:

1. A Gather of one constant position reads an AddRMSNorm that nothing else reads.
2. The Gather moves up through a MatMul by a weight and through sums, where nothing else reads what they give.
3. Anything else stays: pooled models read every token, and two class tokens two of them.
"""

from __future__ import annotations

import onnx_ir as ir

from vimdeploy.export import schema
from vimdeploy.passes import edit


def prune_last_block(graph: ir.Graph) -> int:
    """Rewrite `graph` in place; the number of Gathers moved."""
    moved = 0
    for gather in [node for node in graph if node.op_type == "Gather"]:
        norm = gather.inputs[0].producer() if gather.inputs[0] is not None else None
        if norm is None or not _fits(gather, norm):
            continue
        h, r, weight = norm.inputs
        assert h is not None and r is not None
        done: dict[ir.Value, ir.Value] = {}
        chosen = [_token_of(graph, gather, value, norm, done) for value in (h, r)]
        attributes = {name: attribute.value for name, attribute in norm.attributes.items()}
        one = edit.node(
            norm.op_type,
            [*chosen, weight],
            str(norm.name),
            [(None, None, None), _described(norm.outputs[1])],
            attributes,
            norm.domain,
        )
        graph.insert_before(gather, one)
        edit.take_over(gather.outputs[0], one.outputs[0])
        moved += 1
    edit.drop_unread(graph)
    return moved


def _fits(gather: ir.Node, norm: ir.Node) -> bool:
    """Case 1."""
    index = edit.array_of(gather.inputs[1])
    if index is None or index.ndim or "axis" not in gather.attributes or gather.attributes["axis"].as_int() != 1:
        return False
    if norm.domain != schema.DOMAIN or norm.op_type != schema.ADD_NORM.name:
        return False
    n, r_out = norm.outputs
    rank = len(n.shape) if n.shape is not None else 0
    return rank == 3 and edit.only_reader(n) is gather and not r_out.uses() and not r_out.is_graph_output()


def _token_of(
    graph: ir.Graph, gather: ir.Node, value: ir.Value, reader: ir.Node, done: dict[ir.Value, ir.Value]
) -> ir.Value:
    """`value` (B, L, C) at the token that `gather` chooses, (B, C); case 2. `reader` is read no more afterwards.

    `done`: those made already; a sum may read one value twice.
    """
    if value in done:
        return done[value]
    maker = value.producer()
    inputs: list[ir.Value | None] | None = None
    if maker is not None and edit.only_reader(value) is reader:
        operands = [operand for operand in maker.inputs if operand is not None]
        if maker.op_type == "MatMul" and _is_constant(operands[1], 2) and not _is_constant(operands[0]):
            inputs = [_token_of(graph, gather, operands[0], maker, done), operands[1]]
        elif maker.op_type == "Add" and _by_token(operands):
            inputs = [o if _is_constant(o) else _token_of(graph, gather, o, maker, done) for o in operands]
    if inputs is not None and maker is not None:
        node = edit.node(maker.op_type, inputs, str(maker.name), [_described(value)])
    else:
        node = edit.node("Gather", [value, gather.inputs[1]], f"{value.name}:token", [_described(value)], {"axis": 1})
    graph.insert_before(gather, node)
    done[value] = node.outputs[0]
    return node.outputs[0]


def _by_token(operands: list[ir.Value]) -> bool:
    """Whether a sum is one token for token: of two values of one shape, or of one and a vector."""
    left, right = operands
    if _is_constant(left) or _is_constant(right):
        return _is_constant(left, 1) or _is_constant(right, 1)
    return left.shape is not None and left.shape == right.shape


def _described(value: ir.Value) -> tuple[str, ir.DataType | None, ir.Shape | None]:
    """Name, type and shape of one token of it."""
    shape = None if value.shape is None else ir.Shape([value.shape[0], *value.shape[2:]])
    return f"{value.name}:token", value.dtype, shape


def _is_constant(value: ir.Value, rank: int | None = None) -> bool:
    array = edit.array_of(value)
    return array is not None and (rank is None or array.ndim == rank)
