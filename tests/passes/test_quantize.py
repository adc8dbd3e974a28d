"""passes/quantize.py and projections.py: which layers, in which form, and that the form computes what int8 means."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from zoo import BASE, NETWORKS, check, exported, images_for, session

from vimdeploy.passes.projections import DEFAULT_KINDS, KINDS, kind_of, projections
from vimdeploy.passes.quantize import is_quantized, quantize, quantized_products, quantized_weight, scale_of

FUSIONS = ("none", "bidirectional", "full")


@pytest.mark.parametrize("fusion", FUSIONS)
def test_layers_have_the_networks_names_however_the_graph_is_written(fusion: str) -> None:
    found = projections(ir.from_proto(exported(BASE, fusion=fusion)).graph)
    in_mixer = ("in_proj", "x_proj", "dt_proj", "x_proj_b", "dt_proj_b", "out_proj")
    mixers = [f"layers.{i}.mixer.{name}" for i in range(2) for name in in_mixer]
    assert sorted(layer.name for layer in found) == sorted(["patch_embed.proj", *mixers, "head"])
    assert {layer.kind for layer in found} == set(KINDS)
    assert [kind_of(layer.name) for layer in found] == [layer.kind for layer in found]
    assert {layer.kind for layer in projections(ir.from_proto(exported(BASE, fusion=fusion)).graph, DEFAULT_KINDS)} == {
        "in_proj",
        "out_proj",
    }


@pytest.mark.parametrize("bound", [1.0, 3.7, 1e-3, 6.5e4, 127.0, 0.1 * 127])
def test_scales_reach_the_bound_and_are_numbers_of_every_type(bound: float) -> None:
    scale = scale_of(bound)
    assert scale.dtype == np.float32 and scale.shape == ()
    assert bound <= float(scale) * 127 <= bound * (1 + 2**-7)
    assert float(scale.astype(ml_dtypes.bfloat16)) == float(scale)
    if 6.2e-5 < scale < 65504:
        assert float(scale.astype(np.float16)) == float(scale)


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_are_rounded_to_half_a_step_of_their_own_column(axis: int) -> None:
    weight = np.random.default_rng(0).standard_normal((48, 20)).astype(np.float32) * np.logspace(
        -3, 2, 20, dtype=np.float32
    )
    weight = weight if axis == 1 else weight.T.copy()
    weight[(slice(None), 3) if axis == 1 else (3, slice(None))] = 0  # a dead output
    levels, scales = quantized_weight(weight, axis)
    assert levels.dtype == np.int8 and levels.min() >= -127 and scales.shape == (20,)
    shape = (1, -1) if axis == 1 else (-1, 1)
    error = np.abs(levels.astype(np.float64) * scales.reshape(shape) - weight)
    assert (error <= scales.reshape(shape) * (0.5 + 1e-6)).all()
    # The largest of each column uses the whole range, and a column of zeros has a positive scale.
    assert (np.abs(levels).max(axis=1 - axis)[np.arange(20) != 3] >= 126).all() and scales[3] > 0


def fake_quantized(x: np.ndarray, scale: float) -> np.ndarray:
    """float64; ties to even, as ONNX says."""
    return np.clip(np.rint(x.astype(np.float64) / scale), -128, 127) * scale


@pytest.mark.parametrize("fusion", ["none", "full"])
@pytest.mark.parametrize(
    "name", ["v2", "layer scale, projection biases", "LayerNorm", "no cls, pool mean", "cls double"]
)
def test_a_quantized_layer_computes_what_int8_means(name: str, fusion: str) -> None:
    """Each layer's input and output, read out of the graph, against numpy in double precision."""
    config = NETWORKS[name]
    model = ir.from_proto(exported(config, fusion=fusion))
    layers = projections(model.graph)
    weights = {layer.name: (layer.weight.astype(np.float64), layer.node.op_type) for layer in layers}
    ranges = {layer.name: 0.5 + 0.25 * i for i, layer in enumerate(layers)}
    inputs = {layer.name: layer.input for layer in layers}
    quantize(model, ranges, layers)
    products = {
        str(node.inputs[0].name).removesuffix(".input/Dequantize"): node for node in quantized_products(model.graph)
    }
    assert set(products) == set(weights)
    for value in (*inputs.values(), *(node.outputs[0] for node in products.values())):
        if not value.is_graph_output() and not value.is_graph_input():
            model.graph.outputs.append(value)
    one = session(ir.to_proto(model))
    images = images_for(config)
    got = dict(zip([o.name for o in one.get_outputs()], one.run(None, {"images": images}), strict=True))
    got["images"] = images
    for layer, (weight, op) in weights.items():
        x = fake_quantized(got[str(inputs[layer].name)], float(scale_of(ranges[layer])))
        matrix = weight if op == "MatMul" else weight.reshape(len(weight), -1).T  # (K, N)
        scales = scale_of(np.abs(matrix).max(axis=0)).astype(np.float64)
        rounded = np.clip(np.rint(matrix / scales), -127, 127) * scales
        y = got[str(products[layer].outputs[0].name)]
        if op == "Conv":  # patches do not overlap in these networks
            size = weight.shape[-1]
            h, w = x.shape[2] // size, x.shape[3] // size
            rows = x.reshape(len(x), 3, h, size, w, size).transpose(0, 2, 4, 1, 3, 5).reshape(len(x), h * w, -1)
            bias = products[layer].inputs[2].const_value.numpy()
            y = y.transpose(0, 2, 3, 1).reshape(len(x), h * w, -1) - bias
            x = rows
        want = x @ rounded
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_the_form_is_the_one_every_runtime_reads() -> None:
    model = ir.from_proto(exported(BASE, fusion="full"))
    layers = projections(model.graph)
    quantize(model, {layer.name: 2.0 for layer in layers}, layers)
    check(ir.to_proto(model))
    assert is_quantized(model)
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("QuantizeLinear") == len(layers) and kinds.count("DequantizeLinear") == 2 * len(layers)
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            x, scale, zero = node.inputs
            assert scale.dtype == ir.DataType.FLOAT and zero.dtype == ir.DataType.INT8
            assert (scale.const_value.numpy() > 0).all() and not zero.const_value.numpy().any()
            assert zero.const_value.numpy().shape == scale.const_value.numpy().shape
            per_channel = scale.const_value.numpy().ndim
            assert per_channel == (x.const_value is not None)  # one scale a column of weights, one for activations
    # No fp32 copy of a quantized weight is left behind.
    stored = {name for name, value in model.graph.initializers.items() if value.dtype == ir.DataType.FLOAT}
    assert not {name for name in stored if "_proj.weight" in name and ":scale" not in name}
    assert "Gemm" not in kinds


def test_layers_without_a_range_stay_as_they_are() -> None:
    model = ir.from_proto(exported(BASE))
    layers = projections(model.graph)
    quantize(model, {"layers.1.mixer.in_proj": 1.0}, layers)
    assert [node.op_type for node in model.graph].count("QuantizeLinear") == 1
    assert len(projections(model.graph)) == len(layers) - 1
    plain = ir.from_proto(exported(BASE))
    assert not is_quantized(quantize(plain, {}, projections(plain.graph)))
