"""What every pass does to a graph: read a constant, make one, make a node, put it in another's place, clear up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """An initializer of `graph` that holds `array`; the one of that name where it is there already."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(np.asarray(array, order="C"), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.initializers[name] = value
    return value


def array_of(value: ir.Value | None) -> np.ndarray | None:
    """What a constant holds, None for what is computed."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def ints(value: ir.Value | None) -> list[int]:
    """What a constant of integers holds, [] for what is computed or absent."""
    array = array_of(value)
    return [] if array is None else [int(i) for i in array.ravel()]


def node(
    op: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    outputs: Iterable[tuple[str | None, ir.DataType | None, ir.Shape | None]],
    attributes: Mapping[str, object] | None = None,
    domain: str = "",
) -> ir.Node:
    """A node that is in no graph yet; `outputs`: the name, type and shape of each of its values."""
    described = list(outputs)
    made = ir.node(op, inputs, attributes or {}, domain=domain, num_outputs=len(described), name=name)  # type: ignore[arg-type]
    for value, (label, dtype, shape) in zip(made.outputs, described):
        value.name, value.shape = label, shape
        value.type = ir.TensorType(dtype) if dtype is not None else None
    return made


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Let `new` be what `old` was: its name, type, shape and readers, the graph's output where it was one."""
    new.type, new.shape = old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    name, old.name = old.name, None
    new.name = name


def only_reader(value: ir.Value) -> ir.Node | None:
    """The node that reads `value`, where it is the only one and the value is no output of the graph."""
    readers = {use.node for use in value.uses()}
    return next(iter(readers)) if len(readers) == 1 and not value.is_graph_output() else None


def last_axis(value: ir.Value, axis: int) -> bool:
    """Whether `axis` is the last of a value of known rank."""
    return axis == -1 or (value.shape is not None and axis == len(value.shape) - 1)


def drop_unread(graph: ir.Graph) -> None:
    """Remove nodes and initializers that nothing reads."""
    for candidate in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in candidate.outputs):
            graph.remove(candidate, safe=True)
    for name in [n for n, v in graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        del graph.initializers[name]
