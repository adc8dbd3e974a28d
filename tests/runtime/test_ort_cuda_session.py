"""OrtCudaSession without a card: a CPU session of the real ONNX Runtime computes, host memory stands for the card's.

tests/gpu/ort_cuda.py runs it on one.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_tensorrt import H100, FakeContext, _at
from ort_library import ort_library
from tiny_onnx import LIBRARY_FACTOR, write_tiny_onnx

import vimdeploy.runtimes.library as libraries
from vimdeploy.errors import RuntimeMissing, UsageError
from vimdeploy.runtimes import cuda, open_session
from vimdeploy.runtimes.library import ORT_CUDA_ENVIRONMENT, ORT_CUDA_LIBRARY
from vimdeploy.runtimes.onnxruntime_cuda import PROVIDER, OrtCudaSession, _Card

ort = pytest.importorskip("onnxruntime")


class Binding:
    """Where things lie, by name."""

    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}

    def bind_input(self, name: str, kind: str, number: int, dtype: Any, shape: Any, pointer: int) -> None:
        assert (kind, number) == ("cuda", 0)
        self.inputs[name] = (np.dtype(dtype), shape, pointer)

    def bind_output(self, name: str, kind: str, number: int, dtype: Any, shape: Any, pointer: int) -> None:
        assert (kind, number) == ("cuda", 0)
        self.outputs[name] = (np.dtype(dtype), shape, pointer)


def fake_onnxruntime(**behaviour: Any) -> Any:
    """onnxruntime-gpu: everything but sessions is the real module's. `seen` keeps what sessions were asked."""
    seen: dict[str, Any] = {"runs": []}

    class Session:
        def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
            seen["providers"] = providers
            self._real = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            self.get_inputs, self.get_outputs = self._real.get_inputs, self._real.get_outputs

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"] if behaviour.get("silent") else [PROVIDER, "CPUExecutionProvider"]

        def get_provider_graph_assignment_info(self) -> list[Any]:
            on_cpu = behaviour.get("on_cpu", ())
            nodes = [node for part in self._real.get_provider_graph_assignment_info() for node in part.get_nodes()]
            return [
                SimpleNamespace(ep_name="CPUExecutionProvider" if node.op_type in on_cpu else PROVIDER,
                                get_nodes=lambda node=node: [node])
                for node in nodes
            ]  # fmt: skip

        def io_binding(self) -> Binding:
            return Binding()

        def run_with_iobinding(self, binding: Binding, options: Any) -> None:
            if behaviour.get("fail"):
                raise RuntimeError("CUDA error 700: an illegal memory access\nat line 1")
            try:
                waits = options.get_run_config_entry("disable_synchronize_execution_providers") != "1"
            except RuntimeError:  # onnxruntime's way to say that it was not set
                waits = True
            graph = seen["providers"][0][1]["enable_cuda_graph"] == "1"
            number = options.get_run_config_entry("gpu_graph_id") if graph else None
            ((name, (dtype, shape, pointer)),) = binding.inputs.items()
            seen["runs"].append((shape[0], waits, number, pointer))
            values = self._real.run(list(binding.outputs), {name: _at(pointer, shape).astype(dtype)})
            for value, (_, to_shape, to) in zip(values, binding.outputs.values(), strict=True):
                _at(to, to_shape)[:] = value

    module = SimpleNamespace(**{name: getattr(ort, name) for name in ("SessionOptions", "RunOptions")})
    module.GraphOptimizationLevel, module.__version__, module.__file__ = (
        ort.GraphOptimizationLevel,
        "1.30.0",
        ort.__file__,
    )
    module.InferenceSession, module.seen = Session, seen
    module.get_available_providers = lambda: behaviour.get("available", [PROVIDER, "CPUExecutionProvider"])
    module.preload_dlls = lambda: print("Failed to load libcudnn.so.9")
    return module


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_onnx(tmp_path / "tiny.vim" / "model.onnx")


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "device", lambda index=0: H100)
    monkeypatch.setattr(cuda, "Context", FakeContext)


def install(monkeypatch: pytest.MonkeyPatch, **behaviour: Any) -> Any:
    module = fake_onnxruntime(**behaviour)
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    return module.seen


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, 3, 32, 32), dtype=np.float32)


def refused(model: Path, library: Path | None = None, **options: Any) -> RuntimeMissing:
    with pytest.raises(RuntimeMissing) as caught:
        OrtCudaSession(model, library=library, **options)
    assert caught.value.exit_code == 3
    return caught.value


def test_batches_of_any_size_run_on_the_card(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = install(monkeypatch)
    with OrtCudaSession(model, library=ort_library()) as session:
        assert session.describe() == "onnxruntime 1.30.0 CUDA on NVIDIA H100 80GB HBM3, vim op library"
        for count in (2, 5, 5, 2):
            got = session.run(images(count))["logits"]
            np.testing.assert_allclose(got, LIBRARY_FACTOR * images(count).mean((2, 3)), atol=1e-6)
        assert len(session._cuda.buffers) == 2  # those of the last size
        with pytest.raises(UsageError, match="not float64"):
            session.run(images(1).astype(np.float64))
    (name, options), fallback = seen["providers"]
    assert (name, fallback) == (PROVIDER, "CPUExecutionProvider")
    wanted = {"device_id": "0", "user_compute_stream": "7", "use_tf32": "0", "enable_cuda_graph": "0"}
    assert {name: options[name] for name in wanted} == wanted
    # Each ends with ONNX Runtime's own wait: what it would free later, after the session, ends the process.
    assert all(waits and number is None for _, waits, number, _ in seen["runs"])
    assert capsys.readouterr().out == ""
    with pytest.raises(UsageError, match="closed"):
        session.run(images(1))


def test_a_graph_for_each_batch_size_at_places_that_stay(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = install(monkeypatch)
    with OrtCudaSession(model, library=None, cuda_graph=True) as session:
        for count in (2, 5, 2, 5):
            np.testing.assert_allclose(session.run(images(count))["logits"], images(count).mean((2, 3)), atol=1e-6)
    replays = [(2, False, "2"), (5, False, "5"), (2, False, "2"), (5, False, "5")]  # waited for by whoever reads them
    assert [(batch, waits, number) for batch, waits, number, _ in seen["runs"]] == replays
    assert len({pointer for *_, pointer in seen["runs"]}) == 2


def test_prepared_runs_copy_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = install(monkeypatch)
    with OrtCudaSession(model, library=None) as session:
        prepared = session.prepare(images(3))
        assert prepared.stream == 7
        monkeypatch.setattr(FakeContext, "upload", None)
        monkeypatch.setattr(FakeContext, "download", None)
        prepared.run()
    assert len(seen["runs"]) == 2


def test_no_card(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)

    def none(index: int = 0) -> None:
        raise RuntimeMissing("no NVIDIA GPU on this host")

    monkeypatch.setattr(cuda, "device", none)
    assert refused(model).message == "no NVIDIA GPU on this host"


def test_an_onnxruntime_for_cpus_only(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, available=["CPUExecutionProvider"])
    error = refused(model)
    assert error.message == "this onnxruntime (1.30.0) has no CUDA provider"
    assert "onnxruntime-gpu" in str(error.hint)


def test_a_provider_that_does_not_load_is_no_reason_to_take_the_cpu(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, silent=True)
    # The real reason, of this host: its onnxruntime has no such library.
    message = refused(model).message
    assert message.startswith("ONNX Runtime 1.30.0 cannot use CUDA: ") and "libonnxruntime_providers" in message


def test_a_library_without_cuda_ops_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, on_cpu={"SelectiveScan"})
    error = refused(model, ort_library())
    assert error.message == "the op library has SelectiveScan for the CPU only"
    assert ORT_CUDA_LIBRARY in str(error.hint)


def test_nodes_of_other_domains_may_lie_on_the_cpu(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, on_cpu={"ReduceMean"})
    OrtCudaSession(model, library=ort_library()).close()


def test_a_run_that_fails(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vimdeploy.errors import ModelFileError

    install(monkeypatch, fail=True)
    with OrtCudaSession(model, library=None) as session, pytest.raises(ModelFileError) as caught:
        session.run(images(4))
    assert caught.value.message.endswith("on a batch of 4: CUDA error 700: an illegal memory access")


def test_open_session_takes_the_cuda_library(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch)
    monkeypatch.setattr(libraries, "_folders", lambda: iter([tmp_path]))
    monkeypatch.setenv(ORT_CUDA_ENVIRONMENT, str(ort_library()))
    with open_session(model, runtime="onnxruntime-cuda") as session:
        assert isinstance(session, OrtCudaSession) and session.notice is None
        assert session.describe().endswith("vim op library")
    monkeypatch.setenv(ORT_CUDA_ENVIRONMENT, str(tmp_path / "gone.so"))
    with pytest.raises(RuntimeMissing, match="VIMDEPLOY_ORT_CUDA_LIBRARY names"):
        open_session(model, runtime="onnxruntime-cuda")
    monkeypatch.delenv(ORT_CUDA_ENVIRONMENT)
    with open_session(model, runtime="onnxruntime-cuda") as session:
        assert "function body" in session.describe()
        assert session.notice is not None and ORT_CUDA_LIBRARY in session.notice
        assert "VIMDEPLOY_BUILD_CUDA" in session.notice


def test_a_recording_has_the_card_to_itself() -> None:
    """ONNX Runtime records in the mode in which another thread's calls fail, and spoil the recording."""
    card, order = _Card(), []
    inside, go_on = threading.Event(), threading.Event()

    def run() -> None:
        with card.used(alone=False):
            inside.set()
            go_on.wait(10)
            order.append("run ends")

    def record() -> None:
        with card.used(alone=True):
            order.append("recording")

    threads = [threading.Thread(target=run), threading.Thread(target=record)]
    threads[0].start()
    assert inside.wait(10)
    with card.used(alone=False):  # two runs at once
        threads[1].start()
        order.append("another run")
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert order == ["another run", "run ends", "recording"]
    with pytest.raises(RuntimeError), card.used(alone=True):
        raise RuntimeError("a recording that fails")
    with card.used(alone=False):
        pass
