"""The inputs a check runs on: random ones that reach every channel, and real images through the real pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vimdeploy.bundle import ModelInfo
from vimdeploy.errors import ImageError
from vimdeploy.images import is_image_name, open_image
from vimdeploy.preprocess import Preprocessing

PHOTOS = Path(__file__).parent / "photos"


def random_images(info: ModelInfo, n: int, seed: int = 0) -> np.ndarray:
    """(n, in_chans, H, W) float32, standard normal: the statistics of normalised images without their structure."""
    shape = (n, info.config.in_chans, *info.config.img_size)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def real_images(info: ModelInfo, paths: Sequence[Path]) -> np.ndarray:
    """(n, 3, H, W) float32 of image files, preprocessed as the model's metadata says. Raises ImageError."""
    preprocess = Preprocessing.from_dict(info.preprocessing)
    return np.stack([preprocess(open_image(path)) for path in paths])


def choose_images(source: Path | None, n: int) -> list[Path]:
    """`n` image files spread evenly over a folder (with its sub-folders), or the photographs that come along."""
    folder = PHOTOS if source is None else source
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise ImageError(f"{folder} does not exist", hint="name an image, or a folder of images")
    found = sorted(path for path in folder.rglob("*") if is_image_name(path) and path.is_file())
    if not found:
        raise ImageError(f"no images in {folder}", hint="name a folder that holds images")
    return [found[i] for i in sorted({round(i * (len(found) - 1) / max(n - 1, 1)) for i in range(n)})]
