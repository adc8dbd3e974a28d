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
from vimdeploy.passes.float_weights import float_weights
from vimdeploy.passes.fuse import FUSIONS, fuse
from vimdeploy.passes.no_slices import without_slices
from vimdeploy.passes.old_builder import for_old_builder
from vimdeploy.passes.opset import lower_opset, raise_opset
from vimdeploy.passes.precision import BF16_OPSET, LOW_SCALES_OPSET, to_precision
from vimdeploy.passes.product_convs import products_as_convolutions
from vimdeploy.passes.whole_rows import read_whole_rows


@dataclass(frozen=True)
class Prepared:
    """The graph as serialised ONNX, what to look for in the engine, and the type of every float value by its name."""

    onnx: bytes
    input: str
    shape: tuple[int | None, ...]
    wanted: Wanted
    types: dict[str, str]  # value -> fp32 | fp16 | bf16; none where the builder is to choose
    nodes: tuple[str, ...]  # names, in the graph's order
    scans: frozenset[str]  # names of the vim:: nodes
    ops: frozenset[str]  # the vim:: operators among them
    fusion: str  # none | bidirectional | full


_NAMES = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}


def prepare(
    model: Path,
    info: ModelInfo,
    precision: str | None,
    capabilities: Capabilities,
    batch: int | None = None,
    fusion: str | None = None,
) -> Prepared:
    """Fuse, type, lower and strip or inline the graph of `model` for a parser that can do what `capabilities` says.

    `precision` None keeps the file's own; a file that is typed already takes no other. `batch` fixes the batch.
    `fusion` None fuses an fp32 file fully where the parser takes plugins and leaves it as it is where it does not; what
    is fused already stays so. Raises UsageError, ModelFileError, ExportError (a weight too large for fp16).
    """
    if precision and info.precision not in ("fp32", precision):
        raise UsageError(
            f"{model} is {info.precision} already and cannot be built as {precision}",
            hint=f"leave out --{precision}, or export it as fp32",
        )
    precision = precision or info.precision
    int8 = bool(info.quantization)
    if precision == "bf16" and not capabilities.bf16:
        raise UsageError(f"{capabilities} has no bf16", hint="build with --fp16")
    fusion = _fusion(model, info, fusion, capabilities)
    graph = ir.load(model)
    graph.functions.clear()
    if fusion != info.fusion:
        fuse(graph, fusion)
    if capabilities.plugins != "none":
        read_whole_rows(graph)
    if capabilities.slow_slices and info.precision == "fp32":
        for_old_builder(graph)
    if capabilities.max_opset is not None:
        lower_opset(graph, capabilities.max_opset)
    if batch is not None:
        _fix_batch(graph, batch)
    if capabilities.slow_slices and info.precision == "fp32":
        without_slices(graph)
    if precision == "bf16":
        raise_opset(graph, BF16_OPSET)
    elif int8 and precision == "fp16" and capabilities.strongly_typed:
        raise_opset(graph, LOW_SCALES_OPSET)
    chosen = int8 and not capabilities.strongly_typed
    if chosen:
        products_as_convolutions(graph)
    if int8 and not capabilities.int8_constants:
        float_weights(graph)
    # Where the builder chooses types, it gets a quantized graph in fp32 and no constraint: under any that was tried,
    # 8.5 finds a node "incorrectly marked as an int8 node" (optimizer.cpp, filterQDQFormats), all its kernels removed.
    if info.precision == "fp32" and not chosen:
        to_precision(graph, precision)
    (image,) = graph.graph.inputs
    if image.shape is None or image.name is None:
        raise ModelFileError(f"{model} does not say the shape of its input", hint="export it again")
    types = {} if chosen else _types(graph.graph)
    ours = [node for node in graph.graph if node.domain == schema.DOMAIN]
    scans, ops = frozenset(str(node.name) for node in ours), frozenset(node.op_type for node in ours)
    shape = tuple(side if isinstance(side, int) else None for side in image.shape)
    if capabilities.plugins == "none":
        functions.attach(graph, "scan")
        graph = _inlined(graph)
    wanted = Wanted.of(graph.graph, precision, chosen=chosen)
    nodes = tuple(node.name or node.op_type for node in graph.graph)
    onnx = ir.to_proto(graph).SerializeToString()
    return Prepared(onnx, image.name, shape, wanted, types, nodes, scans, ops, fusion)


def _fusion(model: Path, info: ModelInfo, wanted: str | None, capabilities: Capabilities) -> str:
    """What the graph is to be fused to: what was asked for, else as much as can be had."""
    if wanted is None:
        free = info.precision == "fp32" and capabilities.plugins != "none"
        return "full" if free else info.fusion
    if FUSIONS.index(wanted) < FUSIONS.index(info.fusion):
        raise UsageError(
            f"{model} is fused ({info.fusion}) already and cannot be built with --fusion {wanted}",
            hint=f"export it with --fusion {wanted}",
        )
    if wanted != info.fusion and info.precision != "fp32":
        raise UsageError(
            f"{model} is {info.precision}, and only fp32 graphs are fused",
            hint="leave out --fusion, or export it as fp32",
        )
    return wanted


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
