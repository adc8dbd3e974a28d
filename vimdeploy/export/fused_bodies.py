"""What the fused ops mean in terms of `vim::SelectiveScan` and standard operators, in onnx.parser's text.

Each body computes in fp32, as the kernels do, whatever the io type. Rows of a known width are cut with Slices counted
from the end of the axis, so that a body depends on neither the batch, the length nor the width of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from vimdeploy.export import schema
from vimdeploy.export.schema import Op

_FLOAT = ir.DataType.FLOAT
_TO_END = 2**31 - 1


def _side(node: ir.Node, op: Op, name: str, axis: int) -> int:
    """A side of a weight of known shape."""
    value = node.inputs[op.inputs.index(name)]
    assert value is not None and value.shape is not None
    side = value.shape[axis]
    assert isinstance(side, int)
    return side


def _io(node: ir.Node) -> ir.DataType:
    value = node.inputs[0]
    return (value.dtype if value is not None else None) or _FLOAT


def cast(name: str, source: str, io: ir.DataType, to: ir.DataType) -> str:
    """`name`, which is `source` (of type `io`) in the type `to`."""
    return f"{name} = Identity ({source})" if io == to else f"{name} = Cast <to = {int(to)}> ({source})"


def _ints(name: str, *values: int) -> str:
    # As a tensor: ONNX Runtime 1.21 does not read a Pad's sizes from `value_ints`.
    return f"{name} = Constant <value = int64[{len(values)}] {{{', '.join(map(str, values))}}}> ()"


@dataclass(frozen=True)
class BiScanSignature:
    """What every BiSelectiveScan of one model has in common. `inner`: the io type of the two scans inside."""

    op: ClassVar[Op] = schema.BI_SCAN
    io: ir.DataType
    channels: int
    states: int
    has_y_scale: bool
    inner: ir.DataType = _FLOAT

    @classmethod
    def of(cls, node: ir.Node, inner: ir.DataType = _FLOAT) -> BiScanSignature:
        """Read from one node whose A has a known shape."""
        channels, states = (_side(node, cls.op, "A_f", axis) for axis in (0, 1))
        scaled = len(node.inputs) == len(cls.op.inputs) and node.inputs[-1] is not None
        return cls(_io(node), channels, states, scaled, inner)

    def lines(self, opset: int) -> list[str]:
        """Two scans, each gated: the gate of the sum is the sum of the gated."""
        lines = [
            _ints("B_begin", -2 * self.states),
            _ints("C_begin", -self.states),
            _ints("z_begin", -self.channels),
            _ints("to_end", _TO_END),
            _ints("last", -1),
            _ints("group_axis", 2),
            "z_part = Slice (z, z_begin, to_end, last)",
            cast("z_in", "z_part", self.io, self.inner),
        ]
        plugin = ", ".join(f'{name} = "{value}"' for name, value in schema.PLUGIN_ATTRIBUTES.items())
        for reverse, way in enumerate("fb"):
            lines += [
                f"B_rows_{way} = Slice (x_{way}, B_begin, C_begin, last)",
                f"C_rows_{way} = Slice (x_{way}, C_begin, to_end, last)",
                f"B_group_{way} = Unsqueeze (B_rows_{way}, group_axis)",
                f"C_group_{way} = Unsqueeze (C_rows_{way}, group_axis)",
                cast(f"B_{way}", f"B_group_{way}", self.io, self.inner),
                cast(f"C_{way}", f"C_group_{way}", self.io, self.inner),
                cast(f"u_in_{way}", f"u_{way}", self.io, self.inner),
                cast(f"delta_in_{way}", f"delta_{way}", self.io, self.inner),
                f"y_{way} = {schema.DOMAIN}.{schema.SCAN.name} "
                f"<delta_softplus: int = @delta_softplus, reverse = {reverse}, {plugin}> "
                f"(u_in_{way}, delta_in_{way}, A_{way}, B_{way}, C_{way}, D_{way}, z_in, delta_bias_{way})",
                cast(f"y32_{way}", f"y_{way}", self.inner, _FLOAT),
            ]
        lines += ["y_sum = Add (y32_f, y32_b)"]
        lines += [f"y32 = {'Mul (y_sum, y_scale)' if self.has_y_scale else 'Identity (y_sum)'}"]
        return [*lines, cast("y", "y32", _FLOAT, self.io)]


@dataclass(frozen=True)
class BiConvSignature:
    """What every BiCausalConv1d of one model has in common."""

    op: ClassVar[Op] = schema.BI_CONV
    io: ir.DataType
    channels: int
    taps: int

    @classmethod
    def of(cls, node: ir.Node) -> BiConvSignature:
        """Read from one node whose weights have known shapes."""
        return cls(_io(node), _side(node, cls.op, "weight_f", 1), _side(node, cls.op, "weight_f", 0))

    def lines(self, opset: int) -> list[str]:
        """One product a tap, of the sequence padded at both ends: fused into one loop by ONNX Runtime and Myelin."""
        reach = self.taps - 1
        lines = [
            _ints("start", 0),
            _ints("to_end", _TO_END),
            _ints("width", self.channels),
            _ints("last", -1),
            _ints("token_axis", 1),
            _ints("pads", 0, reach, 0, 0, reach, 0),
            "x_part = Slice (x, start, width, last)",
            cast("x32", "x_part", self.io, _FLOAT),
            "padded = Pad (x32, pads)",
            *(f"tap_{k} = Constant <value_int = {k}> ()" for k in range(self.taps)),
            *(_ints(f"begin_{i}", i) for i in range(2 * reach + 1)),
            *(_ints(f"end_{i}", i - 2 * reach) for i in range(2 * reach)),
            f"end_{2 * reach} = Identity (to_end)",
        ]
        for way, shifts in (("f", range(self.taps)), ("b", range(2 * reach, reach - 1, -1))):
            total = f"bias_{way}"
            for k, shift in enumerate(shifts):
                lines += [
                    f"x_{way}_{k} = Slice (padded, begin_{shift}, end_{shift}, token_axis)",
                    f"w_{way}_{k} = Gather <axis = 0> (weight_{way}, tap_{k})",
                    f"p_{way}_{k} = Mul (x_{way}_{k}, w_{way}_{k})",
                    f"s_{way}_{k} = Add ({total}, p_{way}_{k})",
                ]
                total = f"s_{way}_{k}"
            lines += [
                f"gate_{way} = Sigmoid ({total})",
                f"u32_{way} = Mul ({total}, gate_{way})",
                cast(f"u_{way}", f"u32_{way}", _FLOAT, self.io),
            ]
        return lines


@dataclass(frozen=True)
class AddNormSignature:
    """What every AddRMSNorm of one model has in common."""

    op: ClassVar[Op] = schema.ADD_NORM
    io: ir.DataType

    @classmethod
    def of(cls, node: ir.Node) -> AddNormSignature:
        return cls(_io(node))

    def lines(self, opset: int) -> list[str]:
        """The exporter's own form, from plain operators (ReduceMean took its axes as an attribute before opset 18)."""
        mean = "ReduceMean (square, last)" if opset >= 18 else "ReduceMean <axes = [-1]> (square)"
        return [
            cast("h32", "h", self.io, _FLOAT),
            "r_out = Add (r, h32)",
            "square = Mul (r_out, r_out)",
            _ints("last", -1),
            f"mean = {mean}",
            "eps = Constant <value_float: float = @epsilon> ()",
            "shifted = Add (mean, eps)",
            "root = Sqrt (shifted)",
            "scale = Reciprocal (root)",
            "scaled = Mul (r_out, scale)",
            "n32 = Mul (scaled, weight)",
            cast("n", "n32", _FLOAT, self.io),
        ]
