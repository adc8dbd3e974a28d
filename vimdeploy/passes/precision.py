"""Type a Vim graph to fp16 or bf16, with the fp32 islands of design.md, "Precision".

    Before: every tensor fp32.
    After:  MatMul, Gemm, Conv and the scan's io in the low type, weights stored in it; residual stream, norms, A, D,
            delta_bias, and the model's own input and output in fp32; a Cast wherever the two meet.

The rules, cited in the code:

1. MatMul, Gemm and Conv compute in the low type.
2. The scan takes A, D and delta_bias in fp32, everything else in the low type (vim-spec.md 7.7).
3. What a norm reads is the residual stream: the node that makes it computes in fp32, and so does everything from
   there to the next MatMul (mean of squares overflows fp16 at |r| > 255, vim-spec.md 7.3).
4. Any other node is in the low type when all it reads is; weights and constants follow their reader.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vimdeploy.errors import ExportError
from vimdeploy.export import schema

PRECISIONS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
#: bf16 convolutions entered ONNX here.
BF16_OPSET = 22

_GEMMS = {"MatMul", "Gemm", "Conv"}
_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


def to_precision(model: ir.Model, precision: str) -> ir.Model:
    """Type `model` (all fp32, no function body yet), in place. Raises ExportError when a weight does not fit."""
    low = PRECISIONS[precision]
    if low == ir.DataType.FLOAT:
        return model
    if low == ir.DataType.BFLOAT16 and model.opset_imports[""] < BF16_OPSET:
        raise ExportError(
            f"bf16 needs opset {BF16_OPSET} or later (bf16 Conv); this graph is opset {model.opset_imports['']}",
            hint=f"export with --opset {BF16_OPSET}, or with --precision fp16",
        )
    _Typing(model.graph, low).run()
    return model


class _Typing:
    def __init__(self, graph: ir.Graph, low: ir.DataType) -> None:
        self.graph, self.low = graph, low
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.wide_nodes = self._stream_nodes()

    def run(self) -> None:
        for node in list(self.graph):
            wanted = self._wanted(node)
            for i, value in enumerate(node.inputs):
                if value is not None and value.dtype in _FLOATS and value.dtype != wanted[i]:
                    node.replace_input_with(i, self._cast(value, wanted[i], node))
            if node.op_type == "Cast":
                continue
            for value in node.outputs:
                if value.dtype in _FLOATS:
                    value.dtype = self.low if self._is_low(node, wanted) else ir.DataType.FLOAT
        self._keep_outputs_wide()
        for name in [n for n, v in self.graph.initializers.items() if not v.uses()]:
            del self.graph.initializers[name]

    def _stream_nodes(self) -> set[ir.Node]:
        """Rule 3: the makers of what a norm reads, directly or squared."""
        nodes: set[ir.Node] = set()
        for node in self.graph:
            if node.op_type == "ReduceMean":
                maker = node.inputs[0].producer() if node.inputs[0] is not None else None
                if maker is not None and maker.op_type == "Mul" and maker.inputs[0] is maker.inputs[1]:
                    maker = maker.inputs[0].producer() if maker.inputs[0] is not None else None
                if maker is not None:
                    nodes.add(maker)
        return nodes

    def _wanted(self, node: ir.Node) -> list[ir.DataType]:
        """The type each input must have."""
        if node.domain == schema.DOMAIN:  # rule 2
            return [ir.DataType.FLOAT if name in schema.FP32_INPUTS else self.low for name in schema.INPUTS]
        low = node.op_type in _GEMMS or (node not in self.wide_nodes and self._reads_only_low(node))  # rules 1, 3, 4
        return [self.low if low else ir.DataType.FLOAT] * len(node.inputs)

    def _reads_only_low(self, node: ir.Node) -> bool:
        activations = [v for v in node.inputs if v is not None and v.const_value is None and v.dtype in _FLOATS]
        return bool(activations) and all(v.dtype == self.low for v in activations)

    def _is_low(self, node: ir.Node, wanted: list[ir.DataType]) -> bool:
        return node.domain == schema.DOMAIN or (bool(wanted) and wanted[0] == self.low)

    def _cast(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node) -> ir.Value:
        key = (value, dtype)
        if key not in self.casts:
            self.casts[key] = (
                self._stored(value, dtype) if value.const_value is not None else self._node(value, dtype, reader)
            )
        return self.casts[key]

    def _stored(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        assert value.const_value is not None
        array = value.const_value.numpy()
        if dtype == ir.DataType.FLOAT16 and array.size and np.abs(array).max() > np.finfo(np.float16).max:
            raise ExportError(
                f"{value.name} holds {np.abs(array).max():.3g}, more than fp16 can (65504)",
                hint="export with --precision bf16 or fp32",
            )
        name = f"{value.name}:{dtype.name.lower()}"
        tensor = ir.tensor(array.astype(dtype.numpy()), name=name)
        stored = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.graph.initializers[name] = stored
        return stored

    def _node(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node) -> ir.Value:
        cast = ir.node("Cast", [value], {"to": dtype}, name=f"{value.name}:cast")
        cast.outputs[0].name = f"{value.name}:{dtype.name.lower()}"
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(dtype), value.shape
        maker = value.producer()
        # Beside its maker, so that every later reader finds it made.
        if maker is not None:
            self.graph.insert_after(maker, cast)
        else:
            self.graph.insert_before(self.graph[0], cast)
        return cast.outputs[0]

    def _keep_outputs_wide(self) -> None:
        for i, value in enumerate(self.graph.outputs):
            if value.dtype == self.low:
                name, value.name = value.name, f"{value.name}:{self.low.name.lower()}"
                cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{name}:cast")
                cast.outputs[0].name = name
                cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), value.shape
                self.graph.append(cast)
                self.graph.outputs[i] = cast.outputs[0]
