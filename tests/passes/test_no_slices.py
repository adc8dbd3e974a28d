"""passes/no_slices.py and depthwise.py: the same numbers, without a Slice, Split or Unsqueeze in any block."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from zoo import NETWORKS, exported, images_for, session

from vimdeploy.export import functions
from vimdeploy.passes.no_slices import without_slices
from vimdeploy.passes.precision import to_precision


def rewritten(name: str, precision: str = "fp32") -> ir.Model:
    graph = ir.from_proto(exported(NETWORKS[name]))
    graph.functions.clear()
    without_slices(graph)
    to_precision(graph, precision)
    functions.attach(graph, "scan")
    return graph


@pytest.mark.parametrize("name", list(NETWORKS))
def test_outputs_are_those_of_the_graph_as_exported(name: str) -> None:
    config = NETWORKS[name]
    graph = rewritten(name)
    # The exporter's constants that only a rewritten node read are gone.
    assert all(value.uses() or value.is_graph_output() for value in graph.graph.initializers.values())
    before, after = session(exported(config)), session(ir.to_proto(graph))
    x = images_for(config)
    want, got = (s.run(None, {s.get_inputs()[0].name: x})[0] for s in (before, after))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_nothing_slices_inside_a_block() -> None:
    graph = rewritten("v2")
    inside = Counter(node.op_type for node in graph.graph if (node.name or "").startswith("layers."))
    assert not {"Slice", "Split", "Unsqueeze", "Pad"} & set(inside)
    assert inside["Conv"] == 4 and inside["MatMul"] == 2 * (2 + 2 * 3 + 2 + 1)  # x, z; dt, B, C; dt_proj; out_proj


def test_sizes_are_constants_with_the_batch_copied() -> None:
    graph = rewritten("v2").graph
    for node in graph:
        if node.op_type == "Reshape":
            assert node.inputs[1] is not None and node.inputs[1].const_value is not None
            assert node.inputs[1].const_value.numpy()[0] == 0


def test_it_can_be_typed() -> None:
    graph = rewritten("v2", "fp16")
    runtime, config = session(ir.to_proto(graph)), NETWORKS["v2"]
    x = images_for(config)
    want = session(exported(config)).run(None, {"images": x})[0]
    got = runtime.run(None, {"images": x})[0]
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()
    convolutions = [n for n in graph.graph if n.op_type == "Conv"]
    assert {v.dtype for n in convolutions for v in n.inputs if v is not None} == {ir.DataType.FLOAT16}


def test_what_only_looks_like_taps_stays() -> None:
    """A bias that is read elsewhere too, or a tap that is no constant, is another computation."""
    graph = ir.from_proto(exported(NETWORKS["v2"]))
    graph.functions.clear()
    pads = [node for node in graph.graph if node.op_type == "Pad"]
    cut = next(iter(pads[0].outputs[0].uses())).node
    product = next(iter(cut.outputs[0].uses())).node
    graph.graph.outputs.append(product.outputs[0])
    without_slices(graph)
    assert len([node for node in graph.graph if node.op_type == "Pad"]) == 1
