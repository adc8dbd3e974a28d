"""engines/capabilities.py against stand-ins that have what each TensorRT has, and no more."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from tensorrt_stand_ins import trt_8_5, trt_10, trt_11

from vimdeploy.engines.capabilities import RTX, TENSORRT, capabilities_of, import_runtime
from vimdeploy.errors import RuntimeMissing, UsageError


def test_8_5_must_be_told_what_the_graph_says() -> None:
    can = capabilities_of(trt_8_5(), TENSORRT)
    assert not can.strongly_typed and not can.strong_flag and can.precision_constraints and can.explicit_batch_flag
    assert not can.bf16 and not can.progress and not can.version_compatible and can.timing_cache and can.needs_gpu
    assert can.plugins == "v2" and not can.functions
    # It claims opset 16 and ignores the attributes that Shape got in 15.
    assert can.max_opset == 14
    assert can.slow_slices
    assert can.cuda_majors == (11,)
    assert str(can) == "TensorRT 8.5.3.1"


def test_10_takes_the_graph_at_its_word() -> None:
    can = capabilities_of(trt_10(), TENSORRT)
    assert can.strongly_typed and can.strong_flag and not can.explicit_batch_flag
    assert can.bf16 and can.progress and can.version_compatible and can.functions
    assert can.plugins == "v3" and can.max_opset is None and not can.slow_slices


def test_11_has_no_precision_flags_left() -> None:
    can = capabilities_of(trt_11(), TENSORRT)
    assert can.strongly_typed and can.strong_flag and not can.precision_constraints


def test_rtx_takes_no_plugin_and_needs_no_card_to_build() -> None:
    can = capabilities_of(trt_11(), RTX)
    assert can.plugins == "none" and not can.needs_gpu and not can.timing_cache and not can.version_compatible
    assert str(can) == "TensorRT-RTX 11.4.0.106"


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="'openvino'"):
        import_runtime("openvino")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(RuntimeMissing, match="tensorrt is not installed") as caught:
        import_runtime(TENSORRT)
    assert caught.value.hint == "pip install 'vimdeploy[tensorrt]'"
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    with pytest.raises(RuntimeMissing, match="without its libraries"):
        import_runtime(TENSORRT)
