"""verify/overflow.py: the layer that overflows fp16 is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from zoo import BASE, exported, images_for

from vimdeploy.verify.overflow import explain, first_nonfinite


def write(path: Path, factor: float, fusion: str = "none") -> Path:
    """A Vim whose second layer's in_proj is `factor` times as large."""
    model = exported(BASE, fusion=fusion)
    (weight,) = [t for t in model.graph.initializer if t.name == "layers.1.mixer.in_proj.weight.T"]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), weight.name))
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize("fusion", ["none", "full"])
def test_the_layer_is_named(tmp_path: Path, fusion: str) -> None:
    found = first_nonfinite(write(tmp_path / "m.onnx", 3e4, fusion), "fp16", images_for(BASE, 1))
    assert found is not None and found.startswith("Inf first in layers.1.mixer.in_proj/MatMul (MatMul)")


@pytest.mark.parametrize("fusion", ["none", "full"])
def test_a_sound_model_has_none(tmp_path: Path, fusion: str) -> None:
    for precision in ("fp32", "fp16"):
        assert first_nonfinite(write(tmp_path / "m.onnx", 1, fusion), precision, images_for(BASE, 1)) is None


def test_every_output_of_a_node_is_looked_at(tmp_path: Path) -> None:
    """The second of a fused convolution, whose weights alone are at fault."""
    model = exported(BASE, fusion="full")
    (bias,) = [t for t in model.graph.initializer if t.name == "layers.1.mixer.conv1d_b.bias"]
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(1e5), bias.name))
    onnx.save(model, str(tmp_path / "m.onnx"))
    found = first_nonfinite(tmp_path / "m.onnx", "fp16", images_for(BASE, 1))
    assert found is not None and found.startswith("Inf first in layers.1.mixer/BiCausalConv1d (BiCausalConv1d)")


def test_the_bad_image_is_looked_at(tmp_path: Path) -> None:
    model, images = write(tmp_path / "m.onnx", 1), images_for(BASE, 3)
    images[1] *= 1e30
    outputs = np.zeros((3, 7))
    outputs[1] = np.nan
    assert " first in " in explain(model, "fp16", images, outputs)
    assert "not beside the artifact" in explain(tmp_path / "none.onnx", "fp16", images, outputs)
    assert "does not compute bf16" in explain(model, "bf16", images, outputs)
    assert explain(model, "fp16", images[:1], np.zeros((1, 7))) == "the reference itself is not finite"
