"""Type a Vim graph to fp16 or bf16, with the fp32 islands of design.md, "Precision".

    Before: every tensor fp32.
    After:  MatMul, Gemm, Conv and the vim ops' io in the low type, weights stored in it; residual stream, norms, A, D,
            delta_bias, and the model's own input and output in fp32; a Cast wherever the two meet.

The rules, cited in the code:

1. MatMul, Gemm and Conv compute in the low type.
2. A vim op takes and gives in fp32 what schema.py says (A, D, delta_bias, ...: vim-spec.md 7.7), everything else in the
   low type.
3. What a norm reads is the residual stream: the node that makes it computes in fp32, and so does everything from
   there to the next MatMul (mean of squares overflows fp16 at |r| > 255, vim-spec.md 7.3). AddRMSNorm's `r` is one too.
4. Any other node is in the low type when all it reads is; weights and constants follow their reader.
5. A product between QuantizeLinear and DequantizeLinear pairs is int8; the pairs take and give the low type where ONNX
   allows that (opset 19) and the low type holds their scales exactly, else fp32. The product follows its pairs, so that
   no Cast comes between them.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vimdeploy.errors import ExportError
from vimdeploy.export import schema

PRECISIONS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
#: bf16 convolutions entered ONNX here, and here scales in a low type.
BF16_OPSET = 22
LOW_SCALES_OPSET = 19

_GEMMS = {"MatMul", "Gemm", "Conv"}
_PAIRS = {"QuantizeLinear", "DequantizeLinear"}
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
    _Typing(model.graph, low, model.opset_imports[""]).run()
    return model


def low_values(graph: ir.Graph) -> set[ir.Value]:
    """The computed values of `graph` (fp32, not typed yet) that the rules put in the low type."""
    rules = _Rules(graph)
    return rules.low


class _Rules:
    """The rules applied to a graph that is all fp32: which of its values are to be low."""

    def __init__(self, graph: ir.Graph, low: ir.DataType = ir.DataType.FLOAT16, opset: int = LOW_SCALES_OPSET) -> None:
        self.wide_nodes = _stream_nodes(graph) | _wide_pairs(graph, low, opset)
        self.low: set[ir.Value] = set()
        for node in graph:
            self.low.update(value for value, low in zip(node.outputs, self.gives(node)) if low)

    def takes(self, node: ir.Node) -> list[bool]:
        """Whether each input must be low. Of a node all of whose inputs have been looked at."""
        if node.domain == schema.DOMAIN:  # rule 2
            op = schema.op_of(node)
            return [name not in op.fp32 for name in op.inputs[: len(node.inputs)]]
        return [self._computes_low(node)] * len(node.inputs)

    def gives(self, node: ir.Node) -> list[bool]:
        """The same of the outputs."""
        if node.domain == schema.DOMAIN:
            op = schema.op_of(node)
            return [name not in op.fp32 for name in op.outputs[: len(node.outputs)]]
        low = self._computes_low(node) and node.op_type != "Cast"  # a Cast's type is its own
        return [low and value.dtype in _FLOATS for value in node.outputs]

    def _computes_low(self, node: ir.Node) -> bool:
        if node.op_type in _GEMMS | _PAIRS and node not in self.wide_nodes:  # rules 1, 5
            return True
        return node not in self.wide_nodes and self._reads_only_low(node)  # rules 3, 4

    def _reads_only_low(self, node: ir.Node) -> bool:
        activations = [v for v in node.inputs if v is not None and v.const_value is None and v.dtype in _FLOATS]
        return bool(activations) and all(v in self.low for v in activations)


def _stream_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Rule 3: the makers of what a norm reads, directly or squared."""
    streams: list[ir.Value | None] = []
    for node in graph:
        if node.op_type == "ReduceMean":
            read = node.inputs[0]
            maker = read.producer() if read is not None else None
            squared = maker is not None and maker.op_type == "Mul" and maker.inputs[0] is maker.inputs[1]
            streams.append(maker.inputs[0] if maker is not None and squared else read)
        elif node.domain == schema.DOMAIN and node.op_type == schema.ADD_NORM.name:
            streams.append(node.inputs[schema.ADD_NORM.inputs.index("r")])
    makers = (value.producer() for value in streams if value is not None)
    return {maker for maker in makers if maker is not None}


def _wide_pairs(graph: ir.Graph, low: ir.DataType, opset: int) -> set[ir.Node]:
    """Rule 5: the int8 products, with the pairs around their inputs, that stay fp32."""
    wide: set[ir.Node] = set()
    for product in graph:
        makers = {value.producer() for value in product.inputs if value is not None}
        last = [node for node in makers if node is not None and node.op_type == "DequantizeLinear"]
        if product.op_type not in _GEMMS or not last:
            continue
        first = [node.inputs[0].producer() for node in last if node.inputs[0] is not None]
        pairs = [node for node in (*last, *first) if node is not None]
        scales = [node.inputs[1].const_value for node in pairs if node.inputs[1] is not None]
        kept = all(scale is not None and _holds(low, scale.numpy()) for scale in scales)
        if opset < LOW_SCALES_OPSET or not kept:
            wide.update((product, *pairs))
    return wide


def _holds(low: ir.DataType, array: np.ndarray) -> bool:
    """Whether every number of `array` is one of the low type."""
    with np.errstate(over="ignore"):
        return bool((array.astype(low.numpy()).astype(np.float32) == array).all())


class _Typing:
    def __init__(self, graph: ir.Graph, low: ir.DataType, opset: int) -> None:
        self.graph, self.low = graph, low
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.rules = _Rules(graph, low, opset)

    def run(self) -> None:
        for node in list(self.graph):
            for i, (value, low) in enumerate(zip(node.inputs, self.rules.takes(node))):
                wanted = self.low if low else ir.DataType.FLOAT
                if value is not None and value.dtype in _FLOATS and value.dtype != wanted:
                    node.replace_input_with(i, self._cast(value, wanted, node))
            for value in node.outputs:
                if value in self.rules.low:
                    value.dtype = self.low
        self._keep_outputs_wide()
        for name in [n for n, v in self.graph.initializers.items() if not v.uses()]:
            del self.graph.initializers[name]

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
