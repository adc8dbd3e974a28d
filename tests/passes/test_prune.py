"""passes/prune.py: the last block computes one token where one is read, and every token where more are."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import zoo

from vimdeploy.export import functions
from vimdeploy.passes import edit
from vimdeploy.passes.fuse_norm import fuse_norms
from vimdeploy.passes.fuse_scan import fuse_scans
from vimdeploy.passes.prune import prune_last_block


def normed(name: str = "v2", **options: object) -> ir.Model:
    return fused(zoo.loaded(zoo.NETWORKS[name], fallback="none", **options))


def fused(model: ir.Model) -> ir.Model:
    """As the passes before this one leave it."""
    fuse_scans(model.graph)
    fuse_norms(model.graph)
    return model


def node(model: ir.Model, name: str) -> ir.Node:
    (found,) = (n for n in model.graph if n.name == name)
    return found


def run(model: ir.Model, name: str = "v2") -> np.ndarray:
    copy = ir.from_proto(ir.to_proto(model))
    functions.attach(copy, "scan")
    return zoo.run(ir.to_proto(copy), zoo.images_for(zoo.NETWORKS[name]))


@pytest.mark.parametrize(
    "name,position",
    [("v2", 8), ("cls head", 0), ("cls tail", 16), ("no cls, pool last", -1), ("no head", 8), ("v1", 8)],
)
def test_the_last_projection_and_norm_see_one_token(name: str, position: int) -> None:
    model = normed(name)
    want = run(model, name)
    assert prune_last_block(model.graph) == 1
    product, norm = node(model, "layers.1.mixer.out_proj/MatMul"), node(model, "norm_f/AddRMSNorm")
    for value in (*product.outputs, *norm.outputs, *norm.inputs[:2]):
        assert value is not None and value.shape == ir.Shape(["batch", 16]) and value.dtype == ir.DataType.FLOAT
    gathers = [n for n in model.graph if n.op_type == "Gather"]
    assert [g.outputs[0].name for g in gathers] == ["layers.1.mixer/Add.9:token", "layers.1/Add:token"]
    for gather in gathers:
        index = edit.array_of(gather.inputs[1])
        assert gather.attributes["axis"].as_int() == 1 and index is not None and index.tolist() == position
    np.testing.assert_allclose(run(model, name), want, rtol=0, atol=1e-5)


def test_a_bias_is_added_to_one_token() -> None:
    model = normed("layer scale, projection biases")
    want = run(model, "layer scale, projection biases")
    assert prune_last_block(model.graph) == 1
    added = node(model, "layers.1.mixer.out_proj/Add")
    assert added.outputs[0].shape == ir.Shape(["batch", 16])
    np.testing.assert_allclose(run(model, "layer scale, projection biases"), want, rtol=0, atol=1e-5)


def test_a_pairs_two_ends_and_residuals_are_summed_for_one_token() -> None:
    config = zoo.PAIRS.replace(depth=4)
    model = fused(ir.from_proto(zoo.exported(config, fallback="none")))
    want = run(model, "layer pairs, v2")
    assert prune_last_block(model.graph) == 1
    for name in ("layers.2.mixer.out_proj/MatMul", "layers.3.mixer.out_proj/MatMul"):
        assert node(model, name).outputs[0].shape == ir.Shape(["batch", 16])
    assert len([n for n in model.graph if n.op_type == "Gather"]) == 4  # y and r of both layers
    np.testing.assert_allclose(run(model, "layer pairs, v2"), want, rtol=0, atol=1e-5)


def test_features_keep_their_name_as_the_graphs_output() -> None:
    model = normed("v2", output="features")
    assert prune_last_block(model.graph) == 1
    (output,) = model.graph.outputs
    assert output.name == "features" and output.shape == ir.Shape(["batch", 16])
    assert output.producer() is node(model, "norm_f/AddRMSNorm")


# Case 3: what must stay.


@pytest.mark.parametrize(
    "name", ["no cls, pool mean", "no cls, pool max", "no cls, pool all", "cls double", "LayerNorm"]
)
def test_networks_that_read_more_tokens_stay(name: str) -> None:
    model = normed(name)
    before = len(model.graph)
    assert prune_last_block(model.graph) == 0 and len(model.graph) == before


def test_a_map_of_all_tokens_stays() -> None:
    model = normed("v2", output="tokens")
    assert prune_last_block(model.graph) == 0


@pytest.mark.parametrize("what", ["the norm", "the stream"])
def test_a_norm_that_is_read_elsewhere_stays(what: str) -> None:
    model = normed()
    norm = node(model, "norm_f/AddRMSNorm")
    model.graph.outputs.append(norm.outputs[0 if what == "the norm" else 1])
    assert prune_last_block(model.graph) == 0


def test_positions_that_are_computed_or_several_stay() -> None:
    for index in (None, np.array([8])):
        model = normed()
        gather = next(n for n in model.graph if n.op_type == "Gather")
        value = ir.Value(name="which") if index is None else edit.constant(model.graph, "which", index)
        gather.replace_input_with(1, value)
        assert prune_last_block(model.graph) == 0


def test_what_is_read_elsewhere_is_computed_whole_and_chosen_from() -> None:
    """Case 2: here out_proj's values leave the graph too."""
    model = normed()
    h = node(model, "layers.1.mixer.out_proj/MatMul").outputs[0]
    model.graph.outputs.append(h)
    want = run_first(model)
    assert prune_last_block(model.graph) == 1
    assert h.producer() is not None and h.shape == ir.Shape(["batch", 17, 16])
    assert node(model, "norm_f/AddRMSNorm").inputs[0].producer().inputs[0] is h  # type: ignore[union-attr]
    np.testing.assert_allclose(run_first(model), want, rtol=0, atol=1e-5)


def run_first(model: ir.Model) -> np.ndarray:
    copy = ir.from_proto(ir.to_proto(model))
    functions.attach(copy, "scan")
    return zoo.session(ir.to_proto(copy)).run(["logits"], {"images": zoo.images_for(zoo.BASE)})[0]
