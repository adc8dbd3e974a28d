"""passes/fuse.py on every kind of network: the same numbers, value by value, in far fewer nodes."""

from __future__ import annotations

import functools
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import zoo
from golden_vim import golden_forward

from vimdeploy.export import functions
from vimdeploy.passes.fuse import FUSIONS, fuse
from vimdeploy.passes.precision import to_precision

MODES = ("bidirectional", "full")
#: network -> the vim:: ops of its `full` graph; every other network has those of v2.
OTHERS = {
    "v1": {"BiSelectiveScan": 2, "AddRMSNorm": 2},  # one convolution for both directions
    "forward only": {"SelectiveScan": 2, "AddRMSNorm": 2},
    # The first pair has no residual, so its norms stay; the last norm is the one of a sum.
    "layer pairs, forward only": {"SelectiveScan": 2, "AddRMSNorm": 1},
    "layer pairs, v1": {"BiSelectiveScan": 2, "AddRMSNorm": 1},
    "layer pairs, v2": {"BiSelectiveScan": 2, "BiCausalConv1d": 2, "AddRMSNorm": 1},
    "rope, layer pairs": {"BiSelectiveScan": 2, "BiCausalConv1d": 2, "AddRMSNorm": 1},
    "LayerNorm": {"BiSelectiveScan": 2, "BiCausalConv1d": 2},
}
V2 = {"BiSelectiveScan": 2, "BiCausalConv1d": 2, "AddRMSNorm": 2}


@functools.cache
def unfused(name: str) -> np.ndarray:
    return zoo.run(zoo.exported(zoo.NETWORKS[name]), zoo.images_for(zoo.NETWORKS[name]))


def fused(name: str, fusion: str, **options: object) -> onnx.ModelProto:
    return zoo.exported(zoo.NETWORKS[name], fusion=fusion, **options)


def ours(model: onnx.ModelProto) -> dict[str, int]:
    return dict(Counter(node.op_type for node in model.graph.node if node.domain == "vim"))


@pytest.mark.parametrize("fusion", MODES)
@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_outputs_are_those_of_the_unfused_graph(name: str, fusion: str) -> None:
    got, want = zoo.run(fused(name, fusion), zoo.images_for(zoo.NETWORKS[name])), unfused(name)
    assert got.shape == want.shape and want.std() > 0.01
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * max(1.0, float(np.abs(want).max())))


@pytest.mark.parametrize("name", ["v2", "v1", "layer pairs, v2", "rope and residual", "LayerNorm", "no cls, pool mean"])
def test_the_library_computes_the_scans_inside(name: str) -> None:
    """Whatever ops the library has: what it lacks runs as its body, and the scans in that in the library's kernel."""
    got, want = zoo.run(fused(name, "full"), zoo.images_for(zoo.NETWORKS[name]), "library"), unfused(name)
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-6 * max(1.0, float(np.abs(want).max())))
    assert not np.array_equal(got, want), "the body's bits: the library was not used"


@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_which_ops_a_network_gets(name: str) -> None:
    full = OTHERS.get(name, V2)
    assert ours(fused(name, "full")) == full
    scans = {op: count for op, count in full.items() if "Scan" in op}
    assert ours(fused(name, "bidirectional")) == scans


@pytest.mark.parametrize("fusion", MODES)
@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_the_checker_accepts(name: str, fusion: str) -> None:
    model = fused(name, fusion)
    zoo.check(model)
    names = [node.name for node in model.graph.node]
    assert all(names) and len(set(names)) == len(names)
    read = {value for node in model.graph.node for value in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= read, "weights that nothing reads"
    assert list(model.graph.output) == list(zoo.exported(zoo.NETWORKS[name]).graph.output)
    outputs = {value.name for value in model.graph.output}
    assert not [node.name for node in model.graph.node if not (read | outputs) & set(node.output)], "nodes for nothing"


def test_a_layer_is_eleven_nodes() -> None:
    """Of 54: all that is left between two layers' norms, with the two Slices that passes/whole_rows.py takes out."""
    config = zoo.BASE.replace(depth=3)
    of_layer_1 = [node.op_type for node in zoo.exported(config, fusion="full").graph.node if "layers.1." in node.name]
    direction = ["MatMul", "Slice", "MatMul"]
    mixer = ["MatMul", "BiCausalConv1d", *direction, *direction, "BiSelectiveScan", "MatMul"]
    assert of_layer_1 == ["AddRMSNorm", *mixer]
    before = [node for node in zoo.exported(config).graph.node if node.name.startswith(("layers.1.", "layers.1/"))]
    assert len(before) == 54


@pytest.mark.parametrize("name", ["v2", "v1", "layer pairs, v2", "rope and residual", "layer scale, projection biases"])
def test_values_of_one_name_are_the_same_values(name: str) -> None:
    """The unfused graph is the oracle layer by layer, not at its end only."""
    config = zoo.NETWORKS[name]
    everything = []
    for fusion in ("none", "full"):
        model = zoo.loaded(config, fusion=fusion)
        outputs = [v for node in model.graph for v in node.outputs if v.dtype == ir.DataType.FLOAT]
        for value in outputs:
            if not value.is_graph_output():
                model.graph.outputs.append(value)
        session = zoo.session(ir.to_proto(model))
        results = session.run(None, {"images": zoo.images_for(config)})
        everything.append(dict(zip([o.name for o in session.get_outputs()], results, strict=True)))
    plain, full = everything
    # What is not there before: the Slices for Splits, and the last block's values of one token.
    assert {value.rpartition(":")[2] for value in full.keys() - plain.keys()} <= {"token"}
    common = full.keys() & plain.keys()
    assert len(common) > 25
    for value in common:
        scale = max(1.0, float(np.abs(plain[value]).max()))
        np.testing.assert_allclose(full[value], plain[value], rtol=0, atol=2e-6 * scale, err_msg=value)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("fusion", MODES)
def test_typed_after_fusing_it_is_no_worse_than_typed_unfused(fusion: str, precision: str) -> None:
    """The fused ops round less: y_f + y_b, and what is inside the convolution and the norm, stay fp32."""
    images = zoo.images_for(zoo.BASE)
    golden = golden_forward(zoo.BASE, zoo.weights_of(zoo.BASE), images.astype(np.float64))

    def error(mode: str) -> float:
        model = zoo.loaded(zoo.BASE, fusion=mode, precision=precision)
        if precision == "bf16":
            from vimdeploy.passes.emulate import emulate_bf16

            emulate_bf16(model)
        got = zoo.run(ir.to_proto(model), images)
        return float(np.sqrt(np.mean((got - golden) ** 2) / np.mean(golden**2)))

    low, high = {"fp16": (1e-5, 5e-3), "bf16": (1e-4, 4e-2)}[precision]
    assert low < error(fusion) < min(high, 1.25 * error("none"))


def test_fusing_further_gives_what_fusing_at_once_gives() -> None:
    plain, half, full = (zoo.loaded(zoo.BASE, fusion=fusion, fallback="none") for fusion in FUSIONS)

    def described(model: ir.Model) -> list[object]:
        return [(node.op_type, node.name, [v and v.name for v in node.inputs]) for node in model.graph]

    for model in (plain, half, ir.from_proto(ir.to_proto(full))):
        assert described(fuse(model, "full")) == described(full)


def test_none_leaves_the_graph_alone_and_other_words_are_refused() -> None:
    model = zoo.loaded(zoo.BASE)
    before = ir.to_proto(model).SerializeToString()
    assert fuse(model, "none") is model
    assert ir.to_proto(model).SerializeToString() == before
    with pytest.raises(ValueError, match="'some' is not one of none, bidirectional, full"):
        fuse(model, "some")


@pytest.mark.parametrize("kind", ["scan", "linear-attention"])
@pytest.mark.parametrize("opset", [16, 17, 18, 22])
def test_every_opset_and_fallback(kind: str, opset: int) -> None:
    model = fused("v2", "full", opset=opset, fallback=kind)
    assert {function.name for function in model.functions} == {"SelectiveScan", *V2}
    assert ours(model) == V2
    np.testing.assert_allclose(zoo.run(model, zoo.images_for(zoo.BASE)), unfused("v2"), rtol=0, atol=2e-5)


def test_a_static_batch_stays_fixed() -> None:
    model = fused("v2", "full", static_batch=2)
    assert "Shape" not in {node.op_type for node in model.graph.node}
    np.testing.assert_allclose(zoo.run(model, zoo.images_for(zoo.BASE)), unfused("v2"), rtol=0, atol=1e-5)


def test_a_part_of_a_split_that_is_read_alone_becomes_a_slice() -> None:
    model = zoo.loaded(zoo.BASE, fusion="bidirectional", fallback="none")
    slices = {node.name: node for node in model.graph if node.op_type == "Slice" and ":" in node.name}
    # x of in_proj; dt of both x_proj: B, C and z are read in place.
    assert {name.rpartition("/")[0] for name in slices} == {"layers.0.mixer", "layers.1.mixer"} and len(slices) == 6
    assert not [node for node in model.graph if node.op_type == "Split"]
    x = slices["layers.0.mixer/Split:0"]
    bounds = [value.const_value.numpy().tolist() for value in x.inputs[1:] if value is not None and value.const_value]
    assert bounds == [[0], [zoo.BASE.d_inner], [2]]


def test_two_exports_are_the_same_bytes() -> None:
    def once() -> bytes:
        model = zoo.loaded(zoo.NETWORKS["rope, layer pairs"])
        model.functions.clear()
        functions.attach(fuse(model, "full"), "scan")
        return ir.to_proto(model).SerializeToString()

    assert once() == once()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_layer_that_does_not_match_stands_beside_fused_ones(precision: str) -> None:
    """Its plain scans and the fused ones' bodies share one function of SelectiveScan."""
    model = zoo.loaded(zoo.BASE, fallback="none")
    scan = next(node for node in model.graph if node.name == "layers.0.mixer/scan_forward")
    copy = ir.node("Identity", [scan.outputs[0]], name="in the way")
    copy.outputs[0].name, copy.outputs[0].type, copy.outputs[0].shape = (
        "same",
        scan.outputs[0].type,
        scan.outputs[0].shape,
    )
    scan.outputs[0].replace_all_uses_with(copy.outputs[0])
    copy.replace_input_with(0, scan.outputs[0])
    model.graph.insert_after(scan, copy)
    fuse(model, "full")
    to_precision(model, precision)
    functions.attach(model, "scan")
    proto = ir.to_proto(model)
    zoo.check(proto)
    assert ours(proto) == {"SelectiveScan": 2, "BiSelectiveScan": 1, "BiCausalConv1d": 2, "AddRMSNorm": 2}
    for runtime in ("body", "library"):
        got, want = zoo.run(proto, zoo.images_for(zoo.BASE), runtime), unfused("v2")
        atol = 5e-6 if precision == "fp32" else 5e-3
        np.testing.assert_allclose(got, want, rtol=0, atol=atol * float(np.abs(want).max()))
