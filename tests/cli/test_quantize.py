"""`vimdeploy quantize`, and int8 in `build-engine`, `eval` and `verify parity`, from the command line's outside."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result
from official import write_small
from PIL import Image

from vimdeploy.cli.main import cli
from vimdeploy.cli.quantize import METHODS, OPTIONAL_KINDS
from vimdeploy.engines.capabilities import RTX, import_runtime
from vimdeploy.errors import RuntimeMissing
from vimdeploy.export.exporter import ExportOptions, export_checkpoint
from vimdeploy.passes import projections
from vimdeploy.quantize import choose


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small.pth, small.vim and 20 pictures in five class folders."""
    folder = tmp_path_factory.mktemp("made")
    export_checkpoint(write_small(folder / "small.pth"), folder / "small.vim", ExportOptions())
    generator = np.random.default_rng(0)
    for i in range(20):
        place = folder / "pictures" / "abcde"[i % 5]
        place.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(place / f"{i:02d}.png")
    return folder


@pytest.fixture(autouse=True)
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test in a folder of its own with the same in it."""
    import shutil

    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VIMDEPLOY_CALIB", raising=False)


def invoke(*args: object) -> Result:
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(*args: object, code: int = 2) -> str:
    """What a refused command says; it leaves everything as it was."""
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    result = invoke(*args)
    assert result.exit_code == code, result.output
    assert result.stderr.count("Error: ") == 1 and "Traceback" not in result.output and result.stdout == ""
    assert "Try: " in result.stderr
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    return " ".join(result.stderr.split())


QUANTIZE = ("quantize", "--calib", "pictures", "--max-drop", 100)


def test_help_names_every_option_and_choice() -> None:
    text = invoke("quantize", "--help").stdout
    options = "--calib --output --max-drop --val --method --smooth --no-smooth --include --keep-fp --images --json"
    for option in options.split():
        assert option in text, option
    assert tuple(OPTIONAL_KINDS) == projections.OPTIONAL_KINDS and tuple(METHODS) == choose.METHODS
    assert "quantize" in invoke("--help").stdout


def test_the_whole_way() -> None:
    result = invoke(*QUANTIZE)
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    assert "calibrated on 20 images of " in words and "int8 2 in_proj, 2 out_proj fp32 no layer had to stay" in words
    assert "most sensitive layers." in words and " -> " in words and "products in int8" in words
    assert "Wrote small.vim/model.int8.onnx, its report and its calibration. Next:" in words
    assert {p.name for p in Path("small.vim").iterdir()} == {
        "model.onnx", "manifest.json", "model.int8.onnx", "model.int8.json", "model.calib.json"
    }  # fmt: skip
    # eval, beside the file it was made of
    result = invoke("eval", "small.vim/model.int8.onnx", "pictures", "--against", "small.vim", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    report = json.loads(Path("small.vim/model.int8.json").read_text())
    assert found["against"]["by"] == "labels" and found["against"]["n"] == 20
    assert found["top1"] == found["against"]["top1"] == report["accuracy"]["top1"]
    assert found["against"]["sqnr_db"] == pytest.approx(report["accuracy"]["sqnr_db"], abs=0.5)
    assert len(found["against"]["interval"]) == 2
    text = invoke("eval", "small.vim/model.int8.onnx", "pictures", "--against", "small.vim").stdout
    assert "against small.vim" in text and "95 % interval" in text and "SQNR" in text
    # parity: the int8 file beside the fp32 one, on real images; left out, and said so, without
    result = invoke("verify", "parity", "--images", "pictures", "--samples", 20, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    int8 = [row for row in rows if row["precision"] == "int8"]
    assert {row["file"] for row in int8} == {"model.int8.onnx"} and {row["images"] for row in int8} == {"real"}
    assert {row["precision"] for row in rows} == {"fp32", "int8"}
    recorded = report["accuracy"]["sqnr_db"]
    for row in int8:
        assert row["errors"]["sqnr_db"] == pytest.approx(recorded, abs=1)
        assert row["tolerance"]["rel_rms"] == pytest.approx(2 * 10 ** (-recorded / 20), rel=1e-2)
    result = invoke("verify", "parity", "small.vim")
    assert result.exit_code == 0 and "not compared: model.int8.onnx: int8 is compared on images like" in result.stdout
    assert "is int8, and says what it should on images like" in refused(
        "verify", "parity", "small.pth", "small.vim/model.int8.onnx"
    )
    result = invoke(
        "verify", "parity", "small.pth", "small.vim/model.int8.onnx", "--images", "pictures", "--samples", 20
    )
    assert result.exit_code == 0 and "SQNR" in result.stdout and "(int8)" in result.stdout
    assert "is int8 already" in refused("quantize", "small.vim/model.int8.onnx", "--calib", "pictures")


def test_an_int8_file_that_lost_its_weights_fails_parity() -> None:
    assert invoke(*QUANTIZE, "-o", "loose.onnx").exit_code == 0
    model = ir.load("loose.onnx")
    levels = model.graph.initializers["layers.0.mixer.out_proj.weight:int8"]
    levels.const_value = ir.tensor(np.roll(levels.const_value.numpy(), 1, axis=0), name=levels.name)
    ir.save(model, "loose.onnx")
    result = invoke("verify", "parity", "small.pth", "loose.onnx", "--images", "pictures")
    assert result.exit_code == 1 and "FAIL loose.onnx, onnxruntime" in result.stdout and "rel rms" in result.stdout


def test_json_and_a_second_time_from_the_cache() -> None:
    result = invoke(*QUANTIZE, "--json", "-o", "a.int8.onnx", "--include", "x_proj", "--method", "percentile")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["path"] == "a.int8.onnx" and report["cache"] == "a.calib.json"
    assert {entry["kind"] for entry in report["layers"]} == {"in_proj", "out_proj", "x_proj"}
    assert Path("a.int8.json").is_file()
    result = invoke("quantize", "--calib", "a.calib.json", "-o", "b.int8.onnx")
    assert result.exit_code == 0 and "accuracy not measured: no images were given" in " ".join(result.stdout.split())
    result = invoke("quantize", "--calib", "a.calib.json", "-o", "c.int8.onnx", "--val", "pictures", "--json")
    assert json.loads(result.stdout)["accuracy"] == report["accuracy"]
    Path("keep.txt").write_text("layers.1.mixer.out_proj\n")
    result = invoke(*QUANTIZE, "-o", "d.int8.onnx", "--keep-fp", "keep.txt", "--json")
    assert json.loads(result.stdout)["keep_fp"] == ["layers.1.mixer.out_proj"]
    assert "fp32 layers.1.mixer.out_proj" in " ".join(
        invoke(*QUANTIZE, "-o", "e.onnx", "--keep-fp", "d.int8.json").stdout.split()
    )


def test_bad_input_is_refused_in_a_sentence() -> None:
    assert "Missing option '--calib'" in invoke("quantize").stderr
    assert "holds 4 images, too few" in refused("quantize", "--calib", "pictures/b")
    # Unlabelled images calibrate, but accuracy by labels needs labels.
    assert "is flat" in refused("quantize", "--calib", "pictures", "--val", "pictures/b")
    assert "neither a folder nor a calibration set" in refused("quantize", "--calib", "nowhere")
    assert "there is no layer 'x'" in refused(*QUANTIZE, "--keep-fp", _write("keep.txt", "x"))
    assert "is not a calibration cache" in refused("quantize", "--calib", _write("bad.json", "{}"))
    assert "is an engine already" in refused("quantize", _write("x.plan", ""), "--calib", "pictures")
    assert "Invalid value for '--method'" in invoke("quantize", "--calib", "pictures", "--method", "mean").stderr
    assert "does not end in .onnx" in refused(*QUANTIZE, "-o", "x.plan2")


def _write(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


def test_int8_in_build_engine_needs_a_quantized_file_or_images() -> None:
    assert "is not quantized yet Try: say on which images: --calib FOLDER" in refused(
        "build-engine", "--int8", "--runtime", RTX
    )
    assert "--calib is for --int8" in refused("build-engine", "--calib", "pictures", "--runtime", RTX)
    assert invoke(*QUANTIZE).exit_code == 0
    said = refused("build-engine", "small.vim/model.int8.onnx", "--int8", "--calib", "pictures", "--runtime", RTX)
    assert "is int8 already" in said
    model = ir.load("small.vim/model.onnx")
    model.doc_string = "another file of the same network"
    ir.save(model, "small.vim/model.onnx")
    assert "was made of another model.onnx" in refused("build-engine", "--int8", "--runtime", RTX)


def test_build_engine_quantizes_first_and_takes_what_is_there() -> None:
    try:
        import_runtime(RTX)
    except RuntimeMissing as missing:
        pytest.skip(missing.message)
    result = invoke("build-engine", "--int8", "--calib", "pictures", "--runtime", RTX, "--max-batch", 2)
    assert result.exit_code == 0, result.output
    assert "Quantized to small.vim/model.int8.onnx: top-1" in result.stderr
    before = Path("small.vim/model.int8.onnx").read_bytes()
    result = invoke("build-engine", "--int8", "--runtime", RTX, "--max-batch", 2)  # finds it
    assert result.exit_code == 0, result.output
    assert "int8, the rest fp16, seen in the network: projections 10 in fp16, 4 in int8" in " ".join(
        result.stdout.split()
    )
    assert "Wrote small.vim/model.int8.plan" in result.stdout
    assert Path("small.vim/model.int8.onnx").read_bytes() == before
    side = json.loads(Path("small.vim/model.int8.plan.json").read_text())
    assert side["onnx"]["file"] == "model.int8.onnx" and "vimdeploy.quantization" in side["model"]
