"""quantize/recipe.py on the shipped model: what int8 costs, with and without outlier channels, and what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from outliers import CHANNELS

from vimdeploy import bundle
from vimdeploy.errors import CheckFailed, ModelFileError, UsageError
from vimdeploy.evaluate import predict
from vimdeploy.passes.projections import projections
from vimdeploy.quantize import recipe
from vimdeploy.quantize.calibration import read_calibration
from vimdeploy.quantize.images import load_images
from vimdeploy.quantize.recipe import QuantizeOptions, QuantizeResult, quantize_model, read_keep_fp
from vimdeploy.quantize.write import int8_kernels
from vimdeploy.runtimes import open_session
from vimdeploy.runtimes.base import Session
from vimdeploy.verify.agreement import Agreement, agreement

ROOT = Path(__file__).resolve().parents[2]
#: What int8 may cost on the 1,000 held-out images, in points of top-1.
BUDGET = 0.5
WAYS: dict[str, dict[str, Any]] = {
    "ours": {},
    "not smoothed": {"smooth": False},
    "naive": {"smooth": False, "method": "minmax"},
}


@pytest.fixture(scope="module")
def made(digits: Path, outliers: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(model, way) -> what was written for it, once; the budget is not enforced, so that what fails is there to see."""
    done: dict[tuple[str, str], QuantizeResult] = {}

    def make(model: str, way: str) -> QuantizeResult:
        if (model, way) not in done:
            source = {"clean": digits, "outliers": outliers}[model]
            out = tmp_path_factory.mktemp("made") / "model.int8.onnx"
            done[model, way] = quantize_model(source, out, QuantizeOptions("digits", max_drop=100, **WAYS[way]))
        return done[model, way]

    return make


@pytest.fixture(scope="module")
def held_out(digits: Path) -> Callable[[Path], Agreement]:
    """A file on the 1,000 held-out images, against the model as exported."""
    images = load_images("digits-val", bundle.read_info(digits), limit=None)
    with open_session(digits) as session:
        reference = predict_all(session, images.batch)

    def compare(file: Path) -> Agreement:
        with open_session(file) as session:
            return agreement(predict_all(session, images.batch), reference, images.targets)

    return compare


def predict_all(session: Session, batch: np.ndarray) -> np.ndarray:
    return np.concatenate([predict(session, batch[i : i + 50]) for i in range(0, len(batch), 50)])


def holds(found: Agreement) -> bool:
    """What int8 must hold on the held-out images."""
    return found.points <= BUDGET and found.agreement >= 0.995 and found.sqnr_db > 28


def test_outliers_change_nothing_in_fp32(outliers: Path, held_out: Callable[[Path], Agreement]) -> None:
    found = held_out(outliers)
    assert found.n == 1000 and found.agreement == 1 and found.sqnr_db > 100 and CHANNELS == 4


@pytest.mark.parametrize("model", ["clean", "outliers"])
def test_our_int8_holds_on_held_out_images(model: str, made: Any, held_out: Callable[[Path], Agreement]) -> None:
    result = made(model, "ours")
    found = held_out(result.path)
    assert holds(found)
    assert result.report["keep_fp"] == []  # with every layer in int8
    # The accuracy in the report is of the images it was calibrated on, and no better than these by much.
    assert abs(result.report["accuracy"]["sqnr_db"] - found.sqnr_db) < 6


@pytest.mark.parametrize("way", ["naive", "not smoothed"])
def test_without_smoothing_outliers_break_it(way: str, made: Any, held_out: Callable[[Path], Agreement]) -> None:
    found = held_out(made("outliers", way).path)
    assert not holds(found) and found.sqnr_db < 22
    if way == "naive":
        assert found.points > BUDGET and found.interval[0] > 0  # by more than chance


def test_naive_int8_breaks_it_without_outliers_too(made: Any, held_out: Callable[[Path], Agreement]) -> None:
    found = held_out(made("clean", "naive").path)
    assert not holds(found) and found.points > BUDGET


def test_layers_stay_in_fp32_until_the_budget_holds(outliers: Path, tmp_path: Path) -> None:
    """Naive int8 of the model with outliers, which all in int8 costs points: the search gets them back."""
    options = QuantizeOptions("digits", method="minmax", smooth=False, max_drop=0.3, limit=160)
    result = quantize_model(outliers, tmp_path / "searched.int8.onnx", options)
    kept = result.report["keep_fp"]
    assert 1 <= len(kept) <= 8
    assert result.report["accuracy"]["points"] <= 0.3
    entries = {entry["name"]: entry for entry in result.report["layers"]}
    # The worst by the sweep, all of them, and they are fp32 in the file.
    worst = sorted(entries, key=lambda name: entries[name]["output_sqnr_db"])[: len(kept)]
    assert set(kept) == set(worst) and all(entries[name]["in"] == "fp32" for name in kept)
    stored = ir.load(result.path).graph.initializers
    for name, entry in entries.items():
        assert (f"{name}.weight.T" in stored) == (entry["in"] == "fp32")
        assert (f"{name}.weight:int8" in stored) == (entry["in"] == "int8")
    # Given back, the choice is taken as it is.
    names = read_keep_fp(result.report_file)
    options = QuantizeOptions("digits", method="minmax", smooth=False, keep_fp=names, search=False, limit=160)
    again = quantize_model(outliers, tmp_path / "again.int8.onnx", options)
    assert again.report["keep_fp"] == kept
    np.testing.assert_array_equal(
        onnx.numpy_helper.to_array(
            next(t for t in onnx.load(again.path).graph.initializer if t.name.endswith("weight:int8"))
        ),
        onnx.numpy_helper.to_array(
            next(t for t in onnx.load(result.path).graph.initializer if t.name.endswith("weight:int8"))
        ),
    )


def test_onnx_runtime_computes_the_projections_in_int8(made: Any, digits: Path) -> None:
    """Q/DQ pairs that do not fuse would be slower than fp32 and as inexact as int8."""
    kernels = int8_kernels(made("clean", "ours").path)
    assert kernels is not None and kernels == made("clean", "ours").report["onnxruntime_products"]
    # The last out_proj reads one token; with the function body, ONNX Runtime takes it for a Gemm, which it has in fp32.
    assert kernels["int8"] >= 15 and kernels["int8"] + kernels["fp32"] == 50
    assert int8_kernels(digits) == {"int8": 0, "fp32": 50}


def test_the_cache_that_comes_along_is_what_calibration_finds(
    made: Any, digits: Path, tmp_path: Path, held_out: Callable[[Path], Agreement]
) -> None:
    found, shipped = read_calibration(made("clean", "ours").cache), ROOT / "calib" / "digits" / "vim_digits.calib.json"
    kept = read_calibration(shipped)
    assert kept.model == found.model and kept.images == found.images and kept.keep_fp == found.keep_fp
    assert kept.layers.keys() == found.layers.keys()
    for name, choice in kept.layers.items():
        other = found.layers[name]
        # Sums in another order may tip the scales between two ways that are equally good.
        assert choice.sqnr_db == pytest.approx(other.sqnr_db, abs=0.3)
        if (choice.method, choice.alpha) == (other.method, other.alpha):
            assert choice.bound == pytest.approx(other.bound, rel=2e-3)
    result = quantize_model(digits, tmp_path / "cached.int8.onnx", QuantizeOptions(shipped))
    assert holds(held_out(result.path))


@pytest.mark.parametrize(
    ("cache", "model"), [("outliers", "outliers"), ("outliers-naive", "outliers"), ("digits-naive", "clean")]
)
def test_the_caches_for_cards_are_of_the_models_they_are_for(
    cache: str, model: str, made: Any, digits: Path, outliers: Path
) -> None:
    """tests/gpu/int8_trt85.py quantizes by them where neither images nor ONNX Runtime need be."""
    kept = read_calibration(ROOT / "tests" / "gpu" / "int8" / f"{cache}.calib.json")
    source = {"clean": digits, "outliers": outliers}[model]
    kept.check(bundle.read_info(source), projections(ir.load(source).graph), cache)
    found = read_calibration(made(model, "naive" if "naive" in cache else "ours").cache)
    assert kept.images == found.images and kept.keep_fp == ()
    for name, choice in kept.layers.items():
        assert choice.sqnr_db == pytest.approx(found.layers[name].sqnr_db, abs=0.3)


def test_what_is_written_says_what_it_is(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "digits.vim"
    folder.mkdir()
    for name in ("model.onnx", "manifest.json"):
        (folder / name).write_bytes((digits.parent / name).read_bytes())
    heard: list[tuple[str, int, int]] = []
    result = quantize_model(
        folder / "model.onnx", None, QuantizeOptions("digits", limit=32), tell=lambda *said: heard.append(said)
    )
    assert result.path == folder / "model.int8.onnx"
    names = {"model.onnx", "manifest.json", "model.int8.onnx", "model.int8.json", "model.calib.json"}
    assert {path.name for path in folder.iterdir()} == names
    manifest = bundle.read_manifest(folder / "model.onnx")["files"]
    assert manifest["model.int8.onnx"]["made_by"] == "quantize" and set(manifest) == names - {"manifest.json"}
    for name, entry in manifest.items():
        assert entry["sha256"] == bundle.sha256_of(folder / name)
    info, source = bundle.read_info(result.path), bundle.read_info(folder / "model.onnx")
    assert info.kind == "int8" and source.kind == "fp32" and not source.quantization
    said = dict(info.quantization)
    assert said.pop("sqnr_db") == pytest.approx(result.report["accuracy"]["sqnr_db"], abs=0.01)
    cache = json.loads(result.cache.read_text())
    assert said == {
        "int8": 16,
        "keep_fp": [],
        "method": "auto",
        "calibrated_on": {"images": 32, "sha256": cache["images"]["sha256"]},
        "source_sha256": bundle.sha256_of(folder / "model.onnx"),
    }
    assert cache["images"]["source"] == "digits"
    assert (info.checkpoint_sha256, info.config, info.labels) == (
        source.checkpoint_sha256,
        source.config,
        source.labels,
    )
    assert json.loads(result.report_file.read_text()) == result.report
    assert result.report["bytes"]["int8"] < 0.65 * result.report["bytes"]["fp32"]
    onnx.checker.check_model(str(result.path))
    assert {"reading images", "running the calibration images", "each layer in int8 alone"} <= {
        text for text, _, _ in heard
    }
    assert all(done <= total for _, done, total in heard)


def test_a_model_that_fails_leaves_nothing(
    small: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file falls short of what the switches promised, however many layers stay out."""
    lost = Agreement(24, "agreement", 30.0, (10.0, 50.0), None, None, 0.7, 9.0)
    ran: list[Path] = []
    monkeypatch.setattr(recipe, "run_file", lambda file, images, reference: ran.append(file) or lost)
    out = tmp_path / "new" / "model.int8.onnx"
    with pytest.raises(CheckFailed, match=r"int8 costs .* points of top-1 with 2 of 4 layers left in fp32, and 20 are"):
        quantize_model(small, out, QuantizeOptions(pictures, max_drop=20))
    assert len(ran) == 3  # with none, one and two layers left out
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "guess"}, "method 'guess' is not one of auto, minmax, percentile, entropy"),
        ({"include": ("conv",)}, "'conv' cannot be quantized besides the rest"),
        ({"max_drop": -1}, "--max-drop is in points of top-1, not -1"),
        ({"limit": 0}, "at least one image is needed"),
        ({"keep_fp": ("layers.0.mixer.in",)}, "there is no layer 'layers.0.mixer.in' to keep in fp32"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], said: str, small: Path, pictures: Path) -> None:
    with pytest.raises(UsageError, match=said):
        quantize_model(small, None, QuantizeOptions(pictures, **options))
    assert [path.name for path in small.parent.iterdir()] == ["model.onnx"]


def test_keeping_every_layer_is_refused(small: Path, pictures: Path) -> None:
    names = tuple(f"layers.{i}.mixer.{kind}" for i in range(2) for kind in ("in_proj", "out_proj"))
    with pytest.raises(UsageError, match="every layer is to stay in fp32"):
        quantize_model(small, None, QuantizeOptions(pictures, keep_fp=names, search=False))


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_every_method_makes_a_file(method: str, small: Path, pictures: Path) -> None:
    every = () if method == "entropy" else ("x_proj", "dt_proj", "patch_embed", "head")  # that one takes its time
    result = quantize_model(small, None, QuantizeOptions(pictures, method=method, max_drop=100, include=every))
    assert {entry["method"].partition(" ")[0] for entry in result.report["layers"]} == {method}
    assert {entry["kind"] for entry in result.report["layers"]} == {"in_proj", "out_proj", *every}
    with open_session(result.path) as session:
        assert np.isfinite(session.run(np.zeros((2, 3, 32, 32), np.float32))["logits"]).all()


def test_what_is_quantized_or_typed_already_is_refused(small: Path, pictures: Path, tmp_path: Path) -> None:
    made = quantize_model(small, None, QuantizeOptions(pictures, max_drop=100))
    with pytest.raises(UsageError, match="is int8 already"):
        quantize_model(made.path, None, QuantizeOptions(pictures))
    stripped = ir.load(made.path)  # by a tool that says nothing of it
    del stripped.metadata_props["vimdeploy.quantization"]
    ir.save(stripped, tmp_path / "foreign.onnx")
    with pytest.raises(UsageError, match="holds QuantizeLinear nodes already"):
        quantize_model(tmp_path / "foreign.onnx", None, QuantizeOptions(pictures))
    typed = ir.load(small)
    typed.metadata_props["vimdeploy.precision"] = "fp16"
    ir.save(typed, tmp_path / "typed.onnx")
    with pytest.raises(UsageError, match="is fp16, and int8 is made of fp32"):
        quantize_model(tmp_path / "typed.onnx", None, QuantizeOptions(pictures))


@pytest.mark.parametrize(
    ("out", "said"),
    [("x.plan", "does not end in .onnx"), ("folder.onnx", "is a folder"), ("model.onnx", "is the model itself")],
)
def test_a_place_that_cannot_be_is_refused(out: str, said: str, small: Path, pictures: Path) -> None:
    (small.parent / "folder.onnx").mkdir()
    with pytest.raises(UsageError, match=said):
        quantize_model(small, small.parent / out, QuantizeOptions(pictures))


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ('{"keep_fp": ["a", "b"]}', ("a", "b")),
        ('["a"]', ("a",)),
        ("a\n\n  b \n", ("a", "b")),
        ("", ()),
    ],
)
def test_layers_to_keep_are_read_from_reports_and_lists(content: str, names: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "keep").write_text(content)
    assert read_keep_fp(tmp_path / "keep") == names


@pytest.mark.parametrize("content", ['{"layers": []}', '{"keep_fp": 3}', "[1]", "7"])
def test_a_file_without_such_a_list_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "keep").write_text(content)
    with pytest.raises(UsageError, match="holds no list keep_fp"):
        read_keep_fp(tmp_path / "keep")
    with pytest.raises(UsageError, match="is not a file"):
        read_keep_fp(tmp_path / "none")


def test_a_changed_model_is_noticed(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "digits.vim"
    folder.mkdir()
    (folder / "manifest.json").write_bytes((digits.parent / "manifest.json").read_bytes())
    (folder / "model.onnx").write_bytes(digits.read_bytes() + b"\x00")
    with pytest.raises(ModelFileError):
        quantize_model(folder / "model.onnx", None, QuantizeOptions("digits"))
