"""Both directions of a mixer as one node, which reads B, C and the gate from the rows they are computed in.

    Before: Split (x_proj rows) -> Unsqueeze (B), Unsqueeze (C) -> SelectiveScan, once forward and once reverse -> Add
    After:  BiSelectiveScan (u_f, u_b, ..., x_proj rows, ..., in_proj rows, ...)

Cases, cited in the code:

1. An Add of two scans, one of each direction, that nothing else reads and that share the gate z.
2. Each has D, z, delta_bias and one group; B and C are the last two parts of a Split of rows, as wide as A has states.
3. z is the last part of a Split of rows, or it has no such rows and is read as it is.
4. Anything else stays. Where one convolution serves both directions (bimamba v1) they match like any other two.
"""

from __future__ import annotations

import onnx_ir as ir

from vimdeploy.export import schema
from vimdeploy.passes import edit

_OUR = schema.SCAN.inputs.index


def fuse_scans(graph: ir.Graph) -> int:
    """Rewrite `graph` in place; the number of scans made."""
    made = 0
    for add in [node for node in graph if node.op_type == "Add"]:
        scans = _directions(add)
        rows = [] if scans is None else [_rows(scan) for scan in scans]
        if scans is None or rows[0] is None or rows[1] is None:
            continue
        _rewrite(graph, add, scans, (rows[0], rows[1]))
        made += 1
    edit.drop_unread(graph)
    return made


def _directions(add: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """Case 1, and the first half of 2: the forward and the reverse scan that `add` sums."""
    scans = {}
    for value in add.inputs:
        scan = value.producer() if value is not None else None
        if value is None or scan is None or scan.domain != schema.DOMAIN or scan.op_type != schema.SCAN.name:
            return None
        if edit.only_reader(value) is not add or len(scan.inputs) < len(schema.SCAN.inputs) or None in scan.inputs:
            return None
        scans[scan.attributes["reverse"].as_int()] = scan
    if set(scans) != {0, 1}:
        return None
    forward, backward = scans[0], scans[1]
    same = forward.attributes["delta_softplus"].as_int() == backward.attributes["delta_softplus"].as_int()
    same = same and forward.inputs[_OUR("z")] is backward.inputs[_OUR("z")]
    return (forward, backward) if same and _sides(forward) == _sides(backward) else None


def _sides(scan: ir.Node) -> tuple[object, ...]:
    """(channels, states) as A says."""
    a = scan.inputs[_OUR("A")]
    return () if a is None or a.shape is None else tuple(a.shape)


def _rows(scan: ir.Node) -> ir.Value | None:
    """The rest of case 2: the value whose rows end in B, then C."""
    parts = []
    for name in ("B", "C"):
        value = scan.inputs[_OUR(name)]
        group = value.producer() if value is not None else None
        if group is None or group.op_type != "Unsqueeze" or edit.ints(group.inputs[1]) != [2]:
            return None  # more than one group is a Reshape
        parts.append(group.inputs[0])
    split = parts[0].producer() if parts[0] is not None else None
    if split is None or split.op_type != "Split" or len(split.outputs) < 2 or len(split.inputs) < 2:
        return None
    if parts != list(split.outputs[-2:]) or edit.ints(split.inputs[1])[-2:] != [_sides(scan)[1]] * 2:
        return None
    rows = split.inputs[0]
    return rows if rows is not None and edit.last_axis(rows, split.attributes["axis"].as_int()) else None


def _gate(z: ir.Value) -> ir.Value:
    """Case 3."""
    split = z.producer()
    if split is not None and split.op_type == "Split" and z is split.outputs[-1]:
        rows = split.inputs[0]
        if rows is not None and edit.last_axis(rows, split.attributes["axis"].as_int()):
            return rows
    return z


def _rewrite(graph: ir.Graph, add: ir.Node, scans: tuple[ir.Node, ir.Node], rows: tuple[ir.Value, ir.Value]) -> None:
    z = scans[0].inputs[_OUR("z")]
    assert z is not None
    inputs: dict[str, ir.Value | None] = {"z": _gate(z)}
    for way, scan, row in zip("fb", scans, rows):
        inputs[f"x_{way}"] = row
        inputs |= {f"{name}_{way}": scan.inputs[_OUR(name)] for name in ("u", "delta", "A", "D", "delta_bias")}
    op = schema.BI_SCAN
    scope = str(add.name).rpartition("/")[0]
    fused = edit.node(
        op.name,
        [inputs[name] for name in op.inputs if name not in op.optional],
        f"{scope}/{op.name}" if scope else op.name,
        [(None, None, None)],
        op.node_attributes(delta_softplus=scans[0].attributes["delta_softplus"].as_int()),
        schema.DOMAIN,
    )
    graph.insert_before(add, fused)
    edit.take_over(add.outputs[0], fused.outputs[0])
