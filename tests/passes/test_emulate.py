"""passes/emulate.py: a bf16 graph computed by a runtime that has no bf16, rounding for rounding."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import zoo
from golden_vim import golden_forward
from onnx import TensorProto, helper, numpy_helper

from vimdeploy.passes.emulate import emulate_bf16

BF16 = ml_dtypes.bfloat16


def rounded(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float32).astype(BF16).astype(np.float32)


def emulated(name: str, **options: object) -> onnx.ModelProto:
    return ir.to_proto(emulate_bf16(zoo.loaded(zoo.NETWORKS[name], precision="bf16", **options)))


@pytest.mark.parametrize("seed", range(3))
def test_each_result_is_rounded_as_numpy_rounds_it(seed: int) -> None:
    """x -> bf16 -> MatMul -> Sigmoid -> Mul -> fp32, step by step in numpy."""
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal((5, 8), np.float32), rng.standard_normal((8, 8), np.float32)
    nodes = [
        helper.make_node("Cast", ["x"], ["low"], to=TensorProto.BFLOAT16),
        helper.make_node("MatMul", ["low", "w"], ["a"]),
        helper.make_node("Sigmoid", ["a"], ["g"]),
        helper.make_node("Mul", ["a", "g"], ["p"]),
        helper.make_node("Cast", ["p"], ["y"], to=TensorProto.FLOAT),
    ]
    low = [helper.make_tensor_value_info(v, TensorProto.BFLOAT16, [5, 8]) for v in ("low", "a", "g", "p")]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 8])],
        [numpy_helper.from_array(weight.astype(BF16), "w")],
        value_info=low,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=8)
    emulation = ir.to_proto(emulate_bf16(ir.from_proto(model)))
    onnx.checker.check_model(emulation, full_check=True)
    (got,) = zoo.session(emulation).run(None, {"x": x})

    a = rounded(rounded(x) @ rounded(weight))
    g = rounded(1 / (1 + np.exp(-a.astype(np.float64))))
    want = rounded(a * g)
    # One unit in the last place where a sum or a sigmoid fell on the other side of a tie.
    assert (np.abs(got - want) <= np.abs(want) * 2.0**-7).all()
    assert (got == want).mean() > 0.95
    np.testing.assert_array_equal(got, rounded(got))
    plain = (x @ weight) / (1 + np.exp(-(x @ weight)))
    assert np.abs(want - plain).max() > 1e-3, "rounding must show"


@pytest.mark.parametrize("fusion", ["none", "full"])
@pytest.mark.parametrize("name", ["v2", "v1", "layer pairs, v2", "rope and residual", "no cls, pool max"])
def test_nothing_bf16_is_computed_with(name: str, fusion: str) -> None:
    model = emulated(name, fusion=fusion)
    zoo.check(model)
    assert not [t.name for t in model.graph.initializer if t.data_type == TensorProto.BFLOAT16]
    bf16 = {v.name for v in model.graph.value_info if v.type.tensor_type.elem_type == TensorProto.BFLOAT16}
    makers = [n for n in model.graph.node if bf16 & set(n.output)]
    readers = [n for n in model.graph.node if bf16 & set(n.input)]
    assert len(makers) > (50 if fusion == "none" else 20) and {n.op_type for n in (*makers, *readers)} == {"Cast"}


def test_every_low_value_of_the_original_is_rounded() -> None:
    original = zoo.exported(zoo.BASE, precision="bf16")
    low = {v.name for v in original.graph.value_info if v.type.tensor_type.elem_type == TensorProto.BFLOAT16}
    low &= {o for node in original.graph.node for o in node.output}
    rounds = {n.input[0] for n in emulated("v2").graph.node
              if n.op_type == "Cast" and zoo.attributes(n)["to"] == TensorProto.BFLOAT16}  # fmt: skip
    assert rounds == low and len(low) > 50
    # and whoever read the value reads the rounded one
    for node in emulated("v2").graph.node:
        if node.op_type != "Cast":
            assert not low & set(node.input), node.name


def test_weights_hold_their_bf16_values() -> None:
    original, emulation = zoo.initializers(zoo.exported(zoo.BASE, precision="bf16")), zoo.initializers(emulated("v2"))
    name = "layers.0.mixer.in_proj.weight.T:bfloat16"
    assert emulation[name].dtype == np.float32
    np.testing.assert_array_equal(emulation[name], original[name].astype(np.float32))
    np.testing.assert_array_equal(emulation[name], rounded(emulation[name]))


@pytest.mark.parametrize("fusion", ["none", "full"])
@pytest.mark.parametrize("runtime", ["body", "library"])
@pytest.mark.parametrize("name", ["v2", "layer pairs, v2", "rope and residual"])
def test_it_computes_the_network_with_the_error_of_bf16(name: str, runtime: str, fusion: str) -> None:
    config = zoo.NETWORKS[name]
    images = zoo.images_for(config)
    got = zoo.run(emulated(name, fusion=fusion), images, runtime)
    golden = golden_forward(config, zoo.weights_of(config), images.astype(np.float64))
    error = np.sqrt(np.mean((got - golden) ** 2) / np.mean(golden**2))
    assert 5e-4 < error < 4e-2, "below, nothing was rounded; above, something is wrong"


@pytest.mark.parametrize("fallback,operator", [("scan", "Scan"), ("linear-attention", "LinearAttention")])
def test_the_body_is_of_the_same_kind_in_fp32(fallback: str, operator: str) -> None:
    (function,) = emulated("v2", fallback=fallback).functions
    operators = [node.op_type for node in function.node]
    assert operator in operators and "Cast" in operators
    assert TensorProto.BFLOAT16 not in [zoo.attributes(n).get("to") for n in function.node if n.op_type == "Cast"]


@pytest.mark.parametrize("fallback,operator", [("scan", "Scan"), ("linear-attention", "LinearAttention")])
def test_the_fused_ops_bodies_are_of_the_same_kind_in_fp32(fallback: str, operator: str) -> None:
    functions = emulated("v2", fallback=fallback, fusion="full").functions
    assert {f.name for f in functions} == {"SelectiveScan", "BiSelectiveScan", "BiCausalConv1d", "AddRMSNorm"}
    operators = [node.op_type for function in functions for node in function.node]
    assert operator in operators
    casts = [n for f in functions for n in f.node if n.op_type == "Cast"]
    assert TensorProto.BFLOAT16 not in [zoo.attributes(n).get("to") for n in casts]


def test_the_stream_is_not_rounded() -> None:
    model = emulated("v2", fusion="full")
    rounded_values = {n.input[0] for n in model.graph.node if n.op_type == "Cast"
                      and zoo.attributes(n)["to"] == TensorProto.BFLOAT16}  # fmt: skip
    norms = [node for node in model.graph.node if node.op_type == "AddRMSNorm"]
    assert len(norms) == 2
    for node in norms:
        assert node.output[0] in rounded_values and node.output[1] not in rounded_values


def test_no_body_stays_no_body() -> None:
    assert not emulated("v2", fallback="none").functions
