"""runtimes/tensorrt.py around stand-ins for TensorRT and the driver: what runs, and what is refused with its reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from engines_helpers import write_plan
from fake_tensorrt import FakeContext, fake_tensorrt, install, plugin_file
from PIL import Image
from tiny_onnx import COLOURS, write_tiny_onnx

from vimdeploy.bundle import plans_in, resolve_artifact, sha256_of
from vimdeploy.cli.main import cli
from vimdeploy.engines.sidecar import sidecar_path
from vimdeploy.errors import EngineError, ModelFileError, RuntimeMissing, UsageError, VimDeployError
from vimdeploy.runtimes import cuda, open_session
from vimdeploy.runtimes.tensorrt import TensorRTSession

SHAPES = ("image", (1, 3, 32, 32), (2, 3, 32, 32), (4, 3, 32, 32))


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    return plugin_file(tmp_path)


@pytest.fixture
def plan(tmp_path: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    install(monkeypatch, fake_tensorrt())
    monkeypatch.delenv("VIMDEPLOY_TRT_PLUGIN", raising=False)
    return make(tmp_path / "tiny.vim" / "model.fp16.plan", plugin)


def make(plan: Path, plugin: Path, **changes: Any) -> Path:
    facts = {
        "file": str(plugin),
        "sha256": sha256_of(plugin),
        "name": "SelectiveScan",
        "version": "1",
        "namespace": "vim",
    }
    write_plan(plan, json.dumps(SHAPES).encode(), **{"plugin": facts, **changes})
    return plan


def images(batch: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, 3, 32, 32)).astype(np.float32)


def test_any_batch_of_the_profile_runs(plan: Path) -> None:
    with open_session(plan) as session:
        assert str(session.inputs["image"]) == "float32 (any, 3, 32, 32)" and set(session.outputs) == {"logits"}
        assert session.describe() == "TensorRT 8.5.3.1 on NVIDIA H100 80GB HBM3, fp16, vim plugin"
        for batch in (4, 1, 3):
            x = images(batch)
            got = session.run(x)["logits"]
            np.testing.assert_allclose(got, 2 * x.mean((2, 3)), rtol=1e-6)
        kept = session.run(images(2))["logits"].copy()
        first = session.run(images(2))["logits"]
        session.run(-images(2))
        np.testing.assert_array_equal(first, kept)  # the caller's to keep


def test_memory_goes_with_the_session(plan: Path) -> None:
    session = TensorRTSession(plan)
    context = session._cuda
    assert isinstance(context, FakeContext) and [len(b) for b in context.buffers] == [4 * 3 * 32 * 32 * 4, 4 * 3 * 4]
    session.close()
    session.close()
    assert context.closed
    with pytest.raises(UsageError, match="closed"):
        session.run(images(1))


@pytest.mark.parametrize("batch", [5, 64])
def test_a_batch_outside_the_profile(plan: Path, batch: int) -> None:
    with open_session(plan) as session, pytest.raises(UsageError) as caught:
        session.run(images(batch))
    assert caught.value.message == f"a batch of {batch} is outside the engine's profile: 1 to 4"
    assert caught.value.hint == f"run batches of 1 to 4, or build with --max-batch {batch}"


def refused(error: type[VimDeployError], plan: Path, **options: Any) -> str:
    with pytest.raises(error) as caught:
        open_session(plan, **options)
    assert caught.value.hint
    return caught.value.message


def test_what_does_not_match_the_sidecar(plan: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(plan, plugin, runtime={"name": "tensorrt", "version": "8.5.2.2"})
    assert "was built by tensorrt 8.5.2.2; this host has 8.5.3.1" in refused(ModelFileError, plan)
    make(plan, plugin, runtime={"name": "tensorrt", "version": "8.5.2.2"}, version_compatible=True)
    open_session(plan).close()
    make(plan, plugin, device={"name": "NVIDIA A100", "sm": 80, "driver": "12.4"})
    assert "built for NVIDIA A100 (sm_80); this is NVIDIA H100 80GB HBM3 (sm_90)" in refused(ModelFileError, plan)
    make(plan, plugin)
    plugin.write_bytes(plugin.read_bytes() + b" of tomorrow")
    assert "is not the plugin library" in refused(RuntimeMissing, plan)
    plugin.unlink()
    assert "is not there" in refused(RuntimeMissing, plan)


def test_a_plan_that_was_changed(plan: Path) -> None:
    content = plan.read_bytes()
    plan.write_bytes(content[:-1] + b"\0")
    assert "SHA-256 differs" in refused(ModelFileError, plan)
    plan.write_bytes(content[:-1])
    assert "was cut or replaced" in refused(ModelFileError, plan)
    sidecar_path(plan).unlink()
    assert "has no sidecar" in refused(ModelFileError, plan)


def test_a_plan_tensorrt_cannot_load(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake_tensorrt(refuse_plan=True))
    assert "cannot load" in refused(EngineError, plan) and "magicTagRead" in refused(EngineError, plan)


def test_a_run_that_fails_says_why(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake_tensorrt(refuse_run=True))
    with open_session(plan) as session, pytest.raises(EngineError, match="could not run the plan"):
        session.run(images(1))


def test_the_plugin_may_lie_beside_the_plan_or_be_named(plan: Path, plugin: Path, tmp_path: Path) -> None:
    beside = plan.with_name(plugin.name)
    plugin.rename(beside)
    open_session(plan).close()
    elsewhere = beside.rename(tmp_path / "elsewhere.so")
    refused(RuntimeMissing, plan)
    open_session(plan, plugin=elsewhere).close()
    assert "gone.so" in refused(RuntimeMissing, plan, plugin=tmp_path / "gone.so")


def test_files_open_where_they_belong(plan: Path, tmp_path: Path) -> None:
    onnx = write_tiny_onnx(tmp_path / "m.onnx")
    assert "opens in tensorrt" in refused(UsageError, plan, runtime="onnxruntime")
    assert "opens in onnxruntime" in refused(UsageError, onnx, runtime="tensorrt")
    assert "takes no TensorRT plugin" in refused(UsageError, onnx, plugin=plan)
    assert "plugin built in" in refused(UsageError, plan, library="off")


def test_run_and_eval_take_a_plan(plan: Path, tmp_path: Path) -> None:
    for name, colour in COLOURS.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), colour).save(tmp_path / "data" / name / "0.png")
    result = CliRunner().invoke(cli, ["run", str(plan), str(tmp_path / "data" / "red" / "0.png"), "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["images"][0]["predictions"][0]["label"] == "red" and said["runtime"].startswith("TensorRT 8.5.3.1")
    # Of a folder, --runtime tensorrt means its plan.
    result = CliRunner().invoke(cli, ["eval", str(plan.parent), str(tmp_path / "data"), "--runtime", "tensorrt",
                                      "--batch-size", "4", "--min-top1", "100"])  # fmt: skip
    assert result.exit_code == 0, result.output


def test_one_plan_of_a_folder(plan: Path, plugin: Path) -> None:
    assert resolve_artifact(plan.parent, plan=True) == plan and plans_in(plan.parent) == [plan]
    make(plan.with_name("model.fp32.plan"), plugin)
    with pytest.raises(UsageError, match=r"holds 2 plans: model\.fp16\.plan, model\.fp32\.plan"):
        resolve_artifact(plan.parent, plan=True)
    for path in plans_in(plan.parent):
        path.unlink()
    with pytest.raises(UsageError, match="holds no plan"):
        resolve_artifact(plan.parent, plan=True)


def test_a_host_without_a_card(tmp_path: Path, plugin: Path) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("this host has a card")
    cuda._driver.cache_clear()
    make(tmp_path / "m.plan", plugin)
    assert "no NVIDIA GPU" in refused(RuntimeMissing, tmp_path / "m.plan")


def test_nothing_here_imports_torch() -> None:
    code = "import sys, vimdeploy.runtimes.tensorrt, vimdeploy.engines.build, vimdeploy.verify.parity\n"
    code += "import vimdeploy.cli.build_engine, vimdeploy.cli.verify, vimdeploy.cli.run\n"
    code += "assert not {'torch', 'tensorrt', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": ""})
