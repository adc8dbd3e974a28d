"""The int8 file itself: written from a calibration, run, and looked into for what ONNX Runtime makes of it."""

from __future__ import annotations

import collections
import importlib.util
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import vimdeploy
from vimdeploy.bundle import ModelInfo
from vimdeploy.evaluate import predict
from vimdeploy.export import functions
from vimdeploy.passes.projections import projections
from vimdeploy.passes.quantize import quantize
from vimdeploy.passes.smooth import smooth
from vimdeploy.quantize.calibration import Calibration
from vimdeploy.quantize.images import CalibrationImages
from vimdeploy.quantize.session import GraphSession, library_here
from vimdeploy.verify.agreement import Agreement, agreement

_INTEGER = ("MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "QLinearConv")
_FLOAT = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Conv", "FusedConv")


def smoothed(model: Path, info: ModelInfo, factors: dict[str, np.ndarray]) -> ir.Model:
    """The graph of `model` with each layer's input divided by its factors."""
    graph = ir.load(model)
    smooth(graph, factors, projections(graph.graph))
    if graph.functions:  # what a node carries (y_scale) may have changed, and one body serves all
        graph.functions.clear()
        functions.attach(graph, info.fallback)
    return graph


def write_int8(model: Path, out: Path, info: ModelInfo, found: Calibration, **facts: Any) -> None:
    """Write `model` (fp32) to `out` with the layers of `found.quantized` in int8.

    The file's metadata says how it was made (ModelInfo.quantization), `facts` included.
    """
    chosen = {name: found.layers[name] for name in found.quantized}
    graph = smoothed(model, info, {name: c.factors for name, c in chosen.items() if c.factors is not None})
    quantize(graph, {name: choice.bound for name, choice in chosen.items()}, projections(graph.graph))
    told = {
        "int8": len(chosen),
        "keep_fp": list(found.keep_fp),
        "method": found.method,
        "calibrated_on": {"images": found.images["n"], "sha256": found.images["sha256"]},
        **facts,
    }
    graph.metadata_props.update(replace(info, quantization=told, version=vimdeploy.__version__).to_props())
    graph.producer_version = vimdeploy.__version__
    ir.save(graph, out)


def run_file(file: Path, images: CalibrationImages, reference: np.ndarray) -> Agreement:
    """The file's output against the model's in fp32, in the session a user gets."""
    from vimdeploy.runtimes import open_session

    with open_session(file, runtime="onnxruntime") as session:
        if session.info.output == "logits":
            return agreement(predict(session, images.batch), reference, images.targets)
    graph = ir.load(file)
    return agreement(GraphSession(graph).run(images.batch, str(graph.graph.outputs[0].name)), reference)


def int8_kernels(model: Path) -> dict[str, int] | None:
    """Operators of `model` after ONNX Runtime's optimisations that hold a product, by how they compute it.

    "int8": in integers; "fp32": in floats. A file whose Q/DQ pairs do not fuse is slower than before, not quicker. None
    where ONNX Runtime is not installed, as on a host that builds an engine from a cache.
    """
    import onnx

    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime as ort

    from vimdeploy.runtimes.onnxruntime import session_options

    with tempfile.TemporaryDirectory(prefix="vimdeploy-") as folder:
        options = session_options(library_here())
        options.optimized_model_filepath = str(Path(folder, "optimised.onnx"))
        ort.InferenceSession(str(model), options, ["CPUExecutionProvider"])
        proto = onnx.load(options.optimized_model_filepath)
    counts = collections.Counter(node.op_type for node in proto.graph.node)
    return {"int8": sum(counts[op] for op in _INTEGER), "fp32": sum(counts[op] for op in _FLOAT)}
