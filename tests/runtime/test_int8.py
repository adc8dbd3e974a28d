"""ONNX Runtime's int8 products: asked to be exact where the quick ones are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vimdeploy.runtimes import onnxruntime as module
from vimdeploy.runtimes.onnxruntime import int8_overflows, session_options

KEY = "session.x64quantprecision"


@pytest.mark.parametrize(
    ("machine", "flags", "overflows"),
    [
        ("x86_64", "sse4_2 avx avx2 fma", True),
        ("x86_64", "avx2 avx512f avx512bw avx512vl", True),
        ("x86_64", "avx2 avx512f avx512_vnni", False),
        ("x86_64", "avx2 avx_vnni", False),
        ("AMD64", "avx2", True),
        ("x86_64", "avx2 avx512_vnnix", True),
        ("aarch64", "asimd", False),
    ],
)
def test_processors_whose_quick_products_overflow(machine: str, flags: str, overflows: bool, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nmodel name : x\nflags\t\t: fpu {flags} rdrand\nbugs : avx512_vnni\n")
    assert int8_overflows(machine, cpuinfo) is overflows


def test_where_it_cannot_be_told_the_safe_way_is_taken(tmp_path: Path) -> None:
    assert int8_overflows("x86_64", tmp_path / "none") and not int8_overflows("aarch64", tmp_path / "none")


@pytest.mark.parametrize("overflows", [True, False])
def test_sessions_are_opened_accordingly(overflows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "int8_overflows", lambda: overflows)
    options = session_options(None)
    if overflows:
        assert options.get_session_config_entry(KEY) == "1"
    else:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry(KEY)


@pytest.mark.parametrize("overflows", [True, False])
def test_products_at_the_ends_of_the_range_are_exact(overflows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What overflows in 16 bits: two products of 255 x 127. On this processor, however it is told to compute."""
    if not overflows and int8_overflows():
        pytest.skip("this processor has no VNNI: the quick way is known to be wrong here")
    k, n = 64, 32
    levels = np.full((k, n), 127, np.int8)
    constants = {
        "scale": np.float32(1),
        "zero": np.int8(0),
        "w": levels,
        "ws": np.ones(n, np.float32),
        "wz": np.zeros(n, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=1),
        helper.make_node("MatMul", ["d", "wd"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [8, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [8, n])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    import onnxruntime

    monkeypatch.setattr(module, "int8_overflows", lambda: overflows)
    one = onnxruntime.InferenceSession(
        model.SerializeToString(), session_options(None, threads=1), ["CPUExecutionProvider"]
    )
    x = np.random.default_rng(0).choice([-128.0, 127.0], (8, k)).astype(np.float32)
    np.testing.assert_array_equal(one.run(None, {"x": x})[0], x @ levels.astype(np.float32))
