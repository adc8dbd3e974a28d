"""passes/float_weights.py, and what the other passes towards TensorRT do to a quantized graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from zoo import BASE, check, exported, images_for, session

from vimdeploy.errors import ExportError
from vimdeploy.export import functions
from vimdeploy.passes.float_weights import float_weights
from vimdeploy.passes.no_slices import without_slices
from vimdeploy.passes.opset import lower_opset, raise_opset
from vimdeploy.passes.precision import LOW_SCALES_OPSET, low_values, to_precision
from vimdeploy.passes.product_convs import products_as_convolutions
from vimdeploy.passes.projections import projections
from vimdeploy.passes.quantize import quantize, quantized_products

LOW = ir.DataType.FLOAT16


def quantized(fusion: str = "none", bound: float = 3.0, **options: object) -> ir.Model:
    """Every layer in int8, without function bodies."""
    model = ir.from_proto(exported(BASE, fusion=fusion, **options))
    model.functions.clear()
    layers = projections(model.graph)
    return quantize(model, {layer.name: bound for layer in layers}, layers)


def run(model: ir.Model) -> np.ndarray:
    functions.attach(model, "scan")
    (output,) = session(ir.to_proto(model)).run(None, {"images": images_for(BASE)})
    return output


@pytest.mark.parametrize("fusion", ["none", "full"])
def test_weights_in_floats_are_the_same_weights(fusion: str) -> None:
    want = run(quantized(fusion))
    model = float_weights(quantized(fusion))
    assert not [
        v for v in model.graph.initializers.values() if v.dtype == ir.DataType.INT8 and v.const_value.numpy().any()
    ]
    for product in quantized_products(model.graph):
        pair = product.inputs[1].producer()
        first = pair.inputs[0].producer()
        assert (first.op_type, pair.op_type) == ("QuantizeLinear", "DequantizeLinear")
        axis = 0 if product.op_type == "Conv" else 1
        assert pair.attributes["axis"].as_int() == first.attributes["axis"].as_int() == axis
        assert first.inputs[0].dtype == ir.DataType.FLOAT
    check(ir.to_proto(model))
    # The same int8 levels; ONNX Runtime adds them in another order.
    np.testing.assert_allclose(run(model), want, rtol=1e-4, atol=1e-5)


def test_the_columns_of_a_split_keep_their_scales() -> None:
    """TensorRT 8.5's graph has no Split: in_proj and x_proj become a product for each part."""
    want, model = run(quantized()), without_slices(quantized())
    assert "Split" not in [node.op_type for node in model.graph]
    assert len(quantized_products(model.graph)) > len(quantized_products(quantized().graph))
    np.testing.assert_allclose(run(model), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fusion", ["none", "full"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_pairs_and_products_are_typed_low_without_a_cast_between(fusion: str, precision: str) -> None:
    model = quantized(fusion)
    raise_opset(model, 22 if precision == "bf16" else LOW_SCALES_OPSET)
    to_precision(model, precision)
    low = {"fp16": LOW, "bf16": ir.DataType.BFLOAT16}[precision]
    products = quantized_products(model.graph)
    assert len(products) == 14
    for product in products:
        assert product.outputs[0].dtype == low
        for value in product.inputs[:2]:
            pair = value.producer()
            assert pair.op_type == "DequantizeLinear" and value.dtype == low and pair.inputs[1].dtype == low
            first = pair.inputs[0].producer()
            assert first is None or (first.op_type == "QuantizeLinear" and first.inputs[0].dtype == low)
    functions.attach(model, "scan")
    check(ir.to_proto(model))


def test_typed_scales_are_the_very_same_numbers() -> None:
    before = {n: v.const_value.numpy() for n, v in quantized().graph.initializers.items() if n.endswith(":scale")}
    model = to_precision(raise_opset(quantized(), LOW_SCALES_OPSET), "fp16")
    for name, scale in before.items():
        typed = model.graph.initializers[f"{name}:float16"].const_value.numpy()
        np.testing.assert_array_equal(typed.astype(np.float32), scale)


def test_before_opset_19_pairs_and_products_stay_fp32() -> None:
    model = to_precision(quantized("full"), "fp16")  # 18
    for product in quantized_products(model.graph):
        assert product.outputs[0].dtype == ir.DataType.FLOAT
        assert all(v.producer().op_type == "DequantizeLinear" for v in product.inputs[:2])
    functions.attach(model, "scan")
    check(ir.to_proto(model))


def test_a_scale_that_fp16_cannot_hold_keeps_its_layer_in_fp32() -> None:
    model = quantized()
    name = "layers.0.mixer.in_proj"
    tiny = model.graph.initializers[f"{name}.weight:scale"]
    tiny.const_value = ir.tensor(np.full(tiny.shape[0], 1e-9, np.float32), name=tiny.name)
    to_precision(raise_opset(model, LOW_SCALES_OPSET), "fp16")
    wide = [n for n in quantized_products(model.graph) if n.outputs[0].dtype == ir.DataType.FLOAT]
    assert [str(node.name) for node in wide] == ["layers.0.mixer.in_proj/MatMul"]


def test_low_values_of_a_quantized_graph_are_those_of_the_plain_one() -> None:
    """What a pass that asks before typing (fuse_norm.py) is told."""
    plain = {str(value.name) for value in low_values(ir.from_proto(exported(BASE)).graph)}
    model = ir.from_proto(exported(BASE))
    layers = projections(model.graph, ("in_proj", "out_proj"))
    names = {
        str(value.name) for value in low_values(quantize(model, {layer.name: 1.0 for layer in layers}, layers).graph)
    }
    assert plain <= names


def test_opsets_13_to_18_have_the_same_pairs() -> None:
    pairs = [(n.op_type, n.name, dict(n.attributes)) for n in quantized().graph if "quantize" in str(n.name).lower()]
    lowered = lower_opset(quantized(), 14)
    assert [
        (n.op_type, n.name, dict(n.attributes)) for n in lowered.graph if "quantize" in str(n.name).lower()
    ] == pairs
    np.testing.assert_allclose(run(lower_opset(quantized(), 16)), run(quantized()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attribute", ["block_size", "output_dtype"])
def test_what_only_newer_pairs_can_say_is_not_lowered(attribute: str) -> None:
    model = quantized(opset=21)
    node = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    node.attributes[attribute] = ir.AttrInt64(attribute, 3)
    with pytest.raises(ExportError, match="QuantizeLinear"):
        lower_opset(model, 14)


# product_convs.py: the same integers, as 1 x 1 convolutions


@pytest.mark.parametrize("fusion", ["none", "full"])
def test_every_quantized_product_is_a_convolution_of_one_pixel(fusion: str) -> None:
    want, model = run(quantized(fusion)), quantized(fusion)
    names = [str(node.name) for node in quantized_products(model.graph)]
    outputs = {str(node.name): (node.outputs[0].name, node.outputs[0].shape) for node in model.graph}
    products_as_convolutions(model)
    products = quantized_products(model.graph)
    assert [str(node.name) for node in products] == names  # those the engine's inspector is asked for
    assert {node.op_type for node in products} == {"Conv"}
    made = {value.name: value.shape for node in model.graph for value in node.outputs}
    assert all(made[name] == shape for name, shape in (outputs[each] for each in names))
    for product in products:
        pair = product.inputs[1].producer()
        levels, scales = (pair.inputs[i].const_value.numpy() for i in (0, 1))
        assert levels.dtype == np.int8 and pair.attributes["axis"].as_int() == 0
        assert scales.ndim == 0 or len(scales) == levels.shape[0]
    check(ir.to_proto(model))
    np.testing.assert_allclose(run(model), want, rtol=1e-5, atol=1e-6)


def test_their_weights_can_be_floats() -> None:
    want, model = run(quantized("full")), float_weights(products_as_convolutions(quantized("full")))
    for product in quantized_products(model.graph):
        pair = product.inputs[1].producer()
        assert pair.op_type == "DequantizeLinear" and pair.inputs[0].producer().op_type == "QuantizeLinear"
    np.testing.assert_allclose(run(model), want, rtol=1e-4, atol=1e-5)


def test_products_in_floats_stay() -> None:
    model = quantized("full")
    floats = [
        node.name for node in model.graph if node.op_type == "MatMul" and node not in quantized_products(model.graph)
    ]
    products_as_convolutions(model)
    assert [node.name for node in model.graph if node.op_type == "MatMul"] == floats


def test_a_product_of_unknown_sides_stays() -> None:
    model = quantized("full")
    product = next(node for node in quantized_products(model.graph) if node.op_type == "MatMul")
    product.outputs[0].shape = None
    products_as_convolutions(model)
    assert product in quantized_products(model.graph) and product.op_type == "MatMul"
