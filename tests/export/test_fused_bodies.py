"""The fused ops' function bodies alone, in real ONNX Runtime, against their definitions in float64.

Runs in the ONNX Runtime that is installed; the last test runs this file again in an old one (VIMDEPLOY_ORT_OLD).
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from golden import add_rms_norm_f64, bi_causal_conv1d_f64, bi_selective_scan_f64, selective_scan_magnitude
from onnx import TensorProto, helper
from op_cases import make_bi_conv_inputs, make_bi_scan_inputs, make_norm_inputs
from ort_library import ort_library
from scan_cases import INSIDE, OUTPUT_ROUNDING, SMALLEST

from vimdeploy.export import functions, schema
from vimdeploy.export.fused_bodies import AddNormSignature, BiConvSignature, BiScanSignature
from vimdeploy.export.schema import Op

ROOT = Path(__file__).resolve().parents[2]
OLD = "VIMDEPLOY_ORT_OLD"
ELEMENT = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
KINDS = ("scan", "linear-attention")
#: bf16 travels as fp32 and is cast inside the model: numpy has no such type.
LOW = ("fp16", "bf16")
#: ONNX Runtime's Sigmoid is off by so much, whatever it returns (test_functions.py).
SIGMOID = 2e-7


def old_runtime() -> bool:
    return tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) < (1, 30)


def model_of_one_node(
    op: Op, inputs: dict[str, np.ndarray], dtype: str = "fp32", opset: int = 18, kind: str = "scan", **attributes: float
) -> ir.Model:
    """inputs (fp32 outside, batch and length open) -> Cast to the io type -> the node -> Cast -> its outputs."""
    nodes, names, values = [], [], []
    io = ELEMENT[dtype]
    for name in op.inputs:
        low = name in inputs and name not in op.fp32
        if low and dtype != "fp32":
            nodes.append(helper.make_node("Cast", [name], [f"{name}_low"], to=io))
            values.append(helper.make_tensor_value_info(f"{name}_low", io, None))
        names.append((f"{name}_low" if low and dtype != "fp32" else name) if name in inputs else "")
    while not names[-1]:
        names.pop()
    made = [f"{name}_made" for name in op.outputs]
    nodes.append(helper.make_node(op.name, names, made, "one", domain="vim", **op.node_attributes(**attributes)))
    nodes += [helper.make_node("Cast", [f"{name}_made"], [name], to=TensorProto.FLOAT) for name in op.outputs]
    shapes = {name: ["b", "l", x.shape[-1]] if x.ndim > 2 else list(x.shape) for name, x in inputs.items()}
    vector = next(x for name, x in reversed(inputs.items()) if name in op.fp32 and x.ndim == 1)
    result = [*shapes[op.inputs[0]][:-1], len(vector)]
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, result) for name in op.outputs],
        value_info=values,
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("vim", 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=8))
    functions.attach(model, kind)
    return model


def session(model: ir.Model, library: bool = False) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if library:
        options.register_custom_ops_library(str(ort_library()))
    content = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def compute(model: ir.Model, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return session(model).run(None, {name: x.astype(np.float32) for name, x in inputs.items()})


def assert_within(got: np.ndarray, want: np.ndarray, inside: np.ndarray | float, dtype: str) -> None:
    """`inside`: how far fp32 may have strayed before the result was rounded to the io type."""
    allowed = inside + OUTPUT_ROUNDING[dtype] * np.abs(want) + SMALLEST[dtype]
    assert got.shape == want.shape and np.isfinite(got).all()
    assert (np.abs(got - want) <= allowed).all(), f"{np.max(np.abs(got - want) / allowed):.3g} times what is allowed"


def scan_golden(inputs: dict[str, np.ndarray], softplus: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """y of a BiSelectiveScan in float64, and how far fp32 inside may stray from it."""
    wide = {name: value.astype(np.float64) for name, value in inputs.items()}
    want = bi_selective_scan_f64(**wide, delta_softplus=softplus)
    z = np.abs(wide["z"][:, :, -want.shape[2] :])
    magnitude = bi_selective_scan_f64(**wide, delta_softplus=softplus, scan=selective_scan_magnitude)
    # The same with a gate of 40, where silu(z) = z, so that it can be divided by.
    ungated = bi_selective_scan_f64(
        **{**wide, "z": np.full(want.shape, 40.0)}, delta_softplus=softplus, scan=selective_scan_magnitude
    )
    return want, INSIDE * magnitude + SIGMOID * z * ungated / 40


def assert_computes_the_scan(
    inputs: dict[str, np.ndarray], dtype: str = "fp32", softplus: bool = True, **how: object
) -> None:
    model = model_of_one_node(schema.BI_SCAN, inputs, dtype, delta_softplus=int(softplus), **how)  # type: ignore[arg-type]
    (y,) = compute(model, inputs)
    assert_within(y, *scan_golden(inputs, softplus), dtype)


# BiSelectiveScan.


@pytest.mark.parametrize("y_scale", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("opset", [16, 18, 20, 22])
def test_scan_in_every_opset(kind: str, opset: int, y_scale: bool) -> None:
    if kind == "linear-attention" and old_runtime():
        pytest.skip("LinearAttention came with ONNX Runtime 1.30")
    assert_computes_the_scan(make_bi_scan_inputs(2, 11, 8, 4, y_scale=y_scale), opset=opset, kind=kind)


@pytest.mark.parametrize("y_scale", [False, True])
@pytest.mark.parametrize("dtype", LOW)
def test_scan_in_low_types_is_rounded_once(dtype: str, y_scale: bool) -> None:
    """Both directions, their sum and the gate are fp32 inside: nothing but y itself is rounded."""
    assert_computes_the_scan(make_bi_scan_inputs(2, 30, 8, 4, dtype=dtype, y_scale=y_scale), dtype, opset=22)


@pytest.mark.parametrize("rank", [0, 1, 12])
@pytest.mark.parametrize("spare", [0, 1, 8])
def test_scan_reads_the_ends_of_its_rows(rank: int, spare: int) -> None:
    assert_computes_the_scan(make_bi_scan_inputs(2, 7, 8, 3, rank=rank, spare=spare))


def test_scan_without_softplus() -> None:
    inputs = make_bi_scan_inputs(2, 7, 8, 4)
    for way in "fb":
        inputs[f"delta_{way}"] = np.abs(inputs[f"delta_{way}"]) + 7
        inputs[f"A_{way}"] /= 50
    assert_computes_the_scan(inputs, softplus=False)
    with pytest.raises(AssertionError, match="times what is allowed"):  # the two are not the same thing here
        (y,) = compute(model_of_one_node(schema.BI_SCAN, inputs, delta_softplus=0), inputs)
        assert_within(y, *scan_golden(inputs), "fp32")


def test_scan_of_a_shared_convolution() -> None:
    """bimamba v1: one u, delta and row of x for both directions, which differ in A."""
    inputs = make_bi_scan_inputs(2, 9, 8, 4)
    for name in ("u", "delta", "x", "D", "delta_bias"):
        inputs[f"{name}_b"] = inputs[f"{name}_f"]
    assert_computes_the_scan(inputs)


@pytest.mark.parametrize("library", [False, True], ids=["body", "library"])
def test_scan_of_any_length_and_batch(library: bool) -> None:
    model = model_of_one_node(schema.BI_SCAN, make_bi_scan_inputs(2, 5, 8, 4))
    running = session(model, library)
    for batch, length in ((1, 1), (3, 2), (2, 65), (5, 17)):
        inputs = make_bi_scan_inputs(batch, length, 8, 4)
        (y,) = running.run(None, inputs)
        assert_within(y, *scan_golden(inputs), "fp32")


# BiCausalConv1d.


def assert_computes_the_convolution(inputs: dict[str, np.ndarray], dtype: str = "fp32", opset: int = 18) -> None:
    got = compute(model_of_one_node(schema.BI_CONV, inputs, dtype, opset), inputs)
    wide = {name: x.astype(np.float64) for name, x in inputs.items()}
    # No product is longer than this: what the sums' rounding, and Sigmoid's error, are in proportion to.
    longest = (1 + np.abs(wide["weight_f"]).max() + np.abs(wide["weight_b"]).max()) * 5
    for u, want in zip(got, bi_causal_conv1d_f64(**wide), strict=True):
        assert_within(u, want, 1e-6 * longest, dtype)


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("length", [1, 2, 3, 17])
def test_convolution_of_any_reach_and_length(taps: int, length: int) -> None:
    assert_computes_the_convolution(make_bi_conv_inputs(2, length, 6, taps))


@pytest.mark.parametrize("spare", [0, 1, 6])
@pytest.mark.parametrize("opset", [16, 18, 20, 22])
def test_convolution_reads_the_first_columns_of_its_rows(spare: int, opset: int) -> None:
    assert_computes_the_convolution(make_bi_conv_inputs(2, 9, 6, spare=spare), opset=opset)


@pytest.mark.parametrize("dtype", LOW)
def test_convolution_in_low_types_is_rounded_once(dtype: str) -> None:
    assert_computes_the_convolution(make_bi_conv_inputs(2, 20, 8, spare=8, dtype=dtype), dtype, 22)


# AddRMSNorm.


def assert_computes_the_norm(
    inputs: dict[str, np.ndarray], dtype: str = "fp32", opset: int = 18, epsilon: float = 1e-5
) -> None:
    n, r_out = compute(model_of_one_node(schema.ADD_NORM, inputs, dtype, opset, epsilon=epsilon), inputs)
    wide = {name: x.astype(np.float64) for name, x in inputs.items()}
    want_n, want_r = add_rms_norm_f64(**wide, epsilon=epsilon)
    assert_within(r_out, want_r, 2.0**-23 * np.abs(want_r), "fp32")  # the stream is fp32 whatever the io type is
    magnitude = add_rms_norm_f64(np.abs(wide["h"]), np.abs(wide["r"]), np.abs(wide["weight"]), epsilon)[0]
    assert_within(n, want_n, 1e-6 * np.abs(want_n) + 3e-7 * magnitude, dtype)


@pytest.mark.parametrize("opset", [16, 17, 18, 22])
@pytest.mark.parametrize("sides", [(2, 7, 16), (3, 1, 5)], ids=str)
def test_norm_in_every_opset(opset: int, sides: tuple[int, ...]) -> None:
    assert_computes_the_norm(make_norm_inputs(*sides), opset=opset)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("scale", [1.0, 400.0], ids=["small stream", "stream that fp16 cannot square"])
def test_norm_in_low_types_keeps_the_stream_in_fp32(dtype: str, scale: float) -> None:
    assert_computes_the_norm(make_norm_inputs(2, 7, 16, dtype=dtype, scale=scale), dtype, 22)


def test_norm_of_a_pruned_block_has_rank_two() -> None:
    assert_computes_the_norm(make_norm_inputs(3, 16))


def test_epsilon_is_the_nodes() -> None:
    inputs = {name: x * 1e-3 for name, x in make_norm_inputs(2, 4, 8).items()}
    for epsilon in (1e-5, 1e-6, 1e-2):
        assert_computes_the_norm(inputs, epsilon=epsilon)


# The functions themselves.


@pytest.mark.parametrize(
    "signature,calls",
    [
        (BiScanSignature(ir.DataType.FLOAT16, 8, 4, True), ["SelectiveScan", "SelectiveScan"]),
        (BiConvSignature(ir.DataType.FLOAT16, 8, 4), []),
        (AddNormSignature(ir.DataType.FLOAT16), []),
    ],
    ids=lambda v: getattr(getattr(v, "op", None), "name", ""),
)
def test_the_function_declares_what_nodes_carry(signature: functions.Signature, calls: list[str]) -> None:
    op = signature.op
    function = ir.serde.serialize_function(functions.function_body("scan", signature, 18))
    assert (function.domain, function.name) == ("vim", op.name)
    assert tuple(function.input) == op.inputs and tuple(function.output) == op.outputs
    assert sorted(function.attribute) == sorted(op.node_attributes()) and not function.attribute_proto
    assert [node.op_type for node in function.node if node.domain == "vim"] == calls
    assert {o.domain for o in function.opset_import} == ({"", "vim"} if calls else {""})
    names = [node.name for node in function.node]
    assert all(names) and len(set(names)) == len(names)
    assert not {"Loop", "If", "Transpose", "Shape"} & {node.op_type for node in function.node}


def test_the_scans_inside_a_low_fused_scan_are_fp32() -> None:
    inputs = make_bi_scan_inputs(2, 5, 8, 4, dtype="fp16")
    model = model_of_one_node(schema.BI_SCAN, inputs, "fp16")
    assert [function.name for function in model.functions.values()] == ["SelectiveScan", "BiSelectiveScan"]
    scan, fused = model.functions.values()
    assert "Cast" not in [node.op_type for node in scan if node.outputs[0].name in ("u32", "y")]
    casts = {node.outputs[0].name for node in fused if node.op_type == "Cast"}
    assert casts == {"y", "z_in", *(f"{x}_{way}" for x in ("u_in", "delta_in", "B", "C") for way in "fb")}


def test_beside_plain_scans_the_fused_one_calls_the_same_function() -> None:
    """A model has one function a name: the fused scan's own are then of the plain ones' type."""
    inputs = make_bi_scan_inputs(2, 5, 8, 4, dtype="fp16")
    model = model_of_one_node(schema.BI_SCAN, inputs, "fp16")
    (fused,) = (node for node in model.graph if node.domain == "vim")
    rows = [ir.node("Unsqueeze", [fused.inputs[6]], name=name) for name in ("B", "C")]
    plain = ir.node(
        "SelectiveScan",
        [fused.inputs[0], fused.inputs[2], fused.inputs[4], *(node.outputs[0] for node in rows), fused.inputs[8],
         fused.inputs[10], fused.inputs[11]],
        schema.SCAN.node_attributes(),
        domain="vim",
    )  # fmt: skip
    model.graph.extend([*rows, plain])
    model.functions.clear()
    functions.attach(model, "scan")
    scan, both = model.functions.values()
    assert [node.op_type for node in scan if node.outputs[0].name == "y"] == ["Cast"]
    assert {node.outputs[0].name for node in both if node.op_type == "Cast"} == {"y", "y32_f", "y32_b"}


def test_nodes_that_differ_cannot_share_a_body() -> None:
    model = model_of_one_node(schema.BI_SCAN, make_bi_scan_inputs(2, 5, 8, 4, y_scale=True))
    (node,) = (n for n in model.graph if n.domain == "vim")
    other = ir.node("BiSelectiveScan", list(node.inputs)[:13], schema.BI_SCAN.node_attributes(), domain="vim")
    model.graph.append(other)
    with pytest.raises(AssertionError, match="differ"):
        functions.attach(model, "scan")


def cases() -> list[tuple[Op, dict[str, np.ndarray]]]:
    return [
        (schema.BI_SCAN, make_bi_scan_inputs(2, 5, 8, 4)),
        (schema.BI_SCAN, make_bi_scan_inputs(2, 5, 8, 4, y_scale=True)),
        (schema.BI_CONV, make_bi_conv_inputs(2, 5, 8)),
        (schema.ADD_NORM, make_norm_inputs(2, 5, 8)),
    ]


@pytest.mark.parametrize("dtype,opset", [*itertools.product(("fp32", "fp16"), (16, 18, 22)), ("bf16", 22)])
@pytest.mark.parametrize("op,inputs", cases(), ids=lambda v: getattr(v, "name", ""))
def test_the_checker_accepts(op: Op, inputs: dict[str, np.ndarray], dtype: str, opset: int) -> None:
    schema.register()
    onnx.checker.check_model(ir.to_proto(model_of_one_node(op, inputs, dtype, opset)), full_check=True)


def test_runs_in_the_oldest_onnxruntime_supported() -> None:
    old = os.environ.get(OLD)
    if not old:
        pytest.skip(f"{OLD} names no folder with onnxruntime 1.21")
    environment = {key: value for key, value in os.environ.items() if key != OLD}
    environment |= {"PYTHONPATH": os.pathsep.join([old, str(ROOT / "tests"), str(ROOT)]), "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
