"""verify/parity.py: correct files pass; a file with one fault, of the kinds exporters really make, never does."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import zoo
from click.testing import CliRunner, Result
from official import write_official, write_small
from onnx import helper, numpy_helper
from ort_library import ort_library
from PIL import Image

import vimdeploy
from vimdeploy.bundle import read_info
from vimdeploy.cli.main import cli
from vimdeploy.errors import ImageError, ModelFileError, RuntimeMissing, UsageError
from vimdeploy.export import schema
from vimdeploy.export.exporter import ExportOptions, export_checkpoint
from vimdeploy.models.loading import load_exported
from vimdeploy.runtimes import library
from vimdeploy.verify.parity import ParityReport, parity

PRECISIONS = ("fp32", "fp16", "bf16")
BODY, LIBRARY = "onnxruntime-body", "onnxruntime"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("checkpoint") / "small.pth")


@pytest.fixture(scope="module")
def export(checkpoint: Path) -> Callable[..., Path]:
    """Export the small checkpoint to a bare .onnx with these options, once each."""

    @functools.cache
    def exported(**options: object) -> Path:
        name = "-".join(f"{k}={v}" for k, v in options.items()) or "plain"
        settings = ExportOptions(**options)  # type: ignore[arg-type]
        return export_checkpoint(checkpoint, checkpoint.with_name(f"{name}.onnx"), settings).model

    return exported


@pytest.fixture
def with_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.ENVIRONMENT, str(ort_library()))


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(library.ENVIRONMENT, raising=False)
    monkeypatch.setattr(library, "_folders", lambda: iter([tmp_path / "no_lib"]))


def in_body(artifact: Path, checkpoint: Path, **options: object) -> ParityReport:
    return parity(artifact, checkpoint, runtimes=(BODY,), samples_each=2, **options)  # type: ignore[arg-type]


def command(*args: object) -> Result:
    result = CliRunner().invoke(cli, ["verify", "parity", *(str(arg) for arg in args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


# Correct files.


@pytest.mark.parametrize("fusion", ["none", "full"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_correct_file_passes_with_library_and_body(
    precision: str, fusion: str, checkpoint: Path, export: Callable[..., Path], with_library: None
) -> None:
    report = parity(export(precision=precision, fusion=fusion), checkpoint)
    assert report.passed and not report.skipped and report.summary() == "parity holds"
    kinds = [(row.runtime, row.output, row.images) for row in report.rows]
    assert kinds == [(runtime, "logits", images) for runtime in (LIBRARY, BODY) for images in ("random", "real")]
    assert ["vim op library" in row.description for row in report.rows] == [True, True, False, False]
    for row in report.rows:
        assert row.errors.n == 4 and row.errors.finite and row.errors.scale > 0.1 and row.errors.top1 == 1
    assert ("fp64" in report.reference) == (precision != "fp32")
    assert any("emulated" in notice for notice in report.notices) == (precision == "bf16")
    assert report.precision == precision


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_low_types_are_held_to_the_measured_error_of_pytorch(
    precision: str, checkpoint: Path, export: Callable[..., Path]
) -> None:
    (row, _) = in_body(export(precision=precision), checkpoint).rows
    low, high = {"fp16": (1e-5, 1e-2), "bf16": (1e-4, 1e-1)}[precision]
    assert low < row.errors.rel_rms < row.tolerance.rel_rms < high
    assert f"PyTorch {precision}" in row.tolerance.reason


@pytest.mark.parametrize(
    "options",
    [
        {"fallback": "linear-attention"},
        {"output": "features"},
        {"output": "tokens"},
        {"weights": "ema"},
        {"img_size": (40, 48)},
        {"img_size": (48, 48), "pos_embed_mode": "repo"},
        {"static_batch": 3},
        {"static_batch": 1},
        {"opset": 16},
        {"fusion": "bidirectional"},
        {"fusion": "full"},
        {"fusion": "full", "fallback": "linear-attention", "opset": 16},
        {"fusion": "full", "output": "features", "static_batch": 1},
    ],
    ids=str,
)
def test_every_kind_of_export_passes(options: dict[str, object], checkpoint: Path, export: Callable[..., Path]) -> None:
    report = in_body(export(**options), checkpoint)
    assert report.passed, report.summary()
    assert {row.output for row in report.rows} == {options.get("output", "logits")}
    assert (report.rows[0].errors.top1 is None) == ("output" in options)


@pytest.mark.parametrize("name", ["one channel in", "no cls, pool all", "no cls, pool max", "rope, layer pairs"])
def test_networks_of_other_kinds_pass(name: str, tmp_path: Path) -> None:
    config = zoo.NETWORKS[name]
    write_official(tmp_path / "odd.pth", config, None, optimizer=False)
    settings = (
        f"stride={config.stride},cls={config.cls_position},pool={config.pool},img_size=28,"
        f"divide={'yes' if config.divide_out else 'no'},rope_residual={'yes' if config.rope_residual else 'no'},"
        f"bidirectional={'yes' if config.bidirectional else 'no'}"
    )
    model = export_checkpoint(tmp_path / "odd.pth", tmp_path / "odd.onnx", ExportOptions(variant=settings)).model
    assert read_info(model).config == config
    report = in_body(model, tmp_path / "odd.pth")
    assert report.passed, report.summary()
    grey = config.in_chans == 1
    assert [row.images for row in report.rows] == (["random"] if grey else ["random", "real"])
    assert bool(report.notices) == grey
    if grey:
        assert report.notices == ("random inputs only: the model reads 1 channels, images give 3 (RGB)",)
        with pytest.raises(UsageError, match="reads 1 channels"):
            in_body(model, tmp_path / "odd.pth", images=tmp_path)


def test_seed_and_number_of_images(checkpoint: Path, export: Callable[..., Path]) -> None:
    a, b, c = (in_body(export(), checkpoint, seed=seed).rows for seed in (0, 0, 1))
    assert a[0].errors == b[0].errors != c[0].errors and a[1].errors == c[1].errors
    assert parity(export(), checkpoint, runtimes=(BODY,), samples_each=9).rows[0].errors.n == 9


def test_real_images_are_the_users_when_named(checkpoint: Path, export: Callable[..., Path], tmp_path: Path) -> None:
    for i in range(3):
        Image.new("RGB", (40, 50), (80 * i, 10, 10)).save(tmp_path / f"{i}.png")
    (random, real) = in_body(export(), checkpoint, images=tmp_path).rows
    assert random.images == "random" and real.errors.n == 2
    (_, one) = in_body(export(), checkpoint, images=tmp_path / "1.png").rows
    assert one.errors.n == 1 and one.passed


# Files with one fault each.

Fault = Callable[[onnx.ModelProto], None]


def change(model: onnx.ModelProto, name: str, by: Callable[[np.ndarray], np.ndarray]) -> None:
    """The weight called `name`, in whatever type it is stored."""
    (found,) = (t for t in model.graph.initializer if t.name in (name, f"{name}:float16", f"{name}:bfloat16"))
    before = numpy_helper.to_array(found)
    after = np.asarray(by(before), before.dtype, order="C")
    assert not np.array_equal(before, after)
    found.CopyFrom(numpy_helper.from_array(after, found.name))


def sign_of_a_weight(model: onnx.ModelProto) -> None:
    change(model, "layers.1.mixer.out_proj.weight.T", lambda w: -w)


def one_channel_of_a_weight(model: onnx.ModelProto) -> None:
    def flip(w: np.ndarray) -> np.ndarray:
        w = w.copy()
        w[0] = -w[0]
        return w

    change(model, "layers.0.mixer.in_proj.weight.T", flip)


def backward_scan_runs_forward(model: onnx.ModelProto) -> None:
    scan = next(n for n in zoo.scans(model) if zoo.attributes(n)["reverse"])
    (attribute,) = (a for a in scan.attribute if a.name == "reverse")
    attribute.i = 0


def backward_scan_is_gone(model: onnx.ModelProto) -> None:
    """Upstream's slow path: the sum of the two directions is the first one only."""
    forward, backward = zoo.scans(model)[:2]
    (total,) = (n for n in model.graph.node if backward.output[0] in n.input)
    total.input[:] = [forward.output[0]] * 2
    for t in model.graph.initializer:  # 2 x forward, halved again: exactly "without the backward one"
        if t.name == "layers.0.mixer.out_proj.weight.T":
            t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(t) / 2, t.name))


def positions_shifted_by_a_token(model: onnx.ModelProto) -> None:
    change(model, "pos_embed", lambda w: np.roll(w, 1, axis=1))


def delta_bias_zeroed_in_a_layer(model: onnx.ModelProto) -> None:
    change(model, "layers.1.mixer.dt_proj.bias", np.zeros_like)


def delta_bias_left_out(model: onnx.ModelProto) -> None:
    change(model, "layers.0.mixer.dt_proj_b.bias", lambda w: 0 * w)


def wrong_class_token(model: onnx.ModelProto) -> None:
    """The head reads the token beside it."""
    (gather,) = (n for n in model.graph.node if n.op_type == "Gather")
    change(model, gather.input[1], lambda i: i + 1)


def softplus_forgotten(model: onnx.ModelProto) -> None:
    for attribute in zoo.scans(model)[0].attribute:
        if attribute.name == "delta_softplus":
            attribute.i = 0


def gate_forgotten(model: onnx.ModelProto) -> None:
    """z is one of the mixer's halves: the other one is taken."""
    scan = zoo.scans(model)[0]
    scan.input[6] = scan.input[6].replace(":1", ":0")


def convolution_taps_reversed(model: onnx.ModelProto) -> None:
    taps = {t.name: t for t in model.graph.initializer if "layers.0.mixer.conv1d_b.taps" in t.name}
    first, last = (next(t for n, t in taps.items() if f"taps.{k}" in n) for k in (0, 3))
    a, b = numpy_helper.to_array(first), numpy_helper.to_array(last)
    first.CopyFrom(numpy_helper.from_array(b, first.name))
    last.CopyFrom(numpy_helper.from_array(a, last.name))


def epsilon_forgotten(model: onnx.ModelProto) -> None:
    change(model, "const/float32//1e-05", lambda e: e + 0.1)


def one_percent_too_large(model: onnx.ModelProto) -> None:
    for name in ("head.weight", "head.bias"):
        change(model, name, lambda w: w * 1.01)


def classes_swapped(model: onnx.ModelProto) -> None:
    for name in ("head.weight", "head.bias"):
        change(model, name, lambda w: w[[1, 0, *range(2, len(w))]])


def output_nan(model: onnx.ModelProto) -> None:
    change(model, "head.bias", lambda w: w * np.nan)


def output_renamed(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "scores"
    for node in model.graph.node:
        node.output[:] = ["scores" if o == "logits" else o for o in node.output]


def extra_output(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", ["logits"], ["more"]))
    model.graph.output.append(helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, ["batch", 5]))


def output_of_another_shape(model: onnx.ModelProto) -> None:
    (last,) = (n for n in model.graph.node if "logits" in n.output)
    last.output[0] = "inner"
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "axis"))
    model.graph.node.append(helper.make_node("Unsqueeze", ["inner", "axis"], ["logits"]))
    model.graph.output[0].type.tensor_type.ClearField("shape")


FAULTS: tuple[Fault, ...] = (
    sign_of_a_weight, one_channel_of_a_weight, backward_scan_runs_forward, backward_scan_is_gone,
    positions_shifted_by_a_token, delta_bias_zeroed_in_a_layer, delta_bias_left_out, wrong_class_token,
    softplus_forgotten, gate_forgotten, convolution_taps_reversed, epsilon_forgotten, one_percent_too_large,
    classes_swapped, output_nan, output_renamed, extra_output, output_of_another_shape,
)  # fmt: skip


# The same, and more, in a fused file.


def fused_node(model: onnx.ModelProto, op: str, which: int = 0) -> onnx.NodeProto:
    return [node for node in model.graph.node if node.op_type == op][which]


def swapped(node: onnx.NodeProto, one: str, other: str) -> None:
    names = schema.OPS[node.op_type].inputs
    i, j = names.index(one), names.index(other)
    node.input[i], node.input[j] = node.input[j], node.input[i]


def directions_swapped(model: onnx.ModelProto) -> None:
    scan = fused_node(model, "BiSelectiveScan")
    for name in ("u", "delta", "x"):
        swapped(scan, f"{name}_f", f"{name}_b")


def rows_of_the_other_direction(model: onnx.ModelProto) -> None:
    swapped(fused_node(model, "BiSelectiveScan", 1), "x_f", "x_b")


def skips_of_the_other_direction(model: onnx.ModelProto) -> None:
    swapped(fused_node(model, "BiSelectiveScan"), "D_f", "D_b")


def fused_softplus_forgotten(model: onnx.ModelProto) -> None:
    fused_node(model, "BiSelectiveScan").attribute[0].i = 0


def the_scans_own_input_is_the_gate(model: onnx.ModelProto) -> None:
    scan = fused_node(model, "BiSelectiveScan")
    scan.input[schema.BI_SCAN.inputs.index("z")] = scan.input[0]


def fused_taps_reversed(model: onnx.ModelProto) -> None:
    change(model, fused_node(model, "BiCausalConv1d").input[schema.BI_CONV.inputs.index("weight_b")], lambda w: w[::-1])


def fused_epsilon_forgotten(model: onnx.ModelProto) -> None:
    fused_node(model, "AddRMSNorm").attribute[0].f = 0.1


def last_residual(model: onnx.ModelProto) -> onnx.NodeProto:
    (gather,) = (n for n in model.graph.node if n.op_type == "Gather" and n.input[0] == "layers.1/Add")
    return gather


def residual_of_a_layer_before(model: onnx.ModelProto) -> None:
    last_residual(model).input[0] = fused_node(model, "AddRMSNorm", 0).input[1]


def fused_token_is_the_next(model: onnx.ModelProto) -> None:
    """Of the residual only: the two Gathers no longer agree."""
    model.graph.initializer.append(numpy_helper.from_array(np.array(9), "next"))
    last_residual(model).input[1] = "next"


def fused_body_runs_forward_twice(model: onnx.ModelProto) -> None:
    (body,) = (f for f in model.functions if f.name == "BiSelectiveScan")
    for attribute in (a for node in body.node for a in node.attribute if a.name == "reverse"):
        attribute.i = 0


FUSED_FAULTS: tuple[Fault, ...] = (
    directions_swapped, rows_of_the_other_direction, skips_of_the_other_direction, fused_softplus_forgotten,
    the_scans_own_input_is_the_gate, fused_taps_reversed, fused_epsilon_forgotten, residual_of_a_layer_before,
    fused_token_is_the_next, fused_body_runs_forward_twice,
)  # fmt: skip


def damaged(source: Path, target: Path, fault: Fault) -> Path:
    model = onnx.load(source)
    fault(model)
    onnx.save(model, target)
    return target


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_fault_is_found_in_fp32(
    fault: Fault, checkpoint: Path, export: Callable[..., Path], tmp_path: Path, no_library: None
) -> None:
    bad = damaged(export(fusion="none"), tmp_path / "bad.onnx", fault)
    result = command(checkpoint, bad, "--samples", 2)
    assert result.exit_code == 1, result.output
    assert "FAIL" in result.stdout


@pytest.mark.parametrize("fault", FUSED_FAULTS, ids=lambda f: f.__name__)
def test_a_fault_is_found_in_a_fused_file(
    fault: Fault, checkpoint: Path, export: Callable[..., Path], tmp_path: Path
) -> None:
    bad = damaged(export(fusion="full"), tmp_path / "bad.onnx", fault)
    assert not in_body(bad, checkpoint).passed


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(
    "fault",
    [sign_of_a_weight, backward_scan_runs_forward, positions_shifted_by_a_token, delta_bias_zeroed_in_a_layer,
     wrong_class_token, classes_swapped],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_a_fault_is_found_in_low_types(
    fault: Fault, precision: str, checkpoint: Path, export: Callable[..., Path], tmp_path: Path
) -> None:
    bad = damaged(export(precision=precision, fusion="none"), tmp_path / "bad.onnx", fault)
    assert not in_body(bad, checkpoint).passed


@pytest.mark.parametrize("fault", [sign_of_a_weight, backward_scan_runs_forward], ids=lambda f: f.__name__)
def test_a_fault_is_found_with_the_library(
    fault: Fault, checkpoint: Path, export: Callable[..., Path], tmp_path: Path, with_library: None
) -> None:
    bad = damaged(export(fusion="none"), tmp_path / "bad.onnx", fault)
    assert not parity(bad, checkpoint, runtimes=(LIBRARY,), samples_each=2).passed


def identity_body(model: onnx.ModelProto) -> None:
    (function,) = model.functions
    del function.node[:]
    function.node.append(helper.make_node("Identity", ["u"], ["y"]))


def body_without_reverse(model: onnx.ModelProto) -> None:
    """The body ignores the attribute: a direction is lost without the library, and only there."""
    (function,) = model.functions
    (r,) = (n for n in function.node if n.output[0] == "r")
    del r.attribute[:]
    r.attribute.append(helper.make_attribute("value_int", 0))


@pytest.mark.parametrize("fault", [identity_body, body_without_reverse], ids=lambda f: f.__name__)
def test_a_wrong_body_is_found_though_the_library_hides_it(
    fault: Fault, checkpoint: Path, export: Callable[..., Path], tmp_path: Path, with_library: None
) -> None:
    bad = damaged(export(fusion="none"), tmp_path / "bad.onnx", fault)
    report = parity(bad, checkpoint, samples_each=2)
    assert [row.passed for row in report.rows] == [True, True, False, False]
    assert not report.passed and "function body" in report.summary()
    assert command(checkpoint, bad, "--samples", 2).exit_code == 1


def test_a_failure_says_what_where_and_by_how_much(
    checkpoint: Path, export: Callable[..., Path], tmp_path: Path, no_library: None
) -> None:
    bad = damaged(export(), tmp_path / "bad.onnx", one_percent_too_large)
    out = command(checkpoint, bad, "--samples", 2).stdout
    assert "logits: max abs" in out and "> 1e-03" in out and "random images" in out and "function body" in out
    report = in_body(bad, checkpoint)
    assert "logits on random images in ONNX Runtime" in report.summary() and "rel rms" in report.summary()


@pytest.mark.parametrize("fault", [output_renamed, output_nan, extra_output], ids=lambda f: f.__name__)
def test_json_of_a_failure_is_strict_json(
    fault: Fault, checkpoint: Path, export: Callable[..., Path], tmp_path: Path, no_library: None
) -> None:
    bad = damaged(export(), tmp_path / "bad.onnx", fault)
    result = command(checkpoint, bad, "--samples", 2, "--json")
    assert result.exit_code == 1

    def no_such(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    report = json.loads(result.stdout, parse_constant=no_such)
    assert report["passed"] is False and not all(row["passed"] for row in report["rows"])
    failing = next(row for row in report["rows"] if not row["passed"])
    assert failing["failures"] and failing["tolerance"]["max_abs"] == 1e-3


def test_a_report_without_rows_has_failed() -> None:
    empty = ParityReport("x", "fp32", "PyTorch", ())
    assert not empty.passed and empty.summary() == "nothing was compared"


# Refusals.


def test_the_wrong_checkpoint_is_refused(checkpoint: Path, export: Callable[..., Path], tmp_path: Path) -> None:
    other = write_small(tmp_path / "other.pth", seed=1)
    with pytest.raises(ModelFileError, match="was not exported from") as caught:
        in_body(export(), other)
    assert caught.value.hint
    assert command(other, export()).exit_code == 2


def test_a_file_changed_after_its_manifest_was_written_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    result = export_checkpoint(checkpoint, tmp_path / "small.vim")
    damaged(result.model, result.model, classes_swapped)
    with pytest.raises(ModelFileError, match="SHA-256 differs"):
        in_body(result.model, checkpoint)
    assert command(checkpoint, result.path).exit_code == 2


@pytest.mark.parametrize("what", ["not onnx", "a foreign onnx", "no metadata", "missing"])
def test_files_that_are_no_artifact(what: str, checkpoint: Path, export: Callable[..., Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    if what == "not onnx":
        bad.write_bytes(b"\x00not a protobuf" * 10)
    elif what == "a foreign onnx":
        node = helper.make_node("Identity", ["x"], ["y"])
        x, y = (helper.make_tensor_value_info(n, 1, [1]) for n in "xy")
        onnx.save(helper.make_model(helper.make_graph([node], "g", [x], [y])), bad)
    elif what == "no metadata":
        damaged(export(), bad, lambda model: model.ClearField("metadata_props"))
    result = command(checkpoint, bad)
    assert result.exit_code == 2 and result.stderr.startswith("Error: ") and "Try: " in result.stderr, result.output
    words = {"not onnx": "not an ONNX file", "a foreign onnx": "no vim:: operator", "missing": "does not exist"}
    assert words.get(what, "does not say what it is") in result.stderr


def test_without_the_library_the_body_is_compared_and_that_is_said(
    checkpoint: Path, export: Callable[..., Path], no_library: None
) -> None:
    report = parity(export(), checkpoint, samples_each=2)
    assert report.passed and len(report.rows) == 2
    ((runtime, reason),) = report.skipped
    assert runtime == LIBRARY and "is not installed" in reason
    result = command(checkpoint, export(), "--samples", 2)
    assert result.exit_code == 0 and f"not compared: {LIBRARY}: " in result.stdout
    skipped = json.loads(command(checkpoint, export(), "--samples", 2, "--json").stdout)["skipped"]
    assert skipped[0]["runtime"] == runtime and skipped[0]["reason"] == reason


def test_the_library_asked_for_by_name_and_not_there_is_an_error(
    checkpoint: Path, export: Callable[..., Path], no_library: None
) -> None:
    with pytest.raises(RuntimeMissing):
        parity(export(), checkpoint, runtimes=(LIBRARY,))
    result = command(checkpoint, export(), "--runtime", LIBRARY)
    assert result.exit_code == 3 and "is not installed" in result.stderr and result.stdout == ""


def test_a_library_variable_that_names_no_file_is_not_passed_over(
    checkpoint: Path, export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(library.ENVIRONMENT, str(tmp_path / "gone.so"))
    result = command(checkpoint, export(), "--samples", 2)
    assert result.exit_code == 3 and "gone.so" in result.stderr


def test_a_file_without_a_body_is_compared_with_the_library_only(
    checkpoint: Path, export: Callable[..., Path], with_library: None
) -> None:
    report = parity(export(fallback="none"), checkpoint, samples_each=2)
    assert report.passed and len(report.rows) == 2 and report.rows[0].runtime == LIBRARY
    assert report.skipped == ((BODY, "the file carries no function body"),)
    assert command(checkpoint, export(fallback="none"), "--runtime", BODY).exit_code == 3


def test_a_file_without_a_body_cannot_be_checked_without_the_library(
    checkpoint: Path, export: Callable[..., Path], no_library: None
) -> None:
    result = command(checkpoint, export(fallback="none"))
    assert result.exit_code == 3 and "is not installed" in result.stderr


def test_a_body_lost_on_the_way_is_an_error_not_a_pass(
    checkpoint: Path, export: Callable[..., Path], tmp_path: Path, with_library: None
) -> None:
    """The metadata promise a body; somebody's tool dropped it."""
    bad = damaged(export(), tmp_path / "bad.onnx", lambda model: model.ClearField("functions"))
    result = command(checkpoint, bad, "--samples", 2)
    assert result.exit_code == 2, result.output
    assert "says that it carries a function body (scan), and has none" in result.stderr


def test_a_library_that_does_not_load_is_not_passed_over(
    checkpoint: Path, export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(library.ENVIRONMENT, raising=False)
    monkeypatch.setattr(library, "_folders", lambda: iter([tmp_path]))
    (tmp_path / library.LIBRARY).write_bytes(b"not a library")
    result = command(checkpoint, export(), "--samples", 2)
    assert result.exit_code == 3 and "could not load the op library" in result.stderr


def test_a_runtime_too_old_for_linear_attention_says_so(checkpoint: Path, export: Callable[..., Path]) -> None:
    old = os.environ.get("VIMDEPLOY_ORT_OLD")
    if not old or not Path(old).is_dir():
        pytest.skip("VIMDEPLOY_ORT_OLD names no folder with ONNX Runtime 1.21")
    model = export(fallback="linear-attention")
    result = subprocess.run(
        [sys.executable, "-m", "vimdeploy", "verify", "parity", str(checkpoint), str(model), "--runtime", BODY],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([old, str(Path(vimdeploy.__file__).parent.parent)])},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 3, result.stderr
    assert "does not know com.microsoft.LinearAttention" in result.stderr and "--fallback scan" in result.stderr


def test_an_unknown_runtime_is_refused_with_the_names(checkpoint: Path, export: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="tensorflow") as caught:
        parity(export(), checkpoint, runtimes=("tensorflow",))
    assert caught.value.hint == f"runtimes: {LIBRARY}, {BODY}, onnxruntime-cuda, torch-cuda, tensorrt"


@pytest.mark.parametrize("content", ["missing", "empty", "no image"])
def test_images_that_are_none(content: str, checkpoint: Path, export: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "images"
    if content != "missing":
        source.mkdir()
    if content == "no image":
        (source / "a.png").write_bytes(b"not a picture")
    with pytest.raises(ImageError) as caught:
        in_body(export(), checkpoint, images=source)
    assert caught.value.hint


def test_the_reference_is_not_frozen_by_being_compared(checkpoint: Path, export: Callable[..., Path]) -> None:
    """The exporter folds constants; the reference is what the checkpoint says, read anew."""
    model = load_exported(read_info(export()), export(), checkpoint)
    assert hasattr(model.layers[0].mixer, "A_log") and not hasattr(model.layers[0].mixer, "A")
