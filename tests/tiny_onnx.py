"""A model file small enough to reason about: it names the dominant colour, through one vim::SelectiveScan node."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, DTypeLike
from onnx import TensorProto, helper, numpy_helper, save

from vimdeploy.bundle import ModelInfo
from vimdeploy.models.variants import VimConfig
from vimdeploy.preprocess import Preprocessing

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}
# What the op computes here, D * u, against what the function body says, u: the answer tells which of them ran.
LIBRARY_FACTOR = 2.0


def tiny_info(
    *, classes: int = 3, size: tuple[int, int] = (32, 32), labels: tuple[str, ...] = (), output: str = "logits"
) -> ModelInfo:
    config = VimConfig(d_model=3, depth=1, img_size=size, patch_size=16, num_classes=classes)
    preprocessing = Preprocessing.for_config(config, {}).to_dict()
    return ModelInfo(
        "custom", config, preprocessing, checkpoint_sha256="0" * 64, version="0.1.0", labels=labels, output=output
    )


def write_tiny_onnx(
    path: Path,
    info: ModelInfo | None = None,
    *,
    body: bool = True,
    op: bool = True,
    batch: int | str = "batch",
    dtype: int = TensorProto.FLOAT,
    scale: float = 1.0,
) -> Path:
    """Images (B, 3, H, W) -> scores (B, classes): the mean of each channel, classes above three at -10.

    The scan has A = -1, B = C = 0 and D = LIBRARY_FACTOR, so it computes D * u; its function body is Identity.
    `body=False` leaves the body out, `op=False` the whole node.
    """
    info = info or tiny_info()
    classes, (height, width) = info.config.num_classes, info.config.img_size
    T = helper.tensor_dtype_to_np_dtype(dtype)

    def constant(name: str, values: ArrayLike, kind: DTypeLike = T) -> TensorProto:
        return numpy_helper.from_array(np.asarray(values, dtype=kind), name)

    spread = np.eye(3, max(classes, 3))[:, :classes] * scale
    initializers = [
        constant("axes", [2, 3], np.int64),
        constant("seq", [0, 1, 3], np.int64),
        constant("bc", [0, 1, 1, 1], np.int64),
        constant("last", [2], np.int64),
        constant("states", np.zeros((1, 1, 1, 2))),
        constant("A", -np.ones((3, 2)), np.float32),
        constant("D", np.full(3, LIBRARY_FACTOR), np.float32),
        constant("spread", spread),
        constant("offset", [0.0] * min(classes, 3) + [-10.0] * (classes - 3)),
        constant("flat", [0, 3], np.int64),
    ]
    nodes = [
        helper.make_node("ReduceMean", ["image", "axes"], ["colour"], keepdims=1),
        helper.make_node("Reshape", ["colour", "seq"], ["u"]),
        helper.make_node("ReduceMean", ["u", "last"], ["grey"], keepdims=1),
        helper.make_node("Reshape", ["grey", "bc"], ["grey4"]),
        helper.make_node("Mul", ["grey4", "states"], ["zeros"]),
        helper.make_node(
            "SelectiveScan",
            ["u", "u", "A", "zeros", "zeros", "D"],
            ["y"],
            domain="vim",
            delta_softplus=1,
            reverse=0,
            plugin_namespace="vim",
            plugin_version="1",
        )
        if op
        else helper.make_node("Identity", ["u"], ["y"]),
        helper.make_node("Reshape", ["y", "flat"], ["y2"]),
        helper.make_node("MatMul", ["y2", "spread"], ["product"]),
        helper.make_node("Add", ["product", "offset"], [info.output]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", dtype, [batch, 3, height, width])],
        [helper.make_tensor_value_info(info.output, dtype, [batch, classes])],
        initializers,
    )
    function = helper.make_function(
        "vim",
        "SelectiveScan",
        ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"],
        ["y"],
        [helper.make_node("Identity", ["u"], ["y"])],
        [helper.make_opsetid("", 18)],
        attributes=["delta_softplus", "reverse", "plugin_namespace", "plugin_version"],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("vim", 1)],
        functions=[function] if body and op else [],
        ir_version=9,
    )
    helper.set_model_props(model, info.to_props())
    path.parent.mkdir(parents=True, exist_ok=True)
    save(model, str(path))
    return path
