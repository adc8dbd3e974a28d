"""The linear layers of a Vim graph that can compute in int8, by the names they have in the network.

A layer is found by its weight, whose name is the module's: `layers.3.mixer.in_proj.weight.T`. Typed, split and
already quantized weights carry other names, so only an fp32 graph as exported, fused or not, shows its layers here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

#: What is quantized unless asked otherwise: 84 to 90 % of the multiplications of Vim-Ti to Vim-B.
DEFAULT_KINDS = ("in_proj", "out_proj")
#: What may be asked for besides. `x_proj` and `dt_proj` stand for both directions.
OPTIONAL_KINDS = ("x_proj", "dt_proj", "patch_embed", "head")
KINDS = (*DEFAULT_KINDS, *OPTIONAL_KINDS)

_NAMES = re.compile(r"^(?:.*\.(in_proj|out_proj|x_proj|dt_proj)(?:_b)?|(patch_embed)\.proj|(head))\.weight(?:\.T)?$")


@dataclass(frozen=True)
class Projection:
    """One linear layer: `node` is a MatMul (x, W (K, N)), a Gemm (x, W (N, K)) or a Conv (x, W (N, C, h, w))."""

    name: str
    kind: str
    node: ir.Node

    @property
    def input(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def weight(self) -> np.ndarray:
        """fp32, in the layout of the node."""
        value = self.node.inputs[1]
        assert value is not None and value.const_value is not None
        return value.const_value.numpy()

    @property
    def axis(self) -> int:
        """The weight's axis of output channels, along which its scales go."""
        return 1 if self.node.op_type == "MatMul" else 0


def kind_of(name: str) -> str:
    """One of KINDS, of a layer by its name."""
    match = _NAMES.match(f"{name}.weight")
    return next(group for group in match.groups() if group) if match else name


def projections(graph: ir.Graph, kinds: tuple[str, ...] = KINDS) -> list[Projection]:
    """The layers of `kinds` in `graph`, in its order."""
    found = []
    for node in graph:
        if node.domain not in ("", "ai.onnx") or node.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        if node.op_type == "Gemm" and not _plain_gemm(node):
            continue
        weight = node.inputs[1]
        if weight is None or weight.const_value is None or weight.dtype != ir.DataType.FLOAT:
            continue
        name = str(weight.name).removesuffix(".T").removesuffix(".weight")
        if _NAMES.match(str(weight.name)) and kind_of(name) in kinds:
            found.append(Projection(name, kind_of(name), node))
    return found


def _plain_gemm(node: ir.Node) -> bool:
    """x W^T + b, as an export writes a classifier."""
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    value = plain | {name: attribute.value for name, attribute in node.attributes.items()}
    return value == {**plain, "transB": 1}
