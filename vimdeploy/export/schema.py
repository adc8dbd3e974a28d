"""The `vim` operator domain as ONNX knows it: names, OpSchemas, type and shape inference, from one table.

Checkers, shape inference, exporters, passes and adapters' tests all ask it. `SelectiveScan` is what an export writes
(design.md, "The op"); the other three are made of it and of standard operators by passes/fuse.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx_ir as ir
from onnx import defs

from vimdeploy.errors import ModelFileError

DOMAIN = "vim"
VERSION = 1
#: Written out on every node: TensorRT's parser prefers a plugin over the local function only where it reads them.
PLUGIN_ATTRIBUTES = {"plugin_namespace": "vim", "plugin_version": "1"}


@dataclass(frozen=True, eq=False)
class Op:
    """One operator. Inputs and outputs share one io type T (fp32, fp16, bf16), but for those in `fp32`."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    fp32: tuple[str, ...]  # inputs and outputs that are fp32 whatever T is
    shapes: tuple[tuple[str, str], ...]  # an output's sides: those of the first input but the last, that of the second
    attributes: Mapping[str, int | float]  # with their defaults
    doc: str
    optional: tuple[str, ...] = field(default=())

    def node_attributes(self, **given: int | float) -> dict[str, Any]:
        """All attributes of a node, `given` ones and defaults, in the order they are written."""
        unknown = set(given) - set(self.attributes)
        if unknown:
            raise TypeError(f"vim::{self.name} has no attribute {min(unknown)!r}")
        return {**self.attributes, **given, **PLUGIN_ATTRIBUTES}


SCAN = Op(
    name="SelectiveScan",
    inputs=("u", "delta", "A", "B", "C", "D", "z", "delta_bias"),
    optional=("D", "z", "delta_bias"),
    outputs=("y",),
    fp32=("A", "D", "delta_bias"),
    shapes=(("u", "u"),),
    attributes={"delta_softplus": 1, "reverse": 0},
    doc="""Selective state-space scan (Mamba), channel-last, one direction.
dt = softplus(delta + delta_bias); s_t = exp(dt_t A) * s_prev + dt_t u_t B_t; y_t = <C_t, s_t> + D u_t, then times
z sigmoid(z). u, delta, z, y are (batch, length, channels); A (channels, states); B, C (batch, length, groups, states);
D, delta_bias (channels). With reverse = 1 the scan runs from the last token to the first; outputs stay in place.""",
)

BI_SCAN = Op(
    name="BiSelectiveScan",
    inputs=("u_f", "u_b", "delta_f", "delta_b", "A_f", "A_b", "x_f", "x_b", "D_f", "D_b", "z",
            "delta_bias_f", "delta_bias_b", "y_scale"),
    optional=("y_scale",),
    outputs=("y",),
    fp32=("A_f", "A_b", "D_f", "D_b", "delta_bias_f", "delta_bias_b", "y_scale"),
    shapes=(("u_f", "u_f"),),
    attributes={"delta_softplus": 1},
    doc="""Both directions of a bidirectional Mamba mixer, summed and gated once.
y = (scan(u_f, delta_f, A_f, B_f, C_f, D_f, delta_bias_f) + reverse scan(u_b, delta_b, A_b, B_b, C_b, D_b,
delta_bias_b)) * z sigmoid(z) * y_scale, with the scan of vim::SelectiveScan. u, delta, y are (batch, length,
channels). x_f, x_b (batch, length, P) are rows whose last 2 * states columns are B_t, then C_t. The gate is the last
`channels` columns of z's rows (batch, length, W). A (channels, states); D, delta_bias, y_scale (channels).""",
)  # fmt: skip

BI_CONV = Op(
    name="BiCausalConv1d",
    inputs=("x", "weight_f", "bias_f", "weight_b", "bias_b"),
    outputs=("u_f", "u_b"),
    fp32=("weight_f", "bias_f", "weight_b", "bias_b"),
    shapes=(("x", "bias_f"), ("x", "bias_b")),
    attributes={},
    doc="""The short causal depthwise convolution of a mixer in both directions, and SiLU.
u_f[t] = silu(bias_f + sum_k weight_f[k] x[t - (K - 1) + k]); u_b[t] = silu(bias_b + sum_k weight_b[k] x[t + (K - 1) -
k]); x is 0 outside the sequence. Of the rows of x (batch, length, W) the first `channels` columns are read; weight (K,
channels); bias (channels); u (batch, length, channels).""",
)

ADD_NORM = Op(
    name="AddRMSNorm",
    inputs=("h", "r", "weight"),
    outputs=("n", "r_out"),
    fp32=("r", "weight", "r_out"),
    shapes=(("h", "h"), ("r", "r")),
    attributes={"epsilon": 1e-5},
    doc="""Residual add and RMSNorm over the last axis.
r_out = h + r; n = r_out / sqrt(mean(r_out^2) + epsilon) * weight. h, r, n, r_out are (..., channels); the residual
stream r, r_out is fp32.""",
)

OPS = {op.name: op for op in (SCAN, BI_SCAN, BI_CONV, ADD_NORM)}


def op_of(node: ir.Node) -> Op:
    """What a node of this domain is. Raises ModelFileError for an op that is not in the table."""
    if node.op_type not in OPS:
        raise ModelFileError(
            f"{node.name or 'a node'} is a {DOMAIN}::{node.op_type}, which this vimdeploy does not know",
            hint="use the vimdeploy version that wrote the file, or a later one",
        )
    return OPS[node.op_type]


def used_in(graph: ir.Graph) -> dict[str, int]:
    """The ops of this domain that a graph uses, in the table's order, with the number of their nodes."""
    names = [node.op_type for node in graph if node.domain == DOMAIN]
    return {name: names.count(name) for name in OPS if name in names}


@functools.cache
def register() -> None:
    """Make the `vim` domain known to onnx.checker and onnx.shape_inference, once a process."""
    for op in OPS.values():
        defs.register_schema(_schema(op))


def _schema(op: Op) -> defs.OpSchema:
    formal, option = defs.OpSchema.FormalParameter, defs.OpSchema.FormalParameterOption
    attribute, kind = defs.OpSchema.Attribute, defs.OpSchema.AttrType

    def parameter(name: str) -> defs.OpSchema.FormalParameter:
        kept = option.Optional if name in op.optional else option.Single
        return formal(name, "tensor(float)" if name in op.fp32 else "T", param_option=kept)

    schema = defs.OpSchema(
        op.name,
        DOMAIN,
        VERSION,
        doc=op.doc,
        inputs=[parameter(name) for name in op.inputs],
        outputs=[parameter(name) for name in op.outputs],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "io type; inside is fp32")],
        attributes=[
            *(
                attribute(name, onnx.helper.make_attribute(name, default), _ATTRIBUTES[name])
                for name, default in op.attributes.items()
            ),
            *(attribute(name, kind.STRING, "read by TensorRT's parser", required=False) for name in PLUGIN_ATTRIBUTES),
        ],
    )
    schema.set_type_and_shape_inference_function(functools.partial(_infer, op))
    return schema


_ATTRIBUTES = {
    "delta_softplus": "apply softplus to delta",
    "reverse": "scan from the last token to the first",
    "epsilon": "added to the mean of squares",
}


def _infer(op: Op, context: onnx.shape_inference.InferenceContext) -> None:
    """Each output's type, and its shape as far as `op.shapes` can tell it."""
    for i, (output, (rows, channels)) in enumerate(zip(op.outputs, op.shapes, strict=True)):
        first, last = (context.get_input_type(op.inputs.index(name)).tensor_type for name in (rows, channels))
        found = onnx.TypeProto()
        found.tensor_type.elem_type = onnx.TensorProto.FLOAT if output in op.fp32 else first.elem_type
        if first.HasField("shape") and first.shape.dim:
            found.tensor_type.shape.CopyFrom(first.shape)
            side = found.tensor_type.shape.dim[-1]
            if last.HasField("shape") and last.shape.dim:
                side.CopyFrom(last.shape.dim[-1])
            elif rows != channels:
                side.Clear()
        context.set_output_type(i, found)
