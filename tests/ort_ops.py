"""Graphs of one vim op, and sessions of ONNX Runtime with the op library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnxruntime as ort
from onnx import FunctionProto, TensorProto, helper
from ort_library import ort_library

from vimdeploy.export import schema

TYPES = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "fp64": TensorProto.DOUBLE,
}

_TOKENS = ["batch", "length", "channels"]
_PAIRS = {"u": _TOKENS, "delta": _TOKENS, "A": ["channels", "states"], "x": ["batch", "length", "row"],
          "D": ["channels"], "delta_bias": ["channels"]}  # fmt: skip
SHAPES: dict[str, dict[str, list[str]]] = {
    "SelectiveScan": {
        "u": _TOKENS, "delta": _TOKENS, "z": _TOKENS, "A": ["channels", "states"], "D": ["channels"],
        "B": ["batch", "length", "groups", "states"], "C": ["batch", "length", "groups", "states"],
        "delta_bias": ["channels"],
    },
    "BiSelectiveScan": {
        **{f"{name}_{side}": shape for name, shape in _PAIRS.items() for side in "fb"},
        "z": ["batch", "length", "width"], "y_scale": ["channels"],
    },
    "BiCausalConv1d": {
        "x": ["batch", "length", "width"],
        **{f"weight_{side}": ["taps", "channels"] for side in "fb"},
        **{f"bias_{side}": ["channels"] for side in "fb"},
    },
    "AddRMSNorm": {"h": _TOKENS, "r": _TOKENS, "weight": ["channels"]},
}  # fmt: skip


def op_model(
    op: schema.Op,
    given: Iterable[str],
    dtype: str = "fp32",
    types: dict[str, int] | None = None,
    functions: Sequence[FunctionProto] = (),
    shapes: dict[str, Sequence[str | int] | None] | None = None,
    **attributes: object,
) -> bytes:
    """A graph of one node named `node0` with the inputs `given`; shapes are symbols unless `shapes` says otherwise.

    bf16, which numpy lacks, comes in and goes out as fp32 and is cast inside.
    """
    given = list(given)
    known = SHAPES[op.name] | (shapes or {})
    types = {name: TYPES["fp32" if name in op.fp32 else dtype] for name in op.inputs} | (types or {})
    outside = {name: TensorProto.FLOAT if kind == TensorProto.BFLOAT16 else kind for name, kind in types.items()}
    nodes, names = [], []
    for name in op.inputs:
        if name not in given:
            names.append("")
        elif outside[name] == types[name]:
            names.append(name)
        else:
            nodes.append(helper.make_node("Cast", [name], [f"{name}_bf16"], to=types[name]))
            names.append(f"{name}_bf16")
    while names[-1] == "":
        names.pop()
    first = op.inputs[0]
    cast = [name for name in op.outputs if name not in op.fp32 and types[first] == TensorProto.BFLOAT16]
    made = [f"{name}_bf16" if name in cast else name for name in op.outputs]
    nodes.append(helper.make_node(op.name, names, made, name="node0", domain=schema.DOMAIN, **attributes))
    nodes += [helper.make_node("Cast", [f"{name}_bf16"], [name], to=TensorProto.FLOAT) for name in cast]
    graph = helper.make_graph(
        nodes,
        "one_op",
        [helper.make_tensor_value_info(name, outside[name], known[name]) for name in op.inputs if name in given],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT if name in op.fp32 else outside[first], None)
            for name in op.outputs
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(schema.DOMAIN, schema.VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=functions).SerializeToString()


def session(model: bytes, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(ort_library()))
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # refusals are meant
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_op(
    op: schema.Op, inputs: dict[str, np.ndarray], dtype: str = "fp32", threads: int = 1, **attributes: object
) -> list[np.ndarray]:
    feed = {name: value.astype(np.float32) if dtype == "bf16" else value for name, value in inputs.items()}
    outputs = session(op_model(op, inputs, dtype, **attributes), threads).run(None, feed)
    io = inputs[op.inputs[0]].dtype
    return [y if name in op.fp32 else y.astype(io) for name, y in zip(op.outputs, outputs, strict=True)]


def version() -> tuple[int, ...]:
    return tuple(int(part) for part in ort.__version__.split(".")[:2])
