"""Images and folders of images: what is read, in which order, and each refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vimdeploy.errors import ImageError
from vimdeploy.images import ImageFolder, open_image


def put(path: Path, colour: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (32, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def noisy_bytes(tmp_path: Path, suffix: str) -> bytes:
    path = tmp_path / f"whole{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


def test_opens_what_pil_opens(tmp_path: Path) -> None:
    image = open_image(put(tmp_path / "a.png"))
    assert image.getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tiff", ".webp", ".ppm"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.95])
def test_truncated(tmp_path: Path, suffix: str, keep: float) -> None:
    whole = noisy_bytes(tmp_path, suffix)
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(ImageError) as caught:
        open_image(path)
    assert str(path) in caught.value.message and caught.value.exit_code == 2 and caught.value.hint


def test_not_an_image(tmp_path: Path) -> None:
    path = tmp_path / "notes.jpg"
    path.write_text("this is text")
    with pytest.raises(ImageError, match=r"notes\.jpg is not an image"):
        open_image(path)
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"empty\.png is not an image"):
        open_image(tmp_path / "empty.png")


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.jpg does not exist"):
        open_image(tmp_path / "none.jpg")


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is a folder"):
        open_image(tmp_path)


def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "large.png", size=(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4999)
    with pytest.raises(ImageError, match=r"large\.png is refused"):
        open_image(path)
    # PIL only warns up to twice its limit, and upstream reads such images.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5001)
    assert open_image(path).size == (100, 100)


def test_classes_and_order_are_torchvisions(tmp_path: Path) -> None:
    for name in ("n02/b.JPEG", "n02/a.png", "n02/sub/c.jpg", "n10/x.webp", "n01/y.bmp"):
        put(tmp_path / name)
    (tmp_path / "n01/readme.txt").write_text("not an image")
    folder = ImageFolder(tmp_path)
    assert folder.classes == ["n01", "n02", "n10"]
    assert [(str(path.relative_to(tmp_path)), index) for path, index in folder.samples] == [
        ("n01/y.bmp", 0), ("n02/a.png", 1), ("n02/b.JPEG", 1), ("n02/sub/c.jpg", 1), ("n10/x.webp", 2),
    ]  # fmt: skip
    assert folder.notices == []


def test_flat_folder(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match=r"flat: 1 images.*every label would be wrong"):
        ImageFolder(tmp_path)


@pytest.mark.parametrize("inside", [None, "class/notes.txt", "notes.txt"])
def test_no_images(tmp_path: Path, inside: str | None) -> None:
    if inside:
        (tmp_path / inside).parent.mkdir(exist_ok=True)
        (tmp_path / inside).write_text("x")
    with pytest.raises(ImageError, match="holds no images"):
        ImageFolder(tmp_path)


def test_missing_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        ImageFolder(tmp_path / "none")
    with pytest.raises(ImageError, match="is a file"):
        ImageFolder(put(tmp_path / "a.png"))


def test_splits_are_not_classes(tmp_path: Path) -> None:
    put(tmp_path / "train/cat/a.png")
    put(tmp_path / "val/cat/a.png")
    with pytest.raises(ImageError, match="data splits") as caught:
        ImageFolder(tmp_path)
    assert caught.value.hint == f"name the split: {tmp_path / 'val'}"
    assert ImageFolder(tmp_path / "val").classes == ["cat"]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    put(tmp_path / "train/a.png")
    put(tmp_path / "bus/a.png")
    assert ImageFolder(tmp_path).classes == ["bus", "train"]


def test_notices(tmp_path: Path) -> None:
    put(tmp_path / "a/1.png")
    put(tmp_path / "stray.png")
    (tmp_path / "b").mkdir()
    (tmp_path / ".cache").mkdir()
    folder = ImageFolder(tmp_path)
    assert folder.classes == ["a", "b"]  # an empty class keeps its number, a hidden folder has none
    assert "without images: b" in folder.notices[0] and "1 images directly" in folder.notices[1]


def test_targets(tmp_path: Path) -> None:
    for name in ("blue", "red"):
        put(tmp_path / name / "1.png")
    folder = ImageFolder(tmp_path)
    assert folder.targets(2) == [0, 1]
    assert folder.targets(3, ("red", "green", "blue")) == [2, 0]  # by name
    for classes in (1, 3):
        with pytest.raises(ImageError, match=f"2 class folders, the model {classes} classes"):
            folder.targets(classes)
    with pytest.raises(ImageError, match="2 class folders"):
        folder.targets(3, ("red", "green", "yellow"))
