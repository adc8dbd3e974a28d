"""quantize/images.py: which images calibrate, and which are refused with what sentence."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vimdeploy.bundle import read_info
from vimdeploy.errors import ImageError, UsageError
from vimdeploy.quantize.images import ENVIRONMENT, FEWEST, find_set, known_sets, load_images, read_index

ROOT = Path(__file__).resolve().parents[2]


def paint(folder: Path, count: int, *, flat: bool = False, sub: str = "") -> Path:
    for i in range(count):
        place = folder / sub
        place.mkdir(parents=True, exist_ok=True)
        pixels = (
            np.full((32, 32, 3), i, np.uint8)
            if flat
            else np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        )
        Image.fromarray(pixels).save(place / f"{'flat' if flat else 'noise'}{i:03d}.png")
    return folder


def test_images_of_a_folder_come_in_the_order_of_their_paths(small: Path, tmp_path: Path) -> None:
    folder = paint(paint(tmp_path / "images", 10, sub="b"), 10, sub="a")
    found = load_images(folder, read_info(small))
    assert found.batch.shape == (20, 3, 32, 32) and found.batch.dtype == np.float32
    assert found.targets is None  # two folders, five classes: the folder says nothing of labels
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.png")):
        digest.update(path.read_bytes())
    assert found.sha256 == digest.hexdigest()
    half = load_images(folder, read_info(small), limit=16)
    np.testing.assert_array_equal(half.batch, found.batch[[i * 20 // 16 for i in range(16)]])


def test_class_folders_that_fit_the_model_bring_labels(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name in "abcde":
        paint(folder, 4, sub=name)
    found = load_images(folder, read_info(small))
    assert found.targets is not None and found.targets.tolist() == [i for i in range(5) for _ in range(4)]


def test_too_few_images_are_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=f"holds {FEWEST - 1} images, too few.*at least {FEWEST}"):
        load_images(paint(tmp_path / "images", FEWEST - 1), read_info(small))


def test_an_empty_folder_is_refused(small: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(ImageError, match="no images in"):
        load_images(tmp_path / "images", read_info(small))


def test_images_of_one_colour_do_not_count(small: Path, tmp_path: Path) -> None:
    folder = paint(tmp_path / "images", 40, flat=True)
    with pytest.raises(ImageError, match=r"40 of 40 images .* one colour all over .flat000.png"):
        load_images(folder, read_info(small))
    paint(folder, FEWEST)
    found = load_images(folder, read_info(small))
    assert found.notices == ("40 images are of one colour all over, flat000.png first",)


def test_an_unlabelled_set_is_refused_where_labels_are_needed(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is flat"):
        load_images(paint(tmp_path / "images", 20), read_info(small), labelled=True)
    with pytest.raises(ImageError, match="2 class folders, the model 5 classes"):
        load_images(paint(paint(tmp_path / "more", 10, sub="a"), 10, sub="b"), read_info(small), labelled=True)


def test_a_damaged_image_is_named(small: Path, tmp_path: Path) -> None:
    folder = paint(tmp_path / "images", 20)
    (folder / "noise007.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"noise007.png is not an image"):
        load_images(folder, read_info(small))


def test_a_name_that_is_neither_folder_nor_set_is_refused_with_the_sets_there_are(small: Path) -> None:
    with pytest.raises(
        ImageError, match="nowhere is neither a folder nor a calibration set; the sets here: digits, digits-val"
    ):
        load_images("nowhere", read_info(small))


@pytest.mark.parametrize("content", ["[]", "{", '{"sets": {"a": {}}}', '{"sets": []}'])
def test_a_damaged_index_is_refused(content: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index.json").write_text(content)
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    with pytest.raises(ImageError, match=r"index.json is not an index"):
        load_images("a", read_info(small))


def test_a_set_whose_folder_is_gone_is_refused(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index.json").write_text('{"sets": {"a": {"folder": "gone"}}}')
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    assert known_sets() == ["a"]
    with pytest.raises(ImageError, match=r"the folder of the set a, .*gone, is missing"):
        load_images("a", read_info(small))


def test_a_model_that_does_not_read_rgb_is_refused(small: Path, tmp_path: Path) -> None:
    info = read_info(small)
    grey = type(info)(**{**info.__dict__, "config": info.config.replace(in_chans=1)})
    with pytest.raises(UsageError, match="reads 1 channels"):
        load_images(paint(tmp_path / "images", 20), grey)


def test_the_shipped_index_describes_what_is_there(digits: Path) -> None:
    index = json.loads((ROOT / "calib" / "index.json").read_text())
    assert set(index["sets"]) == set(known_sets()) == {"digits", "digits-val"}
    for name, entry in index["sets"].items():
        assert find_set(name).resolve() == ROOT / "calib" / entry["folder"]  # type: ignore[union-attr]
        assert entry["for"] and entry["licence"]
        found = load_images(name, read_info(digits), limit=None)
        assert (len(found), found.sha256) == (entry["images"], entry["sha256"])
        assert found.targets is not None and len(set(found.targets.tolist())) == entry["classes"]
    for cache, entry in index["caches"].items():
        assert (ROOT / "calib" / cache).is_file() and entry["set"] in index["sets"]
    assert read_index(ROOT) == {}
