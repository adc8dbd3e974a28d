"""Small networks of every kind, and each of them exported once a process. Shared by the tests of export and passes."""

from __future__ import annotations

import functools
from unittest import mock

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from official import random_model
from ort_library import ort_library

from vimdeploy.export import exporter, schema
from vimdeploy.export.exporter import ExportOptions, export_model
from vimdeploy.models.variants import VimConfig

BASE = VimConfig(d_model=16, depth=2, img_size=(28, 28), patch_size=7, stride=7, num_classes=7, d_state=4)
ROPE = BASE.replace(rope=True, cls_position="head", divide_out=False)
PAIRS = BASE.replace(bidirectional=True)

#: name -> network; each strategy of the paper's ablations, and each flag an old checkpoint may carry
NETWORKS = {
    "v2": BASE,
    "v2, sum not halved": BASE.replace(divide_out=False),
    "v1": BASE.replace(bimamba="v1"),
    "forward only": BASE.replace(bimamba="none"),
    "layer pairs, forward only": PAIRS.replace(bimamba="none"),
    "layer pairs, v1": PAIRS.replace(bimamba="v1"),
    "layer pairs, v2": PAIRS,
    "LayerNorm": BASE.replace(rms_norm=False),
    "layer scale": BASE.replace(layer_scale=True),
    "layer scale, projection biases": BASE.replace(layer_scale=True, proj_bias=True),
    "no absolute positions": BASE.replace(abs_pos_embed=False),
    "non-square": BASE.replace(img_size=(28, 42)),
    "overlapping patches": BASE.replace(stride=4),
    "another state, conv, rank, expansion": BASE.replace(d_state=5, d_conv=3, dt_rank=3, expand=3),
    "one channel in": BASE.replace(in_chans=1),
    "cls head": BASE.replace(cls_position="head"),
    "cls tail": BASE.replace(cls_position="tail"),
    "cls double": BASE.replace(cls_position="double"),
    **{f"no cls, pool {pool}": BASE.replace(cls_position="none", pool=pool) for pool in ("last", "mean", "max", "all")},
    "rope": ROPE,
    "rope and residual": ROPE.replace(rope_residual=True),
    "rope, no cls": ROPE.replace(cls_position="none", rope_residual=True),
    "rope, middle cls": ROPE.replace(cls_position="middle"),
    "rope, layer pairs": ROPE.replace(rope_residual=True, bidirectional=True),
    "no head": BASE.replace(num_classes=0),
}


@functools.cache
def _traced(config: VimConfig, seed: int, output: str, static_batch: int | None) -> torch.export.ExportedProgram:
    """Tracing takes most of an export's time, and depends on no other option."""
    return exporter._trace(random_model(config, seed).freeze(), ExportOptions(output=output, static_batch=static_batch))


@functools.cache
def exported_bytes(config: VimConfig, options: ExportOptions = ExportOptions(), seed: int = 0) -> bytes:  # noqa: B008
    program = _traced(config, seed, options.output, options.static_batch)
    with mock.patch.object(exporter, "_trace", lambda model, options: program):
        return ir.to_proto(export_model(random_model(config, seed), options)).SerializeToString()


def exported(config: VimConfig, seed: int = 0, **options: object) -> onnx.ModelProto:
    """The network of `config`, every weight of which matters, as an ONNX model of the caller's own; not fused."""
    options.setdefault("fusion", "none")
    if not config.num_classes:
        options.setdefault("output", "features")
    return onnx.load_from_string(exported_bytes(config, ExportOptions(**options), seed))  # type: ignore[arg-type]


def loaded(config: VimConfig, **options: object) -> ir.Model:
    return ir.from_proto(exported(config, **options))


def weights_of(config: VimConfig, seed: int = 0) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in random_model(config, seed).state_dict().items()}


def images_for(config: VimConfig, batch: int = 2, seed: int = 1) -> np.ndarray:
    shape = (batch, config.in_chans, *config.img_size)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def session(model: onnx.ModelProto | bytes, runtime: str = "body") -> onnxruntime.InferenceSession:
    """One-threaded ONNX Runtime on the function body, or on the op library (skips where there is none)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if runtime == "library":
        options.register_custom_ops_library(str(ort_library()))
    content = model if isinstance(model, bytes) else model.SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto | bytes, images: np.ndarray, runtime: str = "body") -> np.ndarray:
    (output,) = session(model, runtime).run(None, {"images": images})
    return output


def check(model: onnx.ModelProto) -> None:
    """onnx.checker with everything on, the vim domain known to it."""
    schema.register()
    onnx.checker.check_model(model, full_check=True)


def scans(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == "vim"]


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
