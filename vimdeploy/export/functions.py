"""What the `vim::` ops mean in standard operators: model-local functions for runtimes without the library.

Two bodies of `vim::SelectiveScan`, chosen at export with `--fallback`:

- ``scan``: one ONNX Scan over the tokens; any runtime, any length.
- ``linear-attention``: com.microsoft LinearAttention (ONNX Runtime 1.30 and later) with one query head a group, one
  key/value head a channel, d_k = states, d_v = 1, decay = dt A in log space (runtimes-and-toolkits.md 0.2).

A body is written for one model: which optional inputs its nodes carry, its io type, its channels. `reverse` stays an
attribute: the body turns the sequences around with Slices whose bounds are computed from it, and constant folding
leaves nothing of that for a forward scan. The fused scan's body (fused_bodies.py) calls the scan's, function in
function: a library that has the one but not the other still computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import onnx_ir as ir
from onnx import parser

from vimdeploy.export import schema
from vimdeploy.export.fused_bodies import AddNormSignature, BiConvSignature, BiScanSignature, cast
from vimdeploy.export.schema import Op

FALLBACKS = ("scan", "linear-attention", "none")
_MICROSOFT = "com.microsoft"


class Signature(Protocol):
    """What the nodes of one op in one model have in common, and so one body can serve."""

    @property
    def op(self) -> Op: ...


@dataclass(frozen=True)
class ScanSignature:
    """What every scan node of one model has in common."""

    op: ClassVar[Op] = schema.SCAN
    io: ir.DataType
    channels: int
    states: int
    groups: int
    has: tuple[bool, bool, bool]  # D, z, delta_bias

    @classmethod
    def of(cls, node: ir.Node) -> ScanSignature:
        """Read from one node whose A is an initializer and whose B comes from an Unsqueeze or has a known shape."""
        present = [i < len(node.inputs) and node.inputs[i] is not None for i in (5, 6, 7)]
        a, b, u = node.inputs[2], node.inputs[3], node.inputs[0]
        assert a is not None and a.shape is not None and u is not None
        groups = b.shape[2] if b is not None and b.shape is not None else 1
        channels, states = (int(d) for d in a.shape)  # type: ignore[arg-type]
        dtype = u.dtype or ir.DataType.FLOAT
        return cls(dtype, channels, states, int(groups), (present[0], present[1], present[2]))  # type: ignore[arg-type]

    @classmethod
    def inside(cls, fused: BiScanSignature) -> ScanSignature:
        """Of the scans that a BiSelectiveScan's body calls."""
        return cls(fused.inner, fused.channels, fused.states, 1, (True, True, True))

    def lines(self, kind: str) -> list[str]:
        """The body of `kind` ("scan" or "linear-attention") in onnx.parser's text."""
        has_D, has_z, has_bias = self.has
        wide = ("u", "delta", "B", "C", *(("z",) if has_z else ()))
        lines = [cast(f"{name}32", name, self.io, ir.DataType.FLOAT) for name in wide]
        lines += [
            f"dt_raw = {'Add (delta32, delta_bias)' if has_bias else 'Identity (delta32)'}",
            # softplus only where the attribute says so; both sides are cheap beside the scan
            "soft = Softplus (dt_raw)",
            "want = Constant <value_int: int = @delta_softplus> ()",
            "want_soft = Cast <to = 9> (want)",
            "dt = Where (want_soft, soft, dt_raw)",
            "dtu = Mul (dt, u32)",
            # step = 1 - 2 reverse, start = -reverse: the whole axis, forward or backward
            "r = Constant <value_int: int = @reverse> ()",
            "one_vector = Constant <value_ints = [1]> ()",
            "two = Constant <value_ints = [2]> ()",
            "huge = Constant <value_ints = [2147483647]> ()",
            "rv = Reshape (r, one_vector)",
            "start = Neg (rv)",
            "twice = Mul (rv, two)",
            "step = Sub (one_vector, twice)",
            "end = Mul (step, huge)",
            "token_axis = Identity (one_vector)",
            *(
                f"{x}_seq = Slice ({y}, start, end, token_axis, step)"
                for x, y in (("dt", "dt"), ("dtu", "dtu"), ("B", "B32"), ("C", "C32"))
            ),
            *(_SCAN if kind == "scan" else _LINEAR_ATTENTION),
            "y_scan = Slice (y_seq, start, end, token_axis, step)",
        ]
        lines += ["skip = Mul (u32, D)", "y_skip = Add (y_scan, skip)"] if has_D else ["y_skip = Identity (y_scan)"]
        if has_z:
            lines += ["z_gate = Sigmoid (z32)", "z_silu = Mul (z32, z_gate)", "y32 = Mul (y_skip, z_silu)"]
        else:
            lines += ["y32 = Identity (y_skip)"]
        sizes = {
            "channels": self.channels,
            "groups": self.groups,
            "states": self.states,
            "wide_channels": self.channels * self.states,
            "group_states": self.groups * self.states,
            "group_channels": self.channels // self.groups,
        }
        return [*(line.format(**sizes) for line in lines), cast("y", "y32", ir.DataType.FLOAT, self.io)]


# State (batch, groups, channels of a group, states). Everything the loop body reads besides its own slices it takes
# from the enclosing scope.
_SCAN = (
    "group_shape = Constant <value_ints = [0, 0, {groups}, {group_channels}]> ()",
    "dt_g = Reshape (dt_seq, group_shape)",
    "dtu_g = Reshape (dtu_seq, group_shape)",
    "a_shape = Constant <value_ints = [{groups}, {group_channels}, {states}]> ()",
    "A_g = Reshape (A, a_shape)",
    "last = Constant <value_ints = [-1]> ()",
    "row = Constant <value_ints = [-2]> ()",
    "batch = Shape <start = 0, end = 1> (u32)",
    "state_shape = Concat <axis = 0> (batch, a_shape)",
    "s_0 = ConstantOfShape <value = float[1] {{0.0}}> (state_shape)",
    # B and C travel as one and are split inside: as two fp16 inputs TensorRT-RTX 1.7 loses their loop axis and fails.
    "BC_seq = Concat <axis = -1> (B_seq, C_seq)",
    "halves = Constant <value_ints = [{states}, {states}]> ()",
    """s_n, y_g = Scan <num_scan_inputs = 3, scan_input_axes = [1, 1, 1], scan_output_axes = [1],
        body = recurrence (float[b, g, d, n] s_in, float[b, g, d] dt_t, float[b, g, d] dtu_t, float[b, g, bc] BC_t)
               => (float[b, g, d, n] s_out, float[b, g, d] y_t) {{
            B_t, C_t = Split <axis = -1> (BC_t, halves)
            dt_c = Unsqueeze (dt_t, last)
            exponent = Mul (dt_c, A_g)
            decay = Exp (exponent)
            kept = Mul (decay, s_in)
            dtu_c = Unsqueeze (dtu_t, last)
            B_r = Unsqueeze (B_t, row)
            gained = Mul (dtu_c, B_r)
            s_out = Add (kept, gained)
            C_c = Unsqueeze (C_t, last)
            y_c = MatMul (s_out, C_c)
            y_t = Squeeze (y_c, last)
        }}> (s_0, dt_g, dtu_g, BC_seq)""",
    "flat_shape = Constant <value_ints = [0, 0, {channels}]> ()",
    "y_seq = Reshape (y_g, flat_shape)",
)

_LINEAR_ATTENTION = (
    "three = Constant <value_ints = [3]> ()",
    "last = Constant <value_ints = [-1]> ()",
    "dt_c = Unsqueeze (dt_seq, last)",
    "exponent = Mul (dt_c, A)",
    "decay_shape = Constant <value_ints = [0, 0, {wide_channels}]> ()",
    "decay = Reshape (exponent, decay_shape)",
    "query_shape = Constant <value_ints = [0, 0, {group_states}]> ()",
    "query = Reshape (C_seq, query_shape)",
    "B_row = Unsqueeze (B_seq, three)",
    "key_tile = Constant <value_ints = [1, 1, {groups}, {group_channels}, {states}]> ()",
    "key_full = Expand (B_row, key_tile)",
    "key = Reshape (key_full, decay_shape)",
    """y_seq, state_n = com.microsoft.LinearAttention <q_num_heads = {groups}, kv_num_heads = {channels},
        update_rule = "gated", scale = 1.0> (query, key, dtu_seq, , decay)""",
)


def function_body(kind: str, signature: Signature, opset: int) -> ir.Function:
    """The function for nodes of this signature, in the given opset.

    `kind` ("scan" or "linear-attention") is how vim::SelectiveScan is computed; the fused ops' bodies leave it to that.
    """
    op, domains = signature.op, [f'"" : {opset}']
    if isinstance(signature, ScanSignature):
        lines, meaning = signature.lines(kind), f"standard operators ({kind})"
        domains += [f'"{_MICROSOFT}" : 1'] if kind == "linear-attention" else []
    else:
        assert isinstance(signature, (BiScanSignature, BiConvSignature, AddNormSignature))
        lines, meaning = signature.lines(opset), "standard operators"
        if isinstance(signature, BiScanSignature):
            meaning = f"vim::{schema.SCAN.name} and {meaning}"
            domains += [f'"{schema.DOMAIN}" : {schema.VERSION}']
    # Named without defaults, which came with a later IR version than files are written in; nodes carry them all.
    attributes = ", ".join((*op.attributes, *schema.PLUGIN_ATTRIBUTES))
    body = "\n".join(lines)
    proto = parser.parse_function(
        f'<domain: "{schema.DOMAIN}", opset_import: [{", ".join(domains)}]>\n'
        f"{op.name} <{attributes}> ({', '.join(op.inputs)}) => ({', '.join(op.outputs)})\n{{\n{body}\n}}"
    )
    for node in proto.node:  # ONNX Runtime 1.21 gives what it makes of nameless nodes one name, and refuses that
        node.name = node.output[0]
    proto.doc_string = f"vim::{op.name} in {meaning}, for runtimes without vimdeploy's library."
    return ir.serde.deserialize_function(proto)


def attach(model: ir.Model, kind: str) -> None:
    """Put bodies for the vim:: nodes of `model` into it, in place, the scan's of `kind`; "none" puts none.

    One body serves all nodes of an op: they must agree in io type, sizes and which optional inputs they have.
    """
    if kind == "none":
        return
    signatures = _signatures(model.graph)
    for signature in signatures:
        function = function_body(kind, signature, model.opset_imports[""])
        model.functions[function.identifier()] = function
    if kind == "linear-attention" and any(isinstance(signature, ScanSignature) for signature in signatures):
        model.opset_imports[_MICROSOFT] = 1


def _signatures(graph: ir.Graph) -> list[Signature]:
    """One for each op that is used, those that others call first."""
    nodes: dict[str, list[ir.Node]] = {name: [] for name in schema.OPS}
    for node in graph:
        if node.domain == schema.DOMAIN:
            nodes[schema.op_of(node).name].append(node)
    found: list[Signature] = []
    scans = {ScanSignature.of(node) for node in nodes[schema.SCAN.name]}
    # There is one scan function: where plain scans stand beside fused ones, these call it in the type of those.
    inner = next(iter(scans)).io if scans else ir.DataType.FLOAT
    both = {BiScanSignature.of(node, inner) for node in nodes[schema.BI_SCAN.name]}
    scans |= {ScanSignature.inside(signature) for signature in both}
    groups: tuple[set[Signature], ...] = (
        set(scans),
        set(both),
        {BiConvSignature.of(node) for node in nodes[schema.BI_CONV.name]},
        {AddNormSignature.of(node) for node in nodes[schema.ADD_NORM.name]},
    )
    for signatures in groups:
        if len(signatures) > 1:
            raise AssertionError(f"the nodes of one op of one model differ: {signatures}")
        found += signatures
    return found
