"""Preprocessing against a formulation of its own in torch, written from torchvision's rules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vimdeploy.errors import ImageError, ModelFileError, UsageError
from vimdeploy.images import open_image
from vimdeploy.models.variants import VimConfig, registered_config
from vimdeploy.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, to_rgb


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), values.tobytes())


def torch_pipeline(image: Image.Image, resize: int, crop: int) -> torch.Tensor:
    """Resize(resize, bicubic), CenterCrop(crop), ToTensor, Normalize: step by step as torchvision documents them."""
    width, height = image.size
    short, long = sorted((width, height))
    new_long = int(resize * long / short)
    size = (resize, new_long) if width <= height else (new_long, resize)
    pixels = torch.from_numpy(np.array(image.resize(size, Image.Resampling.BICUBIC))).permute(2, 0, 1)
    top = round((pixels.shape[1] - crop) / 2.0)
    left = round((pixels.shape[2] - crop) / 2.0)
    x = pixels[:, top : top + crop, left : left + crop].to(torch.float32).div(255)
    return x.sub(torch.tensor(IMAGENET_MEAN)[:, None, None]).div(torch.tensor(IMAGENET_STD)[:, None, None])


@pytest.mark.parametrize(
    "width,height",
    [(256, 256), (500, 375), (375, 500), (333, 251), (251, 333), (257, 256), (224, 224), (64, 48), (1000, 37), (1, 1)],
)
def test_equals_upstreams_pipeline_to_the_bit(width: int, height: int) -> None:
    preprocessing = Preprocessing.for_config(registered_config("tiny"), {})
    image = noise(width, height)
    got = preprocessing(image)
    assert got.shape == (3, 224, 224) and got.dtype == np.float32 and got.flags.c_contiguous
    np.testing.assert_array_equal(got, torch_pipeline(image, 256, 224).numpy())


@pytest.mark.parametrize(
    "size,args,resize",
    [(224, {}, 256), (384, {}, 438), (256, {}, 292), (224, {"eval_crop_ratio": 1.0}, 224),
     (224, {"eval_crop_ratio": 0.9}, 248), (224, {"eval_crop_ratio": None}, 256), (33, {}, 37), (32, {}, None),
     (28, {}, None)],
)  # fmt: skip
def test_resize_follows_size_and_crop_ratio(size: int, args: dict[str, object], resize: int | None) -> None:
    config = VimConfig(d_model=8, img_size=(size, size))
    preprocessing = Preprocessing.for_config(config, args)
    assert preprocessing.resize == resize
    # vim-spec.md 6: not timm's default_cfg, whose mean and std are 0.5.
    assert (preprocessing.mean, preprocessing.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert Preprocessing.from_dict(preprocessing.to_dict()) == preprocessing


@pytest.mark.parametrize("ratio", [0, -1, 1.5, float("nan"), "0.875", True])
def test_a_crop_ratio_that_cannot_be_is_refused(ratio: object) -> None:
    with pytest.raises(UsageError, match="eval_crop_ratio"):
        Preprocessing.for_config(registered_config("tiny"), {"eval_crop_ratio": ratio})


# What torchvision's int() truncation and Python's round-half-even give, worked by hand.
@pytest.mark.parametrize(
    "width,height,resized,box",
    [
        (500, 375, (341, 256), (58, 16, 282, 240)),  # 341.33 -> 341; (341 - 224) / 2 = 58.5 -> 58, even
        (375, 500, (256, 341), (16, 58, 240, 282)),
        (300, 200, (384, 256), (80, 16, 304, 240)),
        (449, 331, (347, 256), (62, 16, 286, 240)),  # 347.26; 61.5 -> 62, even
        (100, 100, (256, 256), (16, 16, 240, 240)),
    ],
)
def test_geometry(width: int, height: int, resized: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    preprocessing = Preprocessing.for_config(registered_config("tiny"), {})
    assert preprocessing.resized(width, height) == resized
    assert preprocessing.crop_box(*resized) == box


def test_every_size_covers_its_crop() -> None:
    rng = np.random.default_rng(1)
    for _ in range(2000):
        crop_h, crop_w, width, height = (int(v) for v in rng.integers(16, 700, 4))
        preprocessing = Preprocessing.for_config(VimConfig(d_model=8, img_size=(crop_h, crop_w)), {})
        new_w, new_h = preprocessing.resized(width, height)
        left, top, right, bottom = preprocessing.crop_box(new_w, new_h)
        assert left >= 0 and top >= 0 and right <= new_w and bottom <= new_h
        assert (bottom - top, right - left) == (crop_h, crop_w)


def test_non_square_models_cut_their_own_proportions() -> None:
    preprocessing = Preprocessing.for_config(VimConfig(d_model=8, img_size=(224, 448)), {})
    assert preprocessing.resize == 256
    assert preprocessing.resized(1000, 500) == (512, 256)
    assert preprocessing.resized(500, 500) == (512, 512)
    assert preprocessing(noise(640, 480)).shape == (3, 224, 448)


def test_small_models_take_images_of_their_size_untouched() -> None:
    preprocessing = Preprocessing.for_config(VimConfig(d_model=8, img_size=(32, 32), patch_size=4, stride=4), {})
    image = noise(32, 32)
    assert preprocessing.picture(image) is image
    expected = (np.asarray(image).transpose(2, 0, 1) / 255 - np.reshape(IMAGENET_MEAN, (3, 1, 1))) / np.reshape(
        IMAGENET_STD, (3, 1, 1)
    )
    np.testing.assert_allclose(preprocessing(image), expected, rtol=0, atol=1e-6)


def test_small_models_scale_other_sizes_by_the_shorter_side() -> None:
    preprocessing = Preprocessing.for_config(VimConfig(d_model=8, img_size=(32, 32), patch_size=4, stride=4), {})
    image = noise(96, 64)
    assert preprocessing.resized(96, 64) == (48, 32)
    np.testing.assert_array_equal(preprocessing(image), torch_pipeline(image, 32, 32).numpy())


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "YCbCr", "1"])
def test_modes_are_converted_as_pil_does(mode: str) -> None:
    image = noise(300, 260, "RGB").convert(mode) if mode != "CMYK" else noise(300, 260, "CMYK")
    preprocessing = Preprocessing.for_config(registered_config("tiny"), {})
    np.testing.assert_array_equal(preprocessing(image), torch_pipeline(image.convert("RGB"), 256, 224).numpy())


def test_alpha_is_dropped_not_blended() -> None:
    assert to_rgb(Image.new("RGBA", (2, 2), (200, 100, 50, 0))).getpixel((0, 0)) == (200, 100, 50)


def test_palette_colours_survive_resizing() -> None:
    image = noise(300, 260).convert("P", palette=Image.Palette.ADAPTIVE)
    preprocessing = Preprocessing.for_config(registered_config("tiny"), {})
    # Interpolating palette numbers instead of colours would give another picture altogether.
    np.testing.assert_array_equal(preprocessing(image), torch_pipeline(image.convert("RGB"), 256, 224).numpy())


def test_exif_orientation_is_left_alone_as_upstream_does(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert to_rgb(open_image(tmp_path / "turned.jpg")).size == (40, 20)


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    grey = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    image = open_image(tmp_path / "grey.png")
    assert image.mode.startswith("I;16")
    assert np.asarray(image.convert("RGB"))[0, 2, 0] == 255  # what PIL makes of middle grey, and why we do not ask it
    assert np.asarray(to_rgb(image))[0].tolist() == [[v] * 3 for v in (0, 1, 128, 255)]


def test_16_bit_grey_in_big_endian_order() -> None:
    image = Image.frombytes("I;16B", (2, 1), np.array([0x8080, 0xFFFF], dtype=">u2").tobytes())
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [128, 255]


@pytest.mark.parametrize("value", [300, -1, float("nan")])
def test_32_bit_values_out_of_range_are_refused(value: float) -> None:
    kind = np.float32 if value != value else np.int32
    with pytest.raises(ImageError, match="32-bit"):
        to_rgb(Image.fromarray(np.array([[0, value]], dtype=kind)))


def test_32_bit_values_in_range_are_taken() -> None:
    assert np.asarray(to_rgb(Image.fromarray(np.array([[7, 255]], dtype=np.int32))))[0, :, 0].tolist() == [7, 255]


def test_a_thread_of_an_image_does_not_fill_the_memory() -> None:
    with pytest.raises(ImageError, match="would be scaled to"):
        Preprocessing.for_config(registered_config("tiny"), {})(Image.new("RGB", (1, 30000)))


@pytest.mark.parametrize(
    "change",
    [{"img_size": [0, 4]}, {"img_size": 5}, {"resize": 100}, {"interpolation": "nearest"}, {"std": [1, 0, 1]},
     {"mean": [0.5]}, {"mean": [float("nan")] * 3}, {"colour": "BGR"}, {"resize": "x"}],
)  # fmt: skip
def test_damaged_metadata_is_refused(change: dict[str, object]) -> None:
    values = Preprocessing.for_config(registered_config("tiny"), {}).to_dict()
    with pytest.raises(ModelFileError, match="preprocessing"):
        Preprocessing.from_dict(values | change)
    with pytest.raises(ModelFileError, match="preprocessing"):
        Preprocessing.from_dict({key: value for key, value in values.items() if key != "mean"})
