"""`vimdeploy run` and `vimdeploy eval`, from the command line's outside: output, exit codes, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image
from tiny_onnx import COLOURS, tiny_info, write_tiny_onnx

from vimdeploy.cli.main import cli
from vimdeploy.evaluate import predict, wilson
from vimdeploy.runtimes import library, open_session

LABELS = tuple(COLOURS)


@pytest.fixture(autouse=True)
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """These tests are about the commands, so all hosts run the same body."""
    monkeypatch.delenv(library.ENVIRONMENT, raising=False)
    monkeypatch.setattr(library, "_folders", lambda: iter([tmp_path / "no_lib"]))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_onnx(tmp_path / "tiny.vim" / "model.onnx", tiny_info(labels=LABELS)).parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images in each class folder; one of the blue ones is red."""
    for name, colour in COLOURS.items():
        for i in range(4):
            put(tmp_path / "data" / name / f"{i}.png", COLOURS["red"] if (name, i) == ("blue", 3) else colour)
    return tmp_path / "data"


def put(path: Path, colour: tuple[int, int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), colour).save(path)
    return path


def invoke(*args: object) -> Result:
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(*args: object, code: int = 2) -> str:
    """What a refused command writes to stderr: one error with its next step, nothing on stdout."""
    result = invoke(*args)
    assert result.exit_code == code, result.output
    assert result.stderr.count("Error: ") == 1 and "Traceback" not in result.output
    assert result.stdout == ""
    return " ".join(result.stderr.split())


def test_run_ranks_labels(model: Path, tmp_path: Path) -> None:
    images = [put(tmp_path / f"{name}.png", colour) for name, colour in COLOURS.items()]
    result = invoke("run", model, *images)
    assert result.exit_code == 0
    lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
    assert len(lines) == 3 * 4
    for i, name in enumerate(COLOURS):
        assert lines[4 * i] == str(images[i])
        assert "%" in lines[4 * i + 1] and lines[4 * i + 1].endswith(name)
    # Nothing falls back in silence.
    assert "function body" in result.stderr
    assert "function body" not in invoke("run", model, images[0], "--no-library").stderr


def test_run_json(model: Path, tmp_path: Path) -> None:
    image = put(tmp_path / "x.png", COLOURS["green"])
    result = invoke("run", model / "model.onnx", image, "--json", "--top-k", 2)
    report = json.loads(result.stdout)
    (entry,) = report["images"]
    assert entry["image"] == str(image)
    best, second = entry["predictions"]
    assert (best["label"], best["index"]) == ("green", 1)
    assert 0.9 < best["probability"] < 1 and best["probability"] > second["probability"]
    assert report["runtime"].startswith("onnxruntime ") and "function body" in report["notice"]


def test_run_without_labels_shows_numbers(tmp_path: Path) -> None:
    model = write_tiny_onnx(tmp_path / "m.onnx")
    report = json.loads(invoke("run", model, put(tmp_path / "x.png", COLOURS["blue"]), "--json").stdout)
    best = report["images"][0]["predictions"][0]
    assert (best["index"], best["label"]) == (2, "2")


def test_run_takes_the_one_folder_here(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "red.png", COLOURS["red"])
    monkeypatch.chdir(tmp_path)
    assert "red" in invoke("run", "red.png", "red.png").stdout
    Image.new("RGB", (32, 32), COLOURS["red"]).save(tmp_path / "red.gif")
    assert "red" in invoke("run", "red.gif").stdout
    write_tiny_onnx(tmp_path / "second.vim" / "model.onnx")
    assert "2 .vim folders" in refused("run", "red.png")


def test_labels_and_paths_are_printed_as_they_are(tmp_path: Path) -> None:
    model = write_tiny_onnx(tmp_path / "m.onnx", tiny_info(labels=("[red]", "[/b]", "c")))
    result = invoke("run", model, put(tmp_path / "[bold].png", COLOURS["red"]))
    assert "[red]" in result.stdout and "[bold].png" in result.stdout and "[/b]" in result.stdout


def test_run_refuses_images(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    assert "text.jpg is not an image" in refused("run", model, tmp_path / "text.jpg", "--no-library")
    whole = put(tmp_path / "whole.png", COLOURS["red"]).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:-30])
    assert "cut.png is damaged" in refused("run", model, tmp_path / "cut.png", "--no-library")
    assert "does not exist" in refused("run", model, tmp_path / "none.png", "--no-library")
    assert "is a folder" in refused("run", model, tmp_path, "--no-library")
    assert "no image to classify" in refused("run", model)


@pytest.mark.parametrize("output", ["features", "tokens"])
def test_run_refuses_models_that_do_not_classify(tmp_path: Path, output: str) -> None:
    model = write_tiny_onnx(tmp_path / "m.onnx", tiny_info(output=output))
    text = refused("run", model, tmp_path / "x.png", "--no-library")
    assert f"puts out {output}" in text and "--output logits" in text


@pytest.mark.parametrize("command", ["run", "eval"])
def test_bad_models(command: str, model: Path, folder: Path, tmp_path: Path) -> None:
    what = folder / "red" / "0.png" if command == "run" else folder
    assert "does not exist" in refused(command, tmp_path / "none.onnx", what)
    (tmp_path / "empty.vim").mkdir()
    assert "holds no model.onnx" in refused(command, tmp_path / "empty.vim", what)
    bare = write_tiny_onnx(tmp_path / "bare.onnx", body=False)
    assert "carries no function body" in refused(command, bare, what, "--no-library", code=3)
    assert "is not installed" in refused(command, bare, what, code=3)
    foreign = write_tiny_onnx(tmp_path / "foreign.onnx", op=False)
    assert "no vim:: operator" in refused(command, foreign, what)
    data = (model / "model.onnx").read_bytes()
    (model / "model.onnx").write_bytes(data[: len(data) // 2])
    refused(command, model, what)


@pytest.mark.parametrize("command", ["run", "eval"])
def test_runtime_not_installed(command: str, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    what = folder / "red" / "0.png" if command == "run" else folder
    text = refused(command, model, what, code=3)
    assert "ONNX Runtime is not installed" in text and "pip install 'vimdeploy[onnxruntime]'" in text


def test_eval_counts_by_name(model: Path, folder: Path) -> None:
    # Sorted, the folders are blue, green, red; the model's labels say otherwise and decide.
    report = json.loads(invoke("eval", model, folder, "--json", "--batch-size", 5).stdout)
    assert (report["n"], report["classes"], report["k"], report["batch_size"]) == (12, 3, 3, 5)
    assert report["top1"] == pytest.approx(11 / 12) and report["topk"] == 1
    assert report["top1_interval"] == pytest.approx(wilson(11, 12))
    assert {c["name"]: (c["n"], c["correct"]) for c in report["per_class"]} == {
        "blue": (4, 3), "green": (4, 4), "red": (4, 4),
    }  # fmt: skip
    assert set(report["images_per_s"]) == {"decode", "inference", "total"}
    assert all(value > 0 for value in report["images_per_s"].values())
    assert "function body" in report["notices"][0]


def test_eval_counts_by_position_without_labels(folder: Path, tmp_path: Path) -> None:
    model = write_tiny_onnx(tmp_path / "m.onnx")
    report = json.loads(invoke("eval", model, folder, "--json").stdout)
    # Position 0 is blue's folder here, and the model's output 0 is red: only the green ones and the odd one fit.
    assert report["top1"] == pytest.approx(5 / 12)


def test_eval_top5_of_many_classes(tmp_path: Path) -> None:
    names = [f"c{i}" for i in range(8)]
    model = write_tiny_onnx(tmp_path / "m.onnx", tiny_info(classes=8, labels=tuple(names)))
    put(tmp_path / "data" / "c0" / "a.png", COLOURS["red"])
    put(tmp_path / "data" / "c4" / "a.png", COLOURS["red"])  # fifth of the ranking
    put(tmp_path / "data" / "c5" / "a.png", COLOURS["red"])  # sixth
    report = json.loads(invoke("eval", model, tmp_path / "data", "--json").stdout)
    assert (report["k"], report["top1"], report["topk"]) == (5, pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_eval_table_and_bar(model: Path, folder: Path) -> None:
    result = invoke("eval", model, folder, "--min-top1", 90)
    assert result.exit_code == 0
    for text in ("12 of 12, 3 classes", "91.67 %", "top-3", "100.00 %", "images/s", "onnxruntime "):
        assert text in result.stdout
    result = invoke("eval", model, folder, "--min-top1", 95)
    assert result.exit_code == 1
    assert "91.67 %" in result.stdout and "below the 95 % asked for" in result.stderr
    assert "write 95" in refused("eval", model, folder, "--min-top1", 0.95)


def test_eval_limit_spreads_over_classes(model: Path, folder: Path) -> None:
    report = json.loads(invoke("eval", model, folder, "--json", "--limit", 6).stdout)
    assert report["n"] == 6 and [c["n"] for c in report["per_class"]] == [2, 2, 2]
    assert json.loads(invoke("eval", model, folder, "--json", "--limit", 99).stdout)["n"] == 12


def test_eval_refuses_folders(model: Path, folder: Path, tmp_path: Path) -> None:
    assert "is flat" in refused("eval", model, folder / "red")
    (tmp_path / "nothing").mkdir()
    assert "holds no images" in refused("eval", model, tmp_path / "nothing")
    assert "does not exist" in refused("eval", model, tmp_path / "none")
    put(folder / "yellow" / "0.png", (200, 200, 0))
    text = refused("eval", model, folder, "--no-library")
    assert "4 class folders, the model 3 classes" in text
    assert "3 paths given" in refused("eval", model, folder, folder)


def test_eval_stops_at_a_damaged_image(model: Path, folder: Path) -> None:
    (folder / "green" / "2.png").write_bytes(b"broken")
    assert "green/2.png is not an image" in refused("eval", model, folder, "--no-library")


def test_scores_that_are_not_finite_fail(folder: Path, tmp_path: Path) -> None:
    model = write_tiny_onnx(tmp_path / "m.onnx", tiny_info(labels=LABELS), scale=float("nan"))
    assert "not finite" in refused("eval", model, folder, "--no-library", code=1)


def test_fixed_batch_is_filled_up(folder: Path, tmp_path: Path) -> None:
    model = write_tiny_onnx(tmp_path / "m.onnx", tiny_info(labels=LABELS), batch=5)
    report = json.loads(invoke("eval", model, folder, "--json").stdout)
    assert (report["n"], report["batch_size"], report["top1"]) == (12, 5, pytest.approx(11 / 12))
    assert json.loads(invoke("run", model, folder / "red" / "0.png", "--json").stdout)["images"]


def test_predict_does_not_depend_on_the_batch(folder: Path, tmp_path: Path) -> None:
    import numpy as np

    batch = np.random.default_rng(0).standard_normal((7, 3, 32, 32)).astype(np.float32)
    with open_session(write_tiny_onnx(tmp_path / "d.onnx"), library="off") as dynamic:
        want = predict(dynamic, batch)
    with open_session(write_tiny_onnx(tmp_path / "f.onnx", batch=3), library="off") as fixed:
        np.testing.assert_allclose(predict(fixed, batch), want, atol=1e-6)


@pytest.mark.parametrize(
    "successes,n,low,high",
    # Wilson (1927) at 95 %, worked with the quadratic it solves.
    [(0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (5, 10, 0.23659, 0.76341), (970, 1000, 0.95749, 0.97892)],
)
def test_wilson(successes: int, n: int, low: float, high: float) -> None:
    got = wilson(successes, n)
    assert got == pytest.approx((low, high), abs=1e-4)
    z = 1.959963984540054
    for bound in got:
        if 0 < bound < 1:
            assert abs(successes / n - bound) == pytest.approx(z * (bound * (1 - bound) / n) ** 0.5, abs=1e-7)


@pytest.mark.parametrize("command", ["run", "eval"])
def test_help(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0 and "ARTIFACT" in result.output


def test_run_and_eval_need_no_torch(model: Path, folder: Path) -> None:
    """In a fresh interpreter: `--help` loads no runtime, and both commands work where torch cannot be imported."""
    script = (
        "import sys\n"
        "for name in sys.argv[1].split(','): sys.modules[name] = None\n"
        "from vimdeploy.cli.main import cli\n"
        "cli(sys.argv[2:], standalone_mode=True)\n"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    for blocked, args in (
        ("torch,onnxruntime,onnx", ["run", "--help"]),
        ("torch,onnxruntime,onnx", ["eval", "--help"]),
        ("torch", ["run", str(model), str(folder / "red" / "0.png"), "--no-library"]),
        ("torch", ["eval", str(model), str(folder), "--no-library"]),
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, blocked, *args], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
