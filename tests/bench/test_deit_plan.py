"""bench/deit_plan.py around stand-ins for TensorRT and the driver (tests/fake_tensorrt.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_tensorrt import FakeContext, Flag, fake_tensorrt, install
from timm_here import timm

from vimdeploy.bench.deit import DeitShape
from vimdeploy.bench.deit_plan import open_plan
from vimdeploy.errors import EngineError, RuntimeMissing
from vimdeploy.runtimes import cuda

SMALL = DeitShape(width=32, depth=1, heads=2, patch=8, img_size=(16, 16), classes=3)


def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)


def opened(cache: Path, **options: Any) -> Any:
    return open_plan(SMALL, cache, **{"batch": 2, "half": True, "images": images(), **options})


def test_a_plan_is_built_once_for_its_batch_and_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm()
    module = fake_tensorrt()
    install(monkeypatch, module)
    contexts: list[FakeContext] = []
    monkeypatch.setattr(cuda, "Context", lambda: contexts.append(FakeContext()) or contexts[-1])
    deit = opened(tmp_path)
    # What TensorRT 8.5 can read, allowed to take fp16, for one shape.
    assert onnx.load_from_string(module.seen["onnx"]).opset_import[0].version == 14
    assert Flag.FP16 in module.seen["config"].flags
    side = (2, 3, 16, 16)
    assert module.seen["config"].profiles[0].shapes == ("images", side, side, side)
    for _ in range(3):
        deit.prepared.run()
    assert len(module.seen["runs"]) == 2 and deit.prepared.stream == contexts[0].stream
    logits = np.frombuffer(contexts[0].buffers[1].raw, np.float32).reshape(2, 3)
    np.testing.assert_allclose(logits, 2 * images().mean((2, 3)), rtol=1e-6)
    assert deit.engine_bytes and deit.runtime == "TensorRT 8.5.3.1 on NVIDIA H100 80GB HBM3, fp16, CUDA graph"
    deit.close()
    assert contexts[0].closed
    del module.seen["onnx"]
    opened(tmp_path).close()
    assert "onnx" not in module.seen  # out of the cache
    opened(tmp_path, batch=1, images=images()[:1]).close()
    assert "onnx" in module.seen


@pytest.mark.parametrize(
    "behaviour,said",
    [
        ({"parse_errors": [(0, "no such layer")]}, "cannot read DeiT: no such layer"),
        ({"build_errors": ["out of memory"]}, "could not build DeiT: out of memory"),
        ({"refuse_plan": True}, "cannot load"),
        ({"refuse_run": True}, "could not run DeiT"),
    ],
)
def test_what_tensorrt_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: dict[str, Any], said: str
) -> None:
    timm()
    install(monkeypatch, fake_tensorrt(**behaviour))
    contexts: list[FakeContext] = []
    monkeypatch.setattr(cuda, "Context", lambda: contexts.append(FakeContext()) or contexts[-1])
    with pytest.raises(EngineError, match=said) as caught:
        opened(tmp_path)
    assert caught.value.hint and all(context.closed for context in contexts)


def test_a_host_without_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(index: int = 0) -> cuda.Device:
        raise RuntimeMissing("no NVIDIA GPU")

    monkeypatch.setattr(cuda, "device", none)
    with pytest.raises(RuntimeMissing, match="no NVIDIA GPU"):
        opened(tmp_path)
