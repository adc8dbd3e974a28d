"""Where NaN and Inf come from: the first layer of the typed graph that makes one out of finite inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from vimdeploy.errors import RuntimeMissing
from vimdeploy.export import functions
from vimdeploy.passes.precision import to_precision

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16}


def first_nonfinite(model: Path, precision: str, image: np.ndarray) -> str | None:
    """The node at fault in words, None when every layer stays finite.

    model: an ONNX file of vimdeploy, typed here to `precision` (fp32 | fp16) unless it is already. image: (1, C, H, W)
    float32. ONNX Runtime computes each layer on the CPU and rounds its result to the layer's own type, so fp16's
    overflow shows where it happens. Raises RuntimeMissing without onnxruntime.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeMissing(f"ONNX Runtime is not installed ({error})") from error
    graph = ir.load(model)
    typed = any(node.op_type == "Cast" for node in graph.graph)
    graph.functions.clear()
    if not typed:
        to_precision(graph, precision)
    functions.attach(graph, "scan")
    watched = [(node, value) for node in graph.graph for value in node.outputs if value.dtype in _FLOATS]
    for _, value in watched:
        if not value.is_graph_output():
            graph.graph.outputs.append(value)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        ir.to_proto(graph).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    (fed,) = session.get_inputs()
    batch = np.repeat(image, fed.shape[0], axis=0) if isinstance(fed.shape[0], int) else image
    values = dict(zip(names, session.run(None, {fed.name: batch}), strict=True))
    values[fed.name] = batch
    for node, value in watched:
        result = values[str(value.name)]
        if not np.isfinite(result).all():
            read = [values[str(v.name)] for v in node.inputs if v is not None and v.name in values]
            largest = max((float(np.abs(x.astype(np.float64)).max()) for x in read if x.size), default=0.0)
            kind = "NaN" if np.isnan(result).any() else "Inf"
            return f"{kind} first in {node.name or node.op_type} ({node.op_type}), whose inputs reach {largest:.3g}"
    return None


def explain(model: Path | None, precision: str, images: np.ndarray, outputs: np.ndarray) -> str:
    """A sentence on the first image whose output is not finite: the layer at fault, or why it was not found."""
    if model is None or not model.is_file():
        return "the layer was not looked for: the ONNX file is not beside the artifact"
    if precision not in ("fp32", "fp16"):
        return f"the layer was not looked for: ONNX Runtime does not compute {precision} on the CPU"
    bad = [i for i, row in enumerate(outputs) if not np.isfinite(row).all()]
    if not bad:
        return "the reference itself is not finite"
    try:
        found = first_nonfinite(model, precision, images[bad[0] : bad[0] + 1])
    except RuntimeMissing as missing:
        return f"the layer was not looked for: {missing.message}"
    return found or "every layer of the graph stays finite in ONNX Runtime: the fault is in the runtime or its plugin"
