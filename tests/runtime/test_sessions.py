"""Sessions on real ONNX Runtime and PyTorch: what runs, what is said about it, and each refusal."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto
from tiny_onnx import LIBRARY_FACTOR, tiny_info, write_tiny_onnx

import vimdeploy
from vimdeploy.bundle import sha256_of, write_manifest
from vimdeploy.errors import ModelFileError, RuntimeMissing, UsageError, VimDeployError
from vimdeploy.runtimes import library, open_session
from vimdeploy.runtimes.library import ENVIRONMENT, LIBRARY, ort_library_path
from vimdeploy.runtimes.onnxruntime import NoFunctionBody, OrtSession


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_onnx(tmp_path / "tiny.vim" / "model.onnx")


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A package without the op library; returns its `_lib` folder."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    folder = tmp_path / "_lib"
    folder.mkdir()
    monkeypatch.setattr(library, "_folders", lambda: iter([folder]))
    return folder


def real_library() -> Path:
    try:
        return ort_library_path()
    except RuntimeMissing as missing:
        pytest.skip(missing.message)


def images(count: int = 2, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 32, 32)).astype(dtype)


def test_function_body(model: Path) -> None:
    batch = images(5)
    with OrtSession(model, library=None, threads=1) as session:
        assert str(session.inputs["image"]) == "float32 (any, 3, 32, 32)"
        assert session.outputs["logits"].shape == (None, 3)
        assert session.info == tiny_info()
        assert session.describe().startswith("onnxruntime ") and "function body (scan)" in session.describe()
        np.testing.assert_allclose(session.run(batch)["logits"], batch.mean((2, 3)), atol=1e-6)


def test_library_wins_over_the_body(model: Path) -> None:
    path = real_library()
    batch = images()
    for optimize in (True, False):
        with OrtSession(model, library=path, optimize=optimize) as session:
            assert session.describe().endswith("vim op library")
            got = session.run(batch)["logits"]
        np.testing.assert_allclose(got, LIBRARY_FACTOR * batch.mean((2, 3)), atol=1e-6)


def test_library_runs_what_has_no_body(tmp_path: Path) -> None:
    model = write_tiny_onnx(tmp_path / "bare.onnx", body=False)
    with OrtSession(model, library=real_library()) as session:
        assert session.run(images())["logits"].shape == (2, 3)


def test_fp16_input(tmp_path: Path) -> None:
    model = write_tiny_onnx(tmp_path / "half.onnx", dtype=TensorProto.FLOAT16)
    with OrtSession(model, library=None) as session:
        assert session.run(images(dtype=np.float16))["logits"].dtype == np.float16
        with pytest.raises(UsageError, match="not float32"):
            session.run(images())


def test_bfloat16_input_is_refused(tmp_path: Path) -> None:
    model = write_tiny_onnx(tmp_path / "b.onnx", dtype=TensorProto.BFLOAT16)
    with pytest.raises(ModelFileError):
        OrtSession(model, library=None)


@pytest.mark.parametrize(
    "batch,message",
    [
        (np.zeros((0, 3, 32, 32), np.float32), "empty"),
        (np.zeros((3, 32, 32), np.float32), "not a batch of shape"),
        (np.zeros((1, 3, 32, 31), np.float32), "not a batch of shape"),
        (np.zeros((1, 3, 32, 32), np.float64), "not float64"),
    ],
)
def test_batches_the_model_does_not_take(model: Path, batch: np.ndarray, message: str) -> None:
    with OrtSession(model, library=None) as session, pytest.raises(UsageError, match=message):
        session.run(batch)


def test_closed(model: Path) -> None:
    session = OrtSession(model, library=None)
    session.close()
    session.close()
    with pytest.raises(UsageError, match="closed"):
        session.run(images())


def test_strided_batches_are_read_right(model: Path) -> None:
    batch = images(4)[::2, :, ::-1]
    with OrtSession(model, library=None) as session:
        np.testing.assert_allclose(session.run(batch)["logits"], batch.mean((2, 3)), atol=1e-6)


def refusal(kind: type[VimDeployError], *args: object, **options: object) -> VimDeployError:
    with pytest.raises(kind) as caught:
        OrtSession(*args, **options)  # type: ignore[arg-type]
    assert caught.value.hint
    assert "Traceback" not in caught.value.message
    return caught.value


def test_missing_file(tmp_path: Path) -> None:
    assert "does not exist" in refusal(ModelFileError, tmp_path / "none.onnx", library=None).message


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.6, 0.9])
def test_truncated_file(model: Path, keep: float) -> None:
    data = model.read_bytes()
    model.write_bytes(data[: int(len(data) * keep)])
    refusal(ModelFileError, model, library=None)


def test_not_onnx(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for content in (b"", b"hello, this is no model", b"\x00" * 1000):
        path.write_bytes(content)
        refusal(ModelFileError, path, library=None)


def test_a_model_without_the_op(tmp_path: Path) -> None:
    model = write_tiny_onnx(tmp_path / "other.onnx", op=False)
    assert "no vim:: operator" in refusal(ModelFileError, model, library=None).message


def test_neither_body_nor_library(tmp_path: Path) -> None:
    model = write_tiny_onnx(tmp_path / "bare.onnx", body=False)
    error = refusal(NoFunctionBody, model, library=None)
    assert "carries no function body" in error.message and error.exit_code == 3


def test_a_library_that_is_none(model: Path, tmp_path: Path) -> None:
    fake = tmp_path / "fake.so"
    assert "is not a file" in refusal(RuntimeMissing, model, library=fake).message
    fake.write_bytes(b"not a shared object")
    error = refusal(RuntimeMissing, model, library=fake)
    assert "could not load the op library" in error.message and str(fake) in error.message and error.exit_code == 3


def test_onnxruntime_not_installed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    error = refusal(RuntimeMissing, model, library=None)
    assert error.exit_code == 3 and error.hint == "pip install 'vimdeploy[onnxruntime]'"


def test_errors_print_nothing_besides(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    refusal(NoFunctionBody, write_tiny_onnx(tmp_path / "bare.onnx", body=False), library=None)
    assert capfd.readouterr() == ("", "")


def test_auto_without_library_says_so(model: Path, no_library: Path) -> None:
    (no_library / "MISSING.txt").write_text("no C++ compiler was found\n")
    with open_session(model) as session:
        assert session.notice is not None
        assert "function body" in session.notice and "no C++ compiler was found" in session.notice
    with open_session(model, library="off") as session:
        assert session.notice is None  # asked for, so nothing to tell


def test_auto_with_library(model: Path) -> None:
    real_library()
    with open_session(model) as session:
        assert session.notice is None and session.describe().endswith("vim op library")


def test_auto_with_neither_names_both_reasons(tmp_path: Path, no_library: Path) -> None:
    with pytest.raises(RuntimeMissing, match=r"no function body.*is not installed"):
        open_session(write_tiny_onnx(tmp_path / "bare.onnx", body=False))


def test_a_broken_library_is_not_fallen_back_from(model: Path, no_library: Path) -> None:
    (no_library / LIBRARY).write_bytes(b"damaged")
    with pytest.raises(RuntimeMissing, match="could not load"):
        open_session(model)


def test_environment_names_the_library(
    model: Path, no_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tmp_path / "named.so"
    monkeypatch.setenv(ENVIRONMENT, str(named))
    with pytest.raises(RuntimeMissing, match="which is not a file"):
        open_session(model)
    named.write_bytes(b"x")
    assert ort_library_path() == named


def test_library_is_found_beside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    (tmp_path / "_lib").mkdir()
    (tmp_path / "_lib" / LIBRARY).write_bytes(b"x")
    monkeypatch.setattr(vimdeploy, "__path__", [str(tmp_path)])
    assert ort_library_path() == tmp_path / "_lib" / LIBRARY


def test_library_is_found_where_an_editable_install_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    site = tmp_path / "site"
    info = site / "vimdeploy-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vimdeploy\nVersion: 0.1.0\n")
    (site / "vimdeploy" / "_lib").mkdir(parents=True)
    (site / "vimdeploy" / "_lib" / LIBRARY).write_bytes(b"x")
    monkeypatch.setattr(vimdeploy, "__path__", [str(tmp_path / "src")])
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    assert ort_library_path() == site / "vimdeploy" / "_lib" / LIBRARY


def test_a_file_its_manifest_does_not_know(model: Path) -> None:
    write_manifest(model.parent, {}, {model.name: {}})
    open_session(model, library="off").close()
    before = sha256_of(model)
    write_tiny_onnx(model, scale=2.0)
    assert sha256_of(model) != before
    with pytest.raises(ModelFileError, match="SHA-256 differs"):
        open_session(model, library="off")


def test_unknown_runtime(model: Path) -> None:
    with pytest.raises(UsageError, match="no runtime is called 'tensorflow'"):
        open_session(model, runtime="tensorflow")


@pytest.mark.parametrize("output", ["logits", "features", "tokens"])
def test_torch_session(output: str) -> None:
    import torch

    from vimdeploy.models.variants import VimConfig
    from vimdeploy.models.vim import Vim
    from vimdeploy.runtimes.torch import TorchSession

    config = VimConfig(d_model=16, depth=2, img_size=(32, 48), patch_size=16, num_classes=5)
    torch.manual_seed(0)
    model = Vim(config).eval()
    info = tiny_info(output=output)
    batch = np.random.default_rng(0).standard_normal((2, 3, 32, 48)).astype(np.float32)
    batch.flags.writeable = False
    with TorchSession(model, info) as session, torch.no_grad():
        (got,) = session.run(batch).values()
        image = torch.tensor(batch)
        want = {
            "logits": lambda: model(image),
            "features": lambda: model(image, return_features=True),
            "tokens": lambda: model.token_map(image),
        }[output]()
        np.testing.assert_array_equal(got, want.numpy())
        assert got.shape[1:] == session.outputs[output].shape[1:]
        assert session.describe() == f"torch {torch.__version__} CPU, fp32 reference"
        with pytest.raises(UsageError, match="not a batch of shape"):
            session.run(images())


def test_torch_session_on_a_device_that_is_not_there() -> None:
    import torch

    from vimdeploy.models.variants import VimConfig
    from vimdeploy.models.vim import Vim
    from vimdeploy.runtimes.torch import TorchSession

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    config = VimConfig(d_model=8, depth=1, img_size=(16, 16), num_classes=2)
    with pytest.raises(RuntimeMissing, match="cannot use the device 'cuda'"):
        TorchSession(Vim(config), tiny_info(), device="cuda")
