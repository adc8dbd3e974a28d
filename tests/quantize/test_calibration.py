"""quantize/calibration.py: the cache says everything, and is refused when it is another model's or damaged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from vimdeploy.bundle import read_info
from vimdeploy.errors import ModelFileError, UsageError
from vimdeploy.passes.projections import projections
from vimdeploy.quantize.calibration import Calibration, identity, read_calibration
from vimdeploy.quantize.choose import Choice
from vimdeploy.quantize.recipe import QuantizeOptions, quantize_model

IN, OUT = "layers.0.mixer.in_proj", "layers.0.mixer.out_proj"


def a_calibration(model: Path) -> Calibration:
    info, layers = read_info(model), projections(ir.load(model).graph, ("in_proj", "out_proj"))
    choices = {}
    for layer in layers:
        smooth = layer.name != IN
        factors = np.linspace(0.5, 2, layer.weight.shape[0]).round(3) if smooth else None
        choices[layer.name] = Choice(3.25, "percentile 99.99", 0.5 if smooth else None, factors, 41.234)
    images = {"n": 32, "sha256": "ab" * 32, "source": "pictures"}
    return Calibration(identity(info, layers, choices), images, "auto", choices, (OUT,))


def test_what_is_written_is_read_back(small: Path, tmp_path: Path) -> None:
    before = a_calibration(small)
    before.write(tmp_path / "x.calib.json")
    after = read_calibration(tmp_path / "x.calib.json")
    assert after.to_dict() == json.loads((tmp_path / "x.calib.json").read_text())
    assert (after.model, after.images, after.method, after.keep_fp) == (before.model, before.images, "auto", (OUT,))
    for name, choice in before.layers.items():
        read = after.layers[name]
        assert (read.bound, read.method, read.alpha) == (choice.bound, choice.method, choice.alpha)
        assert (read.factors is None) == (choice.factors is None)
        if choice.factors is not None and read.factors is not None:
            np.testing.assert_array_equal(read.factors, choice.factors)
    assert OUT not in after.quantized and IN in after.quantized
    after.check(read_info(small), projections(ir.load(small).graph), "x")
    # A line a layer, for the eye and for diff.
    lines = (tmp_path / "x.calib.json").read_text().splitlines()
    assert sum('"bound": ' in line for line in lines) == len(before.layers)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.pop("layers"), "is not a calibration cache"),
        (lambda v: v.update(format=2), "is of format 2; this vimdeploy reads 1"),
        (lambda v: v.pop("model"), "is damaged .*model"),
        (lambda v: v["layers"][IN].update(bound=float("nan")), f"the bound of {IN} is nan"),
        (lambda v: v["layers"][IN].update(bound=float("inf")), f"the bound of {IN} is inf"),
        (lambda v: v["layers"][IN].update(bound=0.0), f"the bound of {IN} is 0: it must be finite and above 0"),
        (lambda v: v["layers"][IN].update(bound=-1.0), f"the bound of {IN} is -1"),
        (lambda v: v["layers"][IN].update(bound="wide"), "is damaged"),
        (lambda v: v["layers"][OUT]["factors"].__setitem__(3, 0.0), f"the factors of {OUT} must be finite and above 0"),
        (lambda v: v["layers"][OUT]["factors"].__setitem__(3, float("nan")), f"the factors of {OUT}"),
        (lambda v: v["layers"][OUT].update(factors=[]), f"the factors of {OUT}"),
        (lambda v: v["keep_fp"].append("layers.9.mixer.in_proj"), "keep_fp names layers.9.mixer.in_proj"),
    ],
)
def test_a_damaged_cache_is_refused(change: Any, said: str, small: Path, tmp_path: Path) -> None:
    values = copy.deepcopy(a_calibration(small).to_dict())
    change(values)
    path = tmp_path / "bad.calib.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ModelFileError, match=rf"bad\.calib\.json.*{said}"):
        read_calibration(path)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '"cache"', "\x00\x01"])
def test_what_is_no_cache_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ModelFileError, match="is not a calibration cache"):
        read_calibration(tmp_path / "bad.json")
    with pytest.raises(ModelFileError, match="does not exist"):
        read_calibration(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"checkpoint": "0" * 64}, "another checkpoint"),
        ({"weights": "ema"}, "another set of weights"),
        ({"size": [64, 64]}, "another image size"),
        ({"positions": "repo"}, "other positions"),
        ({"output": "tokens"}, "another output"),
        ({"layers_sha256": "0" * 64}, "other weights"),
    ],
)
def test_a_cache_of_another_model_is_refused(change: dict[str, Any], said: str, small: Path) -> None:
    mine = a_calibration(small)
    other = Calibration({**mine.model, **change}, mine.images, mine.method, mine.layers)
    with pytest.raises(ModelFileError, match=f"x is of another model: it was made for {said}"):
        other.check(read_info(small), projections(ir.load(small).graph), "x")


def test_a_cache_with_a_layer_or_a_width_this_model_has_not_is_refused(small: Path) -> None:
    mine, layers = a_calibration(small), projections(ir.load(small).graph)
    deeper = {**mine.layers, "layers.7.mixer.in_proj": mine.layers[IN]}
    with pytest.raises(ModelFileError, match=r"this one has no layer layers\.7\.mixer\.in_proj"):
        Calibration(mine.model, mine.images, "auto", deeper).check(read_info(small), layers, "x")
    wide = {**mine.layers, IN: Choice(1.0, "minmax", 0.5, np.ones(5), 40.0)}
    with pytest.raises(ModelFileError, match=rf"x has 5 factors for {IN}, which reads 32 channels"):
        Calibration(mine.model, mine.images, "auto", wide).check(read_info(small), layers, "x")


def test_weights_that_changed_since_are_noticed(small: Path) -> None:
    """The metadata says the same; the file does not."""
    mine, model = a_calibration(small), ir.load(small)
    layer = projections(model.graph, ("in_proj",))[0]
    layer.node.inputs[1].const_value = ir.tensor(layer.weight * np.float32(1.001), name=layer.node.inputs[1].name)
    with pytest.raises(ModelFileError, match="other weights"):
        mine.check(read_info(small), projections(model.graph), "x")


def test_the_same_images_give_the_same_cache_and_the_cache_the_same_file(
    small: Path, pictures: Path, tmp_path: Path
) -> None:
    options = QuantizeOptions(pictures, max_drop=100)
    first, second = (quantize_model(small, tmp_path / name / "a.int8.onnx", options) for name in ("one", "two"))
    assert first.cache.read_bytes() == second.cache.read_bytes()
    assert first.path.read_bytes() == second.path.read_bytes()
    again = quantize_model(small, tmp_path / "three" / "a.int8.onnx", QuantizeOptions(first.cache))
    assert again.report["accuracy"] is None  # nothing was run: there were no images
    one, other = ir.load(first.path), ir.load(again.path)
    assert one.graph.initializers.keys() == other.graph.initializers.keys()
    for name, value in one.graph.initializers.items():
        np.testing.assert_array_equal(value.const_value.numpy(), other.graph.initializers[name].const_value.numpy())
    assert again.cache.read_bytes() == first.cache.read_bytes()


def test_one_cache_serves_every_way_the_graph_is_written(small: Path, pictures: Path, tmp_path: Path) -> None:
    from official import write_small
    from zoo import session

    from vimdeploy.export.exporter import ExportOptions, export_checkpoint

    made = quantize_model(small, tmp_path / "a.int8.onnx", QuantizeOptions(pictures, max_drop=100))
    checkpoint = write_small(tmp_path / "small.pth")
    images = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
    outputs = [session(made.path.read_bytes()).run(None, {"images": images})[0]]
    for fusion in ("none", "bidirectional"):
        model = export_checkpoint(checkpoint, tmp_path / f"{fusion}.onnx", ExportOptions(fusion=fusion)).model
        other = quantize_model(model, None, QuantizeOptions(made.cache))
        outputs.append(session(other.path.read_bytes()).run(None, {"images": images})[0])
    # Not bit for bit: a sum in another order may fall on the other side of a rounding step.
    for output in outputs[1:]:
        assert np.sqrt(((output - outputs[0]) ** 2).mean()) < 0.02 * np.sqrt((outputs[0] ** 2).mean())


def test_a_cache_goes_by_its_own_layers_and_may_keep_out_more(small: Path, pictures: Path, tmp_path: Path) -> None:
    made = quantize_model(
        small, tmp_path / "a.int8.onnx", QuantizeOptions(pictures, max_drop=100, include=("x_proj", "head"))
    )
    again = quantize_model(small, tmp_path / "b.int8.onnx", QuantizeOptions(made.cache, keep_fp=("head",)))
    assert made.info.quantization["int8"] == 9 and again.info.quantization["int8"] == 8
    assert again.report["keep_fp"] == ["head"]
    with pytest.raises(UsageError, match="there is no layer 'tail' to keep"):
        quantize_model(small, tmp_path / "c.int8.onnx", QuantizeOptions(made.cache, keep_fp=("tail",)))
