"""verify/reference.py and plans in verify/parity.py: a saved reference judges as the live one does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from engines_helpers import write_plan
from official import SMALL, SMALL_NAME, official_content

from vimdeploy.bundle import read_info
from vimdeploy.cli.main import cli
from vimdeploy.engines.profile import Profile
from vimdeploy.errors import ModelFileError, RuntimeMissing, UsageError
from vimdeploy.export.exporter import ExportOptions, export_checkpoint
from vimdeploy.runtimes.base import Session, TensorSpec
from vimdeploy.runtimes.onnxruntime import OrtSession
from vimdeploy.verify import parity as module
from vimdeploy.verify.compare import Tolerance
from vimdeploy.verify.parity import PLAN_FP16, parity
from vimdeploy.verify.reference import SavedReference

BODY = "onnxruntime-body"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """small.pth, small.vim and its reference."""
    path = tmp_path_factory.mktemp("reference")
    torch.save(official_content(SMALL, SMALL_NAME, ema=False, optimizer=False), path / "small.pth")
    export_checkpoint(path / "small.pth", path / "small.vim", ExportOptions())
    result = invoke("verify", "parity", path / "small.vim", "--runtime", BODY, "--save-reference", path / "ref.npz")
    assert result.exit_code == 0, result.output
    return path


def invoke(*args: object) -> Any:
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_saved_reference_judges_alike(folder: Path, tmp_path: Path, precision: str) -> None:
    model = export_checkpoint(folder / "small.pth", tmp_path / "m.vim", ExportOptions(precision=precision)).model
    live = parity(model, folder / "small.pth", runtimes=(BODY,)).to_dict()
    saved = parity(model, None, runtimes=(BODY,), reference=folder / "ref.npz").to_dict()
    assert saved.pop("reference") == live.pop("reference") + ", from ref.npz"
    assert saved == live and saved["passed"]


def test_without_torch(folder: Path) -> None:
    """The command itself, in a process where torch cannot be imported."""
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from vimdeploy.cli.main import main\n"
        f"sys.argv = ['vimdeploy', 'verify', 'parity', {str(folder / 'small.vim')!r}, '--runtime', '{BODY}', "
        f"'--reference', {str(folder / 'ref.npz')!r}, '--json']\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"]


def test_another_networks_reference_is_refused(folder: Path, tmp_path: Path) -> None:
    torch.save(official_content(SMALL, SMALL_NAME, ema=False, optimizer=False, seed=1), tmp_path / "other.pth")
    other = export_checkpoint(tmp_path / "other.pth", tmp_path / "other.vim", ExportOptions()).model
    with pytest.raises(ModelFileError, match=r"is not of the network of .*ref\.npz: checkpoint"):
        parity(other, None, reference=folder / "ref.npz")
    larger = ExportOptions(img_size=(48, 48))
    model = export_checkpoint(folder / "small.pth", tmp_path / "larger.vim", larger).model
    with pytest.raises(ModelFileError, match="size"):
        parity(model, None, reference=folder / "ref.npz")


def test_what_is_no_reference(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        SavedReference(tmp_path / "none.npz")
    for content in (b"", b"PK\x03\x04", (folder / "ref.npz").read_bytes()[:1000]):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(ModelFileError, match="is not a reference"):
            SavedReference(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", facts=np.array('{"format": 9}'))
    with pytest.raises(ModelFileError, match="format 9"):
        SavedReference(tmp_path / "x.npz")
    result = invoke("verify", "parity", folder / "small.vim", "--reference", folder / "ref.npz", "--images", tmp_path)
    assert result.exit_code == 2 and "takes the place of" in result.stderr


class PlanLike(Session):
    """A plan's session that ONNX Runtime computes, with a fault if wanted."""

    fault = "none"

    def __init__(self, plan: Path, *, plugin: Path | None = None) -> None:
        from vimdeploy.engines.sidecar import read_sidecar

        self.sidecar = read_sidecar(plan)
        self.info = self.sidecar.info
        self._inner = OrtSession(plan.parent / "model.onnx", library=None)
        self.inputs, self.outputs = self._inner.inputs, self._inner.outputs
        assert isinstance(self.inputs["images"], TensorSpec)

    def _run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        (y,) = self._inner.run(batch).values()
        noise = {"none": 0.0, "small": 1e-5, "large": 0.05}.get(self.fault, 0.0)
        y = y + noise * np.random.default_rng(0).standard_normal(y.shape).astype(np.float32) * np.abs(y).max()
        if self.fault == "nan":
            y[-1, 0] = np.nan
        return {"logits": y}

    def describe(self) -> str:
        return "a stand-in for TensorRT"


@pytest.fixture
def with_plan(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import shutil

    import vimdeploy.runtimes.tensorrt as runtime

    shutil.copytree(folder / "small.vim", tmp_path / "small.vim")
    plan = tmp_path / "small.vim" / "model.fp16.plan"
    sides = (3, *SMALL.img_size)
    write_plan(
        plan,
        info=read_info(tmp_path / "small.vim" / "model.onnx"),
        profile=Profile("images", (1, *sides), (8, *sides), (8, *sides)),
    )
    monkeypatch.setattr(runtime, "TensorRTSession", PlanLike)
    monkeypatch.setattr(PlanLike, "fault", "none")
    return plan


def test_a_folder_means_its_plans_too(with_plan: Path, folder: Path) -> None:
    result = invoke("verify", "parity", with_plan.parent, "--reference", folder / "ref.npz", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    plans = [row for row in report["rows"] if row["runtime"] == "tensorrt"]
    assert {row["file"] for row in plans} == {"model.fp16.plan"} and {row["images"] for row in plans} == {
        "random",
        "real",
    }
    assert all(row["precision"] == "fp16" and row["tolerance"]["max_abs"] is None for row in plans)
    assert {row["precision"] for row in report["rows"]} == {"fp32", "fp16"}
    assert "fp32" in report["reference"] and "fp64" in report["reference"]
    shown = invoke("verify", "parity", with_plan.parent, "--reference", folder / "ref.npz").stdout
    assert "model.fp16.plan" in shown


def test_a_plan_alone(with_plan: Path, folder: Path) -> None:
    report = parity(with_plan, None, reference=folder / "ref.npz")
    assert report.passed and {row.runtime for row in report.rows} == {"tensorrt"}
    with pytest.raises(UsageError, match="runs in TensorRT only"):
        parity(with_plan, None, reference=folder / "ref.npz", runtimes=(BODY,))
    with pytest.raises(UsageError, match="there is no plan"):
        parity(with_plan.parent / "model.onnx", None, reference=folder / "ref.npz", runtimes=("tensorrt",))


@pytest.mark.parametrize(("fault", "passes"), [("small", True), ("large", False), ("nan", False)])
def test_faults_are_found(
    with_plan: Path, folder: Path, fault: str, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PlanLike, "fault", fault)
    report = parity(with_plan, None, reference=folder / "ref.npz")
    assert report.passed == passes
    if fault == "nan":
        (_, where) = report.rows[0].failures
        assert where.startswith("every layer of the graph stays finite in ONNX Runtime")


def test_a_host_without_a_card_leaves_plans_out_and_says_so(
    with_plan: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vimdeploy.runtimes.tensorrt as runtime

    def none(plan: Path, *, plugin: Path | None = None) -> Session:
        raise RuntimeMissing("no NVIDIA GPU here")

    monkeypatch.setattr(runtime, "TensorRTSession", none)
    model = with_plan.parent / "model.onnx"
    report = parity(model, None, reference=folder / "ref.npz", plans=(with_plan,))
    assert report.passed and ("model.fp16.plan", "no NVIDIA GPU here") in report.skipped
    for asked in ({"runtimes": ("tensorrt",), "plans": (with_plan,)}, {}):
        with pytest.raises(RuntimeMissing):
            parity(with_plan if not asked else model, None, reference=folder / "ref.npz", **asked)  # type: ignore[arg-type]


def test_the_bound_for_plans_caps_the_measured_one() -> None:
    loose = Tolerance(rel_rms=0.05, cosine=0.99, max_abs=None, reason="measured")
    tight = Tolerance(rel_rms=1e-3, cosine=0.999999, max_abs=None, reason="measured")
    assert module._capped(loose, PLAN_FP16).rel_rms == 1e-2 and module._capped(loose, PLAN_FP16).cosine == 0.9999
    assert module._capped(tight, PLAN_FP16) == tight and module._capped(loose, None) == loose
