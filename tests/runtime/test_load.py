"""`vimdeploy.load`: one call from an artifact to a session that runs, in the runtime asked for or the best there is."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from official import write_small
from ort_library import ort_library
from plain_kernels import PlainKernels
from tiny_onnx import LIBRARY_FACTOR, write_tiny_onnx

import vimdeploy
from vimdeploy.bundle import read_info
from vimdeploy.errors import ModelFileError, RuntimeMissing, UsageError
from vimdeploy.export.exporter import ExportOptions, export_checkpoint
from vimdeploy.runtimes import RUNTIMES, best_runtime, cuda, torch_cuda
from vimdeploy.runtimes.library import ENVIRONMENT, ORT_CUDA_ENVIRONMENT


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, str(ort_library()))
    monkeypatch.delenv(ORT_CUDA_ENVIRONMENT, raising=False)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_onnx(tmp_path / "tiny.vim" / "model.onnx").parent


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load")
    checkpoint = write_small(folder / "small.pth", ema=False, optimizer=False)
    return export_checkpoint(checkpoint, folder / "small.vim", ExportOptions(fusion="none")).path


def images(count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 32, 32)).astype(np.float32)


def test_a_folder_a_file_and_a_string(tiny: Path) -> None:
    x = images()
    for artifact in (tiny, tiny / "model.onnx", str(tiny)):
        with vimdeploy.load(artifact, threads=1) as session:
            np.testing.assert_allclose(session.run(x)["logits"], LIBRARY_FACTOR * x.mean((2, 3)), atol=1e-6)
            assert session.describe().endswith("CPU, vim op library") and session.notice is None


def test_the_one_folder_here(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.parent)
    with vimdeploy.load() as session:
        assert session.info.variant == "custom"


def test_the_function_body_when_told(tiny: Path) -> None:
    x = images()
    with vimdeploy.load(tiny, library="off") as session:
        np.testing.assert_allclose(session.run(x)["logits"], x.mean((2, 3)), atol=1e-6)


def test_every_runtime_of_one_network_agrees(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch-cuda on stand-ins for its kernels: what is tested is the way from the file to the weights."""
    x = images(3)
    monkeypatch.setattr(torch_cuda, "cuda_kernels", lambda path: PlainKernels())
    real = torch_cuda.TorchCudaSession
    monkeypatch.setattr(torch_cuda, "TorchCudaSession", lambda *a, **k: real(*a, **{**k, "device": "cpu"}))
    outputs = {}
    for runtime in ("onnxruntime", "torch", "torch-cuda"):
        with vimdeploy.load(exported, runtime) as session:
            outputs[runtime] = session.run(x)["logits"]
            prepared = session.prepare(x)
            prepared.run()
            assert prepared.stream is None
    for runtime in ("torch", "torch-cuda"):
        np.testing.assert_allclose(outputs[runtime], outputs["onnxruntime"], atol=1e-4)


def test_a_torch_session_reads_the_checkpoint_it_came_from(exported: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.onnx"
    alone.write_bytes((exported / "model.onnx").read_bytes())
    with pytest.raises(UsageError, match="names its checkpoint"):
        vimdeploy.load(alone, "torch")
    other = tmp_path / "copy.vim"
    other.mkdir()
    write_small(tmp_path / "small.pth", ema=False, optimizer=False, seed=1)  # another network of that name
    for name in ("model.onnx", "manifest.json"):
        (other / name).write_bytes((exported / name).read_bytes())
    with pytest.raises(ModelFileError, match="was not exported from"):
        vimdeploy.load(other, "torch")


@pytest.mark.parametrize(
    "runtime,error,said",
    [
        ("tensorflow", UsageError, "no runtime is called 'tensorflow'"),
        ("tensorrt", UsageError, "holds no plan"),
        ("torch-cuda", RuntimeMissing, "no NVIDIA GPU"),
        ("onnxruntime-cuda", RuntimeMissing, "no NVIDIA GPU"),
    ],
)
def test_what_is_not_there_says_so(exported: Path, runtime: str, error: type[Exception], said: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("this host has a card")
    with pytest.raises(error, match=said):
        vimdeploy.load(exported, runtime)


def test_threads_that_cannot_be(tiny: Path, exported: Path) -> None:
    for artifact, runtime in ((tiny, "onnxruntime"), (exported, "torch")):
        with pytest.raises(UsageError, match="threads must be at least 1"):
            vimdeploy.load(artifact, runtime, threads=0)


def with_card(monkeypatch: pytest.MonkeyPatch, *, providers: list[str], card: bool, library: Path | None) -> None:
    module: Any = types.ModuleType("onnxruntime")
    module.get_available_providers = lambda: providers
    monkeypatch.setitem(sys.modules, "onnxruntime", module)

    def device(index: int = 0) -> cuda.Device:
        if not card:
            raise RuntimeMissing("no NVIDIA GPU")
        return cuda.Device(0, "NVIDIA H100", 90, "13.0")

    monkeypatch.setattr(cuda, "device", device)
    if library is not None:
        monkeypatch.setenv(ORT_CUDA_ENVIRONMENT, str(library))


CUDA = ["CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.mark.parametrize(
    "providers,card,library,chosen",
    [
        (CUDA, True, True, "onnxruntime-cuda"),
        (CUDA, True, False, "onnxruntime"),
        (["CPUExecutionProvider"], True, True, "onnxruntime"),
    ],
)
def test_the_card_is_taken_when_everything_for_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, providers: list[str], card: bool, library: bool, chosen: str
) -> None:
    path = tmp_path / "libvimdeploy_ort_cuda.so"
    path.write_bytes(b"")
    with_card(monkeypatch, providers=providers, card=card, library=path if library else None)
    assert best_runtime(Path("model.onnx")) == chosen
    assert best_runtime(Path("model.onnx"), library="off") == "onnxruntime"
    assert best_runtime(Path("model.plan")) == "tensorrt"


def test_a_library_that_was_named_is_not_passed_over(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    monkeypatch.setenv(ORT_CUDA_ENVIRONMENT, "/nowhere.so")
    with pytest.raises(RuntimeMissing, match=r"no NVIDIA GPU|/nowhere\.so"):
        vimdeploy.load(tiny)


def test_importing_vimdeploy_is_light() -> None:
    code = (
        "import sys, vimdeploy\n"
        "assert vimdeploy.load and vimdeploy.__version__\n"
        "heavy = {'torch', 'onnxruntime', 'tensorrt', 'onnx', 'numpy', 'rich', 'click'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": ""})


def test_the_docstring_names_every_runtime() -> None:
    assert vimdeploy.load.__doc__ and all(f'"{name}"' in vimdeploy.load.__doc__ for name in RUNTIMES)


def test_info_travels_with_every_session(exported: Path) -> None:
    with vimdeploy.load(exported, "torch") as session:
        assert session.info == read_info(exported / "model.onnx")
