"""The shipped digits model as `vimdeploy export` writes it, a small one of random weights, and images for both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from official import write_small
from outliers import inject
from PIL import Image

from vimdeploy.export.exporter import ExportOptions, export_checkpoint

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "examples" / "digits" / "vim_digits.pth"


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX file of the shipped model, fused."""
    if not CHECKPOINT.is_file():
        pytest.skip("examples/digits/vim_digits.pth is not in this checkout")
    return export_checkpoint(CHECKPOINT, tmp_path_factory.mktemp("digits") / "digits.vim", ExportOptions()).model


@pytest.fixture(scope="session")
def outliers(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network with outlier channels (outliers.py)."""
    model = ir.load(digits)
    path = tmp_path_factory.mktemp("outliers") / "model.onnx"
    ir.save(inject(model, "scan"), path)
    return path


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of random weights, 32 x 32 pixels, 5 classes."""
    folder = tmp_path_factory.mktemp("small")
    return export_checkpoint(write_small(folder / "small.pth"), folder / "small.vim", ExportOptions()).model


@pytest.fixture
def small(small_model: Path, tmp_path: Path) -> Path:
    """A copy of that file of the test's own."""
    copy = tmp_path / "model.onnx"
    copy.write_bytes(small_model.read_bytes())
    return copy


def write_images(folder: Path, count: int, *, classes: int = 0, size: int = 32, seed: int = 0) -> Path:
    """Pictures of soft noise, in `classes` class folders or directly in `folder`."""
    generator = np.random.default_rng(seed)
    for i in range(count):
        place = folder / str(i % classes) if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size, size)).save(place / f"{i:04d}.png")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images in no class."""
    return write_images(tmp_path_factory.mktemp("pictures") / "flat", 24)
