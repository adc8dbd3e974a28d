"""From a picture to the array a Vision Mamba reads: upstream's evaluation pipeline, without torchvision.

Source: vim-spec.md section 6. `timm`'s default_cfg says otherwise (crop 0.9, mean and std 0.5) and was never what the
models were evaluated with.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vimdeploy.errors import ImageError, ModelFileError, UsageError
from vimdeploy.models.variants import VimConfig

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
EVAL_CROP_RATIO = 0.875
# Upstream neither resizes nor crops models this small: their data sets come in the model's size.
SMALL = 32


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes model input. ``img_size`` is (height, width).

    ``resize`` is the shorter side, in pixels, of the frame that the image is scaled to cover before ``img_size`` is
    cut from its middle; the frame has the proportions of ``img_size``, so for square models this is torchvision's
    ``Resize(resize)``. None: an image of exactly ``img_size`` is taken as it is, and any other is scaled to cover
    ``img_size`` (upstream, which has no such step, would stop there).
    """

    img_size: tuple[int, int]
    resize: int | None
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    @classmethod
    def for_config(cls, config: VimConfig, args: Mapping[str, Any] | None = None) -> Preprocessing:
        """The pipeline a model was evaluated with.

        ``args`` are the checkpoint's training arguments; ``eval_crop_ratio`` among them is honoured. Raises
        UsageError for a ratio that is not above 0 and at most 1.
        """
        ratio = (args or {}).get("eval_crop_ratio")
        if ratio is None:
            ratio = EVAL_CROP_RATIO
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
            raise UsageError(
                f"the checkpoint's eval_crop_ratio is {ratio!r}: it must be above 0 and at most 1",
                hint=f"correct it in the checkpoint's args, or remove it to take the usual {EVAL_CROP_RATIO}",
            )
        short = min(config.img_size)
        return cls(config.img_size, None if max(config.img_size) <= SMALL else int(short / float(ratio)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`. Raises ModelFileError for values that describe no pipeline."""
        try:
            height, width = (int(side) for side in values["img_size"])
            resize = None if values["resize"] is None else int(values["resize"])
            mean = tuple(float(value) for value in values["mean"])
            std = tuple(float(value) for value in values["std"])
            interpolation = values["interpolation"]
            unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
            if unknown:
                raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
            if min(height, width) < 1 or (resize is not None and resize < min(height, width)):
                raise ValueError(f"cannot cut {height}x{width} from a shorter side of {resize}")
            if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
                raise ValueError(f"mean {mean}, std {std}")
            if interpolation != "bicubic":
                raise ValueError(f"interpolation {interpolation!r}: only bicubic is known")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ModelFileError(
                f"the model's preprocessing cannot be read ({type(error).__name__}: {error})",
                hint="export it again with `vimdeploy export CKPT`",
            ) from error
        return cls((height, width), resize, interpolation, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) to which an image of this size is scaled before the crop.

        As torchvision computes it, the side that fits the frame becomes exact and the other is int(frame * other /
        this), truncated; for a square frame the side that fits is the shorter one, the width when both are equal.
        """
        crop_height, crop_width = self.img_size
        if self.resize is None:
            if (width, height) == (crop_width, crop_height):
                return width, height
            frame_width, frame_height = crop_width, crop_height
        else:
            short = min(crop_height, crop_width)
            frame_width, frame_height = (int(self.resize * side / short) for side in (crop_width, crop_height))
        if width * frame_height <= height * frame_width:
            return frame_width, int(frame_width * height / width)
        return int(frame_height * width / height), frame_height

    def crop_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the centre crop, at round-half-to-even of half the margin, as torchvision."""
        crop_height, crop_width = self.img_size
        top, left = round((height - crop_height) / 2), round((width - crop_width) / 2)
        return left, top, left + crop_width, top + crop_height

    def picture(self, image: Image.Image) -> Image.Image:
        """RGB, resized and cropped to ``img_size``, still 8-bit: what the model is shown. Raises ImageError."""
        from PIL import Image

        image = to_rgb(image)
        size = self.resized(*image.size)
        # Long and thin images grow by their own proportions: 1x30000 would become 224x6720000.
        if Image.MAX_IMAGE_PIXELS is not None and size[0] * size[1] > 2 * Image.MAX_IMAGE_PIXELS:
            raise ImageError(
                f"an image of {image.width}x{image.height} would be scaled to {size[0]}x{size[1]} pixels",
                hint="crop it to usual proportions first",
            )
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)  # antialiased, as always in PIL
        box = self.crop_box(*size)
        return image if box == (0, 0, *size) else image.crop(box)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Any PIL image -> float32 (3, H, W), normalised, channels in RGB order. Raises ImageError."""
        import numpy as np

        pixels = np.asarray(self.picture(image), dtype=np.float32).transpose(2, 0, 1)
        mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (self.mean, self.std))
        return np.ascontiguousarray((pixels / np.float32(255) - mean) / std)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as PIL's ``convert('RGB')`` gives it, like upstream: alpha dropped, EXIF orientation not applied.

    Except for more than 8 bits a channel, which PIL clips to white: 16-bit grey is scaled (65535 to 255), and 32-bit
    integers and floats outside 0..255 are refused with ImageError, as their range says nothing of their white.
    """
    import numpy as np
    from PIL import Image

    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 255):  # also true for NaN
            raise ImageError(
                f"pixel values from {values.min():g} to {values.max():g} in a 32-bit image: 0 to 255 is expected",
                hint="convert it to 8 bits a channel first",
            )
    return image.convert("RGB")
