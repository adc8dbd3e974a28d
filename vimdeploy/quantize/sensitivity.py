"""Which layers bear int8: one session in which each layer can be switched, and the fewest that must stay out.

    Before: x --> MatMul (W) --> y
    After:  x --> If (flag) { Quantize, Dequantize, MatMul (int8 W) } else { MatMul (W) } --> y

A model is built and optimised once for any number of questions about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from vimdeploy.errors import CheckFailed
from vimdeploy.passes import edit
from vimdeploy.passes.projections import Projection, projections
from vimdeploy.passes.quantize import as_matmul, qdq_nodes, scale_of
from vimdeploy.quantize.session import GraphSession
from vimdeploy.verify.agreement import Agreement, agreement, sqnr


class Switchboard:
    """A model (fp32, smoothed) whose layers can be put into int8 one by one, over a fixed batch of images."""

    def __init__(self, model: ir.Model, bounds: Mapping[str, float]) -> None:
        layers = [layer for layer in projections(model.graph) if layer.name in bounds]
        self.layers = tuple(layer.name for layer in layers)
        self._output = str(model.graph.outputs[0].name)
        for layer in layers:
            _switch(model.graph, layer, scale_of(bounds[layer.name]))
        edit.drop_unread(model.graph)
        self._session = GraphSession(model, tuple(map(_flag, self.layers)))

    def run(self, batch: np.ndarray, in_int8: Iterable[str]) -> np.ndarray:
        """The model's output with those layers in int8 and the others in fp32."""
        chosen = set(in_int8)
        return self._session.run(batch, self._output, {_flag(name): name in chosen for name in self.layers})


def sweep(
    board: Switchboard,
    batch: np.ndarray,
    reference: np.ndarray,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """layer -> signal to noise of the model's output, in dB, with that layer alone in int8."""
    found = {}
    for i, name in enumerate(board.layers):
        found[name] = sqnr(board.run(batch, [name]), reference)
        progress(i + 1, len(board.layers))
    return found


def keep_out(
    board: Switchboard,
    batch: np.ndarray,
    reference: np.ndarray,
    targets: np.ndarray | None,
    order: Sequence[str],
    max_drop: float,
    fixed: Iterable[str] = (),
    at_least: int = 0,
    step: Callable[[str], None] = lambda text: None,
) -> tuple[tuple[str, ...], Agreement]:
    """The fewest layers to leave in fp32, from the front of `order`, so that the drop is at most `max_drop` points.

    `fixed` stay out in any case, and `at_least` so many of the others. Doubles the number until the drop is within the
    budget, then halves the interval.
    Raises CheckFailed when that takes more than half of the layers: there would be little int8 left to speak of.
    """
    always = set(fixed)
    candidates = [name for name in order if name not in always]

    def measured(k: int) -> tuple[tuple[str, ...], Agreement]:
        out = always | set(candidates[:k])
        kept = tuple(name for name in board.layers if name in out)
        step(f"accuracy with {len(board.layers) - len(kept)} of {len(board.layers)} layers in int8")
        got = board.run(batch, [name for name in board.layers if name not in out])
        return kept, agreement(got, reference, targets)

    most = len(candidates) // 2
    high = min(at_least, most)
    low, found = high - 1, measured(high)
    while found[1].points > max_drop or high < at_least:
        if high == most:
            # By the switches it may be enough where the caller knows that it is not.
            cost = f"{found[1].points:.2f}" if found[1].points > max_drop else f"more than {max_drop:g}"
            raise CheckFailed(
                f"int8 costs {cost} points of top-1 with {most} of {len(board.layers)} layers left in fp32, and "
                f"{max_drop:g} are allowed",
                hint="allow more with --max-drop, or calibrate on images like those the model was trained on",
            )
        low, high = high, min(max(1, 2 * high), most)
        found = measured(high)
    while high - low > 1:
        middle = (low + high) // 2
        attempt = measured(middle)
        if attempt[1].points > max_drop:
            low = middle
        else:
            high, found = middle, attempt
    return found


def _flag(name: str) -> str:
    return f"{name}:in_int8"


def _switch(graph: ir.Graph, layer: Projection, scale: np.ndarray) -> None:
    node = as_matmul(graph, layer.node)
    y = node.outputs[0]
    flag = ir.Value(name=_flag(layer.name), type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    graph.inputs.append(flag)
    nodes, x, weight = qdq_nodes(graph, layer.name, node, scale)
    branches = []
    for what, made, inputs in (("int8", nodes, [x, weight]), ("fp32", [], list(node.inputs[:2]))):
        copy = ir.node(node.op_type, [*inputs, *node.inputs[2:]], dict(node.attributes), name=f"{node.name}:{what}")
        out = copy.outputs[0]
        out.name, out.type, out.shape = f"{y.name}:{what}", y.type, y.shape
        branches.append(ir.Graph([], [out], nodes=[*made, copy], name=f"{layer.name}:{what}"))
    graphs = {
        f"{what}_branch": ir.AttrGraph(f"{what}_branch", branch) for what, branch in zip(("then", "else"), branches)
    }
    choice = edit.node("If", [flag], f"{node.name}:choice", [(None, None, None)], graphs)
    graph.insert_before(node, choice)
    edit.take_over(y, choice.outputs[0])
    graph.remove(node, safe=True)
