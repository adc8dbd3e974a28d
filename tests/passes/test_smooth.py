"""passes/smooth.py: the same network, each layer's input divided by its factors by whoever makes it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from zoo import BASE, NETWORKS, check, exported, images_for, session

from vimdeploy.export import functions
from vimdeploy.passes.projections import DEFAULT_KINDS, projections
from vimdeploy.passes.smooth import smooth

#: Every maker of a layer's input: norms of both kinds, scans alone, in pairs, of pairs of layers, all tokens of the
#: last or one.
NAMES = ("v2", "v1", "forward only", "layer pairs, v2", "LayerNorm", "no cls, pool mean", "rope", "cls double")
CASES = [(name, fusion) for name in NAMES for fusion in ("none", "full")]


def factors_of(model: ir.Model, seed: int = 0) -> dict[str, np.ndarray]:
    """Over three orders of magnitude, other ones for each layer."""
    generator = np.random.default_rng(seed)
    layers = projections(model.graph, DEFAULT_KINDS)
    return {layer.name: 10 ** generator.uniform(-1.5, 1.5, layer.weight.shape[0]) for layer in layers}


def smoothed(model: ir.Model, factors: dict[str, np.ndarray]) -> ir.Model:
    model.functions.clear()
    smooth(model, factors, projections(model.graph))
    functions.attach(model, "scan")
    return model


def reads(model: ir.Model, images: np.ndarray) -> dict[str, np.ndarray]:
    """What each layer reads, and the output as "out"."""
    layers = projections(model.graph, DEFAULT_KINDS)
    graph_outputs = {id(value) for value in model.graph.outputs}
    names = {layer.name: str(layer.input.name) for layer in layers}
    model.graph.outputs.extend(layer.input for layer in layers if id(layer.input) not in graph_outputs)
    one = session(ir.to_proto(model))
    values = dict(zip([o.name for o in one.get_outputs()], one.run(None, {"images": images}), strict=True))
    return {name: values[value] for name, value in names.items()} | {"out": values[one.get_outputs()[0].name]}


@pytest.mark.parametrize(("name", "fusion"), CASES)
def test_the_output_stays_and_every_input_is_divided(name: str, fusion: str) -> None:
    config = NETWORKS[name]
    model = ir.from_proto(exported(config, fusion=fusion))
    factors = factors_of(model)
    assert len(factors) >= 4
    before = reads(ir.from_proto(exported(config, fusion=fusion)), images_for(config))
    after = reads(smoothed(model, factors), images_for(config))
    np.testing.assert_allclose(after["out"], before["out"], rtol=2e-3, atol=2e-5)
    for layer, s in factors.items():
        np.testing.assert_allclose(after[layer] * s, before[layer], rtol=1e-3, atol=1e-4 * np.abs(before[layer]).max())


@pytest.mark.parametrize("fusion", ["none", "bidirectional", "full"])
def test_a_file_that_was_smoothed_is_valid_onnx(fusion: str) -> None:
    model = ir.from_proto(exported(BASE, fusion=fusion))
    check(ir.to_proto(smoothed(model, factors_of(model))))


@pytest.mark.parametrize(
    ("fusion", "added"),
    [
        ("none", {"Mul": 2}),  # in front of the two out_proj, where no op takes the factors
        ("bidirectional", {}),
        ("full", {"Mul": 1}),  # the last out_proj reads one token of the scan, chosen by a Gather
    ],
)
def test_only_what_no_op_can_take_becomes_a_node(fusion: str, added: dict[str, int]) -> None:
    before = Counter(node.op_type for node in ir.from_proto(exported(BASE, fusion=fusion)).graph)
    model = ir.from_proto(exported(BASE, fusion=fusion))
    after = Counter(node.op_type for node in smoothed(model, factors_of(model)).graph)
    assert after - before == Counter(added)
    assert not before - after


def test_smoothing_twice_multiplies_the_factors_in_place() -> None:
    model = ir.from_proto(exported(BASE, fusion="bidirectional"))
    first, second = factors_of(model, 0), factors_of(model, 1)
    nodes = len(model.graph)
    twice = smoothed(smoothed(model, first), second)
    once = smoothed(
        ir.from_proto(exported(BASE, fusion="bidirectional")), {name: first[name] * second[name] for name in first}
    )
    assert len(twice.graph) == nodes
    for one, other in zip(projections(twice.graph), projections(once.graph), strict=True):
        np.testing.assert_allclose(one.weight, other.weight, rtol=1e-5)
    np.testing.assert_allclose(
        reads(twice, images_for(BASE))["out"], reads(once, images_for(BASE))["out"], rtol=1e-3, atol=1e-5
    )


def test_one_scan_smoothed_gives_the_others_factors_of_one() -> None:
    model = ir.from_proto(exported(BASE, fusion="bidirectional"))
    factors = {name: s for name, s in factors_of(model).items() if name == "layers.0.mixer.out_proj"}
    smoothed(model, factors)  # attaching one body for both would fail if they differed
    scans = [node for node in model.graph if node.op_type == "BiSelectiveScan"]
    scale = {str(node.name): node.inputs[13].const_value.numpy() for node in scans}
    assert sorted(float(s.std()) > 0 for s in scale.values()) == [False, True]


def test_a_vector_that_another_node_reads_too_stays_for_it() -> None:
    model = ir.from_proto(exported(BASE))
    first, second = projections(model.graph, ("in_proj",))
    shared = first.input.producer().inputs[1]
    second.input.producer().replace_input_with(1, shared)  # both norms now share one weight
    kept = shared.const_value.numpy().copy()
    want = session(ir.to_proto(model)).run(None, {"images": images_for(BASE)})[0]
    smooth(model, {first.name: np.full(len(kept), 4.0)}, projections(model.graph))
    np.testing.assert_array_equal(second.input.producer().inputs[1].const_value.numpy(), kept)
    got = session(ir.to_proto(model)).run(None, {"images": images_for(BASE)})[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
