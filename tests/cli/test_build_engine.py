"""`vimdeploy build-engine` from the command line's outside: help, refusals with exit codes, JSON, what is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from official import SMALL, SMALL_NAME, official_content

from vimdeploy.cli.main import cli
from vimdeploy.engines.capabilities import RTX, import_runtime
from vimdeploy.errors import RuntimeMissing
from vimdeploy.export.exporter import ExportOptions, export_checkpoint
from vimdeploy.runtimes import cuda


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import torch

    monkeypatch.chdir(tmp_path)
    torch.save(official_content(SMALL, SMALL_NAME, ema=False, optimizer=False), "small.pth")
    return export_checkpoint(Path("small.pth"), Path("small.vim"), ExportOptions()).model


def invoke(*args: object) -> Result:
    result = CliRunner().invoke(cli, ["build-engine", *(str(arg) for arg in args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(code: int, *args: object) -> str:
    before = {path: path.read_bytes() for path in Path("small.vim").glob("*")}
    result = invoke(*args)
    assert result.exit_code == code, result.output
    assert "Error: " in result.stderr and "Traceback" not in result.output and result.stdout == ""
    assert {path: path.read_bytes() for path in Path("small.vim").glob("*")} == before
    return " ".join(result.stderr.split())


def test_help_is_quick_and_complete() -> None:
    text = invoke("--help").stdout
    options = (
        "--fp16 --bf16 --int8 --calib --fusion --tf32 --no-tf32 --min-batch --opt-batch --max-batch --timing-cache"
    )
    for option in f"{options} --workspace --version-compatible --plugin --runtime --json --output".split():
        assert option in text, option
    assert "build-engine" in CliRunner().invoke(cli, ["--help"]).stdout


def test_without_a_card(model: Path) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("this host has a card")
    cuda._driver.cache_clear()
    said = refused(3, "--fp16")
    assert "no NVIDIA GPU" in said and "Try: build where the card is; --runtime tensorrt-rtx builds without one" in said


def test_int8_needs_calibration(model: Path) -> None:
    assert "is not quantized yet Try: say on which images: --calib FOLDER" in refused(2, "--int8")


def test_contradictions(model: Path) -> None:
    assert "exclude each other" in refused(2, "--fp16", "--bf16")
    assert "batches must grow" in refused(2, "--min-batch", 9, "--max-batch", 8, "--runtime", RTX)
    assert "is an engine already" in refused(2, _touch("x.plan"))
    assert "Invalid value for '--max-batch'" in refused(2, "--max-batch", 0)
    assert "Invalid value for '--fusion'" in refused(2, "--fusion", "some")


def _touch(name: str) -> str:
    Path(name).touch()
    return name


def test_rtx_builds_here(model: Path) -> None:
    try:
        import_runtime(RTX)
    except RuntimeMissing as missing:
        pytest.skip(missing.message)
    result = invoke("--fp16", "--runtime", RTX, "--max-batch", 4)  # the one .vim folder here
    assert result.exit_code == 0, result.output
    assert "fp16, seen in the network: projections 14 in fp16; norms 3 in fp32" in result.stdout
    assert ["fusion", "full"] in [line.split() for line in result.stdout.splitlines()]
    assert "is fused (full) already" in refused(2, "--runtime", RTX, "--fusion", "bidirectional", "-o", "x.plan")
    assert "Wrote small.vim/model.fp16.plan and model.fp16.plan.json" in result.stdout
    result = invoke(model, "-o", "other.plan", "--runtime", RTX, "--json", "--max-batch", 4)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["plan"] == "other.plan" and said["sidecar"]["precision"]["asked"] == "fp32"
    assert said["sidecar"] == json.loads(Path("other.plan.json").read_text())
