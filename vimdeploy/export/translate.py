"""torch.export's program of a Vim, word for word into ONNX.

A Vim is a closed world of some thirty ATen operators, so each has its line here, and an unknown one is an error with
its name. Going through a table instead of a general exporter keeps the graph as written (no decompositions, no
transposes to clean up), names every node after its module, writes any opset from 16 up directly, and takes a second
where the general one takes twenty (Vim-Ti, two cores).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.export import ExportedProgram
from torch.fx import Node

import vimdeploy.ops.selective_scan  # noqa: F401  (registers torch.ops.vim.selective_scan)
from vimdeploy.errors import ExportError
from vimdeploy.export import schema

IR_VERSION = 8  # enough for model-local functions, and the newest TensorRT 8.5 reads
OPSETS = range(16, 24)
BATCH = "batch"
_TO_END = np.iinfo(np.int64).max

_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.bool: ir.DataType.BOOL,
}

Operand = Any  # an ir.Value, or a Python number or list straight from the graph
Handler = Callable[["Translator", Node, Sequence[Operand]], Any]
_HANDLERS: dict[Any, Handler] = {}


def translate(program: ExportedProgram, *, opset: int, input_name: str, output_name: str) -> ir.Model:
    """The program as an ONNX model: one input, one output, weights as initializers under their state-dict names.

    Raises ExportError for an operator that has no translation here.
    """
    return Translator(program, opset).run(input_name, output_name)


def _handles(*targets: Any) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(targets, handler))
        return handler

    return register


class Translator:
    """The state of one translation: ONNX nodes so far, and the ONNX value of each graph node."""

    def __init__(self, program: ExportedProgram, opset: int) -> None:
        self.program, self.opset = program, opset
        self.nodes: list[ir.Node] = []
        self.values: dict[Node, Any] = {}
        self.initializers: dict[str, ir.Value] = {}
        self.scope = ""
        self.fx: Node | None = None
        self._names: set[str] = set()

    def run(self, input_name: str, output_name: str) -> ir.Model:
        signature = self.program.graph_signature
        state = {**self.program.state_dict, **self.program.constants}
        stored = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        inputs: list[ir.Value] = []
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                if node.name in stored:
                    self.values[node] = _Weight(stored[node.name], state[stored[node.name]])
                elif isinstance(node.meta.get("val"), torch.Tensor):
                    value = ir.Value(name=input_name, type=_type(node), shape=_shape(node.meta["val"]))
                    self.values[node] = value
                    inputs.append(value)
                else:
                    self.values[node] = None  # a flag fixed at export, such as return_features
            elif node.op == "call_function":
                self.values[node] = self._translate(node)
            elif node.op == "output":
                (result,) = (self.values[n] for n in node.args[0])
        output = self._rename(result, output_name)
        graph = ir.Graph(
            inputs,
            [output],
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": self.opset, schema.DOMAIN: schema.VERSION},
            name="vim",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="vimdeploy")

    def _translate(self, node: Node) -> Any:
        handler = _HANDLERS.get(node.target)
        if handler is None:
            raise ExportError(
                f"the network uses {node.target}, which has no ONNX translation here",
                hint="report it with the checkpoint's `vimdeploy inspect` output",
            )
        self.fx, self.scope = node, _module_path(node)
        result = handler(self, node, [self._operand(arg) for arg in node.args])
        facts: Any = node.meta.get("val")
        for value, fact in zip(result, facts) if isinstance(result, list) else ((result, facts),):
            if isinstance(value, ir.Value) and isinstance(fact, torch.Tensor) and value.producer() is not None:
                value.type, value.shape = ir.TensorType(_DTYPES[fact.dtype]), _shape(fact)
        return result

    def _operand(self, arg: Any) -> Operand:
        if isinstance(arg, Node):
            return self.values[arg]
        if isinstance(arg, (list, tuple)):
            return [self._operand(item) for item in arg]
        return arg

    # What handlers build with.

    def emit(
        self, op: str, *inputs: Operand, outputs: int = 1, domain: str = "", label: str = "", **attributes: Any
    ) -> Any:
        """Append one ONNX node, named module/label (the operator's name unless given); weights become initializers.

        Returns its value, or a list when outputs > 1.
        """
        path = f"{self.scope}/" if self.scope else ""
        name = self._unique(f"{path}{label or op}")
        node = ir.node(
            op,
            inputs=[self._value(x) for x in inputs],
            attributes=attributes,
            num_outputs=outputs,
            domain=domain,
            name=name,
        )
        first = node.inputs[0]
        dtype = {"Shape": ir.DataType.INT64, "Cast": attributes.get("to")}.get(op) or (first and first.dtype)
        for i, value in enumerate(node.outputs):
            value.type = ir.TensorType(dtype) if dtype else None
            value.name = f"{name}:{i}" if outputs > 1 else name
        self.nodes.append(node)
        return list(node.outputs) if outputs > 1 else node.outputs[0]

    def constant(self, array: np.ndarray) -> ir.Value:
        """A small constant as an initializer, shared by all its users."""
        key = f"const/{array.dtype}/{'x'.join(map(str, array.shape))}/{','.join(map(str, array.ravel()))}"
        if key not in self.initializers:
            tensor = ir.tensor(array, name=key)
            self.initializers[key] = ir.Value(
                name=key, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
            )
        return self.initializers[key]

    def ints(self, *values: int) -> ir.Value:
        return self.constant(np.array(values, dtype=np.int64))

    def weight(self, name: str, tensor: torch.Tensor) -> ir.Value:
        if name not in self.initializers:
            data = tensor.detach().contiguous().cpu()
            value = ir.tensor(data.numpy() if data.dtype != torch.bfloat16 else data, name=name)
            self.initializers[name] = ir.Value(
                name=name, type=ir.TensorType(value.dtype), shape=ir.Shape(tuple(data.shape)), const_value=value
            )
        return self.initializers[name]

    def _value(self, x: Operand) -> ir.Value | None:
        if isinstance(x, _Weight):
            return self.weight(x.name, x.tensor)
        if isinstance(x, (int, float)):
            assert self.fx is not None
            dtype = _DTYPES[self.fx.meta["val"].dtype].numpy()
            return self.constant(np.array(x, dtype=dtype))
        return x

    def _unique(self, name: str) -> str:
        candidate, n = name, 1
        while candidate in self._names:
            n += 1
            candidate = f"{name}.{n}"
        self._names.add(candidate)
        return candidate

    def _rename(self, value: Any, name: str) -> ir.Value:
        if not isinstance(value, ir.Value) or value.producer() is None:
            value = self.emit("Identity", value)
        assert isinstance(value, ir.Value) and self.program.graph.output_node() is not None
        result = self.program.graph.output_node().args[0][0].meta["val"]  # type: ignore[index,union-attr]
        value.name = name
        value.type, value.shape = ir.TensorType(_DTYPES[result.dtype]), _shape(result)
        return value


class _Weight:
    """A stored tensor that has not become an initializer yet: some users want it transposed."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name, self.tensor = name, tensor


def _module_path(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return "" if path.startswith("_empty") else path  # torch marks nodes it made itself with a stand-in


def _type(node: Node) -> ir.TensorType:
    return ir.TensorType(_DTYPES[node.meta["val"].dtype])


def _shape(tensor: torch.Tensor) -> ir.Shape:
    return ir.Shape([d if isinstance(d, int) else BATCH for d in tensor.shape])


def _output(node: Node) -> torch.Tensor:
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value


def _dim(tensor: torch.Tensor, dim: int) -> int:
    return dim % tensor.dim()


def _input(node: Node, i: int = 0) -> torch.Tensor:
    arg = node.args[i]
    assert isinstance(arg, Node)
    return arg.meta["val"]  # type: ignore[no-any-return]


# ----------------------------------------------------------------------------------------------------------------------
# One entry an operator.

aten = torch.ops.aten


@_handles(aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten.sym_constrain_range_for_size.default)
def _nothing(t: Translator, node: Node, args: Sequence[Operand]) -> None:
    return None


@_handles(aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default, aten.dropout.default)
def _same(t: Translator, node: Node, args: Sequence[Operand]) -> Operand:
    return args[0]


@_handles(operator.getitem)
def _getitem(t: Translator, node: Node, args: Sequence[Operand]) -> Operand:
    return args[0][args[1]]


@_handles(aten.sym_size.int)
def _sym_size(t: Translator, node: Node, args: Sequence[Operand]) -> Operand:
    dim = args[1]
    return t.emit("Shape", args[0], start=dim, end=dim + 1)  # (1,) int64


_ARITHMETIC: dict[Any, str] = {
    aten.add.Tensor: "Add",
    aten.sub.Tensor: "Sub",
    aten.mul.Tensor: "Mul",
    aten.div.Tensor: "Div",
}
_UNARY: dict[Any, str] = {aten.neg.default: "Neg", aten.exp.default: "Exp", aten.sigmoid.default: "Sigmoid"}


@_handles(*_ARITHMETIC)
def _arithmetic(t: Translator, node: Node, args: Sequence[Operand]) -> Operand:
    return t.emit(_ARITHMETIC[node.target], args[0], args[1])


@_handles(*_UNARY)
def _unary(t: Translator, node: Node, args: Sequence[Operand]) -> Operand:
    return t.emit(_UNARY[node.target], args[0])


@_handles(aten.rsqrt.default)
def _rsqrt(t: Translator, node: Node, args: Sequence[Operand]) -> Operand:
    return t.emit("Reciprocal", t.emit("Sqrt", args[0]))


@_handles(aten.silu.default)
def _silu(t: Translator, node: Node, args: Sequence[Operand]) -> Operand:
    return t.emit("Mul", args[0], t.emit("Sigmoid", args[0]))


@_handles(aten.to.dtype, aten._to_copy.default)
def _to(t: Translator, node: Node, args: Sequence[Operand]) -> Operand:
    if _input(node).dtype == _output(node).dtype:
        return args[0]
    return t.emit("Cast", args[0], to=_DTYPES[_output(node).dtype])


@_handles(aten.mean.dim)
def _mean(t: Translator, node: Node, args: Sequence[Operand]) -> Operand:
    return _reduce(t, "ReduceMean", args[0], args[1], bool(args[2]) if len(args) > 2 else False)


@_handles(aten.max.dim)
def _max(t: Translator, node: Node, args: Sequence[Operand]) -> Operand:
    return [_reduce(t, "ReduceMax", args[0], [args[1]], False), None]


def _reduce(t: Translator, op: str, x: Operand, dims: Sequence[int], keepdim: bool) -> Operand:
    if t.opset < 18:  # the axes were an attribute
        return t.emit(op, x, axes=list(dims), keepdims=int(keepdim))
    return t.emit(op, x, t.ints(*dims), keepdims=int(keepdim))


@_handles(aten.linear.default)
def _linear(t: Translator, node: Node, args: Sequence[Operand]) -> Operand:
    x, weight = args[0], args[1]
    bias = args[2] if len(args) > 2 else None
    if _input(node).dim() == 2 and bias is not None:
        return t.emit("Gemm", x, weight, bias, transB=1)
    # Transposed here, offline: a Transpose node would cost each run, or each runtime's constant folder.
    y = t.emit("MatMul", x, t.weight(f"{weight.name}.T", weight.tensor.T))
    return y if bias is None else t.emit("Add", y, bias)


@_handles(aten.conv2d.default)
def _conv2d(t: Translator, node: Node, args: Sequence[Operand]) -> Operand:
    x, weight, bias = args[:3]
    stride = args[3] if len(args) > 3 else [1, 1]
    if len(args) > 4 and any(args[4]):
        raise ExportError("a padded patch embedding is not a Vision Mamba's")
    kernel = list(weight.tensor.shape[2:])
    return t.emit("Conv", x, weight, bias, kernel_shape=kernel, strides=list(stride))


@_handles(aten.pad.default, aten.constant_pad_nd.default)
def _pad(t: Translator, node: Node, args: Sequence[Operand]) -> Operand:
    rank, pads = _output(node).dim(), args[1]
    before, after = [0] * rank, [0] * rank
    for i in range(len(pads) // 2):  # torch lists the last dimension first
        before[rank - 1 - i], after[rank - 1 - i] = pads[2 * i], pads[2 * i + 1]
    return t.emit("Pad", args[0], t.ints(*before, *after))


@_handles(aten.slice.Tensor)
def _slice(t: Translator, node: Node, args: Sequence[Operand]) -> Operand:
    x, *bounds = args
    dim, start, end, step = bounds + [0, None, None, 1][len(bounds) :]
    source = _input(node)
    if step == 1 and source.shape == _output(node).shape:
        return x
    starts, ends = t.ints(start or 0), t.ints(_TO_END if end is None else min(end, _TO_END))
    axes = t.ints(_dim(source, dim))
    return t.emit("Slice", x, starts, ends, axes) if step == 1 else t.emit("Slice", x, starts, ends, axes, t.ints(step))


@_handles(aten.select.int)
def _select(t: Translator, node: Node, args: Sequence[Operand]) -> Operand:
    index = t.constant(np.array(args[2], dtype=np.int64))
    return t.emit("Gather", args[0], index, axis=_dim(_input(node), args[1]))


@_handles(aten.unbind.int)
def _unbind(t: Translator, node: Node, args: Sequence[Operand]) -> Operand:
    dim = _dim(_input(node), args[1] if len(args) > 1 else 0)
    return [
        t.emit("Gather", args[0], t.constant(np.array(i, dtype=np.int64)), axis=dim)
        for i in range(_input(node).shape[dim])
    ]


@_handles(aten.split_with_sizes.default, aten.chunk.default)
def _split(t: Translator, node: Node, args: Sequence[Operand]) -> Operand:
    dim = _dim(_input(node), args[2] if len(args) > 2 else 0)
    sizes = [part.shape[dim] for part in node.meta["val"]]
    return t.emit("Split", args[0], t.ints(*sizes), axis=dim, outputs=len(sizes))


@_handles(aten.cat.default)
def _cat(t: Translator, node: Node, args: Sequence[Operand]) -> Operand:
    return t.emit("Concat", *args[0], axis=_dim(_output(node), args[1] if len(args) > 1 else 0))


@_handles(aten.stack.default)
def _stack(t: Translator, node: Node, args: Sequence[Operand]) -> Operand:
    dim = _dim(_output(node), args[1] if len(args) > 1 else 0)
    return t.emit("Concat", *(t.emit("Unsqueeze", x, t.ints(dim)) for x in args[0]), axis=dim)


@_handles(aten.unsqueeze.default)
def _unsqueeze(t: Translator, node: Node, args: Sequence[Operand]) -> Operand:
    return t.emit("Unsqueeze", args[0], t.ints(_dim(_output(node), args[1])))


@_handles(aten.transpose.int)
def _transpose(t: Translator, node: Node, args: Sequence[Operand]) -> Operand:
    perm = list(range(_output(node).dim()))
    i, j = _dim(_output(node), args[1]), _dim(_output(node), args[2])
    perm[i], perm[j] = perm[j], perm[i]
    return t.emit("Transpose", args[0], perm=perm)


@_handles(aten.flatten.using_ints, aten.view.default, aten.reshape.default, aten.unflatten.int)
def _reshape(t: Translator, node: Node, args: Sequence[Operand]) -> Operand:
    shape = [d if isinstance(d, int) else 0 for d in _output(node).shape]  # 0 copies the batch from the input
    if 0 in shape[1:]:
        raise ExportError(f"a reshape moves the batch out of the first dimension: {_output(node).shape}")
    return t.emit("Reshape", args[0], t.ints(*shape))


@_handles(aten.expand.default)
def _expand(t: Translator, node: Node, args: Sequence[Operand]) -> Operand:
    sizes, shape = args[1], _output(node).shape
    dynamic = [s for s in sizes if isinstance(s, ir.Value)]
    if not dynamic:
        return t.emit("Expand", args[0], t.ints(*(int(d) for d in shape)))
    target = t.emit("Concat", dynamic[0], t.ints(*(int(d) for d in shape[1:])), axis=0)
    return t.emit("Expand", args[0], target)


@_handles(torch.ops.vim.selective_scan.default)
def _selective_scan(t: Translator, node: Node, args: Sequence[Operand]) -> Operand:
    # torch's argument names and order are the op's (ops/selective_scan.py), the two flags last.
    softplus, reverse = (bool(node.kwargs.get(name, default)) for name, default in _FLAGS.items())
    tensors = list(args[:8])
    if len(args) > 8:
        softplus = bool(args[8])
    if len(args) > 9:
        reverse = bool(args[9])
    while tensors and tensors[-1] is None:
        tensors.pop()
    return t.emit(
        schema.SCAN.name,
        *tensors,
        domain=schema.DOMAIN,
        label="scan_backward" if reverse else "scan_forward",
        **schema.SCAN.node_attributes(delta_softplus=int(softplus), reverse=int(reverse)),
    )


_FLAGS = {"delta_softplus": True, "reverse": False}
