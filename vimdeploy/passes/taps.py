"""Recognise the short causal convolution, which the exporter writes as shifted products.

    Pad (x) -> k x (Slice -> Mul by a tap) -> Adds, from a bias      x (B, L, D)

Cases, cited in the code:

1. All readers of the Pad are Slices of as many tokens as x has, each multiplied by one constant per channel.
2. The products are summed in a chain of Adds that starts from a constant bias and has no other reader on the way.
3. Anything else is not one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vimdeploy.passes.edit import array_of, ints, only_reader


@dataclass(frozen=True, eq=False)
class Taps:
    """result[t] = bias + sum_i taps[i] * x[t - before + i], with before + after + 1 taps; x is 0 outside."""

    x: ir.Value
    before: int
    after: int
    taps: tuple[ir.Value, ...]  # (D,) constants
    bias: ir.Value  # (D,)
    result: ir.Value
    nodes: tuple[ir.Node, ...]  # all of them, in an order that runs; the first is the Pad

    def weight(self) -> np.ndarray:
        """(taps, D), in the order of `taps`."""
        return np.stack([array for array in map(array_of, self.taps) if array is not None])


def find_taps(graph: ir.Graph) -> list[Taps]:
    """All such convolutions of `graph`, in its order."""
    found = (_match(node) for node in graph if node.op_type == "Pad")
    return [taps for taps in found if taps is not None]


def _match(pad: ir.Node) -> Taps | None:
    x, pads = pad.inputs[0], ints(pad.inputs[1])
    if x is None or x.shape is None or len(x.shape) != 3 or len(pads) != 6 or any(pads[i] for i in (0, 2, 3, 5)):
        return None
    if ("mode" in pad.attributes and pad.attributes["mode"].as_string() != "constant") or any(pad.inputs[2:]):
        return None
    length = x.shape[1]
    taps: dict[int, ir.Value] = {}
    adds: list[ir.Node] = []
    nodes: list[ir.Node] = [pad]
    for cut, _ in pad.outputs[0].uses():  # case 1
        if cut.op_type != "Slice" or len(cut.inputs) != 4 or ints(cut.inputs[3]) != [1]:
            return None
        (start,), (end,) = ints(cut.inputs[1]), ints(cut.inputs[2])
        product = only_reader(cut.outputs[0])
        if end - start != length or product is None or product.op_type != "Mul":
            return None
        tap = _vector_beside(product, cut.outputs[0])
        total = only_reader(product.outputs[0])
        if tap is None or total is None or total.op_type != "Add":
            return None
        taps[start] = tap
        adds.append(total)
        nodes += [cut, product]
    if sorted(taps) != list(range(pads[1] + pads[4] + 1)) or len(set(adds)) != len(taps):
        return None
    biases = [bias for add in adds for bias in [_vector_beside(add, None)] if bias is not None]  # case 2
    last = [add for add in adds if not any(user in adds for user, _ in add.outputs[0].uses())]
    if len(biases) != 1 or len(last) != 1 or any(only_reader(a.outputs[0]) is None for a in adds if a is not last[0]):
        return None
    nodes += [add for add in adds if add is not last[0]] + last
    ordered = tuple(taps[i] for i in range(len(taps)))
    return Taps(x, pads[1], pads[4], ordered, biases[0], last[0].outputs[0], tuple(nodes))


def _vector_beside(node: ir.Node, value: ir.Value | None) -> ir.Value | None:
    """The constant vector beside `value` among a node's inputs, where it is the only constant there."""
    others = [v for v in node.inputs if v is not None and v is not value and v.const_value is not None]
    array = array_of(others[0]) if len(others) == 1 else None
    return others[0] if array is not None and array.ndim == 1 else None
