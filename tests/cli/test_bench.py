"""`vimdeploy bench`: what it prints and writes, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from ort_library import ort_library
from tiny_onnx import tiny_info, write_tiny_onnx

from vimdeploy.bench.host import describe_host
from vimdeploy.cli.main import cli

FAST = ["--seconds", "0.02", "--rounds", "2", "--no-memory", "--threads", "1"]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VIMDEPLOY_ORT_LIBRARY", str(ort_library()))
    monkeypatch.setenv("VIMDEPLOY_CACHE", str(tmp_path / "cache"))
    return write_tiny_onnx(tmp_path / "tiny.vim" / "model.onnx")


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)])


def test_a_table_a_file_and_a_page(model: Path, tmp_path: Path) -> None:
    out, html = tmp_path / "r.json", tmp_path / "r.html"
    result = bench(model.parent, "--batch", "1,4", "--against", "onnxruntime", *FAST, "-o", out, "--report", html)
    assert result.exit_code == 0, result.output
    assert "32 px, batch 1, 5 tokens" in result.stdout and "32 px, batch 4, 5 tokens" in result.stdout
    assert "tiny, onnxruntime without vimdeploy's library" in result.stdout and "speed-up" in result.stdout
    written = json.loads(out.read_text())
    assert len(written["rows"]) == 4 and written["host"]["cpu"]["name"]
    assert all(row["latency_ms"]["p50"] > 0 for row in written["rows"])
    assert html.read_text().startswith("<!doctype html>") and "tiny, onnxruntime" in html.read_text()


def test_json_is_all_that_stdout_has(model: Path) -> None:
    result = bench(model, "--json", *FAST)
    said = json.loads(result.stdout)
    assert result.exit_code == 0 and said["settings"]["batches"] == [1] and said["rows"][0]["failed"] is None


def test_options_may_be_lists_or_repeated(model: Path) -> None:
    result = bench(model, "--batch", "2,1", "--batch", "2", "--json", *FAST)
    assert json.loads(result.stdout)["settings"]["batches"] == [2, 1]


def test_earlier_results_of_this_host_join_the_table(model: Path, tmp_path: Path) -> None:
    first, both = tmp_path / "first.json", tmp_path / "both.json"
    assert bench(model, *FAST, "-o", first).exit_code == 0
    other = write_tiny_onnx(tmp_path / "other.vim" / "model.onnx")
    result = bench(first, other, *FAST, "-o", both)
    assert result.exit_code == 0, result.output
    assert [row["contender"] for row in json.loads(both.read_text())["rows"]] == [
        "tiny, onnxruntime",
        "other, onnxruntime",
    ]
    assert "several runs" in result.stdout
    # And by themselves, to make a page of them.
    result = bench(both, "--report", tmp_path / "page.html")
    assert result.exit_code == 0 and (tmp_path / "page.html").is_file()


def other_host(**changes: Any) -> dict[str, Any]:
    return {**describe_host(), **changes}


@pytest.mark.parametrize("with_artifact", [True, False])
def test_results_of_another_card_are_refused_before_anything_runs(
    model: Path, tmp_path: Path, with_artifact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for name in ("NVIDIA H100", "NVIDIA A100"):
        files.append(tmp_path / f"{name}.json")
        host = other_host(card={"name": name, "sm": 90, "cuda": "13.0", "driver": None})
        files[-1].write_text(json.dumps({"format": 1, "host": host, "settings": {}, "rows": [], "notices": []}))
    monkeypatch.setattr("vimdeploy.bench.run.bench", lambda *a, **k: pytest.fail("it was measured"))
    result = bench(files[0], model) if with_artifact else bench(*files)
    assert result.exit_code == 2 and "cannot be compared: the card is NVIDIA H100 in one" in result.stderr


def test_an_artifact_that_fails_exits_with_1(model: Path, tmp_path: Path) -> None:
    fixed = write_tiny_onnx(tmp_path / "fixed.onnx", batch=2)
    result = bench(fixed, "--batch", "1,2", *FAST)
    assert result.exit_code == 1 and "fixed, onnxruntime failed: the model takes" in result.stdout
    assert "32 px, batch 2" in result.stdout  # the rest is there


@pytest.mark.parametrize(
    "arguments,code,said",
    [
        (["--against", "resnet"], 2, "no baseline is called 'resnet'"),
        (["--batch", "0"], 2, "--batch takes numbers from 1 up, not '0'"),
        (["--batch", "many"], 2, "--batch takes numbers from 1 up, not 'many'"),
        (["--img-size", "large"], 2, "'large' is not an image size"),
        (["--report", "page.txt"], 2, "does not end in .html"),
        (["--runtime", "abacus"], 2, "'abacus' is not one of"),
        (["--img-size", "64"], 2, "has no manifest.json that names its checkpoint"),
        (["--runtime", "torch-cuda"], 1, "has no manifest.json that names its checkpoint"),
        (["--against", "torch"], 0, "failed"),
    ],
)
def test_exit_codes(model: Path, arguments: list[str], code: int, said: str) -> None:
    result = bench(model, *FAST, *arguments)
    assert result.exit_code == code and said in result.output, result.output


def test_a_runtime_that_is_not_there_exits_with_3(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIMDEPLOY_ORT_LIBRARY", "/nowhere.so")
    result = bench(model, *FAST)
    assert result.exit_code == 3 and "VIMDEPLOY_ORT_LIBRARY names /nowhere.so" in result.stderr


def test_paths_that_are_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert bench().exit_code == 2
    assert "does not exist" in bench("gone.vim").stderr
    Path("r.json").write_text("{}")
    assert "holds no results" in bench("r.json").stderr


def test_help_shows_an_example_and_imports_no_runtime() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from click.testing import CliRunner; from vimdeploy.cli.main import cli\n"
        "result = CliRunner().invoke(cli, ['bench', '--help'])\n"
        "assert result.exit_code == 0 and 'vimdeploy bench ckpt.vim --batch 1,8 --against deit' in result.stdout\n"
        "assert not {'torch', 'onnxruntime', 'tensorrt', 'matplotlib', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_labels_with_brackets_are_not_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIMDEPLOY_ORT_LIBRARY", str(ort_library()))
    odd = write_tiny_onnx(tmp_path / "a[red]b.vim" / "model.onnx", tiny_info())
    result = bench(odd, *FAST)
    assert result.exit_code == 0 and "a[red]b, onnxruntime" in result.stdout
