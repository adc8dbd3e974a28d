"""passes/precision.py: one test a rule, and what must stay as it is."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import zoo
from golden_vim import golden_forward
from onnx import TensorProto, helper, numpy_helper

from vimdeploy.errors import ExportError, ModelFileError
from vimdeploy.export import schema
from vimdeploy.passes.precision import to_precision

LOW = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
OPSET = {"fp16": 18, "bf16": 22}
NETWORKS = ("v2", "v1", "layer pairs, v2", "rope and residual", "LayerNorm", "layer scale, projection biases",
            "cls double", "no cls, pool mean", "no cls, pool max", "no head")  # fmt: skip


def typed(name: str, precision: str, **options: object) -> onnx.ModelProto:
    return zoo.exported(zoo.NETWORKS[name], precision=precision, opset=OPSET[precision], **options)


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    """Every value's element type, as onnx infers it from the nodes, not as the pass noted it down."""
    schema.register()
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True)
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.graph.value_info, *inferred.graph.output)}
    types |= {v.name: v.type.tensor_type.elem_type for v in inferred.graph.input}
    return types | {t.name: t.data_type for t in inferred.graph.initializer}


def typed_by_hand(*nodes: onnx.NodeProto, precision: str = "fp16", output: str = "y", **weights: object) -> ir.Model:
    """`nodes` from x (2, 4) fp32 to `output`, after the pass."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [2, 4])],
        [numpy_helper.from_array(np.asarray(w, np.float32), name) for name, w in weights.items()],
        value_info=[helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for n in nodes for o in n.output],
    )
    imports = [helper.make_opsetid("", 22), helper.make_opsetid("vim", 1)]
    return to_precision(ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=8)), precision)


def dtype_read(model: ir.Model, name: str, i: int = 0) -> ir.DataType:
    (node,) = (n for n in model.graph if n.name == name)
    value = node.inputs[i]
    assert value is not None and value.dtype is not None
    return value.dtype


def op(kind: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], name=output, **attributes)


# Keep.


def test_fp32_is_left_alone() -> None:
    model = zoo.loaded(zoo.BASE, fallback="none")
    before = ir.to_proto(model).SerializeToString()
    assert to_precision(model, "fp32") is model
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("name", NETWORKS)
def test_input_and_output_keep_their_names_and_fp32(name: str, precision: str) -> None:
    model = typed(name, precision)
    plain = zoo.exported(zoo.NETWORKS[name])
    assert list(model.graph.input) == list(plain.graph.input)
    assert list(model.graph.output) == list(plain.graph.output)
    assert [n.name for n in zoo.scans(model)] == [n.name for n in zoo.scans(plain)]
    for one, other in zip(zoo.scans(model), zoo.scans(plain)):
        assert zoo.attributes(one) == zoo.attributes(other)


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_checker_accepts(name: str, precision: str) -> None:
    zoo.check(typed(name, precision))


@pytest.mark.parametrize("precision", LOW)
def test_integers_are_left_alone(precision: str) -> None:
    plain, model = zoo.exported(zoo.BASE), typed("v2", precision)
    ints = {t.name for t in plain.graph.initializer if t.data_type == TensorProto.INT64}
    assert ints and ints <= {t.name for t in model.graph.initializer if t.data_type == TensorProto.INT64}


# Rule 1.


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("name", NETWORKS)
def test_rule_1_products_are_low(name: str, precision: str) -> None:
    model = typed(name, precision)
    types = types_of(model)
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    assert len(products) > 8
    for node in products:
        assert {types[value] for value in (*node.input, *node.output)} == {LOW[precision]}, node.name


def test_rule_1_even_where_everything_read_is_fp32() -> None:
    model = typed_by_hand(op("MatMul", "x w", "y"), w=np.eye(4))
    assert dtype_read(model, "y") == dtype_read(model, "y", 1) == ir.DataType.FLOAT16


# Rule 2.


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("name", NETWORKS)
def test_rule_2_the_scan_is_low_outside_and_its_constants_fp32(name: str, precision: str) -> None:
    model = typed(name, precision)
    types = types_of(model)
    for scan in zoo.scans(model):
        for formal, actual in zip(schema.SCAN.inputs, scan.input):
            wanted = TensorProto.FLOAT if formal in ("A", "D", "delta_bias") else LOW[precision]
            assert types[actual] == wanted, f"{scan.name}: {formal}"
        assert types[scan.output[0]] == LOW[precision]


@pytest.mark.parametrize("precision", LOW)
def test_rule_2_its_constants_are_the_same_to_the_bit(precision: str) -> None:
    plain, model = (zoo.initializers(m) for m in (zoo.exported(zoo.BASE), typed("v2", precision)))
    for part in ("A", "A_b", "D", "D_b", "dt_proj.bias", "dt_proj_b.bias"):
        np.testing.assert_array_equal(model[f"layers.1.mixer.{part}"], plain[f"layers.1.mixer.{part}"])


FUSED = ("v2", "v1", "layer pairs, v2", "rope and residual", "cls double", "no cls, pool mean", "layer scale")


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("fusion", ["bidirectional", "full"])
@pytest.mark.parametrize("name", FUSED)
def test_rule_2_fused_ops_take_and_give_what_the_schema_says(name: str, fusion: str, precision: str) -> None:
    model = typed(name, precision, fusion=fusion)
    zoo.check(model)
    types = types_of(model)
    found = [node for node in model.graph.node if node.domain == "vim"]
    assert len(found) >= 2
    for node in found:
        op = schema.OPS[node.op_type]
        for formal, actual in (*zip(op.inputs, node.input), *zip(op.outputs, node.output)):
            wanted = TensorProto.FLOAT if formal in op.fp32 else LOW[precision]
            assert types[actual] == wanted, f"{node.name}: {formal}"
    fp32 = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    for part in ("A", "A_b", "D", "D_b", *(("conv1d.taps",) if fusion == "full" and name != "v1" else ())):
        assert f"layers.1.mixer.{part}" in fp32 or name == "v1", part


def test_rule_2_an_op_of_another_version_is_refused() -> None:
    model = zoo.loaded(zoo.BASE, fallback="none")
    next(node for node in model.graph if node.domain == "vim").op_type = "TriSelectiveScan"
    with pytest.raises(ModelFileError, match="is a vim::TriSelectiveScan, which this vimdeploy does not know"):
        to_precision(model, "fp16")


# Rule 3.


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("fusion", ["bidirectional", "full"])
@pytest.mark.parametrize("name", FUSED)
def test_rule_3_in_a_fused_graph_the_stream_is_never_rounded(name: str, fusion: str, precision: str) -> None:
    """What any norm reads, fused or not, is fp32 and made as fp32; of a sum in it only h was low."""
    model = typed(name, precision, fusion=fusion)
    types = types_of(model)
    makers = {o: node for node in model.graph.node for o in node.output}
    streams = [node.input[1] for node in model.graph.node if node.op_type == "AddRMSNorm"]
    squares = [makers[node.input[0]] for node in model.graph.node if node.op_type == "ReduceMean"]
    streams += [node.input[0] for node in squares if node.op_type == "Mul" and node.input[0] == node.input[1]]
    assert len(streams) == zoo.NETWORKS[name].depth + 1
    for value in streams:
        maker = makers[value]
        assert types[value] == TensorProto.FLOAT, value
        assert maker.op_type != "Cast", f"{value} was rounded"
        made = [makers[v].op_type for v in maker.input if v in makers and maker.op_type == "Add"]
        assert made.count("Cast") <= 1 and "MatMul" not in made, maker.name


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("name", NETWORKS)
def test_rule_3_residual_stream_and_norms_are_fp32(name: str, precision: str) -> None:
    model = typed(name, precision)
    types = types_of(model)
    producers = {o: node for node in model.graph.node for o in node.output}
    norms = [n for n in model.graph.node if "norm" in n.name and n.op_type != "Cast"]
    assert len(norms) >= 3 * 6
    for node in norms:
        assert {types[v] for v in node.output} == {TensorProto.FLOAT}, node.name
        assert all(types[v] in (TensorProto.FLOAT, TensorProto.INT64) for v in node.input), node.name
        for value in node.input:  # the stream itself, an Add outside every mixer
            maker = producers.get(value)
            assert maker is None or maker.op_type != "Cast", f"{node.name} reads a rounded {value}"
    streams = [n for n in model.graph.node if n.op_type == "Add" and n.name.split("/")[0] in ("layers.1", "")]
    for node in streams:
        assert {types[v] for v in (*node.input, *node.output)} == {TensorProto.FLOAT}, node.name


def test_rule_3_a_sum_of_two_low_values_is_fp32_when_a_norm_reads_it() -> None:
    """Rule 4 alone would have made it low."""
    nodes = [
        op("MatMul", "x w", "a"),
        op("MatMul", "x w", "b"),
        op("Add", "a b", "stream"),
        op("Mul", "stream stream", "square"),
        op("ReduceMean", "square axes", "mean"),
        op("Add", "mean a", "y"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])],
        [numpy_helper.from_array(np.eye(4, dtype=np.float32), "w"), numpy_helper.from_array(np.array([-1]), "axes")],
        value_info=[helper.make_tensor_value_info(n.output[0], TensorProto.FLOAT, None) for n in nodes],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))
    to_precision(model, "fp16")
    for name in ("stream", "square", "mean", "y"):
        assert dtype_read(model, name) == ir.DataType.FLOAT, name


@pytest.mark.parametrize("fusion", ["none", "full"])
def test_rule_3_survives_a_stream_beyond_fp16s_squares(fusion: str) -> None:
    """|r| = 300: its square is past 65504, and a norm computed in fp16 would be Inf (vim-spec.md 7.3)."""
    model = typed("v2", "fp16", fusion=fusion)
    for tensor in model.graph.initializer:
        if tensor.name == "pos_embed":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 300, "pos_embed"))
    out = zoo.run(model, zoo.images_for(zoo.BASE))
    assert np.isfinite(out).all()
    weights = zoo.weights_of(zoo.BASE)
    weights["pos_embed"] = weights["pos_embed"] + 300
    want = golden_forward(zoo.BASE, weights, zoo.images_for(zoo.BASE).astype(np.float64))
    assert np.abs(out - want).max() < 0.02 * np.abs(want).max()


# Rule 4.


@pytest.mark.parametrize("precision", LOW)
def test_rule_4_a_fused_layer_is_cast_nowhere(precision: str) -> None:
    """h goes from out_proj into the norm, and n from there into in_proj, in the low type."""
    model = zoo.exported(zoo.BASE.replace(depth=3), precision=precision, opset=OPSET[precision], fusion="full")
    assert not [node.name for node in model.graph.node if node.op_type == "Cast" and "layers.1." in node.name]
    assert not [node.name for node in model.graph.node if node.op_type == "Cast" and "layers.2." in node.name]


@pytest.mark.parametrize("precision", LOW)
def test_rule_4_convolution_and_gates_are_low(precision: str) -> None:
    """Between in_proj and out_proj nothing is fp32 but what rule 2 says, and nothing is cast to and fro."""
    model = typed("v2", precision)
    types = types_of(model)
    inside = [n for n in model.graph.node if ".mixer" in n.name and n.domain != "vim"]
    into = [n for n in inside if n.op_type == "Cast"]
    assert {n.name for n in into} <= {f"layers.{i}.mixer.out_proj/MatMul:cast" for i in range(2)}, "casts for nothing"
    for node in inside:
        if node.op_type not in ("Cast",):
            floats = {types[v] for v in (*node.input, *node.output)} - {TensorProto.INT64}
            assert floats == {LOW[precision]}, node.name


def test_rule_4_needs_all_that_is_read_to_be_low() -> None:
    low = typed_by_hand(op("MatMul", "x w", "a"), op("Sigmoid", "a", "b"), op("Mul", "a b", "y"), w=np.eye(4))
    assert dtype_read(low, "b") == dtype_read(low, "y") == ir.DataType.FLOAT16
    mixed = typed_by_hand(op("MatMul", "x w", "a"), op("Mul", "a x", "y"), w=np.eye(4))
    assert dtype_read(mixed, "y", 0) == dtype_read(mixed, "y", 1) == ir.DataType.FLOAT


def test_rule_4_constants_follow_their_reader() -> None:
    """One weight, read by a low node and by an fp32 one: both get their own, and nothing is cast when it runs."""
    model = typed_by_hand(
        op("MatMul", "x w", "a"), op("Mul", "a s", "low"), op("Mul", "x s", "wide"), op("Add", "wide low", "y"),
        w=np.eye(4), s=[0.1] * 4,
    )  # fmt: skip
    assert dtype_read(model, "low", 1) == ir.DataType.FLOAT16
    assert dtype_read(model, "wide", 1) == ir.DataType.FLOAT
    assert {name: v.dtype for name, v in model.graph.initializers.items()} == {
        "w:float16": ir.DataType.FLOAT16, "s:float16": ir.DataType.FLOAT16, "s": ir.DataType.FLOAT
    }  # fmt: skip


def test_rule_4_one_cast_serves_every_reader() -> None:
    model = typed_by_hand(op("MatMul", "x w", "a"), op("MatMul", "x w", "b"), op("Mul", "a b", "y"), w=np.eye(4))
    assert [node.op_type for node in model.graph] == ["Cast", "MatMul", "MatMul", "Mul", "Cast"]


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("name", NETWORKS)
def test_rule_4_no_weight_is_cast_when_it_runs(name: str, precision: str) -> None:
    model = typed(name, precision)
    weights = {t.name for t in model.graph.initializer}
    casts = [n for n in model.graph.node if n.op_type == "Cast"]
    assert not [n.name for n in casts if n.input[0] in weights]
    readers = [(n.input[0], zoo.attributes(n)["to"]) for n in casts]
    assert len(set(readers)) == len(readers), "the same value is cast twice"
    assert weights <= {v for node in model.graph.node for v in node.input}, "both copies of a weight are kept"


@pytest.mark.parametrize("precision", LOW)
def test_weights_are_rounded_to_nearest(precision: str) -> None:
    plain, model = zoo.exported(zoo.BASE), typed("v2", precision)
    dtype = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}[precision]
    weight = zoo.initializers(plain)["layers.0.mixer.in_proj.weight.T"]
    suffix = {"fp16": "float16", "bf16": "bfloat16"}[precision]
    stored = zoo.initializers(model)[f"layers.0.mixer.in_proj.weight.T:{suffix}"]
    np.testing.assert_array_equal(stored.astype(np.float32), weight.astype(dtype).astype(np.float32))


@pytest.mark.parametrize("precision", LOW)
def test_the_file_is_half_as_large(precision: str) -> None:
    config = zoo.BASE.replace(d_model=64)
    sizes = {p: sum(len(t.raw_data) for t in zoo.exported(config, precision=p).graph.initializer)
             for p in ("fp32", precision)}  # fmt: skip
    assert sizes[precision] < 0.56 * sizes["fp32"]


@pytest.mark.parametrize("fusion", ["none", "full"])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("runtime", ["body", "library"])
def test_fp16_still_computes_the_network(name: str, runtime: str, fusion: str) -> None:
    config = zoo.NETWORKS[name]
    images = zoo.images_for(config)
    got = zoo.run(typed(name, "fp16", fusion=fusion), images, runtime)
    golden = golden_forward(config, zoo.weights_of(config), images.astype(np.float64))
    error = np.sqrt(np.mean((got - golden) ** 2) / np.mean(golden**2))
    assert got.dtype == np.float32
    assert 1e-5 < error < 5e-3, "below, nothing was rounded; above, something is wrong"


# Refusals.


def test_a_weight_that_fp16_cannot_hold_is_refused_by_name() -> None:
    with pytest.raises(ExportError, match=r"w holds 1e\+05, more than fp16 can \(65504\)") as caught:
        typed_by_hand(op("MatMul", "x w", "y"), w=np.full((4, 4), -1e5))
    assert caught.value.hint == "export with --precision bf16 or fp32"
    typed_by_hand(op("MatMul", "x w", "y"), w=np.full((4, 4), -65504.0))
    typed_by_hand(op("MatMul", "x w", "y"), w=np.full((4, 4), -1e5), precision="bf16")


def test_a_weight_that_stays_fp32_may_be_large() -> None:
    model = typed_by_hand(op("Mul", "x s", "y"), s=[1e5] * 4)
    assert model.graph.initializers["s"].dtype == ir.DataType.FLOAT


@pytest.mark.parametrize("opset", [16, 18, 21])
def test_bf16_below_its_opset_is_refused(opset: int) -> None:
    with pytest.raises(ExportError, match=f"this graph is opset {opset}") as caught:
        zoo.exported(zoo.BASE, precision="bf16", opset=opset)
    assert caught.value.hint == "export with --opset 22, or with --precision fp16"


def test_bf16_takes_its_opset_by_itself() -> None:
    assert {o.domain: o.version for o in zoo.exported(zoo.BASE, precision="bf16").opset_import}[""] == 22
