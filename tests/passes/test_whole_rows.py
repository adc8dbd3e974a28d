"""passes/whole_rows.py: dt's product reads x_proj's whole rows, and computes the same."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import zoo

from vimdeploy.export import functions
from vimdeploy.passes import edit
from vimdeploy.passes.precision import to_precision
from vimdeploy.passes.whole_rows import read_whole_rows


def fused(name: str = "v2") -> ir.Model:
    return zoo.loaded(zoo.NETWORKS[name], fusion="full", fallback="none")


def run(model: ir.Model, name: str = "v2") -> np.ndarray:
    functions.attach(model, "scan")
    return zoo.run(ir.to_proto(model), zoo.images_for(zoo.NETWORKS[name]))


@pytest.mark.parametrize("name", ["v2", "v1", "another state, conv, rank, expansion", "layer pairs, v2"])
def test_no_slice_is_left_in_a_mixer_and_nothing_changes(name: str) -> None:
    want = run(fused(name), name)
    model = read_whole_rows(fused(name))
    mixers = [node for node in model.graph if ".mixer" in str(node.name)]
    if zoo.NETWORKS[name].bimamba == "v2":
        assert not {"Slice", "Split"} & {node.op_type for node in mixers}
    np.testing.assert_allclose(run(model, name), want, rtol=0, atol=2e-6 * max(1.0, float(np.abs(want).max())))


def test_a_layer_is_nine_nodes() -> None:
    config = zoo.BASE.replace(depth=3)
    model = read_whole_rows(ir.from_proto(zoo.exported(config, fusion="full", fallback="none")))
    of_layer_1 = [node.op_type for node in model.graph if "layers.1." in str(node.name)]
    products = ["MatMul"] * 4
    assert of_layer_1 == ["AddRMSNorm", "MatMul", "BiCausalConv1d", *products, "BiSelectiveScan", "MatMul"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_weight_has_zeros_below(precision: str) -> None:
    """Before or after typing."""
    model = read_whole_rows(to_precision(fused(), precision))
    rank, states = zoo.BASE.rank, zoo.BASE.d_state
    (product,) = (node for node in model.graph if node.name == "layers.0.mixer/MatMul.2")
    weight = edit.array_of(product.inputs[1])
    assert weight is not None and weight.shape == (rank + 2 * states, zoo.BASE.d_inner)
    assert weight.dtype == {"fp32": np.float32, "fp16": np.float16}[precision]
    want = zoo.weights_of(zoo.BASE)["layers.0.mixer.dt_proj_b.weight"].T.astype(np.float32)
    np.testing.assert_array_equal(weight[:rank], want.astype(weight.dtype))
    assert not weight[rank:].any()
    assert product.inputs[0] is not None and product.inputs[0].name == "layers.0.mixer.x_proj_b/MatMul"


def test_other_slices_stay() -> None:
    """One that starts later, and one that something else reads too."""
    model = fused()
    cuts = [node for node in model.graph if node.op_type == "Slice" and ".mixer" in str(node.name)]
    assert len(cuts) == 4
    cuts[0].replace_input_with(1, edit.constant(model.graph, "four", np.array([4])))
    model.graph.outputs.append(cuts[1].outputs[0])
    read_whole_rows(model)
    left = [node for node in model.graph if node.op_type == "Slice" and ".mixer" in str(node.name)]
    assert left == cuts[:2]
