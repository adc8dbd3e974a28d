"""The fused ops in ONNX Runtime: compute what the definition says, alone and together, and refuse what is wrong."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from fused_cases import assert_bi_conv, assert_bi_scan, assert_norm, make_bi_conv, make_bi_scan, make_norm
from golden import add_rms_norm_f64, bi_causal_conv1d_f64, bi_selective_scan_f64
from onnx import TensorProto, helper, numpy_helper
from ort_library import ROOT
from scan_cases import DTYPES

from vimdeploy.export import schema

pytest.importorskip("onnxruntime")
from ort_ops import TYPES, op_model, run_op, session, version

FUSED = (schema.BI_SCAN, schema.BI_CONV, schema.ADD_NORM)
PAIRS = ("u", "delta", "A", "x", "D", "delta_bias")


def bi_scan_inputs(batch, length, channels, states, dtype="fp32", optional=("y_scale",), rank=3, seed=0):
    """The node's inputs, and the same for fused_cases.assert_bi_scan: B and C at the end of rows, z of wider ones."""
    case = make_bi_scan(batch, length, channels, states, dtype=dtype, optional=("D", "z", "delta_bias", *optional),
                        seed=seed)  # fmt: skip
    rng = np.random.default_rng(seed)

    def behind(columns, *parts):
        dt = rng.standard_normal((batch, length, columns)).astype(DTYPES[dtype])
        return np.concatenate([dt, *parts], axis=-1)

    pairs = {name: case[name] for name in ("u", "delta", "A", "D", "delta_bias")}
    pairs["x"] = [behind(rank, case["B"][i][:, :, 0], case["C"][i][:, :, 0]) for i in range(2)]
    inputs = {f"{name}_{side}": pairs[name][i] for name in PAIRS for i, side in enumerate("fb")}
    inputs["z"] = behind(channels, case["z"])
    return inputs | {name: case[name] for name in optional}, case


def bi_conv_inputs(batch, length, channels, taps=4, dtype="fp32", width=None, seed=0):
    case = make_bi_conv(batch, length, channels, taps, dtype, width, seed)
    x = case["x"].base if width else case["x"]
    flat = {f"{name}_{side}": case[name][i] for name in ("weight", "bias") for i, side in enumerate("fb")}
    return {"x": x, **flat}, case


@pytest.mark.parametrize("optional", [(), ("y_scale",)], ids=["", "y_scale"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bi_selective_scan_matches_the_definition(dtype, optional):
    inputs, case = bi_scan_inputs(2, 197, 38, 16, dtype, optional)
    (y,) = run_op(schema.BI_SCAN, inputs, dtype)
    assert_bi_scan(y, case, dtype)


def test_bi_selective_scan_without_softplus():
    inputs, case = bi_scan_inputs(1, 20, 20, 16)
    shift = {f"delta_{side}": np.abs(inputs[f"delta_{side}"]) + np.float32(6) for side in "fb"}
    case["delta"] = (shift["delta_f"], shift["delta_b"])
    (y,) = run_op(schema.BI_SCAN, inputs | shift, delta_softplus=0)
    assert_bi_scan(y, case, "fp32", delta_softplus=False)


@pytest.mark.parametrize("rank", [0, 12])
def test_bi_selective_scan_reads_the_last_columns_of_rows(rank):
    inputs, case = bi_scan_inputs(2, 9, 20, 8, rank=rank)
    assert_bi_scan(run_op(schema.BI_SCAN, inputs)[0], case, "fp32")
    inputs["z"] = np.ascontiguousarray(inputs["z"][..., 20:])  # z alone
    assert_bi_scan(run_op(schema.BI_SCAN, inputs)[0], case, "fp32")


@pytest.mark.parametrize("width", [None, 76])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bi_causal_conv1d_matches_the_definition(dtype, width):
    inputs, case = bi_conv_inputs(2, 197, 38, dtype=dtype, width=width)
    assert_bi_conv(run_op(schema.BI_CONV, inputs, dtype), case, dtype)


@pytest.mark.parametrize("taps", [1, 3, 16])
def test_bi_causal_conv1d_takes_any_number_of_taps(taps):
    inputs, case = bi_conv_inputs(1, 7, 5, taps)
    assert_bi_conv(run_op(schema.BI_CONV, inputs), case, "fp32")


@pytest.mark.parametrize("shape", [(3, 24), (2, 197, 24), (2, 3, 5, 24)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_matches_the_definition_at_every_rank(dtype, shape):
    inputs = make_norm(*shape, dtype=dtype)
    ranks = {name: ["d"] * len(shape) if name != "weight" else ["c"] for name in inputs}
    model = op_model(schema.ADD_NORM, inputs, dtype, shapes=ranks, epsilon=1e-3)
    n, r_out = session(model).run(None, {name: value.astype(np.float32) if dtype == "bf16" else value
                                         for name, value in inputs.items()})  # fmt: skip
    assert_norm((n.astype(DTYPES[dtype]), r_out), inputs, dtype, epsilon=1e-3)


def test_epsilon_defaults_to_one_in_a_hundred_thousand():
    inputs = make_norm(1, 3, 24, scale=1e-3)  # where it shows
    assert_norm(run_op(schema.ADD_NORM, inputs), inputs, "fp32", 1e-5)
    assert np.array_equal(run_op(schema.ADD_NORM, inputs)[0], run_op(schema.ADD_NORM, inputs, epsilon=1e-5)[0])


@pytest.mark.parametrize("length", [0, 1, 3])
def test_short_sequences(length):
    inputs, case = bi_scan_inputs(2, length, 20, 8)
    assert_bi_scan(run_op(schema.BI_SCAN, inputs)[0], case, "fp32")
    inputs, case = bi_conv_inputs(2, length, 20)
    assert_bi_conv(run_op(schema.BI_CONV, inputs), case, "fp32")
    inputs = make_norm(2, length, 20)
    assert_norm(run_op(schema.ADD_NORM, inputs), inputs, "fp32")


def case_of(op, seed=0):
    """Some inputs of a node of `op`."""
    if op is schema.BI_SCAN:
        return bi_scan_inputs(2, 100, 70, 16, seed=seed)[0]
    if op is schema.BI_CONV:
        return bi_conv_inputs(2, 100, 70, seed=seed)[0]
    if op is schema.ADD_NORM:
        return make_norm(2, 100, 70, seed=seed)
    raise AssertionError(op)


@pytest.mark.parametrize("op", FUSED, ids=lambda op: op.name)
def test_attributes_that_name_the_tensorrt_plugin_change_nothing(op):
    inputs = case_of(op)
    plain, named = run_op(op, inputs), run_op(op, inputs, **op.node_attributes())
    assert all(np.array_equal(one, other) for one, other in zip(plain, named, strict=True))


@pytest.mark.parametrize("op", FUSED, ids=lambda op: op.name)
def test_kernel_wins_over_a_function_of_the_same_name(op):
    first = op.inputs[0]
    zeros = helper.make_function(
        schema.DOMAIN,
        op.name,
        list(op.inputs),
        list(op.outputs),
        [helper.make_node("Sub", [first, first], [name]) for name in op.outputs],
        [helper.make_opsetid("", 17)],
        attributes=list(schema.PLUGIN_ATTRIBUTES),
        attribute_protos=[helper.make_attribute(name, value) for name, value in op.attributes.items()],
    )
    inputs = case_of(op)
    outputs = session(op_model(op, inputs, functions=[zeros], **op.node_attributes())).run(None, inputs)
    assert all(np.array_equal(one, other) for one, other in zip(outputs, run_op(op, inputs), strict=True))
    assert all(np.any(output) for output in outputs)


@pytest.mark.parametrize("op", FUSED, ids=lambda op: op.name)
def test_many_threads_give_the_same_bits_as_one(op):
    inputs = case_of(op)
    alone, many = run_op(op, inputs), run_op(op, inputs, threads=4)
    assert [one.tobytes() for one in alone] == [one.tobytes() for one in many]


@pytest.mark.parametrize("op", FUSED, ids=lambda op: op.name)
def test_two_sessions_in_two_threads_do_not_disturb_each_other(op):
    cases = [case_of(op, seed) for seed in range(2)]
    alone = [run_op(op, case) for case in cases]

    def work(i):
        own = session(op_model(op, cases[i]), threads=2)
        runs = (own.run(None, cases[i]) for _ in range(20))
        return all(np.array_equal(a, b) for outputs in runs for a, b in zip(outputs, alone[i], strict=True))

    with ThreadPoolExecutor(2) as executor:
        assert list(executor.map(work, range(2))) == [True, True]


@pytest.mark.parametrize("op", FUSED, ids=lambda op: op.name)
def test_arrays_that_are_not_contiguous_are_taken_as_what_they_hold(op):
    inputs = case_of(op)
    first = op.inputs[0]
    mirrored = {**inputs, first: np.ascontiguousarray(inputs[first][..., ::-1])[..., ::-1]}
    assert not mirrored[first].flags.c_contiguous
    one = session(op_model(op, inputs))
    for a, b in zip(one.run(None, mirrored), one.run(None, inputs), strict=True):
        assert np.array_equal(a, b)


def fused_layer(batch, length, width, channels, states, rank, seed=0):
    """One layer as `--fusion full` writes it: a model of every fused op and MatMuls, and its outputs in float64."""
    rng = np.random.default_rng(seed)

    def weight(*shape):
        return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

    norm, conv, mixer = (
        op.node_attributes() | {"domain": "vim"} for op in (schema.ADD_NORM, schema.BI_CONV, schema.BI_SCAN)
    )
    w = {"norm": rng.uniform(0.5, 2, width).astype(np.float32), "in": weight(width, 2 * channels),
         "out": weight(channels, width)}  # fmt: skip
    for side in "fb":
        w |= {f"weight_{side}": weight(4, channels), f"bias_{side}": weight(channels),
              f"x_{side}": weight(channels, rank + 2 * states), f"dt_{side}": weight(rank, channels),
              f"A_{side}": -rng.uniform(0.5, 16, (channels, states)).astype(np.float32),
              f"D_{side}": weight(channels),
              f"delta_bias_{side}": rng.uniform(-6, 0, channels).astype(np.float32)}  # fmt: skip
    nodes = [
        helper.make_node("AddRMSNorm", ["h", "r", "norm"], ["n", "r_out"], **norm),
        helper.make_node("MatMul", ["n", "in"], ["xz"]),
        helper.make_node("BiCausalConv1d", ["xz", "weight_f", "bias_f", "weight_b", "bias_b"], ["u_f", "u_b"],
                         **conv),
    ]  # fmt: skip
    for side in "fb":
        nodes += [
            helper.make_node("MatMul", [f"u_{side}", f"x_{side}"], [f"row_{side}"]),
            helper.make_node("Slice", [f"row_{side}", "zero", "rank", "last"], [f"low_{side}"]),
            helper.make_node("MatMul", [f"low_{side}", f"dt_{side}"], [f"delta_{side}"]),
        ]
    scan = ["u_f", "u_b", "delta_f", "delta_b", "A_f", "A_b", "row_f", "row_b", "D_f", "D_b", "xz",
            "delta_bias_f", "delta_bias_b"]  # fmt: skip
    nodes += [
        helper.make_node("BiSelectiveScan", scan, ["y"], **mixer),
        helper.make_node("MatMul", ["y", "out"], ["h_out"]),
    ]
    numbers = {"zero": [0], "rank": [rank], "last": [2]}
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "length", width]) for name in ("h", "r")],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("h_out", "r_out")],
        [numpy_helper.from_array(value, name) for name, value in w.items()]
        + [numpy_helper.from_array(np.array(value), name) for name, value in numbers.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("vim", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()

    feed = {name: rng.standard_normal((batch, length, width)).astype(np.float32) for name in ("h", "r")}
    n, r_out = add_rms_norm_f64(feed["h"], feed["r"], w["norm"])
    xz = n @ w["in"]
    u = dict(zip("fb", bi_causal_conv1d_f64(xz, *(w[f"{name}_{side}"] for side in "fb" for name in ("weight", "bias"))),
                 strict=True))  # fmt: skip
    rows = {side: u[side] @ w[f"x_{side}"] for side in "fb"}
    y = bi_selective_scan_f64(
        **{f"u_{side}": u[side] for side in "fb"},
        **{f"delta_{side}": rows[side][..., :rank] @ w[f"dt_{side}"] for side in "fb"},
        **{f"x_{side}": rows[side] for side in "fb"},
        **{f"{name}_{side}": w[f"{name}_{side}"] for name in ("A", "D", "delta_bias") for side in "fb"},
        z=xz,
    )
    return model, feed, (y @ w["out"], r_out)


def test_all_ops_work_together_in_one_graph():
    model, feed, want = fused_layer(2, 33, 24, 48, 8, 3)
    for threads in (1, 2):
        for got, reference in zip(session(model, threads).run(None, feed), want, strict=True):
            assert np.abs(got - reference).max() <= 2e-6 * np.abs(reference).max()


def test_one_session_serves_changing_sizes():
    model, _, _ = fused_layer(1, 1, 24, 48, 8, 3)
    one = session(model)
    for batch, length in [(2, 30), (1, 5), (3, 64), (2, 30)]:
        _, feed, want = fused_layer(batch, length, 24, 48, 8, 3)
        for got, reference in zip(one.run(None, feed), want, strict=True):
            assert np.abs(got - reference).max() <= 2e-6 * np.abs(reference).max()


def test_stream_is_not_overwritten_while_another_node_reads_it():
    """r_out may take the place of r (the op says so to the runtime), but only of an r that nobody needs."""
    nodes = [
        helper.make_node("Neg", ["r"], ["minus_r"]),
        helper.make_node("AddRMSNorm", ["h", "minus_r", "weight"], ["n", "r_out"], domain="vim"),
        helper.make_node("Add", ["r_out", "minus_r"], ["both"]),
        helper.make_node("AddRMSNorm", ["h", "both", "weight"], ["n2", "r2"], domain="vim"),
    ]
    inputs = make_norm(2, 50, 70)
    graph = helper.make_graph(
        nodes,
        "stream",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("n", "r2")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("vim", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    before = inputs["r"].copy()
    _, r2 = session(model).run(None, inputs)
    assert np.array_equal(inputs["r"], before)
    r_out = inputs["h"] - inputs["r"]
    assert np.array_equal(r2, inputs["h"] + (r_out - inputs["r"]))


@pytest.mark.skipif(version() < (1, 24), reason="before 1.24, ORT crashes when ops that infer shapes leave inputs out")
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_shapes_and_types_of_outputs_are_known_before_running(dtype):
    io = "tensor(float)" if dtype == "fp32" else "tensor(float16)"
    tokens = ["batch", "length", "channels"]
    outputs = {
        schema.BI_SCAN: [(tokens, io)],
        schema.BI_CONV: [(tokens, io), (tokens, io)],
        schema.ADD_NORM: [(tokens, io), (tokens, "tensor(float)")],
    }
    for op, want in outputs.items():
        given = [name for name in op.inputs if name not in op.optional]
        got = [(output.shape, output.type) for output in session(op_model(op, given, dtype)).get_outputs()]
        assert got == want


@pytest.mark.skipif(version() < (1, 24), reason="before 1.24, ORT crashes when ops that infer shapes leave inputs out")
def test_shape_of_the_output_combines_what_several_inputs_say():
    shapes = {"x": [2, "length", 40], "weight_f": [4, 20]}
    (u_f, u_b) = session(op_model(schema.BI_CONV, schema.BI_CONV.inputs, shapes=shapes)).get_outputs()
    assert u_f.shape == u_b.shape == [2, "length", 20]
    shapes = {name: ["a", 3, "b", 8] for name in ("h", "r")} | {"weight": [8]}
    (n, r_out) = session(op_model(schema.ADD_NORM, schema.ADD_NORM.inputs, shapes=shapes)).get_outputs()
    assert n.shape == r_out.shape == ["a", 3, "b", 8]


def name_of(x):
    """Of a test's parameter: an op, what was changed, or nothing for a sentence."""
    if isinstance(x, schema.Op):
        return x.name
    if isinstance(x, dict):
        return "-".join(map(str, next(iter(x.items()))))
    if isinstance(x, str):
        return "" if " " in x else x
    return "x".join(map(str, x.shape))


@pytest.mark.parametrize(
    ("op", "types", "message"),
    [
        (schema.BI_SCAN, {"u_b": "fp16"}, "u_b is float16; it must be float32, as u_f is"),
        (schema.BI_SCAN, {"x_f": "fp64"}, "x_f is float64; it must be float32, as u_f is"),
        (schema.BI_SCAN, {"z": "fp16"}, "z is float16; it must be float32, as u_f is"),
        (schema.BI_SCAN, {"A_b": "fp16"}, "A_b is float16; it must be float32, whatever the type of u_f"),
        (schema.BI_SCAN, {"y_scale": "fp64"}, "y_scale is float64; it must be float32, whatever the type of u_f"),
        (schema.BI_SCAN, {"u_f": "fp64"}, "u_f is float64; it must be float32, float16 or bfloat16"),
        (schema.BI_CONV, {"weight_f": "fp16"}, "weight_f is float16; it must be float32, whatever the type of x"),
        (schema.BI_CONV, {"x": "fp64"}, "x is float64; it must be float32, float16 or bfloat16"),
        (schema.ADD_NORM, {"r": "fp16"}, "r is float16; it must be float32, whatever the type of h"),
        (schema.ADD_NORM, {"h": "fp64"}, "h is float64; it must be float32, float16 or bfloat16"),
    ],
    ids=lambda x: (
        x.name if isinstance(x, schema.Op) else "-".join(next(iter(x.items()))) if isinstance(x, dict) else ""
    ),
)
def test_wrong_types_are_refused_when_the_model_loads(op, types, message):
    model = op_model(op, op.inputs, types={name: TYPES[dtype] for name, dtype in types.items()})
    with pytest.raises(Exception, match="node0") as refusal:
        session(model)
    assert f"vim::{op.name} 'node0': {message}" in str(refusal.value)


@pytest.mark.parametrize(
    ("op", "attributes", "message"),
    [
        (schema.BI_SCAN, {"delta_softplus": 2}, "attribute delta_softplus is 2; it must be 0 or 1"),
        (schema.BI_SCAN, {"delta_softplus": 1.0}, "attribute delta_softplus is not an integer; it must be 0 or 1"),
        (schema.ADD_NORM, {"epsilon": 1}, "attribute epsilon is not a float"),
        (schema.ADD_NORM, {"epsilon": "small"}, "attribute epsilon is not a float"),
    ],
    ids=name_of,
)
def test_wrong_attributes_are_refused_when_the_model_loads(op, attributes, message):
    with pytest.raises(Exception, match="node0") as refusal:
        session(op_model(op, op.inputs, **attributes))
    assert message in str(refusal.value)


def test_epsilon_that_no_kernel_takes_is_refused_when_run():
    with pytest.raises(Exception, match="epsilon is -1; it must be finite and not negative"):
        run_op(schema.ADD_NORM, make_norm(2, 3, 4), epsilon=-1.0)


TOKENS = "(batch, length, channels) = (2, 7, 6)"
WIDE_TOKENS = "(batch, length, width) = (2, 7, width)"


def ones(*shape):
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("op", "name", "value", "message"),
    [
        (schema.BI_SCAN, "u_f", ones(2, 3), "u_f has shape (2, 3); it must be (batch, length, channels)"),
        (schema.BI_SCAN, "u_b", ones(2, 7, 5), "u_b has shape (2, 7, 5); it must be " + TOKENS),
        (schema.BI_SCAN, "A_b", ones(6, 5), "A_b has shape (6, 5); it must be (channels, states) = (6, 4)"),
        (schema.BI_SCAN, "x_b", ones(2, 7, 9), "x_b has shape (2, 7, 9); it must be (batch, length, row) = (2, 7, 11)"),
        (
            schema.BI_SCAN,
            "z",
            ones(2, 6, 9),
            "z has shape (2, 6, 9); it must be (batch, length, width) = (2, 7, width)",
        ),
        (schema.BI_SCAN, "z", ones(2, 7, 5), "z has rows of 5; they must hold 6 channels"),
        (schema.BI_SCAN, "y_scale", ones(1), "y_scale has shape (1); it must be (channels) = (6)"),
        (schema.BI_CONV, "x", ones(7, 6), "x has shape (7, 6); it must be (batch, length, width)"),
        (schema.BI_CONV, "x", ones(2, 7, 5), "x has rows of 5; they must hold 6 channels"),
        (schema.BI_CONV, "weight_b", ones(3, 6), "weight_b has shape (3, 6); it must be (taps, channels) = (4, 6)"),
        (schema.BI_CONV, "bias_f", ones(6, 1), "bias_f has shape (6, 1); it must be (channels) = (6)"),
        (schema.ADD_NORM, "r", ones(2, 7, 5), "r has shape (2, 7, 5); it must be (..., channels) = (2, 7, 6)"),
        (schema.ADD_NORM, "r", ones(14, 6), "r has shape (14, 6); it must be (..., channels) = (2, 7, 6)"),
        (schema.ADD_NORM, "h", np.array(1, np.float32), "h has shape (); it must be (..., channels)"),
        (schema.ADD_NORM, "weight", ones(1), "weight has shape (1); it must be (channels) = (6)"),
    ],
    ids=name_of,
)
def test_wrong_shapes_are_refused_when_run(op, name, value, message):
    small = {schema.BI_SCAN: lambda: bi_scan_inputs(2, 7, 6, 4)[0], schema.BI_CONV: lambda: bi_conv_inputs(2, 7, 6)[0],
             schema.ADD_NORM: lambda: make_norm(2, 7, 6)}  # fmt: skip
    inputs = small[op]() | {name: value}
    loose = onnx.load_from_string(op_model(op, inputs))
    for info in loose.graph.input:
        info.type.tensor_type.ClearField("shape")
    with pytest.raises(Exception, match="node0") as refusal:
        session(loose.SerializeToString()).run(None, inputs)
    assert f"vim::{op.name} 'node0': {message}" in str(refusal.value)


def test_rows_too_short_for_b_and_c_are_refused():
    inputs, _ = bi_scan_inputs(2, 7, 6, 4)
    inputs |= {name: ones(2, 7, 7) for name in ("x_f", "x_b")}
    with pytest.raises(Exception, match="x_f and x_b have rows of 7; they must hold B and C, 4 states each"):
        run_op(schema.BI_SCAN, inputs)


def test_more_taps_than_the_kernel_takes_are_refused():
    with pytest.raises(Exception, match="taps is 17; it must be from 1 to 16"):
        run_op(schema.BI_CONV, bi_conv_inputs(1, 2, 3, taps=17)[0])


@pytest.mark.parametrize("op", FUSED, ids=lambda op: op.name)
def test_missing_required_input_is_refused(op):
    left_out = op.inputs[2]
    with pytest.raises(Exception, match=rf"{op.name}|node0"):
        session(op_model(op, [name for name in op.inputs if name != left_out]))


def test_session_goes_on_after_a_refusal():
    inputs = make_norm(2, 7, 6)
    one = session(op_model(schema.ADD_NORM, inputs))
    with pytest.raises(Exception, match="weight has shape"):
        one.run(None, inputs | {"weight": ones(5)})
    assert_norm(one.run(None, inputs), inputs, "fp32")


def resident_kib() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc/self/status to read the resident memory from")
    return int(status.read_text().split("VmRSS:")[1].split()[0])


def test_sessions_opened_and_closed_leave_no_memory_behind():
    model, feed, _ = fused_layer(1, 197, 192, 384, 16, 12)

    def open_and_close(times):
        for _ in range(times):
            session(model).run(None, feed)
        gc.collect()

    open_and_close(16)  # whatever a process keeps once
    before = resident_kib()
    open_and_close(64)
    # A session holds over 5 MiB of weights and tensors.
    assert resident_kib() - before < 16 * 1024


def in_a_process_with_isa(isa: str, code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "VIMDEPLOY_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(
        [f"{ROOT}/tests", f"{ROOT}/tests/runtime", *sys.path])}  # fmt: skip
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_instruction_set_that_is_not_there_is_refused_when_the_model_loads():
    code = """
from ort_ops import op_model, session
from vimdeploy.export import schema
session(op_model(schema.ADD_NORM, schema.ADD_NORM.inputs))
"""
    result = in_a_process_with_isa("x86-64-v9", code)
    assert result.returncode != 0
    assert (
        "VIMDEPLOY_CPU_ISA asks for 'x86-64-v9', which this processor or this build lacks; there are " in result.stderr
    )
