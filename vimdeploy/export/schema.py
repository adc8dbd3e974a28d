"""The `vim` operator domain as ONNX knows it: names, OpSchemas, shape inference.

Checkers, shape inference and exporters then treat `vim::SelectiveScan` like any standard operator. The contract is
design.md, "The op".
"""

from __future__ import annotations

import functools

import onnx
from onnx import defs

DOMAIN = "vim"
VERSION = 1
OP = "SelectiveScan"
INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
OPTIONAL = ("D", "z", "delta_bias")
FP32_INPUTS = ("A", "D", "delta_bias")  # the others, and y, share one io type
#: Written out on every node: TensorRT's parser prefers a plugin over the local function only where it reads them.
PLUGIN_ATTRIBUTES = {"plugin_namespace": "vim", "plugin_version": "1"}

_DOC = """Selective state-space scan (Mamba), channel-last, one direction.
dt = softplus(delta + delta_bias); s_t = exp(dt_t A) * s_prev + dt_t u_t B_t; y_t = <C_t, s_t> + D u_t, then times
z sigmoid(z). u, delta, z, y are (batch, length, channels); A (channels, states); B, C (batch, length, groups, states);
D, delta_bias (channels). With reverse = 1 the scan runs from the last token to the first; outputs stay in place."""


@functools.cache
def register() -> None:
    """Make the `vim` domain known to onnx.checker and onnx.shape_inference, once a process."""
    formal, option = defs.OpSchema.FormalParameter, defs.OpSchema.FormalParameterOption
    attribute, kind = defs.OpSchema.Attribute, defs.OpSchema.AttrType
    schema = defs.OpSchema(
        OP,
        DOMAIN,
        VERSION,
        doc=_DOC,
        inputs=[
            formal(
                name,
                "tensor(float)" if name in FP32_INPUTS else "T",
                param_option=option.Optional if name in OPTIONAL else option.Single,
            )
            for name in INPUTS
        ],
        outputs=[formal("y", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "io type; inside is fp32")],
        attributes=[
            attribute("delta_softplus", onnx.helper.make_attribute("delta_softplus", 1), "apply softplus to delta"),
            attribute("reverse", onnx.helper.make_attribute("reverse", 0), "scan from the last token to the first"),
            attribute("plugin_namespace", kind.STRING, "read by TensorRT's parser", required=False),
            attribute("plugin_version", kind.STRING, "read by TensorRT's parser", required=False),
        ],
    )
    schema.set_type_and_shape_inference_function(_infer)
    defs.register_schema(schema)


def _infer(context: onnx.shape_inference.InferenceContext) -> None:
    """y is shaped and typed like u."""
    context.set_output_type(0, context.get_input_type(0))
