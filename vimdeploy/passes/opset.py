"""Lower a Vim graph to an older opset, for parsers that stop there (TensorRT 8.5, 8.6), or raise it (bf16 needs 22).

    Before: ReduceMean (x, axes)          After: ReduceMean <axes> (x)               opset 18 -> 17
    Before: Shape <start, end> (x)        After: Slice (Shape (x), start, end, 0)    opset 15 -> 14

Cases, cited in the code:

1. An operator whose form is the same in both opsets stays as it is.
2. ReduceMean and ReduceMax take their axes as an attribute before opset 18; the axes must be a constant.
3. Shape takes a whole shape before opset 15; a Slice then cuts it.
4. Anything else is refused with its name: what lowering it would mean is not known here.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from vimdeploy.errors import ExportError

#: The lowest opset this pass goes to: Unsqueeze, Split and ReduceSum take inputs from 13 on, as our graphs write them.
OLDEST = 13


def lower_opset(model: ir.Model, opset: int) -> ir.Model:
    """Rewrite `model` for `opset` in place and return it; one of that opset or older stays as it is.

    Functions are not rewritten: strip them first. Raises ExportError for an operator that cannot be lowered.
    """
    current = model.opset_imports[""]
    if current <= opset:
        return model
    if opset < OLDEST:
        raise ExportError(f"opset {opset} is older than graphs can be lowered to ({OLDEST})")
    for node in list(model.graph):
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type in ("ReduceMean", "ReduceMax"):
            if opset < 18 <= current:
                _axes_to_attribute(node)  # case 2
        elif node.op_type == "Shape":
            if opset < 15 <= current:
                _cut_shape(model.graph, node)  # case 3
        elif not _same_form(node, current, opset):
            raise ExportError(
                f"{node.name or node.op_type}: {node.op_type} of opset {current} has no form in opset {opset} that "
                "vimdeploy knows",
                hint=f"export with an opset this runtime reads (--opset {max(opset, 16)})",
            )
    for name in [n for n, v in model.graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        del model.graph.initializers[name]
    model.opset_imports[""] = opset
    return model


def raise_opset(model: ir.Model, opset: int) -> ir.Model:
    """Declare `model` to be of `opset` where every operator in it has the same form there; else ExportError.

    From opset 18 on, where the reductions took their present form. Functions are not looked at: strip them first.
    """
    current = model.opset_imports[""]
    if current >= opset:
        return model
    for node in model.graph:
        if node.domain not in ("", "ai.onnx"):
            continue
        reduction = node.op_type in ("ReduceMean", "ReduceMax", "Shape")
        if current < 18 or not (reduction or _same_form(node, opset, current)):
            raise ExportError(
                f"{node.name or node.op_type}: {node.op_type} of opset {current} may differ in opset {opset}",
                hint=f"export with --opset {opset}",
            )
    model.opset_imports[""] = opset
    return model


#: Operators that changed between opsets 13 and 23 by new types or attributes only, none of which a Vim graph uses.
_WIDENED = {
    "Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Conv", "Div", "Exp", "Expand", "Flatten", "Gather",
    "DequantizeLinear", "Gemm", "Identity", "MatMul", "Mul", "Neg", "Pad", "QuantizeLinear", "Reciprocal", "Reshape",
    "Sigmoid", "Slice", "Softplus", "Split", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
#: ... and the attributes that came on the way: a node that carries one means something an older opset cannot say.
_NEW_ATTRIBUTES = {"num_outputs", "saturate", "round_mode", "allowzero", "block_size", "output_dtype", "precision"}


def _same_form(node: ir.Node, current: int, opset: int) -> bool:
    """Case 1."""
    if onnx.defs.get_schema(node.op_type, current).since_version <= opset:
        return True
    limited = node.op_type == "Pad" and len(node.inputs) > 3  # axes, from opset 18
    return node.op_type in _WIDENED and not limited and not _NEW_ATTRIBUTES & set(node.attributes)


def _axes_to_attribute(node: ir.Node) -> None:
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    if axes is None:
        return
    if axes.const_value is None:
        raise ExportError(f"{node.name}: the axes of {node.op_type} are computed, and older opsets want them fixed")
    node.attributes["axes"] = ir.AttrInt64s("axes", [int(axis) for axis in axes.const_value.numpy()])
    node.resize_inputs(1)


def _cut_shape(graph: ir.Graph, node: ir.Node) -> None:
    start, end = (node.attributes.pop(name, None) for name in ("start", "end"))
    if start is None and end is None:
        return
    result = node.outputs[0]
    whole = ir.node("Shape", [node.inputs[0]], name=f"{node.name}:whole")
    whole.outputs[0].name, whole.outputs[0].type = f"{result.name}:whole", ir.TensorType(ir.DataType.INT64)
    bounds = [0 if start is None else start.as_int(), np.iinfo(np.int32).max if end is None else end.as_int(), 0]
    constants = []
    for name, bound in zip(("start", "end", "axis"), bounds, strict=True):
        tensor = ir.tensor(np.array([bound], dtype=np.int64), name=f"{result.name}:{name}")
        constants.append(
            ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([1]), const_value=tensor)
        )
        graph.initializers[str(tensor.name)] = constants[-1]
    cut = ir.node("Slice", [whole.outputs[0], *constants], name=node.name)
    cut.outputs[0].type, cut.outputs[0].shape = result.type, result.shape
    graph.insert_before(node, [whole, cut])
    result.replace_all_uses_with(cut.outputs[0], replace_graph_outputs=True)
    result_name = result.name
    graph.remove(node, safe=True)
    cut.outputs[0].name = result_name
