"""From the exported file to the graph a parser gets: opset, types, and the op as a plugin node or as its body."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from vimdeploy.bundle import ModelInfo
from vimdeploy.engines.capabilities import Capabilities
from vimdeploy.engines.inspect import Wanted
from vimdeploy.errors import ModelFileError, UsageError
from vimdeploy.export import functions, schema
from vimdeploy.passes.no_slices import without_slices
from vimdeploy.passes.opset import lower_opset, raise_opset
from vimdeploy.passes.precision import BF16_OPSET, to_precision


@dataclass(frozen=True)
class Prepared:
    """The graph as serialised ONNX, what to look for in the engine, and the type of every float value by its name."""

    onnx: bytes
    input: str
    shape: tuple[int | None, ...]
    wanted: Wanted
    types: dict[str, str]  # value -> fp32 | fp16 | bf16
    nodes: tuple[str, ...]  # names, in the graph's order
    scans: frozenset[str]  # names of the vim:: nodes


_NAMES = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}


def prepare(
    model: Path, info: ModelInfo, precision: str | None, capabilities: Capabilities, batch: int | None = None
) -> Prepared:
    """Type, lower and strip or inline the graph of `model` for a parser that can do what `capabilities` says.

    `precision` None keeps the file's own; a file that is typed already takes no other. `batch` fixes the batch. Raises
    UsageError, ModelFileError, ExportError (a weight too large for fp16).
    """
    if precision and info.precision not in ("fp32", precision):
        raise UsageError(
            f"{model} is {info.precision} already and cannot be built as {precision}",
            hint=f"leave out --{precision}, or export it as fp32",
        )
    precision = precision or info.precision
    if precision == "bf16" and not capabilities.bf16:
        raise UsageError(f"{capabilities} has no bf16", hint="build with --fp16")
    graph = ir.load(model)
    graph.functions.clear()
    if capabilities.max_opset is not None:
        lower_opset(graph, capabilities.max_opset)
    if batch is not None:
        _fix_batch(graph, batch)
    if capabilities.slow_slices and info.precision == "fp32":
        without_slices(graph)
    if precision == "bf16":
        raise_opset(graph, BF16_OPSET)
    if info.precision == "fp32":
        to_precision(graph, precision)
    (image,) = graph.graph.inputs
    if image.shape is None or image.name is None:
        raise ModelFileError(f"{model} does not say the shape of its input", hint="export it again")
    wanted = Wanted.of(graph.graph, precision)
    types = _types(graph.graph)
    scans = frozenset(str(node.name) for node in graph.graph if node.domain == schema.DOMAIN)
    shape = tuple(side if isinstance(side, int) else None for side in image.shape)
    if capabilities.plugins == "none":
        functions.attach(graph, "scan")
        graph = _inlined(graph)
    nodes = tuple(node.name or node.op_type for node in graph.graph)
    return Prepared(ir.to_proto(graph).SerializeToString(), image.name, shape, wanted, types, nodes, scans)


def _fix_batch(model: ir.Model, batch: int) -> None:
    """Every first side that the caller decides becomes `batch`: shapes are then constants, and builds quicker."""
    graph = model.graph
    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        if value.shape is not None and len(value.shape) and not isinstance(value.shape[0], int):
            value.shape = ir.Shape([batch, *list(value.shape)[1:]])


def _types(graph: ir.Graph) -> dict[str, str]:
    values = (value for node in graph for value in node.outputs)
    return {str(v.name): _NAMES[v.dtype] for v in values if v.dtype in _NAMES}


def _inlined(model: ir.Model) -> ir.Model:
    """The body in place of each node. TensorRT's parser would do it, but names the bodies' nodes alike and warns."""
    from onnx import inliner

    inlined = inliner.inline_local_functions(ir.to_proto(model))
    for opset in [o for o in inlined.opset_import if o.domain == schema.DOMAIN]:
        inlined.opset_import.remove(opset)
    return ir.from_proto(inlined)
