"""The short convolution of both directions and its SiLU as one node, which reads in_proj's rows where they are.

    Before: Split (in_proj rows) -> Pad -> taps -> x sigmoid(x), with the padding once before and once after the tokens
    After:  BiCausalConv1d (in_proj rows, ...)

Cases, cited in the code:

1. Two convolutions of the same x (taps.py), of as many taps, one that sees only the past and one only the future.
2. Each ends in x * sigmoid(x), and nothing else reads what is before that.
3. x is the first part of a Split or Slice of rows, or it has no such rows and is read as it is.
4. Anything else stays: a mixer with one convolution has no second direction to share the reading with.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vimdeploy.export import schema
from vimdeploy.passes import edit
from vimdeploy.passes.taps import Taps, find_taps


def fuse_convolutions(graph: ir.Graph) -> int:
    """Rewrite `graph` in place; the number of nodes made."""
    by_input: dict[ir.Value, list[Taps]] = {}
    for taps in find_taps(graph):
        by_input.setdefault(taps.x, []).append(taps)
    made = 0
    for x, found in by_input.items():
        forward = [taps for taps in found if taps.before and not taps.after]
        backward = [taps for taps in found if taps.after and not taps.before]
        if len(found) != 2 or not forward or not backward or len(forward[0].taps) != len(backward[0].taps):  # case 1
            continue
        ends = _silu(forward[0].result), _silu(backward[0].result)
        if ends[0] is None or ends[1] is None:
            continue
        _rewrite(graph, x, found[0].nodes[0], (forward[0], backward[0]), (ends[0], ends[1]))
        made += 1
    edit.drop_unread(graph)
    return made


def _silu(x: ir.Value) -> ir.Value | None:
    """Case 2: what x * sigmoid(x) is called."""
    readers = {use.node for use in x.uses()}
    gates = [node for node in readers if node.op_type == "Sigmoid"]
    products = [node for node in readers if node.op_type == "Mul"]
    if x.is_graph_output() or len(readers) != 2 or len(gates) != 1 or len(products) != 1:
        return None
    gate = gates[0].outputs[0]
    fits = edit.only_reader(gate) is products[0] and set(products[0].inputs) == {x, gate}
    return products[0].outputs[0] if fits else None


def _rows(x: ir.Value) -> ir.Value:
    """Case 3."""
    cut = x.producer()
    rows = cut.inputs[0] if cut is not None else None
    if cut is None or rows is None:
        return x
    if cut.op_type == "Split" and x is cut.outputs[0] and edit.last_axis(rows, cut.attributes["axis"].as_int()):
        return rows
    if cut.op_type == "Slice" and len(cut.inputs) == 4 and edit.ints(cut.inputs[1]) == [0]:
        (axis,) = edit.ints(cut.inputs[3]) or [0]
        return rows if edit.last_axis(rows, axis) else x
    return x


def _rewrite(
    graph: ir.Graph, x: ir.Value, first: ir.Node, ways: tuple[Taps, Taps], ends: tuple[ir.Value, ir.Value]
) -> None:
    op = schema.BI_CONV
    inputs: list[ir.Value | None] = [_rows(x)]
    for taps, order in zip(ways, (1, -1)):  # the last tap is on the current token, in either direction
        name = min(str(tap.name) for tap in taps.taps)
        whole = name.removesuffix(".0") if name.endswith(".0") else f"{name}:taps"  # the exporter counts the taps
        inputs += [edit.constant(graph, whole, np.ascontiguousarray(taps.weight()[::order])), taps.bias]
    scope = str(first.name).rpartition("/")[0]
    fused = edit.node(
        op.name,
        inputs,
        f"{scope}/{op.name}" if scope else op.name,
        [(None, None, None)] * 2,
        op.node_attributes(),
        schema.DOMAIN,
    )
    graph.insert_before(first, fused)
    for end, new in zip(ends, fused.outputs):
        edit.take_over(end, new)
